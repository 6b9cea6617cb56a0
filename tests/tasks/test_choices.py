"""ARC, GPQA, AIME, and Knights and Knaves: rows of files as they are published, and exact checks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rl4dlm.tasks import load_task
from rl4dlm.tasks.choices import read_choice

ARC = [
    {
        "id": "1",
        "question": "What is hot?",
        "choices": {"text": ["Ice", "Fire", "Snow", "Rain"], "label": ["A", "B", "C", "D"]},
        "answerKey": "B",
    },
    {"id": "2", "question": "And cold?", "choices": {"text": ["Ice", "Fire"], "label": ["1", "2"]}, "answerKey": "1"},
]
GPQA = [
    {
        "Question": f"Question {i}?",
        "Correct Answer": "right ",
        "Incorrect Answer 1": "wrong",
        "Incorrect Answer 2": "false",
        "Incorrect Answer 3": "no",
    }
    for i in range(40)
]
KNIGHTS = [
    {"quiz": "Zoey says ...", "names": ["Zoey", "Riley"], "solution": [False, True]},
    {"quiz": "Ann says ...", "names": ["Ann", "Anna"], "solution": [True, True]},
]


def written(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_arc_shows_letters_whatever_the_labels_are(tmp_path: Path) -> None:
    first, second = load_task("arc", path=written(tmp_path, ARC)).rows("test")
    assert (first["answer"], second["answer"]) == ("B", "A")
    assert "\nB. Fire\n" in first["prompt"][0]["content"] and first["choices"][1] == "Fire"


def test_the_order_of_gpqa_depends_on_the_question_and_the_seed_alone(tmp_path: Path) -> None:
    path = written(tmp_path, GPQA)
    rows = load_task("gpqa", path=path).rows("test")
    assert all(row["choices"]["ABCD".index(row["answer"])] == "right" for row in rows)
    assert {row["answer"] for row in rows} == set("ABCD")
    assert load_task("gpqa", path=written(tmp_path, GPQA[::-1])).rows("test")[::-1] == rows
    assert load_task("gpqa", path=written(tmp_path, GPQA), seed=1).rows("test") != rows


@pytest.mark.parametrize(
    ("completion", "solved"),
    [
        (r"So \boxed{B}", True), (r"\boxed{\text{B}}", True), (r"\boxed{(B)}", True), (r"\boxed{B. Fire}", True),
        ("<answer>B</answer>", True), (r"<answer>\boxed{B}</answer>", True), ("<answer>fire</answer>", True),
        ("The answer is B.", True), ("B", True), ("(B)", True), ("the answer is A. No, the answer is (B)", True),
        (r"\boxed{A}, or \boxed{B}", True), (r"\boxed{B}, or \boxed{A}", False), (r"\boxed{A}", False), ("", False),
        ("<answer>B</answer><answer>C</answer>", False), (r"\boxed{AB}", False), (r"\boxed{E}", False),
        ("Because fire is hot, A", False), ("Both B and C burn", False),
    ],
)  # fmt: skip
def test_a_choice_is_read(completion: str, solved: bool) -> None:
    row = {"answer": "B", "choices": ARC[0]["choices"]["text"]}
    assert load_task("arc").check(completion, row) is solved


def test_an_article_is_no_choice() -> None:
    assert read_choice("The answer is a gas", ()) is None


def test_rows_without_an_answer_cannot_be_checked() -> None:
    assert load_task("arc").check("A", {"answer": "E", "choices": ["a", "b"]}) is None
    assert load_task("arc").check("A", {}) is None
    assert load_task("aime").check("7", {"answer": "x"}) is None
    assert load_task("knights_and_knaves").check("Ann is a knight", {"names": ["Ann"]}) is None


def test_bad_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"answerKey='Z' is none of the labels"):
        load_task("arc", path=written(tmp_path, [{**ARC[0], "answerKey": "Z"}])).rows("test")
    with pytest.raises(ValueError, match="one truth value for each name"):
        load_task("knights_and_knaves", path=written(tmp_path, [{**KNIGHTS[0], "solution": [True]}])).rows("test")
    with pytest.raises(ValueError, match=r"people=9; a whole number from 2 to 8"):
        load_task("knights_and_knaves", people=9)
    with pytest.raises(ValueError, match=r"year=2020; the years are 2024, 2025"):
        load_task("aime", year=2020)


def test_aime(tmp_path: Path) -> None:
    task = load_task("aime", path=written(tmp_path, [{"problem": "Find m+n.", "answer": "073"}]))
    (row,) = task.rows("test")
    assert row["answer"] == 73 and "\\boxed" in row["prompt"][0]["content"]
    assert task.check(r"\boxed{73}", row) and task.check("<answer>073</answer>", row)
    assert not task.check(r"\boxed{730}", row) and not task.check("73 is what I thought of first", {"answer": 72})


@pytest.mark.parametrize(
    ("completion", "solved"),
    [
        ("<answer>\nZoey is a knave\nRiley is a knight\n</answer>", True),
        ("CONCLUSION:\n(1) Zoey is a knave\n(2) Riley is a knight", True),
        ("If Zoey is a knight, ... CONCLUSION: zoey is a Knave and riley is a KNIGHT", True),
        ("If Zoey is a knight then Riley is a knight. So Zoey is a knave.", False),  # says both
        ("<answer>Zoey is a knave</answer>", False),
        ("<answer>Zoey is a knave, Riley is a knave</answer>", False),
        ("<answer>Zoey is not a knight, Riley is a knight</answer>", False),
        ("", False),
    ],
)
def test_knights_and_knaves(completion: str, solved: bool, tmp_path: Path) -> None:
    task = load_task("knights_and_knaves", path=written(tmp_path, KNIGHTS))
    rows = task.rows("test")
    assert task.check(completion, rows[0]) is solved
    assert task.check("Ann is a knight, Anna is a knight", rows[1]) is True
    assert task.check("Anna is a knight", rows[1]) is False


def test_what_is_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None, str]] = []
    for module in ("choices", "aime", "knights_and_knaves"):
        monkeypatch.setattr(f"rl4dlm.tasks.{module}.read_hub", lambda *given: asked.append(given) or [])
    load_task("arc").rows("validation")
    load_task("gpqa").rows("test")
    load_task("aime", year=2024).rows("test")
    load_task("knights_and_knaves", people=5).rows("train")
    assert asked == [
        ("allenai/ai2_arc", "ARC-Challenge", "validation"),
        ("Idavidrein/gpqa", "gpqa_diamond", "train"),
        ("HuggingFaceH4/aime_2024", "default", "train"),
        ("K-and-K/knights-and-knaves", "train", "5ppl"),
    ]
