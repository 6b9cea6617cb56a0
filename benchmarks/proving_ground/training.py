"""One training: the trainer of a line, the rate that falls over its budget, and what it fed, took and logged.

Owns the controls, which are no algorithms of the library, the count of positions, and where a training stops.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback

import rl4dlm
from benchmarks.proving_ground.settings import EVERY_LINE, ORDER, RANDOM, TRAINED, Run
from benchmarks.proving_ground.unmasking import decides
from rl4dlm import BGPOTrainer, DiffusionSFTConfig, load_reward, load_task
from rl4dlm.rollout.noise import keyed_uniform
from rl4dlm.tasks import Task

TAUGHT_SEED = 1
"""Of the training rows that the models were made with; runs draw others, by `FIRST_SEED` and their own seed."""
FIRST_SEED = 2
WARMUP = 5
LOGGED = (
    "reward",
    "reward_std",
    "completions/mean_length",
    "diffusion/nfe",
    "diffusion/early_eos_share",
    "diffusion/identical_completion_groups",
    "diffusion/rows_scored_share",
    "diffusion/audit_delta",
    "diffusion/skipped_steps",
    "clip_ratio/region_mean",
    "grad_norm",
    "loss",
)
"""Metrics of which a result keeps the first and the last."""


class PositivesTrainer(BGPOTrainer):
    """Rejection sampling: masked SFT on the model's own completions that are right.

    At the policy that made the completions the gradient of BGPO is that of advantage times evidence lower bound; the
    advantage here is 1 for right completions and 0 for others.
    """

    advantages_read_scores = False

    def advantages(self, rewards: Tensor, batch: dict[str, Any]) -> Tensor:
        return (rewards == 1).to(rewards)


class RandomReward:
    """A reward that knows nothing: 0 or 1 with equal probability, keyed by a counter."""

    __name__ = "random_reward"

    def __init__(self, seed: int) -> None:
        self.seed, self.given = seed, 0

    def __call__(self, completions: list[Any], **columns: Any) -> list[float]:
        ids = torch.arange(self.given, self.given + len(completions))
        self.given += len(completions)
        values: list[float] = (keyed_uniform(self.seed, "random reward", ids) < 0.5).double().tolist()
        return values


class Positions:
    """What a model's trunk is fed, padding and second copies included: rows times columns of every forward.

    Forwards under gradients are counted apart: a backward pass follows, which costs about two more of them.
    """

    def __init__(self, model: Any) -> None:
        self.without_gradient = self.with_gradient = 0
        self.counts = True
        model.base_model.register_forward_pre_hook(self._note, with_kwargs=True)

    @property
    def total(self) -> int:
        return self.without_gradient + self.with_gradient

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.counts = False
        try:
            yield
        finally:
            self.counts = True

    def _note(self, _: Any, args: Any, kwargs: Any) -> None:
        if not self.counts:
            return
        given = [*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
        rows, columns = next(value for value in given if value is not None).shape[:2]
        if torch.is_grad_enabled():
            self.with_gradient += rows * columns
        else:
            self.without_gradient += rows * columns


@dataclass
class Budget(TrainerCallback):
    """Ends a training where its budget does, and measures on the way.

    Args:
        run: whose. used: share of the budget so far, from the number of optimizer steps.
        measure: of the model; its time and its positions are nobody's.
    """

    run: Run
    used: Callable[[int], float]
    positions: Positions
    measure: Callable[[Any], float]

    def __post_init__(self) -> None:
        self.places: list[float] = []
        self.values: list[float] = []
        self.wall = self.cpu = 0.0  # spent on measuring

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        used = self.used(state.global_step)
        if used >= (len(self.places) + 1) / self.run.scale.curve:
            wall, cpu = time.perf_counter(), time.process_time()
            with self.positions.paused():
                self.values.append(self.measure(model))
            self.places.append(round(used, 3))
            self.wall += time.perf_counter() - wall
            self.cpu += time.process_time() - cpu
        if used >= 1:
            control.should_training_stop = True


def train(run: Run, model: Any, tokenizer: Any, measure: Callable[[Any], float]) -> dict[str, Any]:
    """Trains the model in place, and says what that took.

    Args:
        measure: what points of the learning curve are.

    Raises:
        NonFiniteError: the run came to nothing.
        RuntimeError: it was stopped from outside.
    """
    scale, positions = run.scale, Positions(model)
    batch = scale.batches * scale.completions
    allowed = batch * positions_of_completion(run, tokenizer)
    by_positions = run.budget == "positions" or run.algorithm == "sft"

    passes = run.settings().get("num_iterations", 1)

    def used(step: int) -> float:
        return positions.total / allowed if by_positions else step / (scale.batches * passes)

    budget = Budget(run, used, positions, measure)
    parameters = [p for p in model.parameters() if p.requires_grad]
    rate = run.settings()["learning_rate"]

    def falling(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / WARMUP) * max(0.0, 1 - used(step))
        )

    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = {
            "output_dir": folder,
            "seed": run.seed,
            "max_steps": (100 if by_positions else 1) * scale.batches * passes,
            "per_device_train_batch_size": scale.completions,
            "logging_steps": max(scale.batches // 8, 1),
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "bf16": False,
            "activation_checkpointing": False,
        }
        given: dict[str, Any] = {"processing_class": tokenizer, "callbacks": [budget]}
        build = sft_trainer if run.algorithm == "sft" else policy_trainer
        if run.settings().get("value_model", "none") == "none" and run.algorithm not in ORDER and not decides(run):
            optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
            given["optimizers"] = (optimizer, falling(optimizer))
            trainer = build(run, model, tokenizer, common, given)
        else:  # the trainer's own optimizer, the same but for the head, or policy, that only it knows
            common |= {"optim": "adamw_torch", "adam_beta2": 0.99, "weight_decay": 0.0}
            trainer = build(run, model, tokenizer, common, given)
            trainer.lr_scheduler = falling(trainer.create_optimizer())
        wall, cpu = time.perf_counter(), time.process_time()
        trainer.train()
        wall, cpu = time.perf_counter() - wall - budget.wall, time.process_time() - cpu - budget.cpu
    if used(trainer.state.global_step) < 1:  # a signal asks trainers to save and end
        raise RuntimeError(f"training was stopped after {trainer.state.global_step} steps, before its budget was used")
    return {
        "steps": trainer.state.global_step,
        "completions": 0 if run.algorithm == "sft" else trainer.state.global_step * scale.completions // passes,
        "positions": {"without_gradient": positions.without_gradient, "with_gradient": positions.with_gradient},
        "positions_allowed": round(allowed) if by_positions else None,
        "seconds": round(wall, 1),
        "cpu_seconds": round(cpu, 1),
        "learning_curve": {"used": budget.places, "solved": budget.values},
        "logged": logged(trainer.state.log_history),
    }


def positions_of_completion(run: Run, tokenizer: Any) -> float:
    """What the budget `positions` allows a completion: its rollout in full, and some views."""
    prompts = [len(tokenizer(row["prompt"]).input_ids) for row in task_of(run, size=256).rows("train")]
    columns = sum(prompts) / len(prompts) + run.ground.canvas
    return columns * (run.ground.canvas // TRAINED + run.scale.views)


def task_of(run: Run, *, size: int | None = None) -> Task:
    """The rows that a run trains on: those of its seed."""
    task: Task = load_task(run.task, **run.ground.arguments, seed=FIRST_SEED + run.seed, size=size)
    return task


def policy_trainer(run: Run, model: Any, tokenizer: Any, common: dict[str, Any], given: dict[str, Any]) -> Any:
    """The trainer of an algorithm, with its rewards."""
    name = EVERY_LINE[run.algorithm].trainer
    trainer = PositivesTrainer if name == "PositivesTrainer" else getattr(rl4dlm, name)
    functions = [RandomReward(run.seed) if name == RANDOM else load_reward(name) for name in run.rewards]
    args = trainer.config_class(**common, **run.settings())
    prompts = args.per_device_train_batch_size // args.num_generations * run.scale.batches
    rows = task_of(run, size=max(min(prompts, 20_000), 64)).dataset("train")
    return trainer(model, reward_funcs=functions, args=args, train_dataset=rows, **given)


def sft_trainer(run: Run, model: Any, tokenizer: Any, common: dict[str, Any], given: dict[str, Any]) -> Any:
    """Masked SFT on worked answers, each padded with end tokens to the canvas, as the models were taught."""
    end = [tokenizer.eos_token_id] if run.ground.ends else []
    examples = []
    passes = run.ground.canvas // TRAINED + run.scale.views  # so many canvases are allowed for each completion
    size = min(run.scale.batches * run.scale.completions * passes, 20_000)
    for row in task_of(run, size=size).rows("train"):
        prompt, answer = tokenizer(row["prompt"]).input_ids, tokenizer(row["solution"]).input_ids + end
        examples.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    args = DiffusionSFTConfig(
        **common,
        **run.settings(),
        max_length=None,
        max_completion_length=run.ground.canvas,
        eos_padding="canvas",
        noise_floor=0.03,
    )
    return rl4dlm.DiffusionSFTTrainer(model, args=args, train_dataset=Dataset.from_list(examples), **given)


def logged(history: list[dict[str, Any]]) -> dict[str, list[float]]:
    """The first and the last value of metrics, and all of the reward."""
    found: dict[str, list[float]] = {}
    for name in LOGGED:
        values = [round(float(entry[name]), 4) for entry in history if name in entry]
        if values:
            found[name] = values if name == "reward" and len(values) <= 20 else [values[0], values[-1]]
    return found
