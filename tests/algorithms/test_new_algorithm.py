"""The example of an algorithm of one's own runs, and its estimator is what it says."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from rl4dlm.likelihood.mean_field import MeanField
from tests.likelihood.tabular import Tabular, rows_of
from tests.likelihood.test_estimators import rows

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return loaded(monkeypatch, "new_algorithm")


def loaded(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
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


@pytest.mark.parametrize("name", ["new_algorithm", "new_trajectory"])
def test_it_is_short(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 100


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_the_trajectory_algorithm_trains_steps_by_their_entropy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = loaded(monkeypatch, "new_trajectory")
    seen = []

    class Recording(module.DecisionTrainer):
        def loss(self, scores: Any, batch: dict[str, Any]) -> torch.Tensor:
            seen.append(
                {name: batch[name] for name in ("step_advantages", "advantages", "commit_step", "commit_entropy")}
            )
            return super().loss(scores, batch)

    monkeypatch.setattr(module, "DecisionTrainer", Recording)
    module.main(["--steps", "1", "--puzzles", "10", "--output", str(tmp_path)])
    assert capsys.readouterr().out.count("solved in 4 steps") == 2
    (batch,) = seen
    step, entropy = batch["commit_step"], batch["commit_entropy"]
    each = torch.stack([(entropy * (step == k)).sum(-1) / (step == k).sum(-1) for k in range(4)], dim=1)
    deviation = batch["step_advantages"] / each
    assert (deviation - deviation[:, :1]).abs().max() < 1e-5 and batch["step_advantages"].abs().max() > 0.01
    assert (deviation[:, 0].sign() == batch["advantages"].sign()).all()


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
