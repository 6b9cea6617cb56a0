"""GSM8K: rows of a local file and numeric checks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rl4dlm.tasks import files, load_task


@pytest.fixture
def path(tmp_path: Path) -> Path:
    rows = [{"question": "What is 1000 + 1?", "answer": "Add.\n#### 1,001"}, {"question": "2 + 2?", "answer": "#### 4"}]
    path = tmp_path / "gsm8k.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows(path: Path) -> None:
    rows = load_task("gsm8k", path=path).rows("test")
    assert [row["answer"] for row in rows] == ["1,001", "4"]
    assert rows[0]["solution"] == "Add.\n#### 1,001"
    assert load_task("gsm8k", path=path, size=1).rows("test") == rows[:1]


def test_training_and_evaluation_prompts_differ_as_in_the_paper(path: Path) -> None:
    task = load_task("gsm8k", path={"train": path, "test": path})
    (train, _), (test, _) = task.rows("train"), task.rows("test")
    assert [message["role"] for message in train["prompt"]] == ["user"]
    assert "boxed" not in train["prompt"][0]["content"]
    assert test["prompt"][1] == {"role": "assistant", "content": "<reasoning>"}
    assert "\\boxed{}" in test["prompt"][0]["content"]
    assert all(row["prompt"][0]["content"].endswith(row["question"]) for row in (train, test))


@pytest.mark.parametrize(
    ("completion", "solved"),
    [
        ("<answer>\n1001\n</answer>", True), ("<answer>1,001</answer>", True), (r"<answer>\boxed{1001}</answer>", True),
        ("<answer>$1,001.00</answer>", True), ("<answer>it is 1001 apples</answer>", True),
        ("the answer is 1001.", True),
        ("<answer>1001", True), ("<answer>1001 or 1002</answer>", False), ("<answer>-1001</answer>", False),
        ("", False),
        ("<answer>1001</answer><answer>5</answer>", False), ("<answer>one</answer>", False), ("1001.5", False),
        (r"\boxed{1001} or 7", True),
    ],
)  # fmt: skip
def test_check(completion: str, solved: bool) -> None:
    assert load_task("gsm8k").check(completion, {"answer": "1,001"}) is solved


def test_row_without_a_number_cannot_be_checked() -> None:
    assert load_task("gsm8k").check("5", {"answer": "five"}) is None
    assert load_task("gsm8k").check("5", {}) is None


def test_hub_is_read_only_when_rows_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def read_hub(*arguments: str) -> list[dict]:
        asked.append(arguments)
        return [{"question": "q", "answer": "#### 1"}]

    monkeypatch.setattr("rl4dlm.tasks.gsm8k.read_hub", read_hub)
    task = load_task("gsm8k")
    assert asked == []
    task.rows("train")
    assert asked == [("openai/gsm8k", "main", "train")]


def test_missing_column_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_text("question,text\nq,a\n")
    with pytest.raises(ValueError, match=r"bad\.csv: row 1 has no answer; its columns: question, text"):
        load_task("gsm8k", path=path).rows("test")


def test_every_format_gives_the_same_rows(path: Path, tmp_path: Path) -> None:
    from datasets import Dataset

    rows = files.read_rows(path)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    Dataset.from_list(rows).to_csv(tmp_path / "a.csv")
    for suffix in ("json", "parquet", "csv"):
        assert files.read_rows(tmp_path / f"a.{suffix}", "question", "answer") == rows
