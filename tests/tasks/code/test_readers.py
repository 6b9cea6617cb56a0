"""Readers of the published data sets, on small rows of our own in the published columns."""

from __future__ import annotations

import base64
import json
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest

from rl4dlm.tasks import load_task
from rl4dlm.tasks.code.acecode import hard, percentile
from rl4dlm.tasks.code.livecodebench import pickled_text, private_text


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def problem(row: dict[str, Any]) -> dict[str, Any]:
    return json.loads(row["problem"])


# --- HumanEval and MBPP -----------------------------------------------------------------------------------------------

BEGINNING = (
    'import math\n\ndef area(r):\n    """ The area of a circle of radius r.\n    >>> area(0)\n    0.0\n    """\n'
)
HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": BEGINNING,
    "entry_point": "area",
    "canonical_solution": "    return math.pi * r * r\n",
    "test": "def check(candidate):\n    assert candidate(0) == 0\n    assert round(candidate(1), 2) == 3.14\n",
}


def test_humaneval_shows_the_beginning_and_goes_on_from_it(tmp_path: Path) -> None:
    (row,) = load_task("humaneval", path=written(tmp_path / "h.jsonl", [HUMANEVAL])).rows("test")
    asked, begun = row["prompt"]
    assert asked["content"] == (
        "Please provide a self-contained Python script that solves the following problem in a markdown code block:\n"
        f"```python\n{BEGINNING.strip()}\n```"
    )
    assert begun["role"] == "assistant" and begun["content"].endswith("passes corresponding tests:\n```python\n")
    assert problem(row) == {
        "tests": [{"source": "assert area(0) == 0"}, {"source": "assert round(area(1), 2) == 3.14"}],
        "entry_point": "area",
        "setup": "import math",
        "prefix": BEGINNING,
    }
    assert row["question"] == "The area of a circle of radius r."
    assert row["solution"] == f"{BEGINNING}    return math.pi * r * r\n"
    path = str(tmp_path / "h.jsonl")
    assert load_task("humaneval", path=path, style="complete").rows("test")[0]["prompt"] == BEGINNING
    (d1,) = load_task("humaneval", path=path, style="d1").rows("test")[0]["prompt"]
    assert d1["content"].endswith(f"\nFunction to implement:\n{BEGINNING}") and "<reasoning>" in d1["content"]


def test_humaneval_plus_has_calls_with_expected_values(tmp_path: Path) -> None:
    test = "def check(candidate):\n    inputs = [[0], [2]]\n    results = [0.0, 12.566]\n    pass\n"
    path = written(tmp_path / "h.jsonl", [{**HUMANEVAL, "test": test}])
    (row,) = load_task("humaneval_plus", path=path).rows("test")
    assert problem(row)["tests"] == [
        {"call": "area(0)", "expected": "0.0", "tolerance": "1e-6"},
        {"call": "area(2)", "expected": "12.566", "tolerance": "1e-6"},
    ]


MBPP_FULL = {
    "task_id": 601,
    "text": "Write a function to double a number.",
    "code": "def double(n):\r\n  return 2 * n",
    "test_list": ["assert double(2) == 4", "assert double(-1) == -2"],
    "test_setup_code": "",
    "challenge_test_list": [],
}


def test_mbpp_shows_a_test_and_reads_both_configurations(tmp_path: Path) -> None:
    sanitized = {key: MBPP_FULL[key] for key in ("task_id", "code", "test_list")}
    sanitized |= {"prompt": MBPP_FULL["text"], "source_file": "x", "test_imports": ["import math"]}
    for published, setup in ((MBPP_FULL, None), (sanitized, "import math")):
        (row,) = load_task("mbpp", path=written(tmp_path / "m.jsonl", [published])).rows("test")
        assert (
            '```python\n"""\nWrite a function to double a number.\nassert double(2) == 4\n"""\n```'
            in (row["prompt"][0]["content"])
        )
        found = problem(row)
        assert found["tests"] == [{"source": source} for source in MBPP_FULL["test_list"]]
        assert found["entry_point"] == "double" and found.get("setup") == setup
    (row,) = load_task("mbpp", path=str(tmp_path / "m.jsonl"), style="d1").rows("test")
    assert row["prompt"][0]["content"].endswith("The function name and the parameters is double(n)\n")
    test = (
        "inputs = [[1], [3]]\nresults = [2, 6]\nfor inp, exp in zip(inputs, results):\n    assert double(*inp) == exp"
    )
    (row,) = load_task("mbpp_plus", path=written(tmp_path / "p.jsonl", [{**sanitized, "test": test}])).rows("test")
    assert [test["call"] for test in problem(row)["tests"]] == ["double(1)", "double(3)"]
    with pytest.raises(ValueError, match="row 601 has no column 'test'"):
        load_task("mbpp_plus", path=str(tmp_path / "m.jsonl")).rows("test")


# --- sets to train on -------------------------------------------------------------------------------------------------


def kodcode_row(number: int, question: str | None = None) -> dict[str, Any]:
    return {
        "question_id": f"k{number}",
        "question": question or f"Return {number} more than n, whatever the sign of it.",
        "solution": f"def more(n):\n    return n + {number}",
        "test": f"from solution import more\n\ndef test_more():\n    assert more(1) == {number + 1}\n",
        "test_info": [{"function_name": "more", "parameter_list": "(n)", "function_declaration": "def more(n):"}],
    }


def test_kodcode_has_the_prompt_of_the_d1_line(tmp_path: Path) -> None:
    unusable = {**kodcode_row(9), "test": "def test_it(fixture):\n    assert fixture\n"}
    path = {"train": written(tmp_path / "k.jsonl", [unusable, *map(kodcode_row, range(4))])}
    task = load_task("kodcode", path=path, evaluation_sets=[], validation_size=1)
    train, validation = task.rows("train"), task.rows("validation")
    assert [row["task_id"] for row in train + validation] == ["k0", "k1", "k2", "k3"]
    (asked,) = train[0]["prompt"]
    assert asked["content"].endswith(
        "Function to implement: Return 0 more than n, whatever the sign of it.\n"
        "The function name and the parameters is more(n)\n"
    )
    assert problem(train[0]) == {"tests": [{"source": "assert more(1) == 1"}], "entry_point": "more"}
    system, asked = load_task("kodcode", path=path, evaluation_sets=[], style="espo").rows("train")[0]["prompt"]
    assert "single fenced code block" in system["content"]
    assert asked["content"].endswith("sign of it.\nTest cases: assert more(1) == 1")


def test_rows_of_evaluation_sets_are_not_trained_on(tmp_path: Path) -> None:
    held = written(tmp_path / "held.jsonl", [MBPP_FULL])
    code = written(tmp_path / "code.jsonl", [HUMANEVAL])
    rows = [
        kodcode_row(0),
        kodcode_row(1, "Please WRITE a function, to double a number! Do it well."),
        kodcode_row(2, "Given r, give back the area of a circle of radius r as a float."),
        kodcode_row(3, "Write a function to halve a number."),
    ]
    path = {"train": written(tmp_path / "k.jsonl", rows)}

    def kept(sets: list[str], **options: Any) -> list[str]:
        return [
            row["task_id"] for row in load_task("kodcode", path=path, evaluation_sets=sets, **options).rows("train")
        ]

    assert kept([]) == ["k0", "k1", "k2", "k3"]
    assert kept([held]) == ["k0", "k2", "k3"]
    assert kept([held, code]) == ["k0", "k3"]
    assert kept([held], overlap=4) == ["k0", "k2"]
    with pytest.raises(ValueError, match="task 'kodcode' reads a file: set evaluation_sets"):
        load_task("kodcode", path=path)
    with pytest.raises(ValueError, match="evaluation_sets names 'humanevil'"):
        load_task("kodcode", evaluation_sets=["humanevil"])
    with pytest.raises(FileNotFoundError, match="absent.jsonl"):
        load_task("kodcode", evaluation_sets=["absent.jsonl"])


def acecode_row(number: int, rates: dict[str, list[float]]) -> dict[str, Any]:
    return {
        "id": f"a{number}",
        "question": f"Write a function that adds {number}.",
        "test_cases": [f"assert add(1) == {number + 1}", f"assert add(0) == {number}"],
        "inferences": [
            {"model_name": model, "pass_rate": rate, "completion": f"def add(n):\n    return n + {number}  # {rate}"}
            for model, found in rates.items()
            for rate in found
        ],
    }


def test_the_hard_part_is_chosen_by_mean_and_deviation_of_two_models() -> None:
    rows = [
        acecode_row(0, {"qwen_coder_2.5": [0.0, 0.0], "other": [1.0]}),  # hard, but no spread
        acecode_row(1, {"qwen_coder_2.5": [0.0], "llama3_instruct": [0.4]}),  # the hard part
        *(acecode_row(n, {"qwen_coder_2.5": [0.8, 1.0]}) for n in range(2, 8)),
        acecode_row(8, {"other": [0.0, 1.0]}),  # not known
    ]
    # Of means 0, 0.2 and six of 0.9 the lowest fifth ends at 0.48; of deviations 0, 0.2 and six of 0.1 the lower two
    # fifths end at 0.1.
    assert percentile([0.0, 0.2, *[0.9] * 6], 20) == pytest.approx(0.48)
    assert [row["id"] for row in hard(rows)] == ["a1"]
    with pytest.raises(ValueError, match="subset='hard' needs the column inferences"):
        hard(rows[8:])


def test_acecode_shows_a_test_and_asks_a_second_time_for_a_function(tmp_path: Path) -> None:
    spoken = {**acecode_row(1, {"qwen_coder_2.5": [0.0, 0.9]}), "question": "Can you add 1?"}
    rows = [acecode_row(0, {"qwen_coder_2.5": [0.9, 0.0]}), spoken]
    path = {"train": written(tmp_path / "a.jsonl", rows)}
    first, second, third = load_task("acecode", path=path, evaluation_sets=[]).rows("train")
    assert first["prompt"] == [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "Write a function that adds 0.\nTest cases: assert add(1) == 1"},
    ]
    function = 'def add(n):\n    """\n    Write a function that adds 0.\n    """\n'
    assert second["prompt"][1]["content"] == f"Please complete the following problem:\n```\n{function}```\n"
    assert problem(second) == {**problem(first), "prefix": function}
    assert third["prompt"][1]["content"] == "Can you add 1?\nTest cases: assert add(1) == 2"
    assert "prefix" not in problem(third) and first["solution"].endswith("# 0.9")
    assert len(load_task("acecode", path=path, evaluation_sets=[], subset="all").rows("train")) == 2
    with pytest.raises(ValueError, match="subset='harder'"):
        load_task("acecode", subset="harder")


# --- LiveCodeBench ----------------------------------------------------------------------------------------------------


def published(cases: list[dict[str, str]]) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(cases)))).decode()


def livecodebench_row(number: int, day: str, **columns: Any) -> dict[str, Any]:
    return {
        "question_title": f"Problem {number}",
        "question_content": f"Read n and print n plus {number}.",
        "platform": "atcoder",
        "question_id": f"q{number}",
        "contest_date": f"{day}T00:00:00",
        "starter_code": "",
        "difficulty": "easy",
        "public_test_cases": json.dumps([{"input": "1\n", "output": f"{number + 1}\n", "testtype": "stdin"}]),
        "private_test_cases": published([{"input": "5\n", "output": f"{number + 5}\n", "testtype": "stdin"}]),
        "metadata": "{}",
        **columns,
    }


METHOD = {
    "starter_code": "class Solution:\n    def add(self, a: int, b: List[int]) -> int:\n        ",
    "public_test_cases": json.dumps([{"input": "1\n[2, 3]", "output": "6", "testtype": "functional"}]),
    "private_test_cases": published([{"input": "0\n[]", "output": "0", "testtype": "functional"}]),
    "metadata": json.dumps({"func_name": "add"}),
    "difficulty": "hard",
}


def test_livecodebench_reads_releases_dates_and_private_tests(tmp_path: Path) -> None:
    written(tmp_path / "test.jsonl", [livecodebench_row(1, "2023-08-01"), livecodebench_row(2, "2024-01-15", **METHOD)])
    written(tmp_path / "test2.jsonl", [livecodebench_row(3, "2024-04-01")])

    def read(**options: Any) -> list[dict[str, Any]]:
        return load_task("livecodebench", path=str(tmp_path), **options).rows("test")

    one, two = read(release="release_v1")
    assert problem(one)["tests"] == [{"stdin": "1\n", "stdout": "2\n"}, {"stdin": "5\n", "stdout": "6\n"}]
    assert [(test["call"], test["expected"]) for test in problem(two)["tests"]] == [
        ("Solution().add(1, [2, 3])", "6"),
        ("Solution().add(0, [])", "0"),
    ]
    assert "read the inputs from stdin" in one["prompt"][1]["content"].lower()
    assert f"```python\n{METHOD['starter_code']}\n```" in two["prompt"][1]["content"]
    assert problem(one)["setup"].startswith("from string import *")
    assert [row["task_id"] for row in read(release="release_v2")] == ["q1", "q2", "q3"]
    dated = read(release="release_v2", since="2024-01-15", until="2024-03-31")
    assert [(row["task_id"], row["date"]) for row in dated] == [("q2", "2024-01-15")]
    assert [row["task_id"] for row in read(release="release_v2", difficulty="hard")] == ["q2"]
    assert len(problem(read(release="release_v1", private_tests=False)[0])["tests"]) == 1
    assert len(read(release="release_v2", size=2)) == 2
    with pytest.raises(FileNotFoundError, match="has no test3.jsonl, which release_v3 needs"):
        read(release="release_v3")
    with pytest.raises(ValueError, match="no problem of release_v1 since 2030-01-01"):
        read(release="release_v1", since="2030-01-01")
    for options, named in (
        ({"release": "v9"}, "release='v9'"),
        ({"since": "autumn"}, "since='autumn'"),
        ({"since": "2024-02-01", "until": "2024-01-01"}, "since must not be later"),
    ):
        with pytest.raises(ValueError, match=named):
            load_task("livecodebench", **options)


class Harmful:
    """Its pickle calls a function when it is loaded."""

    def __reduce__(self) -> Any:
        return (pytest.fail, ("the pickle was loaded",))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_read_and_never_loaded(protocol: int) -> None:
    text = json.dumps([{"input": "ä\n\U0001f600", "output": "x" * 300}], ensure_ascii=False)
    assert pickled_text(pickle.dumps(text, protocol)) == text
    for other in (Harmful(), ["a"], ("a", "b"), b"bytes", 5, None):
        with pytest.raises(ValueError, match="private_test_cases is a pickle of"):
            pickled_text(pickle.dumps(other, protocol))


def test_private_tests_may_be_plain_and_are_refused_where_they_are_neither() -> None:
    assert private_text('[{"input": "1"}]') == '[{"input": "1"}]'
    harmful = base64.b64encode(zlib.compress(pickle.dumps(Harmful()))).decode()
    for value, named in (
        (harmful, "is not loaded"),
        ("no base64!", "neither JSON nor base64"),
        (base64.b64encode(b"plain").decode(), "neither JSON nor base64 of zlib"),
        (base64.b64encode(zlib.compress(b"\x80\x04")).decode(), "is not loaded"),
    ):
        with pytest.raises(ValueError, match=named):
            private_text(value)
