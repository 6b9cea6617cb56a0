"""A2D: Qwen3, Qwen2 and Llama checkpoints adapted to diffusion with the dLLM library, as the classes they came from.

Owns what their `config.json` says beyond the stock one; names of keys and weights are the stock ones. Logits are not
shifted. The same configuration is published for full attention (MDLM) and for blocks (BD3LM), so full attention is
assumed and a block length given by the user chooses blocks, counted from position 0.
"""

from __future__ import annotations

from typing import Any

from rl4dlm.models.family import COMMON, SIZES, Family, same_names

_QWEN_END = {"<|endoftext|>": 151643, "<|im_end|>": 151645}
_FACTS: dict[str, Any] = {
    "mask_token": "<|mask|>",
    "mask_token_id": None,  # the token is added to the vocabulary of whichever model was adapted
    "needed": (*SIZES, "num_key_value_heads", "intermediate_size", "rms_norm_eps"),
    "block_key": "block_size",
    "blocks_optional": True,
    "grid_origin": "position_zero",
}

A2D_QWEN3 = Family(
    name="a2d_qwen3",
    covers="Qwen3 adapted with dLLM",
    stock="Qwen3ForCausalLM",
    architectures=("A2DQwen3LMHeadModel",),
    model_types=("a2d-qwen3",),
    keys=same_names(*COMMON, "head_dim", "attention_bias", "max_window_layers", "layer_types"),
    fixed={"use_sliding_window": (False,)},
    template={
        "architectures": ["A2DQwen3LMHeadModel"],
        "model_type": "a2d-qwen3",
        "rope_scaling": None,
        "sliding_window": None,
        "use_cache": True,
        "use_sliding_window": False,
    },
    end_tokens=_QWEN_END,
    **_FACTS,
)
A2D_QWEN2 = Family(
    name="a2d_qwen2",
    covers="Qwen2.5 adapted with dLLM",
    stock="Qwen2ForCausalLM",
    architectures=("A2DQwen2LMHeadModel",),
    model_types=("a2d-qwen2",),
    keys=same_names(*COMMON, "max_window_layers", "layer_types"),
    fixed={"use_sliding_window": (False,)},
    template={
        "architectures": ["A2DQwen2LMHeadModel"],
        "model_type": "a2d-qwen2",
        "rope_scaling": None,
        "sliding_window": None,
        "use_cache": True,
        "use_sliding_window": False,
    },
    end_tokens=_QWEN_END,
    **_FACTS,
)
A2D_LLAMA = Family(
    name="a2d_llama",
    covers="Llama adapted with dLLM",
    stock="LlamaForCausalLM",
    architectures=("A2DLlamaLMHeadModel",),
    model_types=("a2d-llama",),
    keys=same_names(*COMMON, "head_dim", "attention_bias", "mlp_bias"),
    template={
        "architectures": ["A2DLlamaLMHeadModel"],
        "model_type": "a2d-llama",
        "rope_scaling": None,
        "use_cache": True,
    },
    end_tokens={"<|end_of_text|>": 128001, "<|eot_id|>": 128009},
    **_FACTS,
)
