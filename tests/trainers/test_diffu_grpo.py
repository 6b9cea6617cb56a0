"""trainers/diffu_grpo.py: where settings, data and rewards come from, what it saves, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import PreTrainedModel

from rl4dlm import load_denoiser, resources, save_denoiser, tiny_llada, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]

REWARD = """
def ones(prompts, completions, **columns):
    return [float(text.count("1")) for text in completions]

def targets(prompts, completions, target, **columns):
    return [float(t) for t in target]
"""


def test_flags_override_the_file_and_the_file_the_defaults(run_diffu_grpo, rl_flags, argv, tmp_path):
    config = tmp_path / "config.yaml"
    in_file = {"task": "few_clue_sudoku", "task_args": {"size": 16, "seed": 4}, "learning_rate": 1.0e-3, "beta": 0.0}
    config.write_text(yaml.safe_dump(in_file))
    flags = {**rl_flags, "task": None, "task_args": None, "learning_rate": 2e-3}
    trainer = run_diffu_grpo(["--config", str(config), *argv(flags)])
    assert (trainer.args.learning_rate, trainer.args.beta, trainer.args.p_mask_prompt) == (2e-3, 0.0, 0.15)
    assert len(trainer.train_dataset) == 16
    assert trainer.state.global_step == 2


def test_a_trained_model_is_saved_whole(run_diffu_grpo, rl_flags, argv, model_folder, tmp_path):
    # A reward with spread in every group, so that there is a gradient.
    (tmp_path / "reward.py").write_text(REWARD)
    rl_flags |= {"reward_funcs": f"{tmp_path}/reward.py:ones", "learning_rate": 1e-2, "temperature": 3.0}
    trainer = run_diffu_grpo(argv(rl_flags))
    saved, first = load_denoiser(tmp_path / "out"), load_denoiser(model_folder)
    weights = saved.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in trainer.model.state_dict().items())
    assert not all(torch.equal(value, weights[name]) for name, value in first.state_dict().items())
    from rl4dlm import load_tokenizer

    assert load_tokenizer(str(tmp_path / "out")).get_vocab() == tiny_tokenizer().get_vocab()


def test_lora_and_then_its_adapter_as_the_model(run_diffu_grpo, rl_flags, argv, tmp_path):
    lora = {"use_peft": True, "lora_r": 2, "lora_target_modules": ["q_proj", "v_proj"]}
    trained = run_diffu_grpo(argv({**rl_flags, **lora}))
    assert {name.split(".")[-3] for name, p in trained.model.named_parameters() if p.requires_grad} == {
        "lora_A",
        "lora_B",
    }
    again = {**rl_flags, "model_name_or_path": tmp_path / "out", "output_dir": tmp_path / "again"}
    assert run_diffu_grpo(argv(again)).state.global_step == 2
    assert (tmp_path / "again" / "adapter_config.json").is_file()


def test_a_local_file_and_rewards_of_ones_own(run_diffu_grpo, rl_flags, argv, tmp_path):
    (tmp_path / "reward.py").write_text(REWARD)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i}?", "target": 0.25}) + "\n" for i in range(8)))
    rewards = [f"{tmp_path}/reward.py:ones", f"{tmp_path}/reward.py:targets"]
    rl_flags |= {"task": None, "task_args": None, "dataset_name": data, "reward_funcs": rewards}
    trainer = run_diffu_grpo(argv(rl_flags))
    assert [log["rewards/targets/mean"] for log in trainer.state.log_history if "rewards/targets/mean" in log] == [0.25]


def test_evaluation_uses_the_split_it_is_told(run_diffu_grpo, rl_flags, argv):
    rl_flags |= {
        "eval_strategy": "steps", "eval_steps": 2, "dataset_test_split": "validation", "per_device_eval_batch_size": 8,
    }  # fmt: skip
    trainer = run_diffu_grpo(argv(rl_flags))
    from rl4dlm import load_task

    assert trainer.eval_dataset["prompt"] == load_task("few_clue_sudoku", size=32).dataset("validation")["prompt"]
    assert any("eval_reward" in log for log in trainer.state.log_history)


def test_a_run_goes_on_where_it_stopped(run_diffu_grpo, rl_flags, argv, tmp_path):
    rl_flags |= {"max_steps": 4, "save_steps": 2, "lr_scheduler_type": "constant", "temperature": 3.0}
    whole = run_diffu_grpo(argv(rl_flags))
    checkpoint = tmp_path / "out" / "checkpoint-2"
    again = {**rl_flags, "output_dir": tmp_path / "again", "resume_from_checkpoint": checkpoint}
    resumed = run_diffu_grpo(argv(again))
    losses = [
        [log["loss"] for log in t.state.log_history if "loss" in log and log["step"] > 2] for t in (whole, resumed)
    ]
    assert len(losses[0]) == 2 and losses[0] == losses[1]


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("broken")
    tokenizer = tiny_tokenizer()
    no_spec = tiny_llada()
    del no_spec.config.diffusion
    no_spec.save_pretrained(folder / "no_spec")
    tokenizer.save_pretrained(folder / "no_spec")
    save_denoiser(tiny_llada(mask_token_id=5), folder / "other_mask", tokenizer)
    (folder / "question.jsonl").write_text('{"question": "why?"}\n')
    (folder / "prompt.jsonl").write_text('{"prompt": "why?"}\n')
    (folder / "no_reward.py").write_text("def other(completions, **columns): return [0.0 for _ in completions]\n")
    return {path.name: path for path in [*folder.iterdir(), folder / "absent.jsonl"]}


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"schedule": "fast"}, ValueError, "schedule='fast' is unknown; choose one of .*low_confidence, .*random"),
        ({"schedule_args": '{"speed": 1}'}, ValueError, "unknown settings.*speed"),
        ({"block_length": 5}, ValueError, "block_length=5 does not divide max_completion_length=16"),
        ({"denoising_steps": 3, "block_length": 8}, ValueError, "denoising_steps=3 cannot be shared out over 2 blocks"),
        ({"temperature": -1}, ValueError, "temperature=-1.0"),
        ({"reward_funcs": "karma"}, ValueError, "unknown reward 'karma'; known rewards: .*countdown.*few_clue_sudoku"),
        ({"reward_funcs": "no_reward.py:mine"}, ValueError, "no function 'mine'; it defines other"),
        ({"reward_funcs": None}, ValueError, "reward_funcs is empty"),
        ({"task": "chess"}, ValueError, "unknown task 'chess'; known tasks: acecode, "),
        ({"task_args": '{"color": 1}'}, ValueError, "has no option 'color'"),
        ({"task_args": "{"}, ValueError, "task_args='{' is not JSON"),
        ({"task": None, "task_args": None}, ValueError, "task=None and dataset_name=None"),
        ({"dataset_name": "prompt.jsonl"}, ValueError, "name either a task or a dataset"),
        ({"task": None, "dataset_name": "prompt.jsonl"}, ValueError, "task_args=.* is given without a task"),
        ({"dataset_config": "main"}, ValueError, "dataset_config='main' belongs to dataset_name"),
        ({"dataset_train_split": "exam"}, ValueError, "no split 'exam'"),
        ({"task": None, "task_args": None, "dataset_name": "absent.jsonl"}, FileNotFoundError, "no such file"),
        (
            {"task": None, "task_args": None, "dataset_name": "question.jsonl"},
            ValueError,
            r"train_dataset has no column 'prompt'; its columns are \['question'\]",
        ),
        (
            {"task": None, "task_args": None, "dataset_name": "prompt.jsonl", "dataset_train_split": "test"},
            ValueError,
            "has one split, 'train'",
        ),
        ({"model_name_or_path": None}, ValueError, "model_name_or_path is not set"),
        ({"model_name_or_path": "/no/such/model"}, FileNotFoundError, "no model folder '/no/such/model'"),
        ({"model_name_or_path": "no_spec"}, ValueError, "no_spec.*config.diffusion"),
        ({"model_name_or_path": "other_mask"}, ValueError, "mask_token_id=2, but the model was .* mask_token_id=5"),
        ({"use_vllm": True}, ValueError, "use_vllm=True is not supported"),
        ({"load_in_4bit": True}, ImportError, "load_in_4bit=True needs bitsandbytes.*pip install bitsandbytes"),
        ({"report_to": "wandb"}, ImportError, r"report_to=wandb needs wandb.*rl4dlm\[wandb\]"),
        ({"unheard_of": 1}, ValueError, "--unheard_of"),
    ],
)
def test_bad_input_is_named_before_anything_is_computed(
    settings, error, said, run_diffu_grpo, rl_flags, argv, broken, monkeypatch
):
    monkeypatch.setattr(PreTrainedModel, "__init__", lambda *_, **__: pytest.fail("a model was built"))
    for package in ("bitsandbytes", "wandb"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed

    def located(value):
        name, colon, rest = str(value).partition(":")
        return f"{broken[name]}{colon}{rest}" if name in broken else value

    flags = {**rl_flags, **{name: None if value is None else located(value) for name, value in settings.items()}}
    with pytest.raises(error, match=said):
        run_diffu_grpo(argv(flags))


def test_an_unknown_setting_in_the_file_is_named(run_diffu_grpo, rl_flags, argv, tmp_path):
    (tmp_path / "config.yaml").write_text("lerning_rate: 1.0e-3\n")
    with pytest.raises(ValueError, match="lerning_rate"):
        run_diffu_grpo(["--config", str(tmp_path / "config.yaml"), *argv(rl_flags)])


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def test_the_command_line_starts_it(rl_flags, argv, tmp_path):
    command = [sys.executable, "-m", "rl4dlm.cli", "train", "diffu_grpo"]
    config_file = ["--config_file", "configs/accelerate/one_process.yaml", "--"]
    config = ["--config", "configs/diffu_grpo/few_clue_sudoku_tiny.yaml"]
    rl_flags |= {"task": None, "reward_funcs": None}  # the file has them
    subprocess.run(
        [*command, *config_file, *config, *argv(rl_flags)],
        cwd=tmp_path, env=environment(), check=True, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    load_denoiser(tmp_path / "out")


@pytest.mark.distributed
def test_torchrun_starts_it_in_two_processes(rl_flags, argv, tmp_path):
    script = str(resources.find("trainers") / "diffu_grpo.py")
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--standalone",
         script, *argv({**rl_flags, "use_cpu": True, "ddp_backend": "gloo", "per_device_train_batch_size": 4})],
        cwd=tmp_path, env=environment(), check=True, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    # One state of the random generators per process: there were two, and they were one run.
    saved = sorted(path.name for path in (tmp_path / "out" / "checkpoint-2").glob("rng_state*.pth"))
    assert saved == ["rng_state_0.pth", "rng_state_1.pth"]
    load_denoiser(tmp_path / "out")
