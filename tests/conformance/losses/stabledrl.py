"""StableDRL's bounds, weights, losses and gradients.

The record's micro-batch is one group, over which its weights are normalised as ours are. Its old bounds, of other masks
and another policy, are inputs. Without weights its loss is SPG's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rl4dlm.training.trainer import PolicyScores
from tests.conformance.cases import Case
from tests.conformance.denoisers import spec_of
from tests.conformance.losses import Verdict, spg, tools

SETTINGS = {
    "forward_type", "num_t", "block_length", "use_mask_prompt", "p_mask_prompt", "logp_estimation", "eubo_beta",
    "mix_weight", "use_snis", "ais_clip_iw", "mask_id", "num_iterations", "compute_dtype",
}  # fmt: skip


def run(case: Case, folder: Path) -> Verdict:
    """Compares bounds, importance weights, the loss and its gradients."""
    tools.check_outputs(case, {"per_seq_logps", "per_seq_elbo", "loss", "metrics", "grad"})
    assert set(case.settings) <= SETTINGS
    model = tools.model_of(case)
    trainer, batch = trainer_for(case, folder, model), spg.batch_of(case)
    length = batch["completion_mask"].sum(-1)
    old = torch.tensor(case.inputs["old_elbo"], dtype=torch.float64)
    if case.settings["use_snis"]:
        of_first = torch.zeros(batch["completion_mask"].shape, dtype=torch.float64)
        of_first[:, 0] = old * length  # of the whole sequence, wherever it stands
        batch["old_per_token_logps"] = of_first[:, None]
    loss = trainer._compute_loss(trainer.model, batch)
    with torch.no_grad():
        scores = trainer._score(trainer.model, spg.loss_rows(batch), 0, batch["completion_ids"].shape[1])
        compare_bounds(case, trainer, scores, length, old)
    tools.compare_loss(case, loss, model)
    return Verdict(equal=True)


def compare_bounds(case: Case, trainer: Any, scores: PolicyScores, length: Tensor, old: Tensor) -> None:
    """Bounds per token, with the recorded signs and lower ones alone, and their ratios to the old ones."""
    positive = torch.tensor(case.inputs["advantages"]) > 0
    assert positive.tolist() == [bool(value) for value in case.inputs["reward_mask"]]
    bounds, lower = trainer.bounds(scores, positive).sum(-1) / length, scores.log_probs.sum(-1) / length
    tools.compare("per_seq_logps", bounds, case.outputs["per_seq_logps"])
    tools.compare("per_seq_elbo", lower, case.outputs["per_seq_elbo"])
    ratio = (lower - old).exp() if case.settings["use_snis"] else torch.ones_like(old)
    found = {"iw_mean": [ratio.mean().item()], "iw_max": [ratio.max().item()]}
    for name, value in case.outputs["metrics"].items():
        tools.compare(name, found[name][-1], value, tools.SCORE_TOLERANCE * max(1.0, abs(value)))


def trainer_for(case: Case, folder: Path, model: Any) -> Any:
    """A StableDRL trainer with the recorded settings and masks; SPG's where there are no weights."""
    from rl4dlm.algorithms.spg import SPGTrainer
    from rl4dlm.algorithms.stabledrl import StableDRLTrainer

    settings = case.settings
    prompts, completions = tools.ids_of(case)
    ids = torch.cat([prompts, completions], dim=1)
    mask_token_id = spec_of(case).mask_token_id
    noised = torch.tensor(case.noise["noisy_batch"]) == mask_token_id
    hidden = noised & (ids != mask_token_id)[:, None]
    config: dict[str, Any] = {
        "negatives": settings["logp_estimation"],
        "num_views": settings["num_t"],
        "masking": settings["forward_type"],
        "eubo_beta": settings["eubo_beta"],
        "p_mask_prompt": settings["p_mask_prompt"] if settings["use_mask_prompt"] else 0.0,
        "block_length": settings["block_length"],
        "num_generations": len(ids),
        "per_device_train_batch_size": len(ids),
        "max_completion_length": completions.shape[1],
    }
    if settings["logp_estimation"] == "mix":
        config["mix_weight"] = settings["mix_weight"]
    trainer: type = SPGTrainer
    if settings["use_snis"]:
        trainer, config["epsilon_high"] = StableDRLTrainer, settings["ais_clip_iw"] - 1
    quiet = {"output_dir": str(folder), "bf16": False, "use_cpu": True}
    estimator = trainer.config_class(**quiet, **config).estimator(settings["block_length"])  # type: ignore[attr-defined]
    mask, prompt = hidden[..., prompts.shape[1] :], hidden[..., : prompts.shape[1]]
    views = estimator.views(spg.loss_rows(spg.batch_of(case)), mask, prompt)
    return tools.trainer_for(case, folder, model, trainer, views, **config)
