"""Preferences without pairs (ELBO-KTO, arXiv 2510.23658): completions that are each wanted or not wanted.

B(y) is the Monte Carlo estimate of the evidence lower bound that VRPO has, with the count form of ELBO-KTO's code,

    B(y) = |y| mean_{i in M} log p(y_i | what M shows),    |M| uniform in 1..|y|,

its mean over n views (8), which are the same for policy and reference. With

    r = B_theta(y) - B_ref(y),    z0 = mean of r over the batch of all processes, detached,    s = beta (r - z0)

the loss is KTO's, the mean of

    lambda_D (1 - sigmoid(s))  of what is wanted,    lambda_U (1 - sigmoid(-s))  of what is not.

Where both models are equal, r is exactly 0 and the loss 1/2 (for lambdas of 1).

A trainer of its own on TRL's KTO, and not an option of VRPO: rows, collator and settings (`desirable_weight`,
`undesirable_weight`) of unpaired preferences are TRL's there, and pairs are unpaired by it. What is VRPO's is shared
(`rl4dlm.training.preferences`). TRL's own loss is not used: its z0 is a KL divergence of mismatched rows, floored at 0,
which costs two forwards more.

- z0 is of the rows that are scored at once on all processes, `per_device_train_batch_size` of each; accumulation does
  not widen it. With labels that are unbalanced within a batch it absorbs part of what they say
  (`reward_baseline: zero` leaves it out).
- Bounds are sums over a completion: with beta 0.1 long ones are soon where sigmoids are flat, as
  `elbo_kto/share_above_6` and `elbo_kto/share_above_8` of |s| say. `length_normalize` divides r by |y|, and needs a
  larger beta. The code's |y| counts padding; ours does not.
- Counts of the n views of a completion are spread over 1..|y|, where the code draws them independently: each is uniform
  by itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import trl.trainer.kto_trainer as kto
from torch import Tensor
from trl import KTOConfig, KTOTrainer

from rl4dlm.likelihood.elbo import ELBO
from rl4dlm.likelihood.masks import check_choice
from rl4dlm.training.config import set_but_not_supported
from rl4dlm.training.contract import check_contract
from rl4dlm.training.guard import check_guard
from rl4dlm.training.precision import check_precision, settle
from rl4dlm.training.preferences import NAMES, NO_EFFECT, PreferenceSettings, PreferenceTrainer, rows_of_completions

__all__ = ["ELBOKTOConfig", "ELBOKTOTrainer"]

check_contract(
    KTOTrainer,
    parameters={"__init__": ["model", "ref_model", "args", "train_dataset", "eval_dataset", "processing_class",
        "peft_config"], "_compute_loss": ["model", "inputs", "return_outputs"],
        "create_model_card": ["model_name", "dataset_name", "tags"],
    },
    attributes=["_metrics", "_tokenizer", "_total_train_tokens", "_tp_size", "aux_loss_enabled"],
    keys={"_compute_loss": ["input_ids", "attention_mask", "completion_mask", "label", "rewards/chosen"]},
    module=kto,
    names=NAMES,
)  # fmt: skip

BASELINES = ("batch_mean", "zero")
SATURATED = (6, 8)
"""Sizes of s beyond which the gradient of a sigmoid is below 1 / 400 and 1 / 3000; those that the code logs."""
_WITHOUT_KL = "apo_zero_unpaired"
_NOT_SUPPORTED = {
    **NO_EFFECT,
    "loss_type": "the loss is ELBO-KTO's; this name stands for rows without the ones that TRL estimates a KL from",
}


@dataclass
class ELBOKTOConfig(PreferenceSettings, KTOConfig):
    """Settings of ELBO-KTO: those of `trl.KTOConfig`, with these added; the defaults are the code's.

    Args:
        num_views, complement, one_view, max_skipped_steps: see `PreferenceSettings`.
        beta: factor of r - z0.
        desirable_weight, undesirable_weight: lambda_D and lambda_U.
        reward_baseline: z0: `"batch_mean"`, of all processes, or `"zero"`.
        length_normalize: divide r by the number of tokens.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    loss_type: str = field(default=_WITHOUT_KL, metadata={"help": "TRL's; it has no effect here and stays as it is."})
    train_sampling_strategy: str = field(
        default="random",
        metadata={"help": "As in transformers: no row is paired with its neighbours.",
            "choices": ["random", "sequential", "group_by_length"]},
    )  # fmt: skip
    reward_baseline: str = field(
        default="batch_mean",
        metadata={"help": f"What rewards are compared with: {', '.join(BASELINES)}.", "choices": list(BASELINES)},
    )
    length_normalize: bool = field(default=False, metadata={"help": "Divide rewards by the number of tokens."})

    def __post_init__(self) -> None:
        said = set_but_not_supported(self, _NOT_SUPPORTED)
        settle(self)
        super().__post_init__()
        check_precision(self)
        if said:
            raise ValueError("; ".join(said))
        check_guard(self)
        check_choice("reward_baseline", self.reward_baseline, BASELINES)
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta={self.beta} is not allowed; it must be larger than 0, and finite")
        for name in ("desirable_weight", "undesirable_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed; it must be 0 or larger, and finite")
        if not self.desirable_weight and not self.undesirable_weight:
            raise ValueError("desirable_weight=0 and undesirable_weight=0 leave nothing to learn from; raise one")
        if not self.disable_dropout:
            raise ValueError("disable_dropout=False is not supported: policy and reference would differ by chance")
        sizes = ["per_device_train_batch_size", *(["per_device_eval_batch_size"] if self.eval_strategy != "no" else ())]
        for name in sizes if self.reward_baseline == "batch_mean" else ():
            if getattr(self, name) * self.world_size < 2:
                raise ValueError(
                    "reward_baseline='batch_mean' is not allowed with a batch of one completion, which would be "
                    f"compared with itself; raise {name}, or set reward_baseline='zero'"
                )
        self.estimator()

    def estimator(self) -> ELBO:
        """What stands for a log-likelihood."""
        return ELBO(self.num_views, "count", self.complement, stratify="views")


class ELBOKTOTrainer(PreferenceTrainer, KTOTrainer):
    """Preference optimisation without pairs, in TRL's KTO loop; the module's docstring is the algorithm.

    Arguments are those of `PreferenceTrainer`. Data sets have columns `prompt`, `completion` and `label` (true:
    wanted), or TRL's pairs, of which it makes such rows.
    """

    config_class = ELBOKTOConfig
    trl_module = kto
    args: ELBOKTOConfig
    _tag_names = ["trl", "rl4dlm", "elbo-kto"]  # noqa: RUF012  (TRL's own form)
    _name = "ELBO-KTO"
    _paper = {  # noqa: RUF012  (TRL's own form)
        "title": "Aligning Diffusion Language Models via Unpaired Preference Optimization",
        "id": "2510.23658",
    }

    def build_estimator(self) -> ELBO:
        """That of the settings."""
        return self.args.estimator()

    def check_data(self, train_dataset: Any, eval_dataset: Any) -> None:
        """Columns, and labels that are true or false."""
        check_labels(train_dataset, "train_dataset")
        many = eval_dataset if isinstance(eval_dataset, Mapping) else {"": eval_dataset}
        for name, dataset in many.items():
            check_labels(dataset, f"eval_dataset[{name!r}]" if name else "eval_dataset")

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False) -> Any:
        if return_outputs:
            raise ValueError("return_outputs=True is not supported: logits are never built")
        rows, _ = rows_of_completions(inputs)
        wanted = inputs["label"].bool()  # [B]
        views = self.draw(rows)
        reference = self.reference_bounds(rows, views).sum(-1)
        log_probs, entropies = self.bounds(model, rows, views)
        self.note({"score": log_probs}, rows.row_ids)
        bounds = log_probs.sum(-1)
        rewards = bounds - reference
        if self.args.length_normalize:
            rewards = rewards / rows.valid.sum(-1).clamp(min=1)
        baseline = self._baseline(rewards)
        shifted = self.args.beta * (rewards - baseline)
        weight = torch.where(wanted, self.args.desirable_weight, self.args.undesirable_weight).to(shifted.dtype)
        loss = (weight * (1 - torch.where(wanted, shifted, -shifted).sigmoid())).mean()
        facts = {"rewards": self.args.beta * rewards, "logps": bounds}
        self._log_facts(facts, wanted, shifted.abs(), baseline, entropies, rows.valid, inputs["attention_mask"])
        return loss

    def _baseline(self, rewards: Tensor) -> Tensor:
        """z0, a scalar without gradient."""
        if self.args.reward_baseline == "zero":
            return torch.zeros_like(rewards[0])
        own = torch.stack([rewards.detach().sum(), torch.full_like(rewards[0], len(rewards)).detach()])
        total, count = self.accelerator.reduce(own, reduction="sum")
        return total / count

    @torch.no_grad()
    def _log_facts(
        self,
        facts: dict[str, Tensor],
        wanted: Tensor,
        size: Tensor,
        baseline: Tensor,
        entropies: Tensor,
        valid: Tensor,
        attention_mask: Tensor,
    ) -> None:
        """Means over the rows of all processes, under TRL's names where it has one; one reduction for all of them."""
        of = {"chosen": wanted, "rejected": ~wanted}
        sums = {
            f"{name}/{which}": (values * mask).sum() for name, values in facts.items() for which, mask in of.items()
        }
        sums |= {which: mask.sum() for which, mask in of.items()}
        sums |= {f"elbo_kto/share_above_{limit}": (size > limit).sum() for limit in SATURATED}
        sums |= {"entropy": entropies.sum(), "valid": valid.sum(), "tokens": attention_mask.sum()}
        stacked = torch.stack([value.detach().double() for value in sums.values()])
        total = dict(zip(sums, self.accelerator.reduce(stacked, reduction="sum").tolist(), strict=True))
        found = {"elbo_kto/baseline": float(baseline), "entropy": total["entropy"] / max(total["valid"], 1)}
        found |= {name: total[name] / (total["chosen"] + total["rejected"]) for name in sums if name[:4] == "elbo"}
        for name in facts:
            found |= {f"{name}/{which}": total[f"{name}/{which}"] / total[which] for which in of if total[which]}
        if total["chosen"] and total["rejected"]:
            found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        training = self.model.training
        metrics = self._metrics["train" if training else "eval"]
        for name, value in found.items():
            metrics[name].append(value)
        if training:
            self._total_train_tokens += int(total["tokens"]) // self._tp_size
        metrics["num_tokens"] = [self._total_train_tokens]


def check_labels(dataset: Any, name: str) -> None:
    """Raises ValueError for a data set that is not one of unpaired preferences, or of pairs.

    Args:
        dataset: None passes. Of one that is streamed the first row is looked at.
        name: of the argument, for the message.
    """
    if dataset is None:
        return
    streamed = not hasattr(dataset, "__len__")
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"{name} has no rows")
    if {"chosen", "rejected"} <= first.keys():
        return
    missing = [column for column in ("prompt", "completion", "label") if column not in first]
    if missing:
        raise ValueError(
            f"{name} has columns {', '.join(first)}, but no {', '.join(missing)}; needed are prompt, completion and "
            "label, or chosen and rejected"
        )
    labels: Iterable[Any] = [first["label"]] if streamed else dataset["label"]
    for row, label in enumerate(labels):
        if not isinstance(label, bool):
            raise ValueError(
                f"row {row} of {name} has label={label!r}, which is not allowed; it must be true (wanted) or false"
            )
