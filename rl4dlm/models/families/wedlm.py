"""WeDLM-8B (arXiv:2512.22737) as Qwen3: what is written is seen before what is masked, causally.

Owns the names of its configuration keys; weights carry over under their own names. Logits are not shifted. Fed in the
order in which `written_first` attention sees tokens, with the positions that they have, its code computes what Qwen3
does under a causal mask. WeDLM-7B, made of Qwen2.5, has no norms of queries and keys, is of another form, and is
refused by `qk_norm`.
"""

from __future__ import annotations

from rl4dlm.models.family import COMMON, SIZES, Family, same_names

WEDLM = Family(
    name="wedlm",
    covers="WeDLM-8B",
    stock="Qwen3ForCausalLM",
    architectures=("WeDLMForCausalLM",),
    model_types=("wedlm",),
    keys=same_names(*COMMON, "head_dim", "attention_bias", "max_window_layers"),
    needed=(*SIZES, "num_key_value_heads", "head_dim", "intermediate_size", "rms_norm_eps", "qk_norm"),
    rows=(151936,),
    fixed={"qk_norm": (True,), "rope_scaling": (None,), "use_sliding_window": (False, None)},
    template={
        "architectures": ["WeDLMForCausalLM"],
        "model_type": "wedlm",
        "qk_norm": True,
        "rope_scaling": None,
        "sliding_window": None,
        "use_cache": False,
        "use_sliding_window": False,
    },
    mask_token=None,  # nameless: the published code takes 151665 where config.json states none
    mask_token_id=151665,
    end_tokens={"<|endoftext|>": 151643, "<|im_end|>": 151645},
    attention="written_first",
)
