"""Self-distillation: corpora, teachers that are told more, states that change, rounds whose steps double."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from rl4dlm import SelfDistillationConfig, tiny_llada, tiny_sdar, tiny_tokenizer
from rl4dlm.likelihood.student_states import StudentStates
from rl4dlm.models.distributions import divergence
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.training.corpus import completion_ids, told_prompt
from rl4dlm.training.self_distillation import TEMPLATE
from rl4dlm.training.trainer import rows_of
from tests.algorithms.test_self_distillation import (
    BLOCK,
    CANVAS,
    SAME,
    batch_of,
    build,
    hidden_of,
    loss_and_gradient,
    mean_of,
    plain,
    rows,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

EOS = tiny_tokenizer().eos_token_id
CORPUS = [{"prompt": f"{'abcdefgh'[: 1 + i % 5]}{i}", "completion": "zyxwvuts"[: 1 + i % 8]} for i in range(12)]
HARD: dict[str, Any] = {"divergence": "none", "hard_weight": 1.0, **SAME}


# --- states -----------------------------------------------------------------------------------------------------------


def test_shares_have_the_weights_of_their_powers() -> None:
    shares, count = (0.25, 0.5, 0.75, 1.0), 6000
    batch = rows(1, ends=False)[torch.zeros(count, dtype=torch.long)]
    batch.row_ids = torch.arange(count)
    views = StudentStates(2, shares=shares, exponent=4.0).draw(batch, seed=0, iteration=0)
    hidden = views.scored.sum(-1).flatten()
    total = sum(share**4 for share in shares)
    for share in shares:
        expected = share**4 / total
        assert (hidden == CANVAS * share).double().mean().item() == pytest.approx(expected, abs=0.02)
    even = StudentStates(2, shares=shares).draw(batch, seed=0, iteration=0).scored.sum(-1).flatten()
    assert even.double().mean().item() == pytest.approx(CANVAS * sum(shares) / 4, abs=0.1)
    assert (StudentStates(4, shares=(1.0,)).draw(batch, seed=0, iteration=0).scored).all()


def test_every_block_has_the_same_share_hidden() -> None:
    batch = rows(32)
    views = StudentStates(3, share_range=(0.3, 0.9), block_length=BLOCK, every_block=True).draw(
        batch, seed=0, iteration=0
    )
    inside = batch.valid.view(32, 1, -1, BLOCK)
    size, hidden = inside.sum(-1), views.scored.view(32, 3, -1, BLOCK).sum(-1)
    assert (views.scored <= batch.valid[:, None]).all() and (hidden >= 1)[size.expand_as(hidden) > 0].all()
    same = hidden[..., 0] == hidden[..., 1]
    assert same[:-1].all(), "blocks of the same size"
    assert hidden.unique().tolist() == [1, 2, 3, 4]


def test_recorded_states_of_every_block() -> None:
    """In each block everything that was written from some step of it on, and a share of it at least."""
    batch = rows(16, ends=False)
    assert batch.commit_step is not None
    settings: dict[str, Any] = {"share_range": (0.3, 0.9), "block_length": BLOCK, "every_block": True}
    views = StudentStates(4, "recorded", **settings).draw(batch, seed=0, iteration=0)
    following = StudentStates(4, "recorded", positions="next", **settings).draw(batch, seed=0, iteration=0)
    hidden = hidden_of(views)
    assert torch.equal(hidden_of(following), hidden)
    for row, view, first in ((r, v, b) for r in range(16) for v in range(4) for b in range(0, CANVAS, BLOCK)):
        block = slice(first, first + BLOCK)
        step, inside = batch.commit_step[row, block], hidden[row, view, block]
        assert torch.equal(inside, step >= step[inside].min()) and 2 <= int(inside.sum()) <= 4
        assert torch.equal(following.scored[row, view, block], step == step[inside].min())
    assert hidden.view(16, 4, -1, BLOCK).sum(-1).unique().tolist() == [2, 4], "two tokens a step"


def test_states_grow_with_the_step_of_the_optimizer(make_trainer: Any) -> None:
    trainer = build(
        make_trainer, share_range=[0.1, 0.5], share_range_end=[0.9, 0.9], block_states=True, state_block_length=2,
        state_block_length_end=6, **HARD,
    )  # fmt: skip
    trainer.state.max_steps, batch = 5, batch_of(trainer)
    expected = {0: (0.1, 0.5, 2), 2: (0.5, 0.7, 4), 4: (0.9, 0.9, 6), 9: (0.9, 0.9, 6)}
    for step, (low, high, length) in expected.items():
        trainer.state.global_step = step
        views = trainer._draw(rows_of(batch), 0)
        states = trainer.estimator
        assert states.share_range == pytest.approx((low, high)) and states.block_length == length
        assert torch.equal(views.hidden, states.draw(rows_of(batch), seed=trainer.args.seed, iteration=0).hidden)


def test_a_run_that_is_resumed_goes_on_growing(make_trainer: Any) -> None:
    more: dict[str, Any] = {"share_range": [0.0, 0.2], "share_range_end": [0.8, 1.0], "max_steps": 4, **HARD}
    more |= {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    whole = build(make_trainer, **more)
    whole.train()
    resumed = build(make_trainer, **more)
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-2"))
    assert resumed.estimator == whole.estimator and whole.estimator.share_range == (0.8, 1.0)
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)


# --- rounds -----------------------------------------------------------------------------------------------------------


def test_the_teachers_step_doubles_with_every_round(make_trainer: Any) -> None:
    trainer = build(
        make_trainer, teacher_step=0.125, teacher_step_doubles=True, sync_ref_model=True, ref_model_mixup_alpha=1.0,
        ref_model_sync_steps=3,
    )  # fmt: skip
    batch = rows_of(batch_of(trainer))
    batch.valid = torch.ones_like(batch.valid)
    total = torch.full((len(batch), 1), 7)
    for step, written in ((0, 1), (2, 1), (3, 2), (6, 4), (9, 7), (60, 7)):  # half of m = 2 steps of dt, of 8 tokens
        trainer.state.global_step = step
        assert trainer._written(batch, total, 0.5).unique().tolist() == [written]
    assert trainer._written(batch, total, 1.0).unique().tolist() == [7]


def test_steps_of_the_whole_completion_write_what_is_hidden(make_trainer: Any) -> None:
    """Where all is hidden, two steps of half of the completion are two steps that write all of what is hidden."""
    trainer = build(make_trainer, share_range=[1.0, 1.0], max_steps=2)
    batch = batch_of(trainer)
    loss = loss_and_gradient(trainer, batch)[0].item()
    trainer.args.teacher_step = 0.5
    assert loss_and_gradient(trainer, batch)[0].item() == pytest.approx(loss, abs=1e-12)
    trainer.args.teacher_step = 0.25
    assert loss_and_gradient(trainer, batch)[0].item() != pytest.approx(loss, abs=1e-6)


# --- what the teacher is told -----------------------------------------------------------------------------------------


def hinted(prompts: list[str]) -> list[dict[str, str]]:
    return [{"prompt": prompt, "hint": f"h{prompt[::-1]}"} for prompt in prompts]


def test_a_teacher_that_is_told_more_is_the_policy_behind_another_prompt(make_trainer: Any) -> None:
    data = Dataset.from_list(hinted(["abc0", "de1"] * 4))
    trainer = build(
        make_trainer, dataset=data, teacher="policy", teacher_context_column="hint", distill_top_k=None,
        divergence="forward_kl", teacher_prompt_template="{privileged_context}: {prompt}", num_views=2, **SAME,
    )  # fmt: skip
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    inputs = hinted(["abc0"] * 4 + ["de1"] * 4)
    batch: dict[str, Any] = trainer._generate_and_score_completions(inputs)
    assert trainer._given is None and trainer.ref_model is None
    texts = [
        trainer._tokenizer.decode(ids[mask]) for ids, mask in zip(batch["told_ids"], batch["told_mask"], strict=True)
    ]
    assert texts == ["h0cba: abc0"] * 4 + ["h1ed: de1"] * 4
    views = trainer._draw(rows_of(batch), 0)
    told, shown = rows_of(batch).as_told(views)
    assert torch.equal(shown.scored, views.scored)
    other = {**batch, "prompt_ids": told.prompt_ids, "prompt_mask": told.prompt_mask}
    with torch.no_grad():
        teacher = plain(trainer, trainer.model, other, shown)
    student = plain(trainer, trainer.model, batch, views)
    expected = mean_of(batch, views, divergence(student, teacher, "forward_kl"))
    loss, gradient = loss_and_gradient(trainer, batch)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-10) and loss.item() > 1e-4
    wanted = torch.autograd.grad(expected, list(trainer.model.parameters()))
    for found, right in zip(gradient, wanted, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-7, atol=1e-10)
    part = rows_of(batch)[torch.tensor([5, 2])]
    assert part.told_ids is not None and torch.equal(part.told_ids, batch["told_ids"][[5, 2]])


@pytest.mark.parametrize("more", [{"teacher_view": "later"}, {"positions": "surest", "states": "recorded", **SAME}])
def test_every_kind_of_teacher_may_be_told_more(make_trainer: Any, more: Any) -> None:
    data = Dataset.from_list(hinted([f"p{i}" for i in range(8)]))
    trainer = build(make_trainer, model=tiny_llada(), dataset=data, teacher_context_column="hint", max_steps=2, **more)
    trainer.train()
    assert trainer.state.log_history[0]["distillation/divergence"] > 0


def test_the_users_last_message_is_where_more_is_told() -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    found = told_prompt([*messages, {"role": "assistant", "content": "<x>"}], "hint", TEMPLATE)
    assert [message["content"] for message in found] == ["a", "b", "c\n\nhint", "<x>"]
    assert told_prompt("a", "b", "{{}}{privileged_context}{prompt}") == "{}ba"
    for context in ("", None, 3):
        with pytest.raises(ValueError, match="needed is text"):
            told_prompt("a", context, TEMPLATE)
    with pytest.raises(ValueError, match="no message of the user"):
        told_prompt([{"role": "assistant", "content": "a"}], "b", TEMPLATE)


def test_what_the_teacher_cannot_be_told_is_said_before_training(make_trainer: Any) -> None:
    for data, said in (
        ([{"prompt": "a"}] * 4, "train_dataset has no column 'hint'"),
        (
            [{"prompt": "a", "hint": hint} for hint in ("b", "")] * 2,
            r"train_dataset\[1\]: what the teacher is told is ''",
        ),
        ([{"prompt": "a", "hint": "b" * 5000}] * 4, "what the teacher is told of train_dataset: a prompt has 50"),
    ):
        with pytest.raises(ValueError, match=said):
            build(
                make_trainer, model=tiny_llada(), dataset=Dataset.from_list(data), teacher_context_column="hint", **SAME
            )


# --- corpora ----------------------------------------------------------------------------------------------------------


def test_completions_of_a_corpus_are_learnt_from_without_rollouts(make_trainer: Any) -> None:
    trainer = build(make_trainer, dataset=Dataset.from_list(CORPUS), rollouts_by="corpus", num_views=2, **HARD)
    forwards: list[Any] = []
    trainer.model.register_forward_hook(lambda *given: forwards.append(1))
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    inputs = [CORPUS[i] for i in (0, 0, 0, 0, 7, 7, 7, 7)]
    batch: dict[str, Any] = trainer._generate_and_score_completions(inputs)
    assert not forwards
    tokenizer = tiny_tokenizer()
    for i, row in enumerate(inputs):
        ids = tokenizer(row["completion"])["input_ids"]
        ids = [*ids, EOS][:CANVAS]
        assert batch["canvas_ids"][i].tolist() == [*ids, *[EOS] * (CANVAS - len(ids))]
        assert int(batch["canvas_valid"][i].sum()) == len(ids)
    assert len(batch["row_ids"].unique()) == 8
    views = trainer._draw(rows_of(batch), 0)
    assert len(views.hidden[4:].flatten(1).unique(dim=0)) == 4, "each time with states of its own"
    targets = rows_of(batch).canvas_ids[:, None].expand(views.scored.shape)[views.scored]
    with torch.no_grad():
        nll = -plain(trainer, trainer.model, batch, views).gather(-1, targets[:, None])[:, 0]
    assert loss_and_gradient(trainer, batch)[0].item() == pytest.approx(mean_of(batch, views, nll).item(), abs=1e-10)


def test_a_corpus_is_learnt(make_trainer: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A row that is longer than the canvas is cut, which is said; evaluation decodes with the policy."""
    data, kept = Dataset.from_list(CORPUS), Dataset.from_list([{"prompt": "abc"}] * 4)
    with caplog.at_level(logging.WARNING):
        trainer = build(
            make_trainer, model=tiny_llada(), dataset=data, eval_dataset=kept, rollouts_by="corpus", max_steps=30,
            learning_rate=0.3, eval_strategy="steps", eval_steps=30, per_device_eval_batch_size=4, **HARD,
        )  # fmt: skip
    assert "1 of 12 completions in train_dataset are cut at max_completion_length=8" in caplog.text
    trainer.train()
    nll = [entry["distillation/nll"] for entry in trainer.state.log_history if "distillation/nll" in entry]
    assert sum(nll[-5:]) / 5 < sum(nll[:5]) / 5 - 0.5
    evaluated = next(entry for entry in trainer.state.log_history if "eval_diffusion/nfe" in entry)
    assert evaluated["eval_diffusion/nfe"] > 0
    assert not any("diffusion/nfe" in entry for entry in trainer.state.log_history)


def test_d2f_takes_a_corpus(make_trainer: Any) -> None:
    trainer = build(
        make_trainer, model=tiny_llada(), dataset=Dataset.from_list(CORPUS), rollouts_by="corpus", states="rising",
        share_range=[0.2, 0.7], student_attention="block_causal", block_length=BLOCK, divergence="forward_kl",
        distill_top_k=None, max_steps=2, **SAME,
    )  # fmt: skip
    trainer.train()
    assert trainer.spec.attention == "block_causal" and trainer.state.log_history[0]["distillation/divergence"] > 0


def test_completions_are_tokenized_as_for_supervised_training() -> None:
    tokenizer, spec = tiny_tokenizer(), DiffusionSpec.of(tiny_llada())
    messages = [{"role": "user", "content": "ab"}], [{"role": "assistant", "content": "cd"}]
    found = completion_ids(tokenizer, *messages, spec=spec, chat_template=None)
    assert tokenizer.decode(found).startswith("cd") and found[-1] in spec.eos_token_ids
    assert completion_ids(tokenizer, "ab", "cd", spec=spec)[-1] == EOS
    assert completion_ids(tokenizer, "ab", f"cd{tokenizer.eos_token}", spec=spec).count(EOS) == 1
    for prompt, completion, said in (
        ("ab", messages[1], "needed is text behind a prompt of text"),
        ("ab", "", "needed is text"),
        ("ab", f"c{tokenizer.mask_token}", "contains the mask token"),
    ):
        with pytest.raises(ValueError, match=said):
            completion_ids(tokenizer, prompt, completion, spec=spec)


def test_rows_of_a_corpus_that_are_refused(make_trainer: Any) -> None:
    for data, said in (
        ([{"prompt": "a"}] * 4, "train_dataset has no column 'completion'"),
        ([{"prompt": "a", "completion": text} for text in ("b", "")] * 2, r"train_dataset\[1\]: a completion is ''"),
    ):
        with pytest.raises(ValueError, match=said):
            build(make_trainer, model=tiny_llada(), dataset=Dataset.from_list(data), rollouts_by="corpus", **HARD)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"shares": [0.5, 0.0]}, "shares=[0.5, 0.0] is not allowed"),
        (
            {"shares": [0.5], "share_range": [0.1, 0.2]},
            "share_range=[0.1, 0.2] is not supported: it has no effect with",
        ),
        ({"shares_exponent": 2.0}, "shares_exponent=2.0 is not supported"),
        ({"shares": [1.0], "shares_exponent": -1.0}, "shares_exponent=-1.0 is not allowed"),
        ({"share_range": [0.5]}, "share_range=(0.5,) is not allowed"),
        ({"divergence_weight": 0.0}, "divergence_weight=0 is not allowed with divergence='reverse_kl'"),
        ({"hard_weight": float("inf")}, "hard_weight=inf is not allowed"),
        ({"distill_temperature": float("inf")}, "distill_temperature=inf is not allowed"),
        ({"rewarded_from": float("nan")}, "rewarded_from=nan is not allowed"),
        ({"share_range_end": [0.5, 0.2]}, "share_range_end=(0.5, 0.2) is not allowed"),
        ({"state_block_length": 4}, "state_block_length=4 is not supported: it has no effect with states of whole"),
        (
            {"every_block": True, "block_states": True, "block_length": 4},
            "every_block=True is not allowed with block_st",
        ),
        ({"states": "rising", "every_block": True, "block_length": 4}, "every_block=True is not allowed with block_le"),
        ({"teacher_step": 0.0}, "teacher_step=0.0 is not allowed"),
        ({"teacher_step": 0.1, "teacher_written": 0.5}, "teacher_written=0.5 is not supported"),
        ({"teacher_step": 0.1, "teacher_step_doubles": True}, "teacher_step_doubles=True is not allowed with"),
        ({"teacher_view": "same", "teacher_step": 0.1}, "teacher_step=0.1 is not supported"),
        (
            {"teacher_context_column": "hint", "teacher_prompt_template": "{prompt}"},
            "it must have {prompt} and {privileged_context}",
        ),
        (
            {"teacher_context_column": "hint", **HARD},
            "teacher_context_column='hint' has no effect with divergence='none'",
        ),
        ({"rollouts_by": "corpus", "states": "recorded"}, "states='recorded' is not allowed with rollouts_by='corpus'"),
        ({"rollouts_by": "corpus", "log_replays": 1, "log_completions": True}, "log_replays=1 is not allowed with"),
    ],
)
def test_settings_that_are_refused(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    values = {"block_length": None, "output_dir": str(tmp_path), "bf16": False, "use_cpu": True, **settings}
    with pytest.raises(ValueError) as error:
        SelfDistillationConfig(**values)
    assert said in str(error.value)


def test_blocks_of_states_are_those_of_a_model_that_has_some(make_trainer: Any) -> None:
    blocks = tiny_sdar().config.diffusion["block_length"]
    every = {"states": "recorded", "every_block": True, **HARD}
    trainer = build(
        make_trainer, model=tiny_sdar(), shares=[1.0, 0.5], shares_exponent=8.0, block_length=blocks, **every
    )
    trainer.train()
    with pytest.raises(ValueError, match="are not allowed for a student that denoises blocks of"):
        build(make_trainer, model=tiny_sdar(), block_length=blocks, state_block_length=blocks * 2, **every)
    with pytest.raises(ValueError, match="need blocks: set block_length"):
        build(make_trainer, model=tiny_llada(), every_block=True, **HARD)
    with pytest.raises(ValueError, match="it was never in such a state"):
        build(make_trainer, model=tiny_llada(), block_length=BLOCK, **every)
