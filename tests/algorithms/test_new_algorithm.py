"""The example of an algorithm of one's own runs, and its estimator is what it says."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from rl4dlm.likelihood.mean_field import MeanField
from tests.likelihood.tabular import Tabular, rows_of
from tests.likelihood.test_estimators import rows

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location("new_algorithm", EXAMPLES / "new_algorithm.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_it_trains_and_measures(example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example.main(["--steps", "1", "--puzzles", "10", "--output", str(tmp_path)])
    lines = [line for line in capsys.readouterr().out.splitlines() if "solved in 4 steps" in line]
    assert [line.split(":")[0] for line in lines] == ["before", "after"]


def test_it_is_short() -> None:
    assert len((EXAMPLES / "new_algorithm.py").read_text().splitlines()) < 100


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_every_token_is_scored_once_given_earlier_steps(example: ModuleType, steps: int) -> None:
    batch = rows()
    views = example.Stepwise(steps).draw(batch, seed=0, iteration=0)
    assert torch.equal(views.scored.sum(1), batch.valid.long())
    hidden = views.hidden[..., batch.prompt_ids.shape[1] :]
    assert (hidden | ~views.scored).all() and not views.hidden[..., : batch.prompt_ids.shape[1]].any()
    if steps == 1:
        expected = MeanField(0.0).draw(batch, seed=0, iteration=0)
        assert torch.equal(views.hidden, expected.hidden) and torch.equal(views.scored, expected.scored)
    part = example.Stepwise(steps).draw(batch[5:9], seed=0, iteration=0)
    assert torch.equal(part.hidden, views.hidden[5:9])


def test_with_a_step_per_token_it_is_the_evidence_lower_bound(example: ModuleType) -> None:
    table, y = Tabular(4, seed=1), torch.tensor([0, 2, 1, 1])
    batch = rows_of(y, 2000)
    estimator = example.Stepwise(4)
    sums = table.scores(estimator, estimator.draw(batch, seed=0, iteration=0), batch.canvas_ids).sum(-1)
    found = {round(float(x), 9) for x in sums}
    assert found == {round(float(x), 9) for x in table.by_orders(y)}  # each is the sum of an order
    assert abs(float(sums.mean()) - table.elbo(y)) < 5 * float(sums.std()) / 2000**0.5
