"""PC-Sampler (Huang et al., arXiv 2508.13021): early positions and informative tokens first.

Confidence alone prefers both ends of a canvas and common tokens such as commas. Here the score of a candidate of
probability c at place i of its block is `exp(-decay * i) * min(alpha, -c * ln f)`, where f is the candidate's frequency
in a corpus of text. An even number of the best is written at each step.

Differences from the released code: frequencies come from a table of counts for any vocabulary, and nothing is added to
them before the logarithm.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rl4dlm.rollout.schedules.checks import check_number
from rl4dlm.rollout.schedules.llada import fixed_blocks
from rl4dlm.rollout.schedules.parts import Confidence, Schedule, Step, even_top
from rl4dlm.rollout.schedules.registry import register


@dataclass(frozen=True)
class PCSamplerArguments:
    """Settings of `pc_sampler`.

    Args:
        frequencies: how often tokens occur in a corpus: a mapping from token id to count, the path of a JSON file that
            holds one (or the released form of it, `{"num_token": total, "p_baseline_dict": counts}`), or `"uniform"`:
            every token tells one nat, so that position and confidence alone decide, which is not the paper's rule.
            Tokens that are not in it count as seen once.
        decay: lambda, how fast scores fall along a block; 0 is off.
        alpha: what the information of a candidate is clipped at, in nats.
    """

    frequencies: str | Mapping[Any, float] = "uniform"
    decay: float = 0.25
    alpha: float = 10.0

    def __post_init__(self) -> None:
        check_number(self, "decay", 0)
        check_number(self, "alpha", 0)
        if math.isinf(self.decay):
            raise ValueError(f"decay={self.decay} is not allowed; it must be finite")
        self.information()

    def information(self) -> Tensor:
        """float64 `[n + 1]`, `-ln f` of tokens 0 to n - 1 in nats, and of all that come behind."""
        if self.frequencies == "uniform":
            return torch.ones(1, dtype=torch.float64)
        counts, total = _counts(self.frequencies)
        table = torch.ones(max(counts, default=-1) + 2, dtype=torch.float64)
        for token, count in counts.items():
            table[token] = max(count, 1)
        return math.log(total) - table.log()


@register("pc_sampler", PCSamplerArguments, fixed_forwards=True)
def pc_sampler(arguments: PCSamplerArguments, config: Any) -> Schedule:
    """Commits early positions and informative candidates first."""
    scores = calibrated(arguments.information(), arguments.decay, arguments.alpha)
    return Schedule(fixed_blocks(config), scores, even_top(config.steps_per_block), memoryless=True)


def calibrated(information: Tensor, decay: float, alpha: float) -> Confidence:
    """Confidences weighted by what the candidates tell and by their place in the block."""

    def scores(step: Step) -> Tensor:
        known = information.to(step.drawn.confidence)
        told = step.drawn.confidence * known[step.drawn.token.clamp(max=len(known) - 1)]
        place = step.offsets - step.start[:, None]
        return (-decay * place).exp() * told.clamp(max=alpha)

    return scores


def _counts(source: str | Mapping[Any, float]) -> tuple[dict[int, float], float]:
    """Token ids to counts, and the total that they are counts of."""
    table: Any = source
    name = "frequencies"
    if isinstance(source, str):
        name = f"frequencies={source!r}"
        if not Path(source).is_file():
            raise ValueError(f'{name} is not allowed: there is no such file; give a mapping, a JSON file or "uniform"')
        try:
            table = json.loads(Path(source).read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{name} is not allowed: it is not a JSON file ({error})") from error
    stated: Any = None
    if isinstance(table, Mapping) and "p_baseline_dict" in table:
        table, stated = table["p_baseline_dict"], table.get("num_token")
    if not isinstance(table, Mapping) or not table:
        raise ValueError(f"{name} is not allowed; it must be a mapping from token id to count that is not empty")
    counts = {_token(key, name): _count(value, name) for key, value in table.items()}
    total = sum(counts.values()) if stated is None else _count(stated, name)
    if total < max(*counts.values(), 1):
        raise ValueError(f"{name} is not allowed: a total of {total} is less than the count of a token, or than 1")
    return counts, total


def _token(key: Any, name: str) -> int:
    if isinstance(key, bool) or not str(key).isdecimal():
        raise ValueError(f"{name} is not allowed: {key!r} is no token id; ids are integers from 0 on")
    return int(key)


def _count(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"{name} is not allowed: {value!r} is no count; counts are numbers from 0 on")
    return float(value)
