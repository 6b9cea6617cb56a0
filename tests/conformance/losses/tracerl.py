"""TraceRL: views of merged steps, scores, losses and gradients, for blocks and full attention, and its value model.

The reference takes the mean over forwards, each of one merged step of a completion or of all its blocks, and scores the
first pads of each. Cases of complementary masks, which the reference compares with, have their views recorded.
"""

from __future__ import annotations

from dataclasses import replace
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
VALUE_OUTPUTS = {
    "row_sequence", "scored", "scored_tokens", "shrunk_step_map", "values", "returns", "advantages", "value_loss",
    "value_grad", "loss", "grad",
}  # fmt: skip
VALUES = "TraceRL's code takes the mean of value losses over forwards and slots of the canvas; here over tokens"
MASKS = "masks that TraceRL's code compares with score a token in several forwards; no trainer here has them"
SCORES = 2e-5
RETURNS = 2e-5


def run(case: Case, folder: Path) -> Verdict:
    """Compares whatever the case records of: what is hidden and scored, scores, loss and gradients."""
    from rl4dlm.algorithms.tracerl import TraceRLTrainer

    if "value_loss" in case.outputs:
        return run_values(case, folder)
    tools.check_outputs(case, OUTPUTS)
    settings, outputs, blocks = case.settings, case.outputs, "block_size" in case.settings
    spec = spec_of(case)
    if blocks:
        spec = DiffusionSpec(spec.mask_token_id, spec.eos_token_ids, attention="block_causal", grid_origin="response",
                             block_length=settings["block_size"])  # fmt: skip
    model = build("model", spec, case.compute_dtype)
    rows = rows_of(case, hides_pads=blocks or spec.logit_shift == 1)
    selector = BlockSlices(spec, settings["shrink"]) if blocks else AllSteps(settings["shrink"])
    if settings.get("method", "TraceRL") == "TraceRL":
        views = RecordedSteps(selector, "canvas").draw(rows, seed=0, iteration=0)
    else:
        views = recorded_views(case, rows)
    used = views.scored & trained(case, views.scored)
    views = Views(views.hidden, views.weight * used)
    place = used.any(-1).nonzero()  # the reference's forwards, by sequence and then in their order
    if settings.get("method", "TraceRL") != "TraceRL":
        place = in_recorded_order(case, place)
    check_forwards(case, rows, views, place)
    with torch.no_grad():
        everywhere = Views(views.hidden, torch.ones_like(views.weight))
        scores = score_views(model, spec, rows.ids, rows.attention_mask, everywhere).log_probs
    found, scored = scores[place[:, 0], place[:, 1]], used[place[:, 0], place[:, 1]]
    if settings.get("method", "TraceRL") not in ("TraceRL", "coupled"):
        return by_forwards(case, model, rows, views, place)
    assert (used.sum(1) <= 1).all()
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


def run_values(case: Case, folder: Path) -> Verdict:
    """Values of the states that are scored, returns and advantages, the value loss, and the policy's loss with them."""
    from rl4dlm.algorithms.tracerl import TraceRLTrainer

    tools.check_outputs(case, VALUE_OUTPUTS)
    settings, inputs, outputs = case.settings, case.inputs, case.outputs
    assert not settings["process_reward"] and settings["post_num"] == 0 and settings["use_kl_estimator_k3"]
    spec = spec_of(case)
    spec = DiffusionSpec(spec.mask_token_id, spec.eos_token_ids, attention="block_causal", grid_origin="response",
                         block_length=settings["block_size"])  # fmt: skip
    model = build("model", spec, case.compute_dtype)
    rows, selector = rows_of(case, hides_pads=True), BlockSlices(spec, settings["shrink"])
    views = RecordedSteps(selector, "canvas").draw(rows, seed=0, iteration=0)
    used = views.scored & trained(case, views.scored)
    views = Views(views.hidden, views.weight * used)
    place = used.any(-1).nonzero()
    check_forwards(case, rows, views, place)
    assert used.any(1).long().tolist() == outputs["scored_tokens"]

    trainer = tools.trainer_for(
        case, folder, model, TraceRLTrainer, views, scope="canvas", epsilon=settings["eps"], beta=settings["beta"],
        merge=settings["shrink"], num_iterations=2, value_model="steps", value_clip=settings["eps"],
        gae_gamma=settings["gamma"], gae_lambda=settings["lambda"], value_trains_trunk=True,
    )  # fmt: skip
    head = torch.tensor(inputs["value_head"], dtype=torch.float64)
    trainer.value_head.weight.data = head
    trainer.estimator = Fixed(selector, "canvas", views)
    with torch.no_grad():
        found = score_views(model, spec, rows.ids, rows.attention_mask, views, values=True)
    assert found.values is not None
    tools.compare("values", found.values.sum(1), outputs["values"], SCORES)

    rewards, old = (torch.tensor(inputs[name], dtype=torch.float64) for name in ("rewards", "old_values"))
    known = torch.tensor(inputs["old_logps"], dtype=torch.float64)
    batch = tools.of_rows(tools.batch_of(case, advantages=torch.zeros(len(rows)), old=known[:, None]), rows)
    batch |= {"completion_mask": used.any(1).long(), "canvas_valid": rows.valid, "commit_step": rows.commit_step}
    batch |= {"value_rewards": rewards, "old_values": old[:, None], "num_items_in_batch": used.sum()}
    del batch["canvas_seen"]
    valued, seen = trainer.valued, []

    def watched(*arguments: Any) -> Any:
        seen.append(valued(*arguments)[0])
        return seen[-1], valued(*arguments)[1]

    trainer.valued = watched

    def policy() -> Tensor:
        trainer.args.value_loss_weight = 0.0  # which no setting says: to have the two losses apart
        loss: Tensor = trainer._compute_loss(trainer.model, batch)
        return loss

    def values() -> Tensor:
        without = policy()
        trainer.args.value_loss_weight = 1.0
        loss: Tensor = trainer._compute_loss(trainer.model, batch)
        return loss - without

    policy()
    tools.compare("advantages", seen[0].advantages, outputs["advantages"], RETURNS)
    tools.compare("returns", seen[0].returns, outputs["returns"], RETURNS)
    first = tools.verdict(case, policy, lambda: policy() * len(rows) / len(place), model, FORWARDS)
    own = {"loss": outputs["value_loss"], "grad": outputs["value_grad"]}
    share = int(used.sum()) / (used.shape[-1] * len(place))
    second = tools.verdict(replace(case, outputs=own), values, lambda: values() * share, model, VALUES)
    return Verdict(equal=first.equal and second.equal, rules=first.rules | second.rules)


def recorded_views(case: Case, rows: Rows) -> Views:
    """What each recorded forward hides of its sequence."""
    noise = case.noise.get("noisy_copy", case.noise.get("noisy_completion"))
    shown, sequence = torch.tensor(noise), torch.tensor(case.outputs["row_sequence"])
    each = [shown[sequence == row] == spec_of(case).mask_token_id for row in range(len(rows))]
    hidden = torch.nn.utils.rnn.pad_sequence(each, batch_first=True)  # [B, K, L]
    prompt = hidden.new_zeros(*hidden.shape[:2], rows.prompt_ids.shape[1])
    return Views(torch.cat([prompt, hidden], dim=-1), hidden.double())


def in_recorded_order(case: Case, place: Tensor) -> Tensor:
    """Forwards in the order of the record, where those of a sequence keep theirs."""
    left = {row: place[place[:, 0] == row].tolist() for row in place[:, 0].unique().tolist()}
    return torch.tensor([left[row].pop(0) for row in case.outputs["row_sequence"]])


def by_forwards(case: Case, model: Any, rows: Rows, views: Views, place: Tensor) -> Verdict:
    """Masks that score a token several times, which TraceRL is compared with: the mean of the losses of forwards."""
    everywhere = Views(views.hidden, torch.ones_like(views.weight))
    scores = score_views(model.train(), DiffusionSpec.of(model), rows.ids, rows.attention_mask, everywhere).log_probs
    found, scored = scores[place[:, 0], place[:, 1]], views.scored[place[:, 0], place[:, 1]]
    if "logps" in case.outputs:
        tools.compare("logps", found, case.outputs["logps"], SCORES)
    each = loss_per_forward(case, found, scored, place[:, 0])
    if "loss_per_row" in case.outputs:
        tools.compare("loss_per_row", each, case.outputs["loss_per_row"], tools.LOSS_TOLERANCE)
    tools.compare_loss(case, each.mean(), model)
    return Verdict(equal=False, rules=frozenset([MASKS]))


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
