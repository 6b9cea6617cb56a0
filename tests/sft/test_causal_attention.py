"""Attention drawn to causes: its formula on the model's own attention, its gradients, its spans, when it is off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from torch import Tensor

from rl4dlm import DiffusionSFTConfig, DiffusionSFTTrainer, tiny_llada
from rl4dlm.models.recorded import Recorded, recorded_attention
from rl4dlm.models.tiny import tiny_tokenizer
from rl4dlm.sft import causal_attention
from rl4dlm.sft.causal_attention import TOKENS, cause_ratios, count_effects, edges_to_tokens
from tests.training.steps import SMALL_RUN

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

# Effects, then causes, in characters of prompt and completion. The second row has one edge, the third none.
ROWS = [
    {"prompt": "rain:", "completion": "wet ground", "causal_edges": [[[5, 8], [0, 4]], [[9, 15], [5, 8]]]},
    {"prompt": "a=1,b=a:", "completion": "b=1", "causal_edges": [[[8, 11], [0, 3]]]},
    {"prompt": "say c:", "completion": "cc", "causal_edges": []},
    {"prompt": "sun:", "completion": "dry", "causal_edges": [[[4, 7], [0, 3]], [[5, 7], [3, 4]]]},
]
GUIDED = {"causal_weight": 0.5, "causal_layers": [1]}


def make_sft(folder: Path, rows: Any = ROWS, *, model: Any = None, peft_config: Any = None, **changes: Any) -> Any:
    settings = {
        "output_dir": str(folder / "sft"),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_length": 24,
        **SMALL_RUN,
        **changes,
    }
    data = Dataset.from_list(rows) if isinstance(rows, list) else rows
    model = tiny_llada(initializer_range=0.3) if model is None else model
    return DiffusionSFTTrainer(
        model, DiffusionSFTConfig(**settings), data, None, tiny_tokenizer(), peft_config=peft_config
    )


def batch_of(trainer: Any) -> dict[str, Tensor]:
    return trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])


def plain_ratios(attention: Tensor, values: Tensor, real: Tensor, tokens: list[list[int]]) -> list[Tensor]:
    """Of one row, in loops: `[H, T, T]`, `[G, T, V]`, bool `[T]`."""
    norms = values.transpose(0, 1).flatten(1).norm(dim=-1)
    found = []
    for i in range(len(real)):
        causes = {j for e0, e1, c0, c1 in tokens if e0 <= i < e1 for j in range(c0, c1)}
        if not causes:
            continue
        mass = attention.mean(0)[i] * norms
        mass = mass / mass.sum()
        others = [j for j in range(len(real)) if real[j] and j not in causes]
        found.append(mass[sorted(causes)].mean() / mass[others].mean())
    return found


@pytest.mark.parametrize("complementary", [False, True])
def test_the_loss_is_the_definition_on_the_model_s_own_attention(tmp_path: Path, complementary: bool) -> None:
    model = tiny_llada(initializer_range=0.3, dtype=torch.float64)
    settings = {"complementary_masks": complementary, "causal_layers": [0, 1], "causal_ratio": 2.0}
    trainer = make_sft(tmp_path, model=model, causal_weight=0.5, **settings)
    batch = batch_of(trainer)
    assert batch[TOKENS].shape == (4, 2, 4) and count_effects(batch[TOKENS], 24) == 9 + 3 + 3
    trainer.model.train()
    trainer.state.max_steps = 4
    trainer.state.global_step = 1
    found = trainer.compute_loss(trainer.model, batch)
    plain = make_sft(tmp_path, model=model, complementary_masks=complementary)
    plain.model.train()
    plain.state.global_step = 1
    expected = plain.compute_loss(plain.model, batch)
    views = trainer.draw(batch)
    model.set_attn_implementation("eager")
    real, hinges = batch["attention_mask"].bool(), []
    for view in views.hidden.unbind(1):
        noised = torch.where(view, trainer.spec.mask_token_id, batch["input_ids"])
        mask = torch.zeros(len(real), 1, 1, real.shape[1], dtype=torch.float64)
        mask = mask.masked_fill(~real[:, None, None], torch.finfo(torch.float64).min).expand(-1, -1, real.shape[1], -1)
        with recorded_attention(model, [0, 1]) as recorded:
            own = model(input_ids=noised, attention_mask=mask, use_cache=False, output_attentions=True).attentions
        for layer in (0, 1):
            for row in range(len(real)):
                tokens = [edge for edge in batch[TOKENS][row].tolist() if edge[0] >= 0]
                ratios = plain_ratios(own[layer][row], recorded[layer].value[row], real[row], tokens)
                hinges += [(2.0 - ratio).clamp(min=0) for ratio in ratios]
    assert len(hinges) == 15 * 2 * views.hidden.shape[1]
    expected = expected + 0.5 * 3 / 4 * torch.stack(hinges).mean()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def record(heads: int = 4, groups: int = 2, rows: int = 2, width: int = 7, seed: int = 0) -> Recorded:
    torch_of = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(rows, count, width, 5, generator=torch_of, dtype=torch.float64) for count in (heads, groups, groups)
    )
    return Recorded(query, key, value, 0.3)


TOKEN_EDGES = torch.tensor([[[3, 5, 0, 2], [4, 6, 1, 3]], [[2, 3, 4, 5], [-1, -1, -1, -1]]])


def test_uniform_attention_and_values_have_ratio_one() -> None:
    one = record()
    uniform = Recorded(torch.zeros_like(one.query), one.key, torch.ones_like(one.value), 0.3)
    real = torch.ones(2, 7, dtype=torch.bool)
    real[1, 5:] = False
    torch.testing.assert_close(cause_ratios(uniform, real, TOKEN_EDGES), torch.ones(4, dtype=torch.float64))


def test_chunks_padding_and_batch_mates_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    one, real = record(), torch.ones(2, 7, dtype=torch.bool)
    real[1, 5:] = False
    found = cause_ratios(one, real, TOKEN_EDGES)
    torch.testing.assert_close(cause_ratios(one, real, TOKEN_EDGES, chunk=1), found, rtol=1e-12, atol=0)
    cut = Recorded(*(x[1:, :, :5] for x in one[:3]), one.scaling)
    torch.testing.assert_close(cause_ratios(cut, real[1:, :5], TOKEN_EDGES[1:, :1]), found[3:], rtol=1e-12, atol=0)
    twice = Recorded(*(x.repeat_interleave(2, 0) for x in one[:3]), one.scaling)
    views = cause_ratios(twice, real, TOKEN_EDGES)
    torch.testing.assert_close(views, torch.cat([found[:3], found[:3], found[3:], found[3:]]), rtol=1e-12, atol=0)
    sizes: list[int] = []
    ratios = causal_attention._ratios
    monkeypatch.setattr(
        causal_attention, "_ratios", lambda q, *rest: sizes.append(q[..., 0].numel()) or ratios(q, *rest)
    )
    cause_ratios(one, real, TOKEN_EDGES, chunk=2 * 4 * 7)
    assert sizes == [8, 4, 4], "two tokens of four heads at a time"
    low = Recorded(*(x.bfloat16() for x in one[:3]), one.scaling)
    plain = cause_ratios(low, real, TOKEN_EDGES)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cause_ratios(low, real, TOKEN_EDGES), plain) and plain.dtype == torch.float32
    without = cause_ratios(one, real, torch.full((2, 1, 4), -1))
    assert without.shape == (0,)


def test_values_get_gradients_unless_they_are_not_to() -> None:
    real = torch.ones(2, 7, dtype=torch.bool)
    for value_grad in (True, False):
        one = Recorded(*(x.requires_grad_() for x in record()[:3]), 0.3)
        cause_ratios(one, real, TOKEN_EDGES, value_grad=value_grad, chunk=1).sum().backward()
        assert one.query.grad is not None and one.key.grad is not None
        assert one.query.grad[0, :, 3:6].abs().min() > 0 and not one.query.grad[0, :, :3].any()
        assert (one.value.grad is not None) == value_grad


# --- in training ------------------------------------------------------------------------------------------------------


def test_without_edges_it_is_plain_training_to_the_bit(tmp_path: Path) -> None:
    rows = [{**row, "causal_edges": []} for row in ROWS]
    weights = []
    for given, settings in ((rows, GUIDED), (ROWS, {}), ([{**r} for r in ROWS], {**GUIDED, "causal_decay_steps": 1})):
        trainer = make_sft(tmp_path, given, **settings)
        trainer.train()
        weights.append(trainer.model.state_dict())
        metrics = {name for entry in trainer.state.log_history for name in entry if "causal" in name}
        assert metrics == ({"diffusion/causal_weight"} if given is rows else metrics)
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())
    assert any(not torch.equal(weights[2][name], value) for name, value in weights[0].items())


@pytest.mark.parametrize("value_grad", [True, False])
def test_gradients_come_through_the_chosen_layer_and_what_feeds_it(tmp_path: Path, value_grad: bool) -> None:
    model = tiny_llada(initializer_range=0.3, num_hidden_layers=3)
    trainer = make_sft(tmp_path, model=model, **GUIDED, causal_value_grad=value_grad, causal_ratio=50.0)
    trainer.model.train()
    trainer.state.max_steps = 4
    batch = batch_of(trainer)
    with trainer.recorded_causes(batch) as causes:
        model(batch["input_ids"], attention_mask=batch["attention_mask"])
    trainer.causal_loss(causes, batch, 1, in_step=False).backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("layers.0.mlp" in name for name in reached) and "model.embed_tokens.weight" in reached
    assert not any("layers.2" in name or "lm_head" in name for name in reached)
    of_layer = {name.split(".")[-2] for name in reached if "layers.1.self_attn" in name}
    assert of_layer == {"q_proj", "k_proj", *(["v_proj"] if value_grad else [])}
    assert not any("layers.1.mlp" in name for name in reached)


@pytest.mark.parametrize("adapter", [False, True])
def test_attention_moves_to_the_causes(tmp_path: Path, adapter: bool) -> None:
    """Also with an adapter and activation checkpointing; the weight falls to 0, and goes on falling when resumed."""
    lora = LoraConfig(target_modules=["q_proj", "k_proj"], r=4, init_lora_weights=True) if adapter else None
    settings: dict[str, Any] = {
        **GUIDED, "max_steps": 8, "causal_weight": 3.0, "causal_ratio": 30.0, "activation_checkpointing": adapter,
        "optim": "adamw_torch", "learning_rate": 0.02, "causal_decay_steps": 10, "save_strategy": "steps",
        "save_steps": 4,
    }  # fmt: skip
    trainer = make_sft(tmp_path, peft_config=lora, **settings)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "diffusion/causal_ratio" in entry]
    assert [round(entry["diffusion/causal_weight"], 6) for entry in log] == [round(3 - 0.3 * i, 6) for i in range(8)]
    assert log[-1]["diffusion/causal_ratio"] > 1.5 * log[0]["diffusion/causal_ratio"]
    assert log[-1]["diffusion/causal_loss"] < log[0]["diffusion/causal_loss"]
    if not adapter:
        again = make_sft(tmp_path, **settings)
        again.train(resume_from_checkpoint=str(tmp_path / "sft" / "checkpoint-4"))
        for name, value in again.model.state_dict().items():
            torch.testing.assert_close(value, trainer.model.state_dict()[name], rtol=0, atol=0)


def test_accumulation_counts_the_effects_of_the_whole_step(tmp_path: Path) -> None:
    """Micro-batches with different numbers of effects give the step of the batch that they are parts of."""
    weights = []
    for size in (4, 1):
        trainer = make_sft(
            tmp_path,
            **GUIDED,
            max_steps=1,
            max_grad_norm=0.0,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
        )
        trainer.train()
        weights.append(trainer.model.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=1e-6)


# --- spans ------------------------------------------------------------------------------------------------------------


def mapped(edges: Any, **row: Any) -> list[list[int]]:
    tokenizer = tiny_tokenizer()
    row = {"text": "abcdef", **row, "example_id": 7, "causal_edges": edges}
    row.setdefault("input_ids", tokenizer(row["text"])["input_ids"])
    return edges_to_tokens(row, tokenizer)[TOKENS]


def test_spans_of_characters_become_spans_of_tokens(tmp_path: Path) -> None:
    assert mapped([[[3, 5], [0, 1]], [[2, 3], [4, 6]]]) == [[3, 5, 0, 1], [2, 3, 4, 6]]
    assert mapped(None) == mapped([]) == []
    # "<eos>" is one token of five characters, of which a span may name a part
    assert mapped([[[0, 1], [3, 4]]], text="ab<eos>c") == [[0, 1, 2, 3]]
    chats = [
        {
            "prompt": [{"role": "user", "content": "rain"}],
            "completion": [{"role": "assistant", "content": "wet"}],
            "causal_edges": [[[30, 33], [8, 12]]],
        }
    ] * 4
    rendered = "<|user|>rain<eos><|assistant|>wet<eos>"
    assert rendered[8:12] == "rain" and rendered[30:33] == "wet"
    trainer = make_sft(tmp_path, chats, **GUIDED)
    first = trainer.train_dataset[0]
    effect, cause = first[TOKENS][0][:2], first[TOKENS][0][2:]
    decode = trainer.processing_class.decode
    assert decode(first["input_ids"][slice(*effect)]) == "wet" and decode(first["input_ids"][slice(*cause)]) == "rain"
    text = make_sft(tmp_path, [{"text": "rain wet", "causal_edges": [[[5, 8], [0, 4]]]}] * 4, **GUIDED)
    assert text.train_dataset[0][TOKENS] == [[5, 8, 0, 4]]
    streamed = IterableDataset.from_generator(lambda: iter(ROWS))
    assert next(iter(make_sft(tmp_path, streamed, **GUIDED).train_dataset))[TOKENS] == [[5, 8, 0, 4], [9, 15, 5, 8]]
    ready = [{"input_ids": [8, 9, 10], "labels": [-100, 9, 10], TOKENS: [[1, 2, 0, 1]]}] * 4
    assert make_sft(tmp_path, ready, **GUIDED).train().training_loss > 0


@pytest.mark.parametrize(
    ("edges", "row", "said"),
    [
        ([[[3, 5], [0, 9]]], {}, r"example 7: the span \[0, 9\].*6 characters"),
        ([[[3, 3], [0, 1]]], {}, r"span \[3, 3\].*start < stop"),
        ([[3, 5, 0, 1]], {}, r"\[3, 5, 0, 1\] in causal_edges is no edge"),
        ([[[3, 5]]], {}, "no edge"),
        ([[[3, 5, 6], [0, 1]]], {}, "no edge"),
        ([[[4, 5], [0, 1]]], {"input_ids": [41, 42]}, "not those that its text starts with"),
        ([[[1, 2], [0, 6]]], {}, "the whole text is the cause of token 1"),
    ],
)
def test_spans_that_cannot_be_placed_are_named(edges: Any, row: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        mapped(edges, **row)


@pytest.mark.parametrize(
    ("edges", "said"),
    [
        ([[3, 9, 0, 2]], "[3, 9, 0, 2] in causal_tokens is no edge"),
        ([[3, 3, 0, 2]], "[3, 3, 0, 2] in causal_tokens is no edge"),
        ([[3, 5, 8, 9]], "among its 6 tokens"),
        ([[3, 5]], "[3, 5] in causal_tokens is no edge"),
        ([[3, 5, 0, 6]], "in causal_tokens the whole text is the cause of token 3"),
    ],
)
def test_edges_that_come_in_tokens_are_checked(tmp_path: Path, edges: Any, said: str) -> None:
    plain = {"input_ids": [5, 6, 7, 8, 9, 1], "labels": [-100, -100, 7, 8, 9, 1]}
    good = [{**plain, "causal_tokens": [[3, 5, 0, 2]]}, {**plain, "causal_tokens": None}]
    batch = batch_of(make_sft(tmp_path, good, **GUIDED))
    assert batch["causal_tokens"].tolist() == [[[3, 5, 0, 2]], [[-1] * 4]]
    with pytest.raises(ValueError) as error:
        make_sft(tmp_path, [*good, {**plain, "causal_tokens": edges}], **GUIDED)
    assert said in str(error.value) and "example 2" in str(error.value)


def test_spans_behind_what_is_kept_and_slow_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"span \[9, 15\].*behind the 8 tokens.*raise max_length"):
        make_sft(tmp_path, **GUIDED, max_length=8)
    row = {"text": "ab", "example_id": 0, "input_ids": [1], "causal_edges": [[[0, 1], [1, 2]]]}
    with pytest.raises(ValueError, match="fast tokenizer"):
        edges_to_tokens(row, object())


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"causal_weight": -1.0}, "causal_weight=-1.0 is not allowed"),
        ({"causal_weight": 1.0}, r"needs causal_layers, such as \[4, 8\]"),
        ({"causal_layers": [1]}, "causal_layers.* has no effect with causal_weight=0"),
        ({"causal_ratio": 2.0}, "causal_ratio=2.0 has no effect"),
        ({**GUIDED, "causal_layers": [1, 1]}, "different numbers"),
        ({**GUIDED, "causal_layers": "[1"}, "not JSON"),
        ({**GUIDED, "causal_layers": [5]}, "the model has no layer 5; they are 0 to 1"),
        ({**GUIDED, "causal_ratio": 0.5}, "causal_ratio=0.5 is not allowed"),
        ({**GUIDED, "causal_decay_steps": 0}, "causal_decay_steps=0 is not allowed"),
        ({**GUIDED, "random_truncation": True}, "random_truncation=True with causal_weight"),
        ({**GUIDED, "attention_annealing_steps": 3}, "attention_annealing_steps=3 with causal_weight"),
    ],
)
def test_settings_without_a_meaning_are_refused(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make_sft(tmp_path, **settings)


def test_it_needs_edges_and_full_attention(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bare = [{"prompt": row["prompt"], "completion": row["completion"]} for row in ROWS]
    with pytest.raises(ValueError, match="needs the column `causal_edges`"):
        make_sft(tmp_path, bare, **GUIDED)
    model = tiny_llada()
    model.config.diffusion.update(attention="block_causal", block_length=4)
    with pytest.raises(ValueError, match="attention='block_causal'"):
        make_sft(tmp_path, model=model, **GUIDED)
    make_sft(tmp_path)
    assert "`causal_edges` has no effect with causal_weight=0" in caplog.text
    assert make_sft(tmp_path, causal_weight=1.0, causal_layers="[0, 1]").args.causal_layers == [0, 1]
    reentrant = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(ValueError, match="activation checkpointing is re-entrant"):
        make_sft(tmp_path, **GUIDED, **reentrant).train()
