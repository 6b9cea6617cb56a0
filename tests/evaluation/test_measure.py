"""`evaluate` counts what happened: known distributions give known rates, and nothing but the settings matters."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch

from rl4dlm import DecodingConfig, evaluate, load_task
from rl4dlm.evaluation import encode_prompt, write_results
from rl4dlm.tasks import Task

ONE_SLOT = DecodingConfig(canvas_length=1, steps=1, temperature=1.0)


def numbers(result):
    """Everything measured, but the time it took."""
    return {label: replace(m, seconds=0.0) for label, m in result.measurements.items()}


def test_a_certain_model_is_counted_exactly(constant_model, tokenizer, letters):
    model = constant_model({"a": 1.0})
    task = letters(["x", "yy", "z", "x"], ["aaaa", "b", None, "aaaa"])
    result = evaluate(
        model, tokenizer, task, decodings={2: DecodingConfig(canvas_length=4, steps=2)}, chosen_by="last", seed=5
    )
    (measured,) = result.measurements.values()
    assert result.solve_rates == {"2": 2 / 3}  # one answer is another, and one row is left out: it cannot be judged
    assert (measured.prompts, measured.samples, measured.unjudged) == (4, 1, 1)
    assert (measured.nfe, measured.completion_length, measured.tokens_per_forward) == (2, 4, 2)
    assert measured.ended == 0
    assert measured.metrics == {}
    assert (result.task, result.split, result.chosen_by, result.seed) == ("letters", "test", "last", 5)


def test_completions_are_cut_at_the_first_end(constant_model, tokenizer, letters):
    model = constant_model({"<eos>": 1.0})
    task = letters(["x"], [""])
    (measured,) = evaluate(
        model, tokenizer, task, decodings={"all": DecodingConfig(canvas_length=8, steps=8)}
    ).measurements.values()
    assert measured.solve_rate == 1 and measured.ended == 1
    assert measured.completion_length == 1  # the end itself


def test_special_tokens_do_not_reach_the_checker(constant_model, tokenizer, letters):
    model = constant_model({"<|user|>": 1.0})
    task = letters(["x"], [""])
    assert evaluate(model, tokenizer, task, decodings={1: ONE_SLOT}).solve_rates == {"1": 1.0}


def test_the_rate_is_the_models_probability(constant_model, tokenizer, letters):
    model = constant_model({"a": 0.3, "b": 0.5, "<eos>": 0.2})
    n, samples = 50, 40
    task = letters(["x"] * n, ["a"] * n)
    (measured,) = evaluate(model, tokenizer, task, decodings={1: ONE_SLOT}, num_samples=samples).measurements.values()
    assert (measured.prompts, measured.samples) == (n, samples)
    # Within five standard errors of the probability it has.
    assert measured.solve_rate == pytest.approx(0.3, abs=5 * (0.3 * 0.7 / (n * samples)) ** 0.5)
    assert measured.ended == pytest.approx(0.2, abs=5 * (0.2 * 0.8 / (n * samples)) ** 0.5)
    # The interval counts prompts, not samples.
    low, high = measured.interval
    assert low < measured.solve_rate < high
    assert high - low == pytest.approx(2 * 1.96 * (0.3 * 0.7 / n) ** 0.5, rel=0.1)


def test_the_batch_size_changes_nothing_and_the_seed_does(constant_model, tokenizer, letters):
    model = constant_model({"a": 0.5, "b": 0.5})
    task = letters(["x", "longer", "yy"] * 7, ["a"] * 21)
    decodings = {1: ONE_SLOT, 4: DecodingConfig(canvas_length=4, steps=4, temperature=1.0)}
    results = {
        (seed, rows): numbers(evaluate(model, tokenizer, task, decodings=decodings, seed=seed, batch_rows=rows))
        for seed, rows in [(0, None), (0, 1), (0, 4), (1, None)]
    }
    assert results[0, None] == results[0, 1] == results[0, 4]
    assert results[0, None] != results[1, None]


def test_a_limit_keeps_the_first_prompts(constant_model, tokenizer, letters):
    model = constant_model({"a": 0.5, "b": 0.5})
    prompts = ["x", "yy", "z", "x", "yy"]
    cut = evaluate(model, tokenizer, letters(prompts[:3], ["a"] * 3), decodings={1: ONE_SLOT})
    limited = evaluate(model, tokenizer, letters(prompts, ["a"] * 5), decodings={1: ONE_SLOT}, limit=3)
    beyond = evaluate(model, tokenizer, letters(prompts, ["a"] * 5), decodings={1: ONE_SLOT}, limit=50)
    assert numbers(cut) == numbers(limited)
    assert beyond.measurements["1"].prompts == 5


def test_the_tasks_own_metrics_are_kept(constant_model, tokenizer):
    # A model that only writes 1: every puzzle has four cells of each digit, and none is solved.
    task = load_task("sudoku", size=30)
    decodings = {16: DecodingConfig(canvas_length=16, steps=16)}
    (measured,) = evaluate(constant_model({"1": 1.0}), tokenizer, task, decodings=decodings).measurements.values()
    cells = [
        (digit == "1", clue == "0")
        for row in task.dataset("test")
        for digit, clue in zip(row["solution"], row["puzzle"], strict=True)
    ]
    expected = sum(one and empty for one, empty in cells) / sum(empty for _, empty in cells)
    assert measured.metrics["cell_accuracy"] == pytest.approx(expected)
    assert measured.solve_rate == 0


def test_a_task_that_can_judge_nothing_is_refused(constant_model, tokenizer, letters):
    with pytest.raises(ValueError, match="'letters' cannot judge any of its 2 prompts"):
        evaluate(constant_model({"a": 1.0}), tokenizer, letters(["x", "y"], [None, None]), decodings={1: ONE_SLOT})


def test_messages_go_through_the_chat_template(tokenizer):
    question = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    assert tokenizer.decode(encode_prompt(tokenizer, question)) == "<|system|>s<eos><|user|>q<eos><|assistant|>"
    begun = [*question, {"role": "assistant", "content": "so"}]
    assert tokenizer.decode(encode_prompt(tokenizer, begun)) == "<|system|>s<eos><|user|>q<eos><|assistant|>so"
    assert tokenizer.decode(encode_prompt(tokenizer, "plain")) == "plain"


def test_the_model_is_left_as_it_was(constant_model, tokenizer, letters, global_rng_untouched):
    model = constant_model({"a": 1.0}).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate(model, tokenizer, letters(["x"], ["a"]), decodings={1: ONE_SLOT})
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_results_are_written_whole(constant_model, tokenizer, letters, tmp_path, monkeypatch):
    model = constant_model({"a": 1.0})
    model.name_or_path = "models/constant"
    result = evaluate(model, tokenizer, letters(["x"], ["a"]), decodings={1: ONE_SLOT}, chosen_by="best on validation")
    target = tmp_path / "new" / "folder" / "results.json"
    write_results(target, [result])
    (read,) = json.loads(target.read_text())["results"]
    assert read["model"] == "models/constant" and read["chosen_by"] == "best on validation"
    assert read["measurements"]["1"]["solve_rate"] == 1.0
    assert read["measurements"]["1"]["decoding"]["temperature"] == 1.0
    assert read["versions"].keys() >= {"torch", "transformers", "trl", "rl4dlm", "python"}
    assert read["machine"].keys() >= {"cpu", "cores", "gpus"}
    assert [path.name for path in target.parent.iterdir()] == ["results.json"]

    # A failure leaves the earlier file and no other.
    before = target.read_text()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_results(target, [result, result])
    assert target.read_text() == before
    assert [path.name for path in target.parent.iterdir()] == ["results.json"]


def test_the_machine_is_described_and_not_named(constant_model, tokenizer, letters):
    import platform

    result = evaluate(constant_model({"a": 1.0}), tokenizer, letters(["x"], ["a"]), decodings={1: ONE_SLOT})
    assert result.machine["cpu"] and result.machine["cores"] >= 1
    words = re.split(r'[\s",:\[\]{}]+', json.dumps(result.machine))
    assert platform.node() not in words


class NoPrompt(Task):
    name = "no prompt"

    def _rows(self, split):
        return [{"question": "x"}]

    def check(self, completion, row):
        return True


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"decodings": {}}, "decodings is empty"),
        ({"limit": 0}, "limit=0"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"batch_rows": 0}, "max_batch_rows=0"),
        ({"split": "training"}, "no split 'training'"),
        ({"task": NoPrompt()}, "no column 'prompt'.*question"),
        ({"prompts": []}, "no prompts"),
        ({"prompts": [[{"role": "user", "content": "q"}]], "chat_template": None}, "no chat_template"),
        ({"mask_token": None}, "no mask token"),
    ],
)
def test_bad_input_is_named_before_any_forward(constant_model, tokenizer, letters, monkeypatch, settings, named):
    model = constant_model({"a": 1.0})
    monkeypatch.setattr(model, "forward", lambda *_, **__: pytest.fail("a forward was computed"))
    for name in ("chat_template", "mask_token"):
        if name in settings:
            setattr(tokenizer, name, settings.pop(name))
    prompts = settings.pop("prompts", ["x"])
    task = settings.pop("task", letters(prompts, ["a"] * len(prompts)))
    with pytest.raises(ValueError, match=named):
        evaluate(model, tokenizer, task, **{"decodings": {1: ONE_SLOT}, **settings})
