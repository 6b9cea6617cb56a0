"""Models whose predictions at each slot are written down, and what was written when."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.rollout import Rollout
from tests.rollout.table_model import TableModel

VOCAB, EOS, MASK = 6, 1, 5
PROMPT = [2]


def model_of(probabilities: list[list[float]]) -> TableModel:
    """The same distribution `[V]` at each canvas slot whatever is written; the prompt is one token."""
    numbers = torch.tensor([[1.0] * VOCAB, *probabilities], dtype=torch.float64)
    logits = numbers.log().clamp(min=-800)  # finite, and 0 as a probability
    return TableModel(lambda tokens: logits[: len(tokens)], VOCAB, mask_token_id=MASK, eos_token_ids=(EOS,))


def peaks(confidences: list[float], tokens: list[int] | None = None) -> list[list[float]]:
    """Distributions with one probable token each (3, unless said otherwise); all others share the rest evenly."""
    chosen = tokens or [3] * len(confidences)
    return [
        [c if token == best else (1 - c) / (VOCAB - 1) for token in range(VOCAB)]
        for c, best in zip(confidences, chosen, strict=True)
    ]


def decode(model: Any, length: int, schedule: str, prompts: list[list[int]] | None = None, **settings: Any) -> Rollout:
    """`settings`: of the decoding or, those that it does not know, of the schedule."""
    own = DecodingConfig.__dataclass_fields__
    call = {name: settings.pop(name) for name in ("hints", "seed", "num_generations") if name in settings}
    config = DecodingConfig(
        canvas_length=length,
        schedule=schedule,
        schedule_args={name: value for name, value in settings.items() if name not in own},
        **{"stop_at_eos": False, **{name: value for name, value in settings.items() if name in own}},
    )
    return RolloutEngine(model).generate(prompts or [PROMPT], config, **call)


def order(rollout: Rollout, row: int = 0) -> list[list[int]]:
    """The slots that each step wrote."""
    steps = rollout.trace.commit_step[row]
    return [(steps == step).nonzero().squeeze(-1).tolist() for step in range(int(rollout.trace.steps[row]))]


def counts(rollout: Rollout, row: int = 0) -> list[int]:
    """How many slots each step wrote."""
    return [len(slots) for slots in order(rollout, row)]


def same(a: Rollout, b: Rollout) -> bool:
    """Whether two rollouts wrote the same at the same steps."""
    return torch.equal(a.canvas, b.canvas) and torch.equal(a.trace.commit_step, b.trace.commit_step)


def entropy(distribution: list[float]) -> float:
    return -sum(p * math.log(p) for p in distribution if p > 0)


def row(values: list[float]) -> Tensor:
    """float64 `[1, W]`."""
    return torch.tensor([values], dtype=torch.float64)
