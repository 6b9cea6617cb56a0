"""The exact check while training: what `evaluate` finds, once per evaluation, and the best checkpoint by it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from rl4dlm import DecodingConfig, evaluate, tiny_sdar
from rl4dlm.tasks.base import Task

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@dataclass
class Vowels(Task):
    """Solved by texts with more of one half of the characters than a row asks for."""

    least: int = 4
    name = "vowels"
    splits = ("train", "validation")

    def _rows(self, split: str) -> list[dict[str, Any]]:
        return [{"prompt": f"{split[0]}{i}", "unknown": i == 2} for i in range(7)]

    def check(self, completion: str, row: Mapping[str, Any]) -> bool | None:
        return None if row["unknown"] else sum(ord(char) % 2 for char in completion) >= self.least


EVALUATED = {
    "num_iterations": 1,
    "do_eval": True,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "per_device_eval_batch_size": 4,
}


def entries(trainer: Any) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "eval_solved" in entry]


@pytest.mark.parametrize("make", [None, tiny_sdar])
def test_it_is_what_evaluate_measures(make_trainer: Any, prompt_dataset: Any, make: Any) -> None:
    trainer = make_trainer(None if make is None else make(), eval_dataset=prompt_dataset(4), **EVALUATED, max_steps=1)
    trainer.check_exactly(Vowels(), steps=(4, 8))
    metrics = trainer.evaluate()
    model = trainer.accelerator.unwrap_model(trainer.model)
    decodings = {steps: DecodingConfig(canvas_length=8, steps=steps).for_model(trainer.spec) for steps in (4, 8)}
    decodings = {label: config.knowing(trainer.decoding.known_tokens) for label, config in decodings.items()}
    found = evaluate(
        model, trainer._tokenizer, Vowels(), decodings=decodings, split="validation", seed=trainer.args.seed
    ).measurements
    for label, measured in found.items():
        assert metrics[f"eval_solved_at_{label}"] == measured.solve_rate
        assert metrics[f"eval_tokens_per_forward_at_{label}"] == pytest.approx(measured.tokens_per_forward)
    assert metrics["eval_solved"] == pytest.approx(sum(m.solve_rate for m in found.values()) / 2)
    assert metrics["eval_unjudged"] == 1
    again = trainer.evaluate()  # all evaluations of a run decode with the same noise
    assert {name: again[name] for name in metrics if "solved" in name} == {
        name: value for name, value in metrics.items() if "solved" in name
    }


def test_the_best_checkpoint_is_chosen_by_it(make_trainer: Any, prompt_dataset: Any, monkeypatch: Any) -> None:
    trainer = make_trainer(
        eval_dataset={"one": prompt_dataset(4), "two": prompt_dataset(4)},
        **EVALUATED,
        max_steps=3,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="solved",
    )
    trainer.check_exactly(Vowels(), limit=3)
    weights, rates, check = [], iter([0.25, 0.75, 0.5]), trainer._check

    def scripted() -> dict[str, float]:
        weights.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
        return {**check(), "solved": next(rates)}

    monkeypatch.setattr(trainer, "_check", scripted)
    trainer.train()
    logged = entries(trainer)
    assert [entry["eval_solved"] for entry in logged] == [0.25, 0.75, 0.5]  # once each, though there are two sets
    assert all("eval_solved_at_4" in entry for entry in logged)  # the steps of training
    assert trainer.state.best_metric == 0.75
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-2"
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, weights[1][name])


def test_other_evaluations_are_left_alone(make_trainer: Any, prompt_dataset: Any) -> None:
    trainer = make_trainer(eval_dataset=prompt_dataset(4), **EVALUATED, max_steps=1)
    assert "eval_solved" not in trainer.evaluate()
    trainer.check_exactly(Vowels(), limit=2)
    assert "eval_solved" not in trainer.evaluate(prompt_dataset(4))
    assert "eval_solved" in trainer.evaluate()


def test_what_is_refused(make_trainer: Any, prompt_dataset: Any) -> None:
    with pytest.raises(ValueError, match="eval_strategy is 'no'"):
        make_trainer(max_steps=1).check_exactly(Vowels())
    trainer = make_trainer(eval_dataset=prompt_dataset(4), **EVALUATED, max_steps=1)
    for settings, said in (
        ({"limit": 0}, "limit=0 is not allowed"),
        ({"steps": ()}, "steps is empty"),
        ({"steps": (3.5,)}, "steps=3.5 is not allowed"),
        ({"split": "test"}, "has no split 'test'"),
    ):
        with pytest.raises(ValueError, match=said):
            trainer.check_exactly(Vowels(), **settings)


@pytest.mark.parametrize(("rank", "world"), [(0, 2), (1, 2), (2, 3)])
def test_processes_share_the_rows(
    make_trainer: Any, prompt_dataset: Any, monkeypatch: Any, rank: int, world: int
) -> None:
    """Each decodes its share with the draws that the rows have anyway; sums make the whole."""
    trainer = make_trainer(eval_dataset=prompt_dataset(4), **EVALUATED, max_steps=1)
    trainer.check_exactly(Vowels(), temperature=1.0)
    (config,) = trainer.exact_check.decodings.values()
    seen: list[torch.Tensor] = []
    accelerator = trainer.accelerator

    class Others:
        process_index, num_processes, device = rank, world, accelerator.device

        def reduce(self, values: torch.Tensor, reduction: str) -> torch.Tensor:
            seen.append(values)
            return values

        def __getattr__(self, name: str) -> Any:
            return getattr(accelerator, name)

    alone = trainer._check()
    verdicts = (
        evaluate(
            trainer.model,
            trainer._tokenizer,
            Vowels(),
            decodings={4: config},
            split="validation",
            seed=trainer.args.seed,
        )
        .measurements["4"]
        .verdicts
    )
    assert alone["solved"] == verdicts.count("1") / 6
    monkeypatch.setattr(trainer, "accelerator", Others())
    trainer._check()
    mine = verdicts[rank::world]
    assert seen[0][:2].tolist() == [mine.count("1"), len(mine.replace("-", ""))]
