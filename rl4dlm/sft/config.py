"""The settings of masked supervised fine-tuning.

Owns what may be set and what must not be combined; what the settings do is `trainer.py`'s, and what turns an
autoregressive model into a denoiser `settings.py`'s.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from trl import SFTConfig

from rl4dlm.likelihood.turns import TURNS
from rl4dlm.models.attention import BLOCK_KINDS
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.sft.causal_attention import CausalAttentionSettings
from rl4dlm.sft.settings import AdaptationSettings
from rl4dlm.tracking.trackers import TrackerSettings
from rl4dlm.training.config import set_but_not_supported
from rl4dlm.training.guard import MAX_SKIPPED_STEPS, check_guard
from rl4dlm.training.precision import check_precision, settle

EOS_PADDING = ("none", "longest", "max_length", "canvas")

_NOT_SUPPORTED = {
    "packing": "rows packed together would see each other under bidirectional attention",
    "eval_packing": "rows packed together would see each other under bidirectional attention",
    "padding_free": "rows packed together would see each other under bidirectional attention",
    "loss_type": "the loss is the masked cross-entropy",
    "label_smoothing_factor": "the loss is the masked cross-entropy",
}


class _Unset(int):
    """A default that can be told from the same number given."""


@dataclass
class DiffusionSFTConfig(AdaptationSettings, CausalAttentionSettings, TrackerSettings, SFTConfig):
    """Settings of masked SFT: those of `trl.SFTConfig`, `AdaptationSettings` and `CausalAttentionSettings`, with these.

    Args:
        noise_floor: eps, the smallest level; weights are at most 1/eps.
        eos_padding: `"none"`: padding is hidden and no target. `"longest"` and `"max_length"`: rows are padded with
            end-of-sequence tokens, targets like any other, to the batch's longest or to `max_length`, so that the model
            learns to fill a canvas after its answer. `"canvas"`: every completion is padded so, to
            `max_completion_length`, and what makes a batch rectangular is hidden.
        max_completion_length: examples with longer completions, in tokens, are left out, not cut: what is learnt fits
            the canvas that RL then decodes (length-aligned SFT; IGPO, arXiv 2509.10396). Without `max_length`.
        max_length: TRL's, which cuts rows; by default TRL's number, or None where `max_completion_length` is set.
        random_truncation: cut and pad the completions of each micro-batch to the length of a random one of them; the
            padding is end-of-sequence tokens, targets like any other. So lengths vary, and padding is a small part of
            what is learnt (Dream-Coder, arXiv 2509.01142). Training alone is affected.
        turns: what tokens of an answer see of other turns in their own block, for models that denoise block by block:
            `"together"`, all that the noisy copy holds; `"as_decoded"`, earlier turns finished and no later ones; or
            `"apart"`, none of them. See `rl4dlm.likelihood.turns`; it holds in evaluation, too. Several answers in a
            row need `assistant_only_loss=True`, or labels that mark them.
        max_skipped_steps: optimizer steps in a row that may be skipped because something in them is not finite, before
            the run is given up; see `rl4dlm.training.guard`.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    max_length: int | None = field(
        default=_Unset(SFTConfig.__dataclass_fields__["max_length"].default),
        metadata={"help": "Tokens of a row; longer ones are cut. Default: 1024, or none with max_completion_length."},
    )
    noise_floor: float = field(default=1e-3, metadata={"help": "Smallest share of tokens that a level hides."})
    eos_padding: str = field(
        default="none",
        metadata={
            "help": "Pad with end-of-sequence tokens that are trained on: none, longest (of the batch), max_length, or "
            "canvas (each completion to max_completion_length).",
            "choices": list(EOS_PADDING),
        },
    )
    max_completion_length: int | None = field(
        default=None, metadata={"help": "Leave out examples with longer completions, in tokens."}
    )
    random_truncation: bool = field(
        default=False,
        metadata={"help": "Cut and pad the completions of a micro-batch to the length of a random one of them."},
    )
    turns: str = field(
        default=TURNS[0],
        metadata={
            "help": "What answers see of other turns in their own block: together (all), as_decoded (earlier ones, "
            "finished) or apart (none).",
            "choices": list(TURNS),
        },
    )
    max_skipped_steps: int = field(
        default=MAX_SKIPPED_STEPS,
        metadata={"help": "Steps in a row that may be skipped because something in them is not finite."},
    )

    def __post_init__(self) -> None:
        if isinstance(self.max_length, _Unset):
            self.max_length = int(self.max_length) if self.max_completion_length is None else None
        refused = set_but_not_supported(self, _NOT_SUPPORTED)
        settle(self)
        super().__post_init__()
        check_precision(self)
        if refused:
            raise ValueError("; ".join(refused))
        check_guard(self)
        if isinstance(self.dataset_kwargs, dict) and self.dataset_kwargs.get("skip_prepare_dataset"):
            raise ValueError(
                "dataset_kwargs={'skip_prepare_dataset': True} is not supported: examples must be numbered. A dataset "
                "with a column `input_ids` (and `labels`) is used as it is."
            )
        if not 0 < self.noise_floor <= 1:
            raise ValueError(f"noise_floor={self.noise_floor} is not allowed; it must be in (0, 1]")
        if self.eos_padding not in EOS_PADDING:
            raise ValueError(f"eos_padding={self.eos_padding!r} is not allowed; choose one of {', '.join(EOS_PADDING)}")
        if self.eos_padding == "max_length" and self.max_length is None:
            raise ValueError("eos_padding='max_length' needs max_length, which is None")
        if self.max_completion_length is not None:
            if self.max_completion_length < 1:
                raise ValueError(
                    f"max_completion_length={self.max_completion_length} is not allowed; it must be 1 or larger"
                )
            if self.max_length is not None:
                raise ValueError(
                    f"max_length={self.max_length} with max_completion_length={self.max_completion_length} is not "
                    "allowed: it cuts examples before they are measured; leave max_length out"
                )
        elif self.eos_padding == "canvas":
            raise ValueError("eos_padding='canvas' needs max_completion_length, which is None")
        if self.random_truncation and self.eos_padding != "none":
            raise ValueError(
                f"eos_padding={self.eos_padding!r} with random_truncation=True is not allowed: both say how "
                "completions are padded; use one of them"
            )
        if self.turns not in TURNS:
            raise ValueError(f"turns={self.turns!r} is not allowed; choose one of {', '.join(TURNS)}")
        if self.turns != TURNS[0] and self.loss_weight == "cart":
            raise ValueError(
                f"loss_weight='cart' with turns={self.turns!r} is not supported: it weighs tokens by neighbours that "
                "are not there for them; use another weight, or turns='together'"
            )
        self.check_adaptation(self.noise_floor)
        self.check_causal()
        for name in ("random_truncation", "attention_annealing_steps"):
            if self.causal_weight and getattr(self, name):
                raise ValueError(
                    f"{name}={getattr(self, name)} with causal_weight={self.causal_weight} is not supported: tokens "
                    "that are in an edge may be cut off, or hidden from each other; use one of them"
                )

    def check_model(self, spec: DiffusionSpec) -> None:
        """Raises ValueError for settings that have no meaning for a model."""
        if spec.noise != "mask":
            raise ValueError(
                "masked supervised training hides targets behind a mask token, so it is not offered for models with "
                f"noise={spec.noise!r}"
            )
        super().check_model(spec)
        self.check_causal_model(spec)
        if self.turns != TURNS[0] and spec.attention not in BLOCK_KINDS:
            raise ValueError(
                f"turns={self.turns!r} needs a model that denoises block by block (attention "
                f"{' or '.join(BLOCK_KINDS)}); this one has attention={spec.attention!r}"
            )
