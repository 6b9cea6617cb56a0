"""LightningRL: rewards that are normalised apart, advantages, and losses of recorded batches with their gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rl4dlm.likelihood.scoring import score_views
from rl4dlm.likelihood.views import Rows, Views
from rl4dlm.training.clipping import Clip, surrogate
from rl4dlm.training.decoupled import group_advantages, kept_groups, normalised
from rl4dlm.training.losses import kl_estimate
from tests.conformance.cases import Case
from tests.conformance.denoisers import spec_of
from tests.conformance.losses import Verdict, tools

SHOWN = "LightningRL's code shows what is behind the end, padding too, in the block that it predicts; here it is hidden"
LENGTHS = "LightningRL's mean over the tokens of a completion divides by those behind its end, too"
K1 = "LightningRL offers k1, whose plain gradient does not depend on the reference; it is refused here"
COEFFICIENT = "LightningRL's coefficient of speed acts on raw speed alone; here a weight always does"
NORMS = {"none": "none", "z_score": "z_score", "minmax": "min_max"}
ADVANTAGES = {"batch": "batch", "prompt_group": "group", "prompt_group_center": "center"}
LOSS_OUTPUTS = {
    "scored", "sequence_lengths", "attention", "logps", "loss", "nll_loss", "kl_loss", "ratio_mean", "clip_frac",
    "entropy", "grad",
}  # fmt: skip
AVERAGES = {"sequence": "grpo", "token": "dapo"}


def run(case: Case, folder: Path) -> Verdict:
    """Compares rewards, advantages, or scores with their loss, whichever the case records."""
    if "rewards" in case.outputs:
        return rewards(case)
    return advantages(case) if "advantages" in case.outputs else loss(case, folder)


def rewards(case: Case) -> Verdict:
    """Sums of normalised accuracy and speed, and which prompts are kept."""
    tools.check_outputs(case, {"rewards", "correctness_after_length_rule", "kept_prompts"})
    settings, rules, kept = case.settings, set(), []
    for index, prompt in enumerate(case.inputs["prompts"]):
        length = torch.tensor(prompt["response_length"]).double()
        forwards = torch.tensor(prompt["num_forwards"]).double()
        speed = torch.where(forwards > 0, length / forwards.clamp(min=1), 0.0)[None]
        right = torch.tensor(prompt["correctness"]).bool()
        if settings["max_gen_length"]:
            right = right & (length < settings["max_gen_length"] - 5)
        accuracy = normalised(right.double()[None], "z_score") if settings["acc_norm"] else 2.0 * right[None] - 1
        mode, weight = settings["tpf_norm_mode"], settings["tpf_coefficient"]
        if mode != "none" and weight != 1:
            rules.add(COEFFICIENT)
            weight = 1.0
        total = accuracy + weight * normalised(speed, NORMS[mode])
        tools.compare("rewards", total[0], case.outputs["rewards"][index], 1e-12)
        assert right.tolist() == [bool(value) for value in case.outputs["correctness_after_length_rule"][index]]
        anyhow = torch.full_like(right, not settings["filter_all_wrong"])
        if bool(kept_groups((right | anyhow)[None], speed, settings["filter_tpf_threshold"])):
            kept.append(index)
    assert kept == case.outputs["kept_prompts"]
    return Verdict(equal=not rules, rules=frozenset(rules))


def advantages(case: Case) -> Verdict:
    """Of the batch, or of each group of whatever size."""
    tools.check_outputs(case, {"advantages"})
    found, group = torch.tensor(case.inputs["rewards"]).double(), torch.tensor(case.inputs["group"])
    kind = ADVANTAGES[case.settings["adv_norm_mode"]]
    result = torch.zeros_like(found)
    parts = [torch.ones_like(group).bool()] if kind == "batch" else [group == g for g in group.unique()]
    for part in parts:
        result[part] = group_advantages(found[part][None], kind, torch.ones(1).bool())[0]
    tools.compare("advantages", result, case.outputs["advantages"], 2e-5)
    return Verdict(equal=True)


def loss(case: Case, folder: Path) -> Verdict:
    """Scores in the recorded view, and the loss of the recorded batch."""
    from rl4dlm.algorithms.lightningrl import LightningRLTrainer

    tools.check_outputs(case, LOSS_OUTPUTS)
    settings, outputs, model, spec = case.settings, case.outputs, tools.model_of(case), spec_of(case)
    prompts, completions = tools.ids_of(case)
    ends = torch.isin(completions, torch.tensor(spec.eos_token_ids))
    real = completions != settings["pad_id"]
    scored = real & (ends.int().cumsum(-1) - ends.int() == 0)
    assert scored.int().tolist() == outputs["scored"] and real.sum(-1).tolist() == outputs["sequence_lengths"]
    rows = Rows(prompts, torch.ones_like(prompts), completions, scored, torch.arange(len(prompts)))
    hidden = torch.cat([torch.zeros_like(prompts).bool(), scored], dim=1)
    views = Views(hidden[:, None], scored.double()[:, None])
    if "attention" in outputs:
        assert (
            outputs["attention"] == tools.two_copies(*(x.shape[1] for x in (prompts, completions)), spec).int().tolist()
        )

    k1 = bool(settings["kl_beta"]) and settings["kl_estimator"] == "k1"
    trainer = tools.trainer_for(
        case,
        folder,
        model,
        LightningRLTrainer,
        views,
        rewards=[accuracy, speed],
        speed_reward="speed",
        epsilon=settings["eps"],
        epsilon_high=settings["eps_high"],
        beta=0.0 if k1 else settings["kl_beta"],
        **({} if k1 or not settings["kl_beta"] else {"kl_estimator": settings["kl_estimator"]}),
        nll_weight=settings["nll_loss_weight"],
        loss_type=AVERAGES[settings["policy_reduction_mode"]],
        kl_average=settings["kl_reduction_mode"],
        nll_average=settings["nll_reduction_mode"],
    )
    old, ref = (torch.tensor(case.inputs[f"{name}_logps"], dtype=torch.float64) for name in ("old", "ref"))
    batch = tools.batch_of(case, old=old[:, None], ref=ref[:, None])
    batch["completion_mask"], batch["canvas_valid"] = scored.long(), scored
    batch["num_items_in_batch"] = scored.sum()
    batch["correct"] = torch.tensor(case.inputs["correctness"]).bool()
    taught = scored & batch["correct"][:, None]
    batch["correct_total"] = torch.stack([taught.sum(), batch["correct"].sum()]).expand(len(prompts), 2)

    def parts() -> dict[str, Tensor]:
        """What the code's loss is made of, with gradients."""
        found = score_views(model, spec, rows.ids, rows.attention_mask, views)
        scores, entropies = found.log_probs[:, 0], found.entropies[:, 0]
        log_ratio = (scores - old).clamp(-10, 10)
        clip, above = Clip("ppo", settings["eps"], settings["eps_high"]), batch["advantages"][:, None]
        policy = surrogate(log_ratio, scores, above, clip) * scored
        kl = kl_estimate(scores - ref, settings["kl_estimator"])
        most = 1 + torch.where(above >= 0, settings["eps_high"], settings["eps"])
        outside = (log_ratio.exp() < 1 - settings["eps"]) | (log_ratio.exp() > most)
        nll = average(-scores, taught, settings["nll_reduction_mode"]) if bool(taught.any()) else scores.sum() * 0
        return {
            "logps": scores,
            "policy": (policy.sum(-1) / scored.sum(-1)).mean(),
            "literal policy": (policy.sum(-1) / real.sum(-1)).mean(),
            "kl_loss": settings["kl_beta"] * average(kl, scored, settings["kl_reduction_mode"]),
            "nll_loss": settings["nll_loss_weight"] * nll,
            "ratio_mean": average(log_ratio.exp(), scored, "token"),
            "clip_frac": average(outside.double(), scored, "token"),
            "entropy": average(entropies, scored, "token"),
        }

    with torch.no_grad():
        found = parts()
    compare_parts(case, found)
    rules = set()
    lengths = settings["policy_reduction_mode"] == "sequence" and not torch.equal(real, scored)
    rules |= {LENGTHS} if lengths else set()
    rules |= {K1} if k1 else set()
    value = trainer._compute_loss(trainer.model, batch)
    if rules:
        literal = parts()
        value = value + lengths * (literal["literal policy"] - literal["policy"]) + k1 * literal["kl_loss"]
    tools.compare_loss(case, value, model)
    if not bool(scored.all()):
        rules.add(SHOWN)
    return Verdict(equal=not rules, rules=frozenset(rules))


def compare_parts(case: Case, found: dict[str, Tensor]) -> None:
    """Scores, and what the code reports beside the loss."""
    outputs, scored = case.outputs, torch.tensor(case.outputs["scored"])
    if "logps" in outputs:
        tools.compare("logps", found["logps"] * scored, outputs["logps"])
    for name in ("nll_loss", "kl_loss", "ratio_mean", "clip_frac", "entropy"):
        if name in outputs:
            assert found[name].item() == pytest.approx(outputs[name], abs=tools.LOSS_TOLERANCE), name


def average(values: Tensor, where: Tensor, mode: str) -> Tensor:
    """Over tokens, or over those of each row that has any and then over these."""
    if mode == "token":
        return (values * where).sum() / where.sum()
    rows = where.any(-1)
    return ((values * where).sum(-1)[rows] / where.sum(-1)[rows]).mean()


def accuracy(completions: list[str], **columns: Any) -> list[float]:
    return [0.0] * len(completions)


def speed(completions: list[str], **columns: Any) -> list[float]:
    return [1.0] * len(completions)
