"""What travels between a trainer and a rollout server arrives as it was sent, whatever a rollout has recorded."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch

from rl4dlm import DecodingConfig, RolloutEngine, tiny_diffusion_gemma, tiny_llada
from rl4dlm.rollout.backends.wire import pack_request, pack_rollout, unpack, unpack_request, unpack_rollout

PROMPTS = [[5, 6, 7], [8], [3, 4, 5, 6]]
CONFIGS = {
    "written once": {"schedule": "threshold", "steps": None, "schedule_args": {"threshold": 0.05}},
    "greedy": {"temperature": 0.0, "record": ()},
    "events": {"schedule": "rcr", "steps": 4},
    "fillings": {"record": ("predictions", "fillings", "filling_log_probs", "flagged"), "num_fillings": 2},
    "steps of fillings": {"record": ("fillings",), "record_steps": (0, 2)},
}


def same(found: Any, expected: Any, path: str = "") -> None:
    """All fields of dataclasses, tensors with their dtypes."""
    assert type(found) is type(expected), path
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected), path
    elif is_dataclass(expected):
        for entry in fields(expected):
            same(getattr(found, entry.name), getattr(expected, entry.name), f"{path}.{entry.name}")
    else:
        assert found == expected, path


@pytest.mark.parametrize("name", [*CONFIGS, "refined", "given", "resumed"])
def test_a_rollout_arrives_as_it_was(name: str) -> None:
    given: dict[str, Any] = {}
    if name == "refined":
        model, settings = tiny_diffusion_gemma(), {"schedule": "entropy_bound_canvas", "steps": None}
        settings["canvas_length"] = model.config.diffusion["block_length"]
    else:
        model, settings = tiny_llada(initializer_range=0.3).double(), CONFIGS.get(name, {})
    engine = RolloutEngine(model)
    ids, values = [2**62, 4, 9], {"canvas_length": 8, "steps": 4, "temperature": 0.8, **settings}
    config = DecodingConfig(**values)
    if name == "given":
        given = {"hints": [{0: 4}, {}, {3: 5, 7: 6}]}
    if name == "resumed":
        given = {"start": engine.generate(PROMPTS, config, row_ids=ids, seed=2).state_at([1, 0, 3])}

    request = unpack_request(
        pack_request("run-0-0", PROMPTS, config, ids, 2, given.get("hints"), given.get("start"))
    )  # fmt: skip
    assert (request.prompts, request.row_ids, request.seed) == (PROMPTS, ids, 2)
    assert DecodingConfig(**request.config) == config
    same(request.hints, given.get("hints"))
    same(request.start, given.get("start"))

    rollout = engine.generate(PROMPTS, config, row_ids=ids, seed=2, **given)
    assert (rollout.trace.events is not None) == (name == "events")
    assert (rollout.trace.refinement is not None) == (name == "refined")
    sent = pack_rollout(rollout, "run-0-0")
    found, weights = unpack_rollout(sent, PROMPTS, rollout.decoding, ids, 2)  # type: ignore[arg-type]
    assert weights == "run-0-0"
    same(found, rollout)
    with pytest.raises(ValueError, match="asked for was"):
        unpack_rollout(sent, PROMPTS[:2], config, ids[:2], 2)
    for bad in (sent[:-1], b"", b"\xff" * 50, b"\x02" + b"\x00" * 7 + b"{}"):
        with pytest.raises(ValueError, match="no safetensors message"):
            unpack(bad)
