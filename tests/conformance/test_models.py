"""Published checkpoints, small: logits of the papers' own modelling code, and the way there and back.

What is run follows from a folder's `config.json` and `cases.json` alone; folders that were never seen are run alike.
"""

from __future__ import annotations

import json
import os
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from rl4dlm.models.loading import load_denoiser, save_denoiser
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from tests.rollout.torch_noise import TorchNoise

ROOT = Path(__file__).resolve().parents[2]
MODELS = Path(os.environ.get("RL4DLM_CONFORMANCE") or ROOT.parent / "shared" / "conformance") / "models"
FOLDERS = sorted(path.parent for path in MODELS.glob("*/cases.json"))
TOLERANCES = {torch.float32: 5e-5, torch.float64: 2e-6}
PLACES = 4  # units in the last float32 place of a recorded value, to which it was rounded

pytestmark = pytest.mark.skipif(not FOLDERS, reason="no conformance checkpoints")
each_folder = pytest.mark.parametrize("folder", FOLDERS, ids=[path.name for path in FOLDERS])


@cache
def recorded(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "cases.json").read_text())


def folders_with(key: str) -> Any:
    found = [path for path in FOLDERS if key in recorded(path)]
    return pytest.mark.parametrize("folder", found, ids=[path.name for path in found])


def ran_in(folder: Path) -> torch.dtype:
    return torch.float64 if recorded(folder)["logits_run_dtype"].startswith("float64") else torch.float32


def four_dimensional(allowed: list, model: Any) -> Tensor:
    """A 0/1 matrix `[Q, K]` (or one per row) as the mask that the model's attention implementation wants."""
    mask = torch.tensor(allowed).bool()
    mask = mask[None, None] if mask.dim() == 2 else mask[:, None]
    if model.config._attn_implementation != "eager":
        return mask
    return torch.zeros(mask.shape, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)


def forward(model: Any, case: dict[str, Any], outputs: dict[str, Tensor]) -> Tensor:
    tensors = (
        "input_ids",
        "attention_mask",
        "position_ids",
        "decoder_input_ids",
        "decoder_attention_mask",
        "decoder_position_ids",
    )
    inputs: dict[str, Any] = {name: torch.tensor(case[name]) for name in tensors if case.get(name) is not None}
    if "attention_mask_2d_bool_LxL" in case:
        mask = four_dimensional(case["attention_mask_2d_bool_LxL"], model)
        inputs["attention_mask"] = mask.expand(len(case["input_ids"]), -1, -1, -1)
    if "self_conditioning_logits" in case:
        inputs["self_conditioning_logits"] = outputs[case["self_conditioning_logits"].removeprefix("logits of case ")]
    with torch.no_grad():
        return model(**inputs).logits


def tolerance(recorded: Tensor, dtype: torch.dtype) -> Tensor:
    """What a value may differ by from one that was rounded to float32 when it was recorded (F11); `[...]` as given.

    Computing and rounding are errors of their own, so they add up: a floor would hide the second one below 8.
    """
    place = torch.from_numpy(np.spacing(recorded.abs().float().numpy())).double()
    return TOLERANCES[dtype] + PLACES * place


def test_f11_a_tolerance_follows_the_rounding_of_the_record():
    allowed = tolerance(torch.tensor([0.0, 1.0, 4.5, 9.0, 40.0], dtype=torch.float64), torch.float64) - 2e-6
    places = torch.tensor([0.0, 2**-23, 2**-21, 2**-20, 2**-18], dtype=torch.float64)
    torch.testing.assert_close(allowed, PLACES * places, rtol=0, atol=1e-12)


@each_folder
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_logits(folder: Path, dtype: torch.dtype, implementation: str):
    if dtype is torch.float64 and ran_in(folder) is torch.float32:
        pytest.skip("recorded in float32")
    model = load_denoiser(folder, dtype=dtype, attn_implementation=implementation)
    outputs: dict[str, Tensor] = {}
    for case in recorded(folder)["cases"]:
        outputs[case["name"]] = forward(model, case, outputs)
        expected = torch.tensor(case["logits"], dtype=torch.float64)
        beyond = ((outputs[case["name"]].double() - expected).abs() - tolerance(expected, dtype)).amax(-1)
        if case.get("compare") == "attention_mask":
            beyond = beyond[torch.tensor(case["attention_mask"]).bool()]
        assert beyond.max().item() <= 0, case["name"]


# --- recorded decoding ------------------------------------------------------------------------------------------------


@folders_with("traces")
def test_cached_calls(folder: Path):
    """Every forward of a decoding: blocks are stored, or denoised with the stored ones before them."""
    model = load_denoiser(folder)
    for trace in recorded(folder)["traces"]:
        past = DynamicCache(config=model.config)
        for number, call in enumerate(trace["calls"]):
            assert past.get_seq_length() == call["cache_length_before"]
            ids = torch.tensor(call["input_ids"])
            with torch.no_grad():
                logits = model(
                    input_ids=ids,
                    position_ids=torch.tensor(call["position_ids"]),
                    attention_mask=four_dimensional(call["attention_mask"], model),
                    past_key_values=past,
                    use_cache=True,
                ).logits
            if call["kind"] == "denoise":
                past.crop(-ids.shape[1])
            difference = (logits - torch.tensor(call["logits"])).abs().max().item()
            assert difference <= TOLERANCES[torch.float32], f"{trace['name']}, call {number}"


@folders_with("generate_calls")
def test_written_tokens_are_the_likeliest(folder: Path):
    """Greedy decoding in blocks: whatever changed from one forward to the next is the argmax of the former."""
    settings = recorded(folder)["generate"]["kwargs"]
    model = load_denoiser(folder)
    width, changed = settings["block_length"], 0
    windows = [torch.tensor(window).reshape(1, -1) for window in recorded(folder)["generate_calls"]]
    for before, after in pairwise(windows):
        block = torch.arange(before.shape[1]) // width
        allowed = (block[:, None] >= block[None]).int().tolist()
        with torch.no_grad():
            likeliest = model(input_ids=before, attention_mask=four_dimensional(allowed, model)).logits.argmax(-1)
        shared = min(before.shape[1], after.shape[1])
        written = before[:, :shared] != after[:, :shared]
        assert torch.equal(after[:, :shared][written], likeliest[:, :shared][written])
        changed += int(written.sum())
    assert changed > 0


@each_folder
def test_the_library_s_own_decoding(folder: Path):
    """transformers' generate of a class that brings its own, from the recorded state of the random generator."""
    generate = recorded(folder).get("generate", {})
    if "output_sequences" not in generate:
        pytest.skip("not recorded")
    model = load_denoiser(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generate["torch_seed"])
        sequences = model.generate(input_ids=torch.tensor(generate["input_ids"]), **generate["kwargs"]).sequences
    assert sequences.tolist() == generate["output_sequences"]


@each_folder
def test_the_engine_decodes_uniform_noise_as_the_library_does(folder: Path):
    """Our loop with the same random numbers, against the recorded result of transformers' generate."""
    generate, model = recorded(folder).get("generate", {}), load_denoiser(folder)
    if "output_sequences" not in generate or DiffusionSpec.of(model).noise != "uniform":
        pytest.skip("not recorded")
    [prompt], settings = generate["input_ids"], generate["kwargs"]
    config = DecodingConfig(
        canvas_length=settings["max_new_tokens"],
        schedule="entropy_bound_canvas",
        temperature=settings["t_max"],
        schedule_args={
            "max_steps": settings["max_denoising_steps"],
            "t_min": settings["t_min"],
            "stability": settings["stability_threshold"],
            "confidence": settings["confidence_threshold"],
        },
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generate["torch_seed"])
        noise = TorchNoise(model.config.get_text_config().vocab_size)
        rollout = RolloutEngine(model).generate([prompt], config, noise=noise)
    assert [prompt + rollout.canvas[0].tolist()] == generate["output_sequences"]


# --- there and back ---------------------------------------------------------------------------------------------------


def stored(folder: Path) -> dict[str, Tensor]:
    tensors = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as pointer:
            tensors |= {name: pointer.get_tensor(name) for name in pointer.keys()}  # noqa: SIM118
    return tensors


def assert_same_checkpoint(folder: Path, original: Path) -> None:
    ours, theirs = stored(folder), stored(original)
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name
    for name in ("config.json", "generation_config.json"):
        if (original / name).exists():
            assert json.loads((folder / name).read_text()) == json.loads((original / name).read_text())


@each_folder
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_the_published_form_comes_back(folder: Path, dtype: str, tmp_path: Path):
    """Also by way of our form, which stock transformers reads to the same bits."""
    model = load_denoiser(folder, dtype=dtype)
    save_denoiser(model, tmp_path / "hub", form="hub")
    assert_same_checkpoint(tmp_path / "hub", folder)
    save_denoiser(model, tmp_path / "ours")
    again = load_denoiser(tmp_path / "ours", dtype=dtype)
    assert type(again) is type(model) and again.config.diffusion == model.config.diffusion
    save_denoiser(again, tmp_path / "hub again", form="hub")
    assert_same_checkpoint(tmp_path / "hub again", folder)
    case = recorded(folder)["cases"][0]
    expected = forward(model, case, {})
    assert torch.equal(forward(again, case, {}), expected)
    if model.config.diffusion["noise"] == "mask":
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=model.dtype)
        assert type(stock) is type(model) and torch.equal(forward(stock, case, {}), expected)


@each_folder
def test_what_the_recorded_ids_say(folder: Path):
    """The mask token of the record is the one the files state, or it can be given where they state none."""
    states = {**json.loads((folder / "config.json").read_text()), **recorded(folder)}
    mask = states.get("mask_token_id")
    assert load_denoiser(folder).config.diffusion["mask_token_id"] in (mask, None)
    if mask is not None:
        assert DiffusionSpec.of(load_denoiser(folder, mask_token_id=mask)).mask_token_id == mask
        with pytest.raises(ValueError, match="mask_token_id"):
            load_denoiser(folder, mask_token_id=10**6)
