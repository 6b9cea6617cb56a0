"""The prompts of code tasks, in the words of those who trained and evaluated on them.

Owns wording alone. A published number belongs to a prompt, to its last space:

- "diffucoder": DiffuCoder's training (arXiv 2506.20639): the question, and its first test where no fence shows code.
- "espo": ESPO's (arXiv 2512.03759): the same with a system message that asks for one fenced block at the end.
- "d1": that of the d1 line's code tasks: a format with `<reasoning>` and `<answer>`, and the function's signature.
- "evalplus": EvalPlus's prompt for instruction-tuned models, with which Dream-Coder (arXiv 2509.01142) and, by way of
  Qwen2.5-Coder's evaluation, DiffuCoder are evaluated. The assistant's turn begins with a sentence and an open fence.
- "complete": the bare beginning of the program, for models that were not tuned to instructions.

What is ours: "diffucoder" and "espo" for KodCode, which these papers did not train on, and "d1" for AceCode.
LiveCodeBench has the prompt of its own repository.
"""

from __future__ import annotations

Messages = list[dict[str, str]]

TRAINING_STYLES = ("diffucoder", "espo", "d1")
"""Of the sets that are trained on."""

EVALUATION_STYLES = ("evalplus", "d1", "complete")
"""Of the sets that are evaluated on."""

_HELPFUL = "You are a helpful assistant."

_ESPO = (
    "You are a helpful assistant. When you output code, it must be in a single fenced code block using triple "
    "backticks (```) and the language specifier (e.g., ```python). The code block must appear as the last part of your "
    "response and end with a newline after the closing backticks (```). Do not include any text after the code block. "
    "Do not include extra code blocks or explanations outside the final code block."
)

_D1 = """You are a professional Python coding assistant.
Task: Complete the following function implementation strictly and clearly without any additional comments or explanations.
Again, implement the function strictly without any additional comments, explanations, unit tests, assertions, prints, examples in the code.

Respond in the following format:
<reasoning>
Your step-by-step reasoning here
</reasoning>
<answer>
```python
# python code only, no tests, no I/O, no prints, no asserts, no examples
```
</answer>
"""  # noqa: E501

_EVALPLUS = "Please provide a self-contained Python script that solves the following problem in a markdown code block:"
_EVALPLUS_ANSWER = (
    "Below is a Python script with a self-contained function that solves the problem and passes corresponding tests:\n"
    "```python\n"
)

_LIVECODEBENCH = (
    "You are an expert Python programmer. You will be given a question (problem specification) and will generate a "
    "correct Python program that matches the specification and passes all tests."
)
_STARTER = (
    "You will use the following starter code to write the solution to the problem and enclose your code within "
    "delimiters."
)
_SCRIPT = (
    "Read the inputs from stdin solve the problem and write the answer to stdout (do not directly test on the sample "
    "inputs). Enclose your code within delimiters as follows. Ensure that when the python program runs, it reads the "
    "inputs, runs the algorithm and writes output to STDOUT."
)


def training(question: str, *, style: str, test: str = "", signature: str = "") -> Messages:
    """The prompt for a question, in one of `TRAINING_STYLES`.

    Args:
        question: as the data set has it.
        test: an example of its tests, for "diffucoder" and "espo".
        signature: name and parameters of the function, such as `f(a, b)`, for "d1"; without one it is not spoken of.
    """
    if style == "d1":
        return [_user(_function(question, signature))]
    shown = f"\nTest cases: {test}" if test and "\n```\n" not in question else ""
    return [{"role": "system", "content": _ESPO if style == "espo" else _HELPFUL}, _user(question + shown)]


def docstring_variant(question: str, head: str) -> str:
    """DiffuCoder's second form of a question: a function to complete, `head` being its `def` without the colon."""
    return f'Please complete the following problem:\n```\n{head}:\n    """\n    {question}\n    """\n```\n'


def function(beginning: str, *, style: str) -> Messages | str:
    """The prompt for HumanEval's beginning of a function, in one of `EVALUATION_STYLES`."""
    if style == "complete":
        return beginning
    if style == "d1":
        return [_user(f"{_D1}\nFunction to implement:\n{beginning}")]
    return _evalplus(beginning)


def described(text: str, test: str, *, style: str, signature: str = "") -> Messages | str:
    """The prompt for MBPP's description of a function with one of its tests, in one of `EVALUATION_STYLES`."""
    docstring = f'"""\n{text}\n{test}\n"""\n'
    if style == "complete":
        return docstring
    if style == "d1":
        return [_user(_function(text, signature))]
    return _evalplus(docstring)


def livecodebench(question: str, starter: str) -> Messages:
    """The prompt of LiveCodeBench's repository: with starter code for a method, without it for a script."""
    asked = f"### Question:\n{question}\n\n### Format: {_STARTER if starter else _SCRIPT}\n"
    shown = f"```python\n{starter or '# YOUR CODE HERE'}\n```\n\n"
    answer = "### Answer: (use the provided format with backticks)\n\n"
    return [{"role": "system", "content": _LIVECODEBENCH}, _user(asked + shown + answer)]


def _evalplus(beginning: str) -> Messages:
    asked = f"{_EVALPLUS}\n```python\n{beginning.strip()}\n```"
    return [_user(asked), {"role": "assistant", "content": _EVALPLUS_ANSWER}]


def _function(task: str, signature: str) -> str:
    named = f"The function name and the parameters is {signature}\n" if signature else ""
    return f"{_D1}\nFunction to implement: {task}\n{named}"


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}
