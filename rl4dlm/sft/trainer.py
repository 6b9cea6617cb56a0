"""Masked supervised fine-tuning (LLaDA, arXiv 2502.09992, section 2.3; d1, arXiv 2504.12216, algorithm 2).

Each row gets a level t ~ U(0, 1), floored as t <- (1 - eps) t + eps; each target token is hidden with probability t,
and the loss is the sum of cross-entropies of hidden tokens, weighted by 1/t, over the number of target tokens. Prompt
tokens are never hidden. Evaluation gives each example a level of its own on a fixed grid.

TRL's SFT trainer prepares the data and runs the loop; this file replaces its loss. Differences from d1's released code:
- The prompt ends where the chat template's generation prompt does, so that the assistant's header is never a target;
  that it is a prefix of the whole is asserted. The code leaves the header out of the prompt.
- The denominator counts the targets of all accumulated micro-batches and processes, so that splitting a batch changes
  nothing. The code averages over micro-batches.
- Padding is not seen and no target. `eos_padding="max_length"` is the code's way: padding is end-of-sequence tokens,
  seen, hidden and counted like any other; `"longest"` is LLaDA's, which pads so within a batch.
- Random truncation draws its length by a key, per micro-batch and process; the code draws it from a generator that
  workers share copies of.
- Levels and masks are keyed by (seed, example, step). The evaluation grid has midpoints (i + 1/2)/n, not i/(n - 1),
  whose first point hides next to nothing at weight 1/eps.

`AdaptationSettings` has what turns an autoregressive model into a denoiser: other weights, masks and block lengths.
`CausalAttentionSettings` adds a loss that draws attention from effects to their causes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import trl.trainer.sft_trainer as sft
from torch import Tensor
from trl import SFTTrainer

from rl4dlm.likelihood.complementary import context_weights
from rl4dlm.likelihood.denoising import denoising_views, hiding, places_of
from rl4dlm.likelihood.scoring import ViewScores, score_views
from rl4dlm.likelihood.turns import by_turn
from rl4dlm.likelihood.views import Views
from rl4dlm.models.adapters import base_model
from rl4dlm.models.loading import check_tokenizer, load_denoiser
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.models.taught import record_taught
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.noise import keyed_uniform
from rl4dlm.sft.annealing import unseen_pairs
from rl4dlm.sft.causal_attention import COLUMN, TOKENS, CausalAttentionTrainer, checked_tokens, edges_to_tokens
from rl4dlm.sft.config import DiffusionSFTConfig as DiffusionSFTConfig
from rl4dlm.sft.data import (
    LEVEL_UNIT,
    NOT_A_TARGET,
    DenoisingCollator,
    Rendering,
    check_answers,
    count_targets,
    fitting,
    numbered,
    prompt_length,
    until_end,
)
from rl4dlm.sft.exact_check import CheckedTrainer
from rl4dlm.training.contract import check_contract
from rl4dlm.training.guard import GuardedTrainer
from rl4dlm.training.losses import denoising_cross_entropy
from rl4dlm.training.model_card import base_name, model_card
from rl4dlm.training.setup import prepared, swapped, tokenizer_for

logger = logging.getLogger(__name__)

check_contract(
    SFTTrainer,
    parameters={
        "__init__": ["model", "args", "train_dataset", "eval_dataset", "processing_class", "peft_config"],
        "_prepare_dataset": ["dataset", "processing_class", "args"],
        "create_model_card": ["model_name", "dataset_name", "tags"],
        "_set_signature_columns_if_needed": [],
        "compute_loss": ["model", "inputs", "return_outputs", "num_items_in_batch"],
        "get_batch_samples": ["epoch_iterator", "num_batches", "device"],
    },
    attributes=["_metrics", "_total_train_tokens", "_tokenizer"],
    module=sft,
    names=["create_model_from_path", "common_prefix_length", "_tokenize"],
)


class DiffusionSFTTrainer(GuardedTrainer, CausalAttentionTrainer, CheckedTrainer, SFTTrainer):
    """Masked SFT of a denoiser, in TRL's loop.

    Args:
        model: a model or `PeftModel` with a spec, or the path of one (a folder, a hub id, an adapter folder).
        args: None: the defaults of `DiffusionSFTConfig`.
        train_dataset: with columns `prompt` and `completion`, or `messages`, or `text`, as TRL takes them.
        eval_dataset: the same, with a length.
        processing_class: the tokenizer; None loads the one saved with the model.
        kwargs: TRL's further arguments: `callbacks`, `optimizers`, `quantization_config`, `peft_config`,
            `formatting_func`.

    Raises:
        ValueError: a model without spec, a tokenizer without mask token, a prompt that is no prefix of its rendering.
        TypeError: an argument that has no meaning here.
    """

    loss_is_scaled_for_ga = True
    args: DiffusionSFTConfig
    _tag_names = ["trl", "rl4dlm", "masked-sft"]  # noqa: RUF012  (TRL's own form)
    _name = "masked SFT"
    _paper = {"title": "Large Language Diffusion Models", "id": "2502.09992"}  # noqa: RUF012  (TRL's own form)

    def __init__(
        self,
        model: Any,
        args: DiffusionSFTConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        args = DiffusionSFTConfig() if args is None else args
        if not isinstance(args, DiffusionSFTConfig):
            raise TypeError(f"args is a {type(args).__name__}; a DiffusionSFTConfig is needed")
        for name in ("data_collator", "compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"):
            if kwargs.pop(name, None) is not None:
                raise TypeError(f"{name} is not supported: the loss is computed without building logits")
        model = os.fspath(model) if isinstance(model, os.PathLike) else model
        adapter = kwargs.get("peft_config")
        if not isinstance(model, str):
            model = prepared(model, adapter)
            self.spec = DiffusionSpec.of(base_model(model))
            args.check_model(self.spec)
        if processing_class is None:
            processing_class = tokenizer_for(model, args.model_init_kwargs)
        if not isinstance(model, str):
            check_tokenizer(processing_class, self.spec)

        def load(path: str, architecture: Any = None, **options: Any) -> Any:
            loaded = prepared(load_denoiser(path, **options), adapter)
            self.spec = DiffusionSpec.of(base_model(loaded))
            args.check_model(self.spec)  # TRL prepares the datasets next
            return loaded

        with swapped(sft, "create_model_from_path", load):
            super().__init__(
                model=model,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                **kwargs,
            )
        self.spec = DiffusionSpec.of(base_model(self.model))
        self.check_causal_run()
        record_taught(base_model(self.model).config, args.eos_padding, args.max_completion_length, args.max_length)
        check_tokenizer(self._tokenizer, self.spec)
        self.data_collator = DenoisingCollator(
            pad_token_id=self._tokenizer.pad_token_id,
            eos_token_id=self._tokenizer.eos_token_id,
            mask_token_id=self.spec.mask_token_id,
            eos_padding=args.eos_padding,
            max_length=args.max_length,
            max_completion_length=args.max_completion_length,
            pad_to_multiple_of=args.pad_to_multiple_of,
        )

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, *rest: Any, **kwargs: Any) -> Any:
        dataset = numbered(dataset)
        columns: Any = dataset.column_names or next(iter(dataset), {})
        tokenized = "input_ids" in columns
        with swapped(sft, "common_prefix_length", prompt_length), swapped(sft, "_tokenize", Rendering()):
            prepared_dataset = super()._prepare_dataset(dataset, processing_class, args, *rest, **kwargs)
        if not tokenized:
            given = {"ends": self.spec.eos_token_ids, "max_length": args.max_length}
            if args.turns != "together" and not args.assistant_only_loss:
                prepared_dataset = prepared_dataset.map(check_answers)
            prepared_dataset = prepared_dataset.map(until_end, fn_kwargs=given)
        unused = {COLUMN, TOKENS} & {*columns} if not args.causal_weight else ()
        if unused:
            logger.warning("the column `%s` has no effect with causal_weight=0", min(unused))
        elif COLUMN in columns and not tokenized:
            given = {
                "tokenizer": processing_class,
                "text_column": args.dataset_text_field,
                "chat_template": self.chat_template,
            }
            prepared_dataset = prepared_dataset.map(edges_to_tokens, fn_kwargs=given)
        elif TOKENS in columns:
            prepared_dataset = prepared_dataset.map(checked_tokens)
        return fitting(prepared_dataset, args.max_completion_length)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        for column in ("example_id", "noise_level", TOKENS):
            if column not in self._signature_columns:
                self._signature_columns.append(column)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None
    ) -> None:
        """Writes README.md into the output folder; see `rl4dlm.training.model_card`."""
        if not self.is_world_process_zero():
            return
        args = self.args
        decoding = DecodingConfig(args.max_completion_length or DecodingConfig.canvas_length)
        text = model_card(
            name=self.hub_model_id or model_name or os.path.basename(os.path.abspath(args.output_dir)),
            path=self.hub_model_id or args.output_dir,
            base=base_name(base_model(self.model)),
            algorithm=self._name,
            paper=self._paper,
            tags=[*self._tag_names, *([tags] if isinstance(tags, str) else tags or ())],
            decoding=decoding.for_model(self.spec),
            facts={
                "eos_padding": args.eos_padding,
                "max_completion_length": args.max_completion_length,
                "max_length": args.max_length,
                "learning rate": args.learning_rate,
            },
            dataset=dataset_name,
        )
        Path(args.output_dir, "README.md").write_text(text, encoding="utf-8")

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """The micro-batches of an optimizer step, and the number of their target tokens over all processes; with
        `loss_weight="cart"` of their hidden ones."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.args.random_truncation:
            samples = [self._truncated(sample, i) for i, sample in enumerate(samples)]
        if self.args.loss_weight == "cart":
            self._set_block_length()
            counts = [self.draw(s, training=True).hidden.sum().to(device) for s in samples]
        else:
            counts = [(s["labels"] != NOT_A_TARGET).sum() for s in samples]
        targets = torch.as_tensor(sum(counts), device=device)
        if self.args.average_tokens_across_devices:
            targets = self.accelerator.gather(targets).sum()
        self.count_effects_of_step(samples, device)
        return samples, targets

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        """The masked cross-entropy of a micro-batch, in nats per target token."""
        if return_outputs:
            raise ValueError("return_outputs=True is not supported: logits are never built")
        if self.model.training:
            self._set_block_length()
        views = self.draw(inputs)
        targets = inputs["labels"] != NOT_A_TARGET
        real = inputs["attention_mask"].bool()
        ar_weight = self.args.ar_loss_weight if self.model.training else 0.0
        with self.recorded_causes(inputs) as recorded:
            scores = score_views(
                model,
                self.spec,
                inputs["input_ids"],
                real,
                views,
                prompt_lengths=_prompt_lengths(inputs),
                next_tokens=_followers(targets) if ar_weight else None,
                unseen=self._unseen(inputs),
                share=not recorded.layers,  # rows of what was recorded are then those of the views
            )
        self.note({"score": scores.log_probs}, inputs["example_id"])
        count = targets.sum() if num_items_in_batch is None else num_items_in_batch
        if num_items_in_batch is None and self.args.loss_weight == "cart" and self.model.training:
            count = views.hidden.sum()
        loss = denoising_cross_entropy(scores.log_probs, views.weight, count)
        if scores.next_log_probs is not None:
            loss = loss + ar_weight * denoising_cross_entropy(
                scores.next_log_probs, torch.ones_like(scores.next_log_probs), count
            )
        guided = self.causal_loss(recorded, inputs, views.hidden.shape[1], in_step=num_items_in_batch is not None)
        loss = loss if guided is None else loss + guided
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # the denominator is global, and DDP averages gradients
        self._log(scores, views, inputs)
        return loss

    def _unseen(self, inputs: Any) -> Tensor | None:
        """Pairs of tokens that are hidden from each other while attention is annealed, in training."""
        steps = self.args.attention_annealing_steps if self.model.training else 0
        width = inputs["input_ids"].shape[1]
        return unseen_pairs(self.args.seed, inputs["example_id"], self.state.global_step, steps, width)

    def _truncated(self, inputs: Any, place: int) -> Any:
        """A micro-batch whose completions are cut or padded to the length of a random one of them."""
        keys = (self.state.global_step, place, self.accelerator.process_index)
        uniform = keyed_uniform(self.args.seed, "sft truncation", *(torch.tensor(key) for key in keys)).item()
        start = _prompt_lengths(inputs).tolist()
        lengths = [count_targets(row) for row in inputs["labels"].tolist()]
        length = lengths[int(uniform * len(lengths))]
        eos, collator = self._tokenizer.eos_token_id, self.data_collator
        rows = []
        columns = (inputs["input_ids"].tolist(), inputs["labels"].tolist(), start, lengths)
        for ids, labels, first, own in zip(*columns, strict=True):
            if own == 0:  # nothing to learn from, nothing to pad
                rows.append((ids[:first], labels[:first]))
                continue
            fill = [eos] * max(0, length - own)
            rows.append((ids[: first + min(own, length)] + fill, labels[: first + min(own, length)] + fill))
        examples = [
            {"input_ids": ids, "labels": labels, "example_id": example}
            for (ids, labels), example in zip(rows, inputs["example_id"].tolist(), strict=True)
        ]
        padded = collator(examples)
        return {**inputs, **{name: value.to(inputs["input_ids"].device) for name, value in padded.items()}}

    def _set_block_length(self) -> None:
        """The length of the attention blocks at this step, in the spec that is used and in the one that is saved."""
        length = self.args.block_length_at(self.state.global_step, self.spec.block_length)
        if length != self.spec.block_length:
            self.spec = replace(self.spec, block_length=length)
            base_model(self.model).config.diffusion["block_length"] = length

    def draw(self, inputs: Any, training: bool | None = None) -> Views:
        """The views of a micro-batch's rows: `hidden` and `weight` (1/t where hidden) `[B, K, T]`, for `training` or
        evaluation; None: as the model is.

        K is 1, or 2 with complementary masks; with `turns` it may be more, see `by_turn`. A function of (seed, example,
        optimizer step); in evaluation of the example alone, and by the plain bound whatever the settings of adaptation
        are.
        """
        args, training = self.args, self.model.training if training is None else training
        ids = inputs["example_id"]  # [B]
        position = torch.arange(inputs["input_ids"].shape[1], device=ids.device)
        targets = inputs["labels"] != NOT_A_TARGET
        real, places = inputs["attention_mask"].bool(), None
        if training:
            step = torch.tensor(self.state.global_step, device=ids.device)
            level, purpose = keyed_uniform(args.seed, "sft level", ids, step)[:, None], "sft mask"
            if args.noise_levels == "block" or args.mask_ratio_tilt > 0:
                places = places_of(self.spec, real, _prompt_lengths(inputs))
            if places is not None and args.noise_levels == "block":
                level = keyed_uniform(args.seed, "sft block level", ids[:, None], step, places.blocks)
        else:
            if "noise_level" not in inputs:
                raise ValueError("an eval_dataset needs a length, to place its examples on a grid of noise levels")
            step, purpose = torch.zeros_like(ids[0]), "sft evaluation mask"
            level = (inputs["noise_level"] / LEVEL_UNIT)[:, None]
        complementary = args.complementary_masks and training
        ceiling = 1 - args.noise_floor if complementary else 1  # what the other view hides needs a floor as well
        level = (ceiling - args.noise_floor) * level + args.noise_floor
        views = denoising_views(
            keyed_uniform(args.seed, purpose, ids[:, None], step, position),  # [B, T]
            targets,
            *hiding(level, None if places is None else places.relative, args.mask_ratio_tilt if training else 0.0),
            weighted=args.loss_weight == "1/t" or not training,
            complementary=complementary,
        )
        if args.loss_weight == "cart" and training:
            visible = real[:, None] & ~views.hidden
            views = replace(views, weight=(views.hidden * context_weights(visible, args.cart_p)).float())
        if args.turns != "together":
            places = places or places_of(self.spec, real, _prompt_lengths(inputs))
            views = by_turn(views, targets, real, places.blocks, args.turns)
        return views

    @torch.no_grad()
    def _log(self, scores: ViewScores, views: Views, inputs: Any) -> None:
        sums = [scores.entropies.sum(), -scores.log_probs.sum(), views.scored.sum(), inputs["attention_mask"].sum()]
        if scores.next_log_probs is not None:
            sums += [-scores.next_log_probs.sum(), _followers(inputs["labels"] != NOT_A_TARGET).sum()]
        entropy, nll, count, tokens, *following = self.accelerator.reduce(
            torch.stack(sums).double(), reduction="sum"
        ).tolist()
        mode = "train" if self.model.training else "eval"
        if count:
            self._metrics[mode]["entropy"].append(entropy / count)
            self._metrics[mode]["diffusion/masked_nll"].append(nll / count)
        if following and following[1]:
            self._metrics[mode]["diffusion/next_token_nll"].append(following[0] / following[1])
        if mode == "train":
            self._total_train_tokens += int(tokens)
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]


def _prompt_lengths(inputs: Any) -> Tensor:
    """Real tokens before the first target of each row, long `[B]`: a block grid may start behind them."""
    targets = inputs["labels"] != NOT_A_TARGET
    return (inputs["attention_mask"].bool() & (targets.cumsum(-1) == 0)).sum(-1)


def _followers(targets: Tensor) -> Tensor:
    """The targets, bool `[B, T]`, that have a token before them."""
    return targets & (torch.arange(targets.shape[1], device=targets.device) > 0)
