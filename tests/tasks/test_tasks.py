"""Tasks by name, the errors for what does not exist, and what importing them costs."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rl4dlm.tasks import available_tasks, load_task


def test_every_task_loads_under_its_name() -> None:
    assert [load_task(name).name for name in available_tasks()] == available_tasks()


def test_unknown_task_and_option_list_what_exists() -> None:
    with pytest.raises(ValueError, match=r"unknown task 'nope'; known tasks: .*countdown.*sudoku"):
        load_task("nope")
    with pytest.raises(ValueError, match=r"'sizes'; its options: .*size.*seed"):
        load_task("countdown", sizes=3)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("countdown", {"size": 0}, "size=0"),
        ("countdown", {"size": 2.5}, "size=2.5"),
        ("countdown", {"style": "plain"}, "style='plain'; the prompt styles are d1, spg"),
        ("countdown", {"numbers": 1}, "numbers=1"),
        ("countdown", {"max_target": 0}, "max_target=0"),
        ("sudoku", {"min_clues": 3}, "min_clues=3"),
        ("sudoku", {"min_clues": 9, "max_clues": 8}, "max_clues=8"),
        ("few_clue_sudoku", {"max_clues": 16}, "max_clues=16"),
        ("arithmetic_steps", {"min_operations": 1}, "min_operations=1"),
        ("arithmetic_steps", {"min_operations": 4, "max_operations": 3}, "max_operations=3"),
        ("arithmetic_steps", {"max_number": 100}, "max_value=99"),
        ("arithmetic_steps", {"symbols": "+^"}, r"symbols='\+\^'; give some of"),
        ("countdown_small", {"max_number": 100}, "max_number=100"),
        ("countdown_small", {"max_target": 1000}, "max_target=1000"),
        ("countdown_small", {"max_tries": -1}, "max_tries=-1"),
        ("countdown_small", {"symbols": ""}, "symbols=''"),
        ("countdown_small", {"symbols": "++"}, "each once"),
        ("math", {"deadline": 0}, "deadline=0"),
        ("gsm8k", {"path": {"dev": "x.csv"}}, "split 'dev'"),
    ],
)
def test_bad_option_values_are_refused_when_the_task_is_made(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_task(name, **options)


def test_bad_files_are_refused_when_the_task_is_made(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.csv"):
        load_task("sudoku", path=tmp_path / "none.csv")
    with pytest.raises(ValueError, match=r"end in \.csv, \.json"):
        load_task("sudoku", path=tmp_path / "data.xlsx")


@pytest.mark.parametrize("content", ["", "[1, 2]", "{", '{"a": 1}'])
def test_malformed_file_is_an_error_that_names_it(tmp_path: Path, content: str) -> None:
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"data\.json"):
        load_task("gsm8k", path=path).rows("test")


def test_unknown_split_lists_the_splits() -> None:
    with pytest.raises(ValueError, match="'dev'; its splits: train, validation, test"):
        load_task("countdown").dataset("dev")
    with pytest.raises(ValueError, match="'gsm8k' has no split 'validation' of its own; set validation_size"):
        load_task("gsm8k").rows("validation")


@pytest.mark.parametrize(("name", "columns"), [("gsm8k", ("question", "answer")), ("math", ("problem", "solution"))])
def test_p5_validation_rows_are_held_out_of_training(tmp_path: Path, name: str, columns: tuple[str, str]) -> None:
    rows = [dict(zip(columns, (f"{i}?", rf"\\boxed{{{i}}} #### {i}"), strict=True)) for i in range(10)]
    path = tmp_path / "train.json"
    path.write_text(json.dumps(rows))
    task = load_task(name, path={"train": path}, validation_size=3)
    asked = {split: [row[columns[0]] for row in task.rows(split)] for split in ("train", "validation")}
    assert asked == {"train": [f"{i}?" for i in range(7)], "validation": ["7?", "8?", "9?"]}
    assert len(load_task(name, path={"train": path}).rows("train")) == 10
    with pytest.raises(ValueError, match="validation_size=10 leaves nothing"):
        load_task(name, path={"train": path}, validation_size=10).rows("train")
    with pytest.raises(ValueError, match="validation_size=-1 is not allowed"):
        load_task(name, validation_size=-1)


def test_metric_over_nothing_is_nan() -> None:
    assert math.isnan(load_task("countdown").metrics([], [])["solved"])


def test_importing_every_task_imports_no_heavy_package() -> None:
    program = (
        "import sys\n"
        "from rl4dlm.tasks import available_tasks, load_task\n"
        "for name in available_tasks(): load_task(name)\n"
        "load_task('few_clue_sudoku', size=3).rows('train')\n"
        "print(sorted({'torch', 'datasets', 'math_verify', 'sympy', 'numpy', 'trl'} & set(sys.modules)))\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"
