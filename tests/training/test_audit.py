"""Audits in training: which rows, what is logged, what happens above the bound, and corrected losses."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rl4dlm.algorithms.bgpo import BGPOConfig
from rl4dlm.algorithms.diffu_grpo import DiffuGRPOConfig, DiffuGRPOTrainer
from rl4dlm.algorithms.espo import ESPOConfig
from rl4dlm.algorithms.justgrpo import JustGRPOConfig, JustGRPOTrainer
from rl4dlm.models.tiny import tiny_llada
from rl4dlm.rollout import engine as engine_module
from rl4dlm.rollout.audit import audit
from rl4dlm.rollout.noise import keyed_uniform
from rl4dlm.rollout.rollout import Rollout
from rl4dlm.training.auditing import FALLBACK, METRICS
from tests.training.steps import check_gradient, one_step, plain_log_probs

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

LOGGER = "rl4dlm.training.auditing"
CACHED = {"cache": "prefix", "block_length": 4, "num_iterations": 1}
"""Two blocks of two steps each, whose second steps are stale."""


def wide() -> Any:
    """A denoiser on whose predictions a token more or less makes a difference."""
    return tiny_llada(initializer_range=0.2)


class WatchedTrainer(DiffuGRPOTrainer):
    """diffu-GRPO that keeps how its rollouts were decoded, and what an audit of the same rows finds at that moment."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.caches: list[str] = []
        self.expected: list[tuple[list[int], dict[str, float]]] = []
        super().__init__(*args, **kwargs)

    def _decode(self, *args: Any, **kwargs: Any) -> Rollout:
        rollout = super()._decode(*args, **kwargs)
        self.caches.append(rollout.cache)
        return rollout

    def _audit(self, rollout: Rollout) -> None:
        super()._audit(rollout)
        share = 1 / 64 if self.args.audit_share is None else self.args.audit_share
        order = keyed_uniform(self.args.seed, "audit", torch.tensor(rollout.row_ids)).argsort()
        rows = sorted(order[: math.ceil(share * len(order))].tolist())
        self.expected.append((rows, audit(self.model, rollout, rows).summary() if rows else {}))


def audited(trainer: Any) -> list[dict[str, float]]:
    """What is logged of audits, step by step."""
    return [
        {name: entry[metric] for name, metric in METRICS.items() if metric in entry}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


@pytest.mark.parametrize(("share", "count"), [(None, 1), (0.3, 3), (1.0, 8)])
def test_a_share_of_inexact_rollouts_is_audited(make_trainer: Any, share: float | None, count: int) -> None:
    trainer = make_trainer(wide(), trainer=WatchedTrainer, audit_share=share, audit_bound=None, **CACHED)
    trainer.train()
    found = audited(trainer)
    assert len(found) == len(trainer.expected) == 2 and trainer.caches == ["prefix", "prefix"]
    for said, (rows, expected) in zip(found, trainer.expected, strict=True):
        assert len(rows) == count and said["delta"] > 1e-4 and said["effective_share"] < 1
        assert said.keys() == expected.keys()
        for name, value in expected.items():
            assert said[name] == pytest.approx(value, abs=2e-5), name
    assert FALLBACK not in trainer.state.stateful_callbacks


def test_exact_rollouts_are_audited_only_when_asked(make_trainer: Any, caplog: pytest.LogCaptureFixture) -> None:
    plain = make_trainer(wide(), trainer=WatchedTrainer, block_length=4, num_iterations=1)
    plain.train()
    assert audited(plain) == [{}, {}]
    asked = make_trainer(
        wide(), trainer=WatchedTrainer, block_length=4, num_iterations=1, audit_share=0.5, audit_bound=1e-12
    )
    with caplog.at_level(logging.INFO, logger=LOGGER):
        asked.train()
    for said in audited(asked):
        assert said["delta"] < 1e-5 and said["ratio"] == pytest.approx(1, abs=1e-4)
        assert said.get("agreement", 1.0) == 1.0
    assert not caplog.records  # rounding is no cause for alarm, and there is nothing to fall back to
    off = make_trainer(wide(), trainer=WatchedTrainer, audit_share=0.0, **CACHED)
    off.train()
    assert audited(off) == [{}, {}] and off.caches == ["prefix", "prefix"]


def test_auditing_changes_no_loss(make_trainer: Any, losses: Any) -> None:
    found = []
    for share in (0.0, 1.0):
        trainer = make_trainer(wide(), audit_share=share, audit_bound=None, **CACHED)
        trainer.train()
        found.append(losses(trainer))
    assert found[0] == found[1] and len(found[0]) == 2


@pytest.mark.parametrize("action", ["warn", "exact", "both"])
def test_above_the_bound_something_is_done(make_trainer: Any, caplog: pytest.LogCaptureFixture, action: str) -> None:
    trainer = make_trainer(wide(), trainer=WatchedTrainer, audit_bound=1e-6, audit_action=action, max_steps=3, **CACHED)
    with caplog.at_level(logging.INFO, logger=LOGGER):
        trainer.train()
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    said = " ".join(record.getMessage() for record in caplog.records)
    assert "rollouts with cache='prefix' were drawn from log-probabilities" in said
    assert "audit_bound=1e-06" in said and "mean importance weight" in said
    falls = action != "warn"
    assert trainer.caches == (["prefix", "none", "none"] if falls else ["prefix"] * 3)
    assert [bool(entry) for entry in audited(trainer)] == ([True, False, False] if falls else [True] * 3)
    assert ("decoded exactly" in said) == falls
    assert len(warnings) == 0 if action == "exact" else len(warnings) >= 1


def test_below_the_bound_nothing_is_done(make_trainer: Any, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(wide(), trainer=WatchedTrainer, audit_bound=50.0, audit_action="both", **CACHED)
    with caplog.at_level(logging.INFO, logger=LOGGER):
        trainer.train()
    assert trainer.caches == ["prefix", "prefix"] and not caplog.records


def test_a_run_that_has_fallen_back_goes_on_so(make_trainer: Any, losses: Any, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        **CACHED,
        "audit_bound": 1e-6,
        "audit_action": "exact",
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 4,
    }
    unbroken = make_trainer(wide(), trainer=WatchedTrainer, **settings)
    unbroken.train()
    assert unbroken.caches == ["prefix", "none", "none", "none"]
    resumed = make_trainer(wide(), trainer=WatchedTrainer, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert resumed.caches == ["none", "none"]
    assert losses(resumed) == losses(unbroken)


def test_what_cannot_be_audited_is_said_once(make_trainer: Any, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(wide(), schedule="saber", denoising_steps=None, audit_share=1.0, num_iterations=1)
    with caplog.at_level(logging.INFO, logger=LOGGER):
        trainer.train()
    assert audited(trainer) == [{}, {}]
    assert [r.getMessage().split(":")[0] for r in caplog.records] == ["rollouts are not audited"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"audit_share": 1.5}, "audit_share=1.5 is not allowed"),
        ({"audit_bound": 0.0}, "audit_bound=0.0 is not allowed"),
        ({"audit_action": "stop"}, "audit_action='stop' is not allowed"),
        ({"audit_action": "exact", "audit_share": 0.0}, "audit_action='exact' has no effect with audit_share=0.0"),
        ({"audit_action": "both", "audit_bound": None}, "has no effect with audit_share=None and audit_bound=None"),
        ({"rollout_correction": "truncated"}, "rollout_correction='truncated' is not allowed"),
        ({"rollout_correction_clip_max": 2.0}, "has no effect with rollout_correction='none'"),
        ({"rollout_correction": "token_truncate", "rollout_correction_clip_max": 0.0}, "clip_max=0.0 is not allowed"),
        (
            {"rollout_correction": "sequence_truncate", "loss_type": "vespo"},
            "'sequence_truncate' is not allowed with loss_type='vespo'",
        ),
    ],
)
def test_bad_settings_are_named(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiffuGRPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, **settings)


def test_weights_that_would_be_none_are_refused(make_trainer: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="DiffuGRPOTrainer scores tokens in other contexts than those they were drawn"):
        make_trainer(trainer=DiffuGRPOTrainer, rollout_correction="token_truncate")
    for config in (ESPOConfig, BGPOConfig):
        with pytest.raises(ValueError, match="rollout_correction='token_truncate' is not supported"):
            config(output_dir=str(tmp_path), bf16=False, use_cpu=True, rollout_correction="token_truncate")
    with pytest.raises(ValueError, match="cache='prefix' is not allowed"):
        JustGRPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, cache="prefix")


def weights(batch: dict[str, Any], scores: Tensor, kind: str, cap: float) -> Tensor:
    """min(C, p(y) / q(y)) by its definition; q is what was recorded."""
    width = scores.shape[1]
    ratios = (scores.detach() - batch["drawn_log_probs"][:, :width]).exp() * batch["completion_mask"]
    if kind == "token_truncate":
        return ratios.clamp(max=cap)
    rows = [math.prod(r for r in row if r) for row in ratios.tolist()]
    return torch.tensor(rows)[:, None].clamp(max=cap).to(scores)


@pytest.mark.parametrize("num_iterations", [1, 2])
@pytest.mark.parametrize(("kind", "cap"), [("token_truncate", 1.02), ("sequence_truncate", 1.02)])
def test_corrected_gradients_are_those_of_weighted_terms(
    make_trainer: Any, kind: str, cap: float, num_iterations: int
) -> None:
    settings: dict[str, Any] = {"rollout_correction": kind, "rollout_correction_clip_max": cap, "cache": "prefix"}
    trainer, gradients = one_step(
        lambda **values: make_trainer(wide(), **values),
        JustGRPOTrainer,
        max_completion_length=8,
        denoising_steps=None,
        num_iterations=num_iterations,
        **settings,
    )
    record = trainer.seen[0]
    assert ("old_per_token_logps" in record) == (num_iterations == 2)
    log_probs, views = plain_log_probs(trainer, record)
    scores = (log_probs * views.weight.to(log_probs.dtype)).sum(1)[:, : record["completion_mask"].shape[1]]
    weight = weights(record, scores, kind, cap)
    inside = weight[(weight > 0) & (weight < cap)]
    assert len(inside) and (inside - 1).abs().max() > 1e-3 and bool((weight >= cap - 1e-7).any())  # both sides of C
    mask = record["completion_mask"]
    objective = -(mask * weight * record["advantages"][:, None] * scores).sum() / mask.sum()
    check_gradient(trainer, objective, gradients)
    logged = trainer.state.log_history[0]["sampling/importance_sampling_ratio/mean"]
    expected = weight.mean() if kind == "sequence_truncate" else (weight * mask).sum() / mask.sum()
    assert logged == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("kind", ["token_truncate", "sequence_truncate"])
def test_the_mean_weight_is_of_the_rows_that_are_scored(make_trainer: Any, kind: str) -> None:
    """Completions below the baseline count for nothing here: they are not scored, and have no weight to speak of."""
    settings: dict[str, Any] = {
        "rollout_correction": kind, "rollout_correction_clip_max": 3.0, "cache": "prefix", "max_completion_length": 8,
        "denoising_steps": None, "negative_advantage_weight": 0.0,
    }  # fmt: skip
    watched, _ = one_step(lambda **values: make_trainer(wide(), **values), JustGRPOTrainer, **settings)
    record = watched.seen[0]  # a trainer with a loss of its own scores all rows
    scored = record["advantages"] != 0
    assert 0 < int(scored.sum()) < len(scored)
    log_probs, views = plain_log_probs(watched, record)
    scores = (log_probs * views.weight.to(log_probs.dtype)).sum(1)[:, : record["completion_mask"].shape[1]]
    weight, mask = weights(record, scores, kind, 3.0)[scored], record["completion_mask"][scored]
    expected = weight.mean() if kind == "sequence_truncate" else (weight * mask).sum() / mask.sum()
    trainer = make_trainer(wide(), trainer=JustGRPOTrainer, config=JustGRPOConfig, max_steps=1, **settings)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["diffusion/rows_scored_share"] == pytest.approx(scored.float().mean().item())
    assert logged["sampling/importance_sampling_ratio/mean"] == pytest.approx(expected.item(), abs=1e-5)


def test_without_a_cache_there_is_nothing_to_correct(make_trainer: Any, losses: Any) -> None:
    found = []
    for kind in ("none", "token_truncate"):
        trainer = make_trainer(
            wide(), trainer=JustGRPOTrainer, config=JustGRPOConfig, denoising_steps=None, rollout_correction=kind
        )
        trainer.train()
        found.append(losses(trainer))
    assert found[0] == pytest.approx(found[1], abs=1e-6) and len(found[0]) == 2


def test_sharded_processes_make_as_many_forwards(make_trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every forward is one of all processes, those with less to audit make idle ones."""
    trainer = make_trainer(wide(), trainer=WatchedTrainer, per_device_train_batch_size=8, max_steps=1, **CACHED)
    gathered: list[Tensor] = []
    asked: list[int | None] = []

    def gather(values: Tensor) -> Tensor:
        if not values.is_floating_point():
            gathered.append(values)
            return torch.cat([values, values + 2])  # another process has two more
        return values

    from rl4dlm.training import auditing

    original = auditing.audit

    def recorded(*args: Any, forwards: int | None = None, **kwargs: Any) -> Any:
        asked.append(forwards)
        return original(*args, forwards=forwards, **kwargs)

    rollout = engine_module.RolloutEngine(trainer.model).generate([[5, 6]] * 8, trainer.decoding)
    monkeypatch.setattr(auditing, "audit", recorded)
    monkeypatch.setattr(trainer.accelerator, "gather", gather)
    monkeypatch.setattr(trainer, "is_fsdp_enabled", True)
    DiffuGRPOTrainer._audit(trainer, rollout)
    assert len(gathered) == 1 and asked == [int(gathered[0]) + 2]
