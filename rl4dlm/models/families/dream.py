"""Dream (arXiv:2508.15487): Dream-7B, Dream-Coder and DiffuCoder (arXiv:2506.20639) as Qwen2.

Owns the names of its configuration keys; weights carry over under their own names. Made from an autoregressive model,
it keeps that model's shift: the logits at position i - 1 predict token i.
"""

from __future__ import annotations

from rl4dlm.models.family import COMMON, SIZES, Family, same_names

DREAM = Family(
    name="dream",
    covers="Dream-7B, Dream-Coder-7B, DiffuCoder-7B",
    stock="Qwen2ForCausalLM",
    architectures=("DreamModel",),
    model_types=("Dream", "dream"),
    keys=same_names(*COMMON, "max_window_layers"),
    needed=(*SIZES, "num_key_value_heads", "intermediate_size", "rms_norm_eps"),
    rows=(151936, 152064),
    fixed={
        "attention_bias": (True, None),
        "block_size": (None,),  # Dream models for blocks are another family, without the shift
        "use_mrope": (False,),
        "use_sliding_window": (False,),
    },
    template={
        "architectures": ["DreamModel"],
        "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
        "model_type": "Dream",
        "rope_scaling": None,
        "sliding_window": None,
        "use_cache": True,
        "use_mrope": False,
        "use_sliding_window": False,
    },
    mask_token="<|mask|>",
    mask_token_id=151666,
    end_tokens={"<|endoftext|>": 151643, "<|im_end|>": 151645},
    logit_shift=1,
    tokenizer="Qwen2Tokenizer",
)
