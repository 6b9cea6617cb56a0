"""The body of the RL scripts: guidance for algorithms that have none of their own, and which settings it takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rl4dlm import DiffuGRPOTrainer, IGPOTrainer, Inpainting, save_denoiser, tiny_llada, tiny_tokenizer
from rl4dlm.cli.script import GuidanceArguments, run
from rl4dlm.training.preemption import PREEMPTED

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    save_denoiser(tiny_llada(), tmp_path / "model", tiny_tokenizer())
    (tmp_path / "reward.py").write_text("def right(completions, **_):\n    return [0.0] * len(completions)\n")
    row = {"prompt": "1+1?", "solution": "we add one and one, which is 2", "answer": "2"}
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(4)))
    values = {
        "model_name_or_path": tmp_path / "model",
        "dataset_name": tmp_path / "data.jsonl",
        "reward_funcs": f"{tmp_path}/reward.py:right",
        "output_dir": tmp_path / "out",
        "max_completion_length": 16,
        "denoising_steps": 4,
        "num_generations": 4,
        "per_device_train_batch_size": 4,
        "num_iterations": 1,
        "max_steps": 1,
        "logging_steps": 1,
        "eos_penalty": 2.0,
        "eos_penalty_decay": True,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def test_guidance_is_a_flag(flags: list[str]) -> None:
    trainer = run(
        DiffuGRPOTrainer, [*flags, "--guidance", "inpainting", "--free_tail", "2", "--hint_ratio", "0.4", "1"]
    )
    assert trainer.intervention == Inpainting(free_tail=2, hint_ratio=[0.4, 1.0])
    assert trainer.state.log_history[-2]["intervention/group_share"] == 1
    assert trainer.decoding.eos_penalty_decay


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance": "oracle"}, "guidance='oracle' is not allowed; choose None or one of inpainting"),
        ({"free_tail": 3}, "free_tail=3 is not supported: it has no effect without guidance='inpainting'"),
        ({"guidance": "inpainting", "max_gap": -1}, "max_gap=-1"),
    ],
)
def test_guidance_that_does_not_fit_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GuidanceArguments(**settings)  # type: ignore[arg-type]


def test_an_algorithm_with_hints_of_its_own_takes_no_other_guidance(flags: list[str]) -> None:
    with pytest.raises(ValueError, match="--guidance"):
        run(IGPOTrainer, [*flags, "--guidance", "inpainting"])


def test_r6_a_signal_ends_the_script_with_a_checkpoint_and_its_status(flags: list[str], tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text(
        "import os, signal\n"
        "def right(completions, **_):\n"
        f"    if not os.path.exists({str(tmp_path / 'asked')!r}):\n"
        f"        open({str(tmp_path / 'asked')!r}, 'w').close()\n"
        "        os.kill(os.getpid(), signal.SIGUSR1)\n"
        "    return [0.0] * len(completions)\n"
    )
    flags = [*flags, "--max_steps", "3", "--resume_from_checkpoint", "latest"]
    with pytest.raises(SystemExit) as ended:
        run(DiffuGRPOTrainer, flags)
    assert ended.value.code == PREEMPTED == 75
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-1"]
    assert not (tmp_path / "out" / "model.safetensors").exists()
    trainer = run(DiffuGRPOTrainer, flags)
    assert trainer._initial_global_step == 1 and trainer.state.global_step == 3 and not trainer.preempted
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_the_exact_check_is_a_flag(flags: list[str]) -> None:
    data = flags.index("--dataset_name")
    task = [*flags[:data], *flags[data + 2 :], "--task", "few_clue_sudoku", "--task_args", '{"size": 4}']
    evaluated = [*task, "--eval_strategy", "steps", "--eval_steps", "1", "--per_device_eval_batch_size", "4"]
    checked = ["--exact_check_steps", "4", "16", "--exact_check_limit", "3"]
    trainer = run(DiffuGRPOTrainer, [*evaluated, *checked])
    assert trainer.exact_check is not None and len(trainer.exact_check.rows) == 3
    (found,) = [entry for entry in trainer.state.log_history if "eval_solved" in entry]
    assert {"eval_solved_at_4", "eval_solved_at_16", "eval_tokens_per_forward_at_16"} <= set(found)
    for arguments, said in (
        ([*task, *checked], "exact_check belongs to evaluations"),
        ([*flags, "--exact_check", "true"], "exact_check needs a task"),
        ([*evaluated, "--exact_check_limit", "3"], "have no meaning without exact_check"),
    ):
        with pytest.raises(ValueError, match=said):
            run(DiffuGRPOTrainer, arguments)
