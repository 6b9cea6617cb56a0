"""Runs a recorded sampler case through the rollout engine, with the recorded noise.

What is particular to a family of cases is in `literals/`; this knows only what their records have in common.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.noise import NoiseSource
from rl4dlm.rollout.rollout import Rollout
from tests.conformance.cases import Case
from tests.conformance.denoisers import denoiser, spec_of


@dataclass(frozen=True)
class Recorded:
    """A sampler case in tensors. B rows, prompt P (padded), canvas L, T = P + L."""

    case: Case
    prompts: Tensor  # long [B, P]
    keys: Tensor  # bool [B, P], what the reference attended to
    ids: Tensor  # long [B, T]; -1 behind the end of a row in records of rows of different lengths
    forwards: list[Tensor] | None  # long [B, n] each, what was fed; n < T where keys and values were cached
    nfe: int

    @classmethod
    def of(cls, case: Case) -> Recorded:
        prompts = torch.tensor(case.inputs["prompt_ids"])
        prompts = prompts[None] if prompts.dim() == 1 else prompts
        mask = case.inputs.get("attention_mask")
        keys = torch.ones_like(prompts).bool() if mask is None else torch.tensor(mask).bool().view(len(prompts), -1)
        keys = keys[:, : prompts.shape[1]]
        forwards = case.outputs.get("forward_inputs")
        if forwards is not None:  # with guidance the unconditional copies are the second half
            forwards = [torch.tensor(f).view(-1, torch.tensor(f).shape[-1])[: len(prompts)] for f in forwards]
        ids = torch.tensor(case.outputs["ids"]).view(len(prompts), -1)
        if not torch.equal(ids[:, : prompts.shape[1]], prompts):  # some records leave the prompt out
            ids = torch.cat([prompts, ids], dim=1)
        nfe = case.outputs.get("nfe_forward_calls", case.outputs.get("nfe"))
        return cls(case, prompts, keys, ids, forwards, int(nfe))

    @functools.cached_property
    def length(self) -> int:
        """Canvas slots."""
        settings = self.case.settings
        return next(
            (settings[name] for name in ("gen_length", "max_new_tokens", "max_gen_length") if name in settings),
            self.ids.shape[1] - self.prompts.shape[1],
        )

    @property
    def block_length(self) -> int:
        return self.case.settings.get("block_length") or self.length

    @property
    def steps_per_block(self) -> int:
        """d1 rounds an uneven number of steps down, to one at least; LLaDA and Fast-dLLM refuse it."""
        return max(1, self.case.settings["steps"] // (self.length // self.block_length))

    @property
    def guidance(self) -> float:
        return self.case.settings.get("cfg_scale") or 0.0

    @property
    def temperature(self) -> float:
        return self.case.settings.get("temperature") or 0.0

    @property
    def mask(self) -> int:
        return spec_of(self.case).mask_token_id

    @property
    def eos(self) -> tuple[int, ...]:
        return spec_of(self.case).eos_token_ids

    @property
    def masks_in_prompt(self) -> bool:
        return bool(((self.prompts == self.mask) & self.keys).any())


@dataclass
class Run:
    """What a sampler did, row by row."""

    ids: Tensor  # long [B, T]
    states: list[list[Tensor]] = field(default_factory=list)  # [B][nfe] of [T]: what the row was before each forward
    nfe: list[int] = field(default_factory=list)  # [B], forwards that wrote something; guidance counts once
    fed: list[Tensor] | None = None  # long [1, n] each, what each forward was fed, of a single row with a cache


@dataclass
class Literal:
    """What a literal sampler did."""

    ids: Tensor  # long [B, T]
    forwards: list[Tensor] = field(default_factory=list)  # long [B, n] each, what was fed
    states: list[Tensor] = field(default_factory=list)  # long [B, T] each, the rows before each forward
    wrote: list[Tensor] = field(default_factory=list)  # bool [B] each, whether our engine makes that forward too
    rules: set[str] = field(default_factory=set)  # the deviations from ours that came to bear

    def working(self) -> Run:
        """Row by row, without the forwards that had nothing to write."""
        states = [
            [state[row] for state, wrote in zip(self.states, self.wrote, strict=True) if wrote[row]]
            for row in range(len(self.ids))
        ]
        fed = [fed for fed, wrote in zip(self.forwards, self.wrote, strict=True) if bool(wrote.any())]
        return Run(self.ids, states, [len(row) for row in states], fed if len(self.ids) == 1 else None)


class Family(Protocol):
    """A module of `literals/`: what it must have. It may have more, see `Optional`."""

    def config(self, recorded: Recorded) -> DecodingConfig:
        """What we run."""
        ...

    def literal(self, recorded: Recorded, *, deviations: bool = True) -> Literal:
        """What the reference does, by a sampler that shares nothing with ours; without the deviations: what we do."""
        ...


class Optional(Protocol):
    """Functions that a module of `literals/` may have; by default the functions of this and the next file serve."""

    def record(self, case: Case) -> Recorded:
        """Instead of `Recorded.of`, for records of another form."""
        ...

    def model(self, recorded: Recorded) -> tuple[Any, DiffusionSpec]:
        """Instead of the tiny model: that of the record, scoring attached, and its spec."""
        ...

    def noise(self, recorded: Recorded) -> NoiseSource | None:
        """What replays the recorded noise; by default there is none."""
        ...

    def rows(self, recorded: Recorded, rollout: Rollout) -> Run:
        """Instead of `rows_of`, for canvases that change their length."""
        ...

    def difference(self, recorded: Recorded, run: Run) -> str:
        """Instead of `verdict.difference`, likewise: in what a run differs from the record; empty when in nothing."""
        ...

    def made_up(self, seed: int) -> Recorded:
        """A case with random settings, prompts and noise, not yet run; the engine must do as the literal does."""
        ...

    def check_counts(self, case: Case) -> None:
        """For cases that are tables of counts: asserts that ours are the same."""
        ...


def run_engine(recorded: Recorded, family: Family) -> Run:
    """The case through `RolloutEngine`. Where the reference attends to padding, padding is prompt tokens."""
    prompts = []
    for row, keys in zip(recorded.prompts, recorded.keys, strict=True):
        assert bool((keys.long().diff() >= 0).all()), "padding that is not on the left has no counterpart here"
        prompts.append(row[keys].tolist())
    config = family.config(recorded)
    noise = getattr(family, "noise", lambda recorded: None)(recorded)
    build = getattr(family, "model", lambda recorded: (denoiser(recorded.case), spec_of(recorded.case)))
    built, spec = build(recorded)
    with fed_to(built) as fed:
        rollout = RolloutEngine(built, spec).generate(prompts, config, noise=noise)
    assert config.stop_at_eos or all(reason == "complete" for reason in rollout.stop_reason)
    assert rollout.exact == (config.cache in ("auto", "none"))
    run = getattr(family, "rows", rows_of)(recorded, rollout)
    cached = config.cache not in ("none", "auto") and len(prompts) == 1 and not recorded.guidance
    return dataclasses.replace(run, fed=fed) if cached else run


@contextmanager
def fed_to(model: torch.nn.Module) -> Iterator[list[Tensor]]:
    """The token ids of every forward of a model, in the order in which they are made."""
    fed: list[Tensor] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: fed.append(kwargs["input_ids"].clone()), with_kwargs=True
    )
    try:
        yield fed
    finally:
        hook.remove()


def rows_of(recorded: Recorded, rollout: Rollout) -> Run:
    """A rollout as rows of the record's form."""
    states = [torch.cat([recorded.prompts, state], dim=1) for state in rollout.states()]
    nfe = [int(n) // (2 if recorded.guidance else 1) for n in rollout.nfe]
    return Run(
        ids=torch.cat([recorded.prompts, rollout.canvas], dim=1),
        states=[[state[row] for state in states[:n]] for row, n in enumerate(nfe)],
        nfe=nfe,
    )


def recorded_noise(recorded: Recorded) -> tuple[list[Tensor], list[Tensor]]:
    """Per forward of the reference: uniforms of the token draws `[B, n, V]` and of the random order `[B, n]`.

    They are told apart by their rank. Fast-dLLM's cached steps draw the tokens twice and use the second draw.
    """
    kinds: dict[int, list[Tensor]] = {2: [], 3: []}
    for value in recorded.case.noise.values():
        if isinstance(value, list) and value and isinstance(value[0], list):
            steps = [torch.tensor(step, dtype=torch.float64) for step in value]
            if steps[0].dim() in kinds:
                kinds[steps[0].dim()] = steps
    tokens, order = kinds[3], kinds[2]
    draws = [1 if f.shape[-1] == recorded.ids.shape[1] else 2 for f in recorded.forwards or ()]
    if recorded.nfe < len(tokens) == sum(draws):
        tokens = [tokens[last - 1] for last in itertools.accumulate(draws)]
    return tokens, order


class ReplayedNoise:
    """A `NoiseSource` that replays recorded uniforms, which are indexed by the reference's forward.

    `forward_of(row, step, position)` says which forward of the reference corresponds to a row's own step at which
    something is drawn at a canvas offset. Schedules ask at open slots only.
    """

    def __init__(self, recorded: Recorded) -> None:
        self.recorded = recorded
        self.tokens, self.order = recorded_noise(recorded)

    def uniform(self, purpose: str, rows: Tensor, steps: Tensor, positions: Tensor) -> Tensor:
        assert purpose == "order", f"the references draw no {purpose!r}"
        return self._look_up(self.order, rows, steps, positions)

    def draw(self, probabilities: Tensor, rows: Tensor, steps: Tensor, positions: Tensor) -> Tensor:
        """Gumbel-max: the argmax of log-probability plus Gumbel noise."""
        uniforms = self._look_up(self.tokens, rows, steps, positions)
        return (probabilities.log() + gumbel(uniforms)).argmax(-1)

    def _look_up(self, values: list[Tensor], rows: Tensor, steps: Tensor, positions: Tensor) -> Tensor:
        keys = zip(rows.tolist(), steps.tolist(), positions.tolist(), strict=True)
        found = []
        for row, step, position in keys:
            at = values[min(self.forward_of(row, step, position), len(values) - 1)][row]
            found.append(at[self.index(len(at), position)])
        return torch.stack(found)

    def index(self, values: int, position: int) -> int:
        """Which of a forward's numbers of positions is that of a canvas offset; by default they are the last ones."""
        return values - self.recorded.length + position

    def forward_of(self, row: int, step: int, position: int) -> int:
        """By default a row makes the same steps as the reference."""
        return step


def gumbel(uniforms: Tensor) -> Tensor:
    return -(-uniforms.log()).log()
