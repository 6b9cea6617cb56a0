"""Rollouts scored again without a cache: how far what tokens were drawn from is from what the model says.

Owns the comparison. The state before each step is fed whole, with no store, under the model's attention kind and logit
shift, with the guidance and the options it was decoded with; at the slots that the step wrote, the probabilities that
were recorded are compared with those of this forward. The states of a rollout are all known, so that those of different
steps and rows share a forward, which makes an audit of a row cheaper than decoding it without a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rl4dlm.models.attention import attention_mask, block_starts, one_copy, position_ids
from rl4dlm.models.scoring import attach_scoring
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.drawing import filtered, lowest_argmax
from rl4dlm.rollout.options import adjusted, banned
from rl4dlm.rollout.rollout import Rollout
from rl4dlm.rollout.schedules.parts import Schedule

SUMS = ("tokens", "delta_sum", "delta_max", "known", "agreeing", "ratio_sum", "ratio_squares")
"""What `Audit.sums` adds up, in this order."""


@dataclass(frozen=True)
class Audit:
    """Tokens of some rows of a rollout, with what was recorded of them and what is true. n tokens, in order of rows,
    steps and slots.

    Args:
        rows, steps, positions: long `[n]`, row of the rollout, the row's step that wrote the token, and its slot.
        recorded, exact: float `[n]`, the token's log-probability under the model's own softmax over the whole
            vocabulary: untempered, before guidance and options.
        recorded_drawn, exact_drawn: float `[n]`, that of the distribution drawn from (without the mask token, tempered,
            filtered); -inf where the exact one would never give the token. The same as `recorded` and `exact` where
            nothing was drawn (temperature 0) or where the schedule changes logits by what it remembers of other steps.
        known: bool `[n]`, tokens known to have been the most probable ones that may be drawn: all of them at
            temperature 0; above it those that had a probability above 1/2, since that of a draw may be anything else.
        agrees: bool `[n]`, whether the token is the most probable one of the exact distribution.
        forwards: how many forwards this took.
    """

    rows: Tensor
    steps: Tensor
    positions: Tensor
    recorded: Tensor
    exact: Tensor
    recorded_drawn: Tensor
    exact_drawn: Tensor
    known: Tensor
    agrees: Tensor
    forwards: int

    @property
    def ratio(self) -> Tensor:
        """`[n]`, exact over recorded probability of each draw: its importance weight. 1 where the cache is exact."""
        return (self.exact_drawn - self.recorded_drawn).double().exp()

    def sums(self) -> Tensor:
        """float64 `[7]`, see `SUMS`; those of several audits may be handed to `summary` together."""
        gap, ratio = (self.exact - self.recorded).double().abs(), self.ratio
        largest = gap.amax() if len(gap) else gap.new_zeros(())
        agreeing = (self.known & self.agrees).sum()
        count = torch.tensor(len(gap), dtype=gap.dtype, device=gap.device)
        values = (count, gap.sum(), largest, self.known.sum(), agreeing, ratio.sum(), (ratio**2).sum())
        return torch.stack([value.to(gap) for value in values])

    def summary(self) -> dict[str, float]:
        """See `summary`."""
        return summary(self.sums()[None])


def summary(sums: Tensor) -> dict[str, float]:
    """What audits say together, from their sums `[audits, 7]`; {} where no token was audited.

    - `delta`: mean of |exact - recorded log-probability| in nats per token, of the model's own distribution.
    - `max_delta`: the largest.
    - `agreement`: share of tokens, among those known to have been the most probable ones, that are so for the exact
      distribution too; left out where there is none.
    - `ratio`: mean importance weight of a token, exact over recorded probability of the draw. Its expectation is 1
      where slots are chosen without a look at what was drawn there, and nothing is filtered; near 1 elsewhere.
    - `effective_share`: (sum of weights)^2 / (n * sum of their squares), the share of the tokens that would say as much
      about the exact sampler if they had been drawn by it; 1 where all weights are equal.
    """
    if not len(sums) or not bool(sums[:, 0].any()):
        return {}
    total = dict(zip(SUMS, sums.sum(0).tolist(), strict=True)) | {"delta_max": sums[:, 2].max().item()}
    found = {"delta": total["delta_sum"] / total["tokens"], "max_delta": total["delta_max"]}
    if total["known"]:
        found["agreement"] = total["agreeing"] / total["known"]
    found["ratio"] = total["ratio_sum"] / total["tokens"]
    if total["ratio_squares"]:
        found["effective_share"] = total["ratio_sum"] ** 2 / (total["tokens"] * total["ratio_squares"])
    else:  # no token could have been drawn by the exact sampler
        found["effective_share"] = 0.0
    return found


def why_not(config: DecodingConfig | None) -> str | None:
    """Why rollouts that are decoded in this way cannot be audited; None where they can."""
    if config is None:
        return "it does not say how it was decoded"
    schedule = config.build_schedule()
    if not isinstance(schedule, Schedule):
        return f"schedule={config.schedule!r} refines canvases of random tokens, and does not record its draws"
    if not schedule.monotone:
        return f"schedule={config.schedule!r} can take back, replace or move what is written"
    if schedule.verify is not None:
        return f"schedule={config.schedule!r} draws tokens from left to right, and not from what a state says of them"
    if schedule.inputs is not None:
        return f"schedule={config.schedule!r} feeds something else than tokens"
    return None


def count_forwards(rollout: Rollout, rows: Sequence[int], rows_per_forward: int) -> int:
    """How many forwards an audit of these rows takes, for processes that have to make the same number of them."""
    return -(-len(_states(rollout, rows)) // rows_per_forward)


@torch.no_grad()
def audit(
    model: Any,
    rollout: Rollout,
    rows: Sequence[int] | None = None,
    *,
    rows_per_forward: int = 32,
    forwards: int | None = None,
) -> Audit:
    """Compares what was recorded of some rows with a full forward of the state before each of their steps.

    Args:
        model: the denoiser, with the weights it had when it decoded; scoring is attached if it is not yet.
        rollout: of a schedule that writes each slot once, without `choices` or a `constraint`, which are not recorded.
        rows: rows of the rollout; None: all.
        rows_per_forward: states that are fed together.
        forwards: make so many, those that are missing with nothing to score; see `count_forwards`.

    Raises:
        ValueError: the rollout cannot be audited, or a setting is not allowed.
    """
    reason = why_not(rollout.decoding)
    if reason is not None:
        raise ValueError(f"the rollout cannot be audited: {reason}")
    if rows_per_forward < 1:
        raise ValueError(f"rows_per_forward={rows_per_forward} is not allowed; it must be 1 or larger")
    model = attach_scoring(model)
    spec = DiffusionSpec.of(model)
    states = _states(rollout, list(range(len(rollout))) if rows is None else rows)  # [m, 2]
    chunks = list(states.split(rows_per_forward)) if len(states) else []
    was_training = model.training
    model.eval()
    try:
        parts = [_compared(model, spec, rollout, chunk) for chunk in chunks]
        for _ in range(len(chunks), forwards or 0):
            _compared(model, spec, rollout, torch.tensor([[0, -1]], device=states.device))
    finally:
        model.train(was_training)
    if not parts:
        parts = [_nothing(rollout)]
    columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return Audit(**columns, forwards=max(len(chunks), forwards or 0))


def _states(rollout: Rollout, rows: Sequence[int]) -> Tensor:
    """long `[m, 2]`: rows, and their steps that wrote something."""
    index = torch.tensor(list(rows), dtype=torch.long, device=rollout.canvas.device)
    steps = rollout.trace.commit_step[index]  # [A, L]
    pairs = torch.stack([index[:, None].expand_as(steps), steps], dim=-1)
    return pairs[steps >= 0].unique(dim=0)


def _compared(model: Any, spec: DiffusionSpec, rollout: Rollout, states: Tensor) -> dict[str, Tensor]:
    """One forward of the states before some steps `[r, 2]`, and what is compared of the tokens written in them."""
    config, trace, mask = rollout.decoding, rollout.trace, rollout.mask_token_id
    assert config is not None and mask is not None
    row, step = states.unbind(1)
    commit_step = trace.commit_step[row]
    written = torch.where(commit_step < 0, rollout.hinted[row], commit_step < step[:, None])
    committed = (commit_step == step[:, None]) & (step >= 0)[:, None]  # [r, L]
    prompts = [rollout.prompt_ids[i] for i in row.tolist()]
    width = max(map(len, prompts))
    canvas = torch.where(written, rollout.canvas[row], mask)
    keys = torch.ones(len(row), width + canvas.shape[1], dtype=torch.bool, device=row.device)  # [r, T]
    tokens = torch.cat([canvas.new_zeros(len(row), width), canvas], dim=1)
    for i, prompt in enumerate(prompts):
        keys[i, : width - len(prompt)] = False
        tokens[i, width - len(prompt) : width] = torch.tensor(prompt, device=row.device)
    lengths = keys[:, :width].sum(-1)
    score = torch.cat([torch.zeros_like(keys[:, :width]), committed], dim=1)
    positions = position_ids(keys)
    if config.cfg_scale:  # every row a second time, without its prompt
        blank = tokens.clone()
        blank[:, :width] = torch.where(keys[:, :width], mask, blank[:, :width])
        tokens, keys = torch.cat([tokens, blank]), keys.repeat(2, 1)
        positions, lengths = positions.repeat(2, 1), lengths.repeat(2)
    still = torch.cat([torch.zeros_like(score[:, :width]), ~written], dim=1)
    sight = one_copy(spec, positions, lengths, _active(spec, positions, lengths, still), tokens == mask)
    at, slots = committed.nonzero(as_tuple=True)  # as the scored positions, row by row
    reduction = _reduction(config, spec, mask, rollout.canvas[row[at], slots], (~written).sum(-1)[at], slots)
    exact, drawn, agrees = model(
        input_ids=tokens,
        attention_mask=attention_mask(
            keys, tokens.shape[1], model.config._attn_implementation, model.dtype, sight
        ),
        position_ids=positions,
        score_positions=score,
        score_cfg_scale=config.cfg_scale,
        score_reduce=reduction,
        score_reduce_sees_own=True,
    )  # fmt: skip
    there = (row[at], slots)
    recorded, known = trace.raw_log_prob[there], torch.zeros_like(agrees)
    schedule = config.build_schedule()
    assert isinstance(schedule, Schedule) and trace.confidence is not None
    if schedule.transform is None:
        known = trace.confidence[there] > 0.5
        if config.temperature == 0 and schedule.propose is None:
            known = torch.ones_like(known)
    as_drawn = trace.log_prob is not None and schedule.transform is None
    return {
        "rows": row[at],
        "steps": step[at],
        "positions": slots,
        "recorded": recorded,
        "exact": exact,
        "recorded_drawn": trace.log_prob[there] if as_drawn and trace.log_prob is not None else recorded,
        "exact_drawn": drawn if as_drawn else exact,
        "known": known,
        "agrees": agrees,
    }


def _active(spec: DiffusionSpec, positions: Tensor, lengths: Tensor, open_columns: Tensor) -> Tensor | None:
    """long `[f]`, where the block starts that is being denoised, or the first of those: that of the first open slot.

    Args:
        positions: long `[f, T]`. lengths: long `[f]`, of prompts. open_columns: bool `[r, T]`; f is r or, guided, 2 r.
    """
    if spec.attention != "context_causal":
        return None
    starts = block_starts(spec, positions, lengths)
    still = open_columns.repeat(len(starts) // len(open_columns), 1)
    return starts.masked_fill(~still, torch.iinfo(starts.dtype).max).amin(-1)


def _reduction(
    config: DecodingConfig, spec: DiffusionSpec, mask: int, tokens: Tensor, open_slots: Tensor, positions: Tensor
) -> Callable[[Tensor, slice, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """From logits `[c, V]` to the log-probabilities of `tokens`, as in `Audit`, and whether they are the best ones."""

    def reduce(logits: Tensor, part: slice, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        token = tokens[part, None]
        exact = own.log_softmax(-1).gather(-1, token).squeeze(-1)
        logits = adjusted(logits, config, spec.eos_token_ids, open_slots[part])
        allowed = logits.index_fill(-1, torch.tensor([mask], device=logits.device), -torch.inf)
        never = banned(logits, config, spec.eos_token_ids, positions[part])
        if never is not None:
            allowed = allowed.masked_fill(never, -torch.inf)
        sampling = filtered((allowed / (config.temperature or 1.0)).log_softmax(-1), config.top_p, config.top_k)
        return exact, sampling.gather(-1, token).squeeze(-1), lowest_argmax(allowed) == token.squeeze(-1)

    return reduce


def _nothing(rollout: Rollout) -> dict[str, Tensor]:
    """What is compared where nothing was written."""
    none, real = rollout.trace.commit_step.new_zeros(0), rollout.trace.raw_log_prob.new_zeros(0)
    return {
        **dict.fromkeys(("rows", "steps", "positions"), none),
        **dict.fromkeys(("recorded", "exact", "recorded_drawn", "exact_drawn"), real),
        **dict.fromkeys(("known", "agrees"), none.bool()),
    }
