"""The learning run on small programs: it runs, what is there is not made again, the page shows what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import code_mini
from rl4dlm import load_task, load_tokenizer, save_denoiser, tiny_llada

ROOT = Path(__file__).resolve().parents[2]


def test_the_checkpoint_has_a_token_for_every_word_of_the_task() -> None:
    tokenizer = load_tokenizer(code_mini.CHECKPOINT)
    lengths = []
    for split in ("train", "validation", "test"):
        for row in load_task("code_mini", seed=5, size=100).rows(split):
            ids = tokenizer(row["prompt"] + row["solution"]).input_ids
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == row["prompt"] + row["solution"]
            lengths.append(len(tokenizer(row["solution"]).input_ids))
    assert sum(length < code_mini.CANVAS for length in lengths) > 0.9 * len(lengths)


def test_a_run_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    tokenizer = load_tokenizer(code_mini.CHECKPOINT)
    save_denoiser(tiny_llada(vocab_size=len(tokenizer)), tmp_path / "model", tokenizer)
    monkeypatch.setattr(code_mini, "BATCH", 8)
    results = tmp_path / "results.json"
    code_mini.train(tmp_path / "model", results, seeds=[0], batches=1, rows=2)
    first = json.loads(results.read_text())
    assert list(first["runs"]) == ["diffu_grpo-0", "random_reward-0"]
    assert first["before"]["rows"] == 2 and list(first["before"]["solved"]) == ["1", "2", "4", "8"]
    code_mini.train(tmp_path / "model", results, seeds=[0], batches=1, rows=2)
    assert json.loads(results.read_text()) == first
    code_mini.report(results)
    assert "| before | 0.000 |" in capsys.readouterr().out


def test_the_page_shows_what_was_measured() -> None:
    found = json.loads(code_mini.RESULTS.read_text())
    page = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    assert code_mini.table(found) in page
    assert sorted(found["runs"]) == sorted(f"{name}-{seed}" for name in code_mini.LINES for seed in (0, 1, 2))
    # What is claimed there: on every seed more is solved at the speed of training than before, and than by chance.
    speed = str(code_mini.TRAINED)
    by_line = {
        name: [run["after"]["solved"][speed] for run in found["runs"].values() if run["line"] == name]
        for name in code_mini.LINES
    }
    assert min(by_line["diffu_grpo"]) > 1.5 * found["before"]["solved"][speed] > 0.2
    assert min(by_line["diffu_grpo"]) > max(by_line["random_reward"])
