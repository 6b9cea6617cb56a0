"""P1: one function renders prompts, for trainers, evaluation, decoding and supervised training alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from rl4dlm import DiffuGRPOConfig, DiffuGRPOTrainer, DiffusionSFTConfig, DiffusionSFTTrainer, tiny_llada
from rl4dlm.evaluation import encode_prompt
from rl4dlm.models.tiny import tiny_tokenizer
from rl4dlm.tasks import available_tasks, load_task
from rl4dlm.tasks.code.prompts import EVALUATION_STYLES, TRAINING_STYLES
from rl4dlm.tasks.prompts import MATH_STYLES
from rl4dlm.training.checks import RESERVED_COLUMNS
from tests.tasks.code.test_readers import HUMANEVAL, MBPP_FULL, acecode_row, kodcode_row
from tests.training.steps import SMALL_RUN

# Their prompts are text, in no paper's style.
TEXT_TASKS = ("arithmetic_steps", "code_mini", "countdown_small", "few_clue_sudoku")
ELSEWHERE = ("aime", "arc", "gpqa", "knights_and_knaves", "livecodebench")  # have tests of their own for their prompts
CODE: dict[str, tuple[tuple[str, ...], dict[str, Any], dict[str, Any]]] = {
    "humaneval": (EVALUATION_STYLES, HUMANEVAL, {}),
    "humaneval_plus": (EVALUATION_STYLES, HUMANEVAL, {}),
    "mbpp": (EVALUATION_STYLES, MBPP_FULL, {}),
    "mbpp_plus": (EVALUATION_STYLES, {**MBPP_FULL, "test": "inputs = [[1]]\nresults = [2]"}, {}),
    "kodcode": (TRAINING_STYLES, kodcode_row(1), {"evaluation_sets": []}),
    "acecode": (TRAINING_STYLES, acecode_row(1, {}), {"evaluation_sets": [], "subset": "all"}),
}
"""Tasks of code with styles, a row of each, and the options to read it."""
BEGUN = [{"role": "user", "content": "1+2"}, {"role": "assistant", "content": "3"}]
THINKING = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if not thinking %}#{% endif %}{% endif %}"
)


def every_row(folder: Path) -> list[tuple[str, Any]]:
    """A prompt of every task, style and split."""
    (folder / "gsm8k.json").write_text(json.dumps([{"question": "1+2?", "answer": "it is 3 #### 3"}]))
    (folder / "math.json").write_text(json.dumps([{"problem": "1+2?", "solution": r"\boxed{3}", "answer": "3"}]))
    found: list[tuple[str, Any]] = []
    for name in sorted({*available_tasks()} - {*CODE, *ELSEWHERE}):
        for style in MATH_STYLES:
            options: dict[str, Any] = {} if name in TEXT_TASKS else {"style": style}
            if name in ("gsm8k", "math"):
                file = folder / f"{name}.json"
                options["path"] = dict.fromkeys(type(load_task(name)).splits, file)
            else:
                options["size"] = 2
            try:
                task = load_task(name, **options)
            except ValueError:  # a style that this task does not have
                continue
            for split in task.splits:
                found.append((f"{name} {style} {split}", task.rows(split)[0]["prompt"]))
    for name, (styles, row, options) in CODE.items():
        file = folder / f"{name}.json"
        file.write_text(json.dumps([row]))
        for style in styles:
            split = "train" if styles == TRAINING_STYLES else "test"
            task = load_task(name, path={split: file}, style=style, **options)
            found.append((f"{name} {style}", task.rows(split)[0]["prompt"]))
    return found


def expected(prompt: Any) -> str:
    """What the tiny tokenizer's template makes of a prompt, written out."""
    if isinstance(prompt, str):
        return prompt
    closed = "".join(f"<|{message['role']}|>{message['content']}<eos>" for message in prompt)
    return closed[: -len("<eos>")] if prompt[-1]["role"] == "assistant" else f"{closed}<|assistant|>"


def rl_trainer(folder: Path, prompts: list[Any], **settings: Any) -> DiffuGRPOTrainer:
    tokenizer = settings.pop("tokenizer", tiny_tokenizer())
    small = {"num_generations": 2, "per_device_train_batch_size": 2, "max_completion_length": 8, "denoising_steps": 2}
    args = DiffuGRPOConfig(output_dir=str(folder), **small, **{**SMALL_RUN, "num_iterations": 1, **settings})
    rows = Dataset.from_list([{"prompt": prompt} for prompt in prompts])
    return DiffuGRPOTrainer(tiny_llada(max_position_embeddings=8192), nothing, args, rows, None, tokenizer)


def nothing(completions: list[Any], **columns: Any) -> list[float]:
    return [0.0] * len(completions)


def test_p1_trainer_evaluation_and_sft_render_every_row_of_every_task_alike(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    rows = every_row(tmp_path)
    assert {prompt[-1]["role"] for _, prompt in rows if not isinstance(prompt, str)} == {"user", "assistant"}
    chats = [prompt for _, prompt in rows if not isinstance(prompt, str)]
    trainer = rl_trainer(tmp_path / "rl", chats)
    examples = [{"prompt": prompt, "completion": [{"role": "assistant", "content": "7"}]} for prompt in chats]
    sft = DiffusionSFTTrainer(
        tiny_llada(),
        DiffusionSFTConfig(output_dir=str(tmp_path / "sft"), max_length=None, **SMALL_RUN),
        Dataset.from_list(examples),
        None,
        tokenizer,
    )
    for label, prompt in rows:
        assert tokenizer.decode(encode_prompt(tokenizer, prompt)) == expected(prompt), label
    for row, prompt in enumerate(chats):
        ids = encode_prompt(tokenizer, prompt)
        assert trainer._tokenize_prompts([prompt])[0] == [ids]
        taught = sft.train_dataset[row]
        visible = [token for token, label in zip(taught["input_ids"], taught["labels"], strict=True) if label == -100]
        assert visible == ids
        assert tokenizer.decode(taught["input_ids"][len(ids) :]) == "7<eos>"


@pytest.mark.parametrize("name", TEXT_TASKS)
def test_the_worked_answers_of_text_tasks_are_taught_with_their_end(tmp_path: Path, name: str) -> None:
    rows = load_task(name, size=4).rows("train")
    sft = DiffusionSFTTrainer(
        tiny_llada(),
        DiffusionSFTConfig(output_dir=str(tmp_path), **SMALL_RUN),
        Dataset.from_list([{"prompt": row["prompt"], "completion": row["solution"]} for row in rows]),
        None,
        tiny_tokenizer(),
    )
    for taught, row in zip(sft.train_dataset, rows, strict=True):
        assert tiny_tokenizer().decode(taught["input_ids"]) == f"{row['prompt']}{row['solution']}<eos>"
        assert sum(label != -100 for label in taught["labels"]) == len(row["solution"]) + 1


def test_p1_a_started_answer_is_continued_in_training_with_the_settings_of_the_template(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = THINKING
    trainer = rl_trainer(
        tmp_path / "rl", [BEGUN, BEGUN[:1]], tokenizer=tokenizer, chat_template_kwargs={"thinking": True}
    )
    begun, open_turn = trainer._tokenize_prompts([BEGUN, BEGUN[:1]])[0]  # and prompts of both kinds in one batch
    assert tokenizer.decode(begun) == "<|user|>1+2<eos><|assistant|>3"
    assert tokenizer.decode(open_turn) == "<|user|>1+2<eos><|assistant|>"
    assert tokenizer.decode(encode_prompt(tokenizer, BEGUN[:1])) == "<|user|>1+2<eos><|assistant|>#"
    assert encode_prompt(tokenizer, BEGUN[:1], chat_template_kwargs={"thinking": True}) == open_turn
    empty = [*BEGUN[:1], {"role": "assistant", "content": ""}]
    assert tokenizer.decode(encode_prompt(tokenizer, empty)) == "<|user|>1+2<eos><|assistant|>"
    with pytest.raises(ValueError, match="add_generation_prompt"):
        encode_prompt(tokenizer, BEGUN, chat_template_kwargs={"add_generation_prompt": True})


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "None, or missing"),
        (7, "7, of type int"),
        ([5, 6, 7], "a list of token ids"),
        ([], "an empty list"),
        ({"role": "user", "content": "x"}, "of type dict"),
        ([{"role": "user"}], "no content"),
        (["a", "b"], "which is no message"),
        ([{"role": "user", "content": [{"type": "image"}]}], "only text is supported"),
    ],
)
def test_p6_a_prompt_that_is_none_is_refused(prompt: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_prompt(tiny_tokenizer(), prompt)


@pytest.mark.parametrize("prompts", [["a", None], [1, 2], [[1, 2], [3, 4]]])
def test_p6_a_trainer_names_the_row_of_a_prompt_that_is_none(tmp_path: Path, prompts: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"train_dataset\[\d\]\['prompt'\] is"):
        rl_trainer(tmp_path, prompts)


@pytest.mark.parametrize("name", RESERVED_COLUMNS)
def test_p6_columns_that_collide_with_what_rewards_are_given_are_refused(tmp_path: Path, name: str) -> None:
    rows = Dataset.from_list([{"prompt": "a", name: "b"}] * 2)
    args = DiffuGRPOConfig(output_dir=str(tmp_path), max_completion_length=8, num_generations=2, use_cpu=True)
    with pytest.raises(ValueError, match=f"column '{name}'.*rename"):
        DiffuGRPOTrainer(tiny_llada(), nothing, args, rows, None, tiny_tokenizer())
