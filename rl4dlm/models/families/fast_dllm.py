"""Fast-dLLM v2 (arXiv:2509.26328): Qwen2.5 adapted to blocks, as Qwen2.

Owns the names of its configuration keys; weights carry over under their own names. Blocks of `bd_size` tokens are
counted from position 0, and the logits at position i - 1 predict token i.
"""

from __future__ import annotations

from rl4dlm.models.family import COMMON, SIZES, Family, same_names

FAST_DLLM = Family(
    name="fast_dllm",
    covers="Fast-dLLM v2 1.5B and 7B",
    stock="Qwen2ForCausalLM",
    architectures=("Fast_dLLM_QwenForCausalLM",),
    model_types=("Fast_dLLM_Qwen",),
    keys=same_names(*COMMON, "max_window_layers"),
    needed=(*SIZES, "num_key_value_heads", "intermediate_size", "rms_norm_eps"),
    inert=("complementary_mask", "conplemenrary_mask"),  # of the training; the second as it is published
    rows=(151936, 152064),
    fixed={"use_sliding_window": (False,)},
    template={
        "architectures": ["Fast_dLLM_QwenForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration.Fast_dLLM_QwenConfig",
            "AutoModel": "modeling.Fast_dLLM_QwenModel",
            "AutoModelForCausalLM": "modeling.Fast_dLLM_QwenForCausalLM",
        },
        "model_type": "Fast_dLLM_Qwen",
        "rope_scaling": None,
        "sliding_window": None,
        "use_cache": True,
        "use_sliding_window": False,
    },
    mask_token="|<MASK>|",
    mask_token_id=151665,
    end_tokens={"<|endoftext|>": 151643, "<|im_end|>": 151645},
    logit_shift=1,
    attention="block_causal",
    block_length=32,
    block_key="bd_size",
    grid_origin="position_zero",
)
