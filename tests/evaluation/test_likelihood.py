"""`log_likelihood` against enumeration in float64, and that nothing but a request's own tokens matters for it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

from rl4dlm import (
    DecodingConfig,
    RolloutEngine,
    completion_texts,
    encode_prompt,
    log_likelihood,
    tiny_diffusion_gemma,
    tiny_dream,
    tiny_llada,
    tiny_sdar,
    tiny_tokenizer,
)
from rl4dlm.evaluation.likelihood import encode_pair
from rl4dlm.likelihood.elbo import ELBO
from tests.rollout.table_model import TableModel, random_table

TOKENS, MASK, PROMPT = 3, 3, [1]


def table_model():
    """Random conditionals of three tokens; the mask token has no probability."""
    table = random_table(5, TOKENS + 1)

    def without_mask(tokens):
        logits = table(tokens).clone()
        logits[:, MASK] = -1e4
        return logits

    return TableModel(without_mask, TOKENS + 1, mask_token_id=MASK), without_mask


def by_order(table, canvas, order):
    """Log-probability of writing a canvas in an order, by the definition."""
    state, total = [MASK] * len(canvas), 0.0
    for slot in order:
        total += float(table((*PROMPT, *state))[len(PROMPT) + slot].log_softmax(-1)[canvas[slot]])
        state[slot] = canvas[slot]
    return total


def test_left_to_right_is_the_exact_chain():
    model, table = table_model()
    canvases = list(itertools.product(range(TOKENS), repeat=3))
    found = log_likelihood(model, [PROMPT] * 27, canvases, estimator="left_to_right", batch_rows=4)
    assert found.values == pytest.approx([by_order(table, canvas, range(3)) for canvas in canvases], abs=1e-12)
    assert sum(map(math.exp, found.values)) == pytest.approx(1.0, abs=1e-12)
    assert (found.estimator, found.kind, found.standard_errors, found.tokens) == (
        "left_to_right",
        "exact",
        [0.0] * 27,
        [3] * 27,
    )


def test_the_bound_is_the_mean_over_orders():
    model, table = table_model()
    canvases = [(0, 2, 1), (1, 1, 0), (2, 0)]
    exact, likelihood = [], []
    for canvas in canvases:
        orders = [by_order(table, canvas, order) for order in itertools.permutations(range(len(canvas)))]
        exact.append(sum(orders) / len(orders))
        likelihood.append(math.log(sum(map(math.exp, orders)) / len(orders)))
    found = log_likelihood(model, [PROMPT] * 3, canvases, estimator="elbo", num_views=2000, seed=3, batch_rows=4000)
    assert found.kind == "lower bound" and found.estimator == "elbo"
    for value, error, mean, above in zip(found.values, found.standard_errors, exact, likelihood, strict=True):
        assert 0 < error < 0.1 and abs(value - mean) < 4 * error and mean < above
    assert log_likelihood(model, [PROMPT] * 3, canvases).estimator == "elbo"  # full attention
    (single,) = log_likelihood(model, [PROMPT], [[2]]).values  # of one token there is one order
    assert single == pytest.approx(by_order(table, [2], [0]), abs=1e-12)
    blocks = log_likelihood(model, [PROMPT], [[0, 2]], estimator="block_elbo", block_length=1, num_views=8)
    assert blocks.values == pytest.approx([by_order(table, [0, 2], [0, 1])], abs=1e-12)  # blocks of one token
    hidden = log_likelihood(model, [PROMPT], [[0, 2]], estimator="mean_field")
    first = table((*PROMPT, MASK, MASK))[1:].log_softmax(-1)
    assert hidden.values == pytest.approx([float(first[0, 0] + first[1, 2])], abs=1e-12)
    assert hidden.kind == "no bound"


REQUESTS = [("ab", "c"), ("a longer prompt", "1 2 3"), ("x", "an answer of its own"), ("ab", "cd"), ("ab", "c")]


@pytest.mark.parametrize("make", [tiny_llada, tiny_dream, tiny_sdar, tiny_diffusion_gemma])
def test_order_company_and_batches_change_nothing(make, global_rng_untouched):
    model, tokenizer = make(), tiny_tokenizer()
    model = model if make is tiny_diffusion_gemma else model.double()  # its experts run in float32 at most
    close = 1e-4 if make is tiny_diffusion_gemma else 1e-9
    prompts, answers = map(list, zip(*REQUESTS, strict=True))

    def values(order, **settings):
        chosen = [prompts[i] for i in order], [answers[i] for i in order]
        return log_likelihood(model, *chosen, tokenizer=tokenizer, num_views=4, **settings)

    whole = values(range(5), batch_rows=64)
    assert whole.values[0] == whole.values[4]
    assert whole.estimator == ("left_to_right" if make is tiny_sdar else "elbo")
    for order, rows in (([4, 3, 2, 1, 0], 2), ([2, 1], 1), ([3], 7)):
        other = values(order, batch_rows=rows)
        assert other.values == pytest.approx([whole.values[i] for i in order], abs=close)
    if make is not tiny_sdar:
        assert values(range(5), seed=1).values != whole.values


@pytest.mark.parametrize("make", [tiny_sdar, tiny_llada])
def test_left_to_right_is_what_the_engine_draws_with(make):
    model, tokenizer = make().double(), tiny_tokenizer()
    prompts = [encode_prompt(tokenizer, text) for text in ("abc", "x")]
    config = DecodingConfig(canvas_length=8, steps=8, schedule="left_to_right", temperature=1.0, stop_at_eos=False)
    engine = RolloutEngine(model)
    rollout = engine.generate(prompts, config, num_generations=2, seed=4)
    assert rollout.trace.commit_step.tolist() == [list(range(8))] * 4
    found = log_likelihood(model, rollout.prompt_ids, rollout.canvas.tolist(), estimator="left_to_right")
    assert found.values == pytest.approx(rollout.trace.raw_log_prob.sum(-1).tolist(), abs=1e-9)
    texts = completion_texts(tokenizer, rollout, engine.spec)
    assert [tokenizer.decode(row, skip_special_tokens=True) for row in rollout.completion_ids] == texts


def test_an_adapter_scores_as_the_model_that_it_makes():
    model = tiny_llada().double()
    settings = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, settings).train()
    prompts, answers = [[7, 8], [9]], [[10, 11, 12], [13]]
    found = log_likelihood(adapted, prompts, answers, num_views=4).values
    assert adapted.training
    with adapted.disable_adapter():
        bare = log_likelihood(adapted, prompts, answers, num_views=4).values
    merged = adapted.merge_and_unload()
    assert found == pytest.approx(log_likelihood(merged, prompts, answers, num_views=4).values, abs=1e-9)
    assert found != pytest.approx(bare, abs=1e-6)


def test_texts_are_encoded_together():
    tokenizer = tiny_tokenizer()
    assert encode_pair(tokenizer, "a: ", "b") == (tokenizer.encode("a:"), tokenizer.encode(" b"))
    model = tiny_llada().double()
    text = log_likelihood(model, ["a: "], ["b"], tokenizer=tokenizer)
    ids = log_likelihood(model, [tokenizer.encode("a:")], [tokenizer.encode(" b")])
    assert text == ids
    chat = [{"role": "user", "content": "q"}]
    rendered = log_likelihood(model, [encode_prompt(tokenizer, chat)], [tokenizer.encode("b")])
    assert log_likelihood(model, [chat], ["b"], tokenizer=tokenizer) == rendered


@pytest.mark.parametrize(
    ("arguments", "settings", "said"),
    [
        ((["a"], ["b"]), {"tokenizer": None}, "request 0 holds text or messages"),
        ((["a"], ["b", "c"]), {}, "1 prompts and 2 continuations"),
        ((["a"], [""]), {}, "request 0: its continuation has no tokens"),
        (([[7]], [[10_000]]), {}, "request 0: its continuation has an id outside"),
        (([[7] * 5000], [[7]]), {}, "request 0 has 5001 tokens"),
        ((["a"], ["b"]), {"estimator": "best"}, "estimator='best' is not known; choose one of auto, left_to_right"),
        ((["a"], ["b"]), {"estimator": "block_elbo"}, "needs block_length"),
        ((["a"], ["b"]), {"block_length": 4}, "block_length=4 has no meaning for estimator='auto'"),
        ((["a"], ["b"]), {"num_views": 0}, "num_views=0 is not allowed"),
        ((["a"], ["b"]), {"batch_rows": 0}, "batch_rows=0 is not allowed"),
    ],
)
def test_what_is_refused(arguments, settings, said):
    with pytest.raises(ValueError, match=said):
        log_likelihood(tiny_llada(), *arguments, **{"tokenizer": tiny_tokenizer(), **settings})


def test_estimators_of_ones_own_are_named_by_their_class():
    found = log_likelihood(tiny_llada(), [[7]], [[8, 9]], estimator=ELBO(4, "count_with_zero"))
    assert (found.estimator, found.kind, found.settings["form"]) == ("ELBO", "lower bound", "count_with_zero")
    with pytest.raises(ValueError, match="estimator=.* is for noise='mask', the model has 'uniform'"):
        log_likelihood(tiny_diffusion_gemma(), [[7]], [[8, 9]], estimator=ELBO())
    assert not torch.is_inference_mode_enabled()
