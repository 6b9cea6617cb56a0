"""The body of the RL scripts in trainers/: settings, data, rewards and model to a trainer, a run and a saved model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from trl import ModelConfig, get_peft_config, get_quantization_config

from rl4dlm.algorithms.base import DiffusionPolicyTrainer
from rl4dlm.grading import load_rewards
from rl4dlm.launching import RewardArguments, check_settings, load_splits, model_options, parse
from rl4dlm.models.loading import load_tokenizer

TrainerT = TypeVar("TrainerT", bound=DiffusionPolicyTrainer)


def run(trainer_class: type[TrainerT], argv: Sequence[str] | None = None) -> TrainerT:
    """Trains with a trainer of this library, by settings of the command line and the YAML file that it names.

    Args:
        trainer_class: the algorithm; its `config_class` has the settings.
        argv: arguments; None: the process's own. They are those of `RewardArguments`, the config and `trl.ModelConfig`.

    Returns:
        The trainer, after training and saving.
    """
    script, training, model = parse(argv, RewardArguments, trainer_class.config_class, ModelConfig)
    check_settings(training, model)
    rewards = load_rewards(script.reward_funcs)
    train_dataset, eval_dataset = load_splits(script, evaluating=training.eval_strategy != "no")
    tokenizer = load_tokenizer(model.model_name_or_path, model.model_revision)
    training.model_init_kwargs = model_options(training, model)
    trainer = trainer_class(
        model.model_name_or_path,
        rewards,
        training,
        train_dataset,
        eval_dataset,
        tokenizer,
        peft_config=get_peft_config(model),
        quantization_config=get_quantization_config(model),
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model(training.output_dir)
    trainer.end()
    return trainer
