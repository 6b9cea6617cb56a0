"""The base trainer: rollouts in TRL's loop, evaluation, references, adapters, hooks, metrics and the random state."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor

from rl4dlm.algorithms.diffu_grpo import DiffuGRPOTrainer
from rl4dlm.likelihood.mean_field import MeanField
from rl4dlm.likelihood.views import Rows
from rl4dlm.models.loading import load_denoiser, save_denoiser
from rl4dlm.models.tiny import tiny_llada, tiny_tokenizer
from tests.training.steps import tiny_llada_that_ends

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def weights(trainer: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


# --- rollouts ---------------------------------------------------------------------------------------------------------


def test_rewards_see_the_text_up_to_the_end_of_sequence_and_every_column(
    make_trainer: Any, prompt_dataset: Any
) -> None:
    calls: list[dict[str, Any]] = []

    def spy(prompts: Any, completions: Any, completion_ids: Any, answer: Any, **columns: Any) -> list[float]:
        calls.append({"prompts": prompts, "completions": completions, "ids": completion_ids, "answer": answer})
        return [0.0] * len(completions)

    data = prompt_dataset()
    data = data.add_column("answer", [f"answer to {p}" for p in data["prompt"]])
    trainer = make_trainer(rewards=spy, dataset=data, max_steps=1)
    trainer.train()
    eos, mask = trainer.spec.eos_token_ids, trainer.spec.mask_token_id
    assert len(calls) == 1
    for i, ids in enumerate(calls[0]["ids"]):
        assert mask not in ids and 1 <= len(ids) <= 8
        assert not set(ids[:-1]) & set(eos), "nothing follows the end of the sequence"
        assert len(ids) == 8 or ids[-1] in eos
        assert calls[0]["completions"][i] == tiny_tokenizer().decode(ids, skip_special_tokens=True)
        assert calls[0]["answer"][i] == f"answer to {calls[0]['prompts'][i]}"


def test_completions_depend_on_the_seed_and_differ_within_a_group_and_between_cycles(make_trainer: Any) -> None:
    def canvases(**changes: Any) -> list[Tensor]:
        trainer = make_trainer(learning_rate=0.0, num_iterations=1, max_steps=2, beta=0.0, **changes)
        trainer.train()
        return [seen["canvas_ids"][seen["row_ids"].argsort()] for seen in trainer.seen]

    first, again, other = canvases(seed=1), canvases(seed=1), canvases(seed=2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert len({tuple(row) for row in first[0][:4].tolist()}) > 1
    assert not torch.equal(first[0], first[1])


def test_row_ids_never_repeat(make_trainer: Any, prompt_dataset: Any) -> None:
    trainer = make_trainer(num_iterations=1, max_steps=4, beta=0.0, eval_dataset=prompt_dataset(8), do_eval=True,
                           per_device_eval_batch_size=8, eval_strategy="steps", eval_steps=4)  # fmt: skip
    trainer.train()
    ids = [i for seen in trainer.seen for i in seen["row_ids"].tolist()]
    assert len(ids) == len(set(ids)) == 4 * 8 + 8 * 4


def test_rollout_and_loss_leave_the_global_random_state_alone(ready: Any, global_rng_untouched: None) -> None:
    trainer, batch = ready
    trainer.model.train()
    trainer.rollout(["abc", "de"])
    trainer._compute_loss(trainer.model, batch).backward()


@pytest.fixture
def ready(make_trainer: Any) -> tuple[Any, dict[str, Any]]:
    trainer = make_trainer(max_steps=1, num_iterations=2)
    trainer.train()
    batch = trainer._buffered_inputs[0]
    trainer.current_gradient_accumulation_steps = 1
    return trainer, batch


def test_decoding_in_parts_gives_the_same_rows(make_trainer: Any) -> None:
    prompts = ["abc", "d", "efgh"]
    whole = make_trainer().rollout(prompts)
    parts = make_trainer(rollout_batch_size=2).rollout(prompts)
    assert torch.equal(whole.canvas, parts.canvas)


def test_chat_prompts_are_rendered_with_the_generation_prompt(make_trainer: Any, prompt_dataset: Any) -> None:
    chat = Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in prompt_dataset()["prompt"]]})
    seen: list[Any] = []

    def spy(completions: Any, **columns: Any) -> list[float]:
        seen.extend(completions)
        return [0.0] * len(completions)

    trainer = make_trainer(rewards=spy, dataset=chat, max_steps=1)
    trainer.train()
    record = trainer.seen[0]
    row = record["prompt_ids"][0][record["prompt_mask"][0].bool()]
    assert trainer.processing_class.decode(row).startswith("<|user|>")
    assert trainer.processing_class.decode(row).endswith("<eos><|assistant|>")
    assert all(list(message[0]) == ["role", "content"] for message in seen)


# --- scores -----------------------------------------------------------------------------------------------------------


def test_padding_and_batch_mates_do_not_change_a_rows_scores(ready: Any) -> None:
    trainer, batch = ready
    names = ("prompt_ids", "prompt_mask", "completion_ids", "canvas_ids", "canvas_valid", "row_ids")
    whole = scores(trainer, batch)
    for row in range(8):
        padding = int((batch["prompt_mask"][row] == 0).sum())
        alone = {name: batch[name][row : row + 1] for name in names}
        alone["prompt_ids"], alone["prompt_mask"] = (alone[n][:, padding:] for n in ("prompt_ids", "prompt_mask"))
        torch.testing.assert_close(scores(trainer, alone), whole[row : row + 1], rtol=0, atol=1e-5)
        moved = dict(alone, prompt_ids=torch.nn.functional.pad(alone["prompt_ids"], (5, 0), value=9))
        moved["prompt_mask"] = torch.nn.functional.pad(alone["prompt_mask"], (5, 0))
        torch.testing.assert_close(scores(trainer, moved), whole[row : row + 1], rtol=0, atol=1e-5)


def scores(trainer: Any, batch: dict[str, Any]) -> Tensor:
    names = ("prompt_ids", "prompt_mask", "canvas_ids", "canvas_valid", "row_ids")
    with torch.no_grad():
        rows = Rows(*(batch[name] for name in names))
        return trainer._score(trainer.model, rows, 0, batch["completion_ids"].shape[1]).log_probs


def test_a_scope_that_the_estimator_does_not_have_is_refused(make_trainer: Any) -> None:
    class ValidTrainer(DiffuGRPOTrainer):
        def build_estimator(self) -> MeanField:
            return MeanField(self.args.p_mask_prompt)

    with pytest.raises(ValueError, match="scope='canvas' is not supported: ValidTrainer builds an estimator of 'val"):
        make_trainer(trainer=ValidTrainer, scope="canvas", stop_at_eos=False)


def test_tokens_after_the_end_count_only_in_canvas_scope(make_trainer: Any) -> None:
    for scope, counts in (("valid", False), ("canvas", True)):
        trainer = make_trainer(tiny_llada_that_ends(), scope=scope, stop_at_eos=False, max_steps=1, beta=0.04)
        trainer.train()
        batch = trainer._buffered_inputs[0]
        assert not batch["canvas_valid"].all(), "some row ends early"
        assert batch["completion_mask"].sum() == (8 * 8 if counts else batch["canvas_valid"].sum())
        assert batch["num_items_in_batch"] == batch["completion_mask"].sum()
        changed = dict(batch)
        changed["canvas_ids"] = batch["canvas_ids"].where(batch["canvas_valid"], 30)
        if counts:
            changed["completion_ids"] = changed["canvas_ids"]
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        before, after = (trainer._compute_loss(trainer.model, b).item() for b in (batch, changed))
        assert (before != after) is counts


def test_the_gap_is_zero_when_scoring_repeats_what_drawing_saw(make_trainer: Any) -> None:
    # One denoising step and no prompt masking: tokens are drawn from the very distribution they are scored under.
    trainer = make_trainer(denoising_steps=1, p_mask_prompt=0.0, max_steps=1, num_iterations=1, beta=0.0)
    trainer.train()
    assert trainer.state.log_history[0]["diffusion/rollout_gap"] == pytest.approx(0, abs=1e-6)
    trainer = make_trainer(denoising_steps=8, p_mask_prompt=0.0, max_steps=1, num_iterations=1, beta=0.0)
    trainer.train()
    assert trainer.state.log_history[0]["diffusion/rollout_gap"] > 1e-3


# --- groups that teach nothing ----------------------------------------------------------------------------------------


def test_equal_rewards_give_no_gradient_and_no_nan(make_trainer: Any) -> None:
    trainer = make_trainer(rewards=lambda completions, **_: [2.0] * len(completions), beta=0.0, max_steps=2)
    before = weights(trainer)
    trainer.train()
    for entry in trainer.state.log_history[:2]:
        assert entry["loss"] == 0 and entry["grad_norm"] == 0
        assert all(math.isfinite(v) for v in entry.values() if isinstance(v, float))
    assert all(torch.equal(before[name], p) for name, p in trainer.model.named_parameters())


def test_identical_completions_are_counted(make_trainer: Any) -> None:
    trainer = make_trainer(temperature=0.0, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["diffusion/identical_completion_groups"] == 1.0


def test_completions_that_cannot_be_scored_get_no_advantage(make_trainer: Any) -> None:
    def some(completions: list[str], **_: Any) -> list[float | None]:
        return [None if i % 4 == 0 else float(i % 4) for i in range(len(completions))]

    trainer = make_trainer(rewards=some, max_steps=1)
    trainer.train()
    by_row = dict(zip(trainer.seen[0]["row_ids"].tolist(), trainer.seen[0]["advantages"].tolist(), strict=True))
    assert [by_row[i] for i in range(4)] == pytest.approx([0, -1, 0, 1])


# --- what an algorithm may define -------------------------------------------------------------------------------------


def test_an_algorithm_may_define_advantages_and_loss(make_trainer: Any, tmp_path: Path) -> None:
    class Own(DiffuGRPOTrainer):
        def advantages(self, rewards: Tensor, batch: dict[str, Any]) -> Tensor:
            self.grouped = rewards
            return rewards.softmax(-1) - 0.25

        def loss(self, scores: Any, batch: dict[str, Any]) -> Tensor:
            self.given = batch["advantages"].clone()
            return -(batch["advantages"] * scores.log_probs.sum(-1)).sum()

    trainer = make_trainer(
        trainer=Own,
        rewards=lambda completions, **_: [float(i) for i in range(len(completions))],
        max_steps=1,
        log_completions=True,
    )
    trainer.train()
    assert trainer.grouped.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    expected = (trainer.grouped.softmax(-1) - 0.25).flatten()
    assert sorted(trainer.given.tolist()) == pytest.approx(sorted(expected.tolist()))
    table = pd.read_parquet(tmp_path / "run" / "completions" / "completions_00001.parquet")
    assert table["advantage"].tolist() == pytest.approx(expected.tolist())


# --- policy and reference ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_an_adapter_is_trained_against_the_model_without_it(make_trainer: Any, task_type: str | None) -> None:
    lora = LoraConfig(r=4, lora_dropout=0.3, target_modules=["q_proj", "v_proj"], task_type=task_type)
    trainer = make_trainer(peft_config=lora, max_steps=3, num_iterations=2, learning_rate=1.0)
    before = weights(trainer)
    trainer.train()
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert kl[0] == pytest.approx(0, abs=1e-7), "no dropout, and the new adapter starts at zero"
    assert kl[2] > 1e-6, "a new batch is still compared with the model without adapter, not with the policy"
    for name, p in trainer.model.named_parameters():
        assert torch.equal(before[name], p) is ("lora" not in name), name


def test_the_reference_of_an_instance_is_a_copy_that_training_does_not_touch(make_trainer: Any) -> None:
    model = tiny_llada(seed=5)
    trainer = make_trainer(model, max_steps=3)
    ids = torch.arange(7, 15)[None]
    start = tiny_llada(seed=5)(ids).logits
    torch.testing.assert_close(trainer.ref_model(ids).logits, start)
    trainer.train()
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert kl[0] == pytest.approx(0, abs=1e-7) and kl[2] > 1e-6, "a new batch is still compared with the copy"
    torch.testing.assert_close(trainer.ref_model(ids).logits, start)
    assert not torch.allclose(trainer.model(ids).logits, start)


def test_a_path_trains_like_the_instance_and_reloads(make_trainer: Any, losses: Any, tmp_path: Path) -> None:
    save_denoiser(tiny_llada(), tmp_path / "model", tiny_tokenizer())
    by_path = make_trainer(str(tmp_path / "model"), max_steps=2)
    by_path.train()
    by_instance = make_trainer(max_steps=2)
    by_instance.train()
    assert losses(by_path) == losses(by_instance)
    by_path.save_model(str(tmp_path / "trained"))
    ids = torch.arange(7, 15)[None]
    torch.testing.assert_close(
        load_denoiser(tmp_path / "trained")(ids).logits, by_path.model.eval()(ids).logits, rtol=0, atol=0
    )


def test_an_adapter_folder_is_trained_on_from_where_it_was(make_trainer: Any, tmp_path: Path) -> None:
    save_denoiser(tiny_llada(), tmp_path / "model", tiny_tokenizer())
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    first = make_trainer(str(tmp_path / "model"), peft_config=lora, max_steps=2)
    first.train()
    first.save_model(str(tmp_path / "adapter"))
    second = make_trainer(str(tmp_path / "adapter"), max_steps=1)
    second.train()
    assert second.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-7), "its reference is the adapter as it was"
    names = [name for name, p in second.model.named_parameters() if p.requires_grad]
    assert names and all("lora" in name for name in names)


def test_dropout_is_off_also_where_it_is_no_module(make_trainer: Any) -> None:
    model = tiny_llada()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    trainer = make_trainer(model, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-7)


def test_bfloat16_starts_at_ratio_one(make_trainer: Any) -> None:
    trainer = make_trainer(bf16=True, max_steps=2)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["clip_ratio/region_mean"] == 0 and entry["kl"] < 1e-6


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_evaluation_repeats_itself_and_leaves_training_alone(
    make_trainer: Any, losses: Callable[[Any], list[float]], prompt_dataset: Any
) -> None:
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 4}
    alone = make_trainer(**options)
    alone.train()
    trainer = make_trainer(
        eval_dataset=prompt_dataset(6),
        do_eval=True,
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=4,
        num_generations_eval=2,
        **options,
    )
    trainer.train()
    # Not bit-equal: evaluation's data loader moves the global state that TRL shuffles a generation batch with.
    assert losses(trainer) == pytest.approx(losses(alone), abs=1e-6)
    a, b = trainer.evaluate(), trainer.evaluate()
    for name in ("eval_loss", "eval_reward", "eval_diffusion/nfe", "eval_completions/mean_length", "eval_entropy"):
        assert a[name] == b[name], name
    assert "eval_diffusion/rollout_gap" in a


# --- logs -------------------------------------------------------------------------------------------------------------


def test_the_completions_table_has_columns_of_its_own(make_trainer: Any, tmp_path: Path) -> None:
    trainer = make_trainer(log_completions=True, max_steps=1)
    trainer.train()
    table = pd.read_parquet(tmp_path / "run" / "completions" / "completions_00001.parquet")
    assert list(table.columns) == ["step", "prompt", "completion", "reward", "nfe", "stop_reason", "advantage"]
    assert len(table) == 8
    assert table["nfe"].between(1, 4).all()
    assert set(table["stop_reason"]) <= {"complete", "eos"}


def test_metrics_of_decoding_follow_its_settings(make_trainer: Any) -> None:
    trainer = make_trainer(stop_at_eos=False, denoising_steps=2, max_steps=1)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["diffusion/nfe"] == 2 and entry["diffusion/tokens_per_forward"] == 4
    guided = make_trainer(stop_at_eos=False, denoising_steps=2, max_steps=1, cfg_scale=0.5)
    guided.train()
    assert guided.state.log_history[0]["diffusion/nfe"] == 4
    assert guided.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_advantages_below_zero_may_count_less(make_trainer: Any, weight: float) -> None:
    plain, changed = (make_trainer(max_steps=1, negative_advantage_weight=w) for w in (1.0, weight))
    for trainer in (plain, changed):
        trainer.train()
    before, after = (
        trainer.seen[0]["advantages"][trainer.seen[0]["row_ids"].argsort()] for trainer in (plain, changed)
    )
    assert (before < 0).any() and (before > 0).any()
    torch.testing.assert_close(after, torch.where(before < 0, weight * before, before))


def test_a_negative_weight_of_advantages_is_refused(make_trainer: Any) -> None:
    with pytest.raises(ValueError, match=r"negative_advantage_weight=-1.0 is not allowed"):
        make_trainer(negative_advantage_weight=-1.0)


@pytest.mark.parametrize("draws", [False, True])
def test_m7_ids_behind_the_tokenizers_are_drawn_only_on_request(make_trainer: Any, draws: bool) -> None:
    tokenizer = tiny_tokenizer()
    known = 1 + max(tokenizer.get_vocab().values())
    model = tiny_llada(vocab_size=known + 400)  # most of the vocabulary decodes to nothing
    trainer = make_trainer(model, max_steps=1, temperature=1.0, draw_unknown_tokens=draws)
    rollout = trainer.rollout(["1", "2"] * 4)
    assert bool((rollout.canvas >= known).any()) is draws
