"""Rows end where the caller says: at a text, with what comes before it unchanged and nothing behind it."""

from __future__ import annotations

import pytest
import torch

from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.models.tiny import tiny_diffusion_gemma, tiny_llada, tiny_sdar, tiny_tokenizer
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.stopping import Ends, StopStrings, stop_places, text_ends

TOKENIZER = tiny_tokenizer()
PROMPTS = [TOKENIZER.encode(text) for text in ("abc", "d", "longer prompt", "x", "y1")]


def text_of(ids):
    return TOKENIZER.decode(ids)


def generate(model, config, stop=None, **settings):
    engine = RolloutEngine(model, max_batch_rows=settings.pop("max_batch_rows", None))
    return engine.generate(PROMPTS, config, row_ids=range(7, 7 + len(PROMPTS)), stop=stop, **settings)


def pairs_of(rollout):
    """Two characters that stand together in the middle of the first row and of no other place before."""
    text = text_of(rollout.completion_ids[0])
    return next(text[i : i + 2] for i in range(3, len(text) - 4) if text.find(text[i : i + 2]) == i)


def test_stop_strings_end_at_the_token_that_completes_them():
    stop = StopStrings(text_of, ("cd", "xyz"))
    assert stop(TOKENIZER.encode("abcdef")) == 4
    assert stop(TOKENIZER.encode("abc")) is None and stop([]) is None
    assert stop(TOKENIZER.encode("xyzcd")) == 3
    assert stop.cut("abcdef") == "ab" and stop.cut("none") == "none" and stop.cut("cdxyz") == ""
    for strings in ((), ("",), ("a", "")):
        with pytest.raises(ValueError, match="strings="):
            StopStrings(text_of, strings)


def test_texts_and_a_number_of_tokens_end_rows():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("abc<eos>def")["input_ids"]
    ends, shown = text_ends(tokenizer, ["ef", "<eos>d"], None)
    assert shown.strings == ("ef",)  # special tokens are not among what is shown
    assert ends(ids) == 5 and ends(ids[:4]) is None
    assert Ends(ends.stops, 3)(ids) == 3 and Ends((), 3)(ids[:2]) is None
    assert text_ends(tokenizer, [], None) == (None, None)
    assert text_ends(tokenizer, [], 2)[0](ids) == 2
    # The name of a special token that is spelled out is no text.
    assert text_ends(tokenizer, ["eos"], None)[0](ids) is None
    with pytest.raises(ValueError, match="at least one character"):
        text_ends(tokenizer, [""], None)


def test_places_look_at_what_is_written_without_a_gap_and_not_behind_an_end():
    end = TOKENIZER.eos_token_id
    canvas = torch.tensor([TOKENIZER.encode("abcd")] * 3 + [[end, *TOKENIZER.encode("bcd")]])
    written = torch.ones_like(canvas).bool()
    written[1, 1] = written[2, 3] = False
    places = stop_places(StopStrings(text_of, ("c",)), canvas, written, [end])
    assert places.tolist() == [3, -1, 3, -1]


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (tiny_llada, {"schedule": "left_to_right", "steps": 16}),
        (tiny_llada, {"schedule": "low_confidence", "steps": 8, "block_length": 4}),
        (tiny_llada, {"schedule": "left_to_right", "steps": 16, "draft_steps": 2}),
        (tiny_llada, {"schedule": "wino", "block_length": 4}),
        (tiny_sdar, {"schedule": "low_confidence", "steps": 16}),
    ],
)
def test_a_row_is_the_same_up_to_its_stop(make, settings):
    model = make().double()
    config = DecodingConfig(canvas_length=16, temperature=1.0, stop_at_eos=False, **settings)
    free = generate(model, config, seed=2)
    stop = StopStrings(text_of, (pairs_of(free), "\n"))
    found = generate(model, config, stop, seed=2, max_batch_rows=2)
    ends = set(DiffusionSpec.of(model).eos_token_ids)
    assert found.stop_reason[0] == "stop"
    for row in range(len(PROMPTS)):
        before = free.completion_ids[row]
        place = stop([token for token in before if token not in ends])
        kept = before if place is None else before[:place]
        assert found.completion_ids[row][: len(kept)] == kept
        if place is None:
            assert found.stop_reason[row] == free.stop_reason[row] and found.canvas[row].equal(free.canvas[row])
            continue
        assert set(found.canvas[row, place:].tolist()) <= ends
        assert found.trace.commit_step[row, place:].tolist() == [-1] * (16 - place)
        assert found.trace.commit_step[row, :place].equal(free.trace.commit_step[row, :place])
        assert (found.trace.raw_log_prob[row, place:] == 0).all()
        assert found.stop_reason[row] == "stop"
    # The first row ends when what it waits for is there, and not at the end of the canvas.
    if settings.get("schedule") != "wino" and not settings.get("draft_steps"):
        place = int((found.trace.commit_step[0] >= 0).sum())
        last = int(free.trace.commit_step[0, :place].max())
        assert int(found.trace.steps[0]) == int(found.nfe[0]) == last + 1 < int(free.nfe[0])


def test_canvases_of_random_tokens_end_with_the_canvas():
    model = tiny_diffusion_gemma()
    length = DiffusionSpec.of(model).block_length
    config = DecodingConfig(
        canvas_length=3 * length, schedule="entropy_bound_canvas", temperature=0.8, stop_at_eos=False
    )
    free = generate(model, config)
    text = text_of(free.canvas[0].tolist())
    stop = StopStrings(text_of, (text[2:4],))
    found = generate(model, config, stop)
    place = stop(free.canvas[0].tolist())
    assert found.canvas[0, :place].equal(free.canvas[0, :place])
    assert set(found.canvas[0, place:].tolist()) <= set(DiffusionSpec.of(model).eos_token_ids)
    assert found.stop_reason[0] == "stop" and found.nfe[0] < free.nfe[0]


def test_a_model_without_end_is_refused():
    model = tiny_llada()
    model.config.diffusion = {**model.config.diffusion, "eos_token_ids": []}
    with pytest.raises(ValueError, match="stop needs an end-of-sequence token"):
        generate(model, DecodingConfig(canvas_length=4), StopStrings(text_of, ("a",)))
