"""Recorded samplers: equal ids, states and forwards, or exactly the difference that stated rules predict."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch

from rl4dlm.rollout.schedules.parts import even_counts
from tests.conformance import report
from tests.conformance.cases import Case, folder, load_cases
from tests.conformance.literal import literal
from tests.conformance.samplers import Recorded
from tests.conformance.verdict import verdict

CASES = load_cases()


def of_kind(kind: str) -> list[Any]:
    return [pytest.param(case, id=case.name) for case in CASES if not case.not_covered and case.kind == kind]


@pytest.mark.parametrize("case", of_kind("sampler"))
def test_sampler(case: Case):
    rules = verdict(Recorded.of(case))
    if not rules:
        report.equal[case.family].append(case.name)
    for rule in rules:
        report.explained[rule].append(case.name)


@pytest.mark.parametrize("case", of_kind("counts"))
def test_counts(case: Case):
    assert case.outputs["table"]
    for entry in case.outputs["table"]:
        masked, steps = torch.tensor(entry["masked"]).view(-1), entry["steps"]
        counts = torch.stack([even_counts(masked, steps, torch.tensor(s)) for s in range(steps)], dim=1)
        assert torch.equal(counts, torch.tensor(entry["counts"]).view(len(masked), -1)), entry
    report.equal[case.family].append(case.name)


@pytest.mark.parametrize("case", of_kind("sampler")[:1])
def test_a_wrong_record_is_noticed(case: Case):
    recorded = Recorded.of(case)
    ids = recorded.ids.clone()
    ids[0, -1] = (ids[0, -1] + 1) % 8
    with pytest.raises(AssertionError):
        verdict(dataclasses.replace(recorded, ids=ids))
    with pytest.raises(AssertionError):
        verdict(dataclasses.replace(recorded, nfe=recorded.nfe + 1))
    with pytest.raises(AssertionError):
        verdict(dataclasses.replace(recorded, forwards=recorded.forwards[::-1]))


@pytest.mark.skipif(not folder().is_dir(), reason="no conformance cases")
@pytest.mark.parametrize("family", ["llada", "d1", "fastdllm", "fastdllm_prefix"])
@pytest.mark.parametrize("seed", range(8))
def test_settings_that_no_record_has(family: str, seed: int):
    """The literal sampler is plain: rows unpadded by hand, no compaction, no store. The engine must do what it does."""
    recorded = made_up(family, seed)
    result = literal(recorded)
    verdict(dataclasses.replace(recorded, ids=result.ids, nfe=len(result.forwards), forwards=result.forwards))


def made_up(family: str, seed: int) -> Recorded:
    """A case with random settings, prompts and noise, not yet run."""
    rng, generator = random.Random(f"{family} {seed}"), torch.Generator().manual_seed(seed)
    fixed = family in ("llada", "d1")
    blocks, block_length = rng.randint(1, 3), rng.choice([1, 2, 4, 5, 8])
    length, rows, width = blocks * block_length, rng.randint(1, 3) if fixed else 1, rng.randint(1, 12)
    per_block = rng.choice([1, 2, block_length, block_length + 2]) if fixed else block_length + 1
    settings: dict[str, Any] = {
        "gen_length": length,
        "block_length": block_length,
        "steps": blocks * per_block,
        "temperature": rng.choice([0.0, 0.7, 1.5]),
        "remasking": rng.choice(["low_confidence", "low_confidence", "random"]),
        "cfg_scale": rng.choice([0.0, 1.5]) if fixed else 0.0,
    }
    if family == "llada":
        settings["logits_eos_inf"], settings["confidence_eos_eot_inf"] = rng.random() < 0.3, rng.random() < 0.4
    if not fixed:
        settings["threshold"] = rng.choice([None, 0.0, 0.2, 0.6, 1.0])
    prompts = torch.randint(0, 62, (rows, width), generator=generator)
    keys = torch.ones_like(prompts).bool()
    if family == "llada":
        for row in range(rows):
            keys[row, : rng.randint(0, width - 1)] = False
    total, forwards = width + length, 2 * (blocks * per_block + length)  # more than are needed
    noise = {
        "tokens": torch.rand(forwards, rows, total, 64, generator=generator, dtype=torch.float64).tolist(),
        "order": torch.rand(forwards, rows, total, generator=generator, dtype=torch.float64).tolist(),
    }
    source = {"function": "generate_with_prefix_cache" if "prefix" in family else "generate"}
    case = Case(folder(), f"{family}_made_up", source, settings, {}, noise, {})
    return Recorded(case, prompts, keys, prompts, None, nfe=10**9)
