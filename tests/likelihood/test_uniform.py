"""Likelihoods under uniform noise: the bound by enumeration, scores against plain logits, and a trainer that learns."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor

from rl4dlm.algorithms.diffu_grpo import DiffuGRPOConfig, DiffuGRPOTrainer
from rl4dlm.likelihood.mean_field import MeanField
from rl4dlm.likelihood.scoring import score_views
from rl4dlm.likelihood.uniform import UniformELBO, UniformMeanField
from rl4dlm.likelihood.views import Rows
from rl4dlm.models.loading import load_denoiser, save_denoiser
from rl4dlm.models.scoring import attach_scoring
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.models.tiny import tiny_diffusion_gemma, tiny_tokenizer
from tests.training.steps import SMALL_RUN

quiet = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
TOKENS, LENGTH = 3, 3


@pytest.fixture(scope="module")
def table() -> Tensor:
    """log D_i(v | canvas), float64 `[canvases, positions, tokens]`: a denoiser that is any function of its canvas."""
    logits = torch.randn(TOKENS**LENGTH, LENGTH, TOKENS, generator=torch.Generator().manual_seed(0)).double()
    return logits.mul(1.5).log_softmax(-1)


def index(canvas: Tensor) -> Tensor:
    """The number of a canvas `[..., LENGTH]` in the table."""
    return (canvas * TOKENS ** torch.arange(LENGTH)).sum(-1)


def bound(table: Tensor, x: tuple[int, ...]) -> float:
    """E over orders and canvases of random tokens of the sum of log-probabilities, by enumeration."""
    total = 0.0
    for order in itertools.permutations(range(LENGTH)):
        for u in itertools.product(range(TOKENS), repeat=LENGTH):
            for done in range(LENGTH):
                canvas = torch.tensor([x[i] if i in order[:done] else u[i] for i in range(LENGTH)])
                total += float(table[index(canvas), order[done], x[order[done]]])
    return total / math.factorial(LENGTH) / TOKENS**LENGTH


def log_likelihood(table: Tensor, x: tuple[int, ...], fresh: bool) -> float:
    """log p(x) when positions are written in random order, with one canvas of random tokens or a fresh one per step."""
    canvases = list(itertools.product(range(TOKENS), repeat=LENGTH))
    total = 0.0
    for order in itertools.permutations(range(LENGTH)):
        steps = torch.ones(len(canvases), LENGTH, dtype=torch.float64)
        for n, u in enumerate(canvases):
            for done in range(LENGTH):
                canvas = torch.tensor([x[i] if i in order[:done] else u[i] for i in range(LENGTH)])
                steps[n, done] = table[index(canvas), order[done], x[order[done]]].exp()
        total += float(steps.mean(0).prod() if fresh else steps.prod(1).mean()) / math.factorial(LENGTH)
    return math.log(total)


def rows_of(x: tuple[int, ...], count: int, valid: int = LENGTH) -> Rows:
    canvas = torch.tensor([x]).expand(count, -1)
    real = (torch.arange(len(x)) < valid).expand(count, -1)
    return Rows(torch.zeros(count, 1, dtype=torch.long), torch.ones(count, 1), canvas, real, torch.arange(count))


def table_scores(table: Tensor, estimator: Any, rows: Rows) -> Tensor:
    """Scores `[B, L]` under the table."""
    views = estimator.draw(rows, seed=0, iteration=0)
    canvas = views.apply(rows.ids, None)[..., 1:]  # [B, K, L]
    targets = rows.canvas_ids[:, None, :, None].expand(*canvas.shape, 1)
    return estimator.reduce(table[index(canvas)].gather(-1, targets)[..., 0], views)


@pytest.mark.parametrize("x", [(0, 1, 2), (2, 2, 0)])
def test_the_bound_is_one_and_scores_are_unbiased_for_it(table: Tensor, x: tuple[int, ...]) -> None:
    expected = bound(table, x)
    assert expected < min(log_likelihood(table, x, fresh=False), log_likelihood(table, x, fresh=True))
    for num_views in (1, 3):
        estimator = UniformELBO(vocabulary_size=TOKENS, block_length=LENGTH, num_views=num_views, scope="canvas")
        sums = table_scores(table, estimator, rows_of(x, 20000)).sum(-1)
        assert abs(float(sums.mean()) - expected) < 4 * float(sums.std()) / math.sqrt(len(sums))


def test_a_mean_field_is_the_average_over_canvases_of_random_tokens(table: Tensor) -> None:
    x, estimator = (0, 1, 2), UniformMeanField(vocabulary_size=TOKENS, p_mask_prompt=0.0)
    scores = table_scores(table, estimator, rows_of(x, 20000))
    expected = table.mean(0)[torch.arange(LENGTH), torch.tensor(x)]
    assert bool(((scores.mean(0) - expected).abs() < 4 * scores.std(0) / math.sqrt(len(scores))).all())


def test_levels_are_drawn_per_canvas_and_uniform() -> None:
    estimator = UniformELBO(vocabulary_size=5, block_length=4, scope="canvas")
    views = estimator.draw(rows_of((0,) * 8, 8000, valid=8), seed=0, iteration=0)
    counts = views.hidden[:, 0, 1:].view(-1, 2, 4).sum(-1)  # [B, blocks]
    pairs = torch.bincount((counts[:, 0] - 1) * 4 + counts[:, 1] - 1, minlength=16).double()
    assert len(pairs) == 16 and float(((pairs - 500) ** 2 / 500).sum()) < 37.7  # chi-square, 15 degrees, p = 0.001
    torch.testing.assert_close(views.weight[:, 0].view(-1, 2, 4).sum(-1), torch.full((8000, 2), 4.0))
    assert not views.hidden[:, 0, 0].any() and torch.equal(views.weight[:, 0] > 0, views.hidden[:, 0, 1:])


def test_what_is_behind_the_end_is_replaced_but_not_scored() -> None:
    for estimator in (UniformELBO(vocabulary_size=5, block_length=4), UniformMeanField(vocabulary_size=5)):
        views = estimator.draw(rows_of((0,) * 8, 50, valid=5), seed=0, iteration=0)
        assert bool((views.weight[..., 5:] == 0).all()) and bool(views.hidden[..., 6:].any())


@pytest.mark.parametrize(
    "estimator",
    [
        UniformMeanField(vocabulary_size=90, p_mask_prompt=0.5),
        UniformELBO(vocabulary_size=90, block_length=4, num_views=2),
    ],
    ids=["mean field", "bound"],
)
def test_views_depend_on_row_and_iteration_alone(estimator: Any) -> None:
    narrow = rows_of((3,) * 8, 6, valid=8)
    wide = Rows(
        torch.nn.functional.pad(narrow.prompt_ids, (5, 0)),
        torch.nn.functional.pad(narrow.prompt_mask, (5, 0)),
        narrow.canvas_ids,
        narrow.valid,
        narrow.row_ids,
    )
    one = estimator.draw(narrow, seed=0, iteration=1)
    for other, columns in (
        (estimator.draw(wide, seed=0, iteration=1), 5),
        (estimator.draw(narrow[torch.arange(5, -1, -1)], seed=0, iteration=1)[torch.arange(5, -1, -1)], 0),
    ):
        assert torch.equal(one.hidden, other.hidden[..., columns:])
        assert torch.equal(one.ids, other.ids[..., columns:])
    assert estimator.fresh
    for seed, iteration in ((0, 2), (1, 1)):
        assert not torch.equal(one.ids, estimator.draw(narrow, seed=seed, iteration=iteration).ids)


# --- the model --------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_plain_forwards_without_padding() -> None:
    """Two canvases, prompts of different lengths; the second canvas sees the clean first one, and a replaced prompt."""
    model = tiny_diffusion_gemma(initializer_range=0.3)
    vocabulary = model.config.text_config.vocab_size
    generator = torch.Generator().manual_seed(0)
    canvas = torch.randint(0, vocabulary, (2, 8), generator=generator)
    prompt = torch.randint(0, vocabulary, (2, 11), generator=generator)
    mask = torch.ones(2, 11)
    mask[0, :8] = 0
    rows = Rows(prompt, mask, canvas, torch.ones(2, 8), torch.tensor([3, 9]))
    before = getattr(model.config, "is_causal", None)
    attach_scoring(model)
    for estimator in (
        UniformMeanField(vocabulary_size=vocabulary, p_mask_prompt=0.5),
        UniformELBO(vocabulary_size=vocabulary, block_length=4, num_views=3),
    ):
        views = estimator.draw(rows, seed=0, iteration=0)
        found = score_views(
            model, DiffusionSpec.of(model), rows.ids, rows.attention_mask, views, temperature=0.7
        ).log_probs
        noisy = views.apply(rows.ids, None)
        for row, view, first in itertools.product(range(2), range(views.hidden.shape[1]), (0, 4)):
            prefix = torch.cat([noisy[row, view, :11][mask[row].bool()], canvas[row, :first]])
            logits = model(
                input_ids=prefix[None], decoder_input_ids=noisy[row, view, 11 + first : 15 + first][None]
            ).logits[0]
            target = canvas[row, first : first + 4, None]
            expected = (logits / 0.7).log_softmax(-1).gather(-1, target)[:, 0]
            scored = views.scored[row, view, first : first + 4]
            torch.testing.assert_close(found[row, view, first : first + 4], expected * scored, atol=2e-5, rtol=0)
    assert getattr(model.config, "is_causal", None) == before


def test_what_has_no_meaning_is_refused() -> None:
    model = attach_scoring(tiny_diffusion_gemma())
    spec, rows = DiffusionSpec.of(model), rows_of((5,) * 4, 1, valid=4)
    random = UniformMeanField(vocabulary_size=90).draw(rows, seed=0, iteration=0)
    with pytest.raises(ValueError, match="cfg_scale=1.0"):
        score_views(model, spec, rows.ids, rows.attention_mask, random, cfg_scale=1.0)
    with pytest.raises(ValueError, match="has none; its noise is random"):
        masks = MeanField().draw(rows, seed=0, iteration=0)
        score_views(model, spec, rows.ids, rows.attention_mask, masks)
    odd = rows_of((5,) * 6, 1, valid=6)
    with pytest.raises(ValueError, match="whole canvases of 4 tokens"):
        views = UniformMeanField(vocabulary_size=90).draw(odd, seed=0, iteration=0)
        score_views(model, spec, odd.ids, odd.attention_mask, views)
    with pytest.raises(ValueError, match="not made of canvases of 4"):
        UniformELBO(vocabulary_size=90, block_length=4).draw(odd, seed=0, iteration=0)
    with pytest.raises(ValueError, match="num_views=0"):
        UniformELBO(vocabulary_size=90, block_length=4, num_views=0)


# --- the trainer ------------------------------------------------------------------------------------------------------


class Recording(DiffuGRPOTrainer):
    """Keeps what the loss was computed from."""

    seen: list[dict[str, Any]]

    def loss(self, scores: Any, batch: dict[str, Any]) -> Tensor:
        names = ("completion_mask", "old_per_token_logps", "ref_per_token_logps")
        keep = {name: batch[name].clone() for name in names if name in batch}
        self.seen = [*getattr(self, "seen", []), {**keep, "scores": scores.log_probs.detach().clone()}]
        return super().loss(scores, batch)


def reward(completions: list[str], **columns: Any) -> list[float]:
    """The share of lower-case letters."""
    return [sum(c.islower() for c in text) / 4 for text in completions]


def trainer_of(folder: Path, peft: Any = None, kind: type = Recording, **changes: Any) -> Recording:
    settings = {
        "output_dir": str(folder),
        "max_completion_length": 8,
        "schedule": "entropy_bound_canvas",
        "schedule_args": {"max_steps": 4, "entropy_bound": 4.0},
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "num_iterations": 2,
        **SMALL_RUN,
        "activation_checkpointing": True,
        "learning_rate": 0.05,
        "model_init_kwargs": {"dtype": "float32"},
        **changes,
    }
    prompts = Dataset.from_dict({"prompt": ["abc1", "de2", "fghi34", "j"]})
    save_denoiser(tiny_diffusion_gemma(initializer_range=0.1), folder / "base")
    return kind(
        str(folder / "base"),
        reward,
        DiffuGRPOConfig(**settings),
        prompts,
        processing_class=tiny_tokenizer(),
        peft_config=peft,
    )


@quiet
@pytest.mark.parametrize("estimator", ["mean field", "bound"])
@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_the_first_step_has_ratio_one_and_no_divergence(tmp_path: Path, peft: bool, estimator: str) -> None:
    adapter = LoraConfig(r=2, target_modules=r".*decoder.*self_attn\.(q|o)_proj") if peft else None
    trainer = trainer_of(tmp_path, adapter)
    assert isinstance(trainer.estimator, UniformMeanField)
    if estimator == "bound":
        trainer.estimator = UniformELBO(vocabulary_size=trainer.estimator.vocabulary_size, block_length=4)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    first, second = trainer.seen
    mask = first["completion_mask"].bool()
    for policy in ("old_per_token_logps", "ref_per_token_logps"):
        torch.testing.assert_close(first[policy][mask], first["scores"][mask], rtol=0, atol=1e-6)
        assert float((second[policy][mask] - second["scores"][mask]).abs().max()) > 1e-6, "the policy has moved"
    logs = [entry for entry in trainer.state.log_history if "kl" in entry]
    assert logs[0]["kl"] == pytest.approx(0, abs=1e-7) and logs[1]["kl"] > 0
    assert logs[0]["clip_ratio/region_mean"] == 0 and logs[0]["grad_norm"] > 0
    changed = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all("lora" in name for name in changed) is peft

    trainer.save_model(str(tmp_path / "trained"))
    trained, loaded = trainer.accelerator.unwrap_model(trainer.model).eval(), load_denoiser(tmp_path / "trained").eval()
    inputs = {"input_ids": torch.tensor([[7, 8, 9]]), "decoder_input_ids": torch.tensor([[5, 6, 7, 8]])}
    assert torch.equal(loaded(**inputs).logits, trained(**inputs).logits)


@quiet
def test_what_does_not_fit_the_noise_is_refused_before_training(tmp_path: Path) -> None:
    class Masking(Recording):
        def build_estimator(self) -> MeanField:
            return MeanField()

    with pytest.raises(ValueError, match=r"Masking .*noise='mask', but this one has noise='uniform'"):
        trainer_of(tmp_path, kind=Masking)
    with pytest.raises(ValueError, match="schedule='low_confidence'.*choose one of entropy_bound_canvas"):
        trainer_of(tmp_path, schedule="low_confidence", schedule_args=None)
    with pytest.raises(ValueError, match="max_completion_length=6 is not a multiple of the 4 tokens"):
        trainer_of(tmp_path, max_completion_length=6)


@quiet
def test_it_learns(tmp_path: Path) -> None:
    trainer = trainer_of(
        tmp_path, max_completion_length=4, max_steps=24, learning_rate=5e-3, optim="adamw_torch", beta=0.0,
        num_generations=8, per_device_train_batch_size=16, num_iterations=1, schedule_args={"max_steps": 3},
    )  # fmt: skip
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.2
