"""Runs a recorded sampler case through the rollout engine, with the recorded noise."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.schedules.llada import fixed_blocks
from rl4dlm.rollout.schedules.parts import Schedule, above, random_order
from tests.conformance.cases import Case
from tests.conformance.denoisers import denoiser, spec_of

DEFAULT_EOT = 2  # what the recorded functions' hard-coded end-of-turn id was replaced by


class ThresholdOnRandomOrder(DecodingConfig):
    """What Fast-dLLM's settings `threshold` and `remasking="random"` mean together, from the library's parts."""

    def build_schedule(self) -> Schedule:
        return Schedule(fixed_blocks(self), random_order, above(self.arguments().threshold))


@dataclass(frozen=True)
class Recorded:
    """A sampler case in tensors. B rows, prompt P (padded), canvas L, T = P + L."""

    case: Case
    prompts: Tensor  # long [B, P]
    keys: Tensor  # bool [B, P], what the reference attended to
    ids: Tensor  # long [B, T]
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
        nfe = case.outputs.get("nfe_forward_calls", case.outputs.get("nfe"))
        return cls(case, prompts, keys, torch.tensor(case.outputs["ids"]).view(len(prompts), -1), forwards, int(nfe))

    @property
    def length(self) -> int:
        return self.case.settings["gen_length"]

    @property
    def block_length(self) -> int:
        return self.case.settings.get("block_length") or self.length

    @property
    def steps_per_block(self) -> int:
        """d1 rounds an uneven number of steps down, to one at least; LLaDA and Fast-dLLM refuse it."""
        return max(1, self.case.settings["steps"] // (self.length // self.block_length))

    @property
    def runs_all_steps(self) -> bool:
        """Whether the reference runs a fixed number of steps per block (LLaDA, d1) or until the block is full."""
        return self.case.family != "fastdllm"

    @property
    def threshold(self) -> float | None:
        return self.case.settings.get("threshold")

    @property
    def guidance(self) -> float:
        return self.case.settings.get("cfg_scale") or 0.0

    @property
    def temperature(self) -> float:
        return self.case.settings.get("temperature") or 0.0

    @property
    def random(self) -> bool:
        return self.case.settings.get("remasking") == "random"

    @property
    def eos(self) -> tuple[int, ...]:
        return spec_of(self.case).eos_token_ids

    @property
    def eot(self) -> int:
        return self.case.settings.get("eot_id", DEFAULT_EOT)

    @property
    def masks_in_prompt(self) -> bool:
        return bool(((self.prompts == spec_of(self.case).mask_token_id) & self.keys).any())


@dataclass
class Run:
    """What a sampler did, row by row."""

    ids: Tensor  # long [B, T]
    states: list[list[Tensor]] = field(default_factory=list)  # [B][nfe] of [T]: what the row was before each forward
    nfe: list[int] = field(default_factory=list)  # [B], forwards that wrote something; guidance counts once


def run_engine(recorded: Recorded) -> Run:
    """The case through `RolloutEngine`. Where the reference attends to padding, padding is prompt tokens."""
    case, settings = recorded.case, recorded.case.settings
    prompts = []
    for row, keys in zip(recorded.prompts, recorded.keys, strict=True):
        assert bool((keys.long().diff() >= 0).all()), "padding that is not on the left has no counterpart here"
        prompts.append(row[keys].tolist())
    if recorded.threshold is None:
        schedule, arguments = "random" if recorded.random else "low_confidence", {}
    else:
        schedule, arguments = "threshold", {"threshold": recorded.threshold}
    config = (ThresholdOnRandomOrder if recorded.random and arguments else DecodingConfig)(
        canvas_length=recorded.length,
        block_length=recorded.block_length,
        schedule=schedule,
        steps=recorded.steps_per_block * (recorded.length // recorded.block_length) if not arguments else None,
        temperature=recorded.temperature,
        cfg_scale=recorded.guidance,
        cache=case.cache,
        stop_at_eos=False,
        suppress_token_ids=recorded.eos if settings.get("logits_eos_inf") else (),
        defer_token_ids=(*recorded.eos, recorded.eot) if settings.get("confidence_eos_eot_inf") else (),
        schedule_args=arguments,
    )
    engine = RolloutEngine(denoiser(case), spec_of(case))
    rollout = engine.generate(prompts, config, noise=ReplayedNoise(recorded) if case.noise else None)
    assert all(reason == "complete" for reason in rollout.stop_reason)
    assert rollout.exact == (case.cache == "none")
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

    A row's own steps are fewer where the reference runs steps that write nothing, so they are counted block by block.
    """

    def __init__(self, recorded: Recorded) -> None:
        self.recorded = recorded
        self.tokens, self.order = recorded_noise(recorded)
        self.entered: dict[int, list[tuple[int, int]]] = {}  # row -> (block, the row's step at its first step) so far

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
            at = values[min(self._forward(row, step, position), len(values) - 1)][row]
            found.append(at[len(at) - self.recorded.length + position])
        return torch.stack(found)

    def _forward(self, row: int, step: int, position: int) -> int:
        block = position // self.recorded.block_length
        entered = self.entered.setdefault(row, [(block, step)])
        if entered[-1][0] != block:
            entered.append((block, step))
        starts = [first for _, first in entered]
        made = [after - before for before, after in itertools.pairwise(starts)]
        return sum(forwards_of_block(self.recorded, steps) for steps in made) + step - starts[-1]


def forwards_of_block(recorded: Recorded, writing: int) -> int:
    """Forwards the reference spends on a block that took so many steps which wrote something."""
    if recorded.runs_all_steps:
        return recorded.steps_per_block
    return max(2, writing) if recorded.case.cache == "prefix" else writing


def gumbel(uniforms: Tensor) -> Tensor:
    return -(-uniforms.log()).log()
