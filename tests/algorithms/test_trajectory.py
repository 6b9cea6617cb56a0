"""Trainers of recorded steps: what their losses are made of, what the record is, and which settings go together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rl4dlm
from rl4dlm import (
    AGRPOConfig,
    AGRPOTrainer,
    CJGRPOConfig,
    CJGRPOTrainer,
    D2Config,
    D2Trainer,
    DiPOConfig,
    DiPOTrainer,
    EGSPOConfig,
    EGSPOTrainer,
    Inpainting,
    TraceRLConfig,
    TraceRLTrainer,
)
from rl4dlm.likelihood.step_selectors import BlockSlices
from rl4dlm.likelihood.steps import Steps
from rl4dlm.models.attention import BLOCK_KINDS
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.models.tiny import tiny_diffusion_gemma, tiny_sdar
from rl4dlm.rollout.rollout import Rollout, valid_mask
from rl4dlm.training.advantages import z_scores
from rl4dlm.training.trainer import rows_of
from rl4dlm.training.trajectory import THRESHOLD
from tests.algorithms.test_igpo import Verifier, data
from tests.training.conftest import reward
from tests.training.steps import (
    adapter_step,
    check_first_iteration,
    check_gradient,
    one_step,
    plain_log_probs,
    recording,
    tiny_llada_that_ends,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

THRESHOLDS = {"schedule": "threshold", "denoising_steps": None, "schedule_args": {"threshold": 0.05}}


def objective(trainer: Any, record: dict[str, Any], kind: str) -> Tensor:
    """The average of -A s by its name, from the model's plain logits and a loop over rows and views."""
    log_probs, views = plain_log_probs(trainer, record)
    size, total = record["completion_mask"].sum(), log_probs.new_zeros(())
    for row in range(len(log_probs)):
        terms, means = [], []
        for k in range(log_probs.shape[1]):
            weight = views.weight[row, k].to(log_probs)
            if (weight != 0).any():
                each = -record["advantages"][row] * (weight * log_probs[row, k])[weight != 0]
                terms.append(each.sum())
                means.append(each.mean())
        tokens = int(record["canvas_valid"][row].sum())
        count = len(set(record["commit_step"][row][record["canvas_valid"][row]].tolist()))
        of_row = {
            "tokens": sum(terms) * len(log_probs) / size,
            "rows": sum(terms) / tokens,
            "row_sums": sum(terms),
            "canvas": sum(terms) / trainer.args.max_completion_length,
            "steps": sum(means) / count,
            "step_sums": sum(means),
        }
        total = total + of_row[kind] / len(log_probs)
    return total


@pytest.mark.parametrize(
    ("trainer", "kind", "settings"),
    [
        (CJGRPOTrainer, "steps", {}),
        (CJGRPOTrainer, "steps", {"ratio_unit": "step", "kl_unit": "step"}),
        (CJGRPOTrainer, "rows", {"aggregation": "rows", "ratio_unit": "sequence", "ratio_norm": "mean"}),
        (TraceRLTrainer, "canvas", {}),
        (TraceRLTrainer, "step_sums", {"aggregation": "step_sums", "ratio_unit": "step", "ratio_norm": "mean"}),
        (AGRPOTrainer, "row_sums", {"num_scored_steps": 2}),
        (AGRPOTrainer, "steps", {"num_scored_steps": 3, "step_proposal": "entropy", "aggregation": "steps"}),
        (AGRPOTrainer, "tokens", {"num_scored_steps": 2, "aggregation": "tokens", "clip": "unconditional"}),
        (DiPOTrainer, "tokens", {"clip": "log"}),
    ],
)
def test_the_first_gradient_is_that_of_the_plain_logits(
    make_trainer: Any, trainer: type, kind: str, settings: dict[str, Any]
) -> None:
    """Whatever the unit and the clip of a ratio: at 1 they do not matter."""
    made, gradients = one_step(make_trainer, trainer, model=tiny_llada_that_ends(), **THRESHOLDS, **settings)
    record = made.seen[0]
    assert len(record["commit_step"].amax(-1).unique()) > 1, "rows have different numbers of steps"
    check_gradient(made, objective(made, record, kind), gradients)


def test_an_adapter_learns_and_all_policies_score_alike_at_first(make_trainer: Any) -> None:
    check_first_iteration(adapter_step(make_trainer, CJGRPOTrainer, model=tiny_llada_that_ends()))


def test_merged_into_one_d2_is_the_mean_field(make_trainer: Any) -> None:
    """The gradients of d1 without prompt masking, on the same completions."""
    common = {"model": tiny_llada_that_ends(), "beta": 0.0, "scale_rewards": "none", "temperature": 1.0}
    field, expected = one_step(make_trainer, rl4dlm.DiffuGRPOTrainer, p_mask_prompt=0.0, **common)
    common["model"] = tiny_llada_that_ends()
    made, found = one_step(make_trainer, D2Trainer, num_scored_steps=1, aggregation="tokens", **common)
    assert torch.equal(made.seen[0]["canvas_ids"].sort(0).values, field.seen[0]["canvas_ids"].sort(0).values)
    # What was drawn behind the end is hidden in both: it is in no state before the first step.
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["low_confidence", "threshold"])
def test_recorded_log_probabilities_stand_for_rescored_ones(make_trainer: Any, losses: Any, name: str) -> None:
    settings: dict[str, Any] = {"beta": 0.0, "max_steps": 4, **(THRESHOLDS if name == "threshold" else {})}
    found = []
    for old in ("rescored", "recorded"):
        trainer = make_trainer(
            model=tiny_llada_that_ends(), trainer=CJGRPOTrainer, config=CJGRPOConfig, old_policy=old, **settings
        )
        trainer.train()
        found.append(losses(trainer))
        assert trainer.state.log_history[0]["diffusion/rollout_gap"] < 1e-6
        if old == "recorded":
            assert all("old_per_token_logps" not in batch for batch in trainer._buffered_inputs)
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert max(map(abs, found[0])) > 1e-3


@pytest.mark.parametrize("unit", ["sequence", "step"])
def test_a_group_without_advantages_has_ratios_of_one_to_the_record_too(make_trainer: Any, unit: str) -> None:
    """Its rows are not scored, and what was recorded of them must not be compared with zeros."""

    def half(completions: list[str], **columns: Any) -> list[float]:
        return [0.5] * 4 + [sum(map(ord, text)) % 7 / 7 for text in completions[4:]]

    class Scored(CJGRPOTrainer):
        def rows_that_count(self, batch: dict[str, Any]) -> None:
            return None

    changes = {
        "ratio_unit": unit,
        "aggregation": "row_sums",
        "old_policy": "recorded",
        "num_iterations": 1,
        "beta": 0.0,
        "clip": "unconditional",  # whose ends are reached by completions without an advantage, too
    }
    logs = []
    for trainer in (CJGRPOTrainer, Scored):
        made = make_trainer(
            tiny_llada_that_ends().double(), trainer=trainer, config=CJGRPOConfig, rewards=half, **changes,
            max_completion_length=32, denoising_steps=2 if unit == "step" else 8, stop_at_eos=False, scope="canvas",
        )  # fmt: skip
        made.train()
        logs.append(made.state.log_history[0])
    for name in ("loss", "grad_norm", "diffusion/skipped_steps", "clip_ratio/high_mean"):
        assert logs[0][name] == pytest.approx(logs[1][name], abs=1e-9)
    assert logs[0]["diffusion/rows_scored_share"] < 1 and logs[0]["diffusion/skipped_steps"] == 0


def test_without_an_old_policy_every_pass_is_the_plain_gradient(make_trainer: Any) -> None:
    trainer = make_trainer(
        model=tiny_llada_that_ends(),
        trainer=CJGRPOTrainer,
        config=CJGRPOConfig,
        old_policy="none",
        beta=0.0,
        max_steps=2,
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["clip_ratio/region_mean"] for entry in logs] == [0.0, 0.0]
    assert all(entry["grad_norm"] > 1e-3 for entry in logs)


def test_models_that_denoise_by_block_are_scored_in_slices(make_trainer: Any) -> None:
    settings: dict[str, Any] = {"schedule_args": {"threshold": 0.011}, "denoising_steps": None, "num_iterations": 1}
    trainer, _ = one_step(make_trainer, DiPOTrainer, model=tiny_sdar(), **settings)
    assert trainer.spec.attention in BLOCK_KINDS and isinstance(trainer.estimator.selector, BlockSlices)
    record, log = trainer.seen[0], trainer.state.log_history[0]
    assert log["diffusion/rollout_gap"] < 1e-5
    views = trainer.estimator.draw(rows_of(record), seed=0, iteration=0)
    assert views.hidden.shape[1] <= trainer.spec.block_length < int(record["commit_step"].max()) + 1


def test_the_threshold_is_of_earlier_batches_and_in_the_checkpoint(make_trainer: Any) -> None:
    trainer = make_trainer(
        model=tiny_llada_that_ends(), trainer=CJGRPOTrainer, config=CJGRPOConfig, steps="entropy_threshold",
        num_scored_steps=1, beta=0.0, max_steps=3, num_iterations=1, learning_rate=1e-4, denoising_steps=8,
    )  # fmt: skip
    trainer.train()
    scored = [entry["diffusion/scored_token_share"] for entry in trainer.state.log_history if "loss" in entry]
    assert scored[0] == 1.0 and max(scored[1:]) < 1
    assert trainer.state.stateful_callbacks[THRESHOLD]["attributes"]["entropy"] > 0


def test_completions_that_are_left_out_have_no_say_in_the_threshold(make_trainer: Any) -> None:
    """K steps are kept of those that are learnt from, which here are one or two of eight."""
    trainer = make_trainer(
        model=tiny_llada_that_ends(), trainer=recording(CJGRPOTrainer), config=CJGRPOConfig, steps="entropy_threshold",
        num_scored_steps=1, beta=0.0, max_steps=1, num_iterations=1, denoising_steps=4, max_completion_length=4,
        mask_truncated_completions=True,
    )  # fmt: skip
    trainer.train()
    record = trainer.seen[0]
    kept = record["completion_mask"].any(-1)
    assert 0 < int(kept.sum()) < 8
    entropies = [
        float(record["commit_entropy"][row][record["commit_step"][row] == step].mean())
        for row in kept.nonzero().flatten().tolist()
        for step in set(record["commit_step"][row][record["canvas_valid"][row]].tolist())
    ]
    expected = sorted(entropies, reverse=True)[min(int(kept.sum()), len(entropies)) - 1]
    assert trainer.state.stateful_callbacks[THRESHOLD]["attributes"]["entropy"] == pytest.approx(expected, abs=1e-6)


class Stepwise(CJGRPOTrainer):
    """An algorithm whose steps have advantages of their own: how many tokens were open before each, centred."""

    def step_rewards(self, rollout: Rollout, steps: Steps) -> Tensor:
        step = rollout.trace.commit_step
        return (step[:, None] >= steps.first[..., None]).sum(-1).double()

    def step_advantages(self, rewards: Tensor, step_rewards: Tensor | None, batch: dict[str, Any]) -> Tensor:
        assert step_rewards is not None and step_rewards.shape[:2] == rewards.shape
        return step_rewards - step_rewards.nanmean(1, keepdim=True) + rewards[..., None]


def test_steps_have_the_advantages_that_an_algorithm_gives_them(make_trainer: Any) -> None:
    made, gradients = one_step(make_trainer, Stepwise, model=tiny_llada_that_ends(), beta=0.0, **THRESHOLDS)
    record = made.seen[0]
    assert record["step_advantages"].shape[0] == 8 and record["step_advantages"].unique().numel() > 4
    log_probs, views = plain_log_probs(made, record)
    total = log_probs.new_zeros(())
    for row in range(8):
        steps = [k for k in range(views.weight.shape[1]) if views.scored[row, k].any()]
        each = [-record["step_advantages"][row, k] * log_probs[row, k][views.scored[row, k]].mean() for k in steps]
        total = total + sum(each) / len(steps) / 8
    check_gradient(made, total.float(), gradients)


class KeepingEGSPO(EGSPOTrainer):
    """Keeps its last rollout."""

    def rollout(self, prompts: list[Any]) -> Rollout:
        self.kept = super().rollout(prompts)
        return self.kept


@pytest.mark.parametrize("baseline", ["return", "reward"])
def test_egspo_sa_compares_with_what_the_state_before_a_step_would_have_become(
    make_trainer: Any, baseline: str
) -> None:
    """Advantages of the steps of largest entropy, from the rewards of the texts; and the first gradient."""
    made, gradients = one_step(
        make_trainer, KeepingEGSPO, model=tiny_llada_that_ends(), rewards=reward, num_scored_steps=2, step_lambda=0.5,
        step_baseline=baseline, denoising_steps=8, num_iterations=1, num_generations=4,
    )  # fmt: skip
    record, rollout = made.seen[0], made.kept
    decode = made.processing_class.decode

    def rewarded(canvas: Tensor) -> float:
        valid = valid_mask(canvas[None], made.spec.eos_token_ids)[0]
        return reward([decode(canvas[valid], skip_special_tokens=True)])[0]

    order = sorted(range(8), key=lambda row: rollout.row_ids[row])
    found = torch.full((8, 2), torch.nan, dtype=torch.float64)
    own = torch.tensor([rewarded(rollout.canvas[row]) for row in order], dtype=torch.float64)
    for place, row in enumerate(order):
        valid, step, entropy = rollout.valid[row], rollout.trace.commit_step[row], rollout.trace.entropy[row]
        steps = sorted(set(step[valid].tolist()), key=lambda s: (-float(entropy[step == s].mean()), s))[:2]
        for k, s in enumerate(sorted(steps)):
            found[place, k] = rewarded(rollout.completion_at(s)[row])
    gain = 0.5 * (own[:, None] - found)
    returns = (own[:, None] + gain if baseline == "return" else gain).view(2, 4, 2)
    centre = returns if baseline == "return" else own.view(2, 4, 1).expand(2, 4, 2)
    centre = torch.where(returns.isnan(), torch.nan, centre) if baseline == "return" else centre
    shift = (0 if baseline == "return" else own.view(2, 4, 1)) - centre.nanmean(1, keepdim=True)
    expected = ((returns + shift) / 1.5).view(8, 2).nan_to_num()
    places = [rollout.row_ids.index(i) for i in record["row_ids"].tolist()]
    index = torch.tensor([order.index(p) for p in places])
    torch.testing.assert_close(record["step_advantages"].double(), expected[index], rtol=0, atol=1e-6)
    log_probs, views = plain_log_probs(made, record)
    total = log_probs.new_zeros(())
    for row in range(8):
        steps = [k for k in range(views.weight.shape[1]) if views.scored[row, k].any()]
        each = [-record["step_advantages"][row, k] * log_probs[row, k][views.scored[row, k]].mean() for k in steps]
        total = total + sum(each) / len(steps) / 8
    check_gradient(made, total.float(), gradients)


def test_egspo_with_all_steps_and_token_ratios_is_cj_grpo(make_trainer: Any, losses: Any) -> None:
    found = []
    for trainer, config, settings in (
        (EGSPOTrainer, EGSPOConfig, {"num_scored_steps": 99, "ratio_unit": "token", "kl_unit": "token"}),
        (CJGRPOTrainer, CJGRPOConfig, {"epsilon": 0.2, "epsilon_high": 0.5, "temperature": 0.9}),
    ):
        made = make_trainer(
            model=tiny_llada_that_ends(), trainer=trainer, config=config, max_steps=3, denoising_steps=8, **settings
        )
        made.train()
        found.append(losses(made))
    assert found[0] == pytest.approx(found[1], abs=1e-6) and max(map(abs, found[0])) > 1e-3


def test_z_scores_are_of_the_population() -> None:
    found = z_scores(torch.tensor([[0.0, 1.0, 1.0, 0.0], [0.3, 0.3, 0.3, 0.3], [1.0, torch.nan, 0.0, 0.5]]))
    assert found[0].tolist() == [-1, 1, 1, -1] and found[1].tolist() == [0, 0, 0, 0]
    assert found[2].nansum() == pytest.approx(0, abs=1e-6) and bool(found[2, 1].isnan())


# --- the record in the batch ------------------------------------------------------------------------------------------


class Keeping(CJGRPOTrainer):
    """Keeps its last rollout."""

    def rollout(self, prompts: list[Any]) -> Rollout:
        self.kept = super().rollout(prompts)
        return self.kept


def test_the_record_follows_its_rows_through_the_batch(make_trainer: Any) -> None:
    trainer = make_trainer(
        model=tiny_llada_that_ends(), trainer=Keeping, config=CJGRPOConfig, max_steps=1, beta=0.0, num_iterations=2,
        per_device_train_batch_size=4, gradient_accumulation_steps=2,
    )  # fmt: skip
    trainer.train()
    trace = trainer.kept.trace
    recorded = {
        "commit_step": trace.commit_step, "raw_log_probs": trace.raw_log_prob, "sampled_log_probs": trace.log_prob,
        "commit_confidence": trace.confidence, "commit_entropy": trace.entropy, "block_stop": trace.block_stop,
    }  # fmt: skip
    moved = False
    for batch in trainer._buffered_inputs:
        places = [trainer.kept.row_ids.index(i) for i in batch["row_ids"].tolist()]
        moved |= places != sorted(places)
        for name, values in recorded.items():
            assert torch.equal(batch[name], values[places]), name
        assert "events" not in batch
    assert moved


def test_events_are_in_the_batch_where_tokens_can_be_taken_back(make_trainer: Any) -> None:
    class Watching(rl4dlm.DiffuGRPOTrainer):
        def rollout(self, prompts: list[Any]) -> Rollout:
            self.kept = super().rollout(prompts)
            return self.kept

    trainer = make_trainer(
        trainer=Watching, config=rl4dlm.DiffuGRPOConfig, schedule="rcr", max_steps=1, beta=0.0, num_iterations=2
    )
    trainer.train()
    (batch,) = trainer._buffered_inputs
    events = trainer.kept.trace.events
    assert events is not None and (events.kind == 1).any()
    for row, row_id in enumerate(batch["row_ids"].tolist()):
        mine = events.row == trainer.kept.row_ids.index(row_id)
        expected = torch.stack([events.step, events.kind, events.position, events.token], dim=-1)[mine]
        assert torch.equal(batch["events"][row, : len(expected)], expected)
        assert (batch["events"][row, len(expected) :] == -1).all()
        assert torch.equal(batch["event_log_probs"][row, : len(expected), 0], events.raw_log_prob[mine])


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "settings", "said"),
    [
        (CJGRPOConfig, {"steps": "some"}, "steps='some' is not allowed; choose one of all, "),
        (CJGRPOConfig, {"steps": "segments"}, "num_scored_steps=None is not allowed with steps='segments'"),
        (CJGRPOConfig, {"num_scored_steps": 3}, "num_scored_steps=3 is not allowed with steps='all'; allowed: None"),
        (AGRPOConfig, {"num_scored_steps": 0}, "num_scored_steps=0"),
        (AGRPOConfig, {"merge": 2}, "merge=2 is not allowed with steps='sampled'; allowed: 1"),
        (CJGRPOConfig, {"step_scale": "mean"}, "step_scale='mean' has no effect with steps='all'"),
        (CJGRPOConfig, {"ratio_unit": "word"}, "ratio_unit='word'"),
        (CJGRPOConfig, {"ratio_unit": "sequence"}, "ratio_unit='sequence' is not allowed with aggregation='steps'"),
        (AGRPOConfig, {"ratio_unit": "sequence"}, "ratio_unit='sequence' is not allowed with steps='sampled'"),
        (CJGRPOConfig, {"ratio_norm": "mean"}, "ratio_norm='mean' has no effect with ratio_unit='token'"),
        (CJGRPOConfig, {"kl_unit": "step", "beta": 0.0}, "kl_unit='step' is not allowed with beta=0.0"),
        (CJGRPOConfig, {"loss_type": "grpo"}, "loss_type='grpo' is not supported: aggregation says"),
        (CJGRPOConfig, {"clip": "soft"}, "clip='soft' is not allowed; choose one of ppo, log, unconditional, none"),
        (CJGRPOConfig, {"aggregation": "mean"}, "aggregation='mean' is not allowed"),
        (
            CJGRPOConfig,
            {"old_policy": "none", "epsilon": 0.3},
            "epsilon=0.3 is not supported: ratios are 1 with old_pol",
        ),
        (CJGRPOConfig, {"old_policy": "recorded", "merge": 2}, "old_policy='recorded' is not allowed with merge=2"),
        (D2Config, {"old_policy": "recorded"}, "old_policy='recorded' is not allowed with steps='segments'"),
        (CJGRPOConfig, {"old_policy": "recorded", "score_temperature": 0.5}, "score_temperature=0.5 and temperature=1"),
        (
            CJGRPOConfig,
            {"old_policy": "recorded", "score_temperature": 0.5, "temperature": 0.5, "top_k": 5},
            "score_temperature=0.5, cfg_scale=0.0 and top_k=5",
        ),
        (
            CJGRPOConfig,
            {"old_policy": "recorded", "cfg_scale": 1.0, "top_k": 5, "eos_penalty": 2.0},
            "cfg_scale=1.0 and eos_penalty=2.0: what",
        ),
        (CJGRPOConfig, {"steps": "flagged"}, "steps='flagged' is not allowed with schedule='low_confidence'"),
        (AGRPOConfig, {"steps": "all", "num_scored_steps": None}, "steps='all' is not allowed; AGRPO draws them"),
        (D2Config, {"steps": "all", "num_scored_steps": None}, "steps='all' is not allowed; d2 cuts them"),
        (
            EGSPOConfig,
            {"steps": "all", "num_scored_steps": None},
            "steps='all' is not allowed; choose one of top_entropy",
        ),
        (EGSPOConfig, {"step_lambda": -1.0}, "step_lambda=-1.0 is not allowed"),
        (EGSPOConfig, {"step_baseline": "reward"}, "step_baseline='reward' has no effect with step_lambda=0"),
        (EGSPOConfig, {"step_lambda": 0.5, "scale_rewards": "group"}, "scale_rewards='group' is not allowed with step"),
        (TraceRLConfig, {"scale_rewards": "none"}, "scale_rewards='none' is not allowed"),
        (DiPOConfig, {"scale_rewards": "batch"}, "scale_rewards='batch' is not allowed"),
    ],
)
def test_settings_that_do_not_fit_are_refused(config: type, settings: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        config(output_dir=str(tmp_path), bf16=False, use_cpu=True, **settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"schedule": "s2d2"}, "schedule='s2d2' is not allowed: it draws tokens from left to right"),
        ({"schedule": "rcr"}, "schedule='rcr' is not allowed: it takes tokens back.*CJGRPOTrainer scores steps that"),
        ({"cache": "dual"}, "cache='dual' is not allowed with old_policy='rescored'.*set cache to auto, or old_policy"),
        ({"steps": "block_slices"}, "steps='block_slices' is not allowed for a model with attention='full'"),
        ({"views_keyed_by": "prompt", "steps": "all"}, "views_keyed_by='prompt' is not supported"),
    ],
)
def test_rollouts_whose_record_does_not_say_what_was_drawn_are_refused(
    make_trainer: Any, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        make_trainer(trainer=CJGRPOTrainer, config=CJGRPOConfig, **settings)


def test_advantages_of_steps_are_refused_where_views_hold_several(make_trainer: Any) -> None:
    with pytest.raises(ValueError, match=r"steps='all' is not supported by Stepwise for models with attention='block_"):
        make_trainer(model=tiny_sdar(), trainer=Stepwise, config=CJGRPOConfig)


def test_random_tokens_are_refused(make_trainer: Any) -> None:
    with pytest.raises(ValueError, match="is not offered for models with noise='uniform'"):
        make_trainer(
            model=tiny_diffusion_gemma(), trainer=CJGRPOTrainer, config=CJGRPOConfig,
            schedule="entropy_bound_canvas", denoising_steps=None, beta=0.0,
        )  # fmt: skip


def test_an_inexact_cache_goes_with_what_was_recorded(make_trainer: Any) -> None:
    trainer = make_trainer(
        model=tiny_llada_that_ends(), trainer=CJGRPOTrainer, config=CJGRPOConfig, cache="dual", old_policy="recorded",
        beta=0.0, block_length=4, max_steps=1,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] > 0


def test_published_defaults(tmp_path: Path) -> None:
    common = {"output_dir": str(tmp_path), "bf16": False, "use_cpu": True}
    cj = CJGRPOConfig(**common)
    assert (cj.epsilon, cj.beta, cj.num_iterations, cj.num_generations, cj.scale_rewards) == (0.5, 0.04, 12, 6, "none")
    assert (cj.aggregation, cj.steps, cj.merge, cj.temperature, cj.ratio_unit) == ("steps", "all", 1, 1.0, "token")
    trace = TraceRLConfig(**common)
    assert (trace.epsilon, trace.beta, trace.kl_target, trace.kl_estimator) == (0.2, 0.01, "old", "k3")
    assert trace.steps_per_generation == 4 and trace.aggregation == "canvas" and trace.learning_rate == 1e-6
    assert TraceRLConfig(**common, num_iterations=2).steps_per_generation == 1
    assert TraceRLConfig(**common, beta=0.0).steps_per_generation == 1
    dipo = DiPOConfig(**common)
    assert (dipo.epsilon, dipo.epsilon_high, dipo.beta, dipo.schedule) == (0.2, 0.28, 0.0, "threshold")
    agrpo = AGRPOConfig(**common)
    assert (agrpo.steps, agrpo.step_proposal, agrpo.step_scale) == ("sampled", "uniform", "sum")
    assert D2Config(**common).steps == "segments" and all(c.one_view for c in (cj, trace, dipo, agrpo))
    spec = DiffusionSpec(mask_token_id=3, eos_token_ids=(1,), attention="block_causal", block_length=4)
    assert trace.selector(spec) == BlockSlices(spec)


@pytest.mark.parametrize("name", ["sampled", "entropy_threshold"])
def test_a_killed_run_goes_on_in_the_middle_of_a_batch(
    build_trainer: Any, losses: Any, tmp_path: Path, name: str
) -> None:
    """Steps of a batch are drawn anew in each pass, from a record and a threshold that are in the checkpoint."""
    options: dict[str, Any] = {
        "max_steps": 4, "num_iterations": 2, "save_strategy": "steps", "save_steps": 1, "denoising_steps": 8,
        "learning_rate": 1e-2, "num_scored_steps": 2, "beta": 0.04,
    }  # fmt: skip
    chosen = {
        "sampled": {"trainer": AGRPOTrainer, "config": AGRPOConfig},
        "entropy_threshold": {"trainer": EGSPOTrainer, "config": EGSPOConfig, "steps": name, "step_lambda": 0.5},
    }
    options |= chosen[name]
    whole = build_trainer(tmp_path / "whole", model=tiny_llada_that_ends(), **options)
    whole.train()
    for step in (1, 3):
        again = build_trainer(tmp_path / f"again-{step}", model=tiny_llada_that_ends(), **options)
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert losses(again) == losses(whole)
        for mine, theirs in zip(again.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(mine, theirs)


def test_given_tokens_are_seen_by_every_step_and_scored_by_none(make_trainer: Any) -> None:
    """Completions that an intervention has put in place are scored as they were drawn, around what they were given."""

    class Guided(CJGRPOTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            guidance = Inpainting(free_tail=0, hint_ratio=(0.5, 1.0), chunk_length=(1, 2), hide_answer=False)
            super().__init__(*args, intervention=guidance, **kwargs)

    trainer = make_trainer(
        trainer=recording(Guided), config=CJGRPOConfig, dataset=data(), rewards=Verifier(), max_steps=1, beta=0.0,
        denoising_steps=8, num_iterations=2,
    )  # fmt: skip
    trainer.train()
    record, log = trainer.seen[0], trainer.state.log_history[0]
    assert record["replaced"].any() and record["hinted"].any()
    assert log["diffusion/rollout_gap"] < 1e-6 and log["diffusion/scored_token_share"] == 1.0
    width = record["completion_mask"].shape[1]
    assert not (record["scores"] * record["hinted"][:, :width]).any()
    assert (record["commit_step"] >= 0).logical_xor(record["hinted"])[record["canvas_valid"]].all()


def test_steps_have_advantages_in_evaluation_too(make_trainer: Any, prompt_dataset: Any) -> None:
    trainer = make_trainer(
        model=tiny_llada_that_ends(), trainer=EGSPOTrainer, config=EGSPOConfig, num_scored_steps=2, step_lambda=0.5,
        eval_dataset=prompt_dataset(4), per_device_eval_batch_size=8,
    )  # fmt: skip
    found = trainer.evaluate()
    assert torch.isfinite(torch.tensor(found["eval_loss"])) and found["eval_diffusion/rollout_gap"] < 1e-6
    assert found["eval_diffusion/scored_steps"] <= 2 < found["eval_diffusion/nfe"]
