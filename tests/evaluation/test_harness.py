"""lm-eval's tasks give the engine's own numbers, and its requests do not depend on each other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from peft import LoraConfig, get_peft_model

from rl4dlm import DecodingConfig, RolloutEngine, encode_prompt, log_likelihood, tiny_llada, tiny_sdar, tiny_tokenizer
from rl4dlm.cli import main
from rl4dlm.evaluation.likelihood import request_key
from rl4dlm.models.loading import save_denoiser
from rl4dlm.rollout.stopping import text_ends

lm_eval = pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from rl4dlm.evaluation.harness import DiffusionLM  # noqa: E402

DECODING = DecodingConfig(canvas_length=12, steps=12)
QUESTIONS = ["what is it", "ab", "a longer question than the others", "x"]
CHOICES = [["yes", "no"], ["left", "right", "up"], ["a", "b"], ["12", "345"]]


@pytest.fixture(scope="module")
def model():
    return tiny_llada(initializer_range=0.3).double()


@pytest.fixture
def denoiser(model) -> DiffusionLM:
    return DiffusionLM(model, tiny_tokenizer(), DECODING, num_views=8, batch_rows=3, seed=5)


@pytest.fixture
def local_tasks(tmp_path: Path, model, monkeypatch) -> Path:
    """A generation task, whose answers are the engine's for every other question, and a multiple-choice task."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    texts = [text.partition("e")[0] for text in completions(model, QUESTIONS)]
    rows = {
        "generation": [
            {"question": question, "answer": text if i % 2 else "something else"}
            for i, (question, text) in enumerate(zip(QUESTIONS, texts, strict=True))
        ],
        "choice": [{"question": q, "choices": c, "right": 0} for q, c in zip(QUESTIONS, CHOICES, strict=True)],
    }
    settings = {
        "generation": {
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["e"], "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
        "choice": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}:",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{right}}",
            "metric_list": [{"metric": "acc"}],
        },
    }
    for name in rows:
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        task = {"task": f"local_{name}", "dataset_path": "json", "test_split": "test", **settings[name]}
        task["dataset_kwargs"] = {"data_files": {"test": str(file)}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return tmp_path


def completions(model, prompts, **settings):
    tokenizer = tiny_tokenizer()
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    rollout = RolloutEngine(model).generate(ids, DECODING, **settings)
    return [tokenizer.decode(row, skip_special_tokens=True) for row in rollout.completion_ids]


def test_a_task_gives_the_engines_own_numbers(denoiser, local_tasks, model):
    manager = TaskManager(include_path=str(local_tasks), include_defaults=False)
    results = lm_eval.simple_evaluate(
        model=denoiser,
        tasks=["local_generation", "local_choice"],
        task_manager=manager,
        bootstrap_iters=0,
        random_seed=None,
        numpy_random_seed=None,
        torch_random_seed=None,
    )
    texts = [text.partition("e")[0] for text in completions(model, QUESTIONS)]
    assert [sample["resps"][0][0] for sample in results["samples"]["local_generation"]] == texts
    assert results["results"]["local_generation"]["exact_match,none"] == 0.5

    tokenizer, right = tiny_tokenizer(), []
    for question, choices, sample in zip(QUESTIONS, CHOICES, results["samples"]["local_choice"], strict=True):
        values = log_likelihood(
            model, [f"{question}:"] * len(choices), [f" {c}" for c in choices], tokenizer=tokenizer, num_views=8, seed=5
        ).values
        assert [response[0][0] for response in sample["resps"]] == pytest.approx(values, abs=1e-9)
        right.append(max(range(len(choices)), key=values.__getitem__) == 0)
    assert results["results"]["local_choice"]["acc,none"] == sum(right) / len(right)

    info = results["config"]["rl4dlm"]
    assert info["likelihood"]["estimator"] == "elbo" and info["likelihood"]["kind"] == "lower bound"
    assert info["likelihood"]["settings"]["num_views"] == 8 and info["decoding"]["canvas_length"] == 12
    assert info["seed"] == 5 and info["truncated_contexts"] == 0


def requests(kind, arguments):
    return [Instance(kind, {}, pair, i, ("t", i, 1)) for i, pair in enumerate(arguments)]


def test_other_requests_and_their_order_change_nothing(denoiser, model, global_rng_untouched):
    sampled = {"until": ["\n"], "do_sample": True, "temperature": 1.0}
    asked = [*((q, sampled) for q in QUESTIONS), (QUESTIONS[0], sampled), ("x", {"until": ["a"], "max_gen_toks": 3})]
    whole = denoiser.generate_until(requests("generate_until", asked))
    assert whole[0] != whole[4]  # the same question twice is drawn twice
    back = denoiser.generate_until(requests("generate_until", [asked[i] for i in (5, 2, 1, 0)]))
    assert back == [whole[i] for i in (5, 2, 1, 0)]
    assert denoiser.generate_until(requests("generate_until", asked[3:4])) == whole[3:4]
    assert len(whole[5]) <= 3 and "a" not in whole[5]
    # Of a single request it is what the engine draws with its key.
    ids = tiny_tokenizer().encode(QUESTIONS[1])
    config = DecodingConfig(canvas_length=12, steps=12, temperature=1.0)
    rollout = RolloutEngine(model).generate([ids], config, row_ids=[request_key("t", ids, 0)], seed=5)
    text = tiny_tokenizer().decode(rollout.completion_ids[0], skip_special_tokens=True)
    assert text.partition("\n")[0] == whole[1]

    pairs = [(q, f" {c}") for q, choices in zip(QUESTIONS, CHOICES, strict=True) for c in choices]
    values = denoiser.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    chosen = [7, 0, 3]
    again = denoiser.loglikelihood(requests("loglikelihood", [pairs[i] for i in chosen]), disable_tqdm=True)
    assert [value for value, _ in again] == pytest.approx([values[i][0] for i in chosen], abs=1e-9)
    assert [greedy for _, greedy in again] == [values[i][1] for i in chosen]


def test_special_tokens_end_rows_where_they_are_named_and_their_letters_do_not(denoiser):
    tokenizer = tiny_tokenizer()
    user = tokenizer.convert_tokens_to_ids("<|user|>")
    stop, strings = text_ends(denoiser.tokenizer, ["s", "<|user|>"], 5)
    ids = tokenizer.encode
    assert stop([*ids("ab"), user, *ids("c")]) == 3  # named as a whole
    assert stop([*ids("ab"), tokenizer.convert_tokens_to_ids("<|system|>")]) is None  # spelled with an s
    assert stop(ids("abs")) == 3 and stop(ids("abcdefg")) == 5 and strings.cut("abs") == "ab"


@pytest.mark.parametrize("make", [tiny_llada, tiny_sdar])
def test_greedy_answers_are_the_engines(make):
    denoiser = DiffusionLM(make().double(), tiny_tokenizer(), DecodingConfig(canvas_length=8), num_views=2)
    config = DecodingConfig(canvas_length=3, stop_at_eos=False).one_token_per_step(denoiser.spec)
    ids = tiny_tokenizer().encode("ab")
    (written,) = RolloutEngine(denoiser.model).generate([ids], config).canvas.tolist()
    other = [written[0], written[1], 9 if written[2] != 9 else 10]
    found = denoiser._loglikelihood_tokens([(None, ids, written), (None, ids, other)])
    assert [greedy for _, greedy in found] == [True, False]


def test_an_adapter_answers_as_the_model_that_it_makes():
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = get_peft_model(tiny_llada(initializer_range=0.3).double(), lora)
    asked = requests("generate_until", [("ab", {"until": ["c"]}), ("x", {"until": ["c"]})])
    pairs = requests("loglikelihood", [("ab", " c"), ("x", " yes")])

    def answers(model):
        denoiser = DiffusionLM(model, tiny_tokenizer(), DECODING, num_views=4)
        return denoiser.generate_until(asked), denoiser.loglikelihood(pairs, disable_tqdm=True)

    texts, values = answers(adapted)
    merged_texts, merged = answers(adapted.merge_and_unload())
    assert texts == merged_texts
    assert [value for value, _ in values] == pytest.approx([value for value, _ in merged], abs=1e-9)


def test_texts_without_context_and_chats(denoiser, model):
    end = tiny_tokenizer().eos_token_id
    ((empty, _),) = denoiser.loglikelihood(requests("loglikelihood", [("", "abc")]), disable_tqdm=True)
    ids = tiny_tokenizer().encode("abc")
    assert denoiser.prefix_token_id == end
    assert empty == pytest.approx(log_likelihood(model, [[end]], [ids], num_views=8, seed=5).values[0], abs=1e-9)
    (rolling,) = denoiser.loglikelihood_rolling(requests("loglikelihood_rolling", [("abc",)]))
    assert rolling == pytest.approx(empty, abs=1e-9)
    chat = [{"role": "user", "content": "q"}]
    assert denoiser.tok_encode(denoiser.apply_chat_template(chat)) == encode_prompt(tiny_tokenizer(), chat)
    begun = [*chat, {"role": "assistant", "content": "so"}]
    text = denoiser.apply_chat_template(begun, add_generation_prompt=False)
    assert denoiser.tok_encode(text) == encode_prompt(tiny_tokenizer(), begun)


def test_long_contexts_lose_their_beginning_and_are_counted(denoiser, model):
    limit = model.config.max_position_embeddings
    long = "".join("ab"[i % 2] for i in range(limit))
    (text,) = denoiser.generate_until(requests("generate_until", [(long, {"until": []})]))
    assert denoiser.truncated == 1 and denoiser.get_model_info()["rl4dlm"]["truncated_contexts"] == 1
    assert text == completions(model, [long[-(limit - 12) :]])[0]


def test_settings_that_mean_nothing_here_are_refused(denoiser):
    with pytest.raises(ValueError, match="repetition_penalty=1.2, which is not supported"):
        denoiser.generate_until(requests("generate_until", [("a", {"until": [], "repetition_penalty": 1.2})]))
    with pytest.raises(ValueError, match="estimator='best' is not known"):
        DiffusionLM(denoiser.model, tiny_tokenizer(), DECODING, estimator="best")


def test_the_command(local_tasks, tmp_path, model, capsys):
    save_denoiser(model, tmp_path / "model", tiny_tokenizer())
    output = tmp_path / "results.json"
    flags = ["lm-eval", "--model", str(tmp_path / "model"), "--tasks", "local_generation", "--device", "cpu"]
    flags += ["--include-path", str(local_tasks), "--canvas-length", "12", "--steps", "12"]
    assert main([*flags, "--output", str(output), "--log-samples"]) == 0
    assert "local_generation" in capsys.readouterr().out
    written = json.loads(output.read_text())
    assert written["results"]["local_generation"]["exact_match,none"] == 0.5
    assert written["config"]["rl4dlm"]["decoding"]["steps"] == 12
    assert len(written["samples"]["local_generation"]) == 4
    for more, said in (
        (["--num-samples", "2"], "num-samples=2 has no meaning here"),
        (["--estimator", "best"], "estimator='best' is not known"),
        (["--include-path", str(tmp_path / "absent")], "is no folder"),
        (["--tasks", "no_such_task_at_all"], "lm-eval has no task 'no_such_task_at_all'"),
    ):
        assert main([*flags, *more]) == 2
        assert said in capsys.readouterr().err
