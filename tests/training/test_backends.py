"""Rollouts of other libraries' servers, played by one that answers as they are documented to, and what they refuse."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open

from rl4dlm import (
    AGRPOConfig,
    AGRPOTrainer,
    DecodingConfig,
    DiffuGRPOConfig,
    DiffuGRPOTrainer,
    DiffusionSpec,
    JustGRPOConfig,
    JustGRPOTrainer,
    SelfDistillationConfig,
    SelfDistillationTrainer,
    tiny_llada,
)
from rl4dlm.rollout.backends import http
from rl4dlm.rollout.backends.backend import BackendError
from rl4dlm.rollout.backends.engines import VLLMBackend
from rl4dlm.training.config import DiffusionPolicyConfig

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


# All of it is said: an engine fills in what is not from the checkpoint's generation_config.json.
SAMPLING = {"temperature": 0.8, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}


class Fake:
    """Answers as vLLM 0.23 and SGLang 0.5 are documented to. `greedy`: as an engine that does not draw."""

    def __init__(self) -> None:
        self.greedy, self.asked, self.weights, self.alive = False, [], [], True
        self.spoil: dict[str, Any] = {}
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *given: Any) -> None:
                pass

            def do_GET(self) -> None:
                self.do_POST()

            def do_POST(self) -> None:
                if not fake.alive:
                    self.connection.close()
                    return
                data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, said = fake.answer(self.path, json.loads(data) if data.strip() else None)
                body = json.dumps(said).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def ids(self, prompt: list[int], seed: Any) -> tuple[list[int], str]:
        """Tokens 5 to 12, which end after 4 of 8 where the last one is odd."""
        digest = hashlib.sha256(json.dumps([prompt, None if self.greedy else seed]).encode()).digest()
        ids = [5 + byte % 8 for byte in digest[:8]]
        return ([*ids[:3], 1], "stop") if digest[9] % 2 else (ids, "length")

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        self.asked.append((path, body))
        if path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": "google/a-model", "object": "model"}]}
        if path == "/health":
            return 200, {}
        if path == "/collective_rpc":
            self.weights.append(Path(body["kwargs"]["weights_path"]))
            return 200, {"results": [None]}
        if path == "/reset_prefix_cache":
            return 200, {}
        if path == "/update_weights_from_disk":
            self.weights.append(Path(body["model_path"]))
            self.version = body["weight_version"]
            return 200, {"success": True, "message": "Succeeded to update model weights.", "num_paused_requests": 0}
        if path == "/v1/completions":
            ids, finish = self.ids(body["prompt"], body["seed"])
            choice = {
                "index": 0, "text": "…", "logprobs": None, "finish_reason": finish, "stop_reason": None,
                "token_ids": ids, "prompt_token_ids": body["prompt"], **self.spoil,
            }  # fmt: skip
            return 200, {"id": "cmpl-1", "object": "text_completion", "model": body["model"], "choices": [choice]}
        assert path == "/generate"
        rows = []
        for number, prompt in enumerate(body["input_ids"]):
            ids, finish = self.ids(prompt, number)
            known = {
                "id": "1", "finish_reason": {"type": finish}, "prompt_tokens": len(prompt),
                "completion_tokens": len(ids), "weight_version": self.version,
            }  # fmt: skip
            rows.append({"text": "…", "output_ids": ids, "meta_info": {**known, **self.spoil}})
        return 200, rows


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    monkeypatch.setattr(http, "WAITS", ())
    fake = Fake()
    yield fake
    fake.server.shutdown()
    fake.server.server_close()


@pytest.fixture
def make(make_trainer: Any, fake: Fake, tmp_path: Path) -> Any:
    (tmp_path / "weights").mkdir()

    def of(kind: str = "vllm", **changes: Any) -> Any:
        given = {"rollout_backend": kind, "rollout_url": fake.url, "rollout_weights_dir": str(tmp_path / "weights")}
        given |= {"denoising_steps": None, "steps_per_generation": 1, "num_iterations": 1, "temperature": 0.8}
        return make_trainer(**{**given, **changes})

    return of


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_trainer_that_scores_completions_alone_learns_from_other_engines(kind: str, make: Any, fake: Fake) -> None:
    trainer = make(kind)
    trainer.train()
    for record in trainer.seen:
        for row, valid in zip(record["canvas_ids"].tolist(), record["canvas_valid"].tolist(), strict=True):
            count = sum(valid)
            assert (row[count - 1] == 1 and count == 4 and set(row[4:]) == {1}) or count == 8
            assert all(5 <= token < 13 for token in row[: count - (count == 4)])
        assert record["drawn"].equal(record["canvas_valid"]) and "drawn_log_probs" not in record
        assert "commit_step" not in record
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2 and not {"diffusion/nfe", "diffusion/rollout_gap"} & set(logs[0])
    assert logs[0]["diffusion/identical_completion_groups"] == 0

    # The weights of each version are there before the first row of it, in the published form.
    paths = [path for path, _ in fake.asked]
    load = "/collective_rpc" if kind == "vllm" else "/update_weights_from_disk"
    rollouts = "/v1/completions" if kind == "vllm" else "/generate"
    assert [path for path in paths if path == load] == [load] * 2
    assert paths.index(load) < paths.index(rollouts) and len(fake.weights) == 2
    assert [path.name.split("-")[1:] for path in fake.weights] == [["0", "0"], ["1", "1"]]
    assert (fake.weights[0] / "config.json").is_file() and fake.weights[0].is_absolute()
    found = []
    for path in fake.weights:
        with safe_open(next(path.glob("*.safetensors")), "pt") as file:
            found.append(file.get_tensor(next(name for name in sorted(file.keys()) if "ff_proj" in name)))
    assert not torch.equal(*found)
    bodies = [body for path, body in fake.asked if path == rollouts]
    if kind == "vllm":
        assert len(bodies) == 16 and len({body["seed"] for body in bodies}) == 16
        wanted = {
            "model": "google/a-model",
            "max_tokens": 8,
            "return_token_ids": True,
            **SAMPLING,
        }
        assert all(wanted.items() <= body.items() and body["prompt"] for body in bodies)
    else:
        assert [len(body["input_ids"]) for body in bodies] == [8, 8]
        assert bodies[0]["sampling_params"] == {"max_new_tokens": 8, **SAMPLING}


def test_an_engine_that_does_not_draw_is_found_out(make: Any, fake: Fake, caplog: pytest.LogCaptureFixture) -> None:
    fake.greedy = True
    trainer = make("sglang", num_generations=2)
    with pytest.raises(BackendError, match=r"temperature=0.8 the 2 completions of each of 4 prompts.*most probable"):
        trainer.train()
    # One that has drawn before is believed: it is the policy that has collapsed.
    trainer = make("sglang", num_generations=2, max_steps=4)
    trainer._watch_draws(0.5, 4)
    trainer.train()
    assert sum("completions of each of" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize(
    ("spoiled", "reason"),
    [
        ({"token_ids": None}, "answers without token ids"),
        ({"token_ids": [5, 6], "finish_reason": "length"}, "gave up a row after 2 tokens.*max_completion_length"),
        ({"token_ids": [5] * 9, "finish_reason": "length"}, "after 9 tokens"),
        ({"token_ids": [5, 6], "finish_reason": "abort"}, "finish_reason='abort'"),
        ({"prompt_token_ids": [5]}, "another prompt"),
        ({"token_ids": [13, 1], "finish_reason": "stop"}, "token 13.*draw_unknown_tokens=True"),
    ],
)
def test_answers_that_cannot_be_learnt_from_are_refused(fake: Fake, tmp_path: Path, spoiled: Any, reason: str) -> None:
    model = tiny_llada()
    backend = VLLMBackend(fake.url, tmp_path, DiffusionSpec.of(model), run="run")
    config = DecodingConfig(canvas_length=8, temperature=1.0).knowing(13)
    with pytest.raises(RuntimeError, match="update_weights comes before"):
        backend.generate([[3]], config, row_ids=[0], seed=0)
    for version in range(4):
        backend.update_weights(lambda: nullcontext(model), version)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run-2-2", "run-3-3"]
    assert backend.generate([[3], [4]], config, row_ids=[0, 1], seed=0).weight_version == 3
    assert len(backend.generate([], config, row_ids=[], seed=0)) == 0
    with pytest.raises(ValueError, match="no given slots"):
        backend.generate([[3]], config, row_ids=[0], seed=0, hints=[{}])
    fake.spoil = spoiled
    with pytest.raises(BackendError, match=reason):
        backend.generate([[3]], config, row_ids=[0], seed=0)


def test_stale_weights_and_silence_end_the_run(make: Any, fake: Fake) -> None:
    trainer = make("sglang")
    fake.spoil = {"weight_version": "other"}
    with pytest.raises(BackendError, match="has decoded with weights 'other'"):
        trainer.train()
    fake.alive = False
    with pytest.raises(BackendError, match="failed at .*newest checkpoint"):
        trainer.train()


BY_TEACHER = {"rollouts_by": "teacher", "num_generations": 2}


def forward_reward(completions: list[str], nfe: Any = None, **columns: Any) -> list[float]:
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"trainer": AGRPOTrainer, "config": AGRPOConfig}, "AGRPOTrainer learns from that; allowed here"),
        (
            {"trainer": JustGRPOTrainer, "config": JustGRPOConfig, "temperature": 1.0},
            "schedule='left_to_right' is not supported",
        ),
        ({"trainer": SelfDistillationTrainer, "config": SelfDistillationConfig, **BY_TEACHER}, "rollouts_by="),
        ({"denoising_steps": 4}, "denoising_steps=4 is not supported with rollout_backend='vllm'"),
        ({"cfg_scale": 1.0}, "cfg_scale=1.0"),
        ({"suppress_token_ids": [4]}, r"suppress_token_ids=\[4\]"),
        ({"scope": "canvas", "stop_at_eos": False}, "stop_at_eos=False"),
        ({"audit_share": 0.5}, "audit_share=0.5 compares"),
        ({"log_completions": True, "log_replays": 1}, "log_replays=1 shows it"),
        ({"rewards": forward_reward}, "forward_reward asks for nfe"),
        ({"rollout_batch_size": 4}, "rollout_batch_size=4 is not allowed"),
        ({"rollout_url": None}, "rollout_url=None is not allowed"),
        ({"rollout_url": "ftp://x"}, "rollout_url='ftp://x' is not allowed; it must be http"),
        ({"rollout_url": "http://x:99999"}, "rollout_url='http://x:99999' is not allowed; it must be http"),
        ({"rollout_weights_dir": "/no/such"}, "rollout_weights_dir='/no/such' is not a folder"),
        ({"rollout_timeout": 0}, "rollout_timeout=0 is not allowed"),
        ({"rollout_backend": "in_process"}, "rollout_url=.*has no effect with rollout_backend='in_process'"),
        ({"rollout_backend": "trt"}, "rollout_backend='trt' is not allowed"),
    ],
)
def test_what_a_run_needs_is_asked_before_it_starts(make: Any, fake: Fake, changes: Any, reason: str) -> None:
    plain = {"trainer": DiffuGRPOTrainer, "config": DiffuGRPOConfig}
    with pytest.raises(ValueError, match=reason):
        make(**{**plain, **changes})
    assert not fake.weights


def test_an_answer_that_breaks_off_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """`read(n)` of Python's client takes the part that came for the whole."""
    monkeypatch.setattr(http, "WAITS", (0.0,))
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *given: Any) -> None:
            pass

        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", "10")
            self.end_headers()
            self.wfile.write(b"0123456789" if len(asked) == 2 else b"0123")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    asker = http.Http(f"http://127.0.0.1:{server.server_address[1]}", 20.0)
    try:
        assert asker.ask("/x") == b"0123456789" and len(asked) == 2
        with pytest.raises(BackendError, match=r"failed at /x: IncompleteRead\(4 bytes read, 6 more expected\)"):
            asker.ask("/x")
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("token", ["secret\n", " secret", "gehe\u00efm"])
def test_a_token_that_no_header_can_hold_is_not_shown(token: str) -> None:
    with pytest.raises(ValueError, match="RL4DLM_ROLLOUT_TOKEN begins or ends") as error:
        http.Http("http://127.0.0.1:1", 1.0, token)
    assert token.strip() not in str(error.value)


def test_a_policy_must_be_whole(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = LoraConfig(r=2, target_modules=["q_proj"])
    with pytest.raises(ValueError, match="rollout_backend='vllm' is not supported for a policy with an adapter"):
        make(peft_config=adapter)
    # Biases that are trained are the base's, which the server has as they were.
    with pytest.raises(ValueError, match="LoRA adapter with bias='all' cannot come from a server"):
        make("http", peft_config=LoraConfig(r=2, target_modules=["q_proj"], bias="all"))
    monkeypatch.setattr(DiffuGRPOTrainer, "_sharded", True)
    with pytest.raises(ValueError, match="rollout_backend='http' is not supported under FSDP"):
        make("http")


def test_the_default_is_this_process(make_trainer: Any, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(num_generations=2)
    able = trainer.backend.capabilities
    assert able.trace and able.log_probs and able.deterministic and not able.remote
    assert DiffusionPolicyConfig.rollout_backend == "in_process"
    for _ in range(3):
        trainer._watch_draws(1.0, 4)
    assert sum("completions of each of 4 prompts" in record.message for record in caplog.records) == 1
