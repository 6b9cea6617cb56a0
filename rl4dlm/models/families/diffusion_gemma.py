"""DiffusionGemma: transformers' own class, so its published form is the stock form.

Owns its facts alone. A causal encoder writes the keys and values of prompt and finished canvases; the decoder refines
one canvas of `canvas_length` tokens over them. Corruption is uniform: there is no mask token.
"""

from __future__ import annotations

from rl4dlm.models.family import Family

DIFFUSION_GEMMA = Family(
    name="diffusion_gemma",
    covers="DiffusionGemma",
    stock="DiffusionGemmaForBlockDiffusion",
    architectures=("DiffusionGemmaForBlockDiffusion",),
    model_types=("diffusion_gemma",),
    keys={},
    needed=("text_config", "canvas_length"),
    mask_token=None,
    mask_token_id=None,
    end_tokens={"<eos>": 1, "<turn|>": 106},
    attention="context_causal",
    block_key="canvas_length",
    grid_origin="response",
    noise="uniform",
    native=True,
)
