"""What a request may say, what is decoded together, and that a row is the same in any company."""

from __future__ import annotations

import threading
from dataclasses import fields, replace

import pytest

from rl4dlm import (
    DecodingConfig,
    RolloutEngine,
    encode_prompt,
    tiny_diffusion_gemma,
    tiny_llada,
    tiny_sdar,
    tiny_tokenizer,
)
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.rollout.decoding import available_schedules, schedule_arguments
from rl4dlm.rollout.stopping import text_ends
from rl4dlm.serving.answers import Answer
from rl4dlm.serving.fields import BadRequest, Served, read, settles
from rl4dlm.serving.texts import Reader
from rl4dlm.serving.worker import Done, Failed, Job, Part, Refused, Worker

DECODING = DecodingConfig(canvas_length=12, steps=12, block_length=4, temperature=1.0)
PROMPTS = [f"{number} and {'more ' * (number % 5)}" for number in range(20)]


@pytest.fixture(scope="module")
def served() -> Served:
    engine = RolloutEngine(tiny_llada(initializer_range=0.3).double())
    return Served(engine.model, tiny_tokenizer(), engine.spec, "tiny", DECODING, max_choices=8)


@pytest.fixture
def engine(served):
    """An engine that counts its calls, and waits before each of them until it may."""
    engine = RolloutEngine(served.model)
    engine.calls, engine.gate, decode = [], threading.Event(), engine.generate
    engine.gate.set()

    def generate(prompts, config, **options):
        engine.gate.wait(30)
        engine.calls.append(len(prompts))
        return decode(prompts, config, **options)

    engine.generate = generate
    return engine


@pytest.fixture
def worker(engine):
    worker = Worker(engine, batch_rows=32, max_waiting=30, gather=0.0)
    yield worker
    engine.gate.set()
    worker.close()


class Told:
    """What a job is told, and its end."""

    def __init__(self, worker, ask, **options):
        self.parts, self.ended, self.outcome = [], threading.Event(), None
        self.job = Job(ask, self, **options)
        worker.submit(self.job)

    def __call__(self, event):
        if isinstance(event, Part):
            self.parts.append(event)
        else:
            self.outcome = event
            self.ended.set()

    def wait(self):
        assert self.ended.wait(60)
        return self.outcome


def ask(served, *, chat=False, **body):
    return read(served, {"model": "tiny", "seed": 3, **body}, chat=chat)


def held(engine, worker, served):
    """Keeps the worker busy with a request until the engine's gate opens."""
    engine.gate.clear()
    first = Told(worker, ask(served, prompt="first"))
    while worker._waiting:  # until the worker has taken it up
        pass
    return first


BAD = [
    ({"model": "other"}, "model", "model='other' is not served here; allowed: 'tiny'"),
    ({"model": 3}, "model", "model=3 is not allowed"),
    ({"prompt": ""}, "prompt", "prompt[0] is empty"),
    ({"prompt": 7}, "prompt", "prompt=7 is not allowed; it must be a text, a list of texts"),
    ({"prompt": ["a", 1]}, "prompt", "prompt=['a', 1] is not allowed"),
    ({"prompt": []}, "prompt", "prompt=[] is not allowed"),
    ({"prompt": [5, 10_000]}, "prompt", "prompt[0] has a token id outside 0.."),
    ({"prompt": "<mask>"}, "prompt", "prompt[0] contains the mask token"),
    ({"prompt": "x" * 1020}, "prompt", "prompt[0] has 1020 tokens, which with canvas_length=12 exceeds"),
    ({"prompt": ["a"] * 9}, "prompt", "prompt has 9 entries; at most 8 are allowed"),
    ({"prompt": ["a"] * 3, "n": 3}, "n", "n=3 with 3 prompts is not allowed; at most 8"),
    ({"n": 9}, "n", "n=9 is not allowed; it must be a whole number, 1 to 8"),
    ({"n": "2"}, "n", "n='2' is not allowed"),
    ({"n": True}, "n", "n=True is not allowed"),
    ({"max_tokens": 0}, "max_tokens", "max_tokens=0 is not allowed; it must be a whole number, 1 or larger"),
    ({"temperature": "hot"}, "temperature", "temperature='hot' is not allowed; it must be a number"),
    ({"temperature": -1}, "temperature", "temperature=-1"),
    ({"top_p": 2}, "top_p", "top_p=2"),
    ({"stop": ""}, "stop", "stop='' is not allowed"),
    ({"stop": [1]}, "stop", "stop=[1] is not allowed"),
    ({"seed": 1.5}, "seed", "seed=1.5 is not allowed"),
    ({"stream": "yes"}, "stream", "stream='yes' is not allowed; it must be true or false"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "with stream=true"),
    ({"logprobs": 5}, "logprobs", "logprobs=5 is not allowed; it must be true or false, or 0"),
    ({"echo": True}, "echo", "echo=True is not supported; allowed: null or false"),
    ({"presence_penalty": 0.5}, "presence_penalty", "presence_penalty=0.5 is not supported; allowed: null or 0"),
    ({"best_of": 2}, "best_of", "best_of=2 is not supported"),
    ({"messages": []}, "messages", "messages is not a field of this request; allowed: model, max_tokens"),
    ({"decoding": 3}, "decoding", "decoding=3 is not allowed; it must be an object"),
    ({"decoding": {"schedule": "no_such"}}, "decoding", "schedule='no_such'"),
    ({"decoding": {"schedule": 4}}, "decoding", "schedule"),
    ({"decoding": {"steps": 5}}, "decoding", "steps=5 cannot be shared out over 3 blocks"),
    ({"decoding": {"canvas_length": 4000}}, "prompt", "exceeds the model's 1024 positions"),
    ({"decoding": {"suppress_token_ids": 5}}, "decoding", "decoding={'suppress_token_ids': 5} is not allowed"),
    ({"decoding": {"schedule_args": {"x": 1}}}, "decoding", "schedule_args has unknown settings ['x']"),
    ({"decoding": {"record": ["fillings"]}}, "decoding", "decoding has no setting 'record'; allowed: canvas_length"),
    ({"decoding": {"draft_steps": 10**6}}, "decoding", "decoding has no setting 'draft_steps'"),
    ({"temperature": 10**400}, "temperature", "is not allowed; it must be 2147483647 at most"),
    ({"decoding": {"temperature": 1}}, "decoding", "temperature is a field of the request itself"),
]


@pytest.mark.parametrize(("body", "field", "said"), BAD, ids=[str(body)[:50] for body, _, _ in BAD])
def test_a_bad_request_is_told_in_one_sentence(served, body, field, said):
    with pytest.raises(BadRequest) as caught:
        ask(served, **{"prompt": "a", **body})
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.field == field
    assert caught.value.status == (404 if body == {"model": "other"} else 400)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"messages": "hello"}, "messages is 'hello', but must be a list"),
        ({"messages": []}, "messages is an empty list"),
        ({"messages": [{"role": "user"}]}, "has no content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only text is supported"),
        ({"tools": [{"type": "function"}]}, "tools="),
        ({"response_format": {"type": "json_object"}}, "allowed: null or"),
        ({"top_logprobs": 2}, "top_logprobs=2 is not supported"),
        ({"logprobs": 0}, "logprobs=0 is not allowed"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "differ; give one of them"),
        ({"chat_template_kwargs": {"tokenize": False}}, "messages cannot be rendered"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "variables of the server's own template"),
        ({"prompt": "a"}, "prompt is not a field of this request"),
    ],
    ids=str,
)
def test_a_bad_chat_request_is_told_in_one_sentence(served, body, said):
    with pytest.raises(BadRequest) as caught:
        ask(served, chat=True, **{"messages": [{"role": "user", "content": "a"}], **body})
    assert said in str(caught.value) and caught.value.status == 400


def test_a_body_that_is_no_object_and_a_model_without_an_end(served):
    with pytest.raises(BadRequest, match="the body is \\[1\\], but must be a JSON object"):
        read(served, [1], chat=False)
    endless = replace(served, spec=replace(served.spec, eos_token_ids=()))
    with pytest.raises(BadRequest, match="need an end-of-sequence token"):
        ask(endless, prompt="a", stop="x")


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        ("guided", {"guide": "some/model"}),
        ("edlm", {"energy": {"a": 1}}),
        ("learn2pd", {"acceptance": 0.5, "filter_path": "/etc/passwd"}),
        ("ctrldiff", {"policy": "/etc/passwd"}),
        ("pc_sampler", {"frequencies": "/etc/passwd"}),
        ("pc_sampler", {"frequencies": {"1000000000000": 1}}),
    ],
    ids=str,
)
def test_a_request_cannot_name_files_and_models(served, schedule, values):
    with pytest.raises(BadRequest, match="which a request may not set"):
        ask(served, prompt="a", decoding={"schedule": schedule, "schedule_args": values})


def test_the_servers_own_files_and_words_can_be_named(served, tmp_path):
    counts = tmp_path / "counts.json"
    counts.write_text('{"5": 3}')
    own = {"frequencies": str(counts)}
    base = replace(served, decoding=replace(DECODING, schedule="pc_sampler", schedule_args=own))
    assert ask(base, prompt="a").config.schedule_args == own
    more = {**own, "decay": 0.5}
    assert ask(base, prompt="a", decoding={"schedule_args": more}).config.schedule_args == more
    words = {"schedule": "rcr", "schedule_args": {"confidence": "nonsense"}}
    with pytest.raises(BadRequest, match="confidence='nonsense'"):
        ask(served, prompt="a", decoding=words)
    # Settings that are words. One that names a file must not be among them: its type has to say more than `str`.
    found = {
        (name, setting.name)
        for name in available_schedules()
        for setting in fields(schedule_arguments(name))
        if setting.type == "str"
    }
    assert found == {
        *((name, "counts") for name in ("dream_entropy", "dream_maskgit_plus", "dream_topk_margin", "rcr")),
        ("edlm", "order"), ("guided", "accept"), ("rcr", "confidence"), ("rcr", "update"), ("s2d2", "policy"),
    }  # fmt: skip


def test_a_request_sets_its_own_decoding(served):
    base = replace(
        served, decoding=replace(DECODING, schedule="threshold", steps=None, schedule_args={"threshold": 0.5})
    )
    same = ask(base, prompt="a", decoding={"schedule": "threshold"}).config
    assert same.schedule_args == {"threshold": 0.5}
    other = ask(base, prompt="a", top_k=3, decoding={"schedule": "low_confidence", "steps": 6}).config
    assert (other.schedule, other.schedule_args, other.steps, other.top_k) == ("low_confidence", {}, 6, 3)
    longer = ask(served, prompt="a", decoding={"canvas_length": 24}).config
    assert (longer.canvas_length, longer.steps) == (24, None)
    assert ask(served, prompt="a", max_tokens=100).ends is None  # it is the canvas that ends rows
    assert ask(served, prompt="a", stop=None, n=None, echo=False, user="me").n == 1


def test_randomness_is_the_requests_own(served):
    first, again = ask(served, prompt="a", n=2), ask(served, prompt=["a", "b"])
    assert first.keys[0] == again.keys[0] and len({*first.keys, *again.keys}) == 3
    assert len(set(ask(served, prompt=["a", "a"]).keys)) == 2  # of equal prompts in one request
    assert ask(served, prompt="a", seed=4).keys != ask(served, prompt="a").keys
    assert ask(served, prompt="a", seed=None).seed != ask(served, prompt="a", seed=None).seed
    assert ask(replace(served, seed=9), prompt="a", seed=None).seed == 9


def test_a_request_alone_and_among_twenty_is_the_same(served, engine, worker, global_rng_untouched):
    alone = [Told(worker, ask(served, prompt=prompt)).wait().rows for prompt in PROMPTS]
    first = held(engine, worker, served)
    told = [Told(worker, ask(served, prompt=prompt)) for prompt in reversed(PROMPTS)]
    engine.gate.set()
    together = [one.wait().rows for one in reversed(told)]
    first.wait()
    assert engine.calls == [1] * 21 + [20]
    assert [rows[0].ids for rows in together] == [rows[0].ids for rows in alone]
    assert len({tuple(rows[0].ids) for rows in alone}) > 15
    for ours, theirs in zip(together, alone, strict=True):
        assert ours[0].steps == theirs[0].steps
        assert ours[0].log_probs == pytest.approx(theirs[0].log_probs, abs=1e-9)


def test_rows_are_the_engines_own(served, worker):
    asked = ask(served, prompt="what is it", n=2)
    rows = Told(worker, asked).wait().rows
    ids = encode_prompt(served.tokenizer, "what is it")
    rollout = RolloutEngine(served.model).generate([ids], DECODING, num_generations=2, row_ids=asked.keys)
    assert [row.ids for row in rows] == rollout.completion_ids
    assert rows[0].forwards == int(rollout.nfe[0]) and rows[0].num_steps == int(rollout.trace.steps[0])
    steps, drawn = rollout.trace.commit_step[1], rollout.trace.log_prob[1]
    assert rows[1].steps == steps[rollout.valid[1]].tolist()
    assert rows[1].sampled_log_probs == drawn[rollout.valid[1]].tolist()


def test_what_is_decoded_together(served, engine, worker):
    first = held(engine, worker, served)
    bodies = [{}, {"decoding": {"steps": 6}}, {"stop": "a"}, {}, {"prompt": "other"}, {"n": 8}]
    told = [Told(worker, ask(served, **{"prompt": "a", **body})) for body in bodies]
    given_up = Told(worker, ask(served, prompt="given up"))
    given_up.job.cancelled = True
    engine.gate.set()
    found = [one.wait() for one in [first, *told]][1:]
    assert isinstance(given_up.wait(), Failed)
    assert found[0].rows[0].ids == found[3].rows[0].ids == found[5].rows[0].ids
    assert engine.calls == [1, 9, 1, 1]  # equal rows of equal settings once: 1 + 1 (the same) + 1 + 7 more of n=8


def test_a_call_that_fails_is_tried_request_by_request(served, engine, worker, caplog):
    decode = engine.generate

    def generate(prompts, config, **options):
        if any(len(prompt) == 5 for prompt in prompts):
            raise RuntimeError(f"no memory for {prompts}")
        return decode(prompts, config, **options)

    first = held(engine, worker, served)
    engine.generate = generate
    told = [Told(worker, ask(served, prompt=prompt)) for prompt in ("abc", "abcde", "xyz")]
    engine.gate.set()
    first.wait()
    assert [type(one.wait()) for one in told] == [Done, Failed, Done]
    assert told[1].outcome.message == "the engine failed with RuntimeError"
    assert "RuntimeError" in caplog.text and "no memory" not in caplog.text


def test_the_worker_refuses(served, engine, worker):
    worker.max_waiting = 1
    first, waits = held(engine, worker, served), Told(worker, ask(served, prompt="waits"))
    with pytest.raises(Refused, match="1 requests wait already") as caught:
        Told(worker, ask(served, prompt="one too many"))
    assert caught.value.status == 429
    worker.draining = True
    with pytest.raises(Refused, match="shutting down") as caught:
        Told(worker, ask(served, prompt="too late"))
    assert caught.value.status == 503 and worker.unfinished == 2
    engine.gate.set()
    assert isinstance(first.wait(), Done) and isinstance(waits.wait(), Done)


@pytest.mark.parametrize("body", [{}, {"max_tokens": 5}, {"stop": ["e", "zz"]}, {"decoding": {"stop_at_eos": False}},
                                  {"decoding": {"schedule": "wino"}}], ids=str)  # fmt: skip
def test_the_parts_of_a_stream_are_the_whole_text(served, worker, body):
    for prompt in PROMPTS[:6]:
        asked = ask(served, prompt=prompt, stream=True, n=2, **body)
        told = Told(worker, asked, parts=True)
        rows = told.wait().rows
        answer = Answer(served, asked, "1", 0)
        chunks = [chunk for part in told.parts for chunk in answer.part(part)]
        early = len(chunks)
        chunks += answer.closing(rows)
        for number, row in enumerate(rows):
            pieces = [c["choices"][0]["text"] for c in chunks if c["choices"][0]["index"] == number]
            assert "".join(pieces) == answer.reader.text(row.ids)
        # By block: no row is told of more often than it has blocks.
        assert 0 < len(told.parts) <= 6 and early <= len(told.parts)


@pytest.mark.parametrize("make", [tiny_sdar, tiny_diffusion_gemma])
def test_other_families_are_served(make):
    engine = RolloutEngine(make())
    length = 2 * engine.spec.block_length
    served = Served(engine.model, tiny_tokenizer(), engine.spec, "tiny", DecodingConfig(canvas_length=length))
    if engine.spec.noise == "uniform":
        with pytest.raises(BadRequest, match="decodes models with noise='mask'"):
            ask(served, prompt="a")
        served = replace(
            served, decoding=DecodingConfig(canvas_length=length, schedule="entropy_bound_canvas", temperature=0.8)
        )
    worker = Worker(engine, batch_rows=4, max_waiting=4, gather=0.0)
    asked = ask(served, prompt="what is it", stream=True)
    told = Told(worker, asked, parts=settles(asked.config, served.tokenizer))
    (row,) = told.wait().rows
    worker.close()
    assert bool(told.parts) == (engine.spec.noise == "mask") and 0 < len(row.ids) <= length
    answer = Answer(served, asked, "1", 0)
    chunks = [chunk for part in told.parts for chunk in answer.part(part)] + list(answer.closing([row]))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == answer.reader.text(row.ids)


def test_what_is_held_back(served):
    tokenizer, spec = tiny_tokenizer(), DiffusionSpec.of(served.model)
    ends, shown = text_ends(tokenizer, ["stop", "<eos>"], 9)
    reader = Reader.of(tokenizer, spec, ends, shown)

    def ids(text):
        return encode_prompt(tokenizer, text)

    assert [reader.settled(ids(text)) for text in ("abc", "abcs", "abcsto", "abstopx", "absto ")] == [
        "abc", "abc", "abc", "ab", "absto ",
    ]  # fmt: skip
    assert reader.settled(ids("0123456789")) == "012345678"
    assert [reader.finish(ids(text)) for text in ("abc<eos>", "abcstop", "012345678")] == ["stop", "stop", "length"]
