"""Completions of a data set in the place of rollouts, and prompts that a teacher alone is told.

Owns how a column becomes token ids, what is refused before training, and the `Rollout` of a corpus, which has no
record: nobody drew these tokens. Tokens are those of supervised training (`rl4dlm.sft.data`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from string import Formatter
from typing import Any

import torch
from datasets import Dataset

from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.rollout import Rollout, StopReason, Trace, valid_mask
from rl4dlm.sft.data import NOT_A_TARGET, Rendering, prompt_length, until_end

logger = logging.getLogger(__name__)

COMPLETION = "completion"
"""Column of a corpus, beside `prompt`, as for supervised training."""
NAME = "corpus"
"""In the place of a schedule's and a cache's."""
FIELDS = ("prompt", "privileged_context")
"""What a template of a teacher's prompt has places for; TRL's names (`trl.experimental.sdft`)."""


def completion_ids(tokenizer: Any, prompt: Any, completion: Any, *, spec: DiffusionSpec, **options: Any) -> list[int]:
    """Token ids of a completion behind its prompt, up to and including its first end.

    Args:
        tokenizer: of the model.
        prompt: text or messages. completion: the same.
        spec: of the model. Text that does not end with its end-of-sequence token gets it.
        options: of rendering: `chat_template` and those of the template.

    Raises:
        ValueError: prompt and completion are not both text or both messages, the prompt's tokens are not a prefix of
            both, the completion is empty, or it holds the mask token.
    """
    if isinstance(prompt, str) != isinstance(completion, str) or not completion:
        raise ValueError(
            f"a completion is {completion!r:.60}, of type {type(completion).__name__}; needed is text behind a prompt "
            "of text, or messages behind one of messages"
        )
    render = Rendering()
    start = render(tokenizer, prompt, add_generation_prompt=True, **options)["input_ids"]
    if isinstance(prompt, str):
        end = tokenizer.eos_token or ""
        both = prompt + completion + ("" if completion.endswith(end) else end)
    else:
        both = [*prompt, *completion]
    ids = render(tokenizer, both, **options)["input_ids"]
    first = prompt_length(start, ids)
    labels = [NOT_A_TARGET] * first + ids[first:]
    row = {"input_ids": ids, "labels": labels, COMPLETION: completion}
    found: list[int] = until_end(row, spec.eos_token_ids)["input_ids"][first:]
    if not found or spec.mask_token_id in found:
        what = "contains the mask token" if found else "has no tokens"
        raise ValueError(f"the completion {completion!r:.60} {what}")
    return found


def check_corpus(dataset: Any, name: str, ids_of: Any, length: int) -> None:
    """Looks at every completion of a data set before training; says once how many are longer than the canvas.

    Args:
        dataset: of rows with `prompt` and `completion`; what is streamed is looked at when it comes.
        name: for messages. ids_of: a row -> its completion's token ids. length: of the canvas.

    Raises:
        ValueError: names the row and what is wrong with it.
    """
    if not isinstance(dataset, Dataset):
        return
    cut = 0
    for place, row in enumerate(dataset):
        try:
            cut += len(ids_of(row)) > length
        except ValueError as error:
            raise ValueError(f"{name}[{place}]: {error}") from None
    if cut:
        logger.warning(
            "%d of %d completions in %s are cut at max_completion_length=%d tokens, without an end",
            cut, len(dataset), name, length,
        )  # fmt: skip


def corpus_rollout(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    row_ids: Sequence[int],
    config: DecodingConfig,
    spec: DiffusionSpec,
    *,
    seed: int,
    device: Any,
) -> Rollout:
    """Completions as a rollout without a record; longer ones are cut, what is behind an end is filled with ends."""
    length, end = config.canvas_length, spec.eos_token_ids[0]
    canvas = torch.tensor(
        [[*ids[:length], *[end] * (length - len(ids))] for ids in completions], dtype=torch.long, device=device
    ).view(len(completions), length)
    valid = valid_mask(canvas, spec.eos_token_ids)
    zeros, ends = torch.zeros(len(canvas), dtype=torch.long, device=device), set(spec.eos_token_ids)
    unknown = torch.full(canvas.shape, torch.nan, dtype=torch.float32, device=device)
    reasons = [StopReason.EOS if ids[:length][-1] in ends else StopReason.COMPLETE for ids in completions]
    return Rollout(
        prompt_ids=[list(map(int, prompt)) for prompt in prompts],
        canvas=canvas,
        valid=valid,
        hinted=torch.zeros_like(valid),
        trace=Trace(valid.long() - 1, unknown, None, zeros + 1),
        nfe=zeros,
        stop_reason=reasons,
        row_ids=list(map(int, row_ids)),
        schedule=NAME,
        cache=NAME,
        exact=True,
        seed=seed,
        mask_token_id=spec.mask_token_id,
        extra_forwards=zeros.clone(),
        decoding=config,
        recorded=False,
    )


# --- what a teacher is told -------------------------------------------------------------------------------------------


def check_template(template: str) -> None:
    """Raises ValueError for a template that does not have places for `FIELDS`, or has others."""
    try:
        named = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError:
        named = []
    if sorted(named) != sorted(FIELDS):
        raise ValueError(
            f"teacher_prompt_template={template!r} is not allowed; it must have {{prompt}} and {{privileged_context}}, "
            "each once, and other braces doubled"
        )


def told_prompt(prompt: Any, context: Any, template: str) -> Any:
    """A prompt with what a teacher knows besides: in text, or in the last message of the user.

    Raises:
        ValueError: there is nothing that could be told, or no message of the user, or one that is not text.
    """
    if not isinstance(context, str) or not context:
        raise ValueError(f"what the teacher is told is {context!r:.60}; needed is text")
    if isinstance(prompt, str):
        return template.format(prompt=prompt, privileged_context=context)
    asked = [i for i, message in enumerate(prompt) if message["role"] == "user"]
    if not asked or not isinstance(prompt[asked[-1]]["content"], str):
        raise ValueError("a prompt has no message of the user that is text, which what the teacher is told could go to")
    told = template.format(prompt=prompt[asked[-1]]["content"], privileged_context=context)
    return [{**message, "content": told} if i == asked[-1] else message for i, message in enumerate(prompt)]


def told_prompts(dataset: Any, name: str, column: str, template: str) -> Iterator[Any]:
    """The prompts that a teacher is told, of a data set that is not streamed. ValueError names the row."""
    if isinstance(dataset, Mapping):
        for key, part in dataset.items():
            yield from told_prompts(part, f"{name}[{key!r}]", column, template)
    elif isinstance(dataset, Dataset):
        for place, row in enumerate(dataset):
            try:
                yield told_prompt(row["prompt"], row[column], template)
            except ValueError as error:
                raise ValueError(f"{name}[{place}]: {error}") from None
