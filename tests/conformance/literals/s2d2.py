"""S2D2's self-speculation on checkpoints of `models/`: a block's draft, checked by a second forward from left to right.

Records count forwards that only store keys and values; ours keeps none apart. What a forward is fed is the block alone,
or the drafted block and as many mask tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.rollout import Rollout
from tests.conformance.cases import Case
from tests.conformance.literals.blocks import model as model
from tests.conformance.samplers import Literal, Recorded, Run

POLICIES = {"mask_span_length": "span", "score_threshold": "score", "score_hysteresis": "hysteresis"}


def record(case: Case) -> Recorded:
    """The record without forwards that store a finished block, or the prompt, and nothing else."""
    found = Recorded.of(case)
    assert found.forwards is not None and len(found.prompts) == 1
    mask = case.settings["mask_id"]
    forwards = [fed for fed in found.forwards if bool((fed == mask).any())]
    return dataclasses.replace(found, forwards=forwards, nfe=len(forwards))


def config(recorded: Recorded) -> DecodingConfig:
    settings = recorded.case.settings
    canvas, size = recorded.ids.shape[1] - recorded.prompts.shape[1], recorded.block_length
    arguments: dict[str, Any] = {
        "policy": POLICIES[settings["do_verify_policy"]],
        "threshold": settings["confidence_threshold"],
        "ratio_threshold": settings.get("ssd_ratio_threshold"),
    }
    if "min_ssd_span_length" in settings:
        arguments["min_span"] = settings["min_ssd_span_length"]
    if arguments["policy"] != "span":
        assert settings["token_acceptance_estimator"] == "soft_entropy_negexp"
        arguments |= {
            "penalty": settings["score_penalty_coef"],
            "penalty_per_sure": settings["do_verify_score_type"] == "difference_dynamic",
            "score_threshold": settings.get("do_verify_score_threshold", 0),
            "threshold_on": settings.get("hysteresis_threshold_on", 0.0),
            "threshold_off": settings.get("hysteresis_threshold_off", -1.0),
        }
    return DecodingConfig(
        canvas_length=canvas,
        schedule="s2d2",
        schedule_args=arguments,
        steps=settings["denoising_steps"] * -(-canvas // size),
        temperature=0.0,  # drafts are arg-max
        stop_at_eos=False,
    )


def noise(recorded: Recorded) -> _Uniforms:
    return _Uniforms(recorded)


class _Uniforms:
    """A `NoiseSource` with the numbers of each check, in the order of the checks."""

    def __init__(self, recorded: Recorded) -> None:
        self.accept: list[list[float]] = recorded.case.noise["accept_uniforms"]
        self.residual: list[float] = recorded.case.noise["resample_uniforms"]
        self.checks = self.replaced = 0

    def uniform(self, purpose: str, rows: Tensor, steps: Tensor, positions: Tensor) -> Tensor:
        if purpose == "accept":
            found, self.checks = self.accept[min(self.checks, len(self.accept) - 1)], self.checks + 1
            found = (found + [1.0] * len(positions))[: len(positions)]
        else:
            assert purpose == "residual"
            found, self.replaced = [self.residual[min(self.replaced, len(self.residual) - 1)]], self.replaced + 1
        return torch.tensor(found, dtype=torch.float64)

    def draw(self, probabilities: Tensor, rows: Tensor, steps: Tensor, positions: Tensor) -> Tensor:
        raise AssertionError("drafts are the most probable tokens")


def rows(recorded: Recorded, rollout: Rollout) -> Run:
    """A rollout with the row before each step, of which there are fewer than forwards."""
    states = [torch.cat([recorded.prompts, state], dim=1)[0] for state in rollout.states()]
    return Run(torch.cat([recorded.prompts, rollout.canvas], dim=1), [states], [int(rollout.nfe)])


def difference(recorded: Recorded, ours: Run | None) -> str:
    """Ids, forwards, and what each draft and check was fed; a check leaves the row as it is."""
    if ours is None:
        return "the prompt is refused"
    if not torch.equal(ours.ids, recorded.ids):
        return f"ids differ: {ours.ids.tolist()}"
    if ours.nfe != [recorded.nfe]:
        return f"forwards differ: {ours.nfe} and {recorded.nfe}"
    size, forwards = recorded.block_length, recorded.forwards or []
    drafts = [fed[0] for fed in forwards if fed.shape[1] == size]
    if len(drafts) != len(ours.states[0]):
        return f"{len(ours.states[0])} steps are made and {len(drafts)} recorded"
    for step, (state, fed) in enumerate(zip(ours.states[0], drafts, strict=True)):
        first = int((state == recorded.mask).nonzero()[0, 0]) // size * size
        if not torch.equal(state[first : first + size], fed):
            return f"states differ before step {step}"
    step = -1
    for fed in forwards:
        step += fed.shape[1] == size
        known = drafts[step] != recorded.mask
        if fed.shape[1] == 2 * size and not torch.equal(fed[0, :size][known], drafts[step][known]):
            return f"what is checked at step {step} is no draft of that state"
    return ""


def literal(recorded: Recorded, *, deviations: bool = True) -> Literal:
    """Nothing may differ."""
    return Literal(recorded.ids)
