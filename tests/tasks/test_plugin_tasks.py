"""Tasks of people's own: named as rewards are, in trainers, evaluation and decoding (P5's neighbour, issue item 5)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from rl4dlm import DiffuGRPOTrainer, save_denoiser, tiny_llada, tiny_tokenizer
from rl4dlm.cli import main
from rl4dlm.cli.script import run
from rl4dlm.tasks import available_tasks, load_task

TASK = """
from dataclasses import dataclass

from rl4dlm.tasks import Task


@dataclass(frozen=True)
class Sums(Task):
    size: int = 4

    def _rows(self, split):
        return [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(self.size)]

    def check(self, completion, row):
        return completion == row["answer"]


class Unfinished(Task):
    pass


class Other:
    pass


def reward(completions, answer, **_):
    return [float(text == wanted) for text, wanted in zip(completions, answer)]
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    path = tmp_path / "sums.py"
    path.write_text(TASK)
    return path


def register(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What installing a distribution with an entry point leaves behind."""
    info = folder / "own_tasks-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-tasks\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[rl4dlm.tasks]\nmy_sums = own_sums:Sums\n")
    (folder / "own_sums.py").write_text(TASK)
    monkeypatch.syspath_prepend(str(folder))


def test_a_task_is_named_by_file_module_or_entry_point(
    plugin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site").mkdir()
    register(tmp_path / "site", monkeypatch)
    for name in (f"{plugin}:Sums", "own_sums:Sums", "my_sums"):
        task = load_task(name, size=2)
        assert (task.name, len(task.rows("validation"))) == ("sums", 2)
        assert task.check("1", task.rows("train")[0]) is True
    assert "my_sums" in available_tasks()
    sys.modules.pop("own_sums")


def test_a_file_with_one_task_needs_no_class(tmp_path: Path) -> None:
    path = tmp_path / "one.py"
    path.write_text(TASK.replace("class Unfinished(Task)", "class Unfinished"))
    assert type(load_task(str(path))).__name__ == "Sums"


@pytest.mark.parametrize(
    ("thing", "options", "message"),
    [
        ("", {}, "defines Sums, Unfinished; name one task"),
        (":Sum", {}, r"no class 'Sum'; it defines Sums, Unfinished, Other \(did you mean 'Sums'\?\)"),
        (":Other", {}, "no subclass of rl4dlm.tasks.Task"),
        (":reward", {}, "no subclass of rl4dlm.tasks.Task"),
        (":Unfinished", {}, "does not define _rows, check"),
        (":Sums", {"sizes": 1}, r"no option 'sizes'; its options: size \(did you mean 'size'\?\)"),
    ],
)
def test_what_is_no_task_is_named(plugin: Path, thing: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_task(f"{plugin}{thing}", **options)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_task("absent.py:Sums")


def test_p6_names_spelt_like_a_task_or_a_reward_are_offered() -> None:
    from rl4dlm.grading import load_reward

    with pytest.raises(ValueError, match=r"unknown task 'countdwn'.*did you mean 'countdown'"):
        load_task("countdwn")
    with pytest.raises(ValueError, match=r"unknown reward 'sudokuu'.*did you mean 'sudoku'"):
        load_reward("sudokuu")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_trainers_eval_and_decode_take_it(plugin: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    save_denoiser(tiny_llada(), model, tiny_tokenizer())
    shared = ["--task", f"{plugin}:Sums", "--canvas-length", "4", "--split", "validation", "--model", str(model)]
    assert main(["eval", *shared, "--output", str(tmp_path / "found.json")]) == 0
    assert "sums" in json.dumps(json.loads((tmp_path / "found.json").read_text()))
    assert main(["decode", *shared, "--output", str(tmp_path / "page.html")]) == 0
    flags = {
        "model_name_or_path": model, "task": f"{plugin}:Sums", "task_args": '{"size": 3}',
        "reward_funcs": f"{plugin}:reward", "output_dir": tmp_path / "out", "max_completion_length": 4,
        "denoising_steps": 2, "num_generations": 2, "per_device_train_batch_size": 2, "num_iterations": 1,
        "max_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no",
    }  # fmt: skip
    trainer = run(DiffuGRPOTrainer, [word for name, value in flags.items() for word in (f"--{name}", str(value))])
    assert trainer.state.global_step == 1
