"""iLLaDA (arXiv:2606.25331) as Llama: grouped key/value heads, a tied head, full attention, no shift.

Owns the names of its configuration keys; weights carry over under their own names. Its vocabulary is not LLaDA's: the
mask token is what the tokenizer's files call `<[MASK]>`, or what `config.json` says, and is never taken from here.
"""

from __future__ import annotations

from typing import Any

from rl4dlm.models.family import COMMON, SIZES, Family, HubConfig, same_names


def _adjust(hub: HubConfig, settings: dict[str, Any]) -> None:
    # The published code inherits a tied head from transformers, which leaves what is inherited out of config.json.
    settings.setdefault("tie_word_embeddings", True)


ILLADA = Family(
    name="illada",
    covers="iLLaDA-8B",
    stock="LlamaForCausalLM",
    architectures=("ILLaDAForCausalLM",),
    model_types=("illada",),
    keys=same_names(*COMMON, "attention_bias", "mlp_bias"),
    needed=(*SIZES, "num_key_value_heads", "intermediate_size", "rms_norm_eps"),
    fixed={"layer_norm_eps": (None,)},  # else its norms have means and biases
    template={
        "architectures": ["ILLaDAForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_illada.ILLaDAConfig",
            "AutoModel": "modeling_illada.ILLaDAForCausalLM",
            "AutoModelForCausalLM": "modeling_illada.ILLaDAForCausalLM",
        },
        "model_type": "illada",
        "layer_norm_eps": None,
        "resid_pdrop": 0.0,
        "rope_scaling": None,
    },
    mask_token="<[MASK]>",
    mask_token_id=None,
    end_tokens={},
    adjust=_adjust,
)
