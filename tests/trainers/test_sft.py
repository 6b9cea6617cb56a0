"""trainers/sft.py: where examples come from, what it saves, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import PreTrainedModel

from rl4dlm import load_denoiser


def prompt_and_answer(trainer, row: int = 0) -> tuple[str, str]:
    """What is given and what is learned, as text."""
    example = trainer.train_dataset[row]
    is_target = [label != -100 for label in example["labels"]]
    decode = trainer.processing_class.decode
    return (
        decode([token for token, target in zip(example["input_ids"], is_target, strict=True) if not target]),
        decode([token for token, target in zip(example["input_ids"], is_target, strict=True) if target]),
    )


def test_a_task_gives_prompts_and_a_column_the_answers(run_sft, sft_flags, argv, model_folder, tmp_path):
    from rl4dlm import load_task

    trainer = run_sft(argv(sft_flags))
    row = load_task("few_clue_sudoku", size=32).dataset("train")[0]
    assert prompt_and_answer(trainer) == (row["prompt"], row["solution"] + "<eos>")
    saved, first = load_denoiser(tmp_path / "out").state_dict(), load_denoiser(model_folder).state_dict()
    assert not all(torch.equal(value, saved[name]) for name, value in first.items())


def test_answers_to_chat_messages_are_the_assistants(run_sft, sft_flags, argv):
    trainer = run_sft(argv({**sft_flags, "task": "sudoku"}))
    given, learned = prompt_and_answer(trainer)
    assert given.startswith("<|user|>") and given.endswith("<eos><|assistant|>")
    assert len(learned.removesuffix("<eos>")) == 16 and learned.endswith("<eos>")


@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": "a", "completion": "b"}],
        [{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}],
    ],
    ids=["text", "messages"],
)
def test_a_local_file_in_trls_format_is_used_as_it_is(run_sft, sft_flags, argv, tmp_path, rows):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows * 8))
    sft_flags |= {"task": None, "task_args": None, "completion_column": None, "dataset_name": data}
    trainer = run_sft(argv(sft_flags))
    given, learned = prompt_and_answer(trainer)
    assert "a" in given and learned == "b<eos>"


def test_evaluation_and_lora(run_sft, sft_flags, argv, tmp_path):
    sft_flags |= {
        "eval_strategy": "steps", "eval_steps": 2, "dataset_test_split": "validation",
        "use_peft": True, "lora_r": 2, "lora_target_modules": ["q_proj", "v_proj"],
    }  # fmt: skip
    trainer = run_sft(argv(sft_flags))
    assert any("eval_loss" in log for log in trainer.state.log_history)
    assert (tmp_path / "out" / "adapter_config.json").is_file()
    load_denoiser(tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"completion_column": "answer"}, "no column 'answer'; its columns are .*'solution'"),
        ({"noise_floor": 0}, "noise_floor=0"),
        ({"task": "chess"}, "unknown task 'chess'"),
        ({"model_name_or_path": None}, "model_name_or_path is not set"),
    ],
)
def test_bad_input_is_named_before_anything_is_computed(settings, said, run_sft, sft_flags, argv, monkeypatch):
    monkeypatch.setattr(PreTrainedModel, "__init__", lambda *_, **__: pytest.fail("a model was built"))
    with pytest.raises(ValueError, match=said):
        run_sft(argv({**sft_flags, **settings}))


def test_the_exact_check_is_a_flag(run_sft, sft_flags, argv):
    checked = {"exact_check": True, "exact_check_limit": 3, "exact_check_canvas_length": 16}
    evaluated = {**sft_flags, **checked, "eval_strategy": "steps", "eval_steps": 2}
    trainer = run_sft(argv(evaluated))
    assert any("eval_solved_at_low_confidence" in log for log in trainer.state.log_history)
    for changes, said in (
        ({**sft_flags, **checked}, "exact_check belongs to evaluations"),
        ({**evaluated, "exact_check_canvas_length": None}, "exact_check needs a canvas"),
        ({**sft_flags, "exact_check_canvas_length": 8}, "have no meaning without exact_check"),
    ):
        with pytest.raises(ValueError, match=said):
            run_sft(argv(changes))
