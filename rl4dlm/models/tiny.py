"""Small denoisers and a tokenizer made from nothing, for tests, examples and the demo; nothing is downloaded.

Owns one builder per family. A builder states sizes only: what the family is comes from `families/`.
"""

from __future__ import annotations

import string
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DiffusionGemmaConfig,
    DiffusionGemmaForBlockDiffusion,
    GenerationConfig,
    Glm4MoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Ministral3ForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
)

from rl4dlm.models.adapters import experts_of
from rl4dlm.models.families import FAMILIES
from rl4dlm.models.family import RECORD, HubConfig
from rl4dlm.models.spec import DiffusionSpec

SPECIAL_TOKENS = ("<pad>", "<eos>", "<mask>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A character-level tokenizer: one id per printable ASCII character, with mask, eos, pad and a chat template."""
    characters = [c for c in string.printable if c not in "\t\r\x0b\x0c"]
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        mask_token="<mask>",
        unk_token="<unk>",
        additional_special_tokens=list(SPECIAL_TOKENS[4:]),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def tiny_llada(
    *,
    vocab_size: int | None = None,
    mask_token_id: int = SPECIAL_TOKENS.index("<mask>"),
    eos_token_id: int = SPECIAL_TOKENS.index("<eos>"),
    pad_token_id: int = SPECIAL_TOKENS.index("<pad>"),
    hidden_size: int = 32,
    num_hidden_layers: int = 2,
    num_attention_heads: int = 4,
    intermediate_size: int | None = None,
    max_position_embeddings: int = 1024,
    rope_theta: float = 10000.0,
    initializer_range: float = 0.02,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> LlamaForCausalLM:
    """A randomly initialised LLaDA-like denoiser: stock Llama, bidirectional attention, no logit shift.

    The defaults fit `tiny_tokenizer()`. The weights depend on `seed` alone; the global random state is left as it was.
    `rope_theta` is the base of the rotary frequencies: short sequences are told apart better by a small one.
    """
    config = LlamaConfig(
        vocab_size=vocab_size or len(tiny_tokenizer()),
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        intermediate_size=intermediate_size or 2 * hidden_size,
        max_position_embeddings=max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        initializer_range=initializer_range,
        tie_word_embeddings=False,
        use_cache=False,
        pad_token_id=pad_token_id,
        eos_token_id=eos_token_id,
        bos_token_id=None,
        mask_token_id=mask_token_id,
        is_causal=False,
        diffusion=DiffusionSpec(mask_token_id=mask_token_id, eos_token_ids=(eos_token_id,)).to_dict(),
        **{RECORD: {"family": "llada"}},
    )
    return _initialised(LlamaForCausalLM, config, dtype, seed)


@dataclass(frozen=True)
class TinySizes:
    """Sizes and settings of the other builders; the defaults fit `tiny_tokenizer()`.

    Args:
        vocab_size: 0 for the size of `tiny_tokenizer()`.
        mask_token_id, eos_token_id, pad_token_id: as there.
        hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads, max_position_embeddings: of the model.
        num_experts, num_experts_per_tok: of a mixture of experts; the first layer of LLaDA2 is dense.
        block_length: of a block-diffusion model, in tokens; the canvas of DiffusionGemma.
        rope_theta: base of the rotary frequencies.
        initializer_range: standard deviation of the weights.
        dtype: of the weights.
        seed: the weights depend on it alone.
    """

    vocab_size: int = 0
    mask_token_id: int = SPECIAL_TOKENS.index("<mask>")
    eos_token_id: int = SPECIAL_TOKENS.index("<eos>")
    pad_token_id: int = SPECIAL_TOKENS.index("<pad>")
    hidden_size: int = 32
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    max_position_embeddings: int = 1024
    num_experts: int = 4
    num_experts_per_tok: int = 2
    block_length: int = 4
    rope_theta: float = 10000.0
    initializer_range: float = 0.02
    dtype: torch.dtype = torch.float32
    seed: int = 0


def tiny_illada(**sizes: Any) -> LlamaForCausalLM:
    """A randomly initialised iLLaDA: Llama, full attention, tied head. Takes the fields of `TinySizes`."""
    return _tiny("illada", TinySizes(**sizes), tie_word_embeddings=True)


def tiny_llada_moe(**sizes: Any) -> Qwen3MoeForCausalLM:
    """A randomly initialised LLaDA-MoE: Qwen3-MoE, full attention. Takes the fields of `TinySizes`."""
    return _tiny("llada_moe", TinySizes(**sizes), num_key_value_heads=sizes.get("num_attention_heads", 4))


def tiny_llada2(**sizes: Any) -> Glm4MoeForCausalLM:
    """A randomly initialised LLaDA2.0-mini: GLM-4-MoE, blocks from position 0. Takes the fields of `TinySizes`."""
    return _tiny(
        "llada2",
        TinySizes(**sizes),
        first_k_dense_replace=1,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        partial_rotary_factor=0.5,
    )


def tiny_dream(**sizes: Any) -> Qwen2ForCausalLM:
    """A randomly initialised Dream: Qwen2, full attention, shifted logits. Takes the fields of `TinySizes`."""
    return _tiny("dream", TinySizes(**sizes))


def tiny_sdar(**sizes: Any) -> Qwen3ForCausalLM:
    """A randomly initialised SDAR: Qwen3, blocks from position 0. Takes the fields of `TinySizes`."""
    return _tiny("sdar", TinySizes(**sizes))


def tiny_sdar_moe(**sizes: Any) -> Qwen3MoeForCausalLM:
    """A randomly initialised SDAR-MoE: Qwen3-MoE, blocks from position 0. Takes the fields of `TinySizes`."""
    return _tiny("sdar_moe", TinySizes(**sizes), norm_topk_prob=True)


def tiny_fast_dllm(**sizes: Any) -> Qwen2ForCausalLM:
    """A randomly initialised Fast-dLLM v2: Qwen2, blocks from position 0, shifted logits. Takes `TinySizes`."""
    return _tiny("fast_dllm", TinySizes(**sizes))


def tiny_a2d_qwen3(**sizes: Any) -> Qwen3ForCausalLM:
    """A randomly initialised Qwen3 adapted to diffusion, full attention, tied head. Takes the fields of `TinySizes`."""
    return _tiny("a2d_qwen3", TinySizes(**sizes), tie_word_embeddings=True)


def tiny_a2d_qwen2(**sizes: Any) -> Qwen2ForCausalLM:
    """A randomly initialised Qwen2 adapted to diffusion, full attention, tied head. Takes the fields of `TinySizes`."""
    return _tiny("a2d_qwen2", TinySizes(**sizes), tie_word_embeddings=True)


def tiny_a2d_llama(**sizes: Any) -> LlamaForCausalLM:
    """A randomly initialised Llama adapted to diffusion, full attention. Takes the fields of `TinySizes`."""
    return _tiny("a2d_llama", TinySizes(**sizes))


def tiny_nemotron_diffusion(**sizes: Any) -> Ministral3ForCausalLM:
    """A randomly initialised Nemotron-Labs-Diffusion: Ministral 3, blocks over a causal past. Takes `TinySizes`."""
    small = TinySizes(**sizes)
    length = max(1, small.max_position_embeddings // 4)
    rope = FAMILIES["nemotron_diffusion"].template["rope_parameters"]
    rope = {**rope, "factor": 4.0, "original_max_position_embeddings": length, "rope_theta": small.rope_theta}
    return _tiny("nemotron_diffusion", small, rope_parameters=rope)


def tiny_wedlm(**sizes: Any) -> Qwen3ForCausalLM:
    """A randomly initialised WeDLM: Qwen3, what is written seen first. Takes the fields of `TinySizes`."""
    return _tiny("wedlm", TinySizes(**sizes))


def tiny_diffusion_gemma(**sizes: Any) -> DiffusionGemmaForBlockDiffusion:
    """A randomly initialised DiffusionGemma with a canvas of `block_length` tokens. Takes the fields of `TinySizes`.

    Its corruption is uniform, so it has no mask token; the smallest vision tower there is comes with it.
    """
    small = TinySizes(**sizes)
    vocabulary = small.vocab_size or len(tiny_tokenizer())
    head = small.hidden_size // small.num_attention_heads
    config = DiffusionGemmaConfig(
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": small.hidden_size,
            "intermediate_size": 2 * small.hidden_size,
            "moe_intermediate_size": small.hidden_size // 2,
            "num_hidden_layers": small.num_hidden_layers,
            "layer_types": ["sliding_attention"] * (small.num_hidden_layers - 1) + ["full_attention"],
            "num_attention_heads": small.num_attention_heads,
            "num_key_value_heads": small.num_key_value_heads,
            "head_dim": head,
            "global_head_dim": head,
            "num_global_key_value_heads": 1,
            "num_experts": small.num_experts,
            "top_k_experts": small.num_experts_per_tok,
            "max_position_embeddings": small.max_position_embeddings,
            "sliding_window": 2 * small.block_length,
            "initializer_range": small.initializer_range,
            "pad_token_id": small.pad_token_id,
            "eos_token_id": small.eos_token_id,
            "bos_token_id": small.pad_token_id,
        },
        vision_config={
            "model_type": "gemma4_vision",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "global_head_dim": 16,
            "max_position_embeddings": 64,
            "position_embedding_size": 16,
        },
        canvas_length=small.block_length,
        image_token_id=vocabulary - 1,
        boi_token_id=vocabulary - 2,
        eoi_token_id=vocabulary - 3,
        tie_word_embeddings=True,
    )
    spec = DiffusionSpec.from_dict(
        {
            "mask_token_id": None,
            "eos_token_ids": [small.eos_token_id],
            "attention": FAMILIES["diffusion_gemma"].attention,
            "block_length": small.block_length,
            "noise": "uniform",
        }
    )
    config.diffusion = spec.to_dict()
    setattr(config, RECORD, {"family": "diffusion_gemma"})
    return _initialised(DiffusionGemmaForBlockDiffusion, config, small.dtype, small.seed)


_ONLY_HUB = ("rope_theta", "rope_parameters", "partial_rotary_factor")  # without a stock setting of their own


def _tiny(name: str, sizes: TinySizes, **more: Any) -> Any:
    """A model of a family. `more` has stock settings besides the sizes, or hub settings without a stock one."""
    family = FAMILIES[name]
    settings = {
        **{key: value for key, value in asdict(sizes).items() if key not in ("mask_token_id", "block_length")},
        "vocab_size": sizes.vocab_size or len(tiny_tokenizer()),
        "intermediate_size": 2 * sizes.hidden_size,
        "moe_intermediate_size": sizes.hidden_size // 2,
        "head_dim": sizes.hidden_size // sizes.num_attention_heads,
        "n_routed_experts": sizes.num_experts,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        **more,
    }
    values = {key: settings[stock] for key, stock in family.keys.items() if stock in settings}
    only_hub = {key: value for key, value in settings.items() if key in _ONLY_HUB}
    config = family.stock_config(HubConfig({**family.template, **values, **only_hub}, f"tiny_{name}"))
    spec = DiffusionSpec(
        mask_token_id=sizes.mask_token_id,
        eos_token_ids=(sizes.eos_token_id,),
        logit_shift=family.logit_shift,
        attention=family.attention,
        block_length=sizes.block_length if family.block_length else None,
        grid_origin=family.grid_origin,
        noise=family.noise,
    )
    config.diffusion = spec.to_dict()
    setattr(config, RECORD, {"family": name})
    return _initialised(family.model_class, config, sizes.dtype, sizes.seed)


def _initialised(cls: Any, config: PreTrainedConfig, dtype: torch.dtype, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(config)
    text = config.get_text_config()
    if cls is not DiffusionGemmaForBlockDiffusion:  # which has a configuration of its own
        model.generation_config = GenerationConfig(pad_token_id=text.pad_token_id, eos_token_id=text.eos_token_id)
    for parameter in model.parameters():  # not `model.to(dtype)`, which would round the rotary frequencies too
        parameter.data = parameter.data.to(dtype)
    if dtype == torch.float64 and experts_of(model):
        model.set_experts_implementation("eager")  # the grouped matrix product has no float64
    return model.eval()
