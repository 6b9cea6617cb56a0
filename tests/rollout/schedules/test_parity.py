"""Where two schedules say the same they do the same: one token at a time, all at once, and with what is special off.

Each claim is tested on models whose predictions depend on the whole canvas, with several prompts, at temperature 0 and,
where nothing but positions differs, with drawn tokens too.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.rollout import EventKind, Rollout
from rl4dlm.rollout.schedules.llada import fixed_blocks
from rl4dlm.rollout.schedules.parts import Schedule, Step, probability, top
from tests.rollout.causal_models import table_causal
from tests.rollout.denoisers import assert_same_rows
from tests.rollout.schedules.examples import EOS, HINTS, MASK, PROMPTS, VOCAB, denoiser, judge, token_filter
from tests.rollout.table_model import TableModel, constant_table, random_table

LENGTH = 8
INF = float("inf")


def decoded(schedule: str, *, model: Any = None, prompts: Any = None, hints: Any = None, **settings: Any) -> Rollout:
    arguments = settings.pop("schedule_args", {})
    config = DecodingConfig(
        **{"canvas_length": LENGTH, "schedule": schedule, "stop_at_eos": False, "schedule_args": arguments, **settings}
    )
    return RolloutEngine(model or denoiser()).generate(prompts or PROMPTS, config, seed=3, hints=hints)


def assert_equal(a: Rollout, b: Rollout) -> None:
    """The same canvases by the same steps; a schedule that could change tokens may have written them just so."""
    assert_same_rows(a, b)
    if a.trace.events is not None and b.trace.events is None:
        assert set(a.trace.events.kind.tolist()) <= {int(EventKind.COMMIT)}


# --- what every schedule can be set to --------------------------------------------------------------------------------

TEMPERED = ("dream_maskgit_plus", "sdar_dynamic", "editing", "rcr")
"""Their confidences are those of the tempered distribution, so that only temperature 0 gives LLaDA's."""
OWN_BLOCKS = ("adablock", "ctrldiff", "schema")

ONE_AT_A_TIME: dict[str, dict[str, Any]] = {
    "threshold": {"threshold": INF},
    "factor": {"factor": 0},
    "learn2pd": {"acceptance": 1},
    "hierarchical": {"threshold": INF, "low_threshold": INF},
    "credit": {"weight": 0, "threshold": INF},
    "smoothing": {"weight": 0, "weight_growth": 0, "threshold": INF},
    "latent_refinement": {"feedback": 0, "threshold": INF},
    "wino": {"threshold": INF},
    "d2f": {"threshold": INF, "add_threshold": 1},
}
"""Schedules that take as many steps as they need, set to be sure of nothing."""

EVEN: dict[str, dict[str, Any]] = {
    "klass": {"threshold": 1.5},
    "sdar_dynamic": {"threshold": INF},
    "editing": {"threshold": INF, "editing_threshold": 1, "max_post_steps": 0},
    "eoser": {"min_gamma": 1, "max_gamma": 1},
    "dream_maskgit_plus": {},
    "rcr": {"remask": False},
    "pc_sampler": {"decay": 0},
    "edlm": {"order": "low_confidence", "drafts": 1, "energy": judge},
    "schema": {},
}
"""Schedules that are given a number of steps, with what makes them special turned off."""

AT_ONCE: dict[str, dict[str, Any]] = {
    "threshold": {"threshold": 0},
    "factor": {"factor": LENGTH + 1},
    "hierarchical": {"threshold": 0},
    "credit": {"threshold": 0, "weight": 0},
    "smoothing": {"threshold": 0, "start_threshold": 0, "weight": 0, "weight_growth": 0},
    "latent_refinement": {"feedback": 0, "threshold": 0},
    "entropy_bound": {"gamma": INF},
    "learn2pd": {"acceptance": 0, "filter_path": lambda: token_filter(4)},
    "guided": {"guide": judge, "top_k": VOCAB, "ratio": 0},
    "saber": {"min_tokens": LENGTH},
    "wino": {"threshold": 0, "fraction": 1, "verify_threshold": 0},
    "d2f": {"threshold": 0},
    "sub_blocks": {"threshold": 0, "sub_block_length": LENGTH, "first_alone": False},
    "multi_block": {"entropy_threshold": INF},
}
"""Schedules that take as many steps as they need, set to be sure of everything."""


def called(arguments: dict[str, Any]) -> dict[str, Any]:
    return {key: value() if callable(value) else value for key, value in arguments.items()}


@pytest.mark.parametrize("block", [None, 4])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("name", ONE_AT_A_TIME)
def test_sure_of_nothing_is_one_token_at_a_time(name: str, temperature: float, block: int | None):
    usual = {"temperature": temperature, "block_length": block, "hints": HINTS}
    expected = decoded("low_confidence", steps=LENGTH, **usual)
    assert_equal(decoded(name, schedule_args=ONE_AT_A_TIME[name], **usual), expected)
    assert expected.nfe.tolist() == [LENGTH - len(given) for given in HINTS]


@pytest.mark.parametrize("block", [None, 4])
@pytest.mark.parametrize("steps", [2, 4, LENGTH])
@pytest.mark.parametrize("name", EVEN)
def test_with_nothing_special_it_is_low_confidence(name: str, steps: int, block: int | None):
    if name in OWN_BLOCKS and block is not None:
        return
    for temperature in [0.0] if name in TEMPERED else [0.0, 0.8]:
        usual = {"temperature": temperature, "block_length": block, "steps": steps}
        expected = decoded("low_confidence", **usual)
        assert_equal(decoded(name, schedule_args=called(EVEN[name]), **usual), expected)
        assert expected.nfe.tolist() == [steps] * len(PROMPTS)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("name", AT_ONCE)
def test_sure_of_everything_is_a_block_at_once(name: str, temperature: float):
    usual = {"temperature": temperature, "block_length": 4}
    expected = decoded("low_confidence", steps=2, **usual)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the network was made for temperature 0
        assert_equal(decoded(name, schedule_args=called(AT_ONCE[name]), **usual), expected)


def test_a_probability_of_one_is_not_beyond_every_threshold():
    """Nothing is where a threshold is infinite; at 1 what rounds to 1 goes together."""
    model = TableModel(constant_table([0.0] * 7 + [60.0, 1.0]), VOCAB, mask_token_id=MASK, eos_token_ids=(EOS,))
    assert decoded("threshold", model=model, schedule_args={"threshold": 1.0}).nfe.tolist() == [1] * len(PROMPTS)
    assert decoded("threshold", model=model, schedule_args={"threshold": INF}).nfe.tolist() == [8] * len(PROMPTS)


# --- the threshold in other clothes -----------------------------------------------------------------------------------

THRESHOLDS: dict[str, dict[str, Any]] = {
    "hierarchical": {"low_threshold": INF},
    "credit": {"weight": 0},
    "smoothing": {"weight": 0, "weight_growth": 0, "start_threshold": 0},
    "latent_refinement": {"feedback": 0},
}


@pytest.mark.parametrize("threshold", [0.45, 0.6])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("name", THRESHOLDS)
def test_with_nothing_special_it_is_threshold(name: str, temperature: float, threshold: float):
    usual = {"temperature": temperature, "block_length": 4, "hints": HINTS}
    expected = decoded("threshold", schedule_args={"threshold": threshold}, **usual)
    assert_equal(decoded(name, schedule_args={**THRESHOLDS[name], "threshold": threshold}, **usual), expected)
    assert any(2 < nfe < LENGTH - 1 for nfe in expected.nfe.tolist()), "neither everything nor nothing is sure"


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("adablock", {"default_block": 4, "delimiter_ids": (3, 4, 5), "delimiter_threshold": INF}),
        ("ctrldiff", {"sizes": (4,)}),
    ],
)
def test_blocks_that_always_have_one_length_are_fixed_blocks(name: str, arguments: dict[str, Any], temperature: float):
    for threshold in (0.4, INF):
        expected = decoded("threshold", schedule_args={"threshold": threshold}, temperature=temperature, block_length=4)
        found = decoded(name, schedule_args={**arguments, "threshold": threshold}, temperature=temperature)
        assert_equal(found, expected)


def test_a_single_block_size_is_no_choice():
    rollout = decoded("ctrldiff", schedule_args={"sizes": (4,), "threshold": 0.4})
    assert rollout.trace.selection_log_prob is None or bool((rollout.trace.selection_log_prob == 0).all())


@dataclasses.dataclass(frozen=True)
class Capped(DecodingConfig):
    """The threshold, with at most so many tokens per step."""

    cap: int = 2

    def build_schedule(self) -> Schedule:
        def rule(step: Step, scores: Tensor) -> Tensor:
            return top(scores, step.eligible, ((scores > 0.3) & step.eligible).sum(-1).clamp(1, self.cap))

        return Schedule(fixed_blocks(self), probability, rule)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_wino_that_verifies_nothing_is_a_capped_threshold(temperature: float):
    usual = {"canvas_length": LENGTH, "temperature": temperature, "stop_at_eos": False}
    expected = RolloutEngine(denoiser()).generate(PROMPTS, Capped(**usual), seed=3)
    arguments = {"threshold": 0.3, "verify_threshold": 0, "min_cap": 2, "max_cap": 2}
    assert_equal(decoded("wino", schedule_args=arguments, temperature=temperature), expected)
    assert any(4 <= nfe < LENGTH for nfe in expected.nfe.tolist())


def test_saber_that_does_not_go_back_writes_for_good():
    rollout = decoded("saber", schedule_args={"backtrack": False})
    assert rollout.trace.events is None
    assert bool((rollout.trace.commit_step >= 0).all())


def test_daedal_that_never_grows_is_a_threshold_before_an_end():
    closed = [{6: EOS, 7: EOS}] * len(PROMPTS)
    expected = decoded("threshold", schedule_args={"threshold": 0.45}, hints=closed, block_length=4)
    arguments = {"start_length": 6, "window": 4, "end_slots": 4, "high": 0.45, "low": 0, "length_end": 0}
    found = decoded("daedal", schedule_args=arguments)
    assert torch.equal(found.canvas, expected.canvas)
    assert torch.equal(found.hinted, expected.hinted)
    assert torch.equal(found.nfe, expected.nfe + 1)  # one forward looks for the length
    assert torch.equal(found.trace.commit_step, torch.where(expected.hinted, -1, expected.trace.commit_step + 1))


def test_daedal_rows_of_different_length_are_those_of_single_runs():
    arguments = {"start_length": 2, "window": 3, "growth": 2, "end_slots": 2, "low": 0.4}
    together = decoded("daedal", schedule_args=arguments)
    assert together.trace.length is not None and len(set(together.trace.length.tolist())) > 1
    for row, prompt in enumerate(PROMPTS):
        config = DecodingConfig(canvas_length=LENGTH, schedule="daedal", schedule_args=arguments, stop_at_eos=False)
        alone = RolloutEngine(denoiser()).generate([prompt], config, row_ids=[row], seed=3)
        assert_same_rows(alone, together, [row])
        assert alone.trace.length is not None and alone.trace.length.tolist() == [int(together.trace.length[row])]


# --- orders -----------------------------------------------------------------------------------------------------------


def test_an_entropy_bound_of_zero_is_dream_entropy_one_at_a_time():
    assert_equal(decoded("entropy_bound", schedule_args={"gamma": 0}), decoded("dream_entropy", steps=LENGTH))


def test_an_entropy_bound_of_zero_is_low_confidence_where_both_mean_the_same():
    """One token that stands out among equals: the more probable, the lower the entropy."""
    noise = random_table(7, VOCAB)

    def table(tokens: tuple[int, ...]) -> Tensor:
        height = noise(tokens)[:, :1].abs() + 1
        favourite = noise(tokens)[:, MASK + 1 :].argmax(-1) + MASK + 1
        return height * torch.nn.functional.one_hot(favourite, VOCAB)

    model = TableModel(table, VOCAB, mask_token_id=MASK, eos_token_ids=(EOS,))
    found = decoded("entropy_bound", model=model, schedule_args={"gamma": 0})
    assert_equal(found, decoded("low_confidence", model=model, steps=LENGTH))


@pytest.mark.parametrize("name", ["dream_maskgit_plus", "dream_topk_margin", "dream_entropy"])
def test_positions_drawn_at_a_temperature_near_zero_are_the_most_certain(name: str):
    usual = {"steps": 5, "temperature": 0.7}
    found = decoded(name, schedule_args={"alg_temp": 1e-9}, **usual)
    assert_equal(found, decoded(name, **usual))
    assert found.trace.selection_log_prob is None or bool((found.trace.selection_log_prob.abs() < 1e-6).all())


@pytest.mark.parametrize("steps", [3, LENGTH])
def test_edlm_with_one_draft_is_random_order(steps: int):
    usual = {"steps": steps, "temperature": 0.9}
    assert_equal(decoded("edlm", schedule_args={"energy": judge(), "drafts": 1}, **usual), decoded("random", **usual))


def test_a_guide_that_objects_to_everything_makes_it_read_from_left_to_right():
    guide = table_causal(lambda tokens: torch.nn.functional.one_hot(torch.tensor(MASK), VOCAB).double(), VOCAB)
    found = decoded("guided", schedule_args={"guide": guide, "top_k": 1})
    assert_equal(found, decoded("left_to_right", steps=LENGTH))
    assert found.extra_forwards.tolist() == found.trace.steps.tolist() == [LENGTH] * len(PROMPTS)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_discount_of_nothing_leaves_ascending_steps(temperature: float):
    arguments = {"num_blocks": 2, "min_gamma": 1, "max_gamma": 1}
    found = decoded("eoser_ass", schedule_args=arguments, temperature=temperature)
    assert_equal(found, decoded("ass", schedule_args={"num_blocks": 2}, temperature=temperature))


@pytest.mark.parametrize("threshold", [0.3, 0.6])
def test_editing_nothing_is_sdar(threshold: float):
    arguments = {"threshold": threshold, "editing_threshold": 1, "max_post_steps": 0}
    usual = {"steps": 4, "block_length": 4, "temperature": 0.8}
    assert_equal(
        decoded("editing", schedule_args=arguments, **usual),
        decoded("sdar_dynamic", schedule_args={"threshold": threshold}, **usual),
    )


@pytest.mark.parametrize("slots", [0, 3, LENGTH])
def test_a_template_is_filled_like_hints(slots: int):
    hints = [dict.fromkeys(range(slots, LENGTH), 5)] * len(PROMPTS)
    found, steps = decoded("schema", steps=2, hints=hints), 2
    assert_equal(found, decoded("low_confidence", steps=steps, hints=hints))
    assert found.nfe.tolist() == [min(slots, steps)] * len(PROMPTS)


# --- models that see no context ---------------------------------------------------------------------------------------


def context_free() -> TableModel:
    """Logits that depend on the place in the canvas alone, so that what is written changes nothing else."""
    fixed = random_table(11, VOCAB, scale=2.0)((0,) * (LENGTH + 1))
    return TableModel(lambda tokens: fixed[: len(tokens)], VOCAB, mask_token_id=MASK, eos_token_ids=(EOS,))


@pytest.mark.parametrize("steps", [2, 4, LENGTH])
def test_without_context_nothing_is_remasked_that_would_not_have_been_masked(steps: int):
    expected = decoded("low_confidence", model=context_free(), prompts=[[3]], steps=steps)
    found = decoded("rcr", model=context_free(), prompts=[[3]], steps=steps)
    states = zip(found.states(), expected.states(), strict=True)
    assert all(torch.equal(mine, other) for mine, other in states)
    assert torch.equal(found.canvas, expected.canvas)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("rcr", {"steps": 4, "block_length": 4}),
        ("eoser", {"steps": 4, "schedule_args": {"min_gamma": 0.0, "max_gamma": 0.1}}),
        ("ass", {}),
        ("eoser_ass", {}),
        ("left_to_right", {"steps": 2}),
        ("random", {"steps": 3}),
        ("dream_topk_margin", {"steps": 5}),
        ("entropy_bound", {"schedule_args": {"gamma": 1.0}}),
        ("pc_sampler", {"steps": 3}),
        ("saber", {}),
        ("klass", {"steps": 4, "schedule_args": {"threshold": 0.2, "history": 1}}),
        ("editing", {"steps": 4, "schedule_args": {"threshold": 0.3, "editing_threshold": 0.0}}),
    ],
)
def test_without_context_every_order_gives_the_same_text(name: str, settings: dict[str, Any]):
    expected = decoded("low_confidence", model=context_free(), prompts=[[3]], steps=LENGTH)
    found = decoded(name, model=context_free(), prompts=[[3]], **settings)
    assert torch.equal(found.canvas, expected.canvas)


# --- what it costs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["low_confidence", "threshold", "factor", "entropy_bound", "dream_entropy"])
def test_guidance_doubles_and_caches_do_not_change_the_number_of_forwards(name: str):
    plain, guided, cached = (
        decoded(name, block_length=4, **more) for more in ({}, {"cfg_scale": 0.7}, {"cache": "prefix"})
    )
    assert torch.equal(plain.nfe, plain.trace.steps)
    assert torch.equal(guided.nfe, 2 * guided.trace.steps)
    assert torch.equal(cached.nfe, cached.trace.steps)


@pytest.mark.parametrize("window", [(0.0, 1.0), (0.6, 1.0), (0.0, 0.2)])
def test_forwards_of_other_models_are_counted_apart(window: tuple[float, float]):
    arguments = {"energy": judge(), "drafts": 3, "window": window}
    rollout = decoded("edlm", steps=4, temperature=1.0, schedule_args=arguments)
    shares = [(LENGTH - written) / LENGTH for written in range(0, LENGTH, 2)]
    weighed = sum(window[0] <= share <= window[1] for share in shares)
    assert rollout.extra_forwards.tolist() == [3 * weighed] * len(PROMPTS)
    assert rollout.nfe.tolist() == [4] * len(PROMPTS)
