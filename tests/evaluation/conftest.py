"""A denoiser whose distribution is chosen by the test, and a task with one-letter answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from datasets import Dataset

from rl4dlm.models.tiny import tiny_llada, tiny_tokenizer
from rl4dlm.tasks import Task


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def constant_model(tokenizer) -> Callable[[Mapping[str, float]], Any]:
    """Makes a denoiser that gives every masked slot the same distribution, whatever it reads."""

    def make(probabilities: Mapping[str, float]) -> Any:
        model = tiny_llada()
        with torch.no_grad():
            # Layers add nothing and every embedding is e_0, so the head reads sqrt(d) * e_0 at every position.
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
            model.model.embed_tokens.weight.zero_()
            model.model.embed_tokens.weight[:, 0] = 1.0
            model.lm_head.weight.zero_()
            model.lm_head.weight[:, 0] = -40.0
            for token, probability in probabilities.items():
                logit = torch.tensor(probability).log()
                model.lm_head.weight[tokenizer.convert_tokens_to_ids(token), 0] = logit
            model.lm_head.weight /= model.config.hidden_size**0.5
        return model

    return make


@dataclass
class Letters(Task):
    """Asks for a text; `None` as the answer stands for a row that says too little."""

    prompts: list[Any]
    answers: list[str | None]
    name = "letters"

    def dataset(self, split: str) -> Dataset:
        return super().dataset(split) if self.prompts else Dataset.from_dict({"prompt": []})

    def _rows(self, split: str) -> list[dict[str, Any]]:
        return [{"prompt": p, "answer": a} for p, a in zip(self.prompts, self.answers, strict=True)]

    def check(self, completion: str, row: Mapping[str, Any]) -> bool | None:
        return None if row["answer"] is None else completion == row["answer"]


@pytest.fixture
def letters() -> type[Letters]:
    return Letters
