"""The engine's promises: rows are independent, progress is made, masks never leave, hints and early stops hold."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from rl4dlm.models.tiny import tiny_llada
from rl4dlm.rollout import engine as engine_module
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.schedules.llada import fixed_blocks
from rl4dlm.rollout.schedules.parts import Schedule, probability
from tests.rollout.denoisers import EOS, MASK, PROMPTS, VOCAB, assert_same_rows, denoiser
from tests.rollout.table_model import TableModel, constant_table, random_table

SETTINGS = {
    "greedy": {"steps": 6},
    "one block": {"steps": 12, "block_length": None},
    "random order": {"schedule": "random", "steps": 6},
    "sampled": {"steps": 6, "temperature": 1.0},
    "filtered": {"steps": 12, "temperature": 1.3, "top_p": 0.8, "top_k": 5},
    "threshold": {"schedule": "threshold", "schedule_args": {"threshold": 0.45}, "temperature": 0.7},
    "guided": {"steps": 6, "cfg_scale": 1.5, "temperature": 0.8},
    "cached": {"steps": 6, "cache": "prefix"},
    "cached threshold": {"schedule": "threshold", "schedule_args": {"threshold": 0.4}, "cache": "prefix"},
    "cached, guided, sampled": {"steps": 6, "cache": "prefix", "cfg_scale": 0.7, "temperature": 1.0},
}


def config(**settings: Any) -> DecodingConfig:
    return DecodingConfig(**{"canvas_length": 12, "block_length": 4, **settings})


def table_engine(table: Any, **kwargs: Any) -> RolloutEngine:
    return RolloutEngine(TableModel(table, **{"vocab_size": 4, "mask_token_id": 3, "eos_token_ids": (2,), **kwargs}))


# --- row independence -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_row_does_not_depend_on_its_batch(name: str, shift: int):
    decoding, model, ids = config(**SETTINGS[name]), denoiser(shift=shift), [10, 7, 3, 2**40, 5, 6, 1, 0, 8, 9]
    options = {"num_generations": 2, "seed": 11}
    together = RolloutEngine(model).generate(PROMPTS, decoding, row_ids=ids, **options)
    assert len(set(together.trace.steps.tolist())) > 1, "rows finish at different steps, so the batch is compacted"
    for rows in (1, 3):
        parts = RolloutEngine(model, max_batch_rows=rows).generate(PROMPTS, decoding, row_ids=ids, **options)
        assert_same_rows(parts, together)
    # In another order, beside a longer prompt that pads everyone else further.
    order = [3, 0, 4, 2, 1]
    rows = [row for i in order for row in (2 * i, 2 * i + 1)]
    longer = [list(range(3, 23)), *(PROMPTS[i] for i in order)]
    other = RolloutEngine(model).generate(longer, decoding, row_ids=[98, 99, *(ids[row] for row in rows)], **options)
    assert_same_rows(subset(other, slice(2, None)), together, rows)


@pytest.mark.parametrize("cache", ["none", "prefix"])
def test_every_token_is_fed_at_its_own_position(cache: str):
    # Rotary embeddings do not notice a shift of all positions, other models would.
    model, seen = denoiser(), []
    hook = model.model.register_forward_pre_hook(lambda m, args, kw: seen.append(kw), with_kwargs=True)
    hints = [{offset: 3 + offset for offset in range(12) if offset not in (5, 6)} for _ in PROMPTS]
    RolloutEngine(model).generate(PROMPTS, config(steps=6, cache=cache, stop_at_eos=False), hints=hints)
    hook.remove()
    assert len(seen) == 2
    for kwargs in seen:
        for prompt, ids, positions in zip(PROMPTS, kwargs["input_ids"], kwargs["position_ids"], strict=True):
            for token, position in list(zip(ids.tolist(), positions.tolist(), strict=True))[-12:]:
                offset = position - len(prompt)
                if offset >= 0 and offset not in (5, 6):
                    assert token == 3 + offset
    assert seen[1]["input_ids"].shape[1] == (8 if cache == "prefix" else 9 + 12)


def test_generations_of_a_prompt_are_rows_with_their_own_noise():
    decoding = config(steps=6, temperature=1.0)
    rollout = RolloutEngine(denoiser()).generate(PROMPTS, decoding, num_generations=3)
    assert rollout.prompt_ids == [prompt for prompt in PROMPTS for _ in range(3)]
    assert rollout.row_ids == list(range(15))
    by_prompt = rollout.canvas.view(5, 3, -1)
    assert any(not torch.equal(a, b) for group in by_prompt for a, b in itertools.pairwise(group))
    flat = RolloutEngine(denoiser()).generate(rollout.prompt_ids, decoding)
    assert_same_rows(flat, rollout)


def test_randomness_is_the_seed_and_the_row_id(global_rng_untouched: None):
    decoding, engine = config(steps=6, temperature=1.0), RolloutEngine(denoiser())
    first = engine.generate(PROMPTS, decoding, seed=3)
    assert_same_rows(engine.generate(PROMPTS, decoding, seed=3), first)
    assert not torch.equal(engine.generate(PROMPTS, decoding, seed=4).canvas, first.canvas)
    assert not torch.equal(engine.generate(PROMPTS, decoding, seed=3, row_ids=[5, 6, 7, 8, 9]).canvas, first.canvas)


def test_rows_may_be_in_different_blocks():
    # Row 0 is certain of everything and takes one step per block; row 1 is not and takes one per token.
    def table(tokens: tuple[int, ...]) -> torch.Tensor:
        return torch.tensor([9.0 if tokens[0] == 0 else 1.0, 0.5, -9.0, 0.0]).expand(len(tokens), -1)

    decoding = config(schedule="threshold", schedule_args={"threshold": 0.9}, canvas_length=6, block_length=2)
    rollout = table_engine(table).generate([[0], [1]], decoding)
    assert rollout.trace.commit_step.tolist() == [[0, 0, 1, 1, 2, 2], [0, 1, 2, 3, 4, 5]]
    assert rollout.nfe.tolist() == [3, 6]


# --- progress and what may be written ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Stubborn(DecodingConfig):
    """A commit rule that answers the same for every position, eligible or not."""

    answer: bool = False

    def build_schedule(self) -> Schedule:
        return Schedule(
            fixed_blocks(self), probability, lambda window, scores: torch.full_like(scores, self.answer) > 0
        )


def test_a_rule_that_commits_nothing_writes_the_best_token_of_each_step():
    stubborn = Stubborn(canvas_length=12, block_length=4)
    rollout = RolloutEngine(denoiser()).generate(PROMPTS, stubborn)
    assert_same_rows(rollout, RolloutEngine(denoiser()).generate(PROMPTS, config(steps=12)))


def test_a_rule_that_commits_everything_is_kept_to_the_active_block():
    stubborn, hints = Stubborn(canvas_length=12, block_length=4, answer=True, stop_at_eos=False), [{5: 9}] * 5
    rollout = RolloutEngine(denoiser()).generate(PROMPTS, stubborn, hints=hints)
    expected = [0] * 4 + [1, -1, 1, 1] + [2] * 4
    assert rollout.trace.commit_step.tolist() == [expected] * 5
    assert bool((rollout.canvas[:, 5] == 9).all())


MASK_LOVERS = {
    "greedy": {"steps": 2},
    "sampled": {"steps": 2, "temperature": 1.0},
    "hot": {"steps": 4, "temperature": 50.0},
    "top-k": {"steps": 2, "temperature": 1.0, "top_k": 1},
    "top-p": {"steps": 2, "temperature": 1.0, "top_p": 1e-6},
    "random order": {"steps": 2, "schedule": "random"},
    "threshold": {"schedule": "threshold", "schedule_args": {"threshold": 0.5}},
    "guided": {"steps": 2, "cfg_scale": 2.0, "temperature": 1.0},
}


@pytest.mark.parametrize("name", MASK_LOVERS)
def test_the_mask_token_is_never_written(name: str):
    # The mask token has all the probability but e^-40.
    engine = table_engine(constant_table([0.5, 0.0, -1.0, 40.0]))
    decoding = DecodingConfig(**{"canvas_length": 8, "block_length": 4, "stop_at_eos": False, **MASK_LOVERS[name]})
    rollout = engine.generate([[0], [1, 1]], decoding, num_generations=8)
    assert bool((rollout.canvas != 3).all())
    # Confidence keeps the whole vocabulary's softmax; what is drawn from does not.
    assert bool((rollout.trace.raw_log_prob < -39).all())
    if rollout.trace.log_prob is not None:
        assert bool((rollout.trace.log_prob > -5).all())


def test_ties_go_to_the_lower_position_and_the_lower_id():
    engine = table_engine(constant_table([0.0] * 4), mask_token_id=0)
    rollout = engine.generate([[1]], DecodingConfig(canvas_length=6, steps=3, stop_at_eos=False))
    assert rollout.canvas.tolist() == [[1] * 6]
    assert rollout.trace.commit_step.tolist() == [[0, 0, 1, 1, 2, 2]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_an_error(value: float, temperature: float):
    engine = table_engine(lambda tokens: torch.full((len(tokens), 4), value if tokens[0] == 1 else 0.0))
    with pytest.raises(ValueError, match="not numbers"):
        engine.generate([[0], [1]], DecodingConfig(canvas_length=4, temperature=temperature))


def test_the_model_and_the_callers_mode_are_left_alone(global_rng_untouched: None):
    model = denoiser()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    try:
        RolloutEngine(model).generate(PROMPTS, config(steps=3, temperature=1.0))
        assert model.training and all(module.training for module in model.modules())
    finally:
        model.eval()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_low_precision_weights_are_decoded_in_float32():
    model = tiny_llada(vocab_size=VOCAB, initializer_range=0.4, dtype=torch.bfloat16)
    rollout = RolloutEngine(model).generate(PROMPTS, config(steps=6, temperature=1.0, cache="prefix"))
    for values in (rollout.trace.raw_log_prob, rollout.trace.log_prob):
        assert values.dtype == torch.float32 and bool((values <= 0).all())
    assert bool((rollout.canvas != MASK).all())


def test_an_adapter_decodes_with_its_own_weights():
    model = tiny_llada(vocab_size=VOCAB, initializer_range=0.4, dtype=torch.float64)
    plain = RolloutEngine(model).generate(PROMPTS, config(steps=6))
    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft_model = get_peft_model(model, adapter).double()
    adapted = RolloutEngine(peft_model).generate(PROMPTS, config(steps=6))
    assert not torch.equal(adapted.trace.raw_log_prob, plain.trace.raw_log_prob)
    with peft_model.disable_adapter():
        assert_same_rows(RolloutEngine(peft_model).generate(PROMPTS, config(steps=6)), plain)
    merged = RolloutEngine(peft_model.merge_and_unload()).generate(PROMPTS, config(steps=6))
    assert torch.equal(merged.canvas, adapted.canvas)


@pytest.mark.parametrize("progress", [True, False])
def test_a_long_generation_shows_its_progress(
    progress: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(engine_module, "PROGRESS_DELAY", 0)
    RolloutEngine(denoiser(), progress=progress, max_batch_rows=2).generate(PROMPTS, config(steps=12))
    shown = capsys.readouterr().err
    assert ("decoding" in shown and "/60" in shown) == progress


def test_no_prompts_give_no_rows():
    rollout = RolloutEngine(denoiser()).generate([], config(steps=3))
    assert len(rollout) == 0 and rollout.completion_ids == [] and list(rollout.states()) == []


# --- hints ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["greedy", "filtered", "threshold", "cached", "guided"])
def test_hints_stay_and_are_not_scored(name: str):
    hints = [{0: 9, 7: 4}, {}, {3: 5, 4: 6, 5: 7, 6: 8, 7: 9}, {11: 22}, {0: 1, 4: 1}]
    decoding = config(stop_at_eos=False, **SETTINGS[name])
    rollout = RolloutEngine(denoiser()).generate(PROMPTS, decoding, hints=hints)
    for row, given in enumerate(hints):
        for offset in range(12):
            assert bool(rollout.hinted[row, offset]) == (offset in given)
            assert (int(rollout.trace.commit_step[row, offset]) == -1) == (offset in given)
            if offset in given:
                assert int(rollout.canvas[row, offset]) == given[offset]
                assert float(rollout.trace.raw_log_prob[row, offset]) == 0.0
    first = next(iter(rollout.states()))
    assert first[0].tolist() == [9, *[MASK] * 6, 4, *[MASK] * 4]


def test_hints_are_visible_from_the_first_step():
    model = TableModel(random_table(0, 4), 4, mask_token_id=3)
    engine = RolloutEngine(model)
    model.rows_seen.clear()
    engine.generate([[0, 1]], DecodingConfig(canvas_length=3, steps=1), hints=[{1: 2}])
    assert model.rows_seen == [(0, 1, 3, 2, 3)]


def test_only_what_is_masked_counts_for_the_schedule():
    hints = [dict.fromkeys(range(4, 10), 5)]
    rollout = RolloutEngine(denoiser()).generate([[7]], config(steps=6, stop_at_eos=False), hints=hints)
    # Blocks of 4: the first takes 2 + 2, the second is given, the third has 2 left for its 2 steps.
    assert sorted(rollout.trace.commit_step[0].tolist()) == [-1] * 6 + [0, 0, 1, 1, 2, 3]
    assert rollout.nfe.tolist() == [4]


def test_a_row_that_is_all_hints_costs_nothing():
    hints = [dict(enumerate([4, 5, 6, 7] * 3)), {}]
    rollout = RolloutEngine(denoiser()).generate([[7], [8]], config(steps=3, stop_at_eos=False), hints=hints)
    assert rollout.canvas[0].tolist() == [4, 5, 6, 7] * 3
    assert rollout.nfe.tolist() == [0, 3] and rollout.trace.steps.tolist() == [0, 3]
    assert rollout.stop_reason == ["complete", "complete"]


def test_a_hinted_end_ends_a_row_once_all_before_it_is_written():
    hints = [{2: EOS}, {0: EOS}]
    rollout = RolloutEngine(denoiser()).generate([[7], [8]], config(steps=12), hints=hints)
    assert rollout.nfe[1] == 0 and rollout.completion_ids[1] == [EOS]
    assert int(rollout.nfe[0]) <= 4 and len(rollout.completion_ids[0]) <= 3
    assert rollout.stop_reason == ["eos", "eos"]


# --- early stop -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETTINGS)
def test_stopping_at_the_end_of_sequence_keeps_the_valid_part(name: str):
    early, late = (
        RolloutEngine(denoiser()).generate(PROMPTS, config(stop_at_eos=stop, **SETTINGS[name]), seed=5)
        for stop in (True, False)
    )
    assert "eos" in early.stop_reason and set(late.stop_reason) == {"complete"}
    assert torch.equal(early.valid, late.valid)
    assert early.completion_ids == late.completion_ids
    written = early.trace.commit_step >= 0
    assert bool(written[early.valid].all())
    for a, b in zip(vars(early.trace).values(), vars(late.trace).values(), strict=True):
        if a is not None and a.shape == written.shape:
            torch.testing.assert_close(a[written], b[written], rtol=0, atol=1e-10)
    assert bool((early.nfe <= late.nfe).all()) and int(early.nfe.sum()) < int(late.nfe.sum())
    unwritten = early.canvas[~written]
    assert bool((unwritten == EOS).all())


def test_a_model_that_only_ends_needs_one_step():
    engine = table_engine(constant_table([0.0, 0.0, 9.0, 0.0]))
    rollout = engine.generate([[0], [1]], DecodingConfig(canvas_length=8, block_length=4))
    assert rollout.completion_ids == [[2], [2]] and rollout.nfe.tolist() == [1, 1]
    assert rollout.stop_reason == ["eos", "eos"]


def test_every_end_of_sequence_token_ends_a_completion():
    engine = table_engine(constant_table([0.0, 5.0, 5.0, 0.0]), eos_token_ids=(2, 1))
    rollout = engine.generate([[0]], DecodingConfig(canvas_length=4, steps=4))
    assert rollout.completion_ids == [[1]] and rollout.stop_reason == ["eos"]


def test_a_model_without_an_end_of_sequence_token_fills_its_canvas():
    engine = table_engine(random_table(3, 4), eos_token_ids=())
    rollout = engine.generate([[0]], DecodingConfig(canvas_length=6, steps=6))
    assert bool(rollout.valid.all()) and rollout.stop_reason == ["complete"]


# --- suppressed and deferred tokens -----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_suppressed_token_is_out_of_the_distribution(temperature: float):
    plain = [0.3, 0.0, 2.0, 1.0]
    without = [0.3, 0.0, -1e4, 1.0]
    settings = {"canvas_length": 6, "steps": 3, "temperature": temperature}
    suppressed = table_engine(constant_table(plain)).generate(
        [[0]], DecodingConfig(suppress_token_ids=(2,), **settings)
    )
    expected = table_engine(constant_table(without)).generate([[0]], DecodingConfig(**settings))
    for name in ("commit_step", "steps", "confidence"):
        torch.testing.assert_close(getattr(suppressed.trace, name), getattr(expected.trace, name))
    assert torch.equal(suppressed.canvas, expected.canvas) and 2 not in suppressed.canvas
    if temperature:
        torch.testing.assert_close(suppressed.trace.log_prob, expected.trace.log_prob)
    own = torch.tensor(plain, dtype=suppressed.trace.raw_log_prob.dtype).log_softmax(-1)  # M5: the model's own
    torch.testing.assert_close(suppressed.trace.raw_log_prob, own[suppressed.canvas])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_m7_ids_that_the_tokenizer_does_not_know_are_not_drawn(temperature: float):
    engine = table_engine(constant_table([0.3, 0.1, 5.0, 1.0]))
    settings = {"canvas_length": 40, "steps": 20, "temperature": temperature, "stop_at_eos": False}
    assert 2 in engine.generate([[0]], DecodingConfig(**settings)).canvas
    known = engine.generate([[0]], DecodingConfig(known_tokens=2, **settings))
    assert set(known.canvas.flatten().tolist()) <= {0, 1}
    own = torch.tensor([0.3, 0.1, 5.0, 1.0], dtype=known.trace.raw_log_prob.dtype).log_softmax(-1)
    torch.testing.assert_close(known.trace.raw_log_prob, own[known.canvas])  # they stay in the distribution
    with pytest.raises(ValueError, match="known_tokens=0 is not allowed"):
        DecodingConfig(known_tokens=0)


def test_a_deferred_token_is_committed_last():
    # Offset 0 wants the end, and is surest of it; the others want token 0.
    def table(tokens: tuple[int, ...]) -> torch.Tensor:
        logits = torch.tensor([2.0, 0.0, 0.0, 0.0]).repeat(len(tokens), 1)
        logits[1] = torch.tensor([0.0, 0.0, 9.0, 0.0])
        return logits

    engine, settings = table_engine(table), {"canvas_length": 4, "steps": 4, "stop_at_eos": False}
    plain = engine.generate([[0]], DecodingConfig(**settings))
    deferred = engine.generate([[0]], DecodingConfig(defer_token_ids=(2,), **settings))
    assert plain.trace.commit_step.tolist() == [[0, 1, 2, 3]]
    assert deferred.trace.commit_step.tolist() == [[3, 0, 1, 2]]
    assert torch.equal(plain.canvas, deferred.canvas)


# --- guidance ---------------------------------------------------------------------------------------------------------


def test_guidance_changes_nothing_when_the_prompt_does_not_matter():
    settings = {"canvas_length": 6, "steps": 3, "temperature": 1.0, "stop_at_eos": False}

    def table(tokens: tuple[int, ...]) -> torch.Tensor:
        logits = random_table(1, 4)((0, *tokens[1:]))
        return logits

    plain = table_engine(table).generate([[0], [1]], DecodingConfig(**settings), seed=2)
    guided = table_engine(table).generate([[0], [1]], DecodingConfig(cfg_scale=3.0, **settings), seed=2)
    assert torch.equal(plain.canvas, guided.canvas)
    torch.testing.assert_close(plain.trace.raw_log_prob, guided.trace.raw_log_prob, rtol=0, atol=1e-10)
    assert torch.equal(guided.nfe, 2 * plain.nfe)


def test_the_unconditional_rows_see_masks_for_the_prompt():
    model = TableModel(random_table(0, 4), 4, mask_token_id=3)
    engine = RolloutEngine(model)
    model.rows_seen.clear()
    engine.generate([[0, 1], [2]], DecodingConfig(canvas_length=2, steps=1, cfg_scale=1.0))
    assert sorted(model.rows_seen) == sorted([(0, 1, 3, 3), (2, 3, 3), (3, 3, 3, 3), (3, 3, 3)])


def test_a_vanishing_guidance_is_none():
    plain = RolloutEngine(denoiser()).generate(PROMPTS, config(steps=6))
    guided = RolloutEngine(denoiser()).generate(PROMPTS, config(steps=6, cfg_scale=1e-12))
    assert torch.equal(plain.canvas, guided.canvas) and torch.equal(2 * plain.nfe, guided.nfe)


# --- parity between schedules -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_length", [12, 4, 1])
@pytest.mark.parametrize("seed", range(3))
def test_a_threshold_that_nothing_reaches_is_one_token_per_step(block_length: int, seed: int):
    engine, options = RolloutEngine(denoiser(seed=seed)), {"block_length": block_length, "temperature": 0.0}
    never = config(schedule="threshold", schedule_args={"threshold": float("inf")}, **options)
    one = config(steps=12, **options)
    assert_same_rows(engine.generate(PROMPTS, never), engine.generate(PROMPTS, one))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_threshold_that_all_reach_is_one_step_per_block(temperature: float):
    engine, options = RolloutEngine(denoiser()), {"temperature": temperature, "stop_at_eos": False}
    always = engine.generate(PROMPTS, config(schedule="threshold", schedule_args={"threshold": 0}, **options))
    one = engine.generate(PROMPTS, config(steps=3, **options))
    assert_same_rows(always, one)
    assert always.nfe.tolist() == [3] * 5


@pytest.mark.parametrize("settings", [{"steps": 12}, {"schedule": "random"}, {"schedule": "threshold"}], ids=str)
def test_blocks_of_one_token_are_left_to_right(settings: dict[str, Any]):
    decoding = config(block_length=1, stop_at_eos=False, **settings)
    if settings.get("schedule") == "random":
        decoding = dataclasses.replace(decoding, steps=12)
    rollout = RolloutEngine(denoiser()).generate(PROMPTS, decoding)
    assert rollout.trace.commit_step.tolist() == [list(range(12))] * 5


def test_vocabulary_of_the_test_model_is_used():
    rollout = RolloutEngine(denoiser()).generate(PROMPTS, config(steps=12, temperature=3.0, stop_at_eos=False))
    assert len(rollout.canvas.unique()) > VOCAB // 2  # else many tests above would compare one token with itself


def subset(rollout: Any, rows: slice) -> Any:
    """Some rows of a rollout."""
    fields = {f.name: getattr(rollout, f.name) for f in dataclasses.fields(rollout)}
    for name in ("prompt_ids", "canvas", "valid", "hinted", "nfe", "stop_reason", "row_ids"):
        fields[name] = fields[name][rows]
    trace = {f.name: getattr(rollout.trace, f.name) for f in dataclasses.fields(rollout.trace)}
    fields["trace"] = type(rollout.trace)(**{k: None if v is None else v[rows] for k, v in trace.items()})
    return type(rollout)(**fields)
