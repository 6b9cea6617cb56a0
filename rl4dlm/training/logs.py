"""What a trainer of RL logs: metrics, tables of completions, replays, and what trackers are told of the run.

Owns when a table is written and how it is printed. TRL's private names are used here, and checked when the file is
imported.
"""

from __future__ import annotations

from typing import Any

import trl.trainer.grpo_trainer as grpo
from trl import GRPOTrainer
from trl.trainer.utils import print_prompt_completions_sample

from rl4dlm.likelihood.estimator import Estimator
from rl4dlm.tracking.printable import printable_entries
from rl4dlm.tracking.training import TrainingReplays
from rl4dlm.training.checkpoints import ResumableGRPOTrainer
from rl4dlm.training.contract import check_contract
from rl4dlm.training.setup import swapped

check_contract(
    GRPOTrainer,
    parameters={"log": ["logs", "start_time"]},
    attributes=["_logs", "_metrics", "log_completions"],
    module=grpo,
    names=["print_prompt_completions_sample"],
)


class LoggingTrainer(ResumableGRPOTrainer):
    """Logs as TRL does, with replays, and with evaluation sets of their own names."""

    estimator: Estimator
    _replays: TrainingReplays
    _eval_rows: int
    _eval_prefix = "eval"
    _table_is_new = False

    def tracked_facts(self) -> dict[str, Any]:
        """Those of every trainer, and the estimator and the rewards."""
        rewards = dict(zip(self.reward_func_names, self.reward_weights.tolist(), strict=True))
        return {**super().tracked_facts(), "estimator": type(self.estimator).__name__, "rewards": rewards}

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Transformers' evaluation loop; numbers its rows from zero."""
        self._eval_rows = 0
        return super().evaluation_loop(*args, **kwargs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Transformers', where each of several evaluation sets logs metrics of its own, e.g. `eval_easy_reward`."""
        with swapped(self, "_eval_prefix", metric_key_prefix):
            metrics: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's, which also writes the table of completions; the replays that it links to are written before.

        A batch has one table, with the first of the steps that it is trained on.
        What a model wrote is printed with its control characters escaped, and a full disk does not end training.
        """
        if not self.model.training and self._eval_prefix.startswith("eval_"):  # TRL prefixes "eval_" whatever the set
            of_set, collected = self._eval_prefix.removeprefix("eval_"), self._metrics["eval"]
            for name in list(collected):
                collected[f"{of_set}_{name}"] = collected.pop(name)
        self._replays.write()
        shown, self._table_is_new = self.log_completions and self._table_is_new, False
        printing = swapped(grpo, "print_prompt_completions_sample", _print_table)
        with self._replays.going_on(), printing, swapped(self, "log_completions", shown):
            super().log(logs, start_time)
        self._metrics["train" if self.model.training else "eval"].clear()  # also where the table was not written
        if self.accelerator.is_main_process:
            self._replays.prune()


def _print_table(prompts: Any, completions: Any, rewards: Any, advantages: Any, *args: Any, **kwargs: Any) -> None:
    extra = printable_entries(kwargs.pop("extra", None))
    shown = (printable_entries(value) for value in (prompts, completions, rewards))
    print_prompt_completions_sample(*shown, advantages, *args, extra=extra, **kwargs)
