"""Finds the program in a completion.

Owns which text of a completion is code: the last complete fenced block, what goes on from the beginning that the prompt
shows, or the whole text. It parses what it finds, so that a program with a syntax error is never started.
"""

from __future__ import annotations

import re
import textwrap
from typing import NamedTuple

from rl4dlm.grading.code.parse import LONGEST_SOURCE, defined_names, parse
from rl4dlm.grading.text import last_answer_block

_FENCE = "```"
_PYTHON = ("python", "python3", "py", "py3")
_ENDS = ("[DONE]", "<|endoftext|>", "<|im_end|>", "<|eot_id|>")  # texts behind which nothing belongs to the answer
_DEFINITION = re.compile(r"^(?:async[ \t]+def|def|class)[ \t]+(\w+)", re.MULTILINE)
_DEDENTED = re.compile(r"^(?=[^\s#)\]}])", re.MULTILINE)
_LONGEST_COMPLETION = 1 << 18


class Found(NamedTuple):
    """A completion's program.

    Attributes:
        source: Python that parses; None where there is none.
        reason: why there is none, `no_code` or `syntax`; empty where there is one.
    """

    source: str | None
    reason: str = ""


def extract_program(completion: str, *, prefix: str = "", entry_point: str | None = None) -> Found:
    """The program that a completion means.

    Of the fenced blocks that are closed and not marked as another language's, the last one counts, and where it is
    known which function is asked for, the last one that defines it. `<answer>` tags around it may be there or not. A
    block that is never closed is no answer. A completion without any fence is code as a whole, and so is what stands
    before the first fence where the prompt has opened it.

    Code that does not define the function goes on from `prefix`, as completions of HumanEval do. It then ends before
    the first statement that is not indented if the whole does not parse.
    """
    text = completion[:_LONGEST_COMPLETION]
    for end in _ENDS:
        text = _before(text, end)
    answer = last_answer_block(text)
    blocks = _blocks(answer) if answer is not None and _FENCE in answer else _blocks(text)
    wanted = entry_point or _last_definition(prefix)
    code = _chosen(blocks, wanted)
    if code is None:
        if _FENCE not in text:
            code = text if answer is None else answer
        else:
            before, _, after = text.partition(_FENCE)
            # A fence that closes what the prompt has opened stands alone on its line.
            closes = before.strip() and not after.partition("\n")[0].strip() and _FENCE not in after
            if not closes:
                return Found(None, "no_code")
            code = before
    if not code.strip():
        return Found(None, "no_code")
    if len(code) > LONGEST_SOURCE:
        return Found(None, "syntax")
    return _assembled(code.strip("\n").rstrip(), prefix, wanted)


def _before(text: str, end: str) -> str:
    """The text before a mark of its end; within a fenced block it is the program's, which may print it."""
    place, counted, fences = text.find(end), 0, 0
    while place >= 0:
        fences, counted = fences + text.count(_FENCE, counted, place), place
        close = text.find(_FENCE, place)
        if end != "[DONE]" or fences % 2 == 0 or close < 0:
            return text[:place]
        place = text.find(end, close)
    return text


def code_blocks(text: str) -> list[tuple[str, str]]:
    """The fenced blocks that are closed: what is written behind the opening fence, and the lines between the two."""
    return _blocks(text)


def _blocks(text: str) -> list[tuple[str, str]]:
    found = []
    start = text.find(_FENCE)
    while start >= 0:
        line_end = text.find("\n", start)
        if line_end < 0:
            break
        close = text.find(_FENCE, line_end)
        if close < 0:
            break
        found.append((text[start + len(_FENCE) : line_end].strip(), text[line_end + 1 : close]))
        start = text.find(_FENCE, close + len(_FENCE))
    return found


def _chosen(blocks: list[tuple[str, str]], wanted: str | None) -> str | None:
    # No expression is looked for in what is too long to be parsed. Beside marked blocks, the others are output.
    short = [(label.lower().partition(" ")[0], code) for label, code in blocks if len(code) <= LONGEST_SOURCE]
    codes = [code for label, code in short if label in _PYTHON] or [code for label, code in short if not label]
    if wanted is not None:
        # Looked for in the text, not in a tree: a block with a syntax error is still the one that is meant.
        defines = re.compile(
            rf"^[ \t]*(?:async[ \t]+def|def|class)[ \t]+{re.escape(wanted)}\b|^{re.escape(wanted)}[ \t]*[=:]", re.M
        )
        codes = [code for code in codes if defines.search(code)] or codes
    return codes[-1] if codes else None


def _last_definition(prefix: str) -> str | None:
    names = _DEFINITION.findall(prefix)
    return names[-1] if names else None


def _assembled(code: str, prefix: str, wanted: str | None) -> Found:
    tree = parse(code)
    if tree is None:
        code_at_left = textwrap.dedent(code)
        if code_at_left != code and (tree := parse(code_at_left)) is not None:
            whole = wanted is None or wanted in defined_names(tree)
            code = code_at_left if whole or not prefix.strip() else code
    if tree is not None and (wanted is None or wanted in defined_names(tree)):
        return Found(code if wanted is not None or not prefix.strip() else f"{prefix.rstrip()}\n{code}")
    if tree is not None and not prefix.strip():
        return Found(code)  # it may come by the name in another way
    if prefix.strip():
        for candidate in _continuations(code):
            source = prefix.rstrip() + "\n" + candidate
            if (tree := parse(source)) is not None and (wanted is None or wanted in defined_names(tree)):
                return Found(source)
    return Found(None, "syntax")


def _continuations(code: str) -> list[str]:
    """Ways in which code may be a function's body: as it stands, cut where its indent ends, or indented."""
    first, _, rest = code.partition("\n")
    ways = [code] if code[0] in " \t" else [textwrap.indent(code, "    ")]
    # The first line may have lost its indent, which a strip() takes away, and the others have kept theirs.
    ways.append(code if code[0] in " \t" else f"    {first}\n{rest}")
    end = _DEDENTED.search(ways[1])
    return list(dict.fromkeys([*ways, ways[1][: end.start()] if end else ways[1]]))
