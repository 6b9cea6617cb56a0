"""Trains a denoiser with diffu-GRPO (d1, arXiv 2504.12216).

    accelerate launch trainers/diffu_grpo.py --config configs/diffu_grpo/few_clue_sudoku_tiny.yaml --learning_rate 1e-4

Flags override the YAML file. The settings are those of `RewardArguments`, `DiffuGRPOConfig` and `trl.ModelConfig`.
"""

from __future__ import annotations

from collections.abc import Sequence

from trl import ModelConfig, get_peft_config, get_quantization_config

from rl4dlm import DiffuGRPOConfig, DiffuGRPOTrainer, load_rewards, load_tokenizer
from rl4dlm.launching import RewardArguments, check_settings, load_splits, model_options, parse


def main(argv: Sequence[str] | None = None) -> DiffuGRPOTrainer:
    script, training, model = parse(argv, RewardArguments, DiffuGRPOConfig, ModelConfig)
    check_settings(training, model)
    rewards = load_rewards(script.reward_funcs)
    train_dataset, eval_dataset = load_splits(script, evaluating=training.eval_strategy != "no")
    tokenizer = load_tokenizer(model.model_name_or_path, model.model_revision)
    training.model_init_kwargs = model_options(training, model)

    trainer = DiffuGRPOTrainer(
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


if __name__ == "__main__":
    main()
