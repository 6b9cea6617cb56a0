r"""The prompts of the papers, and how a prompt becomes tokens.

Owns wording and rendering: trainers, evaluation, decoding and supervised training all render with `encode_prompt`, so
that what is measured is what is trained on. The instruction strings are those with which d1 (arXiv 2504.12216), SPG
(arXiv 2510.09541), ESPO (arXiv 2512.03759) and IGPO (arXiv 2509.10396) trained and evaluated: a published number
belongs to a prompt, to its last space. SPG took d1's prompts and changed Sudoku's.

Training and evaluation differ in d1 and SPG: at evaluation the mathematical tasks ask for a `\boxed{}` answer,
Countdown is stated in other words, and the assistant's turn begins with `<reasoning>`.

ESPO asks GSM8K and MATH to reason step by step and to box the answer, and shows one solved puzzle in Sudoku's prompt.
Its evaluation begins the assistant's turn with `<reasoning>` in Countdown and Sudoku; for GSM8K and MATH its repository
has no evaluation prompt, and the one of training is used. IGPO has d1's format with the answer in a box, for GSM8K and
MATH only, and no evaluation prompt of its own. In its source the box is spelled in a literal that turns `\b` into a
backspace character; here the prompt says `\boxed`, as was meant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

STYLES = ("d1", "spg", "espo")
"""Styles that every task with a paper's prompt has."""

MATH_STYLES = (*STYLES, "igpo")
"""Styles of the tasks with a number or a formula for an answer."""

Messages = list[dict[str, str]]

_FORMAT = "\nRespond in the following format:\n<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>\n"

_BOXED_FORMAT = (
    "Respond in the following format:\n<reasoning>\nYour reasoning here\n</reasoning>\n"
    "<answer>\n\\boxed{...}\n</answer>"
)

_EXPERT = (
    "You are a math expert. You will be given a question to solve. Solve it step by step. "
    "Wrap the final answer in a \\boxed{}."
)

_COUNTDOWN = (
    "Using only the provided numbers, create an arithmetic expression that evaluates to exactly the provided target "
    "number. You may use the operations +, -, *, and / as needed, but each number must be used exactly once. Think "
    "step-by-step. After reasoning, provide only your final expression inside \\boxed{} tags without including an "
    "equals sign or the target number. For example: \\boxed{a + b * c}"
)

_SUDOKU = (
    "\nPlease solve the following 4x4 Sudoku puzzle. The puzzle is provided as a 16-character string reading "
    "left-to-right, top-to-bottom, where '0' represents empty cells.\n\nRules:\n- Fill empty cells with digits 1-4\n"
    "- Each row must contain digits 1-4 exactly once\n- Each column must contain digits 1-4 exactly once\n"
    "- Each 2x2 box must contain digits 1-4 exactly once\n\n"
    "Important: Your solution must be a COMPLETE 16-character string with only the digits 1-4, representing your final "
    "solved grid.\n\nRespond in this exact format:\n<reasoning>\nYour step-by-step solving process\n</reasoning>\n"
    "<answer>\n[16-character solution string with no spaces or separators]\n</answer>\n"
)

_STEP_BY_STEP = "\nPlease reason step by step, and put your final answer within \\boxed{}."

_IGPO_FORMAT = (
    "\nRespond in the following format:\n<reasoning>\n...\n</reasoning>\n<answer>\n\\boxed{<Your answer>}\n</answer>\n"
)

_ESPO_PUZZLE = ("0401002010030310", "2431312412434312")

_ESPO_SUDOKU = (
    "\nPlease solve the following 4x4 Sudoku puzzle. The puzzle is provided as a 16-character string reading "
    "left-to-right, top-to-bottom, where '0' represents empty cells.\n\n**Rules:**\n- Fill empty cells with digits "
    "1-4.\n- Each row must contain digits 1-4 exactly once.\n- Each column must contain digits 1-4 exactly once.\n"
    "- Each 2x2 box must contain digits 1-4 exactly once.\n\n**Example:**\nPuzzle: 0401002010030310\n"
    "This puzzle grid looks like this:\n0 4 | 0 1\n0 0 | 2 0\n----+----\n1 0 | 0 3\n0 3 | 1 0\n\n"
    "Solution: 2431312412434312\nThe solved grid looks like this:\n2 4 | 3 1\n3 1 | 2 4\n----+----\n1 2 | 4 3\n"
    "4 3 | 1 2\n\n**Important:** Your solution must be a COMPLETE 16-character string with only the digits 1-4, "
    "representing your final solved grid.\n\nRespond in this exact format:\n<reasoning>\nYour step-by-step solving "
    "process\n</reasoning>\n<answer>\n[16-character solution string with no spaces or separators]\n</answer>\n"
)

# The puzzles that SPG shows solved in its prompt, with the cells in the order in which they can be filled one by one.
# The text around them is ours: SPG's numbers are comparable only up to that.
_SHOWN = (
    ("3014002020004130", "3214142323414132", (1, 4, 5, 7, 9, 10, 11, 15)),
    ("0000100420013142", "4213132424313142", (0, 3, 1, 2, 5, 6, 9, 10)),
    ("2001403002001420", "2341413232141423", (1, 2, 5, 7, 8, 10, 11, 15)),
)

SHOWN_PUZZLES = tuple(puzzle for puzzle, _, _ in _SHOWN)
"""Those of SPG's prompt."""

ALL_SHOWN_PUZZLES = (*SHOWN_PUZZLES, _ESPO_PUZZLE[0])
"""Those of any style, so that the rows of a split are the same puzzles in all styles."""


def gsm8k(question: str, *, style: str = "d1", evaluation: bool) -> Messages:
    """The prompt for a grade-school problem, in one of `MATH_STYLES`."""
    if style == "espo":
        return _user(f"{question}{_STEP_BY_STEP}")
    if style == "igpo":
        return _user(f"{_IGPO_FORMAT}{question}")
    if evaluation:
        return _prefilled(f"{_EXPERT} \n{_BOXED_FORMAT}\n\n{question}")
    return _user(f"{_FORMAT}\n\n{question}")


def math(problem: str, *, style: str = "d1", evaluation: bool) -> Messages:
    """The prompt for a competition problem, in one of `MATH_STYLES`. d1's stray quotation mark is the original's."""
    if style == "espo":
        return _user(f"{problem}{_STEP_BY_STEP}")
    if style == "igpo":
        return _user(f"{_IGPO_FORMAT}\n{problem}")
    if evaluation:
        return _prefilled(f'{_EXPERT}\n{_BOXED_FORMAT}" \n\n\n{problem}')
    return _user(f"{_FORMAT}\n\n{_EXPERT} \n\n{problem}")


def countdown(numbers: Sequence[int], target: int, *, style: str = "d1", evaluation: bool) -> Messages:
    """The prompt for a Countdown instance; ESPO's is d1's of training, at evaluation too."""
    if evaluation and style != "espo":
        return _prefilled(f"{_COUNTDOWN}{_BOXED_FORMAT}\n\nNumbers: {list(numbers)}\nTarget: {target}")
    return (_prefilled if evaluation else _user)(
        f"{_FORMAT}\nUsing only the numbers {list(numbers)}, create an arithmetic expression that evaluates to exactly "
        f"{target}. You must use all numbers from the list, and each number must be used exactly once. You may use the "
        "operations +, -, *, and / as needed. After reasoning, provide only your final expression inside "
        "<answer></answer> tags without including an equals sign or the target number. For example, if the numbers "
        "are [2, 3, 4] and the target is 5, a valid answer is: <answer>\n2*4-3\n</answer>"
    )


def sudoku(puzzle: str, *, style: str, evaluation: bool) -> Messages:
    """The prompt for a 4x4 puzzle: zero-shot in style "d1", with solved puzzles in "spg" (three) and "espo" (one)."""
    if style == "espo":
        if evaluation:
            return _prefilled(f"{_ESPO_SUDOKU}\n\nSolve the following Sudoku puzzle: {puzzle}\n")
        return _user(f"{_ESPO_SUDOKU}\n\nNow, solve the following Sudoku puzzle: {puzzle}\n")
    question = f"Solve the following Sudoku puzzle: {puzzle}\n"
    if style == "spg":
        shown = "\n\n".join(_solved_example(*example) for example in _SHOWN)
        # The evaluation code adds a line break of its own.
        question = f"{shown}\n\nQuestion: {question}" + ("\nAnswer:\n" if evaluation else "Answer:\n")
    return (_prefilled if evaluation else _user)(f"{_SUDOKU}\n\n{question}")


def _user(content: str) -> Messages:
    return [{"role": "user", "content": content}]


def _prefilled(content: str) -> Messages:
    return [*_user(content), {"role": "assistant", "content": "<reasoning>"}]


def _solved_example(puzzle: str, solution: str, order: Sequence[int]) -> str:
    steps = "\n".join(f"R{cell // 4 + 1}C{cell % 4 + 1} can only be {solution[cell]}." for cell in order)
    return (
        f"Question:\nSolve the following Sudoku puzzle: {puzzle}\nAnswer:\n"
        f"<reasoning>\nThe rows are\n{_rows(puzzle)}\n\n"
        f"Fill the cells that have one candidate left:\n{steps}\n\nThe rows are now\n{_rows(solution)}\n</reasoning>\n"
        f"<answer>\n{solution}\n</answer>"
    )


def _rows(grid: str) -> str:
    return "\n".join(f"R{row + 1}: {' '.join(grid[4 * row : 4 * row + 4])}" for row in range(4))


def encode_prompt(
    tokenizer: Any,
    prompt: str | Sequence[Mapping[str, Any]],
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> list[int]:
    """Token ids of a prompt: text as it is, messages through the chat template.

    The template opens the assistant's turn, or goes on with it where the last message is the assistant's.

    Args:
        tokenizer: of the model; it needs a chat template for messages.
        prompt: text, or chat messages, each with a `role` and text (or parts of text) as its `content`.
        chat_template_kwargs: for the template, such as `{"enable_thinking": False}`.
        options: of `apply_chat_template`: `chat_template`, `tools`.

    Raises:
        ValueError: what is given is neither text nor messages, messages and a tokenizer without a chat template, or
            `chat_template_kwargs` that say how the prompt ends.
    """
    problem = prompt_problem(prompt)
    if problem is not None:
        raise ValueError(f"a prompt is {problem}")
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    given = dict(chat_template_kwargs or {})
    for name in ("add_generation_prompt", "continue_final_message", "tokenize", "return_dict"):
        if name in given:
            raise ValueError(
                f"chat_template_kwargs={{{name!r}: ...}} is not allowed: the prompt itself says how it ends"
            )
    if not (options.get("chat_template") or tokenizer.chat_template):
        raise ValueError("the prompts are messages, but the tokenizer has no chat_template to render them with")
    prefilled = prompt[-1]["role"] == "assistant"
    encoded = tokenizer.apply_chat_template(
        [dict(message) for message in prompt],
        add_generation_prompt=not prefilled,
        continue_final_message=prefilled,
        tokenize=True,
        return_dict=True,
        **options,
        **given,
    )
    return list(encoded["input_ids"])


def prompt_problem(prompt: Any) -> str | None:
    """What is wrong with something that should be a prompt, as the end of a sentence; None where nothing is."""
    wanted = "a prompt is text, or a list of chat messages {'role': ..., 'content': ...}"
    if isinstance(prompt, str):
        return None
    if prompt is None:
        return f"None, or missing; {wanted}"
    if isinstance(prompt, Mapping) or not isinstance(prompt, Sequence):
        return f"{prompt!r:.80}, of type {type(prompt).__name__}; {wanted}"
    if not prompt:
        return f"an empty list; {wanted}"
    if all(isinstance(part, int) for part in prompt):
        return f"a list of token ids, {list(prompt)!r:.60}; {wanted}. Decode the ids, or give them to RolloutEngine"
    for message in prompt:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            return f"a list with {message!r:.80}, which is no message; {wanted}"
        content = message.get("content")
        parts = content if isinstance(content, Sequence) and not isinstance(content, str) else []
        other = [part for part in parts if not isinstance(part, Mapping) or part.get("type", "text") != "text"]
        if other:
            return f"a list with a message that holds {other[0]!r:.60}; only text is supported"
        if content is None and message["role"] != "assistant":
            return f"a list with the message {dict(message)!r:.80}, which has no content; {wanted}"
    if prompt[-1]["role"] == "assistant" and prompt[-1].get("content") is None:
        return "a list whose last message, the assistant's, has no content to go on from; leave that message out"
    return None
