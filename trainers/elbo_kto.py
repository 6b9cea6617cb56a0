"""Trains a denoiser on completions that are wanted or not (ELBO-KTO, arXiv 2510.23658).

    accelerate launch trainers/elbo_kto.py --config configs/elbo_kto/kto-mix_llada-8b.yaml --beta 0.05

Flags override the YAML file. The settings are those of `DataArguments`, `ELBOKTOConfig` and `trl.ModelConfig`. The
dataset has columns `prompt`, `completion` and `label`.
"""

from __future__ import annotations

from collections.abc import Sequence

from trl import ModelConfig, get_peft_config, get_quantization_config

from rl4dlm import ELBOKTOConfig, ELBOKTOTrainer
from rl4dlm.cli.arguments import DataArguments, check_settings, load_splits, model_options, parse
from rl4dlm.cli.errors import start
from rl4dlm.cli.script import finish
from rl4dlm.training.setup import tokenizer_for


def main(argv: Sequence[str] | None = None) -> ELBOKTOTrainer:
    script, training, model = parse(argv, DataArguments, ELBOKTOConfig, ModelConfig)
    check_settings(training, model)
    train_dataset, eval_dataset = load_splits(script, evaluating=training.eval_strategy != "no")
    training.model_init_kwargs = model_options(training, model)
    trainer = ELBOKTOTrainer(
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
