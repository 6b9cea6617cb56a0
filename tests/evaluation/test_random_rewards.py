"""Random rewards on Sudoku: the page shows what was measured, and shaken weights are as far from the start."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import correlation, mean

import torch

from benchmarks import random_rewards
from benchmarks.proving_ground.statistics import student_half
from rl4dlm import tiny_llada

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_shows_what_was_measured() -> None:
    report = json.loads(random_rewards.RESULT.read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    section = page[page.index("### Rewards that know nothing") :]
    assert random_rewards.table(report) in section
    before, *_ = report["models"]
    trained = [model for model in report["models"] if model["kind"] == "random"]
    shares = [model["solved"]["4"] for model in trained]
    gains = [100 * (share - before["solved"]["4"]) for share in shares]
    assert f"+{mean(gains):.1f} ± {student_half(gains):.1f} points" in section
    assert f"+{max(gains):.0f} in the best of\n  ten seeds" in section
    assert f"r = {correlation(shares, [model['first_entropy'] for model in trained]):.2f}" in section


def test_shaken_weights_are_as_far_from_the_start_as_the_trained_ones() -> None:
    start, trained = tiny_llada(seed=0), tiny_llada(seed=1)
    model = random_rewards.shaken(start, trained, seed=0)
    for a, b, c in zip(start.parameters(), trained.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close((c - a).norm(), (b - a).norm())
        assert torch.equal(a, b) or not torch.equal(b, c)
