"""Tasks of reasoning-gym: their rows, their splits, and scorers that see a completion in the sandbox alone.

The package is an extra. What is ours is tested with a stand-in for it; where it is installed, it is tried itself.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from rl4dlm import DiffuGRPOTrainer, load_reward, save_denoiser, tiny_llada, tiny_tokenizer
from rl4dlm.cli import main
from rl4dlm.cli.script import run
from rl4dlm.grading import pool, reasoning_gym as grading
from rl4dlm.grading.sandbox import levels
from rl4dlm.grading.sandbox.data import decode
from rl4dlm.tasks import available_tasks, load_task

sandboxed = pytest.mark.skipif(levels.strongest_level() is None, reason="this machine offers no sandbox")
installed = pytest.mark.skipif(find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed")

# What a package of generators looks like, with scorers that do what some of reasoning-gym's do.
STAND_IN = """
import random, sys, time, types
from dataclasses import dataclass

@dataclass
class Config:
    largest: int = 50
    names: tuple = ("a", "b")
    seed: int = 0
    size: int = 500
    def validate(self):
        assert self.largest > 0, "largest must be positive"

class Sums:
    def __init__(self, config):
        config.validate()
        self.config = config
    def __getitem__(self, index):
        rng = random.Random(self.config.seed + index)
        numbers = [rng.randint(1, self.config.largest) for _ in range(2)]
        names = tuple(self.config.names)
        question = f"{numbers[0]}+{numbers[1]}="
        metadata = {"numbers": tuple(numbers), "names": names}
        return {"question": question, "answer": str(sum(numbers)), "metadata": metadata}
    def score_answer(self, answer, entry):
        numbers = entry["metadata"]["numbers"]
        assert type(numbers) is tuple
        if answer == "hang":
            time.sleep(3600)
        if answer == "leave":
            sys.exit(0)
        if answer == "raise":
            raise KeyError(answer)
        if answer == "nearly":
            return 0.5
        return 1.0 if answer == str(sum(numbers)) else 0.01

class Evaluated(Sums):
    def score_answer(self, answer, entry):
        value = eval(answer)
        return 1.0 if value == sum(entry["metadata"]["numbers"]) else 0.01

class Parsed(Sums):
    def score_answer(self, answer, entry):
        from sympy.parsing.sympy_parser import parse_expr
        return 1.0 if parse_expr(answer) == sum(entry["metadata"]["numbers"]) else 0.01

class Backwards(Sums):
    def score_answer(self, answer, entry):
        return 0.0 if answer == "yes" else 1.0

factory = types.SimpleNamespace(
    DATASETS={"sums": (Sums, Config), "evaluated": (Evaluated, Config), "parsed": (Parsed, Config),
              "backwards": (Backwards, Config), "composite": (Sums, Config)})
utils = types.SimpleNamespace(SYSTEM_PROMPTS={"default": "Use tags.", "direct": "Only tags."})

def create_dataset(name, **settings):
    kind, config = factory.DATASETS[name]
    return kind(config(**settings))
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "reasoning_gym"}
    folder = tmp_path / "packages"
    folder.mkdir()
    (folder / "reasoning_gym.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(pool, "_configured", {"deadline": 1.0})
    grading._pool.cache_clear()
    yield
    if grading._pool.cache_info().currsize:
        grading._pool().close()
    grading._pool.cache_clear()
    sys.modules.pop("reasoning_gym", None)
    sys.modules.update(kept)


@pytest.mark.skipif(find_spec("reasoning_gym") is not None, reason="reasoning-gym is installed")
def test_what_to_install_is_said() -> None:
    with pytest.raises(ImportError, match=r"needs reasoning_gym, .*pip install 'rl4dlm\[reasoning-gym\]'"):
        load_task("reasoning_gym:chain_sum")
    entry = grading.entry_text("chain_sum", {}, {"question": "?", "answer": "1", "metadata": {}}, tags=False)
    with pytest.raises(ImportError, match="pip install"):
        load_reward("reasoning_gym")(["?"], ["1"], entry=[entry])
    assert not any(name.startswith("reasoning_gym") for name in available_tasks())


def test_rows_are_the_same_and_no_question_is_in_two_splits(stand_in: None) -> None:
    task = load_task("reasoning_gym:sums", size=60, largest=20)
    assert (task.name, task.rows("train"), task.protocol) == (
        "reasoning_gym:sums",
        load_task("reasoning_gym:sums", size=60, largest=20).rows("train"),
        "style=default",
    )
    questions = {
        split: {
            row["question"]
            for seed in range(3)
            for largest in (20, 30)
            for row in load_task("reasoning_gym:sums", size=60, seed=seed, largest=largest).rows(split)
        }
        for split in task.splits
    }
    assert not questions["train"] & (questions["validation"] | questions["test"])
    assert not questions["validation"] & questions["test"]
    assert load_task("reasoning_gym:sums", size=60, seed=1, largest=20).rows("train") != task.rows("train")
    assert task.rows("train")[:5] == load_task("reasoning_gym:sums", size=5, largest=20).rows("train")


def test_prompts_ask_for_tags_or_for_nothing(stand_in: None) -> None:
    (row,) = load_task("reasoning_gym:sums", size=1, style="direct").rows("test")
    assert [message["content"] for message in row["prompt"]] == ["Only tags.", row["question"]]
    (plain,) = load_task("reasoning_gym:sums", size=1, style="plain").rows("test")
    assert plain["prompt"] == f"{row['question']}\n" and plain["answer"] == row["answer"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sum", {}, r"no task 'sum' \(did you mean 'sums'\?\); its tasks: backwards, evaluated, parsed, sums"),
        ("composite", {}, "no task 'composite'"),
        ("sums", {"largst": 1}, r"'reasoning_gym:sums' has no option 'largst'; its options: .*did you mean 'largest'"),
        ("sums", {"largest": 0}, "'reasoning_gym:sums' does not take largest=0: largest must be positive"),
        ("sums", {"largest": "x"}, "does not take largest='x'"),
        ("sums", {"size": 0}, "size=0"),
        ("sums", {"seed": -1}, "seed=-1"),
        ("sums", {"style": "d1"}, "style='d1'; the prompt styles are default, direct, plain"),
    ],
)
def test_what_a_task_does_not_take_is_named(
    stand_in: None, name: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_task(f"reasoning_gym:{name}", **options)


def test_settings_reach_the_generator_and_lists_become_tuples(stand_in: None) -> None:
    (row,) = load_task("reasoning_gym:sums", size=1, largest=1, names=["x"], style="plain").rows("train")
    assert row["question"] == "1+1=" and json.loads(json.loads(row["entry"])["settings"])["d"]
    assert '["names", {"t": ["x"]}]' in json.loads(row["entry"])["settings"]


@sandboxed
def test_answers_are_scored_and_what_breaks_a_scorer_is_wrong(stand_in: None) -> None:
    (row,) = load_task("reasoning_gym:sums", size=1, style="plain").rows("test")
    texts = [row["answer"], f" {row['answer']}\n", "0", "", "raise", "hang", "leave", "nearly", row["answer"]]
    logged: dict[str, float] = {}
    columns = {"entry": [row["entry"]] * 8 + [None], "log_metric": logged.__setitem__}
    paid = load_reward("reasoning_gym")(["?"] * 9, texts, **columns)
    assert paid == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5, None]
    assert (logged["reward/deadline_rate"], logged["reward/scorer_error_rate"]) == (1 / 8, 2 / 8)
    assert load_reward("reasoning_gym:solved")(["?"] * 9, texts, **columns)[6:] == [0.0, 0.0, None]
    with pytest.raises(ValueError, match="needs the dataset column 'entry'"):
        load_reward("reasoning_gym")(["?"], ["1"])


@sandboxed
def test_checker_and_metrics(stand_in: None) -> None:
    task = load_task("reasoning_gym:sums", size=2)
    first, second = task.rows("test")
    right = f"so <answer>{first['answer']}</answer>"
    assert task.check(right, first) is True and task.check(first["answer"], first) is False  # no tags, no answer
    assert task.check(right, {"question": "?"}) is None
    verdicts, metrics = task.measured([right, "<answer>nearly</answer>"], [first, second])
    assert (verdicts, metrics) == ([True, False], {"solved": 0.5, "score": 0.75})


@sandboxed
def test_what_is_paid_for_any_answer_is_nothing(stand_in: None) -> None:
    (row,) = load_task("reasoning_gym:backwards", size=1, style="plain").rows("test")
    assert [score.value for score in grading.scores(["yes", "whatever", row["answer"]], [row["entry"]] * 3)] == [
        0,
        0,
        1,
    ]


HOSTILE = (
    "__import__('os').system('touch {marker}')",
    "[__import__('pathlib').Path('{marker}').touch()]",
    "open('{marker}', 'w').write('x')",
    "(lambda: open('{marker}', 'w'))()",
    "exec(chr(112))",
    "().__class__.__base__.__subclasses__()",
    "sin.__class__",
    "1.0.real",
    "x.__class__",
    "eval(chr(49))",
    "[" * 3000,
    "9**9**9**9",
    "factorial(10**9)",
)


@sandboxed
def test_hostile_answers_execute_nothing(stand_in: None, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    texts = [text.replace("{marker}", str(marker)) for text in HOSTILE]
    for name in ("sums", "evaluated", "parsed"):
        task = load_task(f"reasoning_gym:{name}", size=1, style="plain")
        (row,) = task.rows("test")
        sum_ = row["answer"]
        assert {score.value for score in grading.scores(texts, [row["entry"]] * len(texts))} == {0.0}
        assert not marker.exists()
        computed = [f"{int(sum_) - 1}+1", f"[x for x in ({sum_},)][0]", sum_]
        paid = [score.value for score in grading.scores(computed, [row["entry"]] * 3)]
        assert paid == [1.0 if name == "parsed" else 0.0, 0.0, 1.0]  # an expression may be an answer, a program not


def test_machine_without_a_sandbox_is_refused(stand_in: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levels, "why_not", lambda level: "not permitted")
    with pytest.raises(RuntimeError, match="sandbox_level='strongest'.*not permitted"):
        load_task("reasoning_gym:sums").require()
    with pytest.raises(RuntimeError, match="not permitted"):
        load_reward("reasoning_gym").requires()  # type: ignore[attr-defined]


def flags(model: Path, task: str, output: Path) -> list[str]:
    given = {
        "model_name_or_path": model, "task": task, "task_args": '{"size": 4, "style": "plain"}',
        "reward_funcs": "reasoning_gym", "output_dir": output, "max_completion_length": 4, "denoising_steps": 1,
        "num_generations": 2, "per_device_train_batch_size": 2, "num_iterations": 1, "max_steps": 1,
        "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no",
    }  # fmt: skip
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


@sandboxed
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_trainers_eval_and_decode_take_it(stand_in: None, tmp_path: Path) -> None:
    model = tmp_path / "model"
    save_denoiser(tiny_llada(), model, tiny_tokenizer())
    shared = ["--task", "reasoning_gym:sums", "--task-args", '{"size": 2, "style": "plain"}', "--canvas-length", "4"]
    assert main(["eval", *shared, "--model", str(model), "--output", str(tmp_path / "found.json")]) == 0
    assert "reasoning_gym:sums" in (tmp_path / "found.json").read_text()
    assert main(["decode", *shared, "--model", str(model), "--output", str(tmp_path / "page.html")]) == 0
    assert run(DiffuGRPOTrainer, flags(model, "reasoning_gym:sums", tmp_path / "out")).state.global_step == 1


# --- the package itself -----------------------------------------------------------------------------------------------

TEN = (
    "chain_sum", "basic_arithmetic", "countdown", "spell_backward", "letter_counting", "gcd", "binary_matrix",
    "simple_integration", "propositional_logic", "mini_sudoku",
)  # fmt: skip


@installed
@sandboxed
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_ten_tasks_train_one_step_and_evaluate(tmp_path: Path) -> None:
    model = tmp_path / "model"
    save_denoiser(tiny_llada(max_position_embeddings=4096), model, tiny_tokenizer())
    tasks = ",".join(f"reasoning_gym:{name}" for name in TEN)
    options = json.dumps({f"reasoning_gym:{name}": {"size": 2, "style": "plain"} for name in TEN})
    found = tmp_path / "found.json"
    command = ["eval", "--model", str(model), "--task", tasks, "--task-args", options, "--canvas-length", "4"]
    assert main([*command, "--output", str(found)]) == 0
    assert all(f"reasoning_gym:{name}" in found.read_text() for name in TEN)
    for name in TEN:
        trainer = run(DiffuGRPOTrainer, flags(model, f"reasoning_gym:{name}", tmp_path / name))
        assert trainer.state.global_step == 1


@installed
@sandboxed
@pytest.mark.slow
def test_every_task_pays_its_own_answer_what_its_scorer_does() -> None:
    import reasoning_gym

    texts, entries, expected = [], [], []
    for name in sorted(set(reasoning_gym.factory.DATASETS) - {"composite"}):
        gym = reasoning_gym.create_dataset(name, seed=0, size=1)
        for row in load_task(f"reasoning_gym:{name}", size=2, style="plain").rows("train"):
            entry = decode(json.loads(row["entry"])["entry"].encode())
            texts.append(row["answer"])
            entries.append(row["entry"])
            expected.append(gym.score_answer(row["answer"].strip(), entry) if row["answer"] else 0.0)
    assert [score.value for score in grading.scores(texts, entries)] == expected


@installed
@sandboxed
def test_hostile_answers_execute_nothing_in_the_package_itself(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    texts = [text.replace("{marker}", str(marker)) for text in HOSTILE]
    for name in ("countdown", "puzzle24", "simple_integration", "binary_matrix", "spiral_matrix", "n_queens", "jugs"):
        (row,) = load_task(f"reasoning_gym:{name}", size=1, style="plain").rows("test")
        assert {score.value for score in grading.scores(texts, [row["entry"]] * len(texts))} == {0.0}
        assert not marker.exists()
