"""DAEDAL's sampler, which looks for a length and then makes room where it is unsure."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.rollout import Rollout
from tests.conformance.cases import Case, folder
from tests.conformance.denoisers import denoiser
from tests.conformance.literals.tools import MASK_DRAWN, MASK_IN_PROMPT
from tests.conformance.samplers import Literal, Recorded, ReplayedNoise, Run, gumbel, recorded_noise

WAITING = "rows of the reference's batch wait for the slowest one, when lengths are searched and at the end"
GUIDED_SEARCH = "the reference searches the length without guidance"

OUR_NAMES = {
    "initial_gen_length": "start_length",
    "block_length": "window",
    "high_conf_threshold": "high",
    "low_conf_threshold": "low",
    "expansion_factor": "growth",
    "eos_confidence_threshold": "length_end",
    "expand_eos_confidence_threshold": "insert_end",
    "eos_check_tokens": "end_slots",
}


def config(recorded: Recorded) -> DecodingConfig:
    settings = recorded.case.settings
    return DecodingConfig(
        canvas_length=recorded.length,
        schedule="daedal",
        temperature=recorded.temperature,
        cfg_scale=recorded.guidance,
        stop_at_eos=False,
        schedule_args={ours: settings[name] for name, ours in OUR_NAMES.items()},
    )


def noise(recorded: Recorded) -> ReplayedNoise | None:
    return _Noise(recorded) if recorded.case.noise else None


def rows(recorded: Recorded, rollout: Rollout) -> Run:
    """Rows end where they end: -1 behind that."""
    assert rollout.trace.length is not None
    beyond = torch.arange(rollout.canvas.shape[1]) >= rollout.trace.length[:, None]
    canvas = rollout.canvas.masked_fill(beyond, -1)[:, : int(rollout.trace.length.max())]
    nfe = [int(n) // (2 if recorded.guidance else 1) for n in rollout.nfe]
    states = [torch.cat([recorded.prompts, state], dim=1) for state in rollout.states()]
    by_row = [[state[row] for state in states[:n]] for row, n in enumerate(nfe)]
    return Run(torch.cat([recorded.prompts, canvas], dim=1), by_row, nfe)


def difference(recorded: Recorded, run: Run) -> str:
    """In what a run differs from the record, which fills rows up and hides what it fills them with."""
    if not torch.equal(run.ids, recorded.ids):
        return f"ids differ: {run.ids.tolist()}"
    if any(n != recorded.nfe for n in run.nfe):
        return f"forwards differ: {run.nfe} and {recorded.nfe}"
    for step, fed in enumerate(recorded.forwards or ()):
        for row, states in enumerate(run.states):
            own = states[step][states[step] >= 0]
            if not torch.equal(own, fed[row, : len(own)]):
                return f"states of row {row} differ before forward {step}"
    return ""


@torch.no_grad()
def literal(recorded: Recorded, *, deviations: bool = True) -> Literal:
    """Rows do not look at each other, so they are decoded one by one and then put beside each other."""
    done = [_decode(recorded, row, deviations) for row in range(len(recorded.prompts))]
    width, largest = recorded.prompts.shape[1], recorded.prompts.shape[1] + recorded.length
    result = Literal(_stacked([row.final for row in done], width + max(len(row.final) - width for row in done), -1))
    result.rules = set().union(*(row.rules for row in done))
    searching, filling = (max(len(getattr(row, part)) for row in done) for part in ("searched", "filled"))
    for step in range(searching + filling):
        before = step < searching
        number = step if before else step - searching
        states = [row.searched[min(number, len(row.searched) - 1)] if before else row.at(number) for row in done]
        result.states.append(_stacked(states, largest, -1))
        result.forwards.append(_stacked(states, max(map(len, states)), recorded.eos[0]))
        made = [number < len(row.searched if before else row.filled) for row in done]
        result.wrote.append(torch.tensor(made))
    if not all(bool(wrote.all()) for wrote in result.wrote):
        result.rules.add(WAITING)
    if deviations and recorded.masks_in_prompt:
        result.rules.add(MASK_IN_PROMPT)
    return result


@dataclass
class _Row:
    """One row's way: the states before each forward of both stages, prompt included, and the last one."""

    searched: list[list[int]] = field(default_factory=list)
    filled: list[list[int]] = field(default_factory=list)
    final: list[int] = field(default_factory=list)
    rules: set[str] = field(default_factory=set)

    def at(self, number: int) -> list[int]:
        """Before a forward of the second stage, or after all."""
        return self.filled[number] if number < len(self.filled) else self.final


def _decode(recorded: Recorded, number: int, deviations: bool) -> _Row:
    settings, row = recorded.case.settings, _Row()
    prompt, mask, eos = recorded.prompts[number].tolist(), recorded.mask, recorded.eos[0]
    factor, checked, largest = settings["expansion_factor"], settings["eos_check_tokens"], recorded.length
    tokens = _draws(recorded)

    def looks(canvas: list[int], guided: bool) -> tuple[Tensor, float]:
        """Logits `[n, V]` of the canvas, and how sure the model is of the end."""
        logits = _logits(recorded, prompt, canvas, guided)
        ends = [float(p) for p in logits.softmax(-1)[logits.argmax(-1) == eos, eos].flip(0)]
        return logits, sum(ends[:checked]) / checked

    canvas = [mask] * settings["initial_gen_length"]
    while True:
        row.searched.append(prompt + canvas)
        certainty = looks(canvas, guided=not deviations)[1]
        longer = certainty < settings["eos_confidence_threshold"] and len(canvas) < largest
        guided = looks(canvas, guided=True)[1]
        if longer != (guided < settings["eos_confidence_threshold"] and len(canvas) < largest):
            row.rules.add(GUIDED_SEARCH)
        if not longer:
            break
        canvas = [mask] * min(len(canvas) + factor, largest)
    canvas += [eos] * (min(len(canvas) + checked // 2, largest) - len(canvas))

    cursor = 0
    while cursor < len(canvas):
        row.filled.append(prompt + canvas)
        logits, certainty = looks(canvas, guided=True)
        noised = logits.clone()
        if recorded.temperature:
            drawn_with = tokens[min(len(row.filled), len(tokens)) - 1][number]
            noised += recorded.temperature * gumbel(drawn_with[len(prompt) : len(prompt) + len(canvas)])
        if not deviations:
            noised[:, mask] = -torch.inf
        best = noised.argmax(-1).tolist()
        sure = logits.softmax(-1)[range(len(canvas)), best].tolist()
        window = [i for i in range(cursor, min(cursor + settings["block_length"], len(canvas))) if canvas[i] == mask]
        if any(best[i] == mask for i in window):
            row.rules.add(MASK_DRAWN)
        fill = [i for i in window if sure[i] > settings["high_conf_threshold"] and best[i] != mask]
        if not fill:
            fill = sorted((i for i in window if best[i] != mask), key=lambda i: -sure[i])[:1]
        if not fill:  # all predict the mask token
            allowed = logits.clone()
            allowed[:, mask] = -torch.inf
            probabilities, ids = allowed.softmax(-1).max(-1)
            fill = [max(window, key=lambda i: float(probabilities[i]))]
            best[fill[0]] = int(ids[fill[0]])
        unsure = [i for i in window if i not in fill and sure[i] < settings["low_conf_threshold"]]
        room = certainty < settings["expand_eos_confidence_threshold"] and len(canvas) < largest
        for i in fill:
            canvas[i] = best[i]
        if unsure and room:
            gap = min(unsure, key=lambda i: sure[i])
            canvas = (canvas[:gap] + [mask] * factor + canvas[gap + 1 :])[:largest]
        while cursor < len(canvas) and mask not in canvas[cursor : cursor + settings["block_length"]]:
            cursor += settings["block_length"]
    row.final = prompt + canvas
    return row


def _logits(recorded: Recorded, prompt: list[int], canvas: list[int], guided: bool) -> Tensor:
    def forward(ids: list[int]) -> Tensor:
        return denoiser(recorded.case)(input_ids=torch.tensor([ids + canvas])).logits[0, len(ids) :]

    logits = forward(prompt)
    if guided and recorded.guidance:
        other = forward([recorded.mask] * len(prompt))
        logits = other + (recorded.guidance + 1) * (logits - other)
    return logits


def _draws(recorded: Recorded) -> list[Tensor]:
    """Uniforms `[B, n, V]` of the second stage's forwards, which draw once each."""
    return recorded_noise(dataclasses.replace(recorded, forwards=None))[0]


def _stacked(states: list[list[int]], width: int, blank: int) -> Tensor:
    return torch.tensor([state + [blank] * (width - len(state)) for state in states])


class _Noise(ReplayedNoise):
    """The reference draws in the second stage only, whose first step is a different one in each row."""

    def __init__(self, recorded: Recorded) -> None:
        super().__init__(recorded)
        self.tokens = _draws(recorded)
        with torch.no_grad():
            ways = [_decode(recorded, row, deviations=False) for row in range(len(recorded.prompts))]
        self.searched = [len(row.searched) for row in ways]

    def draw(self, probabilities: Tensor, rows: Tensor, steps: Tensor, positions: Tensor) -> Tensor:
        found = []
        for row, step, position in zip(rows.tolist(), steps.tolist(), positions.tolist(), strict=True):
            forward = max(0, min(step - self.searched[row], len(self.tokens) - 1))
            found.append(self.tokens[forward][row, self.recorded.prompts.shape[1] + position])
        return (probabilities.log() + gumbel(torch.stack(found))).argmax(-1)


def made_up(seed: int) -> Recorded:
    rng, generator = random.Random(f"daedal {seed}"), torch.Generator().manual_seed(seed)
    count, width, largest = rng.randint(1, 3), rng.randint(1, 10), rng.randint(1, 32)
    settings: dict[str, Any] = {
        "temperature": rng.choice([0.0, 0.0, 0.8, 2.0]),
        "cfg_scale": rng.choice([0.0, 0.0, 0.5]),
        "initial_gen_length": rng.randint(1, min(16, largest)),
        "max_gen_length": largest,
        "block_length": rng.choice([1, 3, 8, 40]),
        "eos_check_tokens": rng.choice([1, 4, 8]),
        "expansion_factor": rng.choice([1, 2, 4, 9]),
        "high_conf_threshold": rng.choice([0.0, 0.5, 0.8, 1.0]),
        "low_conf_threshold": rng.choice([0.0, 0.1, 0.4, 1.0]),
        "eos_confidence_threshold": rng.choice([0.0, 0.05, 0.3, 2.0]),
        "expand_eos_confidence_threshold": rng.choice([0.0, 0.3, 0.9, 2.0]),
    }
    draws = torch.rand(largest, count, width + largest, 64, generator=generator, dtype=torch.float64)
    noise = {"tokens": draws.tolist()} if settings["temperature"] else {}
    prompts = torch.randint(0, 62, (count, width), generator=generator)
    case = Case(folder(), "daedal_made_up", {"function": "generate"}, settings, {}, noise, {})
    return Recorded(case, prompts, torch.ones_like(prompts).bool(), prompts, None, nfe=10**9)
