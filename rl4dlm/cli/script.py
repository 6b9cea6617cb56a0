"""The body of the RL scripts in trainers/: settings, data, rewards and model to a trainer, a run and a saved model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from trl import ModelConfig, get_peft_config, get_quantization_config

from rl4dlm.cli.arguments import (
    RewardArguments,
    TeachingArguments,
    check_settings,
    load_splits,
    model_options,
    parse,
    with_completions,
)
from rl4dlm.grading import load_rewards
from rl4dlm.training.config import set_but_not_supported
from rl4dlm.training.interventions.inpainting import Inpainting, InpaintingSettings
from rl4dlm.training.preemption import PREEMPTED
from rl4dlm.training.setup import tokenizer_for
from rl4dlm.training.trainer import DiffusionPolicyTrainer

GUIDANCE = ("inpainting",)
TrainerT = TypeVar("TrainerT", bound=DiffusionPolicyTrainer)


@dataclass
class GuidanceArguments(InpaintingSettings):
    """What may guide the rollouts of an algorithm that does not say so itself; `InpaintingSettings` are its settings.

    Args:
        guidance: `"inpainting"`: pieces of worked solutions, see `Inpainting`; None: nothing.

    Raises:
        ValueError: an unknown `guidance`, or settings without it.
    """

    guidance: str | None = field(
        default=None, metadata={"help": f"What guides rollouts: {', '.join(GUIDANCE)}. Default: nothing."}
    )

    def __post_init__(self) -> None:
        if self.guidance is not None and self.guidance not in GUIDANCE:
            raise ValueError(f"guidance={self.guidance!r} is not allowed; choose None or one of {', '.join(GUIDANCE)}")
        if self.guidance is None:
            idle = {f.name: "it has no effect without guidance='inpainting'" for f in fields(InpaintingSettings)}
            refused = set_but_not_supported(self, idle)
            if refused:
                raise ValueError("; ".join(refused))
        self.check_inpainting()

    def intervention(self) -> Inpainting | None:
        """What a trainer is to be given."""
        if self.guidance is None:
            return None
        return Inpainting(**{f.name: getattr(self, f.name) for f in fields(InpaintingSettings)})


def run(
    trainer_class: type[TrainerT],
    argv: Sequence[str] | None = None,
    data: type[RewardArguments] = RewardArguments,
) -> TrainerT:
    """Trains with a trainer of this library, by settings of the command line and the YAML file that it names.

    Args:
        trainer_class: the algorithm; its `config_class` has the settings.
        argv: arguments; None: the process's own. They are those of `RewardArguments`, the config and `trl.ModelConfig`,
            and of `GuidanceArguments` where the config has no such settings itself.
        data: in the place of `RewardArguments`, such as `TeachingArguments`.

    Returns:
        The trainer, after training and saving.

    Raises:
        SystemExit: a signal has ended training after a complete checkpoint; the status is `PREEMPTED`.
    """
    guided = issubclass(trainer_class.config_class, InpaintingSettings)
    guidance = () if guided else (GuidanceArguments,)
    script, training, model, *given = parse(argv, data, trainer_class.config_class, ModelConfig, *guidance)
    check_settings(training, model)
    checked = script.checked_task(training)
    rewards: list[Any] = [*load_rewards(script.reward_funcs)]
    if script.reward_model_name_or_path is not None:
        rewards.append(script.reward_model_name_or_path)
    train_dataset, eval_dataset = load_splits(script, evaluating=training.eval_strategy != "no")
    if isinstance(script, TeachingArguments):
        train_dataset = with_completions(train_dataset, script.completion_column, keep=True)
    training.model_init_kwargs = model_options(training, model)
    tokenizer = tokenizer_for(model.model_name_or_path, training.model_init_kwargs)
    trainer = trainer_class(
        model.model_name_or_path,
        rewards or None,
        training,
        train_dataset,
        eval_dataset,
        tokenizer,
        intervention=given[0].intervention() if given else None,
        peft_config=get_peft_config(model),
        quantization_config=get_quantization_config(model),
    )
    if checked is not None:
        trainer.check_exactly(checked, **script.check_options())
    finish(trainer)
    return trainer


def finish(trainer: Any) -> None:
    """Trains, goes on where `resume_from_checkpoint` says, and saves the model.

    A run that a signal has stopped has a checkpoint, and no model of its own: it ends with `SystemExit(PREEMPTED)`.
    """
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    if not trainer.preempted:
        trainer.save_model(trainer.args.output_dir)
        trainer.create_model_card()
    trainer.end()
    if trainer.preempted:
        raise SystemExit(PREEMPTED)
