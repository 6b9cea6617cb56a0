"""The tiny denoiser and its tokenizer fit each other and depend on nothing but their arguments."""

from __future__ import annotations

import string

import torch

from rl4dlm.models.loading import check_tokenizer
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.models.tiny import tiny_llada, tiny_tokenizer


def test_weights_depend_on_the_seed_alone(global_rng_untouched: None):
    first = tiny_llada(seed=3).state_dict()
    torch.randn(5, generator=torch.Generator().manual_seed(0))
    again, other = tiny_llada(seed=3).state_dict(), tiny_llada(seed=4).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_model_and_tokenizer_fit():
    model, tokenizer = tiny_llada(), tiny_tokenizer()
    spec = DiffusionSpec.of(model)
    check_tokenizer(tokenizer, spec)
    assert model.config.vocab_size == len(tokenizer)
    assert spec.eos_token_ids == (tokenizer.eos_token_id,)
    assert len({tokenizer.mask_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3


def test_attention_is_bidirectional():
    model = tiny_llada(initializer_range=0.4)
    ids = torch.tensor([[5, 6, 7, 8]])
    changed = ids.clone()
    changed[0, -1] = 20
    with torch.no_grad():
        difference = (model(input_ids=ids).logits - model(input_ids=changed).logits).abs().amax(-1)[0]
    assert bool((difference > 1e-4).all())


def test_text_is_one_token_per_character_and_comes_back():
    tokenizer = tiny_tokenizer()
    text = "".join(c for c in string.printable if c not in "\t\r\x0b\x0c") + "  12 + 3 = 15\n\n"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text) and tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids and tokenizer("é")["input_ids"] == [tokenizer.unk_token_id]


def test_special_tokens_are_dropped_from_completions():
    tokenizer = tiny_tokenizer()
    ids = [*tokenizer("4")["input_ids"], tokenizer.mask_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "4"


def test_a_chat_prompt_is_the_beginning_of_the_chat():
    tokenizer = tiny_tokenizer()
    user, assistant = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
    prompt = tokenizer.apply_chat_template([user], add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template([user, assistant], tokenize=False)
    assert whole == prompt + "4<eos>"
    assert len(tokenizer(prompt)["input_ids"]) == len("2+2?") + 3
