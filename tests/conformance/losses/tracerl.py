"""TraceRL without a value model: views of merged steps, scores, losses and gradients, for blocks and full attention.

The reference takes the mean over forwards, each of one merged step of a completion or of all its blocks, and scores the
first pads of each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rl4dlm.likelihood.scoring import score_views
from rl4dlm.likelihood.step_selectors import AllSteps, BlockSlices
from rl4dlm.likelihood.steps import RecordedSteps
from rl4dlm.likelihood.views import Rows, Views
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.training.clipping import Clip, surrogate
from rl4dlm.training.losses import kl_estimate
from tests.conformance.cases import Case
from tests.conformance.denoisers import build, spec_of
from tests.conformance.losses import Verdict, tools

LAYOUT = {"position_ids", "attention_unpadded", "shrunk_step_map"}  # of the reference's own input
OUTPUTS = {"row_sequence", "noisy_copy", "noisy_completion", "scored", "logps", "loss", "loss_per_row", "grad"} | LAYOUT
FORWARDS = "TraceRL's code takes the mean over forwards, those of a step or slice each; here over completions"
PADS = "TraceRL's code scores the first pads of each slice (post_num); here no token behind the end"
SCORES = 2e-5


def run(case: Case, folder: Path) -> Verdict:
    """Compares whatever the case records of: what is hidden and scored, scores, loss and gradients."""
    from rl4dlm.algorithms.tracerl import TraceRLTrainer

    tools.check_outputs(case, OUTPUTS)
    settings, outputs, blocks = case.settings, case.outputs, "block_size" in case.settings
    spec = spec_of(case)
    if blocks:
        spec = DiffusionSpec(spec.mask_token_id, spec.eos_token_ids, attention="block_causal", grid_origin="response",
                             block_length=settings["block_size"])  # fmt: skip
    model = build("model", spec, case.compute_dtype)
    rows = rows_of(case, hides_pads=blocks or spec.logit_shift == 1)
    selector = BlockSlices(spec, settings["shrink"]) if blocks else AllSteps(settings["shrink"])
    views = RecordedSteps(selector, "canvas").draw(rows, seed=0, iteration=0)
    used = views.scored & trained(case, views.scored)
    views = Views(views.hidden, views.weight * used)
    place = used.any(-1).nonzero()  # the reference's forwards, by sequence and then in their order
    check_forwards(case, rows, views, place)
    with torch.no_grad():
        everywhere = Views(views.hidden, torch.ones_like(views.weight))
        scores = score_views(model, spec, rows.ids, rows.attention_mask, everywhere).log_probs
    found, scored = scores[place[:, 0], place[:, 1]], used[place[:, 0], place[:, 1]]
    if "logps" in outputs:
        tools.compare("logps", found, outputs["logps"], SCORES)

    if "loss_per_row" in outputs:
        each = loss_per_forward(case, found, scored, place[:, 0])
        tools.compare("loss_per_row", each, outputs["loss_per_row"], tools.LOSS_TOLERANCE)

    old = torch.zeros_like(scores[:, 0])
    for (row, _), where, values in zip(place.tolist(), scored, case.inputs["old_logps"], strict=True):
        old[row] = torch.where(where, torch.tensor(values).double(), old[row])
    trainer = tools.trainer_for(
        case,
        folder,
        model,
        TraceRLTrainer,
        views,
        scope="canvas",
        epsilon=settings["eps"],
        beta=settings["beta"],
        merge=settings["shrink"],
        num_iterations=2,
        **({} if blocks else {"block_length": None}),
    )
    trainer.estimator = Fixed(selector, "canvas", views)
    batch = tools.of_rows(tools.batch_of(case, old=old[:, None]), rows)
    batch |= {"completion_mask": used.any(1).long(), "canvas_valid": rows.valid, "commit_step": rows.commit_step}
    del batch["canvas_seen"]
    if not settings["use_kl_estimator_k3"]:  # the plain difference, which is refused as a KL term
        trainer.token_kl = lambda log_probs, batch: trainer.log_ratio_to("old", log_probs, batch)

    def ours() -> Tensor:
        loss: Tensor = trainer._compute_loss(trainer.model, batch)
        return loss

    def literal() -> Tensor:
        """The mean over forwards: of sums over the length of the canvas, or of means, but for the KL term."""
        if not blocks:
            trainer.args.aggregation, divergence = "step_sums", trainer._kl
            size = of_step(used)[:, : batch["completion_ids"].shape[1]]
            trainer._kl = lambda *arguments: divergence(*arguments) * size
        return ours() * len(rows) / len(place)

    pads = not torch.equal(used.any(1), torch.tensor(case.inputs["completion_ids"]) != settings["pad_id"])
    return tools.verdict(case, ours, literal, model, FORWARDS, *([PADS] if pads else []))


class Fixed(RecordedSteps):
    """The estimator with recorded views."""

    def __init__(self, selector: Any, scope: str, views: Views) -> None:
        super().__init__(selector, scope)
        object.__setattr__(self, "views", views)

    def draw(self, rows: Rows, *, seed: int, iteration: int) -> Views:
        """Those."""
        views: Views = self.views  # type: ignore[attr-defined]
        return views


def rows_of(case: Case, hides_pads: bool) -> Rows:
    """The recorded completions with their steps; padding of the prompt is hidden where the reference hides it."""
    prompts, completions = tools.ids_of(case)
    mask = torch.tensor(case.inputs["prompt_mask"]) if hides_pads else torch.ones_like(prompts)
    step = torch.tensor(case.inputs["step_map"])
    ones = torch.ones_like(completions).bool()
    return Rows(prompts, mask, completions, ones, torch.arange(len(prompts)), commit_step=step)


def trained(case: Case, scored: Tensor) -> Tensor:
    """bool `[B, K, L]`, all but pads behind the first `post_num`: of a slice, or of a completion in full attention."""
    first, pad = case.settings["post_num"], torch.tensor(case.inputs["completion_ids"]) == case.settings["pad_id"]
    if first is None:
        return torch.ones_like(scored)
    pads = scored & pad[:, None] if "block_size" in case.settings else pad[:, None].expand_as(scored)
    return ~pads | (pads.long().cumsum(-1) <= first)


def check_forwards(case: Case, rows: Rows, views: Views, place: Tensor) -> None:
    """Which forwards there are, and what each hides and scores."""
    outputs, length = case.outputs, rows.canvas_ids.shape[1]
    if "row_sequence" in outputs:
        assert place[:, 0].tolist() == outputs["row_sequence"]
    shown = views.apply(rows.ids, spec_of(case).mask_token_id)[place[:, 0], place[:, 1], -length:]
    for name in ("noisy_copy", "noisy_completion"):
        if name in outputs:
            assert shown.tolist() == outputs[name], name
    if "scored" in outputs:
        assert views.scored[place[:, 0], place[:, 1]].long().tolist() == outputs["scored"]


def loss_per_forward(case: Case, scores: Tensor, scored: Tensor, row: Tensor) -> Tensor:
    """`[R]`: sums over the length of the canvas for blocks; for full attention means, and the sum of the KL terms."""
    settings, blocks = case.settings, "block_size" in case.settings
    advantages = torch.tensor(case.inputs["advantages"], dtype=torch.float64)[row, None]
    d = (scores - torch.tensor(case.inputs["old_logps"], dtype=torch.float64)) * scored
    losses = surrogate(d, d, advantages, Clip("ppo", settings["eps"])) * scored
    divergence = (kl_estimate(d, "k3") if settings["use_kl_estimator_k3"] else d) * settings["beta"] * scored
    if blocks:
        return (losses + divergence).sum(-1) / scored.shape[1]
    return losses.sum(-1) / scored.sum(-1) + divergence.sum(-1)


def of_step(used: Tensor) -> Tensor:
    """For each token the number of tokens that are scored with it, `[B, C]`."""
    return (used * used.sum(-1, keepdim=True)).sum(1).clamp(min=1)
