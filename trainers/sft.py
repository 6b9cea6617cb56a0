"""Trains a denoiser on examples: masked diffusion SFT (LLaDA, arXiv 2502.09992; d1, arXiv 2504.12216).

    accelerate launch trainers/sft.py --config configs/sft/few_clue_sudoku_tiny.yaml --learning_rate 1e-3

Flags override the YAML file. The settings are those of `ExampleArguments`, `DiffusionSFTConfig` and `trl.ModelConfig`.
"""

from __future__ import annotations

from collections.abc import Sequence

from trl import ModelConfig, get_peft_config, get_quantization_config

from rl4dlm import DiffusionSFTConfig, DiffusionSFTTrainer
from rl4dlm.launching import (
    ExampleArguments,
    check_settings,
    load_splits,
    load_tokenizer,
    model_options,
    parse,
    with_completions,
)


def main(argv: Sequence[str] | None = None) -> DiffusionSFTTrainer:
    script, training, model = parse(argv, ExampleArguments, DiffusionSFTConfig, ModelConfig)
    check_settings(training, model)
    splits = load_splits(script, evaluating=training.eval_strategy != "no")
    train_dataset, eval_dataset = (
        None if split is None else with_completions(split, script.completion_column) for split in splits
    )
    tokenizer = load_tokenizer(model.model_name_or_path, model.model_revision)
    training.model_init_kwargs = model_options(training, model)

    trainer = DiffusionSFTTrainer(
        model.model_name_or_path,
        args=training,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=get_peft_config(model),
        quantization_config=get_quantization_config(model),
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model(training.output_dir)
    trainer.end()
    return trainer


if __name__ == "__main__":
    main()
