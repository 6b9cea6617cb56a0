"""Adaptation of causal models: what each setting changes in the loss, what none of them does, and a model made so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from trl import ModelConfig

from rl4dlm.cli.arguments import AdaptationArguments, ExampleArguments, parse
from rl4dlm.models.loading import load_denoiser, load_tokenizer
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.models.tiny import tiny_llada, tiny_tokenizer
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.noise import keyed_uniform
from rl4dlm.sft.adapt import adapt_causal_lm
from rl4dlm.sft.trainer import DiffusionSFTConfig, DiffusionSFTTrainer
from tests.models.float64 import exactly_float64
from tests.training.steps import SMALL_RUN

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

TEXTS = {"prompt": [f"say {c}:" for c in "abcdefgh"], "completion": [c * (i + 1) for i, c in enumerate("abcdefgh")]}
ORIGINS = ("position_zero", "response")


def denoiser(
    attention: str = "block_causal", origin: str = "position_zero", block_length: int = 4, **sizes: Any
) -> Any:
    model = tiny_llada(initializer_range=0.3, **sizes)
    model.config.diffusion.update(attention=attention, grid_origin=origin)
    if attention != "full":
        model.config.diffusion.update(block_length=block_length, logit_shift=1)
    return model


@pytest.fixture
def make_sft(tmp_path: Path) -> Callable[..., Any]:
    def make(model: Any = None, tokenizer: Any = None, **changes: Any) -> Any:
        settings = {
            "output_dir": str(tmp_path / "sft"),
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 8,
            "max_length": 24,
            **SMALL_RUN,
            **changes,
        }
        data = Dataset.from_dict(TEXTS)
        model = denoiser() if model is None else model
        trainer = DiffusionSFTTrainer(model, DiffusionSFTConfig(**settings), data, data, tokenizer or tiny_tokenizer())
        trainer.model.train()
        return trainer

    return make


def batch_of(trainer: Any) -> dict[str, Tensor]:
    return trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])


def prompt_lengths(batch: dict[str, Tensor]) -> list[int]:
    return [row.tolist().index(next(i for i in row.tolist() if i != -100)) for row in batch["labels"]]


# --- masks and weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["full", "block_causal"])
def test_the_defaults_are_plain_masked_sft_bit_for_bit(make_sft: Any, attention: str) -> None:
    trainer = make_sft(denoiser(attention))
    batch = batch_of(trainer)
    trainer.state.global_step = 3
    ids, step = batch["example_id"], torch.tensor(3)
    level = (1 - 1e-3) * keyed_uniform(trainer.args.seed, "sft level", ids, step) + 1e-3
    uniform = keyed_uniform(trainer.args.seed, "sft mask", ids[:, None], step, torch.arange(batch["labels"].shape[1]))
    hidden = (uniform < level[:, None]) & (batch["labels"] != -100)
    views = trainer.draw(batch)
    assert torch.equal(views.hidden, hidden[:, None]) and views.ids is None
    assert torch.equal(views.weight, (hidden / level[:, None]).float()[:, None])


def test_complementary_masks_score_every_target_exactly_once(make_sft: Any) -> None:
    trainer = make_sft(complementary_masks=True, loss_weight="none", noise_levels="block")
    batch = batch_of(trainer)
    targets = (batch["labels"] != -100).long()
    hidden = []
    for step in range(200):
        trainer.state.global_step = step
        views = trainer.draw(batch)
        assert torch.equal(views.hidden.sum(1), targets)
        assert torch.equal(views.weight, views.hidden.float())
        hidden.append(views.hidden[:, 0].sum() / targets.sum())
    assert abs(torch.stack(hidden).mean() - 0.5) < 0.03, "E[t] = 1/2"


def test_the_complementary_loss_is_the_mean_over_all_targets(make_sft: Any) -> None:
    # Where the model cannot see anything but where it is, what is hidden does not matter: blocks of one token.
    trainer = make_sft(denoiser(block_length=1), complementary_masks=True, loss_weight="none")
    whole = make_sft(denoiser(block_length=1), noise_floor=1.0)
    loss = trainer.compute_loss(trainer.model, batch_of(trainer))
    torch.testing.assert_close(loss, whole.compute_loss(whole.model, batch_of(whole)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize("noise_levels", ["row", "block"])
def test_levels_are_those_of_rows_or_of_blocks(make_sft: Any, origin: str, noise_levels: str) -> None:
    trainer = make_sft(denoiser(origin=origin, block_length=3), noise_levels=noise_levels)
    batch = batch_of(trainer)
    by_row: list[dict[int, set[float]]] = [{} for _ in range(8)]
    views = trainer.draw(batch)
    for row, length in enumerate(prompt_lengths(batch)):
        for position in views.hidden[row, 0].nonzero()[:, 0].tolist():
            block = (position - (length if origin == "response" else 0)) // 3
            by_row[row].setdefault(block, set()).add(views.weight[row, 0, position].item())
    assert all(len(levels) == 1 for blocks in by_row for levels in blocks.values()), "one level per block"
    several = [blocks for blocks in by_row if len(blocks) > 1]
    assert several
    for blocks in several:
        assert len(set.union(*blocks.values())) == (len(blocks) if noise_levels == "block" else 1)


def test_a_tilt_hides_later_positions_of_blocks_more_often(make_sft: Any) -> None:
    trainer = make_sft(denoiser(origin="response"), mask_ratio_tilt=1.0, eos_padding="max_length", max_length=22)
    batch = batch_of(trainer)
    shares = torch.zeros(4)
    weights = torch.zeros(4)
    steps = 1500
    for step in range(steps):
        trainer.state.global_step = step
        views = trainer.draw(batch)
        canvas = slice(6, 22)  # prompts have 6 tokens, canvases four whole blocks
        shares += views.hidden[:, 0, canvas].float().mean(0).view(4, 4).mean(0)
        weights += views.weight[:, 0, canvas].mean(0).view(4, 4).mean(0)
    # Exact: the mean over t of t + t (1 - t) (2 r - 1) is 1/2 + (2 r - 1)/6; and that of the weight is 1.
    relative = (torch.arange(4) + 0.5) / 4
    torch.testing.assert_close(shares / steps, 0.5 + (2 * relative - 1) / 6, rtol=0, atol=0.02)
    torch.testing.assert_close(weights / steps, torch.ones(4), rtol=0, atol=0.12)


# --- block lengths ----------------------------------------------------------------------------------------------------


def test_a_schedule_changes_the_attention_blocks_and_what_is_saved(make_sft: Any, tmp_path: Path) -> None:
    trainer = make_sft(denoiser(block_length=8), block_length_schedule=[[0, 1], [2, 4]], learning_rate=0.0)
    found = []
    for step, length in [(0, 1), (1, 1), (2, 4), (9, 4)]:
        fixed = make_sft(denoiser(block_length=length))
        trainer.state.global_step = fixed.state.global_step = step
        batch = batch_of(trainer)
        loss = trainer.compute_loss(trainer.model, batch)
        assert loss == fixed.compute_loss(fixed.model, batch)
        assert DiffusionSpec.of(trainer.model).block_length == trainer.spec.block_length == length
        other = make_sft(denoiser(block_length=8))
        other.state.global_step = step
        assert loss != other.compute_loss(other.model, batch), "the block length matters"
        found.append(loss.item())
    assert all(value == value for value in found)
    trainer.save_model(str(tmp_path / "saved"))
    assert DiffusionSpec.of(load_denoiser(tmp_path / "saved")).block_length == 4


# --- the next-token loss ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize("complementary", [False, True])
def test_the_next_token_loss_is_the_causal_models_own(make_sft: Any, origin: str, complementary: bool) -> None:
    def model() -> Any:
        return exactly_float64(denoiser("context_causal", origin, dtype=torch.float64))

    with_it = make_sft(model(), ar_loss_weight=0.5, complementary_masks=complementary)
    without = make_sft(model(), complementary_masks=complementary)
    batch = batch_of(with_it)
    added = with_it.compute_loss(with_it.model, batch) - without.compute_loss(without.model, batch)
    config = type(with_it.model.config)(**{**with_it.model.config.to_dict(), "is_causal": True})
    stock = LlamaForCausalLM(config).double()
    exactly_float64(stock).load_state_dict(with_it.model.state_dict())
    output = stock(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")})
    expected = cross_entropy(output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(expected.float(), output.loss, rtol=0, atol=1e-5)  # which is computed in float32
    torch.testing.assert_close(added, 0.5 * expected, rtol=0, atol=1e-12)
    added.backward()
    assert all(p.grad is not None for p in with_it.model.parameters())


def test_evaluation_is_the_same_bound_whatever_is_trained(make_sft: Any) -> None:
    expected = make_sft(denoiser("context_causal")).evaluate()["eval_loss"]
    for settings in (
        {"complementary_masks": True, "loss_weight": "none", "noise_levels": "block"},
        {"mask_ratio_tilt": 1.0, "ar_loss_weight": 1.0},
    ):
        assert make_sft(denoiser("context_causal"), **settings).evaluate()["eval_loss"] == expected


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"loss_weight": "t"}, "loss_weight='t' is not allowed; choose one of 1/t, none"),
        ({"noise_levels": "token"}, "noise_levels='token' is not allowed"),
        ({"mask_ratio_tilt": 1.5}, "mask_ratio_tilt=1.5"),
        ({"mask_ratio_tilt": 0.5, "complementary_masks": True}, "use one of them"),
        ({"ar_loss_weight": -1.0}, "ar_loss_weight=-1.0"),
        ({"ar_loss_weight": float("nan")}, "ar_loss_weight=nan"),
        ({"noise_floor": 0.6, "complementary_masks": True}, "noise_floor=0.6 is not allowed with complementary"),
        ({"block_length_schedule": "[[0,"}, "it is not JSON"),
        ({"block_length_schedule": []}, "give pairs"),
        ({"block_length_schedule": [[0, 0]]}, "give pairs"),
        ({"block_length_schedule": [[0, 4.5]]}, "give pairs"),
        ({"block_length_schedule": [[1, 4]]}, "the first step must be 0"),
        ({"block_length_schedule": [[0, 4], [0, 8]]}, "every later one larger"),
    ],
    ids=str,
)
def test_bad_settings_are_named(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DiffusionSFTConfig(bf16=False, use_cpu=True, **settings)


@pytest.mark.parametrize(
    ("attention", "settings", "said"),
    [
        ("full", {"noise_levels": "block"}, "noise_levels='block' needs a model that denoises block by block"),
        ("full", {"mask_ratio_tilt": 0.5}, "mask_ratio_tilt=0.5 needs"),
        ("full", {"block_length_schedule": [[0, 4]]}, "block_length_schedule=.* needs"),
        ("block_causal", {"ar_loss_weight": 1.0}, "needs attention 'context_causal'"),
    ],
)
def test_settings_without_meaning_for_the_attention_are_named(
    make_sft: Any, attention: str, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        make_sft(denoiser(attention), **settings)


def test_flags_and_files_set_them(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("block_length_schedule: [[0, 1], [5, 4]]\nadapt_attention: block_causal\nadapt_block_length: 4\n")
    flags = ["--output_dir", str(tmp_path), "--task", "gsm8k", "--complementary_masks", "--loss_weight", "none"]
    flags += ["--bf16", "false", "--use_cpu"]
    types = (ExampleArguments, AdaptationArguments, DiffusionSFTConfig, ModelConfig)
    _, adaptation, training, _ = parse(["--config", str(file), *flags], *types)
    assert training.block_length_schedule == [[0, 1], [5, 4]]
    assert training.complementary_masks and training.loss_weight == "none"
    assert adaptation.options() == {"attention": "block_causal", "block_length": 4}
    training = parse([*flags, "--block_length_schedule", "[[0, 2]]"], *types)[2]
    assert training.block_length_schedule == [[0, 2]]
    with pytest.raises(ValueError, match="adapt_block_length=4 has no meaning without adapt_attention"):
        parse([*flags, "--adapt_block_length", "4"], *types)


# --- end to end -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attention", "settings"),
    [
        ("block_causal", {"complementary_masks": True, "loss_weight": "none", "noise_levels": "block"}),
        ("context_causal", {"block_length_schedule": [[0, 1], [40, 2], [80, 4]], "ar_loss_weight": 0.5}),
    ],
)
def test_a_causal_model_becomes_a_denoiser_that_writes(
    make_sft: Any, tmp_path: Path, attention: str, settings: dict[str, Any]
) -> None:
    tokenizer = tiny_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=tokenizer.eos_token_id, bos_token_id=None, rope_theta=100.0,
        tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Qwen2ForCausalLM(config).save_pretrained(tmp_path / "causal")
    tokenizer.mask_token = None
    tokenizer.save_pretrained(tmp_path / "causal")

    model, tokenizer = adapt_causal_lm(tmp_path / "causal", attention=attention, block_length=4)
    training = {"learning_rate": 1e-2, "optim": "adamw_torch", "max_steps": 250, "noise_floor": 0.05}
    training["lr_scheduler_type"] = "cosine"
    trainer = make_sft(model, tokenizer, eos_padding="max_length", max_length=18, **training, **settings)
    start = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < start / 2
    trainer.save_model(str(tmp_path / "denoiser"))

    model, tokenizer = load_denoiser(tmp_path / "denoiser"), load_tokenizer(tmp_path / "denoiser")
    engine = RolloutEngine(model, DiffusionSpec.of(model))
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS["prompt"]]
    rollout = engine.generate(prompts, DecodingConfig(canvas_length=12, steps=12, block_length=4))
    assert tokenizer.batch_decode(rollout.completion_ids) == [text + "<eos>" for text in TEXTS["completion"]]
