"""The reward plugins: what each pays for, in its own form and in the form of the published numbers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, strategies as st

from rl4dlm.grading import available_rewards, load_reward
from rl4dlm.tasks import grids, load_task

PERFECT = "<reasoning>\nA\n</reasoning>\n<answer>\n5\n</answer>\n"
TWO_LINES = "<reasoning>\nA\nB\n</reasoning>\n<answer>\n5\n</answer>\n"
INLINE = "<reasoning>A</reasoning><answer>5</answer>"
HOSTILE = [
    "9**9**9",
    "__import__('os').system('true')",
    "9" * 50_000,
    "(" * 50_000,
    "<answer>" * 5_000,
    "\\boxed{" * 5_000,
]

# Values for the columns that rewards ask for.
COLUMNS: dict[str, Any] = {
    "answer": "5",
    "expression": "1+2*2",
    "numbers": [2, 3],
    "target": 5,
    "puzzle": "1040002001022000",
    "solution": "1243342141322314",
    "nfe": 4,
    "tokens_per_forward": 0.5,
    "problem": '{"tests": [{"call": "f(2)", "expected": "4"}], "entry_point": "f"}',
}


# Those of reasoning-gym need the package, and rows that it has made: tests/tasks/test_reasoning_gym.py.
REWARDS = [name for name in available_rewards() if not name.startswith("reasoning_gym")]


def pay(name: str, text: str, **columns: Any) -> float | None:
    (value,) = load_reward(name)(["?"], [text], **{key: [value] for key, value in {**COLUMNS, **columns}.items()})
    return value


@pytest.mark.parametrize("name", REWARDS)
def test_every_reward_takes_strings_and_messages_and_gives_one_number_each(name: str) -> None:
    texts = ["", PERFECT, "<answer>2+3</answer>", r"\boxed{5}"]
    columns = {key: [value] * len(texts) for key, value in COLUMNS.items()}
    function = load_reward(name)
    plain = function(["?"] * 4, texts, completion_ids=[[1]] * 4, trainer_state=None, **columns)
    chat = function(
        [[{"role": "user", "content": "?"}]] * 4,
        [[{"role": "assistant", "content": text}] for text in texts],
        **columns,
    )
    assert plain == chat
    assert len(plain) == 4 and all(type(value) is float for value in plain)


@pytest.mark.parametrize("name", REWARDS)
def test_hostile_text_earns_nothing_but_the_consolation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name.startswith("code"):  # programs that never end are given less time
        monkeypatch.setenv("RL4DLM_REWARD_DEADLINE", "1")
    for text in HOSTILE:
        for completion in (text, f"<answer>{text}</answer>"):
            value = pay(name, completion)
            assert value is not None and value <= (1.0 if name.startswith("math") else 0.5)


@pytest.mark.parametrize(
    "name",
    [
        "countdown",
        "sudoku",
        "few_clue_sudoku",
        "gsm8k:correctness",
        "math:correctness",
        "arithmetic_steps",
        "arithmetic_steps:steps",
        "countdown_small",
        "countdown_small:tries",
    ],
)
def test_hostile_text_in_an_answer_scores_zero(name: str) -> None:
    assert [pay(name, f"<answer>{text}</answer>") for text in HOSTILE] == [0.0] * len(HOSTILE)


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("gsm8k", "answer"), ("gsm8k_compat", "answer"), ("math", "answer"), ("math_compat", "answer"),
        ("countdown", "target"),
        ("countdown_compat", "numbers"), ("sudoku", "solution"), ("sudoku_compat", "puzzle"),
        ("few_clue_sudoku", "puzzle"), ("arithmetic_steps", "answer"), ("countdown_small", "target"),
        ("code", "problem"), ("code_compat", "problem"),
    ],
)  # fmt: skip
def test_row_without_its_gold_value_is_not_scored_and_a_missing_column_is_an_error(name: str, column: str) -> None:
    task = name.removesuffix("_compat")
    name = task if name == task else f"{task}:{name}"
    assert pay(name, PERFECT, **{column: None}) is None
    columns = {key: [value] for key, value in COLUMNS.items() if key != column}
    with pytest.raises(ValueError, match=f"column '{column}'"):
        load_reward(name)(["?"], [PERFECT], **columns)


# Recorded values of d1's functions (xml count, strict, soft).
@pytest.mark.parametrize(
    ("text", "tags", "strict", "soft"),
    [
        (PERFECT, 0.5, 0.5, 0),
        (PERFECT[:-1], 0.454, 0, 0),
        (TWO_LINES, 0.5, 0, 0),
        (INLINE, 0, 0, 0.5),
        (PERFECT + "xyz", 0.494, 0, 0),
    ],
)
def test_gsm8k_format_terms_of_the_paper(text: str, tags: float, strict: float, soft: float) -> None:
    assert pay("gsm8k:tag_count_compat", text) == pytest.approx(tags, abs=1e-12)
    assert pay("gsm8k:strict_format_compat", text) == strict
    assert pay("gsm8k:soft_format_compat", text) == soft


@given(st.lists(st.sampled_from([*PERFECT.split("\n"), "\n", "\n", "\n", "A"]), max_size=12).map("".join))
def test_papers_strict_and_soft_format_exclude_each_other(text: str) -> None:
    assert pay("gsm8k:strict_format_compat", text) + pay("gsm8k:soft_format_compat", text) <= 0.5


def test_gsm8k_pays_all_five_terms_for_the_format_it_asks_for() -> None:
    assert pay("gsm8k", PERFECT) == pay("gsm8k", TWO_LINES) == pay("gsm8k", PERFECT.rstrip()) == 4.0
    assert pay("gsm8k:gsm8k_compat", PERFECT) == 3.5
    assert pay("gsm8k", INLINE) == 0.5 + 0.5 + 2.0  # no tag has a line to itself
    assert pay("gsm8k:tag_count", PERFECT + "xyz") == pytest.approx(0.497)
    assert pay("gsm8k:strict_format", "So: " + PERFECT) == pay("gsm8k:soft_format", "So: " + PERFECT) == 0.0


@pytest.mark.parametrize(
    ("answer", "gold", "fixed", "compat"),
    [("1,000", "1000", 2.0, 0.0), ("1000", "1,000", 2.0, 0.0), ("5.0", "5", 2.0, 0.0), (r"\boxed{5}", "5", 2.0, 0.0),
    ("5", "5", 2.0, 2.0),
     ("5 or 6", "5", 0.0, 0.0), ("-5", "5", 0.0, 0.0)],
)  # fmt: skip
def test_gsm8k_correctness_is_numeric_where_the_papers_compares_strings(
    answer: str, gold: str, fixed: float, compat: float
) -> None:
    text = f"<answer>{answer}</answer>"
    assert pay("gsm8k:correctness", text, answer=gold) == fixed
    assert pay("gsm8k:correctness_compat", text, answer=gold) == compat


@pytest.mark.parametrize(
    ("answer", "fixed", "compat"), [("-5", 0.5, 0), ("1,000", 0.5, 0), ("5.5", 0, 0), ("4²", 0, 0.5), ("٣", 0, 0.5)]
)
def test_gsm8k_integer(answer: str, fixed: float, compat: float) -> None:
    assert pay("gsm8k:integer", f"<answer>{answer}</answer>") == fixed
    assert pay("gsm8k:integer_compat", f"<answer>{answer}</answer>") == compat


@pytest.mark.parametrize(
    ("text", "tier", "compat"),
    [
        (r"<answer>\boxed{5}</answer>", 1.0, 0.75), ("<answer>5</answer>", 0.75, 0.75), (r"\boxed{5}", 0.5, 0.25),
        ("5", 0.25, 0.25),
        (r"<answer>\boxed{5}", 0.5, 0.75), (r"\boxed{5}<answer>5</answer>", 0.75, 0.75),
        ("<answer>\boxed{5}</answer>", 0.75, 1.0),
    ],
)  # fmt: skip
def test_math_tiers_and_the_papers_backspace(text: str, tier: float, compat: float) -> None:
    assert pay("math:format_tiers", text) == tier
    assert pay("math:format_tiers_compat", text) == compat


def test_math_correctness_is_mathematical_where_the_papers_compares_strings() -> None:
    equal = [("5.0", "5"), ("1,000", "1000"), (r"-\frac{1}{2}", "-1/2"), (r"\frac{2}{4}", r"\frac{1}{2}")]
    for answer, gold in equal:
        text = rf"<answer>\boxed{{{answer}}}</answer>"
        assert pay("math:correctness", text, answer=gold) == 2.0
        assert pay("math:correctness_compat", text, answer=gold) == 0.0
    assert pay("math", r"<answer>\boxed{5}</answer>", answer=r"so \boxed{5}") == 3.0
    assert pay("math:correctness", r"<answer>\boxed{6}</answer>", answer="5") == 0.0
    assert pay("math:correctness_compat", r"\boxed{5}", answer=r"\boxed{5") is None


@pytest.mark.parametrize(
    ("answer", "fixed", "compat"),
    [
        ("3*4+5", 1.0, 1.0), ("3+4+5", 0.1, 0.1), ("3*4+5+5", 0.0, 0.1), ("3*4+5 = 17", 1.0, 0.1), ("17", 0.0, 0.1),
        ("", 0.0, 0.1),
        ("3×4+5", 1.0, 0.1), ("__import__('os')", 0.0, 0.1),
    ],
)  # fmt: skip
def test_countdown_pays_a_little_for_the_right_numbers_where_the_papers_pays_it_for_anything(
    answer: str, fixed: float, compat: float
) -> None:
    instance = {"numbers": [3, 4, 5], "target": 17}
    assert pay("countdown", f"<answer>{answer}</answer>", **instance) == fixed
    assert pay("countdown:countdown_compat", f"<answer>{answer}</answer>", **instance) == compat
    assert pay("countdown", answer, **instance) == pay("countdown:countdown_compat", answer, **instance) == 0.0


def test_countdown_power_is_the_papers_alone() -> None:
    instance = {"numbers": [8, 2], "target": 64}
    assert pay("countdown", "<answer>8**2</answer>", **instance) == 0.0
    assert pay("countdown:countdown_compat", "<answer>8**2</answer>", **instance) == 1.0


def test_countdown_pays_one_exactly_when_the_task_is_solved() -> None:
    task = load_task("countdown", size=30)
    for row in task.rows("train"):
        for answer in (row["solution"], row["solution"] + "+0", str(row["target"])):
            text = f"<answer>{answer}</answer>"
            paid = pay("countdown", text, numbers=row["numbers"], target=row["target"])
            assert (paid == 1.0) == task.check(text, row)


def test_sudoku_pays_the_share_of_right_empty_cells() -> None:
    puzzle, solution = COLUMNS["puzzle"], COLUMNS["solution"]
    empty = [cell for cell in range(16) if puzzle[cell] == "0"]
    cells = list(solution)
    for wrong, cell in enumerate(empty, start=1):
        cells[cell] = "1" if solution[cell] != "1" else "2"
        share = (len(empty) - wrong) / len(empty)
        assert pay("sudoku", f"<answer>{''.join(cells)}</answer>") == share
        assert pay("sudoku:sudoku_compat", f"<answer>{''.join(cells)}</answer>") == share


def test_sudoku_needs_the_clues_and_16_cells_where_the_papers_does_not() -> None:
    solution = COLUMNS["solution"]
    clue_changed = "4" + solution[1:]
    assert pay("sudoku", f"<answer>{clue_changed}</answer>") == 0.0
    assert pay("sudoku:sudoku_compat", f"<answer>{clue_changed}</answer>") == 1.0
    assert pay("sudoku", f"<answer>{solution}1</answer>") == pay("sudoku", f"<answer>{solution[:-1]}</answer>") == 0.0
    assert pay("sudoku:sudoku_compat", f"<answer>{solution}1</answer>") == 1.0
    assert pay("sudoku", f"<answer>{solution}</answer>", puzzle=solution) == 1.0
    assert pay("sudoku:sudoku_compat", f"<answer>{solution}</answer>", puzzle=solution) == 0.0
    assert pay("sudoku", f"<answer>{solution}</answer>", puzzle="1") is None


def test_few_clue_sudoku_pays_for_every_valid_answer_and_nothing_for_near_ones() -> None:
    puzzle = "1000000000000002"
    for grid in grids.all_grids():
        solved = grid[0] == "1" and grid[15] == "2"
        assert pay("few_clue_sudoku", grid, puzzle=puzzle) == float(solved)
    answer = grids.solutions(puzzle)[0]
    assert pay("few_clue_sudoku", " ".join(answer), puzzle=puzzle) == 1.0
    assert (
        pay("few_clue_sudoku", answer[:-1], puzzle=puzzle) == pay("few_clue_sudoku", answer + "1", puzzle=puzzle) == 0.0
    )
    assert pay("few_clue_sudoku", answer, puzzle="1") is None


def test_few_clue_sudoku_units_counts_rows_columns_and_boxes() -> None:
    answer = "1234341243212143"
    puzzle = answer[0] + "0" * 15
    assert pay("few_clue_sudoku:units", answer, puzzle=puzzle) == 1.0
    # Exchanging two cells of a row leaves the row right and breaks what else holds only one of them.
    swapped = answer[:14] + answer[15] + answer[14]  # same box, two columns
    assert pay("few_clue_sudoku:units", swapped, puzzle=puzzle) == pytest.approx(10 / 12)
    assert pay("few_clue_sudoku:units", "2" + answer[1:], puzzle=puzzle) == 0.0  # the clue is gone
    assert pay("few_clue_sudoku:units", answer[:-1], puzzle=puzzle) == 0.0


@pytest.mark.parametrize(
    ("text", "solved", "steps"),
    [
        ("7+6-4\n13-4\n\\boxed{9}", 1.0, 1.0),
        ("7+6-4\n13-4\n\\boxed{9} or so 12\n12", 1.0, 1.0),  # text behind the box
        ("7+6-4\n13-4\n\\boxed{8}", 0.0, 1.0),  # the work is right, the answer is not
        ("7+6-4\n12-4\n\\boxed{8}", 0.0, 0.5),
        ("9*3-4\n27-4\n\\boxed{23}", 0.0, 0.0),
        ("\\boxed{9}", 1.0, 0.0), ("9", 1.0, 0.0), ("<answer>9</answer>", 1.0, 0.0),
        ("7+6-4\n13-4\n9", 0.0, 2 / 3),  # several numbers and no box: none of them is the answer
        ("7+6-4\n13-4\n\\boxed{9", 0.0, 1.0),  # a box that never closes
        ("13-4\n\\boxed{9}", 1.0, 0.5),  # a step is left out
        ("7+6-4\n7+6-4\n13-4\n\\boxed{9}", 1.0, 2 / 3), ("13-4\n7+6-4\n\\boxed{9}", 1.0, 0.5),
        ("so\n7+6-4\n13-4\n\\boxed{9}", 1.0, 2 / 3),
        ("7+2*3-4\n7+6-4\n13-4\n\\boxed{9}", 1.0, 2 / 3),  # the question again
        ("\n 7 + 6 - 4 \n\n13-4\n\\boxed{9}", 1.0, 1.0), ("", 0.0, 0.0),
    ],
)  # fmt: skip
def test_arithmetic_steps_pays_for_the_answer_and_for_each_step(text: str, solved: float, steps: float) -> None:
    row = {"expression": "7+2*3-4", "answer": "9"}
    assert pay("arithmetic_steps", text, **row) == solved
    assert pay("arithmetic_steps:steps", text, **row) == pytest.approx(steps)


@pytest.mark.parametrize("expression", [None, "", "x", "7", "7+2"])
def test_arithmetic_without_anything_to_work_out_has_no_share_of_steps(expression: str | None) -> None:
    assert pay("arithmetic_steps:steps", "9", expression=expression) is None


@pytest.mark.parametrize(
    ("text", "solved", "tries"),
    [
        ("4*3+7=19\n4*7-3=25\n\\boxed{4*7-3}", 1.0, 1.0),
        ("4*3+7=19\n\\boxed{4*7-3}", 1.0, 1.0),
        ("\\boxed{4*7-3}", 1.0, 0.0), ("<answer>4*7-3</answer>", 1.0, 0.0), ("\\boxed{4*7-3=25} x", 1.0, 0.0),
        ("4*7-3=25", 0.0, 1.0), ("4*7-3=25\n\\boxed{4*7-3", 0.0, 1.0),
        ("4*3+7=19\n\\boxed{4*3+7}", 0.0, 1.0), ("\\boxed{25}", 0.0, 0.0),
        ("4*3+7=20\n4*7-3=25\n\\boxed{4*7-3}", 1.0, 0.5),  # false
        ("4*3+4=16\n4*7-3=25\n\\boxed{4*7-3}", 1.0, 0.5),  # other numbers
        ("4*7-3=25\n4*7-3=25\n\\boxed{4*7-3}", 1.0, 0.5),  # the same again
        ("4*7-3=20+5\n4*7-3\n=25\nso", 0.0, 0.0), ("4*7-3=25=25", 0.0, 0.0), ("", 0.0, 0.0),
    ],
)  # fmt: skip
def test_countdown_small_pays_for_the_target_and_for_honest_tries(text: str, solved: float, tries: float) -> None:
    row = {"numbers": [4, 7, 3], "target": 25}
    assert pay("countdown_small", text, **row) == solved
    assert pay("countdown_small:tries", text, **row) == tries
    assert (pay("countdown", text, **row) == 1.0) == (solved == 1.0)


def test_countdown_small_without_numbers_has_no_share_of_tries() -> None:
    assert pay("countdown_small:tries", "4*7-3=25", numbers=None) is None
    assert pay("countdown_small:tries", "4*7-3=25", numbers="x") is None


@pytest.mark.parametrize(("name", "second"), [("arithmetic_steps", "steps"), ("countdown_small", "tries")])
def test_worked_answers_earn_all_of_both_rewards(name: str, second: str) -> None:
    for row in load_task(name, size=200).rows("train"):
        assert pay(name, row["solution"], **row) == pay(f"{name}:{second}", row["solution"], **row) == 1.0


def test_speed_is_paid_for_to_right_answers_alone_where_it_is_gated() -> None:
    right, wrong = "1243342141322314", "1243342141322341"
    columns = {"puzzle": [COLUMNS["puzzle"]] * 3, "nfe": [2, 8, 1], "tokens_per_forward": [8.0, 2.0, 16.0]}
    prompts, completions = ["?"] * 3, [right, right, wrong]
    found = {
        name: load_reward(f"speed:{name}")(prompts, completions, **columns)
        for name in ("tokens_per_forward", "inverse_nfe", "correct_tokens_per_forward", "speed")
    }
    assert found["tokens_per_forward"] == [8.0, 2.0, 16.0] and found["inverse_nfe"] == [0.5, 0.125, 1.0]
    assert found["correct_tokens_per_forward"] == [8.0, 2.0, 0.0] and found["speed"] == [0.5, 0.125, 0.0]
    untold = {**columns, "puzzle": [None] * 3}
    assert load_reward("speed:correct_tokens_per_forward")(prompts, completions, **untold) == [None] * 3
    for name in found:
        with pytest.raises(ValueError, match=f"{name} needs (nfe|tokens_per_forward) of each completion"):
            load_reward(f"speed:{name}")(prompts, completions, puzzle=columns["puzzle"])
