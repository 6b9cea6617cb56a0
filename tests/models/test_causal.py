"""Causal models as judges: what they say of each token is what they say of the text alone, without padding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rl4dlm.models.causal import causal_model, check_causal, judge, log_prob
from rl4dlm.models.tiny import tiny_llada
from tests.rollout.causal_models import random_causal, stock_causal

PROMPTS = [[5, 6, 7], [8], [3, 4, 5, 6, 7, 8, 3]]


def test_each_row_is_judged_as_if_it_were_alone():
    model = random_causal(9)
    canvas = torch.tensor([[3, 4, 5, 6], [7, 8, 3, 4], [1, 1, 5, 2]])
    wanted = torch.tensor([[True, False, True, True], [False, True, False, False], [True, True, False, False]])
    values = judge(model, PROMPTS, canvas, wanted, log_prob)
    assert values.shape == canvas.shape and not values[~wanted].any()
    for row, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *canvas[row].tolist()]])).logits[0]
        for slot in wanted[row].nonzero().squeeze(-1).tolist():
            own = logits[len(prompt) + slot - 1].log_softmax(-1)[canvas[row, slot]]
            torch.testing.assert_close(values[row, slot], own, rtol=0, atol=1e-12)


def test_what_lies_behind_a_token_does_not_matter():
    model, wanted = random_causal(9), torch.tensor([[True, True, False, False]])
    values = [judge(model, [[5]], torch.tensor([[3, 4, *tail]]), wanted, log_prob) for tail in ([5, 6], [8, 8])]
    assert torch.equal(*values)


def test_a_measure_sees_the_logits_and_the_token():
    canvas, wanted = torch.tensor([[3, 4]]), torch.tensor([[False, True]])
    seen = []
    judge(random_causal(9), [[5]], canvas, wanted, lambda logits, tokens: seen.append((logits.shape, tokens)) or tokens)
    assert [(tuple(shape), tokens.tolist()) for shape, tokens in seen] == [((1, 9), [4])]


def test_a_text_must_fit_the_model():
    with pytest.raises(ValueError, match="64 positions, too few for a text of 65"):
        judge(random_causal(9), [[5] * 64], torch.tensor([[3]]), torch.tensor([[True]]), log_prob)


def test_a_judge_is_causal_and_shares_the_vocabulary():
    denoiser = tiny_llada(vocab_size=9)
    check_causal(random_causal(9), denoiser)
    with pytest.raises(ValueError, match=r"11 tokens and the denoiser 9.*resize_token_embeddings\(9\)"):
        check_causal(random_causal(11), denoiser)
    with pytest.raises(ValueError, match="is a denoiser"):
        check_causal(denoiser, denoiser)


def test_a_loaded_judge_is_kept_and_in_evaluation_mode(tmp_path: Path):
    stock_causal(9).save_pretrained(tmp_path)
    model = causal_model(str(tmp_path))
    assert not model.training and causal_model(tmp_path) is model
    model.train()
    assert not causal_model(model).training
