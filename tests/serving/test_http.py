"""The server as clients see it: OpenAI's client, streams, refusals, and an end that loses nothing."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml

from rl4dlm import DecodingConfig, RolloutEngine, encode_prompt, save_denoiser, tiny_llada, tiny_tokenizer
from rl4dlm.cli import main
from rl4dlm.serving.fields import Served
from rl4dlm.serving.worker import Worker

for module in ("fastapi", "uvicorn", "httpx", "openai"):
    pytest.importorskip(module, reason="the extra serve, or a client for its tests, is not installed")

import httpx  # noqa: E402
import openai  # noqa: E402

from rl4dlm.serving.app import make_app  # noqa: E402
from rl4dlm.serving.server import Server, bound_socket  # noqa: E402

DECODING = DecodingConfig(canvas_length=12, steps=12, block_length=4, temperature=1.0)
TALK = [{"role": "system", "content": "be short"}, {"role": "user", "content": "what is it"}]


class Running:
    """A server in a thread, on a free port. `gate`: the engine waits for it before each call."""

    def __init__(self):
        engine = RolloutEngine(tiny_llada(initializer_range=0.3).double())
        self.gate, self.calls, decode = threading.Event(), [], engine.generate
        self.gate.set()

        def generate(prompts, config, **options):
            self.calls.append(len(prompts))
            assert self.gate.wait(60)
            return decode(prompts, config, **options)

        engine.generate = generate
        self.served = Served(engine.model, tiny_tokenizer(), engine.spec, "org/tiny", DECODING, max_choices=8)
        self.worker = Worker(engine, batch_rows=32, max_waiting=64, gather=0.0)
        self.server = Server(make_app(self.served, self.worker), self.worker)
        self.listener = bound_socket("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]})
        self.thread.start()
        wait_for(lambda: self.server.started)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def complete(self, prompt, **settings):
        return self.client.completions.create(model="org/tiny", prompt=prompt, **{"seed": 3, **settings})

    def talk(self, **settings):
        return self.client.chat.completions.create(model="org/tiny", messages=TALK, **{"seed": 3, **settings})

    def end(self):
        self.gate.set()
        self.server.handle_exit(signal.SIGTERM, None)
        self.thread.join(60)
        assert not self.thread.is_alive()
        self.worker.close()
        self.listener.close()


def wait_for(condition):
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come to that in a minute")


@pytest.fixture(scope="module")
def running():
    running = Running()
    yield running
    running.end()


def test_twenty_clients_at_a_time_get_what_each_gets_alone(running):
    prompts = [f"{number} and {'more ' * (number % 4)}" for number in range(20)]
    alone = [running.complete(prompt).choices[0].text for prompt in prompts]
    running.calls.clear()
    running.gate.clear()
    with ThreadPoolExecutor(20) as pool:
        futures = [pool.submit(running.complete, prompt) for prompt in prompts]
        wait_for(lambda: running.worker.unfinished == 20)
        running.gate.set()
        together = [future.result().choices[0].text for future in futures]
    assert together == alone and len(set(alone)) > 15
    assert sum(running.calls) == 20 and len(running.calls) == 2  # the first one taken up, and all others


def test_a_completion_is_the_engines(running):
    said = running.complete(["what is it", "ab"], n=2, logprobs=0, extra_body={"details": True})
    assert [choice.index for choice in said.choices] == [0, 1, 2, 3] and said.model == "org/tiny"
    tokenizer = running.served.tokenizer
    details = [choice.model_extra["rl4dlm"] for choice in said.choices]
    for choice, known in zip(said.choices, details, strict=True):
        ids = known["token_ids"]
        assert choice.text == tokenizer.decode(ids, skip_special_tokens=True)
        assert choice.finish_reason == ("stop" if ids[-1] in running.served.spec.eos_token_ids else "length")
        assert choice.logprobs.token_logprobs == known["log_probs"] and len(known["steps"]) == len(ids)
        assert choice.logprobs.tokens == [tokenizer.decode([i]) for i in ids]
        assert choice.logprobs.text_offset[:3] == [0, 1, 2]
        assert known["forwards"] == known["num_steps"] and max(known["steps"]) < known["num_steps"]
    written = sum(len(known["token_ids"]) for known in details)
    assert (said.usage.prompt_tokens, said.usage.completion_tokens) == (12, written)
    assert said.usage.total_tokens == 12 + written
    about = said.model_extra["rl4dlm"]
    assert (about["seed"], about["schedule"], about["canvas_length"]) == (3, "low_confidence", 12)
    ids = encode_prompt(tokenizer, "ab")
    assert running.complete(ids).choices[0].text == said.choices[2].text


def test_requests_choose_how_they_are_decoded(running):
    said = running.complete(
        "a", temperature=0, max_tokens=3, extra_body={"decoding": {"schedule": "left_to_right"}, "details": True}
    )
    assert said.model_extra["rl4dlm"]["schedule"] == "left_to_right"
    steps = said.choices[0].model_extra["rl4dlm"]["steps"]
    assert steps == sorted(steps) and len(steps) <= 3
    assert said.choices[0].finish_reason in ("stop", "length") and len(said.choices[0].text) <= 3
    text = running.complete("what is it").choices[0].text
    cut = running.complete("what is it", stop=text[5:7])
    assert cut.choices[0].text == text[: text.index(text[5:7])] and cut.choices[0].finish_reason == "stop"
    first, second = (running.complete("a", seed=None) for _ in range(2))
    seeds = [said.model_extra["rl4dlm"]["seed"] for said in (first, second)]
    assert seeds[0] != seeds[1]
    assert running.complete("a", seed=seeds[0]).choices[0].text == first.choices[0].text


def test_a_conversation_goes_through_the_chat_template(running):
    said = running.talk(logprobs=True, n=2)
    tokenizer = running.served.tokenizer
    ids = encode_prompt(tokenizer, TALK)
    assert said.usage.prompt_tokens == len(ids)
    assert [choice.message.role for choice in said.choices] == ["assistant", "assistant"]
    plain = running.complete(ids, n=2)
    assert [choice.message.content for choice in said.choices] == [choice.text for choice in plain.choices]
    content = said.choices[0].logprobs.content
    assert len(content) + len(said.choices[1].logprobs.content) == said.usage.completion_tokens
    assert all(token.logprob < 0 and bytes(token.bytes).decode() == token.token for token in content)


def test_a_stream_brings_blocks_and_is_the_whole(running):
    whole = running.complete(["ab", "what is it"])
    chunks = list(
        running.complete(["ab", "what is it"], stream=True, stream_options={"include_usage": True},
                         extra_body={"details": True})
    )  # fmt: skip
    for number, choice in enumerate(whole.choices):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices and chunk.choices[0].index == number]
        assert "".join(one.text for one in own) == choice.text
        assert [one.finish_reason for one in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1].finish_reason == choice.finish_reason
        assert len(own) - 1 == len(choice.text) // 4 + (len(choice.text) % 4 > 0)  # blocks have four slots
        assert len(own[-1].model_extra["rl4dlm"]["token_ids"]) >= len(choice.text)
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage

    talked = running.talk().choices[0]
    deltas = [chunk.choices[0] for chunk in running.talk(stream=True)]
    assert deltas[0].delta.role == "assistant" and deltas[-1].finish_reason == talked.finish_reason
    assert "".join(one.delta.content or "" for one in deltas) == talked.message.content


def test_a_first_block_arrives_before_the_last_is_written(running):
    """The engine is stopped after the first block: what it has finished is there already."""
    after, go = running.worker.engine.generate, threading.Event()

    def generate(prompts, config, *, on_step, **options):
        steps = []

        def watched(progress):
            on_step(progress)
            steps.append(progress)
            if len(steps) == 5:
                assert go.wait(60)

        return after(prompts, config, on_step=watched, **options)

    running.worker.engine.generate = generate
    try:
        stream = iter(running.complete("what is it", stream=True, extra_body={"decoding": {"min_new_tokens": 12}}))
        assert len(next(stream).choices[0].text) == 4
        go.set()
        assert sum(len(chunk.choices[0].text) for chunk in stream) == 8
    finally:
        running.worker.engine.generate = after


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"extra_body": {"decoding": {"schedule": "fastest"}}}, openai.BadRequestError, "schedule='fastest'"),
        ({"n": 99}, openai.BadRequestError, "n=99 is not allowed; it must be a whole number, 1 to 8"),
        ({"prompt": "x" * 2000}, openai.BadRequestError, "prompt[0] has 2000 tokens"),
        ({"temperature": "hot"}, openai.BadRequestError, "temperature='hot' is not allowed; it must be a number"),
        ({"model": "gpt-4"}, openai.NotFoundError, "model='gpt-4' is not served here; allowed: 'org/tiny'"),
    ],
    ids=str,
)
def test_openais_client_raises_its_errors(running, settings, error, said):
    with pytest.raises(error) as caught:
        running.client.completions.create(**{"model": "org/tiny", "prompt": "a", **settings})
    assert said in caught.value.body["message"] and caught.value.body["type"] == "invalid_request_error"


def test_what_is_no_request(running):
    post = f"{running.url}/v1/completions"
    for content, status, said in [
        (b"{", 400, "the body is not JSON"),
        (b"[" * 100_000, 400, "the body is not JSON"),
        (b'"\xff"', 400, "the body is not JSON"),
        (rb'{"\ud800": 1}', 400, "the body is not JSON"),
        (b" " * (8 * 2**20 + 1), 413, "the body has more than"),
    ]:
        answer = httpx.post(post, content=content, timeout=60)
        assert answer.status_code == status and said in answer.json()["error"]["message"]
    for answer, status in [(httpx.get(post), 405), (httpx.get(f"{running.url}/v2"), 404)]:
        assert (
            answer.status_code == status and "is not served; allowed: GET /health" in answer.json()["error"]["message"]
        )


def test_models_health_and_a_log_without_text(running, caplog):
    assert [model.id for model in running.client.models.list()] == ["org/tiny"]
    card = running.client.models.retrieve("org/tiny").model_extra["rl4dlm"]
    assert card["decoding"]["canvas_length"] == 12 and "threshold" in card["schedules"]
    with pytest.raises(openai.NotFoundError, match="model='other' is not served here"):
        running.client.models.retrieve("other")
    assert httpx.get(f"{running.url}/health").json() == {"status": "ok", "unfinished": 0}
    with caplog.at_level(logging.DEBUG, logger="rl4dlm"):
        text = running.complete("secret words").choices[0].text
        list(running.complete("secret words", stream=True))
        with pytest.raises(openai.BadRequestError):
            running.complete("secret words", stop=["secret", ""])
    assert caplog.text.count("/v1/completions 200 rows=1 prompt_tokens=12 completion_tokens=") == 2
    assert "/v1/completions 400 stop" in caplog.text
    assert "secret" not in caplog.text and text not in caplog.text


def test_an_engine_that_fails_is_a_500_without_text(running, caplog):
    decode = running.worker.engine.generate
    running.worker.engine.generate = lambda prompts, *_, **__: (_ for _ in ()).throw(MemoryError(f"{prompts}"))
    try:
        with pytest.raises(openai.InternalServerError, match="the engine failed with MemoryError"):
            running.complete("a")
        with pytest.raises(openai.APIError, match="the engine failed with MemoryError"):
            list(running.talk(stream=True))
    finally:
        running.worker.engine.generate = decode
    assert running.complete("a").choices[0].text == running.complete("a").choices[0].text


def test_lm_eval_asks_the_server(running, tmp_path, monkeypatch):
    """Its `local-completions`, four requests at a time, gets what OpenAI's client gets."""
    for module in ("lm_eval", "aiohttp", "tenacity"):
        pytest.importorskip(module, reason="lm-eval, or its extra api, is not installed")
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    questions = ["what is it", "ab", "a longer question than the others", "x"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"question": question}) + "\n" for question in questions))
    task = {
        "task": "local_questions",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "x",
        "generation_kwargs": {"until": ["e"], "do_sample": True, "temperature": 1.0, "max_gen_toks": 9, "top_k": 50},
        "metric_list": [{"metric": "exact_match"}],
    }
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(task))
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    results = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": "org/tiny",
            "base_url": f"{running.url}/v1/completions",
            "tokenizer": str(tmp_path / "tokenizer"),
            "tokenizer_backend": "huggingface",
            "num_concurrent": 4,
            "max_retries": 1,
        },
        tasks=["local_questions"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
        random_seed=None,
        numpy_random_seed=None,
        torch_random_seed=None,
    )
    answers = {sample["doc"]["question"]: sample["resps"][0][0] for sample in results["samples"]["local_questions"]}
    expected = {
        question: running.complete(
            question, seed=1234, max_tokens=9, temperature=1.0, stop=["e", "<eos>"], extra_body={"top_k": 50}
        ).choices[0]
        for question in questions
    }
    assert answers == {question: choice.text for question, choice in expected.items()}


def test_it_drains(caplog):
    running = Running()
    running.gate.clear()
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(running.complete, "first")
        wait_for(lambda: running.calls == [1])
        waiting = pool.submit(running.complete, "waits", n=2)
        streamed = pool.submit(lambda: list(running.talk(stream=True)))
        wait_for(lambda: running.worker.unfinished == 3)
        running.server.handle_exit(signal.SIGTERM, None)
        with pytest.raises(openai.InternalServerError, match="the server is shutting down") as caught:
            running.complete("late")
        assert caught.value.status_code == 503 and caught.value.response.headers["retry-after"] == "1"
        health = httpx.get(f"{running.url}/health")
        assert health.status_code == 503 and health.json() == {"status": "draining", "unfinished": 3}
        running.gate.set()
        assert len(first.result().choices) == 1 and len(waiting.result().choices) == 2
        assert streamed.result()[-1].choices[0].finish_reason in ("stop", "length")
    running.thread.join(60)
    assert not running.thread.is_alive()
    running.worker.close()
    running.listener.close()


def test_the_command_serves_until_sigterm(tmp_path, capsys):
    folder = tmp_path / "model"
    save_denoiser(tiny_llada(initializer_range=0.3), folder, tiny_tokenizer())
    with bound_socket("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    answers = []

    def visit():
        url = f"http://127.0.0.1:{port}"
        try:
            wait_for(lambda: _is_up(url))
            answers.append(
                httpx.post(f"{url}/v1/completions", json={"model": "tiny", "prompt": "a"}, timeout=60).json()
            )
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *_: None)  # should the server fail to start, the tests go on
    visitor = threading.Thread(target=visit)
    visitor.start()
    try:
        status = main(["serve", "--model", str(folder), "--served-name", "tiny", "--port", str(port), "--seed", "7",
                       "--canvas-length", "8", "--block-length", "4"])  # fmt: skip
        visitor.join(60)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert status == 0
    assert answers[0]["rl4dlm"]["seed"] == 7 and answers[0]["choices"][0]["finish_reason"] in ("stop", "length")
    said = capsys.readouterr().err
    assert f"serving tiny at http://127.0.0.1:{port}/v1" in said and "/v1/completions 200 rows=1" in said


def _is_up(url):
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port", "70000"], "port=70000 is not allowed; it must be 0 to 65535"),
        (["--num-samples", "2"], "a request's `n` says how many"),
        (["--schedule", "fastest"], "schedule='fastest'"),
        (["--served-name", ""], "served-name='' is not allowed"),
    ],
)
def test_the_command_says_what_is_wrong_before_weights_are_read(arguments, said, capsys):
    assert main(["serve", "--model", "no_such_model", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_an_address_that_is_taken_is_said_before_weights_are_read(capsys):
    with bound_socket("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", "--model", "no_such_model", "--port", str(port)]) == 2
    assert f"host='127.0.0.1', port={port} cannot be listened at" in capsys.readouterr().err
