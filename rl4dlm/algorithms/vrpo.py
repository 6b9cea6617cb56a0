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

from dataclasses import dataclass, field
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
from rl4dlm.models.attention import BLOCK_KINDS
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.training.config import set_but_not_supported
from rl4dlm.training.contract import check_contract
from rl4dlm.training.guard import check_guard
from rl4dlm.training.precision import check_precision, settle
from rl4dlm.training.preferences import NAMES, NO_EFFECT, PreferenceSettings, PreferenceTrainer, rows_of_completions
from rl4dlm.training.setup import swapped

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
    names=NAMES,
)  # fmt: skip

STEPS = ("bound", "one_per_block")
STEP_WEIGHTS = ("steps", "one")
_NOT_SUPPORTED = {
    **NO_EFFECT,
    "padding_free": "rows packed together would see each other under bidirectional attention",
    "ld_alpha": "the terms of a bound have no order, so that there is no tail of a completion",
    "use_weighting": "it weighs pairs by probabilities of tokens given those before them",
}


@dataclass
class VRPOConfig(PreferenceSettings, DPOConfig):
    """Settings of preference optimisation: those of `trl.DPOConfig`, with these added; the paper's are the defaults.

    Args:
        num_views, complement, one_view, max_skipped_steps: see `PreferenceSettings`.
        steps: `"bound"`, or `"one_per_block"`, dTRPO's estimate.
        block_length: of `"one_per_block"`; None: the model's own.
        tokens_per_step: of its decoding in random order.
        step_weight: of its steps: `"steps"`, their number in the block, or `"one"`.
        beta, loss_type, loss_weights: of TRL's loss.

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


class VRPOTrainer(PreferenceTrainer, DPOTrainer):
    """Preference optimisation of a denoiser, in TRL's DPO loop; the module's docstring is the algorithm.

    Arguments are those of `PreferenceTrainer`. Data sets have columns `prompt`, `chosen` and `rejected`, as TRL takes
    them.
    """

    config_class = VRPOConfig
    trl_module = dpo
    args: VRPOConfig
    _tag_names = ["trl", "rl4dlm", "vrpo"]  # noqa: RUF012  (TRL's own form)
    _name = "VRPO"
    _paper = {  # noqa: RUF012  (TRL's own form)
        "title": "LLaDA 1.5: Variance-Reduced Preference Optimization for Large Language Diffusion Models",
        "id": "2505.19223",
    }

    def build_estimator(self) -> Estimator:
        """What `steps` says."""
        if self.args.steps == "one_per_block" and self.spec.attention not in BLOCK_KINDS:
            raise ValueError(
                f"steps='one_per_block' is not allowed for a model with attention={self.spec.attention!r}, which sees "
                f"unfinished blocks; allowed: {', '.join(BLOCK_KINDS)}"
            )
        return self.args.estimator(self.spec)

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False) -> Any:
        if return_outputs:
            raise ValueError("return_outputs=True is not supported: logits are never built")
        rows, columns = rows_of_completions(inputs)
        views = self.draw(rows)

        def placed(values: Tensor) -> Tensor:  # where TRL has the log-probability of a token, [2 B, T - 1]
            return values.new_zeros(inputs["input_ids"].shape).scatter_add(1, columns, values)[:, 1:]

        reference = placed(self.reference_bounds(rows, views)).sum(-1)

        def scored(**ignored: Any) -> SimpleNamespace:
            log_probs, entropies = map(placed, self.bounds(model, rows, views))
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
