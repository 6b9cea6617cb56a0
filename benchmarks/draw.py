"""What a draw costs: candidates and their numbers from logits of a large vocabulary, now and as of commit 25eb81d.

    python benchmarks/draw.py

Draws from the same logits with both, in turn, on one thread, and writes medians of process CPU time and their ratios to
`benchmarks/results/draw.json`. Whether both give the same tokens is part of the report. The logits are normal numbers
with a few likely tokens per row; `flat` ones have nuclei of tens of thousands of tokens, for which top-p has to sort.
The old code always computed entropies.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rl4dlm.evaluation import machine, versions
from rl4dlm.rollout.drawing import Drawn, Places, Scored, in_parts
from rl4dlm.rollout.memory import Memory
from rl4dlm.rollout.noise import KeyedNoise

RESULTS = Path(__file__).resolve().parent / "results" / "draw.json"

CASES: dict[str, dict[str, Any]] = {
    "T=0.9": {"temperature": 0.9},
    "T=0.9, record=()": {"temperature": 0.9, "entropy": False},
    "greedy": {"temperature": 0.0},
    "greedy, record=()": {"temperature": 0.0, "entropy": False},
    "T=0.9, top_p=0.95": {"temperature": 0.9, "top_p": 0.95},
    "T=0.9, top_k=50": {"temperature": 0.9, "top_k": 50},
    "flat, T=0.9, top_p=0.95": {"temperature": 0.9, "top_p": 0.95},
}


def main() -> None:
    """Times both, case by case, round-robin so that a slow moment of the machine falls on both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=66)
    parser.add_argument("--vocabulary", type=int, default=126_464)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, object] = {"command": "python benchmarks/draw.py", "settings": vars(options)}
    for name, result in cases(options.rows, options.vocabulary, options.rounds).items():
        report[name] = result
        print(name, json.dumps(result))
    report |= {"machine": machine(), "versions": versions()}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=2) + "\n")


def cases(rows: int, vocabulary: int, rounds: int) -> dict[str, dict[str, object]]:
    """What `compared` says of every case, for logits of so many rows."""
    generator = torch.Generator().manual_seed(0)
    shape = (rows, vocabulary)
    flat = torch.randn(shape, generator=generator) * 2
    likely = torch.randint(vocabulary, (rows, 20), generator=generator)
    peaked = flat.scatter_add(-1, likely, 12 + 2 * torch.randn(likely.shape, generator=generator))
    return {
        name: compared(flat if name.startswith("flat") else peaked, settings, rounds)
        for name, settings in CASES.items()
    }


def compared(logits: Tensor, settings: dict[str, Any], rounds: int) -> dict[str, object]:
    """Medians of CPU milliseconds of both, their ratio, and in how many rows the tokens are equal."""
    at, zero = torch.arange(len(logits)), torch.zeros(len(logits), dtype=torch.long)
    places = Places(zero, at, zero, zero, zero, KeyedNoise(0), Memory())
    mask = logits.shape[-1] - 128

    @in_parts
    def reduce(some: Tensor, part: slice, own: Tensor) -> tuple[Tensor, ...]:
        return Scored(
            logits=some,
            temperature=settings["temperature"],
            top_p=settings.get("top_p", 1.0),
            top_k=settings.get("top_k", 0),
            mask_token_id=mask,
            banned=None,
            places=places.at(part),
            own_logits=own,
        ).drawn(entropy=settings.get("entropy", True))

    def now() -> Drawn:
        return Drawn(*reduce(logits, slice(0, len(logits)), logits))

    def then() -> Drawn:
        return drawn_as_of_25eb81d(
            logits, settings["temperature"], settings.get("top_p", 1.0), settings.get("top_k", 0), mask, places
        )

    found, expected = now(), then()  # a first time, not counted
    times: dict[Callable[[], Drawn], list[float]] = {then: [], now: []}
    for _ in range(rounds):
        for draw, spent in times.items():
            started = time.process_time()
            draw()
            spent.append(time.process_time() - started)
    before, after = statistics.median(times[then]), statistics.median(times[now])
    return {
        "milliseconds as of 25eb81d": round(1000 * before, 1),
        "milliseconds": round(1000 * after, 1),
        "ratio": round(before / after, 2),
        "ratios of the rounds": [round(a / b, 2) for a, b in zip(times[then], times[now], strict=True)],
        "rows": len(logits),
        "equal tokens": int((found.token == expected.token).sum()),
        "largest difference of confidence": float((found.confidence - expected.confidence).abs().max()),
        "largest difference of log_prob": float((found.log_prob - expected.log_prob).abs().max()),
    }


def drawn_as_of_25eb81d(
    logits: Tensor, temperature: float, top_p: float, top_k: int, mask_token_id: int, places: Places
) -> Drawn:
    """What `Scored(...).drawn(...)` and `inverse_cdf` were at that commit, in one function."""
    log_probs = logits.log_softmax(-1)
    probabilities = log_probs.exp()
    entropy = -torch.where(probabilities > 0, probabilities * log_probs, 0.0).sum(-1)
    allowed = logits.index_fill(-1, torch.tensor([mask_token_id]), -torch.inf)
    if temperature == 0:
        best = allowed.amax(-1, keepdim=True)
        token = torch.where(allowed >= best, torch.arange(logits.shape[-1]), logits.shape[-1] - 1).amin(-1)
        chosen = log_probs.gather(-1, token[:, None]).squeeze(-1)
        return Drawn(token, chosen.exp(), chosen, torch.zeros_like(chosen), entropy)
    sampling = (allowed / temperature).log_softmax(-1)
    if 0 < top_k < logits.shape[-1] or top_p < 1.0:
        ordered, ids = sampling.sort(dim=-1, descending=True, stable=True)
        rank = torch.arange(ordered.shape[-1])
        drop = (rank >= top_k).expand_as(ordered) if top_k > 0 else torch.zeros_like(ordered, dtype=torch.bool)
        if top_p < 1.0:
            kept = ordered.masked_fill(drop, -torch.inf).softmax(-1)
            drop = drop | (kept.cumsum(-1) - kept >= top_p)
        dropped = torch.zeros_like(drop).scatter(-1, ids, drop)
        sampling = sampling.masked_fill(dropped, -torch.inf).log_softmax(-1)
    uniforms = places.noise.uniform("token", places.row_ids, places.steps, places.positions)
    cumulative = sampling.exp().double().cumsum(-1)
    total = cumulative[:, -1:]
    threshold = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    token = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)
    chosen = log_probs.gather(-1, token[:, None]).squeeze(-1)
    return Drawn(token, chosen.exp(), chosen, sampling.gather(-1, token[:, None]).squeeze(-1), entropy)


if __name__ == "__main__":
    main()
