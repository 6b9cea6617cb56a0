"""The `rl4dlm` command: what it runs, what it reports, and what it says about bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from rl4dlm import (
    DecodingConfig,
    RolloutEngine,
    evaluate,
    load_denoiser,
    load_task,
    load_tokenizer,
    resources,
    save_denoiser,
    tiny_diffusion_gemma,
    tiny_llada,
    tiny_sdar,
    tiny_tokenizer,
)
from rl4dlm.cli import launch_command, main

ROOT = Path(__file__).resolve().parents[2]


TRAINERS = ", ".join(sorted(path.stem for path in resources.find("trainers").glob("*.py")))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_denoiser(tiny_llada(initializer_range=0.5), folder, tiny_tokenizer())
    return folder


# --- help and env -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["train", "--help"], ["eval", "--help"], ["decode", "--help"], ["convert", "--help"], ["--version"]],
)
def test_help_loads_no_heavy_library(arguments):
    code = (
        "import sys\nfrom rl4dlm import cli\n"
        "try:\n    cli.main(sys.argv[1:])\n"
        "except SystemExit as stop:\n    assert stop.code == 0\n"
        "print('loaded:', *sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    outcome = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    text, _, loaded = outcome.stdout.rpartition("loaded:")
    assert "rl4dlm" in text
    assert {"torch", "transformers", "trl", "datasets", "numpy"}.isdisjoint(loaded.split())


def test_train_help_lists_the_trainers(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    assert TRAINERS in " ".join(capsys.readouterr().out.split())


def test_env_says_what_is_there(capsys):
    assert main(["env"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["torch"] == torch.__version__
    assert lines["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    for folder in resources.FOLDERS:
        assert Path(lines[f"{folder}/"]) == resources.find(folder)
    assert {"deepspeed", "bitsandbytes", "wandb", "GPUs", "processor"} <= set(lines)


def test_env_reports_a_missing_extra(capsys, monkeypatch):
    from importlib import metadata

    real = metadata.version

    def version(name):
        if name == "wandb":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    main(["env"])
    assert "wandb          not installed" in capsys.readouterr().out


# --- convert ----------------------------------------------------------------------------------------------------------


def test_convert_there_and_back(tmp_path, capsys):
    model, published = tiny_sdar(), tmp_path / "published"
    save_denoiser(model, published, form="hub")
    tiny_tokenizer().save_pretrained(published)
    config = json.loads((published / "config.json").read_text())
    del config["block_size"]  # many published folders do not say
    (published / "config.json").write_text(json.dumps(config))
    assert main(["convert", str(published), str(tmp_path / "ours"), "--block-length", "8"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"written to {tmp_path / 'ours'}"  # libraries print too
    assert load_denoiser(tmp_path / "ours").config.diffusion["block_length"] == 8
    assert load_tokenizer(tmp_path / "ours").get_vocab() == tiny_tokenizer().get_vocab()
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "again"), "--form", "hub"]) == 0
    written = load_denoiser(tmp_path / "again").state_dict()
    assert all(torch.equal(value, written[name]) for name, value in model.state_dict().items())
    assert json.loads((tmp_path / "again" / "config.json").read_text())["architectures"] == ["SDARForCausalLM"]


def test_m8_merge_writes_the_model_that_an_adapter_makes(tmp_path, capsys):
    base, adapter, target = (str(tmp_path / name) for name in ("base", "adapter", "merged"))
    save_denoiser(tiny_llada(initializer_range=0.4), base, tiny_tokenizer())
    model = get_peft_model(load_denoiser(base), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    save_denoiser(model, adapter)
    ids = torch.tensor([[9, 2, 10, 2]])
    for form in ("rl4dlm", "hub"):
        assert main(["merge", adapter, target, "--form", form]) == 0
        assert capsys.readouterr().out == f"written to {target}\n"
        merged = load_denoiser(target)
        assert type(merged) is type(load_denoiser(base)) and load_tokenizer(target).mask_token_id == 2
        torch.testing.assert_close(merged(input_ids=ids).logits, model.eval()(input_ids=ids).logits, rtol=0, atol=2e-4)
    for source, place, said in (
        (base, target, "nothing to merge"),
        (adapter, adapter, "is the adapter;"),
        (adapter, base, "is the adapter's base"),
    ):
        assert main(["merge", source, place]) == 2 and said in capsys.readouterr().err


def test_convert_names_bad_input(model_folder, tmp_path, capsys):
    for source, target, said in (
        ("./absent", tmp_path / "x", "there is no model folder './absent'"),
        (model_folder, model_folder, "is the source; name another folder"),
        (model_folder, ROOT / "docs", "exists and holds no model; it will not be overwritten"),
    ):
        assert main(["convert", str(source), str(target)]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["convert", str(model_folder), str(tmp_path / "x"), "--form", "gguf"])
    assert stop.value.code == 2 and "--form" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


# --- train ------------------------------------------------------------------------------------------------------------

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
SCRIPT = str(resources.find("trainers") / "diffu_grpo.py")


ONE = str(resources.find("configs") / "accelerate/one_process.yaml")
TWO = str(resources.find("configs") / "accelerate/multi_gpu.yaml")


@pytest.fixture
def one_device(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("HF_HOME", str(tmp_path))


@pytest.mark.parametrize(
    ("given", "becomes"),
    [
        (["diffu_grpo"], [SCRIPT]),
        (["diffu_grpo", "--config", "a.yaml", "--seed", "1"], [SCRIPT, "--config", "a.yaml", "--seed", "1"]),
        (["diffu_grpo", "--num_processes", "1", "--", "--seed", "1"], [SCRIPT, "--seed", "1"]),
        (["diffu_grpo", "--config_file", ONE, "--"], [SCRIPT]),
        (["diffu_grpo", "--", "--help"], [SCRIPT, "--help"]),
    ],
)
def test_r6_train_with_one_process_is_the_script_itself(given, becomes, one_device):
    assert launch_command(given) == [sys.executable, *becomes]


@pytest.mark.parametrize(
    ("given", "becomes"),
    [
        (["diffu_grpo", "--num_processes", "2", "--", "--seed", "1"], ["--num_processes", "2", SCRIPT, "--seed", "1"]),
        (["diffu_grpo", "--cpu", "--"], ["--cpu", SCRIPT]),
        (["diffu_grpo", "--config_file", TWO, "--"], ["--config_file", TWO, SCRIPT]),
    ],
)
def test_train_with_more_is_accelerate_launch(given, becomes, one_device):
    assert launch_command(given) == [*LAUNCH, *becomes]


def test_train_without_options_uses_all_devices(monkeypatch, one_device):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert launch_command(["diffu_grpo"]) == [*LAUNCH, SCRIPT]


def test_shipped_configurations_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = "configs/diffu_grpo/few_clue_sudoku_tiny.yaml"
    launcher = "configs/accelerate/zero2.yaml"
    command = launch_command(["diffu_grpo", "--config_file", launcher, "--", "--config", named])
    folder = resources.find("configs").parent
    assert command[3:] == ["--config_file", str(folder / launcher), SCRIPT, "--config", str(folder / named)]
    # A file of the user's own comes first, and one that is nowhere is left for the script to report.
    (tmp_path / named).parent.mkdir(parents=True)
    (tmp_path / named).touch()
    assert launch_command(["diffu_grpo", "--config", named])[-1] == named
    assert launch_command(["diffu_grpo", "--config", "configs/none.yaml"])[-1] == "configs/none.yaml"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "needs the name of a trainer; choose one of " + TRAINERS),
        (["grpo"], "trainer 'grpo' is unknown; choose one of " + TRAINERS),
        (["../evil"], "trainer '../evil' is unknown"),
        (["sft", "--num_processes", "2"], "--num_processes belongs to accelerate"),
        (["sft", "--", "--config_file=x.yaml"], "--config_file=x.yaml belongs to accelerate"),
    ],
)
def test_train_refuses_what_it_cannot_start(given, said, capsys, monkeypatch):
    monkeypatch.setattr("os.execv", lambda *_: pytest.fail("a process was started"))
    assert main(["train", *given]) == 2
    printed = capsys.readouterr().err
    assert said in printed and "Traceback" not in printed


# --- eval -------------------------------------------------------------------------------------------------------------


def run_eval(*arguments: str) -> int:
    return main(["eval", *map(str, arguments)])


def test_eval_writes_what_evaluate_measures(model_folder, tmp_path, capsys):
    output = tmp_path / "out" / "results.json"
    status = run_eval(
        "--model", model_folder, "--task", "few_clue_sudoku,countdown",
        "--task-args", '{"countdown": {"size": 6, "numbers": 4}, "few_clue_sudoku": {"size": 8}}',
        "--schedule", "random", "--steps", "4,8", "--block-length", "4", "--canvas-length", "16", "--limit", "5",
        "--temperature", "0.7", "--seed", "3", "--batch-rows", "2", "--num-samples", "2", "--chosen-by", "last",
        "--pass-at", "1,2", "--output", output,
    )  # fmt: skip
    assert status == 0
    sudoku, countdown = json.loads(output.read_text())["results"]
    assert (sudoku["task"], countdown["task"]) == ("few_clue_sudoku", "countdown")
    assert sudoku["model"] == str(model_folder) and sudoku["chosen_by"] == "last" and sudoku["seed"] == 3

    decodings = {
        n: DecodingConfig(canvas_length=16, schedule="random", steps=n, block_length=4, temperature=0.7) for n in (4, 8)
    }
    for written, task in (
        (sudoku, load_task("few_clue_sudoku", size=8)),
        (countdown, load_task("countdown", size=6, numbers=4)),
    ):
        model = load_denoiser(model_folder)
        direct = evaluate(
            model, tiny_tokenizer(), task, decodings=decodings, limit=5, num_samples=2, seed=3, pass_at=(1, 2)
        )
        expected = {label: asdict(replace(m, seconds=0)) for label, m in direct.measurements.items()}
        found = {label: {**values, "seconds": 0} for label, values in written["measurements"].items()}
        assert found == json.loads(json.dumps(expected))
        assert written["measurements"]["8"]["nfe"] > written["measurements"]["4"]["nfe"]

    printed = capsys.readouterr().out
    for word in ("few_clue_sudoku", "countdown", "solved", "pass@2", "NFE", "tokens/forward"):
        assert word in printed


def test_eval_takes_a_schedule_without_steps(model_folder, tmp_path, capsys):
    output = tmp_path / "results.json"
    status = run_eval(
        "--model", model_folder, "--task", "few_clue_sudoku", "--schedule", "threshold",
        "--schedule-args", '{"threshold": 0}', "--canvas-length", "16", "--limit", "3", "--output", output,
    )  # fmt: skip
    assert status == 0
    (measured,) = json.loads(output.read_text())["results"][0]["measurements"].items()
    assert measured[0] == "threshold"
    assert measured[1]["nfe"] == 1  # every candidate reaches a threshold of 0


@pytest.fixture(scope="module")
def broken_models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("broken")
    tokenizer = tiny_tokenizer()
    no_spec = tiny_llada()
    del no_spec.config.diffusion
    no_spec.save_pretrained(folder / "no_spec")
    tokenizer.save_pretrained(folder / "no_spec")
    save_denoiser(tiny_llada(mask_token_id=5), folder / "other_mask", tokenizer)
    return {name: str(folder / name) for name in ("no_spec", "other_mask", "absent")}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"--schedule": "fast"}, "schedule='fast' is unknown; choose one of "),
        ({"--task": "chess"}, "unknown task 'chess'; known tasks: acecode, "),
        ({"--task": "sudoku,sudoku"}, "names one thing twice"),
        ({"--task": ","}, "task=',' names nothing"),
        ({"--pass-at": "1,2"}, "pass-at=2 is not allowed with num-samples=1"),
        ({"--pass-at": "2", "--num-samples": "2"}, "pass-at of more than 1 with temperature=0"),
        ({"--task-args": "{"}, "task-args='{' is not JSON"),
        ({"--task-args": "[1]"}, "task-args=[1] is not a mapping"),
        ({"--task-args": '{"color": 1}'}, "has no option 'color'"),
        ({"--task": "sudoku,countdown", "--task-args": '{"size": 3}'}, "with several tasks, give each one's options"),
        ({"--task": "sudoku,countdown", "--task-args": '{"math": {}}'}, "task-args names 'math'"),
        ({"--split": "holdout"}, "no split 'holdout'"),
        ({"--steps": "4,many"}, "steps='4,many' is not a list of whole numbers"),
        ({"--steps": "3", "--block-length": "8"}, "steps=3 cannot be shared out over 2 blocks"),
        ({"--steps": "4", "--schedule": "threshold"}, "steps=4 has no meaning for schedule='threshold'"),
        ({"--block-length": "5"}, "block_length=5 does not divide canvas_length=16"),
        ({"--temperature": "-1"}, "temperature=-1.0 is not allowed"),
        ({"--cache": "magic"}, "cache='magic' is unknown"),
        ({"--schedule-args": '{"threshold": 1}'}, "schedule_args has unknown settings ['threshold']"),
        ({"--model": "absent"}, "there is no model folder"),
        ({"--model": "no_spec"}, "no `diffusion` entry, and architectures=['LlamaForCausalLM']"),
        ({"--model": "other_mask"}, "mask_token_id=2, but the model was trained with mask_token_id=5"),
        ({"--device": "toaster"}, "device='toaster' cannot be used"),
        ({"--output": "."}, "output='.' is a folder"),
    ],
)
def test_eval_names_bad_input_before_it_computes(settings, said, model_folder, broken_models, capsys, monkeypatch):
    monkeypatch.setattr(PreTrainedModel, "__init__", lambda *_, **__: pytest.fail("a model was built"))
    given = {"--model": str(model_folder), "--task": "few_clue_sudoku", "--canvas-length": "16", **settings}
    given["--model"] = broken_models.get(given["--model"], given["--model"])
    assert run_eval(*[word for pair in given.items() for word in pair]) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.startswith("rl4dlm: error: ") and "Traceback" not in printed


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (["--limit", "0"], "--limit: 0 is not allowed"),
        (["--num-samples", "x"], "--num-samples"),
        (["--dtype", "int8"], "--dtype"),
        (["--step", "4"], "--step"),  # no abbreviations
    ],
)
def test_eval_names_a_flag_it_cannot_read(setting, said, model_folder, capsys):
    with pytest.raises(SystemExit) as stop:
        run_eval("--model", model_folder, "--task", "sudoku", *setting)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_an_overlong_prompt_is_named(model_folder, capsys):
    assert run_eval("--model", model_folder, "--task", "sudoku", "--canvas-length", "1000", "--limit", "1") == 2
    assert "exceeds the model's 1024 positions" in capsys.readouterr().err


# --- decode -----------------------------------------------------------------------------------------------------------


def run_decode(*arguments: str) -> int:
    return main(["decode", *map(str, arguments)])


def replayed(path: Path) -> dict:
    text = path.read_text(encoding="utf-8")
    return json.loads(text.partition('id="replay">')[2].partition("</script>")[0])


def test_decode_shows_and_writes_what_the_engine_decodes(model_folder, tmp_path, capsys):
    output, picture = tmp_path / "new" / "page.html", tmp_path / "new" / "view.svg"
    status = run_decode(
        "--model", model_folder, "--prompt", "1+2=", "--prompt", "a", "--steps", "4", "--block-length", "4",
        "--canvas-length", "8", "--temperature", "0.7", "--seed", "3", "--num-samples", "2", "--batch-rows", "3",
        "--colour", "confidence", "--output", output, "--svg", picture, "--svg-steps", "1,3",
    )  # fmt: skip
    assert status == 0
    config = DecodingConfig(canvas_length=8, steps=4, block_length=4, temperature=0.7)
    prompts = [tiny_tokenizer().encode(text) for text in ("1+2=", "a")]
    expected = RolloutEngine(load_denoiser(model_folder)).generate(prompts, config, num_generations=2, seed=3)
    rows = replayed(output)["rows"]
    assert [row["prompt"] for row in rows] == ["1+2=", "1+2=", "a", "a"]
    for row, canvas, steps in zip(rows, expected.canvas.tolist(), expected.trace.commit_step.tolist(), strict=True):
        events = row["events"]
        written = {p: (t, s) for p, t, s in zip(*(events[n] for n in ("position", "token", "step")), strict=True)}
        assert written == {p: (canvas[p], step) for p, step in enumerate(steps) if step >= 0}
        assert row["blocks"][0] == [0, 0, 4]
    printed = capsys.readouterr()
    assert "row 3" in printed.out and "NFE" in printed.out and "sure" in printed.out
    assert "".join(f"written to {output}".split()) in "".join(printed.err.split()), "long paths are wrapped"
    drawn = picture.read_text(encoding="utf-8").replace("&#160;", " ")
    assert "step 1 " in drawn and "step 3 " in drawn and "step 2 " not in drawn


def test_decode_takes_the_prompts_of_a_task_and_messages(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["--model", str(model_folder), "--canvas-length", "8", "--schedule", "threshold"]
    assert run_decode(*given, "--task", "few_clue_sudoku", "--task-args", '{"size": 5}', "--limit", "3") == 0
    task = load_task("few_clue_sudoku", size=5).dataset("test")
    assert [row["prompt"] for row in replayed(tmp_path / "replay.html")["rows"]] == task["prompt"][:3]
    assert run_decode(*given, "--prompt", "hi", "--chat", "--output", "chat.html") == 0
    (row,) = replayed(tmp_path / "chat.html")["rows"]
    assert row["prompt"] == "<|user|>hi<eos><|assistant|>"


def test_decode_works_where_canvases_are_refined(tmp_path):
    model, output = tmp_path / "model", tmp_path / "page.html"
    save_denoiser(tiny_diffusion_gemma(), model, tiny_tokenizer())
    given = ["--schedule", "entropy_bound_canvas", "--temperature", "0.8", "--canvas-length", "8", "--steps", "4"]
    assert run_decode("--model", model, "--prompt", "a", *given[:-2], "--output", output) == 0
    assert 1 in replayed(output)["rows"][0]["events"]["kind"] or 2 in replayed(output)["rows"][0]["events"]["kind"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"--prompt": None}, "decode needs prompts: either --prompt, once or more, or --task"),
        ({"--task": "sudoku"}, "decode needs prompts: either --prompt, once or more, or --task"),
        ({"--prompt": None, "--task": "chess"}, "unknown task 'chess'"),
        ({"--prompt": None, "--task": "sudoku", "--split": "holdout"}, "no split 'holdout'"),
        ({"--schedule": "fast"}, "schedule='fast' is unknown"),
        ({"--schedule-args": "{"}, "schedule-args='{' is not JSON"),
        ({"--steps": "3", "--block-length": "8"}, "steps=3 cannot be shared out over 2 blocks"),
        ({"--svg": "view.svg", "--svg-steps": "half"}, "svg-steps='half' is not a list of whole numbers"),
        ({"--output": "."}, "output='.' is a folder"),
        ({"--svg": "."}, "svg='.' is a folder"),
        ({"--device": "toaster"}, "device='toaster' cannot be used"),
        ({"--model": "./absent"}, "there is no model folder"),
    ],
)
def test_decode_names_bad_input_before_it_computes(settings, said, model_folder, capsys, monkeypatch):
    monkeypatch.setattr(PreTrainedModel, "__init__", lambda *_, **__: pytest.fail("a model was built"))
    given = {"--model": str(model_folder), "--prompt": "a", "--canvas-length": "16", **settings}
    assert run_decode(*[word for pair in given.items() if pair[1] is not None for word in pair]) == 2
    printed = capsys.readouterr().err
    assert said in printed and "Traceback" not in printed


@pytest.mark.parametrize("setting", [["--delay", "-1"], ["--colour", "red"], ["--steps", "0"], ["--limit", "x"]])
def test_decode_names_a_flag_it_cannot_read(setting, model_folder, capsys):
    with pytest.raises(SystemExit) as stop:
        run_decode("--model", model_folder, "--prompt", "a", *setting)
    assert stop.value.code == 2 and setting[0] in capsys.readouterr().err
