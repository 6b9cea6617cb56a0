"""The prompts of the papers: what distinguishes their styles, in training and in evaluation (F1)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rl4dlm.tasks import grids, load_task, prompts

STEP_BY_STEP = r"Please reason step by step, and put your final answer within \boxed{}."


@pytest.fixture
def files(tmp_path: Path) -> dict[str, dict[str, str]]:
    rows = {
        "gsm8k": {"question": "What is 1 + 1?", "answer": "Count.\n#### 2"},
        "math": {"problem": "Find $1+1$.", "solution": r"\boxed{2}"},
    }
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    return {name: dict.fromkeys(("train", "test"), str(tmp_path / f"{name}.jsonl")) for name in rows}


def prompt(name: str, split: str, options: dict[str, Any]) -> list[dict[str, str]]:
    return load_task(name, size=1, **options).rows(split)[0]["prompt"]


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(("name", "question"), [("gsm8k", "What is 1 + 1?"), ("math", "Find $1+1$.")])
def test_f1_espo_asks_for_steps_and_a_box_and_nothing_else(files: Any, name: str, question: str, split: str) -> None:
    (message,) = prompt(name, split, {"style": "espo", "path": files[name]})
    assert message == {"role": "user", "content": f"{question}\n{STEP_BY_STEP}"}


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(("name", "question"), [("gsm8k", "What is 1 + 1?"), ("math", "Find $1+1$.")])
def test_f1_igpo_asks_for_a_box_in_the_answer_tags(files: Any, name: str, question: str, split: str) -> None:
    (message,) = prompt(name, split, {"style": "igpo", "path": files[name]})
    form, _, asked = message["content"].rpartition("</answer>\n")
    assert asked.strip() == question
    wanted = r"Respond in the following format: <reasoning> ... </reasoning> <answer> \boxed{<Your answer>}"
    assert " ".join(form.split()) == wanted


def test_f1_espo_shows_one_solved_puzzle_that_is_never_asked() -> None:
    task = load_task("sudoku", size=400, style="espo")
    text = task.rows("train")[0]["prompt"][0]["content"]
    shown, solution = re.findall(r"(?:Puzzle|Solution): (\d{16})", text)
    assert grids.solutions(shown) == [solution]
    # The two pictures are of the same puzzle.
    cells = re.findall(r"^(\d) (\d) \| (\d) (\d)$", text, re.MULTILINE)
    assert ["".join(map("".join, cells[:4])), "".join(map("".join, cells[4:]))] == [shown, solution]
    assert text.endswith(f"Now, solve the following Sudoku puzzle: {task.rows('train')[0]['puzzle']}\n")
    assert not {row["puzzle"] for split in task.splits for row in task.rows(split)} & set(prompts.ALL_SHOWN_PUZZLES)
    user, started = task.rows("test")[0]["prompt"]
    assert "\n\nSolve the following Sudoku puzzle" in user["content"]
    assert started == {"role": "assistant", "content": "<reasoning>"}


def test_f1_espo_states_countdown_in_the_same_words_at_evaluation() -> None:
    trained = prompts.countdown([1, 2, 3], 6, style="espo", evaluation=False)
    assert trained == prompts.countdown([1, 2, 3], 6, style="d1", evaluation=False)
    assert prompts.countdown([1, 2, 3], 6, style="espo", evaluation=True) == [
        *trained,
        {"role": "assistant", "content": "<reasoning>"},
    ]


def test_f1_igpo_has_no_prompt_for_other_tasks() -> None:
    for name in ("countdown", "sudoku"):
        with pytest.raises(ValueError, match=r"style='igpo'; the prompt styles are d1, spg, espo"):
            load_task(name, style="igpo")
