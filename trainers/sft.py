"""Trains a denoiser on examples: masked diffusion SFT (LLaDA, arXiv 2502.09992; d1, arXiv 2504.12216).

    accelerate launch trainers/sft.py --config configs/sft/few_clue_sudoku_tiny.yaml --learning_rate 1e-3

Flags override the YAML file. The settings are those of `ExampleArguments`, `AdaptationArguments` (to start from an
autoregressive model), `DiffusionSFTConfig` and `trl.ModelConfig`.
"""

from __future__ import annotations

from collections.abc import Sequence

from trl import ModelConfig, get_peft_config, get_quantization_config

from rl4dlm import DiffusionSFTConfig, DiffusionSFTTrainer
from rl4dlm.cli.arguments import (
    AdaptationArguments,
    ExampleArguments,
    check_settings,
    load_splits,
    model_options,
    parse,
    with_completions,
)
from rl4dlm.cli.errors import start
from rl4dlm.cli.script import finish
from rl4dlm.sft.adapt import adapt_causal_lm
from rl4dlm.training.setup import tokenizer_for


def main(argv: Sequence[str] | None = None) -> DiffusionSFTTrainer:
    script, adaptation, training, model = parse(
        argv, ExampleArguments, AdaptationArguments, DiffusionSFTConfig, ModelConfig
    )
    check_settings(training, model)
    checked = script.checked_task(training)
    decoding = None if checked is None else script.check_decoding(training)
    adapting = adaptation.adapt_attention is not None
    if adapting and (model.use_peft or model.load_in_4bit or model.load_in_8bit):
        raise ValueError(
            f"adapt_attention={adaptation.adapt_attention!r} is not supported with use_peft, load_in_4bit or "
            "load_in_8bit: an adapter needs a denoiser's folder to name as its base; make one with `adapt_causal_lm` "
            "and `save_denoiser`, and train on that"
        )
    splits = load_splits(script, evaluating=training.eval_strategy != "no")
    train_dataset, eval_dataset = (
        None if split is None else with_completions(split, script.completion_column) for split in splits
    )
    denoiser, options = model.model_name_or_path, model_options(training, model)
    if adapting:
        denoiser, tokenizer = adapt_causal_lm(denoiser, **adaptation.options(), **options)
    else:
        tokenizer = tokenizer_for(denoiser, options)
    training.model_init_kwargs = None if adapting else options

    trainer = DiffusionSFTTrainer(
        denoiser,
        args=training,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=get_peft_config(model),
        quantization_config=get_quantization_config(model),
    )
    if checked is not None:
        trainer.check_exactly(checked, decoding, **script.check_options())
    finish(trainer)
    return trainer


if __name__ == "__main__":
    start(main)
