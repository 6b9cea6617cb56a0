"""Several evaluation sets: each logs metrics under its own name."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def test_a12_each_evaluation_set_has_metrics_of_its_own(make_trainer: Any, prompt_dataset: Any) -> None:
    sets = {"easy": prompt_dataset(4), "hard": prompt_dataset(4).add_column("level", [2.0] * 4)}

    def rewards(completions: Any, level: Any = None, **columns: Any) -> list[float]:
        return [0.25] * len(completions) if level is None else list(level)

    trainer = make_trainer(
        rewards=rewards,
        num_iterations=1,
        max_steps=1,
        eval_dataset=sets,
        do_eval=True,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_hard_reward",
        greater_is_better=True,
        per_device_eval_batch_size=4,
    )
    trainer.train()
    logged: dict[str, float] = {}
    for entry in trainer.state.log_history:
        logged |= entry
    assert logged["eval_easy_reward"] == 0.25 and logged["eval_hard_reward"] == 2.0
    assert "eval_easy_diffusion/nfe" in logged and "eval_reward" not in logged
    assert trainer.state.best_metric == 2.0
    metrics = trainer.evaluate(sets["hard"])
    assert metrics["eval_reward"] == 2.0, "a single set keeps its names"
