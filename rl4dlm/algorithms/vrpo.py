"""Preferences between completions, with likelihoods of a denoiser of low variance (VRPO; LLaDA 1.5, arXiv 2505.19223).

B(y) is a Monte Carlo estimate of the evidence lower bound of a completion (`rl4dlm.likelihood.elbo`), and the score of
a pair of a chosen and a rejected one is

    s = B_theta(chosen) - B_ref(chosen) - B_theta(rejected) + B_ref(rejected).

The loss is any of TRL's DPO losses of s, by default the paper's: -log sigmoid(beta s) + 0.05 times the masked
cross-entropy of the chosen completion. A noisy s makes log-sigmoid larger on average, so that the variance of B counts.
Three rules of the paper keep it low:

- a budget of n views for each completion (8);
- all n at levels of their own, and not several masks at one: for n_t levels with n_y masks each the variance is
  V_level / n_t + V_mask / (n_t n_y);
- the same views for policy and reference (what the paper calls antithetic are common random numbers): where both are
  equal, s is exactly 0 and the loss log 2. Chosen and rejected completions have views of their own.

Complements (`complement: true`), which really are antithetic, and counts in place of independent tokens lower it more.

`steps="one_per_block"` is dTRPO's estimate (arXiv 2603.18806; from its abstract and project page, its code was not to
be had): of each block one step of a decoding in random order is drawn, whose tokens are scored in the state before it,
all blocks in one forward of a block model. With weights S_b, the number of a block's steps (`step_weight: steps`), it
is unbiased for the sum over all steps; `step_weight: one` leaves that factor to beta.

Views are keyed by the tokens of a completion and the optimizer step, so that neither batches nor processes matter.
TRL prepares the data, computes losses of scores and logs; the reference is scored in the loop, never in advance.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import trl.trainer.dpo_trainer as dpo
from torch import Tensor
from trl import DPOConfig, DPOTrainer

from rl4dlm.likelihood.elbo import ELBO
from rl4dlm.likelihood.estimator import Estimator
from rl4dlm.likelihood.masks import check_choice
from rl4dlm.likelihood.one_step import OneStepPerBlock
from rl4dlm.likelihood.scoring import score_views
from rl4dlm.likelihood.views import Rows
from rl4dlm.models.attention import BLOCK_KINDS
from rl4dlm.models.loading import check_tokenizer, load_denoiser
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.tracking.trackers import TrackerSettings
from rl4dlm.training.checkpoints import CheckpointingTrainer
from rl4dlm.training.config import set_but_not_supported
from rl4dlm.training.contract import check_contract
from rl4dlm.training.guard import MAX_SKIPPED_STEPS, GuardedTrainer, check_guard
from rl4dlm.training.model_card import base_name, model_card
from rl4dlm.training.precision import check_precision, settle
from rl4dlm.training.setup import base_model, copy_of, prepared, swapped, tokenizer_for

__all__ = ["VRPOConfig", "VRPOTrainer"]

check_contract(
    DPOTrainer,
    parameters={"__init__": ["model", "ref_model", "args", "train_dataset", "eval_dataset", "processing_class",
        "peft_config"], "_compute_loss": ["model", "inputs", "return_outputs"],
        "create_model_card": ["model_name", "dataset_name", "tags"],
    },
    attributes=["precompute_ref_logps", "_tokenizer"],
    keys={
        "_compute_loss": [
            "input_ids", "attention_mask", "completion_mask", "ref_chosen_logps", "ref_rejected_logps",
        ]
    },
    module=dpo,
    names=["create_model_from_path", "disable_gradient_checkpointing", "use_adapter"],
)  # fmt: skip

STEPS = ("bound", "one_per_block")
STEP_WEIGHTS = ("steps", "one")
_IN_THE_LOOP = "the reference is scored in the views of the policy, which are new in every step"
_NOT_SUPPORTED = {
    "precompute_ref_log_probs": _IN_THE_LOOP,
    "padding_free": "rows packed together would see each other under bidirectional attention",
    "ld_alpha": "the terms of a bound have no order, so that there is no tail of a completion",
    "use_weighting": "it weighs pairs by probabilities of tokens given those before them",
}


@dataclass
class VRPOConfig(TrackerSettings, DPOConfig):
    """Settings of preference optimisation: those of `trl.DPOConfig`, with these added; the paper's are the defaults.

    Args:
        num_views: n, views of each completion, the same ones for policy and reference.
        complement: views come in pairs that hide complementary tokens; `num_views` is even then.
        steps: `"bound"`, or `"one_per_block"`, dTRPO's estimate.
        block_length: of `"one_per_block"`; None: the model's own.
        tokens_per_step: of its decoding in random order.
        step_weight: of its steps: `"steps"`, their number in the block, or `"one"`.
        one_view: score the views of a completion one after another: less memory, one forward more.
        beta, loss_type, loss_weights: of TRL's loss.
        max_skipped_steps: optimizer steps in a row that may be skipped because something in them is not finite.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    beta: float = field(default=0.2, metadata={"help": "Factor of the score of a pair."})
    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid", "sft"], metadata={"help": "TRL's losses of pairs, added up."}
    )
    loss_weights: list[float] | None = field(
        default_factory=lambda: [1.0, 0.05], metadata={"help": "Their weights. Default: sigmoid 1, sft 0.05."}
    )
    num_views: int = field(default=8, metadata={"help": "Views per completion, for policy and reference alike."})
    complement: bool = field(default=False, metadata={"help": "Views come in pairs that hide complementary tokens."})
    steps: str = field(
        default="bound",
        metadata={"help": f"What stands for a log-likelihood: {', '.join(STEPS)}.", "choices": list(STEPS)},
    )
    block_length: int | None = field(default=None, metadata={"help": "Of steps=one_per_block. Default: the model's."})
    tokens_per_step: int = field(default=1, metadata={"help": "Of steps=one_per_block."})
    step_weight: str = field(
        default="steps",
        metadata={"help": f"Of steps=one_per_block: {', '.join(STEP_WEIGHTS)}.", "choices": list(STEP_WEIGHTS)},
    )
    one_view: bool = field(default=False, metadata={"help": "Score the views of a completion one after another."})
    max_skipped_steps: int = field(
        default=MAX_SKIPPED_STEPS,
        metadata={"help": "Steps in a row that may be skipped because something in them is not finite."},
    )

    def __post_init__(self) -> None:
        refused = dict(_NOT_SUPPORTED)
        if self.steps == "bound":
            refused |= dict.fromkeys(
                ("block_length", "tokens_per_step", "step_weight"), "it has no effect with steps='bound'"
            )
        else:
            refused["complement"] = "it has no effect with steps='one_per_block'"
        said = set_but_not_supported(self, refused)
        settle(self)
        super().__post_init__()
        check_precision(self)
        if said:
            raise ValueError("; ".join(said))
        check_guard(self)
        check_choice("steps", self.steps, STEPS)
        check_choice("step_weight", self.step_weight, STEP_WEIGHTS)
        if not self.disable_dropout:
            raise ValueError("disable_dropout=False is not supported: policy and reference would differ by chance")
        if self.steps == "bound":
            self.estimator(None)

    def estimator(self, spec: DiffusionSpec | None) -> Estimator:
        """What stands for a log-likelihood."""
        if self.steps == "bound":
            return ELBO(self.num_views, "count", self.complement, stratify="views")
        length = self.block_length or (None if spec is None else spec.block_length)
        if length is None:
            raise ValueError("steps='one_per_block' needs blocks: set block_length")
        origin = "response" if spec is None or spec.block_length is None else spec.grid_origin
        weighted = self.step_weight == "steps"
        return OneStepPerBlock(self.num_views, length, self.tokens_per_step, weighted, origin)


class VRPOTrainer(GuardedTrainer, CheckpointingTrainer, DPOTrainer):
    """Preference optimisation of a denoiser, in TRL's DPO loop; the module's docstring is the algorithm.

    Args:
        model: a model or `PeftModel` with a spec, or the path of one (a folder, a hub id, an adapter folder).
        ref_model: None: the model without its adapter, or a copy of it.
        args: None: the defaults of `VRPOConfig`.
        train_dataset: with columns `prompt`, `chosen` and `rejected`, as TRL takes them.
        eval_dataset: the same.
        processing_class: the tokenizer; None loads the one saved with the model.
        kwargs: TRL's further arguments: `callbacks`, `optimizers`, `quantization_config`, `peft_config`.

    Raises:
        ValueError: a model without spec, a tokenizer without mask token.
        TypeError: an argument that has no meaning here.
    """

    config_class = VRPOConfig
    args: VRPOConfig
    _tag_names = ["trl", "rl4dlm", "vrpo"]  # noqa: RUF012  (TRL's own form)
    _name = "VRPO"
    _paper = {  # noqa: RUF012  (TRL's own form)
        "title": "LLaDA 1.5: Variance-Reduced Preference Optimization for Large Language Diffusion Models",
        "id": "2505.19223",
    }

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: VRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        args = VRPOConfig() if args is None else args
        if not isinstance(args, VRPOConfig):
            raise TypeError(f"args is a {type(args).__name__}; a VRPOConfig is needed")
        for name in ("data_collator", "compute_metrics"):
            if kwargs.pop(name, None) is not None:
                raise TypeError(f"{name} is not supported: pairs are scored without building logits")
        model = os.fspath(model) if isinstance(model, os.PathLike) else model
        adapter = kwargs.get("peft_config")
        policy = None if isinstance(model, str) else prepared(model, adapter)
        if processing_class is None:
            processing_class = tokenizer_for(model, args.model_init_kwargs)

        def load(path: str, architecture: Any = None, **options: Any) -> Any:
            # The reference of a policy given as an instance is a copy of it: the folder it came from may differ.
            return copy_of(policy) if policy is not None else prepared(load_denoiser(path, **options), adapter)

        with swapped(dpo, "create_model_from_path", load):
            super().__init__(
                model=model if policy is None else policy,
                ref_model=None if ref_model is None else prepared(ref_model),
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                **kwargs,
            )
        self.spec = DiffusionSpec.of(base_model(self.model))
        if self.spec.noise != "mask":
            raise ValueError(
                f"{type(self).__name__} is not offered for models with noise={self.spec.noise!r}: completions of pairs "
                "have any length, and these models denoise whole canvases"
            )
        check_tokenizer(self._tokenizer, self.spec)
        if args.steps == "one_per_block" and self.spec.attention not in BLOCK_KINDS:
            raise ValueError(
                f"steps='one_per_block' is not allowed for a model with attention={self.spec.attention!r}, which sees "
                f"unfinished blocks; allowed: {', '.join(BLOCK_KINDS)}"
            )
        self.estimator = args.estimator(self.spec)
        if self.aux_loss_enabled:
            raise ValueError("the model adds a router loss, which is not supported; set router_aux_loss_coef=0.0")

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None
    ) -> None:
        """Writes README.md into the output folder; see `rl4dlm.training.model_card`."""
        if not self.is_world_process_zero():
            return
        args = self.args
        text = model_card(
            name=self.hub_model_id or model_name or os.path.basename(os.path.abspath(args.output_dir)),
            path=self.hub_model_id or args.output_dir,
            base=base_name(base_model(self.model)),
            algorithm=self._name,
            paper=self._paper,
            tags=[*self._tag_names, *([tags] if isinstance(tags, str) else tags or ())],
            decoding=DecodingConfig().for_model(self.spec),
            facts={"beta": args.beta, "views": args.num_views, "learning rate": args.learning_rate},
            dataset=dataset_name,
        )
        Path(args.output_dir, "README.md").write_text(text, encoding="utf-8")

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False) -> Any:
        if return_outputs:
            raise ValueError("return_outputs=True is not supported: logits are never built")
        rows, columns = rows_of_pairs(inputs)
        iteration = self.state.global_step if self.model.training else 0
        views = self.estimator.draw(rows, seed=self.args.seed, iteration=iteration)

        def scores(of: Any) -> tuple[Tensor, Tensor]:
            """Scores `[2 B, T - 1]` of tokens where TRL has their log-probabilities, and entropies."""
            with self.accelerator.autocast():
                found = score_views(of, self.spec, rows.ids, rows.attention_mask, views, one_view=self.args.one_view)
            entropies = (found.entropies * views.scored).sum(1) / views.scored.sum(1).clamp(min=1)
            width = inputs["input_ids"].shape[1] - 1
            return tuple(
                values.new_zeros(len(values), width + 1).scatter_add(1, columns, values * rows.valid)[:, 1:]
                for values in (self.estimator.reduce(found.log_probs, views), entropies)
            )  # type: ignore[return-value]

        with torch.no_grad(), dpo.disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            reference = self._of_reference(scores).sum(-1)

        def scored(**ignored: Any) -> SimpleNamespace:
            log_probs, entropies = scores(model)
            self.note({"score": log_probs}, rows.row_ids)
            nothing = torch.zeros_like(entropies)
            return SimpleNamespace(
                log_probs=log_probs, entropy=entropies.detach(), mean_logits=nothing, is_top1=nothing.bool()
            )

        chosen, rejected = reference.chunk(2)
        told = {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        with swapped(self, "precompute_ref_logps", True):
            loss = super()._compute_loss(scored, told, False)
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name in ("logits/chosen", "logits/rejected", "mean_token_accuracy"):  # of what is not computed
            metrics.pop(name, None)
        return loss

    def _of_reference(self, scores: Any) -> Tensor:
        if self.ref_model is not None:
            found: Tensor = scores(self.ref_model)[0]
            return found
        model = self.accelerator.unwrap_model(self.model)
        with dpo.use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
            found = scores(self.model)[0]
        return found


def rows_of_pairs(inputs: Any) -> tuple[Rows, Tensor]:
    """TRL's pairs as rows, prompts padded on the left and completions on the right, and where their tokens come from.

    Args:
        inputs: `input_ids`, `attention_mask` and `completion_mask`, long `[2 B, T]`, padded on the right.

    Returns:
        2 B rows, of chosen completions and then of rejected ones, keyed by their tokens; long `[2 B, L]`, the column of
        `inputs` that each canvas slot is.

    Raises:
        ValueError: a completion without a prompt, of whose first token TRL keeps no score.
    """
    ids, keys, completion = inputs["input_ids"], inputs["attention_mask"].bool(), inputs["completion_mask"].bool()
    if completion[:, 0].any():
        raise ValueError(
            "a completion has no prompt before it; max_length may have cut it: raise it, or set it to None"
        )
    starts = (keys & ~completion).sum(-1)
    lengths = completion.sum(-1)
    width, size = int(starts.max()), max(int(lengths.max()), 1)
    place = torch.arange(width, device=ids.device) - (width - starts)[:, None]  # [2 B, P]
    slots = starts[:, None] + torch.arange(size, device=ids.device)
    valid = torch.arange(size, device=ids.device) < lengths[:, None]
    columns = torch.where(valid, slots, 0)
    keyed = torch.arange(1, ids.shape[1] + 1, device=ids.device) * 0x2545F4914F6CDD1D
    row_ids = ((ids + 1) * keys * (keyed | 1)).sum(-1) & (2**62 - 1)
    prompt = ids.gather(1, place.clamp(min=0)).masked_fill(place < 0, 0)
    rows = Rows(prompt, place >= 0, ids.gather(1, columns).masked_fill(~valid, 0), valid, row_ids, seen=valid)
    return rows, columns
