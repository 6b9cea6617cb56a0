"""Trains a denoiser on preferences (VRPO, LLaDA 1.5, arXiv 2505.19223).

    accelerate launch trainers/vrpo.py --config configs/vrpo/ultrafeedback_llada-8b.yaml --learning_rate 1e-6

Flags override the YAML file. The settings are those of `DataArguments`, `VRPOConfig` and `trl.ModelConfig`. The dataset
has columns `prompt`, `chosen` and `rejected`.
"""

from __future__ import annotations

from collections.abc import Sequence

from trl import ModelConfig, get_peft_config, get_quantization_config

from rl4dlm import VRPOConfig, VRPOTrainer
from rl4dlm.cli.arguments import DataArguments, check_settings, load_splits, model_options, parse
from rl4dlm.cli.errors import start
from rl4dlm.cli.script import finish
from rl4dlm.training.setup import tokenizer_for


def main(argv: Sequence[str] | None = None) -> VRPOTrainer:
    script, training, model = parse(argv, DataArguments, VRPOConfig, ModelConfig)
    check_settings(training, model)
    train_dataset, eval_dataset = load_splits(script, evaluating=training.eval_strategy != "no")
    training.model_init_kwargs = model_options(training, model)
    trainer = VRPOTrainer(
        model.model_name_or_path,
        args=training,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer_for(model.model_name_or_path, training.model_init_kwargs),
        peft_config=get_peft_config(model),
        quantization_config=get_quantization_config(model),
    )
    finish(trainer)
    return trainer


if __name__ == "__main__":
    start(main)
