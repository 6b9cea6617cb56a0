"""Settings of masked SFT that turn an autoregressive model into a denoiser, and the block length they prescribe.

Owns what may be set and what must not be combined. The mathematics is `rl4dlm.likelihood.denoising`'s, the loss
`trainer.py`'s, and making the model to start from `rl4dlm.sft.adapt`'s.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rl4dlm.likelihood.complementary import check_context
from rl4dlm.models.attention import BLOCK_KINDS
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.sft.annealing import check_annealing

LOSS_WEIGHTS = ("1/t", "none", "cart")
NOISE_LEVELS = ("row", "block")
CART_P = 0.1


@dataclass
class AdaptationSettings:
    """What `DiffusionSFTConfig` offers for adaptation. The defaults are plain masked SFT.

    Training alone is affected: evaluation stays the bound of one view per example, so that runs can be compared.

    Args:
        loss_weight: `"1/t"`: the evidence bound. `"none"`: hidden tokens count 1 whatever their level. `"cart"`: they
            count by how near they are to visible tokens of prompt and completion, see
            `rl4dlm.likelihood.complementary.context_weights`, and the loss is per hidden token (Dream-Coder, arXiv
            2509.01142).
        cart_p: p of these weights, in (0, 1].
        complementary_masks: score each row twice, hiding in the second copy what the first one shows, so that every
            target is scored exactly once (Fast-dLLM v2, arXiv 2509.26328, with `loss_weight="none"`). Levels are then
            in [eps, 1 - eps], eps being `noise_floor`.
        noise_levels: `"row"`, or `"block"`: a level for each attention block (Fast-dLLM v2; arXiv 2503.09573).
        mask_ratio_tilt: from 0 to 1, how much more often later positions of an attention block are hidden (the idea of
            Efficient-DLM, arXiv 2512.14067; see `rl4dlm.likelihood.denoising.hiding`).
        block_length_schedule: pairs [step, block length]: from that optimizer step on, attention blocks have that
            length; the first step is 0. JSON on the command line. The model's `config.diffusion` follows, so that a
            checkpoint says what it was trained with last. None: the model's own.
        attention_annealing_steps: optimizer steps in which attention opens up from causal to full, for a model that was
            autoregressive (DiffuLLaMA, arXiv 2410.17891); see `rl4dlm.sft.annealing`. 0: full from the start.
        ar_loss_weight: weight of the next-token loss of the clean copy, added to the loss; it needs attention
            `context_causal`, whose clean copy is causal (NBDiff). 0: off.
    """

    loss_weight: str = field(
        default="1/t",
        metadata={
            "help": "What a hidden token counts for: 1/t, none (1) or cart (by its visible neighbours).",
            "choices": list(LOSS_WEIGHTS),
        },
    )
    cart_p: float = field(
        default=CART_P, metadata={"help": "p of the weights of loss_weight='cart': larger is more local, up to 1."}
    )
    complementary_masks: bool = field(
        default=False, metadata={"help": "Score each row also with the inverted mask: every target exactly once."}
    )
    noise_levels: str = field(
        default="row",
        metadata={"help": "A noise level for each row, or for each attention block.", "choices": list(NOISE_LEVELS)},
    )
    mask_ratio_tilt: float = field(
        default=0.0, metadata={"help": "0 to 1: how much more often later positions of a block are hidden."}
    )
    block_length_schedule: list | str | None = field(
        default=None,
        metadata={"help": "Pairs [step, block length] in JSON: length of the attention blocks from that step on."},
    )
    attention_annealing_steps: int = field(
        default=0, metadata={"help": "Steps in which attention opens up from causal to full. 0: full from the start."}
    )
    ar_loss_weight: float = field(
        default=0.0, metadata={"help": "Weight of the next-token loss on the clean copy (context_causal attention)."}
    )

    def check_adaptation(self, noise_floor: float) -> None:
        """Raises ValueError naming the setting, the value and what is allowed; reads the schedule from JSON."""
        for name, allowed in (("loss_weight", LOSS_WEIGHTS), ("noise_levels", NOISE_LEVELS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not allowed; choose one of {', '.join(allowed)}")
        check_context("cart_p", self.cart_p)
        check_annealing(self.attention_annealing_steps)
        if self.loss_weight != "cart" and self.cart_p != CART_P:
            raise ValueError(
                f"cart_p={self.cart_p} has no effect with loss_weight={self.loss_weight!r}, only with cart"
            )
        if not 0 <= self.mask_ratio_tilt <= 1:
            raise ValueError(f"mask_ratio_tilt={self.mask_ratio_tilt} is not allowed; it must be in [0, 1]")
        if not (math.isfinite(self.ar_loss_weight) and self.ar_loss_weight >= 0):
            raise ValueError(f"ar_loss_weight={self.ar_loss_weight} is not allowed; it must be 0 or larger")
        if self.complementary_masks and noise_floor > 0.5:
            raise ValueError(
                f"noise_floor={noise_floor} is not allowed with complementary_masks=True: levels are between it and "
                "one minus it; it must be in (0, 0.5]"
            )
        if self.complementary_masks and self.mask_ratio_tilt > 0:
            raise ValueError(
                f"mask_ratio_tilt={self.mask_ratio_tilt} with complementary_masks=True is not allowed: the inverted "
                "mask hides earlier positions more often; use one of them"
            )
        self.block_length_schedule = _schedule(self.block_length_schedule)

    def check_model(self, spec: DiffusionSpec) -> None:
        """Raises ValueError for settings that have no meaning for the attention of a model."""
        wanted = {
            "noise_levels='block'": self.noise_levels == "block",
            f"mask_ratio_tilt={self.mask_ratio_tilt}": self.mask_ratio_tilt > 0,
            f"block_length_schedule={self.block_length_schedule}": self.block_length_schedule is not None,
        }
        for setting, used in wanted.items():
            if used and spec.attention not in BLOCK_KINDS:
                raise ValueError(
                    f"{setting} needs a model that denoises block by block (attention {' or '.join(BLOCK_KINDS)}); "
                    f"this one has attention={spec.attention!r}"
                )
        if self.attention_annealing_steps and spec.attention != "full":
            raise ValueError(
                f"attention_annealing_steps={self.attention_annealing_steps} needs attention 'full', to which it "
                f"leads; this model has attention={spec.attention!r}"
            )
        if self.ar_loss_weight > 0 and spec.attention != "context_causal":
            raise ValueError(
                f"ar_loss_weight={self.ar_loss_weight} needs attention 'context_causal', in which the clean copy of a "
                f"row is causal; this model has attention={spec.attention!r}"
            )

    def block_length_at(self, step: int, default: int | None) -> int | None:
        """Length of the attention blocks at an optimizer step; `default` without a schedule."""
        assert not isinstance(self.block_length_schedule, str)
        for start, length in self.block_length_schedule or ():
            if start <= step:
                default = length
        return default


def _schedule(value: Any) -> list[list[int]] | None:
    """The pairs of a schedule, from a list or JSON. Raises ValueError for anything else."""
    if value is None:
        return None
    said = f"block_length_schedule={value!r} is not allowed"
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{said}: it is not JSON ({error})") from None

    def whole(number: Any) -> bool:
        return isinstance(number, int) and not isinstance(number, bool)

    def is_pair(pair: Any) -> bool:
        is_list = isinstance(pair, Sequence) and not isinstance(pair, str)
        return is_list and len(pair) == 2 and all(map(whole, pair)) and pair[1] >= 1

    if not isinstance(value, list | tuple) or not value or not all(map(is_pair, value)):
        raise ValueError(f"{said}; give pairs [step, block length] such as [[0, 1], [1000, 4]], lengths 1 or larger")
    steps = [step for step, _ in value]
    if steps[0] != 0 or any(late <= early for early, late in itertools.pairwise(steps)):
        raise ValueError(f"{said}; the first step must be 0, and every later one larger than the one before")
    return [[step, length] for step, length in value]
