"""What is recorded of attention is what the model attends with, in every family and implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rl4dlm.models.recorded import Recorded, check_layers, recorded_attention
from tests.models.families import IDS, MASKED, build


def weights(recorded: Recorded) -> Tensor:
    """Attention `[R, H, T, T]` where everything sees everything."""
    key = recorded.key.repeat_interleave(recorded.query.shape[1] // recorded.key.shape[1], dim=1)
    return (recorded.query @ key.transpose(2, 3) * recorded.scaling).softmax(-1)


def run(model: Any, **options: Any) -> Any:
    shape = (len(IDS), 1, IDS.shape[1], IDS.shape[1])
    eager = model.config._attn_implementation == "eager"
    mask = torch.zeros(shape, dtype=model.dtype) if eager else torch.ones(shape, dtype=torch.bool)
    return model(input_ids=IDS, attention_mask=mask, use_cache=False, **options)


@pytest.mark.parametrize("name", MASKED)
def test_recorded_attention_is_the_model_s_own(name: str) -> None:
    model = build(name).eval()
    plain = run(model).logits
    with recorded_attention(model, [1, 0]) as found:
        again = run(model).logits
    assert torch.equal(plain, again), "the forward is the same"
    model.set_attn_implementation("eager")
    own = run(model, output_attentions=True).attentions
    with recorded_attention(model, [0]) as eager:
        run(model)
    for layer, recorded in found.items():
        assert recorded.query.requires_grad and recorded.value.shape == recorded.key.shape
        torch.testing.assert_close(weights(recorded), own[layer], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(weights(eager[0]), own[0], rtol=1e-4, atol=1e-6)


def test_nothing_of_it_is_left_behind() -> None:
    model, functions = build("llada"), dict(ALL_ATTENTION_FUNCTIONS)
    with pytest.raises(RuntimeError, match="stop"), recorded_attention(model, [0]):
        raise RuntimeError("stop")
    with recorded_attention(model, [0]), recorded_attention(model, [1]) as inner:
        run(model)
        assert [*inner] == [1]
    assert dict(ALL_ATTENTION_FUNCTIONS) == functions
    with pytest.raises(ValueError, match=r"layers \[0\] was not recorded"), recorded_attention(model, [0]):
        pass
    with pytest.raises(ValueError, match=r"causal_layers=\[0, 2\]: the model has no layer 2; they are 0 to 1"):
        check_layers(model, [0, 2], "causal_layers")
    with pytest.raises(ValueError, match="no decoder layers"):
        check_layers(build("diffusion_gemma"), [0])
