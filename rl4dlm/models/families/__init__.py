"""The families of published checkpoints, and how a `config.json` is recognised."""

from __future__ import annotations

from rl4dlm.models.families.a2d import A2D_LLAMA, A2D_QWEN2, A2D_QWEN3
from rl4dlm.models.families.diffusion_gemma import DIFFUSION_GEMMA
from rl4dlm.models.families.dream import DREAM
from rl4dlm.models.families.fast_dllm import FAST_DLLM
from rl4dlm.models.families.illada import ILLADA
from rl4dlm.models.families.llada import LLADA
from rl4dlm.models.families.llada2 import LLADA2
from rl4dlm.models.families.llada_moe import LLADA_MOE
from rl4dlm.models.families.nemotron_diffusion import NEMOTRON_DIFFUSION
from rl4dlm.models.families.sdar import SDAR, SDAR_MOE
from rl4dlm.models.families.wedlm import WEDLM
from rl4dlm.models.family import Family, HubConfig

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        LLADA,
        ILLADA,
        LLADA_MOE,
        LLADA2,
        DREAM,
        SDAR,
        SDAR_MOE,
        FAST_DLLM,
        A2D_QWEN3,
        A2D_QWEN2,
        A2D_LLAMA,
        NEMOTRON_DIFFUSION,
        WEDLM,
        DIFFUSION_GEMMA,
    )
}


def find_family(hub: HubConfig) -> Family:
    """The family of a published configuration, by its architecture, or by its model type where it states none.

    Raises:
        ValueError: none of the families; the message names the file, what it says and what is known.
    """
    stated = hub.get("architectures") or []
    for family in FAMILIES.values():
        if any(name in family.architectures for name in stated):
            return family
    for family in FAMILIES.values():
        if not stated and hub.get("model_type") in family.model_types:
            return family
    known = "; ".join(f"{family.architectures[0]} ({family.covers})" for family in FAMILIES.values())
    raise ValueError(
        f"{hub.path}: no `diffusion` entry, and architectures={stated or None} with model_type="
        f"{hub.get('model_type')!r} is no known family of diffusion language models. Known: {known}. If this is a "
        "stock model that denoises, set `model.config.is_causal = False`, `model.config.use_cache = False` and "
        "`model.config.diffusion = DiffusionSpec(...).to_dict()`, and save it with `save_denoiser`."
    )
