"""`attach_scoring` against the plain logits: values, gradients, padding, guidance, chunks, and what it refuses."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from rl4dlm.models import scoring
from rl4dlm.models.scoring import TokenScores, attach_scoring
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.models.tiny import tiny_llada
from tests.models.float64 import exactly_float64

VOCAB, MASK = 24, 2


def denoiser(shift: int = 0, **settings: Any) -> LlamaForCausalLM:
    model = tiny_llada(**{"vocab_size": VOCAB, "initializer_range": 0.4, "dtype": torch.float64, **settings})
    model.config.diffusion["logit_shift"] = shift
    return attach_scoring(exactly_float64(model) if model.dtype == torch.float64 else model)


def batch(rows: int = 3, width: int = 9, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(0, VOCAB, (rows, width), generator=generator),
        "score_positions": torch.rand(rows, width, generator=generator) < 0.4,
        "score_targets": torch.randint(0, VOCAB, (rows, width), generator=generator),
    }


def naive(
    model: PreTrainedModel, inputs: dict[str, Tensor], *, shift: int = 0, temperature: float = 1.0, cfg: float = 0.0
) -> TokenScores:
    """Log-probabilities and entropies from the model's own logits, by the definition."""
    logits = model(input_ids=inputs["input_ids"]).logits
    if shift:
        logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
    positions = inputs["score_positions"]
    if cfg:
        conditional, unconditional = logits.chunk(2)
        logits = unconditional + (cfg + 1) * (conditional - unconditional)
    log_probs = (logits / temperature).log_softmax(-1)[positions]
    chosen = log_probs.gather(-1, inputs["score_targets"][positions][:, None])[:, 0]
    return TokenScores(chosen, -(log_probs.exp() * log_probs).sum(-1))


def gradients(model: torch.nn.Module, scores: TokenScores) -> dict[str, Tensor]:
    """Of a sum in which every entry has a weight of its own."""
    model.zero_grad()
    weights = torch.linspace(-1, 2, len(scores.log_probs), dtype=scores.log_probs.dtype)
    ((scores.log_probs + 0.5 * scores.entropies) * weights).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same(model: torch.nn.Module, found: TokenScores, expected: TokenScores, tolerance: float = 1e-12) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)
    mine, theirs = gradients(model, found), gradients(model, expected)
    for name, gradient in theirs.items():
        torch.testing.assert_close(mine[name], gradient, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("shift", "temperature", "cfg"), list(itertools.product([0, 1], [1.0, 0.6], [0.0, 1.5])))
def test_scores_and_gradients_are_those_of_the_plain_logits(shift: int, temperature: float, cfg: float):
    model, inputs = denoiser(shift), batch()
    if shift:
        inputs["score_positions"][0, 0] = True  # there is no row before it: the first one predicts it
    if cfg:
        other = torch.where(torch.arange(9) < 4, MASK, inputs["input_ids"])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], other])
    found = model(**inputs, score_temperature=temperature, score_cfg_scale=cfg)
    assert isinstance(found, TokenScores)
    assert_same(model, found, naive(model, inputs, shift=shift, temperature=temperature, cfg=cfg))


@pytest.mark.parametrize("chunk", [1, VOCAB, 5 * VOCAB, 7 * VOCAB - 1])
def test_chunks_change_nothing(chunk: int, monkeypatch: pytest.MonkeyPatch):
    model, inputs = denoiser(), batch()
    whole = model(**inputs, score_temperature=0.8)
    monkeypatch.setattr(scoring, "CHUNK_ELEMENTS", chunk)
    assert_same(model, model(**inputs, score_temperature=0.8), whole)


def test_a_reduction_sees_every_scored_position_once_and_in_order(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scoring, "CHUNK_ELEMENTS", 4 * VOCAB)
    model, inputs, parts = denoiser(), batch(), []

    def reduce(logits: Tensor, part: slice) -> tuple[Tensor, ...]:
        parts.append((part.start, part.stop))
        return logits, logits.argmax(-1)

    with torch.no_grad():
        logits, best = model(inputs["input_ids"], score_positions=inputs["score_positions"], score_reduce=reduce)
        plain = model(input_ids=inputs["input_ids"]).logits[inputs["score_positions"]]
    assert [start for start, _ in parts] == list(range(0, len(plain), 4)) and parts[-1][1] == len(plain)
    torch.testing.assert_close(logits, plain, rtol=0, atol=1e-12)
    assert torch.equal(best, plain.argmax(-1))


def test_nothing_to_score_still_reaches_every_parameter():
    model, inputs = denoiser(), batch()
    inputs["score_positions"][:] = False
    scores = model(**inputs)
    assert scores.log_probs.shape == scores.entropies.shape == (0,)
    (scores.log_probs.sum() + scores.entropies.sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool((parameter.grad == 0).all()), name


# --- padding ----------------------------------------------------------------------------------------------------------


def padded(inputs: dict[str, Tensor], by: int, content: int) -> dict[str, Tensor]:
    def left(values: Tensor, fill: int) -> Tensor:
        return torch.nn.functional.pad(values, (by, 0), value=fill)

    result = {name: left(value, content if name == "input_ids" else 0) for name, value in inputs.items()}
    result["attention_mask"] = left(torch.ones_like(inputs["input_ids"]), 0)
    return result


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("shift", [0, 1])
def test_left_padding_changes_neither_scores_nor_gradients(shift: int, implementation: str):
    model, inputs = denoiser(shift), batch()
    model.set_attn_implementation(implementation)
    inputs["score_positions"][:, 0] = False  # under a shift the token before it is padding
    assert_same(model, model(**padded(inputs, 5, content=7)), model(**inputs), tolerance=1e-10)


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """FlexAttention without a compiler, which a test machine may not have; it then takes float64 on a CPU, too."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
def test_what_padding_holds_is_not_seen(implementation: str, uncompiled: None):
    model, inputs = denoiser(), batch()
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        a, b = (model(**padded(inputs, 3, content)) for content in (0, 9))
    assert torch.equal(a.log_probs, b.log_probs)


def test_attention_implementations_agree(uncompiled: None):
    inputs = padded(batch(), 4, 0)
    rows = padded(batch(seed=1), 2, 0)  # rows with different amounts of padding
    both = {name: torch.cat([value, torch.nn.functional.pad(rows[name], (2, 0))]) for name, value in inputs.items()}
    model, found = denoiser(), {}
    for implementation in ("sdpa", "eager", "flex_attention"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            found[implementation] = model(**both).log_probs
    for implementation in ("eager", "flex_attention"):
        # Both take their softmax in float32. A mask in the wrong form is off by more than 0.1.
        torch.testing.assert_close(found[implementation], found["sdpa"], rtol=0, atol=1e-5)


def test_positions_count_from_the_first_real_token():
    # Rotary embeddings do not notice a shift of all positions, other models would.
    model, seen = denoiser(), []
    hook = model.model.register_forward_pre_hook(lambda m, args, kw: seen.append(kw["position_ids"]), with_kwargs=True)
    inputs = padded(batch(rows=1), 3, 0)
    with torch.no_grad():
        model(**inputs)
        model(**batch(rows=1))
    hook.remove()
    assert seen[0][0, 3:].tolist() == seen[1][0].tolist() == list(range(9))


def test_positions_that_are_given_are_used():
    model, inputs = denoiser(), batch()
    positions = torch.arange(9).expand(3, -1)
    with torch.no_grad():
        expected = model(**inputs).log_probs
        shifted = model(**inputs, position_ids=positions + 3).log_probs
        stretched = model(**inputs, position_ids=2 * positions).log_probs
    torch.testing.assert_close(shifted, expected, rtol=0, atol=1e-10)  # rotary embeddings are relative
    assert not torch.allclose(stretched, expected, atol=1e-3)


# --- models -----------------------------------------------------------------------------------------------------------

SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "is_causal": False,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    "diffusion": DiffusionSpec(MASK, (1,)).to_dict(),
}
FAMILIES = {
    "tied head": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, tie_word_embeddings=True)),
    "logits_scaling": lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=3.0)),
    "logit_scale": lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25)),
    "final_logit_softcapping": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=2.0)),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_heads_that_scale_or_cap_their_logits(name: str):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = attach_scoring(FAMILIES[name]().double().eval())
    inputs = batch()
    assert_same(model, model(**inputs), naive(model, inputs), tolerance=1e-6)


def test_a_head_with_a_transform_is_refused():
    config = {key: value for key, value in SMALL.items() if key not in ("head_dim", "num_key_value_heads")}
    with torch.random.fork_rng(devices=[]):
        model = BertForMaskedLM(BertConfig(**config))
    with pytest.raises(ValueError, match="BertForMaskedLM.*not its output embeddings.*not supported"):
        attach_scoring(model)


def test_a_model_without_a_spec_is_refused():
    model = tiny_llada(vocab_size=VOCAB)
    del model.config.diffusion
    with pytest.raises(ValueError, match="no `config.diffusion`"):
        attach_scoring(model)


def test_an_attention_kind_that_cannot_run_is_refused():
    model = tiny_llada(vocab_size=VOCAB)
    model.config.diffusion.update(attention="block_causal")
    with pytest.raises(ValueError, match="attention='block_causal' needs the length of its blocks"):
        attach_scoring(model)


def test_targets_must_be_given():
    inputs = batch()
    del inputs["score_targets"]
    with pytest.raises(ValueError, match="score_targets"):
        denoiser()(**inputs)


def test_attaching_twice_changes_nothing(global_rng_untouched: None):
    model = denoiser()
    forward = model.forward
    assert attach_scoring(model) is model and model.forward == forward


def test_without_positions_the_forward_is_the_models_own():
    plain = exactly_float64(tiny_llada(vocab_size=VOCAB, initializer_range=0.4, dtype=torch.float64))
    ids = batch()["input_ids"]
    with torch.no_grad():
        expected = plain(input_ids=ids).logits
        assert torch.equal(attach_scoring(plain)(input_ids=ids).logits, expected)
        assert torch.equal(plain(ids)[0], expected)


def test_attaching_keeps_the_mode_and_leaves_no_gradient():
    model = tiny_llada(vocab_size=VOCAB).train()
    attach_scoring(model)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("attach_first", [True, False])
def test_an_adapter_is_part_of_the_scores(attach_first: bool):
    model, inputs = tiny_llada(vocab_size=VOCAB, initializer_range=0.4, dtype=torch.float64), batch()
    plain = naive(model, inputs).log_probs
    if attach_first:
        attach_scoring(model)
    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft_model = attach_scoring(get_peft_model(model, adapter).double())
    found = peft_model(**inputs)
    assert not torch.allclose(found.log_probs, plain, atol=1e-4)
    expected = naive(peft_model, inputs)
    torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=0, atol=1e-6)
    found.log_probs.sum().backward()
    assert all(p.grad is not None for name, p in peft_model.named_parameters() if "lora" in name)
    with torch.no_grad(), peft_model.disable_adapter():
        torch.testing.assert_close(peft_model(**inputs).log_probs, plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_scores_are_float32_or_wider(dtype: torch.dtype, wide: torch.dtype):
    model = denoiser(dtype=dtype)
    scores = model(**batch())
    assert scores.log_probs.dtype == scores.entropies.dtype == wide


@pytest.mark.parametrize("reentrant", [True, False])
def test_layer_checkpointing_changes_no_gradient(reentrant: bool):
    model, inputs = denoiser(), batch()
    expected = gradients(model, model(**inputs))
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for name, gradient in gradients(model, model(**inputs)).items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-12)
