"""M8: attention that opens up from causal to full while a model is adapted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from rl4dlm import DiffusionSFTConfig, DiffusionSFTTrainer, tiny_llada, tiny_sdar, tiny_tokenizer
from rl4dlm.likelihood.scoring import score_views
from rl4dlm.likelihood.views import Views
from rl4dlm.models.scoring import attach_scoring
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.sft.annealing import unseen_pairs
from tests.training.steps import SMALL_RUN


def test_m8_attention_is_causal_at_first_and_full_at_last() -> None:
    examples = torch.arange(200)
    first = unseen_pairs(0, examples, 0, 10, 6)
    assert first is not None and torch.equal(first, torch.ones(6, 6).triu(1).bool().expand(200, -1, -1))
    half = unseen_pairs(0, examples, 5, 10, 6)
    assert half is not None and not half[:, torch.ones(6, 6).tril().bool()].any()
    assert abs(half[:, torch.ones(6, 6).triu(1).bool()].float().mean().item() - 0.5) < 0.03
    assert unseen_pairs(0, examples, 10, 10, 6) is None and unseen_pairs(0, examples, 0, 0, 6) is None
    other = unseen_pairs(0, examples, 6, 10, 6)
    assert other is not None and not torch.equal(half, other), "drawn anew at every step"


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_m8_with_all_that_follows_hidden_the_model_is_causal(implementation: str) -> None:
    model = tiny_llada(initializer_range=0.4, dtype=torch.float64)
    model.set_attn_implementation(implementation)
    attach_scoring(model)
    spec, ids = DiffusionSpec.of(model), torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, 9, 9]])
    real = torch.ones_like(ids).bool()
    hidden = torch.tensor([[False, False, True, False, True]]).expand(2, 1, -1)
    views = Views(hidden, hidden.double())

    def scores(unseen: Any, tokens: Any = ids) -> Any:
        with torch.no_grad():
            return score_views(model, spec, tokens, real, views, unseen=unseen).log_probs[:, 0]

    causal = torch.ones(5, 5).triu(1).bool().expand(2, -1, -1)
    torch.testing.assert_close(scores(causal)[0, 2], scores(causal)[1, 2])  # what follows differs, and is not seen
    assert not torch.allclose(scores(None)[0, 2], scores(None)[1, 2])
    torch.testing.assert_close(scores(torch.zeros_like(causal)), scores(None), rtol=0, atol=1e-12)


def examples() -> Dataset:
    return Dataset.from_dict({"prompt": [f"{i}+1=" for i in range(8)], "completion": [str(i) for i in range(8)]})


def trainer(folder: Path, model: Any, **changes: Any) -> Any:
    settings = {**SMALL_RUN, "max_steps": 4, **changes}
    config = DiffusionSFTConfig(output_dir=str(folder), per_device_train_batch_size=4, **settings)
    return DiffusionSFTTrainer(model, config, examples(), examples(), tiny_tokenizer())


def test_m8_training_anneals_and_evaluation_does_not(tmp_path: Path) -> None:
    annealed = trainer(tmp_path / "a", tiny_llada(), attention_annealing_steps=3)
    plain = trainer(tmp_path / "b", tiny_llada())
    assert annealed.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    for one in (annealed, plain):
        one.train()
    losses = [[entry["loss"] for entry in one.state.log_history if "loss" in entry] for one in (annealed, plain)]
    assert losses[0][0] != losses[1][0]


def test_m8_it_leads_to_full_attention_only(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="attention_annealing_steps=3 needs attention 'full'"):
        trainer(tmp_path, tiny_sdar(), attention_annealing_steps=3)
    with pytest.raises(ValueError, match="attention_annealing_steps=-1 is not allowed"):
        DiffusionSFTConfig(output_dir=str(tmp_path), use_cpu=True, attention_annealing_steps=-1)
