"""Datasets measured by reward functions, one token per step beside parallel decoding, prompt styles side by side."""

from __future__ import annotations

import json
from math import sqrt

import pytest

from rl4dlm import DecodingConfig, evaluate, load_task, tiny_diffusion_gemma, tiny_llada, tiny_sdar, tiny_tokenizer
from rl4dlm.cli import eval as command, main
from rl4dlm.evaluation import DatasetTask, Rewards, read_results
from rl4dlm.models.loading import save_denoiser
from rl4dlm.models.spec import DiffusionSpec

ONE = DecodingConfig(canvas_length=1, steps=1, temperature=1.0)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def worth(prompts, completions, value, **columns):
    """The row's value for the letter a, less a tenth per forward; no judgement without a value."""
    return [
        None if v is None else (v if completion == "a" else 0.0) - nfe / 10
        for completion, v, nfe in zip(completions, value, columns["nfe"], strict=True)
    ]


def test_means_and_standard_errors_over_prompts(constant_model, tokenizer, tmp_path):
    values = [1.0, 0.5, None, 0.0]
    task = DatasetTask(
        str(write(tmp_path / "d.jsonl", [{"prompt": f"p{i}", "value": v} for i, v in enumerate(values)]))
    )
    rewards = Rewards({"worth": worth, "flat": lambda completions, **_: [1.0] * len(completions)}, threshold=1.2)
    result = evaluate(constant_model({"a": 1.0}), tokenizer, task, decodings={1: ONE}, num_samples=2, rewards=rewards)
    measured = result.measurements["1"]
    means = [0.9, 0.4, -0.1]  # of the prompts that it could judge
    spread = sqrt(sum((m - 0.4) ** 2 for m in means) / 2)
    assert measured.metrics["reward/worth"] == pytest.approx(0.4)
    assert measured.metrics["reward/worth/standard_error"] == pytest.approx(spread / sqrt(3))
    assert measured.metrics["reward/flat/standard_error"] == 0
    assert measured.metrics["reward"] == pytest.approx((1.9 + 1.4 + 1.0 + 0.9) / 4)
    assert measured.verdicts == "11110000" and measured.solve_rate == 0.5
    assert result.task == "d.jsonl"


def test_chats_reach_reward_functions_as_messages(constant_model, tokenizer, tmp_path):
    seen = []

    def function(prompts, completions, **columns):
        seen.append((prompts, completions, sorted(columns)))
        return [1.0] * len(completions)

    rows = [{"prompt": [{"role": "user", "content": "q"}], "answer": "a"}]
    task = DatasetTask(str(write(tmp_path / "d.jsonl", rows)))
    evaluate(
        constant_model({"a": 1.0}),
        tokenizer,
        task,
        decodings={1: ONE},
        rewards=Rewards({"f": function}, threshold=1.0),
    )
    ((prompts, completions, columns),) = seen
    assert prompts == [rows[0]["prompt"]] and completions == [[{"role": "assistant", "content": "a"}]]
    assert {"answer", "nfe", "completion_ids", "stop_reason"} <= set(columns)
    with pytest.raises(ValueError, match="'short' returned 0 rewards for 1 completions"):
        evaluate(
            constant_model({"a": 1.0}),
            tokenizer,
            task,
            decodings={1: ONE},
            rewards=Rewards({"short": lambda **_: []}, threshold=1.0),
        )
    for settings, said in (
        ({"functions": {}}, "functions is empty"),
        ({"functions": {"f": function}, "weights": [1, 2]}, "there are 1 reward functions"),
        ({"functions": {"f": function}, "threshold": float("nan")}, "threshold=nan"),
    ):
        with pytest.raises(ValueError, match=said):
            Rewards(**settings)


def test_a_tasks_checker_decides_where_there_is_no_threshold(constant_model, tokenizer, letters):
    rewards = Rewards({"flat": lambda completions, **_: [0.25] * len(completions)})
    (measured,) = evaluate(
        constant_model({"a": 1.0}), tokenizer, letters(["x", "y"], ["a", "b"]), decodings={1: ONE}, rewards=rewards
    ).measurements.values()
    assert measured.solve_rate == 0.5 and measured.metrics == {
        "reward": 0.25,
        "reward/flat": 0.25,
        "reward/standard_error": 0.0,
        "reward/flat/standard_error": 0.0,
    }


# --- one token per step -----------------------------------------------------------------------------------------------


def test_the_baseline_is_measured_once_and_compared_with(constant_model, tokenizer, letters):
    decodings = {
        "fast": DecodingConfig(canvas_length=8, steps=2),
        "slow": DecodingConfig(canvas_length=8, steps=8),
        "threshold": DecodingConfig(canvas_length=8, schedule="threshold"),
        "warm": DecodingConfig(canvas_length=8, steps=4, temperature=1.0),
    }
    task = letters(["x", "y"], ["aaaaaaaa", "b"])
    found = evaluate(constant_model({"a": 1.0}), tokenizer, task, decodings=decodings, baseline=True)
    baselines = {label: measured.baseline for label, measured in found.measurements.items()}
    assert baselines == {
        "fast": "slow",
        "slow": None,
        "threshold": "slow",
        "warm": "1 token/step",
        "1 token/step": None,
    }
    assert found.measurements["1 token/step"].nfe == 8 and found.measurements["slow"].nfe == 8
    assert found.measurements["1 token/step"].decoding["temperature"] == 1.0
    assert [point[0] for point in found.speed.points] == sorted(8 / m.nfe for m in found.measurements.values())
    assert found.speed.area == pytest.approx(0.5)


@pytest.mark.parametrize(("make", "length"), [(tiny_llada, 8), (tiny_sdar, 8), (tiny_sdar, 10)])
def test_one_token_per_step_writes_one_token_per_step(make, length):
    from rl4dlm import RolloutEngine

    model = make()
    spec = DiffusionSpec.of(model)
    config = DecodingConfig(canvas_length=length, stop_at_eos=False).one_token_per_step(spec)
    prompts = [tiny_tokenizer().encode("ab" * (spec.block_length or 1))]  # ends with a block
    trace = RolloutEngine(model).generate(prompts, config).trace
    assert sorted(trace.commit_step[0].tolist()) == list(range(length))
    with pytest.raises(ValueError, match="one token per step has no meaning for noise='uniform'"):
        config.one_token_per_step(DiffusionSpec.of(tiny_diffusion_gemma()))


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_denoiser(tiny_llada(max_position_embeddings=2048), folder, tiny_tokenizer())
    return folder


def test_the_command_measures_a_dataset(model_folder, tmp_path, capsys):
    data = write(tmp_path / "own.jsonl", [{"prompt": f"p{i}", "length": i} for i in range(4)])
    (tmp_path / "own.py").write_text(
        "def short(completions, length, **columns):\n"
        "    return [float(len(text) >= n) for text, n in zip(completions, length)]\n"
    )
    flags = ["eval", "--model", str(model_folder), "--canvas-length", "8", "--steps", "2,4", "--device", "cpu"]
    own = [*flags, "--dataset", str(data), "--reward_funcs", f"{tmp_path / 'own.py'}:short"]
    output = tmp_path / "results.json"
    assert main([*own, "--baseline", "--output", str(output)]) == 0
    shown = capsys.readouterr().out
    assert "baseline" in shown and "area" in shown
    (result,) = read_results(output)
    assert list(result.measurements) == ["2", "4", "1 token/step"] and result.task == "own.jsonl"
    assert result.measurements["2"].baseline == "1 token/step"
    assert result.measurements["2"].metrics["reward"] == result.measurements["2"].solve_rate
    for arguments, said in (
        (flags, "either --task or --dataset"),
        ([*flags, "--dataset", str(data)], "has no checker; name --reward-funcs"),
        ([*flags, "--dataset", str(tmp_path / "no.jsonl"), "--reward-funcs", "gsm8k"], "there is no such file"),
        ([*own, "--task-args", "{}"], "task-args belongs to --task"),
        ([*own, "--prompt-styles", "d1"], "prompt-styles belongs to --task"),
        ([*flags, "--task", "countdown", "--reward-threshold", "1"], "has no meaning without --reward-funcs"),
        ([*flags, "--task", "countdown_small", "--prompt-styles", "d1,spg"], "has one style of prompt"),
    ):
        assert main(arguments) == 2
        assert said in capsys.readouterr().err


def test_the_command_sets_prompt_styles_beside_each_other(model_folder, tmp_path, capsys):
    output = tmp_path / "results.json"
    flags = ["eval", "--model", str(model_folder), "--task", "countdown", "--task-args", '{"size": 2}']
    flags += ["--prompt-styles", "d1,espo", "--canvas-length", "8", "--device", "cpu"]
    assert main([*flags, "--output", str(output)]) == 0
    assert "by prompt style" in capsys.readouterr().out
    d1, espo = read_results(output)
    assert (d1.style, espo.style) == ("d1", "espo")
    columns = [[item.partition(":")[0] for item in result.items.split()] for result in (d1, espo)]
    assert columns[0] == columns[1] and d1.items != espo.items  # the same numbers and targets, other prompts


def test_sudokus_protocols_are_labelled():
    labels = {style: load_task("sudoku", style=style).protocol for style in ("d1", "spg", "espo")}
    assert [label.partition(",")[0] for label in labels.values()] == ["0-shot", "3-shot", "1-shot"]
    assert all("leak-free" in label for label in labels.values())
    assert load_task("countdown").protocol == ""


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["gsm8k", "some/folder/mine.py:score"], ["gsm8k", "mine.py:score"]),
        (["a/mine.py:score", "b/mine.py:score"], ["a/mine.py:score", "b/mine.py:score"]),
    ],
)
def test_columns_are_named_without_folders_where_names_stay_distinct(names, shown):
    assert command._short(names) == shown
