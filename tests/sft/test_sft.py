"""Masked SFT: its loss against plain cross-entropy and the exact bound, its data, and what it must not depend on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM

from rl4dlm import DecodingConfig, evaluate, load_task
from rl4dlm.likelihood.scoring import score_views
from rl4dlm.likelihood.views import Views
from rl4dlm.models.loading import load_denoiser, save_denoiser
from rl4dlm.models.tiny import tiny_diffusion_gemma, tiny_llada, tiny_llada_moe, tiny_tokenizer
from rl4dlm.sft.trainer import DiffusionSFTConfig, DiffusionSFTTrainer
from tests.training.steps import SMALL_RUN

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

TEXTS = {"prompt": [f"say {c}:" for c in "abcdefgh"], "completion": [c * (i + 1) for i, c in enumerate("abcdefgh")]}
CHATS = {
    "prompt": [[{"role": "user", "content": f"say {c}"}] for c in "abcdefgh"],
    "completion": [[{"role": "assistant", "content": c * (i + 1)}] for i, c in enumerate("abcdefgh")],
}


@pytest.fixture
def make_sft(tmp_path: Path) -> Callable[..., Any]:
    def make(
        data: Any = TEXTS,
        *,
        model: Any = None,
        eval_dataset: Any = None,
        peft_config: Any = None,
        tokenizer: Any = None,
        folder: Path = tmp_path / "sft",
        **changes: Any,
    ) -> Any:
        settings = {
            "output_dir": str(folder),
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 8,
            "max_length": 24,
            **SMALL_RUN,
            **changes,
        }
        return DiffusionSFTTrainer(
            tiny_llada() if model is None else model,
            DiffusionSFTConfig(**settings),
            Dataset.from_dict(data) if isinstance(data, dict) else data,
            Dataset.from_dict(eval_dataset) if isinstance(eval_dataset, dict) else eval_dataset,
            tiny_tokenizer() if tokenizer is None else tokenizer,
            peft_config=peft_config,
        )

    return make


def batch_of(trainer: Any, rows: Any = None) -> dict[str, Tensor]:
    return trainer.data_collator([trainer.train_dataset[i] for i in (rows or range(len(trainer.train_dataset)))])


def plain_log_probs(trainer: Any, batch: dict[str, Tensor], hidden: Tensor) -> Tensor:
    """`[B, T]`, from the model's own logits."""
    noised = torch.where(hidden, trainer.spec.mask_token_id, batch["input_ids"])
    logits = trainer.model(input_ids=noised, attention_mask=batch["attention_mask"]).logits
    return logits.log_softmax(-1).gather(-1, batch["input_ids"][..., None]).squeeze(-1)


# --- the loss ---------------------------------------------------------------------------------------------------------


def test_at_level_one_it_is_the_mean_cross_entropy_of_the_completion(make_sft: Any) -> None:
    trainer = make_sft(noise_floor=1.0)
    trainer.model.train()
    batch = batch_of(trainer)
    targets = batch["labels"] != -100
    expected = -plain_log_probs(trainer, batch, targets)[targets].mean()
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), expected, rtol=0, atol=1e-6)


def test_the_loss_is_the_sum_of_hidden_cross_entropies_over_t_per_target(make_sft: Any) -> None:
    trainer = make_sft()
    trainer.model.train()
    batch = batch_of(trainer)
    views = trainer.draw(batch)
    hidden, weight = views.hidden[:, 0], views.weight[:, 0]
    for row in range(8):
        levels = weight[row][hidden[row]].unique()
        assert len(levels) <= 1 and (levels >= 1).all() and (levels <= 1e3).all(), "one level per row"
    losses = -(weight * plain_log_probs(trainer, batch, hidden)).sum() / (batch["labels"] != -100).sum()
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), losses, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["block_causal", "context_causal"])
@pytest.mark.parametrize("origin", ["response", "position_zero"])
def test_blocks_are_those_of_decoding(make_sft: Any, kind: str, origin: str) -> None:
    """Each row alone, its prompt apart from its completion as in RL, gives the loss of the padded batch."""
    model = tiny_llada(initializer_range=0.3, dtype=torch.float64)
    model.config.diffusion.update(attention=kind, grid_origin=origin, block_length=4)
    data = {"prompt": ["a:", "say b:", "ccc:", "d" * 7], "completion": ["1234567", "12", "123456", "1"]}
    trainer = make_sft(data, model=model)
    batch = batch_of(trainer)
    views, expected = trainer.draw(batch), torch.zeros((), dtype=torch.float64)
    for row, prompt in enumerate(data["prompt"]):
        real = int(batch["attention_mask"][row].sum())
        alone = Views(views.hidden[row, None, :, :real], views.weight[row, None, :, len(prompt) : real])
        scores = score_views(trainer.model, trainer.spec, *(batch[k][row, None, :real] for k in KEYS), alone)
        expected -= (alone.weight * scores.log_probs).sum()
    expected /= (batch["labels"] != -100).sum()
    assert int(views.hidden.sum()) > 5
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch).double(), expected, rtol=1e-6, atol=0)


KEYS = ("input_ids", "attention_mask")


def test_prompt_and_padding_are_never_hidden_and_targets_are_at_their_level(make_sft: Any) -> None:
    trainer = make_sft()
    trainer.model.train()
    batch = batch_of(trainer)
    targets = batch["labels"] != -100
    shares, levels = [], []
    for step in range(400):
        trainer.state.global_step = step
        views = trainer.draw(batch)
        assert not views.hidden[:, 0][~targets].any() and not views.weight[:, 0][~targets].any()
        shares.append((views.hidden[:, 0] & targets).sum().item() / targets.sum().item())
        levels += (1 / views.weight[views.hidden.nonzero(as_tuple=True)]).unique().tolist()
    assert abs(sum(shares) / len(shares) - 0.5) < 0.03, "E[t] = 1/2"
    assert min(levels) > 0 and max(levels) <= 1


def test_its_expectation_is_the_evidence_lower_bound(make_sft: Any) -> None:
    # Exact: the bound is the average over orders of the log-probability of writing one token at a time.
    data = {"prompt": ["q"], "completion": ["xy"]}
    trainer = make_sft(data, per_device_train_batch_size=1, noise_floor=1e-3)
    trainer.model.train()
    batch = batch_of(trainer)
    (places,) = (batch["labels"][0] != -100).nonzero(as_tuple=True)
    length = len(places)
    assert length == 3

    table: dict[tuple[int, ...], Tensor] = {(): torch.zeros(length)}
    with torch.no_grad():
        for count in range(1, length + 1):
            for mask in itertools.combinations(range(length), count):
                hidden = torch.zeros_like(batch["labels"], dtype=torch.bool)
                hidden[0, places[list(mask)]] = True
                table[mask] = plain_log_probs(trainer, batch, hidden)[0, places]
    bound = 0.0
    for order in itertools.permutations(range(length)):
        for step, position in enumerate(order):
            bound += table[tuple(sorted(order[step:]))][position].item() / math.factorial(length)

    # The estimator, over many examples with the same text: each draw's loss is looked up instead of computed.
    count = 100_000
    many = {name: value.expand(count, *value.shape[1:]) for name, value in batch.items()}
    views = trainer.draw(many | {"example_id": torch.arange(count)})
    weight = views.weight[:, 0, places]
    found = torch.stack([table[tuple(row.nonzero().squeeze(-1).tolist())] for row in views.hidden[:, 0, places]])
    losses = -(weight * found).sum(-1)
    standard_error = losses.std().item() / math.sqrt(count)
    assert standard_error < 0.15
    assert abs(losses.mean().item() + bound) < 4 * standard_error


# --- the data ---------------------------------------------------------------------------------------------------------


def test_the_prompt_ends_with_the_assistants_header(make_sft: Any) -> None:
    trainer = make_sft(CHATS)
    tokenizer = tiny_tokenizer()
    for row in trainer.train_dataset:
        ids, labels = row["input_ids"], row["labels"]
        start = labels.index(next(label for label in labels if label != -100))
        header = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
        assert ids[:start] == header
        assert labels[start:] == ids[start:]
        assert tokenizer.decode(ids[start:]) == row["completion"][0]["content"] + "<eos>"


def test_a_prompt_that_is_no_prefix_of_its_rendering_is_refused(make_sft: Any) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>thinking{% endif %}"
    )
    with pytest.raises(ValueError, match="not a prefix of those of prompt and completion"):
        make_sft(CHATS, tokenizer=tokenizer)


def test_padding_is_hidden_or_a_target_as_the_setting_says(make_sft: Any) -> None:
    eos = tiny_tokenizer().eos_token_id
    lengths = [len(f"say {c}:") + i + 2 for i, c in enumerate("abcdefgh")]
    for setting, width in (("none", max(lengths)), ("longest", max(lengths)), ("max_length", 24)):
        trainer = make_sft(eos_padding=setting)
        batch = batch_of(trainer)
        assert batch["input_ids"].shape == (8, width)
        for row, length in enumerate(lengths):
            filled = batch["input_ids"][row, length:]
            if setting == "none":
                assert not batch["attention_mask"][row, length:].any()
                assert (batch["labels"][row, length:] == -100).all()
            else:
                assert batch["attention_mask"][row].all()
                assert (filled == eos).all() and (batch["labels"][row, length:] == eos).all()
        assert (batch["labels"][:, :6] == -100).all(), "the prompt is no target"


def test_text_without_a_prompt_is_all_target(make_sft: Any) -> None:
    trainer = make_sft({"text": ["abc", "de"]})
    assert [row["labels"] for row in trainer.train_dataset] == [row["input_ids"] for row in trainer.train_dataset]


def test_text_with_the_mask_token_is_refused(make_sft: Any) -> None:
    trainer = make_sft({"prompt": ["a"], "completion": ["b<mask>"]}, per_device_train_batch_size=1)
    with pytest.raises(ValueError, match="example 0 contains the mask token"):
        trainer.train()


def test_what_needs_logits_is_refused(make_sft: Any) -> None:
    trainer = make_sft()
    with pytest.raises(ValueError, match="return_outputs"):
        trainer.compute_loss(trainer.model, batch_of(trainer), return_outputs=True)
    with pytest.raises(TypeError, match="compute_metrics is not supported"):
        DiffusionSFTTrainer(tiny_llada(), trainer.args, trainer.train_dataset, compute_metrics=print)


def test_a_model_without_masks_is_refused_before_data_are_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not offered for models with noise='uniform'"):
        DiffusionSFTTrainer(
            tiny_diffusion_gemma(),
            DiffusionSFTConfig(output_dir=str(tmp_path), **SMALL_RUN),
            None,
            None,
            tiny_tokenizer(),
        )


# --- what it must not depend on ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [(4, 2), (2, 4)])
def test_splitting_a_batch_into_micro_batches_changes_nothing(
    make_sft: Any, losses: Any, split: tuple[int, int]
) -> None:
    whole, parts = make_sft(max_steps=3), None
    whole.train()
    parts = make_sft(max_steps=3, per_device_train_batch_size=split[0], gradient_accumulation_steps=split[1])
    parts.train()
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-5)
    for (name, a), b in zip(whole.model.named_parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6, msg=name)


def test_masks_depend_on_seed_example_and_step_alone(make_sft: Any) -> None:
    trainer = make_sft()
    trainer.model.train()
    batch = batch_of(trainer)
    views = trainer.draw(batch)
    order = torch.tensor([5, 2, 7, 0, 1, 3, 6, 4])
    shuffled = trainer.draw({name: value[order] for name, value in batch.items()})
    assert torch.equal(shuffled.hidden, views.hidden[order]) and torch.equal(shuffled.weight, views.weight[order])
    trainer.state.global_step = 1
    assert not torch.equal(trainer.draw(batch).hidden, views.hidden)


def test_loss_leaves_the_global_random_state_alone(sft_batch: Any, global_rng_untouched: None) -> None:
    trainer, batch = sft_batch
    trainer.compute_loss(trainer.model, batch).backward()


@pytest.fixture
def sft_batch(make_sft: Any) -> tuple[Any, dict[str, Tensor]]:
    trainer = make_sft()
    trainer.model.train()
    return trainer, batch_of(trainer)


def test_resuming_repeats_the_remaining_losses(make_sft: Any, losses: Any, tmp_path: Path) -> None:
    options = {"max_steps": 5, "per_device_train_batch_size": 4, "save_steps": 1}
    unbroken = make_sft(save_strategy="steps", **options)
    unbroken.train()
    for step in (1, 2, 4):
        trainer = make_sft(folder=tmp_path / "again", **options)
        trainer.train(resume_from_checkpoint=str(tmp_path / "sft" / f"checkpoint-{step}"))
        assert losses(trainer) == losses(unbroken)


# --- training ---------------------------------------------------------------------------------------------------------


def test_evaluation_is_on_a_fixed_grid_of_levels(make_sft: Any) -> None:
    trainer = make_sft(eval_dataset=TEXTS)
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first["eval_loss"] == second["eval_loss"]
    batch = trainer.data_collator([trainer.eval_dataset[i] for i in range(8)])
    trainer.model.eval()
    views = trainer.draw(batch)
    for i in range(8):
        level = 1e-3 + (1 - 1e-3) * (i + 0.5) / 8
        weights = views.weight[i][views.hidden[i]]
        torch.testing.assert_close(weights, torch.full_like(weights, 1 / level))
    stream = IterableDataset.from_generator(lambda: ({"prompt": p, "completion": "x"} for p in "ab"))
    with pytest.raises(ValueError, match="eval_dataset needs a length"):
        make_sft(eval_dataset=stream).evaluate()


def test_full_and_adapter_training_lower_the_loss(make_sft: Any) -> None:
    lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM")
    for peft_config in (None, lora):
        trainer = make_sft(
            max_steps=30, optim="adamw_torch", learning_rate=1e-2, eval_dataset=TEXTS, peft_config=peft_config
        )
        start = trainer.evaluate()["eval_loss"]
        frozen = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
        trainer.train()
        assert trainer.evaluate()["eval_loss"] < start - 0.2
        assert all(torch.equal(p, frozen[n]) for n, p in trainer.model.named_parameters() if n in frozen)
        assert bool(frozen) is (peft_config is not None)
        logged = trainer.state.log_history[1]
        assert {"loss", "entropy", "diffusion/masked_nll", "num_tokens"} <= logged.keys()


def test_a_published_folder_brings_its_tokenizer(make_sft: Any, tmp_path: Path) -> None:
    save_denoiser(tiny_llada(), tmp_path / "hub", form="hub")
    tiny_tokenizer().save_pretrained(tmp_path / "hub")
    plain = tiny_llada()
    spec = plain.config.__dict__.pop("diffusion")
    plain.save_pretrained(tmp_path / "plain")
    tiny_tokenizer().save_pretrained(tmp_path / "plain")
    in_memory = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    in_memory.config.diffusion = spec
    for model in (str(tmp_path / "hub"), load_denoiser(tmp_path / "hub"), in_memory):
        trainer = DiffusionSFTTrainer(model, make_sft().args, Dataset.from_dict(TEXTS))
        assert trainer.processing_class.get_vocab() == tiny_tokenizer().get_vocab()
        assert trainer.processing_class.mask_token_id == trainer.spec.mask_token_id


def test_an_adapter_that_misses_what_it_names_is_refused(make_sft: Any, tmp_path: Path) -> None:
    save_denoiser(tiny_llada_moe(), tmp_path / "mixture")
    for model in (str(tmp_path / "mixture"), tiny_llada_moe()):
        with pytest.raises(ValueError, match="names up_proj"):
            make_sft(model=model, peft_config=LoraConfig(target_modules=["up_proj"]))


def test_the_end_token_is_trained_where_it_also_pads(make_sft: Any) -> None:
    model, tokenizer = tiny_llada(pad_token_id=1, eos_token_id=1), tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    trainer = make_sft(model=model, tokenizer=tokenizer, noise_floor=0.5)
    trainer.compute_loss(trainer.model, batch_of(trainer)).backward()
    assert trainer.model.get_input_embeddings().weight.grad[1].abs().max() > 0


def test_a_path_and_a_stream_train_too(make_sft: Any, tmp_path: Path) -> None:
    save_denoiser(tiny_llada(), tmp_path / "model", tiny_tokenizer())
    stream = IterableDataset.from_generator(
        lambda: ({"prompt": f"{i}", "completion": "x" * (i % 5 + 1)} for i in range(32))
    )
    trainer = make_sft(stream, model=str(tmp_path / "model"))
    trainer.train()
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)


def test_an_exact_check_is_made_at_each_evaluation(make_sft: Any) -> None:
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "do_eval": True}
    trainer = make_sft(eval_dataset=TEXTS, **evaluated)
    task, decoding = load_task("few_clue_sudoku", size=5), DecodingConfig(canvas_length=16)
    trainer.check_exactly(task, decoding, steps=(4, 16))
    trainer.train()
    found = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(found) == 2 and all(0 <= entry["eval_solved_at_16"] <= 1 for entry in found)
    assert found[-1]["eval_unjudged"] == 0
    decodings = {steps: DecodingConfig(canvas_length=16, steps=steps) for steps in (4, 16)}
    measured = evaluate(
        trainer.model, tiny_tokenizer(), task, decodings=decodings, split="validation", seed=trainer.args.seed
    ).measurements
    for label, each in measured.items():
        assert found[-1][f"eval_solved_at_{label}"] == each.solve_rate
        assert found[-1][f"eval_tokens_per_forward_at_{label}"] == pytest.approx(each.tokens_per_forward)
    with pytest.raises(ValueError, match="eval_strategy is 'no'"):
        make_sft().check_exactly(task, decoding)
