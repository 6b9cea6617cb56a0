"""Views scored one after another: the gradients of all views together, with the memory of one."""

from __future__ import annotations

import gc
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rl4dlm.likelihood.estimator import Estimator
from rl4dlm.likelihood.scoring import score_views
from rl4dlm.models.scoring import attach_scoring
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.models.tiny import tiny_llada
from tests.likelihood.test_estimators import ESTIMATORS, name, rows
from tests.models.float64 import exactly_float64

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "one_view_memory.py"
SIZES = {"rows": 4, "prompt": 16, "canvas": 96, "vocabulary": 4000, "hidden": 64, "layers": 3}


@pytest.fixture(scope="module")
def model() -> Any:
    sizes: dict[str, Any] = {"vocab_size": 8, "mask_token_id": 7, "eos_token_id": 1, "pad_token_id": None}
    return attach_scoring(exactly_float64(tiny_llada(**sizes, hidden_size=16, dtype=torch.float64))).train()


def gradients(
    model: Any, estimator: Estimator, *, one_view: bool, pieces: int = 1
) -> tuple[list[Tensor], list[Tensor]]:
    """Scores and gradients of a loss that is not linear in them and uses entropies, accumulated over micro-batches."""
    model.zero_grad()
    batch = rows(6)
    scores = []
    for part in torch.arange(len(batch)).chunk(pieces):
        piece = batch[part]
        views = estimator.draw(piece, seed=0, iteration=1)
        spec = DiffusionSpec.of(model)
        scored = score_views(model, spec, piece.ids, piece.attention_mask, views, one_view=one_view)
        value = estimator.reduce(scored.log_probs, views).sum(-1)
        ((value / 8).exp().sum() + 0.1 * scored.entropies.square().sum()).backward()
        scores.append(value.detach())
    return [torch.cat(scores)], [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=name)
def test_gradients_are_those_of_all_views(model: Any, estimator: Estimator) -> None:
    """With activation checkpointing and accumulation on one side, neither on the other."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        found = gradients(model, estimator, one_view=True, pieces=2)
    finally:
        model.gradient_checkpointing_disable()
    expected = gradients(model, estimator, one_view=False)
    for a, b in zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_eight_views_take_the_memory_of_one() -> None:
    spec = importlib.util.spec_from_file_location("one_view_memory", SCRIPT)
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    one, eight = (benchmark.in_process(views, True, **SIZES)["mib"] for views in (1, 8))
    assert one > 5 and eight < 1.5 * one


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of objects that are looked at
def test_what_is_computed_again_for_a_chunk_of_logits_is_freed_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entropies without a gradient must not keep the logits of their chunk until the end of the backward pass."""
    model = attach_scoring(tiny_llada(vocab_size=64))
    monkeypatch.setattr("rl4dlm.models.scoring.CHUNK_ELEMENTS", 64 * 2)  # two positions
    alive: list[int] = []

    def look(gradient: Tensor) -> None:
        alive.append(sum(isinstance(x, Tensor) and x.shape == (2, 64) for x in gc.get_objects()))

    states = torch.randn(1, 16, model.config.hidden_size, requires_grad=True)
    states.register_hook(look)  # when all chunks have been gone through
    monkeypatch.setattr(model.model, "forward", lambda **inputs: SimpleNamespace(last_hidden_state=states * 1.0))
    ids = torch.arange(16)[None]
    scores = model(input_ids=ids, score_positions=torch.ones_like(ids).bool(), score_targets=ids)
    scores.log_probs.sum().backward()
    assert alive == [0]
