"""How often a task is solved, measured while training: exact, at several numbers of steps, on rows apart from training.

Owns when that is done and what its metrics are called. It belongs to transformers' evaluation: `eval_strategy` says
when, and `metric_for_best_model: solved` with `load_best_model_at_end` chooses a checkpoint by it. Every process
decodes its share of the rows, with draws keyed by the row, so that any number of processes finds the same. Decoding is
the engine's, judging the task's.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import Trainer
from trl import GRPOTrainer

from rl4dlm.evaluation.measure import completion_texts
from rl4dlm.models.attention import BLOCK_KINDS
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.tasks.base import Task
from rl4dlm.training.contract import check_contract
from rl4dlm.training.decoder import DecoderTrainer

check_contract(
    Trainer,
    parameters={
        "evaluate": ["eval_dataset", "ignore_keys", "metric_key_prefix"],
        "evaluation_loop": ["dataloader", "description"],
    },
)
check_contract(GRPOTrainer, parameters={"_tokenize_prompts": ["prompts"]}, attributes=["_tokenizer"])


@dataclass(frozen=True)
class ExactCheck:
    """What is checked at each evaluation.

    Args:
        task: whose checker decides. rows: of one of its splits.
        decodings: label to settings: the number of steps, or the schedule's name.
    """

    task: Task
    rows: Sequence[Mapping[str, Any]]
    decodings: Mapping[str, DecodingConfig]


class CheckingTrainer(Trainer):
    """Adds solve rates to evaluations, once `exact_check` is set; how its model decodes, subclasses say."""

    exact_check: ExactCheck | None = None
    _check_due = False

    @abstractmethod
    def _checked_model(self) -> AbstractContextManager[Any]:
        """The model as it decodes; all processes enter it together."""

    @abstractmethod
    def _checked_ids(self, prompts: list[Any]) -> list[list[int]]:
        """Token ids of prompts."""

    @property
    def _in_step(self) -> Callable[[bool], bool] | None:
        """What keeps processes in step while they decode, see `RolloutEngine`; None: they need not be."""
        return None

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Transformers', with the exact check, once, where the trainer's own evaluation set is evaluated."""
        if eval_dataset is None:
            self._check_due = self.exact_check is not None
        metrics: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        return metrics

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Transformers'; what the check finds is among its metrics, so that callbacks see it, too."""
        output = super().evaluation_loop(*args, **kwargs)
        if self._check_due:
            self._check_due = False
            output.metrics.update({f"eval_{name}": value for name, value in self._check().items()})
        return output

    def _set_check(
        self, task: Task, split: str, limit: int | None, decodings: Mapping[str, DecodingConfig], spec: DiffusionSpec
    ) -> None:
        if self.args.eval_strategy == "no":
            raise ValueError("an exact check belongs to evaluations, and eval_strategy is 'no'; choose steps or epoch")
        if limit is not None and limit < 1:
            raise ValueError(f"limit={limit} is not allowed; it must be 1 or larger, or None")
        if not decodings:
            raise ValueError("steps is empty; name at least one number of steps, or None for the settings' own")
        for config in decodings.values():
            config.for_model(spec)
        rows = task.rows(split)[:limit]
        if not rows:
            raise ValueError(f"task {task.name!r} has no rows in split {split!r}")
        self.exact_check = ExactCheck(task, rows, decodings)

    def _check(self) -> dict[str, float]:
        assert self.exact_check is not None
        task, everyone = self.exact_check.task, self.exact_check.rows
        own = range(self.accelerator.process_index, len(everyone), self.accelerator.num_processes)
        rows = [everyone[i] for i in own]
        prompts = self._checked_ids([row["prompt"] for row in rows]) if rows else []
        size = getattr(self.args, "rollout_batch_size", None) or self.args.per_device_eval_batch_size
        found, rates = {}, []
        for label, config in self.exact_check.decodings.items():
            with self._checked_model() as model:
                engine = RolloutEngine(model, max_batch_rows=size, in_step=self._in_step)
                rollout = engine.generate(prompts, config, row_ids=list(own), seed=self.args.seed)
            verdicts = task.check_many(completion_texts(self._tokenizer, rollout, engine.spec), rows)
            judged = [verdict for verdict in verdicts if verdict is not None]
            counts = [sum(judged), len(judged), int(rollout.valid.sum()), int(rollout.nfe.sum())]
            sums = self.accelerator.reduce(
                torch.tensor(counts, dtype=torch.float64, device=self.accelerator.device), reduction="sum"
            )
            right, total, tokens, forwards = sums.tolist()
            if not total:
                raise ValueError(f"task {task.name!r} cannot judge any of its {len(everyone)} rows")
            rates.append(right / total)
            found[f"solved_at_{label}"] = rates[-1]
            found[f"tokens_per_forward_at_{label}"] = tokens / forwards
            found["unjudged"] = len(everyone) - total
        return {"solved": sum(rates) / len(rates), **found}


class ExactCheckTrainer(CheckingTrainer, DecoderTrainer):
    """The check of a policy, which decodes as its rollouts do."""

    def check_exactly(
        self,
        task: Task,
        *,
        split: str = "validation",
        steps: Sequence[int] | None = None,
        limit: int | None = None,
        temperature: float | None = None,
    ) -> None:
        """From now on each evaluation of the trainer's own evaluation set also measures how often a task is solved.

        Metrics: `eval_solved_at_N` and `eval_tokens_per_forward_at_N` for each number of steps N (or the schedule's
        name), `eval_solved`, the mean of the former, and `eval_unjudged`, rows that the checker could not judge.

        Args:
            task: whose prompts are decoded and whose checker is asked.
            split: of the task; not the one that results are reported on.
            steps: numbers of denoising steps; None: those of training.
            limit: the first so many rows at most; None: all.
            temperature: None: 0, or that of training where canvases of random tokens are refined.

        Raises:
            ValueError: evaluation is switched off, or a setting that is not allowed.
        """
        if temperature is None:
            temperature = 0.0 if self.spec.noise == "mask" else self.decoding.temperature
        grid = None if self.spec.attention in BLOCK_KINDS else self.decoding.block_length
        base = replace(self.decoding, block_length=grid, steps=None, temperature=temperature, record=())
        counts = [self.decoding.steps] if steps is None else steps
        self._set_check(task, split, limit, by_steps(base, counts), self.spec)

    def _checked_model(self) -> AbstractContextManager[Any]:
        return self._policy_that_decodes()

    def _checked_ids(self, prompts: list[Any]) -> list[list[int]]:
        ids: list[list[int]] = self._tokenize_prompts(prompts)[0]
        return ids

    @property
    def _in_step(self) -> Callable[[bool], bool] | None:
        return self._any_process if self._sharded else None


def by_steps(base: DecodingConfig, counts: Sequence[int | None]) -> dict[str, DecodingConfig]:
    """Settings with several numbers of steps, by that number; None, which leaves them to the schedule, by its name."""
    return {base.schedule if n is None else str(n): replace(base, steps=n) for n in counts}
