"""Rollouts from a server: a run is the in-process run, and ends with a sentence when the server does."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from rl4dlm import DecodingConfig, DiffusionSpec, RolloutEngine, TraceRLConfig, TraceRLTrainer, tiny_llada
from rl4dlm.cli import main
from rl4dlm.cli.errors import is_bad_input
from rl4dlm.rollout.backends import http
from rl4dlm.rollout.backends.backend import BackendError
from rl4dlm.rollout.backends.http import ABOUT, ROLLOUTS, WEIGHTS, HTTPBackend
from rl4dlm.rollout.backends.weights import FILE, send
from rl4dlm.rollout.backends.wire import pack, pack_request, pack_rollout
from tests.serving.servers import TOKEN, Running

for module in ("fastapi", "uvicorn"):
    pytest.importorskip(module, reason="the extra serve is not installed")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

STEPS = 3


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(http.TOKEN, TOKEN)
    monkeypatch.setattr(http, "WAITS", (0.01,))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "weights").mkdir()
    return tmp_path / "weights"


def policy() -> Any:
    return tiny_llada(initializer_range=0.3).double()


@pytest.fixture
def train(build_trainer: Any, tmp_path: Path) -> Any:
    """A run of an algorithm that learns from the record, with rollouts of a server if there is one."""

    def of(name: str, server: Any = None, folder: Any = None, *, resume: Any = None, **changes: Any) -> Any:
        backend = {} if server is None else {
            "rollout_backend": "http", "rollout_url": server.url, "rollout_weights_dir": str(folder)
        }  # fmt: skip
        trainer = build_trainer(
            tmp_path / name,
            policy(),
            trainer=TraceRLTrainer,
            config=TraceRLConfig,
            **{
                "max_steps": STEPS,
                "num_iterations": 1,
                "temperature": 1.0,
                "old_policy": "recorded",
                "merge": 1,
                "steps_per_generation": 1,
                "beta": 0.0,
                **changes,
            },
            **backend,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return of


def weights_of(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters() if value.requires_grad}


def assert_same(found: Any, expected: Any) -> None:
    before = dict(policy().named_parameters())
    changed = [n for n, value in expected.items() if n not in before or not torch.equal(value, before[n])]
    assert len(changed) > 5 and set(found) == set(expected)
    assert any("lora_" in name for name in expected) == any("lora_" in name for name in found)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12, msg=name)


def test_a_run_is_the_in_process_run_and_survives_the_servers_death(train: Any, folder: Path) -> None:
    expected = weights_of(train("here"))
    server = Running(policy(), folder)
    calls: list[int] = []
    server.before_rollout = lambda: calls.append(1)
    there = train("there", server, folder)
    assert_same(weights_of(there), expected)
    assert len(calls) == STEPS and not list(folder.glob(".*"))
    assert [path.name.split("-")[1:] for path in sorted(folder.iterdir())] == [["1", "1"], ["2", "2"]]
    gaps = [entry["diffusion/rollout_gap"] for entry in there.state.log_history if "loss" in entry]
    assert len(gaps) == STEPS and max(gaps) < 1e-12

    # It dies while the third batch is decoded: the run says so, and what was saved is whole and can be gone on from.
    def die() -> None:
        calls.append(1)
        if len(calls) == STEPS:
            server.server.force_exit = server.server.should_exit = server.worker.draining = True
            server.thread.join(60)

    calls.clear()
    server.before_rollout = die
    changes = {"save_strategy": "steps", "save_steps": 1}
    with pytest.raises(BackendError, match=rf"{server.url} failed at .*newest checkpoint") as ended:
        train("killed", server, folder, **changes)
    assert not is_bad_input(ended.value)  # so that a script ends with status 1
    assert {path.name for path in (folder.parent / "killed").glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
    server.worker.close()
    server.listener.close()

    again = Running(policy(), folder)
    try:
        assert_same(weights_of(train("killed", again, folder, resume=True, **changes)), expected)
    finally:
        again.end()


def test_of_a_policy_with_an_adapter_the_adapter_travels(train: Any, folder: Path) -> None:
    changes = {"max_steps": 2, "peft_config": LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])}
    expected = weights_of(train("here", **changes))
    server = Running(policy(), folder)
    try:
        there = train("there", server, folder, **changes)
    finally:
        server.end()
    assert_same(weights_of(there), expected)
    assert (folder / str(server.receiver.name) / FILE).stat().st_size < 20_000
    other = tiny_llada(initializer_range=0.3, seed=1).double()
    with pytest.raises(ValueError, match="other weights than those this server was started with"):
        Running.receiver_of(other, folder).receive(str(server.receiver.name))


@pytest.fixture(scope="module")
def served(tmp_path_factory: Any) -> Iterator[tuple[Running, Path]]:
    folder = tmp_path_factory.mktemp("weights")
    server = Running(policy(), folder)
    yield server, folder
    server.end()


def ask(server: Running, path: str, body: Any = None, token: str | None = TOKEN) -> tuple[int, Any]:
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(server.url + path, data, headers), timeout=60) as said:
            return said.status, said.read()
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())["error"]["message"]


CONFIG = DecodingConfig(canvas_length=8, steps=4, temperature=1.0)


def request(weights: str = "run-0-0", prompts: Any = ((3, 4),), **changes: Any) -> bytes:
    values = {"config": CONFIG, "row_ids": list(range(len(prompts))), "seed": 1, "hints": None, "start": None}
    return pack_request(weights, prompts, **{**values, **changes})


def test_a_server_that_is_not_reached_is_told_from_one_that_does_not_answer() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        port = full.getsockname()[1]
        with pytest.raises(BackendError, match=r"nothing came for 0.1 s"):  # whom the system lets in
            http.Http(f"http://127.0.0.1:{port}", 0.1).ask(ABOUT)
        others = [socket.socket() for _ in range(4)]
        try:
            for other in others:  # until it lets nobody in any more
                other.setblocking(False)
                other.connect_ex(("127.0.0.1", port))
            with pytest.raises(BackendError, match=r"no connection within 0.1 s"):
                http.Http(f"http://127.0.0.1:{port}", 0.1).ask(ABOUT)
        finally:
            for other in others:
                other.close()


def test_these_paths_are_off_and_need_a_token(served: Any) -> None:
    server, _ = served
    for path, body in ((ABOUT, None), (ROLLOUTS, b"x"), (WEIGHTS, {"version": "run-0-0"})):
        for token in (None, "", "wrong", TOKEN + "x"):
            status, said = ask(server, path, body, token)
            assert status == 401 and "token" in said
    closed = Running(policy(), None)
    try:
        assert ask(closed, ABOUT)[0] == ask(closed, WEIGHTS, {"version": "run-0-0"})[0] == 404
    finally:
        closed.end()


@pytest.mark.parametrize(
    ("folder", "token", "said"),
    [
        ("/no/such", TOKEN, "training-folder='/no/such' is not a folder"),
        ("/tmp", None, f"training-folder='/tmp' needs {http.TOKEN} in the environment"),
        ("/tmp", "secret\n", f"{http.TOKEN} begins or ends with a space"),
    ],
)
def test_the_command_needs_a_folder_and_a_token(
    folder: str, token: Any, said: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.delenv(http.TOKEN)
    if token is not None:
        monkeypatch.setenv(http.TOKEN, token)
    assert main(["serve", "--model", "no_such_model", "--training-folder", folder]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_what_is_wrong_is_refused_before_anything_changes(served: Any, tmp_path: Path) -> None:
    server, folder = served
    before = {name: value.clone() for name, value in server.model.state_dict().items()}
    status, said = ask(server, ROLLOUTS, request())
    assert status == 409 and "'run-0-0' are not those of this server, which are None" in said
    send(tiny_llada(hidden_size=48).double(), folder, "wide-0")
    broken = policy()
    broken.get_output_embeddings().weight.data[3, 2] = torch.nan
    send(broken, folder, "nan-0")
    (folder / "junk-0").mkdir()
    (folder / "junk-0" / FILE).write_bytes(b"{}" * 40)
    send(policy(), tmp_path, "outside-0")
    (folder / "link-0").symlink_to(tmp_path / "outside-0")
    for version, reason in {
        "none-0": "not in the folder",
        "../" + tmp_path.name + "/outside-0": "is not allowed; it has up to 128",
        "/etc": "is not allowed",
        "": "is not allowed",
        "link-0": "leads out of the folder",
        "junk-0": "holds no weights",
        "wide-0": "has shape",
        "nan-0": "is not finite",
    }.items():
        status, said = ask(server, WEIGHTS, {"version": version})
        assert status == 400 and reason in said, version
    for body in (b"junk", b"[]", b'{"version": 3}', b'{"version": "a", "path": "/"}', b"[" * 3000):
        assert ask(server, WEIGHTS, body)[0] == 400
    assert server.receiver.name is None
    assert all(torch.equal(value, before[name]) for name, value in server.model.state_dict().items())

    learned = {"schedule": "learn2pd", "schedule_args": {"filter_path": "/etc"}}
    wanted = {"weights": "a-0", "config": {}, "prompts": [[3]], "row_ids": [0], "seed": 0, "hints": None, "exact": None}
    for body, reason in (
        (b"junk", "no safetensors message"),
        (b"", "no safetensors message"),
        (pack({}, {}), "lacks"),
        (pack({**wanted, "more": 1}, {}), "'more'"),
        (pack({**wanted, "format": 7}, {}), "format=7"),
        (pack({**wanted, "prompts": ["text"]}, {}), "prompts="),
        (pack({**wanted, "row_ids": [2**64]}, {}), "row_ids="),
        (pack({**wanted, "hints": [[[0, 1, 2]]]}, {}), "hints="),
        (pack({**wanted, "config": {"guess": 1}}, {}), "unknown settings"),
        (pack({**wanted, "config": {"canvas_length": "x"}}, {}), "canvas_length='x'"),
        (pack({**wanted, "config": learned}, {}), "filter_path"),
        (pack({**wanted, "exact": True}, {"start.canvas": torch.zeros(1, 8)}), "lacks"),
        (pack(wanted, {"start.canvas": torch.zeros(1, 8)}), "canvas"),
        (request(prompts=[[10**6]]), "vocabulary"),
        (request(prompts=[[]]), "is empty"),
        (request(row_ids=[1, 2]), "row_ids"),
        (request("../x"), "is not allowed"),
    ):
        status, said = ask(server, ROLLOUTS, body)
        assert status == 400 and reason in said, (said, reason)


def test_rows_are_the_engines_and_an_answer_by_other_weights_is_refused(
    served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import contextlib

    import rl4dlm.serving.training as serving_side

    server, folder = served
    model = tiny_llada(initializer_range=0.3, seed=5).double()
    engine = RolloutEngine(model)
    backend = HTTPBackend(server.url, folder, engine.spec, run="run")
    with pytest.raises(RuntimeError, match="update_weights comes before"):
        backend.generate([[3]], CONFIG, row_ids=[0], seed=0)
    backend.update_weights(lambda: contextlib.nullcontext(model), 4)
    prompts, ids = [[3, 4], [5], [6, 7, 8]], [2**62, 7, 9]
    first = engine.generate(prompts, CONFIG, row_ids=ids, seed=3)
    for given in ({}, {"hints": [{0: 3}, {}, {2: 9, 5: 4}]}, {"start": first.state_at(2)}):
        here = engine.generate(prompts, CONFIG, row_ids=ids, seed=3, **given)
        there = backend.generate(prompts, CONFIG, row_ids=ids, seed=3, **given)
        assert torch.equal(there.canvas, here.canvas) and there.completion_ids == here.completion_ids
        assert torch.equal(there.trace.commit_step, here.trace.commit_step)
        torch.testing.assert_close(there.trace.log_prob, here.trace.log_prob, rtol=0, atol=1e-12)
        assert (there.weight_version, there.row_ids, there.stop_reason) == (4, here.row_ids, here.stop_reason)
    assert len(backend.generate([], CONFIG, row_ids=[], seed=3)) == 0

    # Weights that were changed by hand are handed over, too; those that were not are not written again.
    names = [server.receiver.name]
    backend.update_weights(lambda: contextlib.nullcontext(model), 4)
    names.append(server.receiver.name)
    with torch.no_grad():
        model.get_output_embeddings().weight[5] += 1.0
    backend.update_weights(lambda: contextlib.nullcontext(model), 4)
    names.append(server.receiver.name)
    assert names == ["run-4-0", "run-4-0", "run-4-1"]

    monkeypatch.setattr(serving_side, "pack_rollout", lambda rollout, weights: pack_rollout(rollout, "other-4-0"))
    with pytest.raises(BackendError, match="has decoded with weights 'other-4-0'"):
        backend.generate([[3]], CONFIG, row_ids=[0], seed=0)
    monkeypatch.undo()
    monkeypatch.setenv(http.TOKEN, "wrong")
    with pytest.raises(BackendError, match="status 401"):
        HTTPBackend(server.url, folder, engine.spec, run="run")
    monkeypatch.delenv(http.TOKEN)
    with pytest.raises(ValueError, match=f"{http.TOKEN} is not set"):
        HTTPBackend(server.url, folder, engine.spec, run="run")
    other = DiffusionSpec(mask_token_id=2, eos_token_ids=(1,), logit_shift=1)
    with pytest.raises(ValueError, match="logit_shift"):
        HTTPBackend(server.url, folder, other, run="run", token=TOKEN)
    # Another run takes the server over: this one's next request finds it out.
    HTTPBackend(server.url, folder, engine.spec, run="two", token=TOKEN).update_weights(
        lambda: contextlib.nullcontext(model), 4
    )
    with pytest.raises(BackendError, match="status 409.*'run-4-1' are not those of this server"):
        backend.generate([[3]], CONFIG, row_ids=[0], seed=0)
