"""dKV-Cache's samplers: LLaDA's with keys and values kept of decoded tokens, the greedy one, and Dream's."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.schedules.parts import even_counts
from tests.conformance.cases import Case, folder
from tests.conformance.literals.tools import IDLE_STEPS, MASK_DRAWN, MASK_IN_PROMPT, Forwards, best, blank
from tests.conformance.samplers import Literal, Recorded, ReplayedNoise

FULL_STEPS = 2  # full forwards at the start of a block of LLaDA's sampler: the first one stores nothing there

SHIFTED_KEYS = (
    "where logits are shifted the reference keeps the keys of a row once the token that it predicts is written (or "
    "both are); here those of rows whose own token is written, and rows that predict an open slot are fed besides"
)


def config(recorded: Recorded) -> DecodingConfig:
    settings, kind = recorded.case.settings, _kind(recorded)
    if kind == "dkvdream":
        arguments: dict[str, Any] = {"counts": "floor", "eps": settings["eps"]}
        cache, options = "dkv_prefill", {}
        if settings["cache_type"] != "prefill":
            cache, options = "dkv_decode", {"refresh_steps": settings["cache_steps"], "full_steps": 1}
            options["keep_prompt"] = settings["cache_type"] == "pd"
        return DecodingConfig(
            canvas_length=recorded.length,
            schedule="dream_maskgit_plus",
            steps=settings["steps"],
            stop_at_eos=False,
            schedule_args=arguments,
            cache=cache,
            cache_args=options,
        )
    options = {"refresh_steps": settings["cache_reloading_step"]}
    if kind == "dkvgreedy":
        options["window"] = settings["window_size"]
    else:
        options["full_steps"] = FULL_STEPS
    return DecodingConfig(
        canvas_length=recorded.length,
        block_length=recorded.block_length,
        schedule="random" if kind == "dkvgreedy" else "low_confidence",
        steps=recorded.steps_per_block * (recorded.length // recorded.block_length),
        stop_at_eos=False,
        cache="dkv_greedy" if kind == "dkvgreedy" else "dkv_decode",
        cache_args=options,
    )


def noise(recorded: Recorded) -> ReplayedNoise | None:
    return _Order(recorded) if _kind(recorded) == "dkvgreedy" else None


class _Order(ReplayedNoise):
    """The order of a block's slots, drawn once per block: the same scores at every step."""

    def __init__(self, recorded: Recorded) -> None:
        super().__init__(recorded)
        self.scores = _scores(recorded)

    def uniform(self, purpose: str, rows: Tensor, steps: Tensor, positions: Tensor) -> Tensor:
        assert purpose == "order", f"the references draw no {purpose!r}"
        found = [
            self.scores[position // self.recorded.block_length][self.recorded.prompts.shape[1] + position]
            for position in positions.tolist()
        ]
        return torch.stack(found)


def _scores(recorded: Recorded) -> Tensor:
    """float64 `[blocks, T]`."""
    scores = torch.tensor(recorded.case.noise["order_scores_per_block"], dtype=torch.float64)
    return scores.view(-1, recorded.ids.shape[1])


@torch.no_grad()
def literal(recorded: Recorded, *, deviations: bool = True) -> Literal:
    assert len(recorded.prompts) == 1, "the reference decodes one row"
    return {"dkvdecode": _decode, "dkvgreedy": _greedy, "dkvdream": _dream}[_kind(recorded)](recorded, deviations)


def _kind(recorded: Recorded) -> str:
    return recorded.case.family


class _Row:
    """The one row, and what is masked in it."""

    def __init__(self, recorded: Recorded, deviations: bool) -> None:
        self.recorded, self.deviations = recorded, deviations
        self.ids, self.width = blank(recorded), recorded.prompts.shape[1]
        self.open = torch.arange(self.ids.shape[1]) >= self.width  # what "masked" means without the deviations
        self.result, self.model = Literal(self.ids), Forwards(recorded)
        if deviations and recorded.masks_in_prompt:
            self.result.rules.add(MASK_IN_PROMPT)

    @property
    def masked(self) -> Tensor:
        """bool `[T]`"""
        return self.ids[0] == self.recorded.mask if self.deviations else self.open.clone()

    def forward(self, fed: Tensor, wrote: bool, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Candidates long `[T]` and their probabilities `[T]` of a forward of the columns `fed`, bool `[T]`."""
        self.result.states.append(self.ids.clone())
        self.result.forwards.append(self.ids[:, fed].clone())
        self.result.wrote.append(torch.tensor([wrote]))
        if not wrote:
            self.result.rules.add(IDLE_STEPS)
        logits = self.model.part(self.ids, fed, keep)[0]
        if not self.deviations:
            logits[:, self.recorded.mask] = -torch.inf
        drawn = logits.argmax(-1)
        return drawn, logits.softmax(-1).gather(-1, drawn[:, None])[:, 0].nan_to_num(0.0)

    def write(self, chosen: Tensor, drawn: Tensor) -> None:
        if bool((drawn[chosen] == self.recorded.mask).any()):
            self.result.rules.add(MASK_DRAWN)
        self.ids[0, chosen] = drawn[chosen]
        self.open &= ~chosen

    def best(self, confidence: Tensor, eligible: Tensor, count: int) -> Tensor:
        """bool `[T]`, the most confident eligible slots."""
        scores = confidence.masked_fill(~eligible, -torch.inf)[None]
        counts, rules = torch.tensor([count]), self.result.rules
        return best(scores, eligible[None], counts, deviations=self.deviations, rules=rules)[0] & eligible


def _decode(recorded: Recorded, deviations: bool) -> Literal:
    row, refresh, steps = _Row(recorded, deviations), recorded.case.settings["cache_reloading_step"], None
    at, steps = torch.arange(recorded.ids.shape[1]), recorded.steps_per_block
    for high in range(row.width + recorded.block_length, len(at) + 1, recorded.block_length):
        before = row.masked  # as of before the last commit
        at_start = row.masked[high - recorded.block_length : high].sum()[None]
        for step in range(steps):
            eligible = row.masked & (at < high)
            count = int(even_counts(at_start, steps, torch.tensor(step)))
            full = step < FULL_STEPS or step % refresh == 0
            drawn, confidence = row.forward(at >= 0 if full else before, bool(eligible.any()) and count > 0)
            before = row.masked
            row.write(row.best(confidence, eligible, count), drawn)
    return row.result


def _greedy(recorded: Recorded, deviations: bool) -> Literal:
    settings, scores, steps = recorded.case.settings, _scores(recorded), recorded.steps_per_block
    row, at, last = _Row(recorded, deviations), torch.arange(recorded.ids.shape[1]), []
    for block in range(recorded.length // recorded.block_length):
        low = row.width + block * recorded.block_length
        within = scores[block, low : low + recorded.block_length]
        order = (within.argsort(descending=True, stable=True) + low).tolist()
        for step in range(steps):
            count = int(even_counts(torch.tensor([recorded.block_length]), steps, torch.tensor(step)))
            now, order = order[:count], order[count:]
            fed = at >= 0
            if step % settings["cache_reloading_step"]:
                fed = torch.zeros_like(fed)
                fed[[*last, *now]] = True
                for slot in now:
                    nearest = sorted(at.tolist(), key=lambda other, slot=slot: (abs(other - slot), other > slot))
                    free = [other for other in nearest if bool(row.masked[other]) and not fed[other]]
                    fed[free[: settings["window_size"]]] = True
            drawn, _ = row.forward(fed, bool(now))
            chosen = torch.zeros_like(fed)
            chosen[now] = True
            row.write(chosen, drawn)
            last = now
    return row.result


def _dream(recorded: Recorded, deviations: bool) -> Literal:
    settings, kind = recorded.case.settings, recorded.case.settings["cache_type"]
    row, steps, refresh = _Row(recorded, deviations), settings["steps"], settings["cache_steps"]
    at = torch.arange(recorded.ids.shape[1])
    times = torch.linspace(1, settings["eps"], steps + 1)
    prompt = at < row.width - 1  # the last one predicts the first slot of the canvas
    known = [prompt, prompt]  # rows whose keys are true, as of the last step's forward and as of now
    held = torch.full_like(row.ids[0], -1)  # what each column was last fed as
    if deviations and kind != "prefill":
        row.result.rules.add(SHIFTED_KEYS)
    for step in range(steps):
        masked, first = row.masked, step == 0
        share = 1 - times[step + 1] / times[step]
        count = int(masked.sum()) if step == steps - 1 else int(masked.sum() * share)
        if kind == "prefill":
            fed = ~prompt if step else at >= 0
        elif first or step % refresh == 0:
            fed = ~prompt if kind == "pd" and not first else at >= 0
        elif deviations:
            fed = ~known[0] & ~(prompt if kind == "pd" else torch.zeros_like(prompt))
        else:
            fed = masked | masked.roll(-1) | (held != row.ids[0])
        drawn, confidence = row.forward(fed, bool(masked.any()))
        held = torch.where(fed, row.ids[0], held)
        row.write(row.best(confidence, masked, count), drawn)
        written = ~row.masked
        after = torch.cat([written[1:], written[:1]])
        if settings.get("shift_type") == "un_right":
            after = written & after
            after[-1] = after[-2]
        known = [known[1], after]
    return row.result


def made_up(seed: int) -> Recorded:
    """A case of any of the samplers, the seeds taking turns."""
    rng, generator = random.Random(f"dkv {seed}"), torch.Generator().manual_seed(seed)
    kind = ("dkvdecode", "dkvgreedy", "dkvdream")[seed % 3]
    blocks, block_length, width = rng.randint(1, 3), rng.choice([1, 4, 5, 8]), rng.randint(1, 12)
    length = blocks * block_length
    settings: dict[str, Any] = {
        "steps": blocks * rng.choice([1, min(2, block_length), block_length]),
        "gen_length": length,
        "block_length": block_length,
        "cache_reloading_step": rng.randint(1, 5),
        "window_size": rng.randint(0, 4),
    }
    if kind == "dkvdream":
        settings = {
            "steps": rng.randint(1, length + 2),
            "max_new_tokens": length,
            "eps": rng.choice([1e-3, 0.1]),
            "shift": "dream",
            "cache_type": rng.choice(["prefill", "decoded", "pd"]),
            "cache_steps": rng.randint(1, 5),
            "shift_type": rng.choice(["un", "un_right"]),
        }
    scores = torch.rand(blocks, 1, width + length, generator=generator).tolist()
    draws = {"order_scores_per_block": scores} if kind == "dkvgreedy" else {}
    prompts = torch.randint(0, 62, (1, width), generator=generator)
    case = Case(folder(), f"{kind}_made_up", {}, settings, {}, draws, {})
    ids = torch.zeros(1, width + length, dtype=torch.long)
    return Recorded(case, prompts, torch.ones_like(prompts).bool(), ids, None, nfe=10**9)
