"""Every training configuration that ships is understood by its script, says what its paper says, and trains."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from trl import ModelConfig

from rl4dlm import load_rewards, resources, save_denoiser, tiny_llada, tiny_tokenizer
from rl4dlm.cli.arguments import RewardArguments, parse
from rl4dlm.tasks import load_task
from tests.models.families import BUILDERS, edit
from tests.published_settings import DELIBERATE, NOT_HELD, PUBLISHED, REPOSITORIES

CONFIGS = {
    f"{path.parent.name}/{path.stem}": path
    for path in sorted(resources.find("configs").glob("*/*.yaml"))
    if path.parent.name != "accelerate"
}
CODE = ("acecode", "kodcode")  # tasks whose configurations are tried on `code_mini`
FAMILIES = {  # how the names of published models begin -> what stands for them; LLaDA for all others
    "JetLM/SDAR-30B": "sdar_moe",
    "JetLM/": "sdar",
    "Gen-Verse/": "sdar",
    "inclusionAI/LLaDA2": "llada2",
    "inclusionAI/LLaDA-MoE": "llada_moe",
    "Dream-org/": "dream",
    "apple/": "dream",
    "Efficient-Large-Model/": "fast_dllm",
    "google/diffusiongemma": "diffusion_gemma",
    "GSAI-ML/iLLaDA": "illada",
    "nvidia/Nemotron-Labs": "nemotron_diffusion",
    "tencent/WeDLM": "wedlm",
}
OF_ANOTHER_SIZE = {  # what differs from another configuration in the model and the number of GPUs alone
    "tracerl/math_sdar-4b": "tracerl/math_sdar-8b",
    "tracerl/math_sdar-1.7b": "tracerl/math_sdar-8b",
    "tracerl/math_trado-4b": "tracerl/math_sdar-8b",
    "tracerl/math_trado-8b": "tracerl/math_sdar-8b",
    "tracerl/gsm8k_fast-dllm-1.5b": "tracerl/gsm8k_fast-dllm-7b",
    "espo/gsm8k_llada-1.5": "espo/gsm8k_llada-8b",
}
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def family(settings: dict) -> str:
    """The family of the published model that a configuration names."""
    name = settings["model_name_or_path"]
    return next((known for start, known in FAMILIES.items() if name.startswith(start)), "llada")


def load_script(path: Path):
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model, and small files in the forms of the data sets that would be downloaded."""
    folder = tmp_path_factory.mktemp("configs")
    save_denoiser(tiny_llada(), folder / "llada", tiny_tokenizer())
    for name in set(FAMILIES.values()):  # in their published form, as they would be downloaded
        tokenizer = tiny_tokenizer()
        if name == "illada":
            tokenizer.mask_token = None  # `config.json` alone says which token it is
        save_denoiser(BUILDERS[name](), folder / name, tokenizer, form="hub")
    causal = tiny_llada()
    causal.config.is_causal = True
    del causal.config.diffusion
    causal.save_pretrained(folder / "causal")
    tiny_tokenizer().save_pretrained(folder / "causal")
    write(
        folder / "gsm8k.jsonl", [{"question": f"What is {i} + 1?", "answer": f"Count.\n#### {i + 1}"} for i in range(8)]
    )
    write(folder / "math.jsonl", [{"problem": f"Find ${i}+1$.", "solution": rf"\boxed{{{i + 1}}}"} for i in range(8)])
    s1k = {"question": "Why?", "thinking_trajectories": ["Because."], "attempt": "So.", "solution": "So.", "cot": None}
    write(folder / "s1K.jsonl", [s1k] * 8)
    write(folder / "pairs.jsonl", [{"prompt": "Why?", "chosen": "Because.", "rejected": "So."}] * 8)
    edge = {"prompt": "It rains.", "completion": " The ground is wet.", "causal_edges": [[[10, 27], [0, 8]]]}
    write(folder / "edges.jsonl", [edge] * 8)
    turns = [{"role": role, "content": text} for role, text in (("user", "Why?"), ("assistant", "So."))]
    write(folder / "conversations.jsonl", [{"messages": turns * 3}] * 8)
    said = "<|{{ message['role'] }}|>", "{{ message['content'] }}<eos>"
    marked = "{% for message in messages %}" + said[0] + "{% if message['role'] == 'assistant' %}{% generation %}"
    marked += said[1] + "{% endgeneration %}{% else %}" + said[1] + "{% endif %}{% endfor %}"
    (folder / "chat_template.jinja").write_text(marked)
    load_script(EXAMPLES / "prepare_s1k.py").main([str(folder / "s1k"), "--source", str(folder / "s1K.jsonl")])
    return folder


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


SMALL = {
    # Nothing but size, precision, places and the amount of work.
    "dtype": "float32",
    "bf16": False,
    "max_steps": 1,
    "per_device_train_batch_size": 6,
    "lora_r": 2,
    "save_strategy": "no",
    "disable_tqdm": True,
}
SMALL_RL = {
    "load_in_4bit": False,
    "max_completion_length": 32,
    "block_length": 16,
    "denoising_steps": 4,
    "num_views": 2,
    "policy_heads": 2,
    "max_prompt_length": 980,  # the tiny tokenizer has one token per character
}


def overrides(name: str, settings: dict, folder: Path) -> dict:
    pairs = name.startswith(("elbo_kto/", "vrpo/"))
    model = folder / family(settings)
    small = {"model_name_or_path": model, "output_dir": folder / "outputs", **SMALL}
    if "adapt_attention" in settings:
        small["model_name_or_path"] = folder / "causal"
        small["adapt_mask_token"] = tiny_tokenizer().mask_token
    if "num_generations" in settings:
        small |= {key: value for key, value in SMALL_RL.items() if key in settings}
        if family(settings) != "llada":
            small["num_generations"] = min(4, settings["num_generations"])
        small["per_device_train_batch_size"] = small.get("num_generations", settings["num_generations"])
        if "block_length" not in settings:
            small |= {"max_completion_length": 16}
        if "max_steps" in settings.get("schedule_args", {}):
            small["schedule_args"] = json.dumps({**settings["schedule_args"], "max_steps": 2})
    if settings.get("task") in ("gsm8k", "math"):
        small["task_args"] = json.dumps({"path": {"train": str(folder / f"{settings['task']}.jsonl")}})
    elif settings.get("task") in CODE:
        small |= {"task": "code_mini", "task_args": json.dumps({"size": 16})}
    elif settings.get("task") is not None:
        task_args = settings.get("task_args", {})
        shorter = {"style": "d1"} if task_args.get("style") == "spg" else {}  # without solved examples
        small["task_args"] = json.dumps({**task_args, **shorter, "size": 16})
    for name in ("gradient_accumulation_steps", "num_iterations", "steps_per_generation"):
        if settings.get(name, 1) > 2:
            small[name] = 2
    if "dataset_name" in settings:
        small["dataset_name"] = folder / ("pairs.jsonl" if pairs else "s1k")
    if "causal_layers" in settings:
        small |= {"dataset_name": folder / "edges.jsonl", "causal_layers": "[0, 1]"}
    if "turns" in settings:
        small |= {"dataset_name": folder / "conversations.jsonl"}
        small["chat_template_path"] = folder / "chat_template.jinja"
    if "max_length" in settings:
        small["max_length"] = 256
    return small


def by_trainer_and_model():
    """All that run; slow are those that differ by no more than their task from one before."""
    found, seen = [], set()
    for name in sorted(CONFIGS.keys() - OF_ANOTHER_SIZE.keys()):
        folder, _, stem = name.partition("/")
        which = folder, stem.replace("few_clue_sudoku", "puzzles").partition("_")[2]
        found.append(pytest.param(name, marks=(pytest.mark.slow,) if which in seen else ()))
        seen.add(which)
    return found


@pytest.mark.parametrize("name", by_trainer_and_model())
def test_a_configuration_runs_one_step(name, folder):
    settings = yaml.safe_load(CONFIGS[name].read_text(encoding="utf-8"))
    small = overrides(name, settings, folder)
    flags = [word for key, value in small.items() for word in (f"--{key}", str(value))]
    script = load_script(resources.find("trainers") / f"{CONFIGS[name].parent.name}.py")
    trainer = script.main(["--config", str(CONFIGS[name]), *flags])
    assert trainer.state.global_step == 1
    # What the file says has arrived, unless a flag said otherwise.
    for key in settings.keys() - small.keys():
        if hasattr(trainer.args, key):
            found = getattr(trainer.args, key)
            assert getattr(found, "value", found) == settings[key], key
    if settings.get("use_peft"):
        (lora,) = trainer.model.peft_config.values()
        assert (lora.lora_alpha, lora.lora_dropout) == (settings["lora_alpha"], settings["lora_dropout"])
        named = settings["lora_target_modules"]  # one alone is a pattern
        assert lora.target_modules == (named[0] if len(named) == 1 else set(named))
    if "reward_funcs" in settings:
        assert len(trainer.reward_funcs) == len(settings["reward_funcs"])


@pytest.mark.parametrize("name", OF_ANOTHER_SIZE)
def test_a_configuration_of_another_size_is_the_one_that_runs(name):
    """It parses, names a model of the same family, and has the same batch of an optimizer step, on one GPU or eight."""
    text = CONFIGS[name].read_text(encoding="utf-8")
    settings, other = (
        yaml.safe_load(CONFIGS[which].read_text(encoding="utf-8")) for which in (name, OF_ANOTHER_SIZE[name])
    )
    assert family(settings) == family(other) and settings["model_name_or_path"] != other["model_name_or_path"]
    free = ("model_name_or_path", "output_dir", "per_device_train_batch_size", "gradient_accumulation_steps")
    assert {key: settings[key] for key in settings if key not in free} == {
        key: other[key] for key in other if key not in free
    }
    gpus = 1 if "one_process.yaml" in text else 8
    batch, as_there = (s["per_device_train_batch_size"] * s["gradient_accumulation_steps"] for s in (settings, other))
    assert batch * gpus == as_there * 8
    trainer = load_script(resources.find("trainers") / f"{CONFIGS[name].parent.name}.py")
    (config,) = (value.config_class for key, value in vars(trainer).items() if key.endswith("Trainer"))
    parse(["--config", str(CONFIGS[name]), "--bf16", "False"], RewardArguments, config, ModelConfig)


def test_the_mask_token_of_illada_is_what_its_files_say(folder, tmp_path):
    """Its vocabulary is not LLaDA's: where nothing states the token, training refuses to start, and an id is taken."""
    stated = json.loads((folder / "illada" / "config.json").read_text())
    assert stated["mask_token_id"] == tiny_tokenizer().mask_token_id
    assert stated["architectures"] == ["ILLaDAForCausalLM"] and stated["tie_word_embeddings"]
    silent = shutil.copytree(folder / "illada", tmp_path / "silent")
    edit(silent, mask_token_id=None)
    edit(silent, "generation_config.json", mask_token_id=None)
    settings = yaml.safe_load(CONFIGS["espo/gsm8k_illada-8b"].read_text(encoding="utf-8"))
    small = {**overrides("espo/gsm8k_illada-8b", settings, folder), "model_name_or_path": silent}
    flags = [word for key, value in small.items() for word in (f"--{key}", str(value))]
    script = load_script(resources.find("trainers") / "espo.py")
    with pytest.raises(ValueError, match="mask_token_id"):
        script.main(["--config", str(CONFIGS["espo/gsm8k_illada-8b"]), *flags])
    given = ["--model_init_kwargs", json.dumps({"mask_token_id": stated["mask_token_id"]})]
    trainer = script.main(["--config", str(CONFIGS["espo/gsm8k_illada-8b"]), *flags, *given])
    assert trainer.processing_class.mask_token_id == trainer.spec.mask_token_id == stated["mask_token_id"]
    sft = load_script(resources.find("trainers") / "sft.py")
    small = {"dataset_name": folder / "edges.jsonl", "output_dir": tmp_path / "sft", **SMALL}
    flags = [word for key, value in small.items() if key != "lora_r" for word in (f"--{key}", str(value))]
    trainer = sft.main(["--model_name_or_path", str(silent), *flags, *given])
    assert trainer.processing_class.mask_token_id == stated["mask_token_id"]


def test_configurations_of_code_name_tasks_and_rewards_that_fit(folder):
    program = {"model_name": "llama3_instruct", "completion": "def f(n):\n    return n"}
    inference = [{**program, "pass_rate": rate} for rate in (0, 1)]
    ace = {"question": "Add 1.", "test_cases": ["assert f(1) == 2"], "inferences": inference}
    info = [{"function_name": "f", "parameter_list": "(n)"}]
    kod = {"question": "Add 1.", "solution": "", "test": "def test_f():\n    assert f(1) == 2", "test_info": info}
    write(folder / "acecode.jsonl", [ace])
    write(folder / "kodcode.jsonl", [kod])
    found = []
    for name, path in CONFIGS.items():
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        if settings.get("task") not in CODE:
            continue
        found.append(name.partition("/")[0])
        files = {"path": {"train": folder / f"{settings['task']}.jsonl"}, "evaluation_sets": []}
        row = load_task(settings["task"], **settings["task_args"], **files).rows("train")[0]
        text = "<answer>\n```python\ndef f(n):\n    return n + 1\n```\n</answer>"
        if "compat" in settings["reward_funcs"][0] and settings["task"] == "acecode":
            text = text.removeprefix("<answer>\n").removesuffix("</answer>")
        for reward in load_rewards(settings["reward_funcs"]):
            (paid,) = reward(prompts=[row["prompt"]], completions=[text], problem=[row["problem"]])
            assert paid == (1.5 if "kodcode" in settings["reward_funcs"][0] else 1.0), name
    assert sorted(found) == ["coupled_grpo", "diffusion_gdpo", "dream_coder_rl", "espo", "justgrpo", "spg"]


# d1, arXiv 2504.12216: its released code, which its authors call the reference (issue 9 of its repository).
D1_RL = {
    "max_completion_length": 256,
    "block_length": 32,
    "denoising_steps": 128,
    "num_generations": 6,
    "p_mask_prompt": 0.15,
    "epsilon": 0.5,
    "beta": 0.04,
    "scale_rewards": "none",
    "learning_rate": 3e-6,
    "adam_beta1": 0.9,
    "adam_beta2": 0.99,
    "weight_decay": 0.1,
    "max_grad_norm": 0.2,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 1e-4,
    "per_device_train_batch_size": 6,
    "gradient_accumulation_steps": 2,
    "lora_r": 128,
    "lora_alpha": 64,
    "lora_dropout": 0.05,
    "load_in_4bit": True,
    "use_bnb_nested_quant": True,
    "bnb_4bit_quant_type": "nf4",
    "dtype": "bfloat16",
    "seed": 42,
}
D1_ITERATIONS = {"gsm8k": 12, "math": 12, "countdown": 8, "sudoku": 8}
D1_SFT = {
    "max_length": 4096,
    "num_train_epochs": 20,
    "learning_rate": 1e-5,
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
    "lora_r": 128,
    "lora_alpha": 256,
    "lora_dropout": 0.05,
    "lora_target_modules": ["q_proj", "k_proj", "v_proj"],
    "eos_padding": "max_length",
}


@pytest.mark.parametrize("task", D1_ITERATIONS)
def test_diffu_grpo_has_the_published_settings(task):
    settings = yaml.safe_load(CONFIGS[f"diffu_grpo/{task}_llada-8b"].read_text(encoding="utf-8"))
    assert {key: settings[key] for key in D1_RL} == D1_RL
    assert settings["num_iterations"] == D1_ITERATIONS[task]
    assert settings["temperature"] == (0.3 if task == "sudoku" else 0.9)
    assert len(settings["lora_target_modules"]) == 7
    assert all(reward.endswith("_compat") for reward in settings["reward_funcs"])


def test_sft_has_the_published_settings():
    settings = yaml.safe_load(CONFIGS["sft/s1k_llada-8b"].read_text(encoding="utf-8"))
    assert {key: settings[key] for key in D1_SFT} == D1_SFT


# The settings by which the tasks of an algorithm differ, from the tables of their papers' code.
ESPO = {
    # beta, epsilon, group, rows per device, accumulation, steps
    "gsm8k": (1e-3, 0.2, 6, 3, 4, 256),
    "math": (1e-3, 0.2, 16, 2, 16, 256),
    "countdown": (3e-3, 0.0, 6, 3, 4, 128),
    "sudoku": (1e-2, 0.2, 6, 3, 4, 128),
    "acecode": (1e-2, 0.2, 10, 1, 20, 256),
}


@pytest.mark.parametrize("task", ESPO)
def test_espo_has_the_published_settings(task):
    settings = yaml.safe_load(CONFIGS[f"espo/{task}_llada-8b"].read_text(encoding="utf-8"))
    of_the_task = (
        "beta", "epsilon", "num_generations", "per_device_train_batch_size", "gradient_accumulation_steps",
        "denoising_steps",
    )  # fmt: skip
    assert tuple(settings[key] for key in of_the_task) == ESPO[task]
    assert (settings["num_iterations"], settings["num_views"], settings["temperature"]) == (8, 4, 1.0)
    code = task == "acecode"
    optimiser = (settings["learning_rate"], settings["weight_decay"], settings["max_grad_norm"])
    assert optimiser == ((1e-6, 0.1, 0.8) if code else (3e-6, 0.01, 0.2))
    batch = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"] * 8
    assert batch == 16 * settings["num_generations"]  # 16 prompts on 8 GPUs


def setting(name: str, key: str) -> Any:
    """What a configuration runs with: what it says, else the default of its trainer's settings."""
    settings: Any = yaml.safe_load(CONFIGS[name].read_text(encoding="utf-8"))
    first, _, second = key.partition(".")
    if first in settings:
        return settings[first].get(second) if second else settings[first]
    script = load_script(resources.find("trainers") / f"{CONFIGS[name].parent.name}.py")
    (trainer,) = (value for key, value in vars(script).items() if key.endswith("Trainer"))
    for entry in (*fields(trainer.config_class), *fields(ModelConfig)):
        if entry.name == first:
            return entry.default if entry.default is not MISSING else entry.default_factory()
    raise AssertionError(f"{name}: nothing has a setting {key!r}")


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_f10_a_configuration_has_the_authors_settings(name):
    repository = REPOSITORIES[name.partition("/")[0]]
    wrong, kept = [], []
    for key, flag in PUBLISHED[name].items():
        found = setting(name, key)
        deliberate = next((why for entry, why in DELIBERATE.items() if entry in ((name, key), ("*", key))), None)
        if found == flag.value and deliberate is not None:
            kept.append(f"{key}={found!r} is the authors'; take it out of DELIBERATE")
        elif found != flag.value and deliberate is None:
            wrong.append(f"{key}={found!r}; {repository}/{flag.file} has {flag.value!r}")
    assert not wrong + kept, "\n".join([name, *wrong, *kept])


def test_f10_every_configuration_that_speaks_of_published_settings_is_in_the_table():
    claims = {
        name
        for name, path in CONFIGS.items()
        if re.search(
            r"settings (that|of) .*?(publish|released)",
            " ".join(re.findall(r"^# (.*)", path.read_text(encoding="utf-8").partition("\n\n")[0], re.MULTILINE)),
        )
    }
    assert len(claims) > 20
    assert claims <= PUBLISHED.keys() | NOT_HELD.keys(), claims - PUBLISHED.keys() - NOT_HELD.keys()
    assert NOT_HELD.keys() <= CONFIGS.keys() and not NOT_HELD.keys() & PUBLISHED.keys()
    assert {name for name, _ in DELIBERATE} - {"*"} <= PUBLISHED.keys()
