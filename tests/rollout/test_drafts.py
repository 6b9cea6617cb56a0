"""Guesses of the next states: everything is as without them but the number of forwards, which is no larger."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from rl4dlm.rollout.caches.store import KeyValueStore
from rl4dlm.rollout.constraints.automata import one_of, repeat
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.drafts import candidates_ahead
from rl4dlm.rollout.drawing import Places, Scored
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.memory import Memory
from rl4dlm.rollout.noise import KeyedNoise
from rl4dlm.rollout.rollout import Rollout
from rl4dlm.rollout.schedules import registry
from rl4dlm.rollout.schedules.dream import candidate_probability
from rl4dlm.rollout.schedules.parts import Schedule
from tests.models.block_denoisers import KINDS, PROMPTS as BLOCK_PROMPTS, block_denoiser
from tests.rollout.denoisers import EOS, MASK, PROMPTS, VOCAB, denoiser
from tests.rollout.table_model import TableModel, constant_table, random_table

LENGTH, BLOCK = 24, 8
SCHEDULES: dict[str, dict[str, Any]] = {
    "one token a step": {"steps": LENGTH},
    "two tokens a step": {"steps": LENGTH // 2},
    "an uneven number": {"steps": 9},
    "random order": {"schedule": "random", "steps": LENGTH},
    "left to right": {"schedule": "left_to_right", "steps": LENGTH},
    "threshold": {"schedule": "threshold", "schedule_args": {"threshold": 0.5}},
    "factor": {"schedule": "factor", "schedule_args": {"factor": 0.6}},
    "entropy bound": {"schedule": "entropy_bound", "schedule_args": {"gamma": 0.3}},
    "sdar": {"schedule": "sdar_dynamic", "schedule_args": {"threshold": 0.6}, "steps": LENGTH},
    "eoser": {"schedule": "eoser", "steps": LENGTH},
    "ascending": {"schedule": "ass", "block_length": None},
    "both": {"schedule": "eoser_ass", "block_length": None},
    "dream": {"schedule": "dream_maskgit_plus", "steps": LENGTH},
    "dream floor": {"schedule": "dream_entropy", "schedule_args": {"counts": "floor"}, "steps": LENGTH},
    "dream margin": {"schedule": "dream_topk_margin", "steps": LENGTH},
    "dream threshold": {"schedule": "dream_threshold", "schedule_args": {"threshold": 0.4}, "steps": LENGTH},
    "adablock": {"schedule": "adablock", "schedule_args": {"threshold": 0.9, "default_block": 9}, "block_length": None},
    "pc": {"schedule": "pc_sampler", "steps": LENGTH},
}
CACHES: dict[str, dict[str, Any]] = {
    "none": {"cache": "none"},
    "prefix": {"cache": "prefix"},
    "dual": {"cache": "dual"},
    "dual, every other block": {"cache": "dual", "cache_args": {"refresh_blocks": 2}},
    "a window": {"cache": "prefix", "cache_args": {"refresh_blocks": 2, "suffix_window": 5}},
}


def decoded(model: Any, draft_steps: int = 0, prompts: list[list[int]] = PROMPTS, **settings: Any) -> Rollout:
    call = {name: settings.pop(name) for name in ("hints", "choices", "constraint", "row_ids") if name in settings}
    config = {"canvas_length": LENGTH, "block_length": BLOCK, "stop_at_eos": False, **settings}
    decoding = DecodingConfig(**config, draft_steps=draft_steps)
    return RolloutEngine(model).generate(prompts, decoding, seed=4, **call)


def assert_lossless(drafted: Rollout, plain: Rollout) -> None:
    for name in ("canvas", "valid", "hinted"):
        assert torch.equal(getattr(drafted, name), getattr(plain, name)), name
    assert drafted.stop_reason == plain.stop_reason
    for name in ("commit_step", "steps", "block_stop"):
        assert torch.equal(getattr(drafted.trace, name), getattr(plain.trace, name)), name
    for name in ("raw_log_prob", "log_prob", "confidence", "entropy"):
        mine, theirs = getattr(drafted.trace, name), getattr(plain.trace, name)
        if theirs is None:
            assert mine is None
        else:
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)
    assert drafted.exact == plain.exact
    assert drafted.guesses is not None and plain.guesses is not None
    assert drafted.decoding is not None and plain.decoding is not None
    came_true = (plain.nfe - drafted.nfe) // (2 if plain.decoding.cfg_scale else 1)
    assert bool((came_true >= 0).all()) and bool((came_true <= drafted.guesses).all())
    assert not plain.guesses.any()


def test_every_schedule_that_allows_guesses_is_here():
    named = {settings.get("schedule", "low_confidence") for settings in SCHEDULES.values()}
    needing = {
        "bernoulli",
        "ctrldiff",
        "edlm",
        "entropy_bound_canvas",
        "guided",
        "learn2pd",
        "levenshtein",
        "schema",
    }  # own settings
    for name in set(registry.names()) - needing:
        schedule = DecodingConfig(schedule=name).build_schedule()
        assert isinstance(schedule, Schedule)
        assert schedule.memoryless == (name in named), name


@pytest.mark.parametrize("cache", ["none", "dual, every other block"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("name", SCHEDULES)
def test_nothing_but_the_forwards_changes(name: str, temperature: float, cache: str):
    settings = {"temperature": temperature, **CACHES[cache], **SCHEDULES[name]}
    plain = decoded(denoiser(), **settings)
    fewer = 0
    for draft_steps, draft_width in ((1, 1), (3, 3)):
        drafted = decoded(denoiser(), draft_steps, draft_width=draft_width, **settings)
        assert_lossless(drafted, plain)
        fewer += int((plain.nfe - drafted.nfe).sum())
    if int(plain.trace.steps.sum()) > 2 * len(PROMPTS) * (LENGTH // BLOCK):
        assert fewer > 0


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("cache", CACHES)
def test_every_cache_that_allows_it_keeps_its_own_result(cache: str, shift: int):
    """Approximate or not: nothing depends on what guesses leave in the store."""
    settings = {"temperature": 0.8, "steps": LENGTH // 2, **CACHES[cache]}
    plain = decoded(denoiser(shift=shift), **settings)
    drafted = decoded(denoiser(shift=shift), 2, draft_width=2, **settings)
    assert_lossless(drafted, plain)
    assert int(drafted.nfe.sum()) < int(plain.nfe.sum())


OPTIONS: dict[str, dict[str, Any]] = {
    "hints": {"hints": [{0: 9, 3: 8}, {}, dict.fromkeys(range(8), 5), {23: 4}, {7: 6, 8: 6, 15: 3}]},
    "stop": {"stop_at_eos": True},
    "stop at a block": {"stop_at_eos": "block"},
    "guidance": {"cfg_scale": 1.5},
    "filtered": {"top_p": 0.9, "top_k": 6, "suppress_token_ids": (5, 6)},
    "deferred": {"defer_token_ids": (EOS, 7)},
    "penalty": {"eos_penalty": 2.0, "eos_penalty_decay": True, "min_new_tokens": 4},
    "choices": {"choices": [{3: [4, 5], 9: [6]}, {}, {0: [7, 8, 9]}, {}, {20: [3]}]},
    "constraint": {"constraint": repeat(one_of([*range(3, VOCAB, 2), EOS]))},
    "one block": {"block_length": LENGTH},
}


@pytest.mark.parametrize(("cache", "shift"), [("none", 0), ("dual, every other block", 1), ("a window", 1)])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("name", OPTIONS)
def test_options_do_as_without(name: str, temperature: float, cache: str, shift: int):
    settings = {"steps": LENGTH, "temperature": temperature, **CACHES[cache], **OPTIONS[name]}
    plain = decoded(denoiser(shift=shift), **settings)
    drafted = decoded(denoiser(shift=shift), 3, draft_width=2, **settings)
    assert_lossless(drafted, plain)
    assert int(drafted.nfe.sum()) < int(plain.nfe.sum())


@pytest.mark.parametrize("cache", ["none", "prefix"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(("kind", "origin"), [*KINDS, ("causal", "response")])
def test_models_whose_attention_has_blocks(kind: str, origin: str, shift: int, temperature: float, cache: str):
    """A prompt may end inside a block, and the last block is shorter; with the cache this is the exact one."""
    model = block_denoiser(kind, origin, shift=shift)
    settings = {"canvas_length": 10, "block_length": None, "steps": 9, "temperature": temperature, "cache": cache}
    if kind == "causal":
        settings |= {"block_length": 5, "steps": 10}
    hints = [{0: 9}, {}, {4: 5, 5: 6, 6: 7, 7: 8}, {1: 4, 2: 4, 3: 4, 4: 4}, {9: 3}]
    plain, drafted = (decoded(model, steps, BLOCK_PROMPTS, hints=hints, **settings) for steps in (0, 2))
    assert plain.exact
    assert_lossless(drafted, plain)
    assert drafted.guesses is not None and bool(drafted.guesses.any())


def test_guesses_draw_what_the_step_that_they_stand_for_would_draw():
    """From the same logits, with its noise; only the draw is made again."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, VOCAB, generator=generator, dtype=torch.float64)
    slots, ones = torch.arange(40), torch.ones(40, dtype=torch.long)
    places = Places(0 * ones, slots, MASK * ones, 7 * ones, 3 * ones, KeyedNoise(5), Memory())
    scored = Scored(logits, 0.8, 0.95, 0, MASK, None, places)
    scored.drawn()
    found = candidates_ahead(3, {"certainty": candidate_probability})(scored)
    for ahead in (1, 2, 3):
        expected = Scored(logits, 0.8, 0.95, 0, MASK, None, dataclasses.replace(places, steps=places.steps + ahead))
        drawn = expected.drawn()
        assert torch.equal(found[:, ahead - 1, 0], drawn.token.double())
        assert torch.equal(found[:, ahead - 1, 1], drawn.confidence)
        assert torch.equal(found[:, ahead - 1, 2], candidate_probability(expected))
        assert scored.later(ahead).sampling is scored.sampling
        assert not torch.equal(scored.later(ahead).token, scored.token)


# --- counts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(("draft_steps", "steps_per_block"), [(1, 8), (2, 8), (3, 4), (7, 8), (20, 8), (3, 1)])
def test_where_the_model_never_changes_its_opinion_every_guess_comes_true(
    draft_steps: int, steps_per_block: int, temperature: float
):
    """A block costs its first forward, of which nothing is known before, and one for each `1 + D` steps after it."""
    logits = torch.linspace(-2, 2, VOCAB).roll(5).tolist()
    model = TableModel(constant_table(logits), VOCAB, mask_token_id=MASK)
    settings = {"steps": steps_per_block * LENGTH // BLOCK, "temperature": temperature}
    drafted, plain = decoded(model, draft_steps, **settings), decoded(model, **settings)
    assert_lossless(drafted, plain)
    per_block = 1 + -(-(steps_per_block - 1) // (1 + draft_steps))
    assert drafted.nfe.tolist() == [per_block * LENGTH // BLOCK] * len(PROMPTS)
    assert drafted.guesses is not None
    assert torch.equal(drafted.guesses, plain.nfe - drafted.nfe)  # none in vain


def test_guesses_that_never_come_true_cost_no_forward_more():
    """Logits of every state are independent of those of every other one."""
    model = TableModel(random_table(3, 400, scale=3.0), 400, mask_token_id=MASK)
    drafted, plain = decoded(model, 3, steps=LENGTH), decoded(model, steps=LENGTH)
    assert_lossless(drafted, plain)
    assert torch.equal(drafted.nfe, plain.nfe)


def second_first(tokens: tuple[int, ...]) -> torch.Tensor:
    """Of a row's open slots the second one is the surest, then the first one, then the others from left to right."""
    logits = torch.zeros(len(tokens), VOCAB, dtype=torch.float64)
    places = [place for place, token in enumerate(tokens) if token == MASK]
    for rank, place in enumerate([*places[1:2], *places[:1], *places[2:]]):
        logits[place, 7] = 20 - 0.5 * rank
    return logits


@pytest.mark.parametrize(("draft_width", "per_block"), [(1, BLOCK), (2, 1 + BLOCK // 2), (3, 1 + BLOCK // 2)])
def test_another_order_is_a_guess_too(draft_width: int, per_block: int):
    """What was third is next, never what was second: the likely state is wrong, and the one beside it right."""
    model = TableModel(second_first, VOCAB, mask_token_id=MASK)
    plain = decoded(model, steps=LENGTH)
    drafted = decoded(model, 1, steps=LENGTH, draft_width=draft_width)
    assert_lossless(drafted, plain)
    assert drafted.nfe.tolist() == [per_block * LENGTH // BLOCK] * len(PROMPTS)


def test_guesses_of_several_slots_differ_by_the_weakest():
    """Two slots a step: the stronger one stays, and the weaker one gives way to the next."""
    model = TableModel(constant_table([0.0] * 7 + [5.0] + [0.0] * (VOCAB - 8)), VOCAB, mask_token_id=MASK)
    decoded(model, 1, [[9]], canvas_length=8, steps=4, draft_width=3)
    rows = [tokens[1:] for tokens in model.rows_seen if len(tokens) == 9]
    fed = [[place for place, token in enumerate(tokens) if token != MASK] for tokens in rows]
    assert fed[:5] == [[], [0, 1], [0, 1, 2, 3], [0, 1, 2, 4], [0, 1, 2, 5]]


@pytest.mark.parametrize("cfg_scale", [0.0, 1.0])
def test_rows_that_are_fed_are_forwards_and_guesses(cfg_scale: float):
    fed: list[int] = []
    model = denoiser()
    handle = model.model.register_forward_pre_hook(
        lambda *call: fed.append(len(call[-1]["input_ids"])), with_kwargs=True
    )
    try:
        drafted = decoded(model, 3, steps=LENGTH, cfg_scale=cfg_scale, draft_width=2)
    finally:
        handle.remove()
    assert drafted.guesses is not None
    assert sum(fed) == int(drafted.nfe.sum()) + int(drafted.guesses.sum()) * (2 if cfg_scale else 1)
    assert len(fed) == int(drafted.nfe.max()) // (2 if cfg_scale else 1)
    assert max(fed) > len(PROMPTS)


@pytest.mark.parametrize("cache", ["none", "prefix"])
def test_a_row_does_not_depend_on_its_batch(cache: str):
    settings = {"steps": LENGTH, "temperature": 0.8, "cache": cache, "stop_at_eos": True}
    together = decoded(denoiser(), 3, **settings)
    for row, prompt in enumerate(PROMPTS):
        alone = decoded(denoiser(), 3, [prompt], row_ids=[row], **settings)
        assert torch.equal(alone.canvas[0], together.canvas[row])
        assert int(alone.nfe) == int(together.nfe[row])
        assert torch.equal(alone.guesses, together.guesses[row : row + 1])


@pytest.mark.parametrize("cache", ["none", "dual"])
@pytest.mark.parametrize("capacity", [1, 2, 3])
def test_rows_that_wait_take_places_between_those_that_are_guessed(capacity: int, cache: str):
    """Of different lengths, so that rows leave and come while others are in the middle of a block."""
    plain = DecodingConfig(canvas_length=LENGTH, block_length=BLOCK, steps=LENGTH, temperature=0.8, cache=cache)
    config = dataclasses.replace(plain, draft_steps=2, draft_width=2)
    prompts = [[*range(3, 3 + n)] for n in (19, 2, 1, 20, 3)]
    together = RolloutEngine(denoiser()).generate(prompts, plain, num_generations=2, seed=1)
    drafted = RolloutEngine(denoiser(), max_batch_rows=capacity).generate(prompts, config, num_generations=2, seed=1)
    assert len(set(together.trace.steps.tolist())) > 1
    assert_lossless(drafted, together)


def test_rows_beside_each_other_leave_one_of_them_in_the_store():
    """Three times the same row with other tokens in it: each sees its own, and the one that is kept is what stays."""
    model, columns = denoiser(), torch.arange(6).expand(3, -1)
    tokens = torch.tensor([[5, 6, 7, 8, 9, 10], [5, 6, 7, 8, 11, 12], [5, 6, 7, 13, 14, 15]])
    store = KeyValueStore(model.config.num_hidden_layers, 2, 6)

    def logits(rows: torch.Tensor, start: int, **extra: Any) -> torch.Tensor:
        mask = torch.ones(len(rows), 1, 6 - start, 6).bool()
        with torch.no_grad():
            fed, positions = rows[:, start:], columns[: len(rows), start:]
            return model(input_ids=fed, attention_mask=mask, position_ids=positions, **extra, use_cache=False).logits

    store.place(torch.tensor([0, 1]), columns[:2])
    logits(tokens[[2, 0]], 0, past_key_values=store)
    before = store.layers[0].keys.clone()
    store.place(torch.tensor([1, 1, 1]), columns[:, 3:], kept=torch.tensor([False, True, False]))
    beside = logits(tokens, 3, past_key_values=store)
    first = store.layers[0].keys
    assert torch.equal(first[0], before[0]) and torch.equal(first[1, :, :3], before[1, :, :3])
    store.place(torch.tensor([1]), columns[:1, 3:])
    kept = [layer.keys[1].clone() for layer in store.layers]
    again = logits(tokens[1:2], 3, past_key_values=store)
    torch.testing.assert_close(again[0], beside[1], rtol=0, atol=1e-12)
    for layer, keys in zip(store.layers, kept, strict=True):
        torch.testing.assert_close(layer.keys[1], keys, rtol=0, atol=1e-12)
    for row in (0, 2):  # each alone in a store that was filled in the same way
        other = KeyValueStore(model.config.num_hidden_layers, 1, 6)
        other.place(torch.tensor([0]), columns[:1])
        logits(tokens[:1], 0, past_key_values=other)
        other.place(torch.tensor([0]), columns[:1, 3:])
        alone = logits(tokens[row : row + 1], 3, past_key_values=other)
        torch.testing.assert_close(alone[0], beside[row], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"draft_steps": -1}, "draft_steps=-1.*0 .off. or larger"),
        ({"draft_steps": 1.5}, "draft_steps=1.5.*integer"),
        ({"draft_steps": 2, "draft_width": 0}, "draft_width=0.*must be 1"),
        ({"draft_width": 2}, "draft_width=2.*draft_steps=0"),
        ({"draft_steps": 2, "draft_width": 1.5}, "draft_width=1.5.*integer"),
        (
            {"draft_steps": 2, "cache": "prefix", "cache_args": {"refresh_steps": 2}},
            "draft_steps=2.*cache='prefix'.*refresh_steps.*allowed: 'none', and 'prefix'",
        ),
        ({"draft_steps": 2, "cache": "dual_masked"}, "draft_steps=2.*cache='dual_masked'"),
        ({"draft_steps": 2, "schedule": "klass"}, "draft_steps=2.*schedule='klass'.*more than the tokens"),
        ({"draft_steps": 2, "schedule": "wino"}, "draft_steps=2.*schedule='wino'"),
        ({"draft_steps": 2, "schedule": "dream_origin"}, "draft_steps=2.*schedule='dream_origin'"),
        (
            {"draft_steps": 2, "schedule": "dream_entropy", "schedule_args": {"alg_temp": 0.1}},
            "draft_steps=2.*schedule='dream_entropy'",
        ),
        (
            {"draft_steps": 2, "schedule": "entropy_bound_canvas", "temperature": 0.8, "cache": "none"},
            "draft_steps=2.*canvas",
        ),
    ],
)
def test_what_cannot_be_guessed_is_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        DecodingConfig(**settings)
