"""The settings every RL algorithm shares: TRL's, those of decoding and scoring, and which of TRL's make no sense here.

Owns validation. An algorithm's own settings are in its file.
"""

from __future__ import annotations

import math
import re
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar

from trl import GRPOConfig

from rl4dlm.likelihood.estimator import SCOPES, Estimator
from rl4dlm.likelihood.masks import check_choice, check_scope
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.rollout.compiling import check_backend
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.tracking.trackers import TrackerSettings
from rl4dlm.training.audit_settings import AuditSettings, check_audit
from rl4dlm.training.backend_settings import BackendSettings, check_backend_settings
from rl4dlm.training.clip_settings import ClipSettings, check_clip
from rl4dlm.training.guard import MAX_SKIPPED_STEPS, check_guard
from rl4dlm.training.precision import check_precision, settle

OVERLONG_PROMPTS = ("error", "filter")
KL_ESTIMATORS = ("k1", "k2", "k3")
KL_TARGETS = ("reference", "old")
VIEW_KEYS = ("row", "prompt")

_CAUSAL_GENERATION = "it belongs to left-to-right generation; completions come from the rollout engine here"
_NOT_SUPPORTED = {
    "use_vllm": _CAUSAL_GENERATION,
    "use_transformers_continuous_batching": _CAUSAL_GENERATION,
    "use_transformers_paged": _CAUSAL_GENERATION,
    "transformers_continuous_batching_config": _CAUSAL_GENERATION,
    "cache_implementation": f"{_CAUSAL_GENERATION}; choose a cache policy with `cache`",
    "generation_kwargs": f"{_CAUSAL_GENERATION}; see `schedule_args`",
    "min_p": f"{_CAUSAL_GENERATION}; use top_p or top_k",
    "repetition_penalty": _CAUSAL_GENERATION,
    "max_tool_calling_iterations": "tools are not supported",
    "cast_lm_head_to_fp32": "log-probabilities are computed in float32 already",
    "neftune_noise_alpha": "noise on embeddings would make policy ratios random",
    "label_smoothing_factor": "no loss here uses it",
    "train_sampling_strategy": "prompts are drawn in groups; set shuffle_dataset=False to take them in order",
    "length_column_name": "prompts are drawn in groups, whatever their lengths",
}

_OWN_LOSS = "the algorithm has a loss of its own"
_NO_ENTROPY = "the loss has no entropy term"
OWN_LOSS = {
    "loss_type": _OWN_LOSS,
    "importance_sampling_level": _OWN_LOSS,
    "sapo_temperature_neg": _OWN_LOSS,
    "sapo_temperature_pos": _OWN_LOSS,
    "vespo_k_pos": _OWN_LOSS,
    "vespo_lambda_pos": _OWN_LOSS,
    "vespo_k_neg": _OWN_LOSS,
    "vespo_lambda_neg": _OWN_LOSS,
    "off_policy_mask_threshold": _OWN_LOSS,
    "top_entropy_quantile": _OWN_LOSS,
    "use_bias_correction_kl": _OWN_LOSS,
    "rollout_correction": _OWN_LOSS,
    "entropy_coef": _NO_ENTROPY,
    "use_adaptive_entropy": _NO_ENTROPY,
    "entropy_coef_min": _NO_ENTROPY,
    "entropy_coef_max": _NO_ENTROPY,
    "entropy_coef_delta": _NO_ENTROPY,
    "entropy_target": _NO_ENTROPY,
}
"""Settings of TRL's loss that nothing reads where an algorithm defines `loss`, and why, for `set_but_not_supported`."""


@dataclass
class DiffusionPolicyConfig(AuditSettings, BackendSettings, ClipSettings, TrackerSettings, GRPOConfig):
    """Settings of a `DiffusionPolicyTrainer`: those of `trl.GRPOConfig`, with these added or changed.

    `temperature`, `top_p`, `top_k`, `seed` and `max_completion_length` (the canvas) keep TRL's names. TRL's settings
    for left-to-right generation are refused when set. Those of inexact rollouts are `AuditSettings`', those of
    rollouts from elsewhere `BackendSettings`', those of policy ratios `ClipSettings`'.

    Args:
        schedule: which tokens are written when; see `available_schedules()`.
        denoising_steps: steps for the whole canvas. None: half the canvas length.
        block_length: blocks are written left to right; None: those of the algorithm's paper (`paper_block_length`)
            where the canvas holds several, else one block. A model with blocks in its attention is decoded in these.
        cfg_scale: classifier-free guidance, in decoding and in scoring; 0 is off.
        cache: cache policy of the rollout; `"auto"` is the one that loses nothing. See docs/rollouts.md for the others,
            which are not exact for full attention.
        cache_args: settings of the cache policy, a mapping in YAML or JSON on the command line.
        rollout_compile: backend of `torch.compile` for the forwards of the rollout (`"inductor"`), which pays where
            they are small and shapes repeat; None: they are not compiled.
        stop_at_eos: stop a row once everything up to its first end-of-sequence token is written.
        eos_penalty: off the logits of end tokens. eos_penalty_decay: fades with the share of the canvas that is open.
        suppress_token_ids: ids that are never drawn. defer_token_ids: ids that are committed last.
        draw_unknown_tokens: also draw ids behind the tokenizer's, which decode to nothing: rows of an embedding that is
            larger than the tokenizer.
        schedule_args: settings of the schedule, a mapping in YAML or JSON on the command line.
        rollout_batch_size: rows that each process decodes at a time. None: all of a generation batch.
        scope: which tokens are noised and scored: `"valid"` ones, up to the first end, or the whole `"canvas"`.
        kl_estimator: of the KL term, whose weight is `beta`: `"k3"`, TRL's, `"k2"`, or `"k1"`; see
            `rl4dlm.training.losses.kl_estimate`.
        kl_target: the policy that the KL term is to: the `"reference"`, or the `"old"` one that wrote the completions,
            for which no reference model is loaded; it acts from the second optimizer step on a batch on.
        use_bias_correction_kl: multiply a KL term per token by the policy ratio (arXiv 2512.02556): TRL's default, in
            none of the papers. The gradient of `"k3"` is the right one only with it, and `"k1"` needs it.
        negative_advantage_weight: multiplies advantages below zero; the papers' is 1. At 0 only completions above the
            baseline teach, which helps where tokens are scored in other contexts than those they were drawn in.
        score_temperature: divides the logits that losses are computed from. The papers use 1 whatever `temperature` is.
        one_view: score the views of a completion one after another instead of at once: the memory of one view, for one
            forward more. Losses and gradients are the same.
        views_keyed_by: `"row"`, the papers': each completion has masks of its own; or `"prompt"`: the completions of a
            prompt have the same ones, where the estimator allows that (diffu-GRPO, wd1, coupled-GRPO, UniGRPO). Each
            estimate stays what it is. The inputs of diffu-GRPO and wd1 are then equal, and fed once for all of a group.
        max_prompt_length: longest prompt allowed, in tokens of the rendered prompt. None: what the model can hold.
        overlong_prompts: `"error"`, or `"filter"` to leave longer ones out. Prompts are never truncated.
        log_replays: rows of a logged batch that get a replay of their denoising, a page in `<output_dir>/replays`; the
            table of completions has a column of links. Needs `log_completions`.
        log_total_limit: pages of replays and tables of completions that are kept, the newest; None: all.
        max_skipped_steps: optimizer steps in a row that may be skipped because something in them is not finite, before
            the run is given up; see `rl4dlm.training.guard`.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    kl_per_token: ClassVar[bool] = True
    """Whether the KL term is per token, and not per view or sequence."""

    paper_block_length: ClassVar[int | None] = None
    """Length of the blocks that the algorithm's paper decodes in; None: it has none, or one for each task."""

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "schedule_args", "cache_args"]  # noqa: RUF012  (transformers' own form)

    max_completion_length: int | None = field(
        default=256, metadata={"help": "Length of the canvas, in tokens: the completion slots the model sees."}
    )
    disable_dropout: bool = field(
        default=True,
        metadata={"help": "Switch dropout off in policy and reference, so that ratios start at exactly 1."},
    )
    schedule: str = field(
        default="low_confidence", metadata={"help": "Name of the decoding schedule: which tokens are written when."}
    )
    denoising_steps: int | None = field(
        default=None, metadata={"help": "Denoising steps for the whole canvas. Default: half the canvas length."}
    )
    block_length: int | None = field(
        default=None,
        metadata={"help": "Length of the blocks written left to right. Default: the paper's, else one block."},
    )
    _paper_blocks: bool = field(default=False, init=False, repr=False)
    cfg_scale: float = field(default=0.0, metadata={"help": "Weight of classifier-free guidance; 0 switches it off."})
    cache: str = field(
        default="auto", metadata={"help": "Cache policy of the rollout; auto is the exact one, if there is one."}
    )
    cache_args: dict | str | None = field(
        default=None, metadata={"help": "Settings of the cache policy, as a mapping (JSON on the command line)."}
    )
    rollout_compile: str | None = field(
        default=None, metadata={"help": "Backend of torch.compile for the forwards of the rollout. Default: none."}
    )
    stop_at_eos: bool = field(
        default=True, metadata={"help": "Stop a row once everything up to its first end-of-sequence token is written."}
    )
    min_new_tokens: int = field(
        default=0, metadata={"help": "No end-of-sequence token is drawn at this many first slots of the canvas."}
    )
    eos_penalty: float = field(
        default=0.0, metadata={"help": "Subtracted from the logits of end-of-sequence tokens while decoding."}
    )
    eos_penalty_decay: bool = field(
        default=False, metadata={"help": "Multiply eos_penalty by the share of the canvas that is still open."}
    )
    suppress_token_ids: list[int] | None = field(default=None, metadata={"help": "Token ids that are never drawn."})
    draw_unknown_tokens: bool = field(
        default=False,
        metadata={"help": "Let ids be drawn that are behind the tokenizer's and decode to nothing."},
    )
    defer_token_ids: list[int] | None = field(
        default=None, metadata={"help": "Token ids that are committed only when nothing else can be."}
    )
    schedule_args: dict | str | None = field(
        default=None, metadata={"help": "Further settings of the schedule, as a mapping (JSON on the command line)."}
    )
    rollout_batch_size: int | None = field(
        default=None, metadata={"help": "Rows each process decodes at a time. Default: its whole generation batch."}
    )
    scope: str = field(
        default="valid",
        metadata={"help": "Tokens that are noised and scored: valid or canvas.", "choices": list(SCOPES)},
    )
    use_bias_correction_kl: bool = field(
        default=False, metadata={"help": "Multiply a KL term per token by the policy ratio (arXiv 2512.02556)."}
    )
    kl_estimator: str = field(
        default="k3", metadata={"help": "Estimator of the KL term: k1, k2 or k3.", "choices": list(KL_ESTIMATORS)}
    )
    kl_target: str = field(
        default="reference",
        metadata={"help": "Policy that the KL term is to: reference or old.", "choices": list(KL_TARGETS)},
    )
    negative_advantage_weight: float = field(
        default=1.0,
        metadata={"help": "Multiplies advantages below zero; at 0 only completions above the baseline teach."},
    )
    score_temperature: float = field(
        default=1.0, metadata={"help": "Divides the logits that log-probabilities in the loss are computed from."}
    )
    one_view: bool = field(
        default=False,
        metadata={"help": "Score the views of a completion one after another: less memory, one forward more."},
    )
    views_keyed_by: str = field(
        default="row",
        metadata={"help": "What has masks of its own: each row, or each prompt.", "choices": list(VIEW_KEYS)},
    )
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Longest prompt allowed, in tokens. Default: what the model's positions hold."}
    )
    overlong_prompts: str = field(
        default="error",
        metadata={"help": "What to do with longer prompts: error or filter.", "choices": list(OVERLONG_PROMPTS)},
    )
    log_replays: int = field(
        default=0, metadata={"help": "Rows of a logged batch that get a page that replays their denoising."}
    )
    log_total_limit: int | None = field(
        default=100, metadata={"help": "Replay pages and tables of completions to keep, the newest ones."}
    )
    max_skipped_steps: int = field(
        default=MAX_SKIPPED_STEPS,
        metadata={"help": "Steps in a row that may be skipped because something in them is not finite."},
    )

    def __post_init__(self) -> None:
        refused = set_but_not_supported(self, _NOT_SUPPORTED, prefixes=("vllm_",))
        settle(self)
        super().__post_init__()
        check_precision(self)
        if refused:
            raise ValueError("; ".join(refused))
        check_guard(self)
        if self.router_aux_loss_coef:
            raise ValueError(f"router_aux_loss_coef={self.router_aux_loss_coef} is not supported; allowed: None or 0")
        if self.max_completion_length is None:
            raise ValueError("max_completion_length=None is not allowed: the canvas has a length; give an integer")
        if self.block_length is None:
            self.block_length = self.default_block_length(self.max_completion_length)
            self._paper_blocks = self.block_length is not None
        for name in ("rollout_batch_size", "max_prompt_length", "log_total_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} is not allowed; it must be 1 or larger, or None")
        if self.log_replays < 0:
            raise ValueError(f"log_replays={self.log_replays} is not allowed; it must be 0 (none) or larger")
        if self.log_replays and not self.log_completions:
            raise ValueError(
                f"log_replays={self.log_replays} needs log_completions=True: replays are linked from logged completions"
            )
        if not 0 <= self.negative_advantage_weight < math.inf:
            raise ValueError(
                f"negative_advantage_weight={self.negative_advantage_weight} is not allowed; it must be 0 or larger"
            )
        if not self.score_temperature > 0:
            raise ValueError(f"score_temperature={self.score_temperature} is not allowed; it must be larger than 0")
        if self.overlong_prompts not in OVERLONG_PROMPTS:
            raise ValueError(
                f"overlong_prompts={self.overlong_prompts!r} is not allowed; choose one of "
                f"{', '.join(OVERLONG_PROMPTS)}"
            )
        check_scope(self.scope)
        check_choice("views_keyed_by", self.views_keyed_by, VIEW_KEYS)
        if self.scope == "canvas" and self.stop_at_eos:
            raise ValueError(
                "scope='canvas' is not allowed with stop_at_eos=True: what is behind the end would be scored without "
                "having been drawn; set stop_at_eos to False, or scope to valid"
            )
        if self.eos_penalty_decay and not self.eos_penalty:
            raise ValueError("eos_penalty_decay=True has no effect with eos_penalty=0; set a penalty, or leave it out")
        check_backend("rollout_compile", self.rollout_compile)
        check_clip(self)
        _check_delta(self)
        check_audit(self)
        check_backend_settings(self)
        self._check_kl()
        for name in ("schedule_args", "cache_args"):
            if isinstance(getattr(self, name), str):
                raise ValueError(f"{name}={getattr(self, name)!r} is not a mapping; on the command line, give JSON")
        self.decoding()

    def _check_kl(self) -> None:
        """Refuses KL terms that would do nothing, or something else than hold the policy back."""
        check_choice("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        check_choice("kl_target", self.kl_target, KL_TARGETS)
        if not self.beta:
            idle = dict.fromkeys(
                ("kl_estimator", "kl_target", "use_bias_correction_kl"), "there is no KL term at beta=0"
            )
            refused = set_but_not_supported(self, idle)
            if refused:
                raise ValueError("; ".join(refused))
            return
        # Of whole sequences and views there is no ratio that could complete k1, and k2 has the gradient that it lacks.
        if self.kl_estimator == "k1" and not (self.kl_per_token and self.use_bias_correction_kl):
            remedy = "set use_bias_correction_kl=True, or choose" if self.kl_per_token else "choose"
            raise ValueError(
                f"kl_estimator='k1' is not allowed here: its plain gradient does not depend on the {self.kl_target} "
                f"policy, and makes what was drawn unlikely from the second step on a batch on; {remedy} k2 or k3"
            )
        if self.kl_estimator == "k2" and self.use_bias_correction_kl:
            raise ValueError(
                "use_bias_correction_kl=True is not allowed with kl_estimator='k2', whose gradient is the right one "
                "without it; set it to False, or choose k1 or k3"
            )
        if self.kl_target == "old":
            self._check_old_policy()

    def _check_old_policy(self) -> None:
        if self.sync_ref_model:
            raise ValueError("sync_ref_model=True is not allowed with kl_target='old': there is no reference model")
        assert self.steps_per_generation is not None
        # As TRL decides whether the policy that wrote the completions is scored.
        if self.gradient_accumulation_steps % (self.steps_per_generation * self.num_iterations) == 0:
            raise ValueError(
                f"kl_target='old' has no effect with num_iterations={self.num_iterations}, steps_per_generation="
                f"{self.steps_per_generation} and gradient_accumulation_steps={self.gradient_accumulation_steps}: each "
                "batch is used for one optimizer step, at which the policy is the one that wrote the completions; "
                "raise num_iterations or steps_per_generation, or set beta=0 and kl_target to reference"
            )

    def default_block_length(self, canvas_length: int) -> int | None:
        """`block_length` where it is not given: the paper's if the canvas holds several, else None, for one block."""
        block = self.paper_block_length
        return block if block and canvas_length > block and canvas_length % block == 0 else None

    def recorded(self) -> tuple[str, ...]:
        """What rollouts keep besides what all have, for an algorithm that learns from it; see `DecodingConfig`."""
        return ("entropy",)

    def decoding(self, spec: DiffusionSpec | None = None, **recorded: Any) -> DecodingConfig:
        """How rollouts are decoded, by a model with this spec if given: then in the blocks of its attention.

        `recorded` are settings of `DecodingConfig` in the place of what the algorithm records.

        Raises ValueError for settings that do not fit together or do not fit the model, by their names here.
        """
        assert self.max_completion_length is not None
        assert not isinstance(self.schedule_args, str) and not isinstance(self.cache_args, str)
        models_own = self._paper_blocks and spec is not None and spec.block_length is not None
        try:
            settings = DecodingConfig(
                canvas_length=self.max_completion_length,
                schedule=self.schedule,
                steps=self.denoising_steps,
                block_length=None if models_own else self.block_length,
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                cfg_scale=self.cfg_scale,
                cache=self.cache,
                cache_args=self.cache_args or {},
                stop_at_eos=self.stop_at_eos,
                min_new_tokens=self.min_new_tokens,
                eos_penalty=self.eos_penalty,
                eos_penalty_decay=self.eos_penalty_decay,
                suppress_token_ids=tuple(self.suppress_token_ids or ()),
                defer_token_ids=tuple(self.defer_token_ids or ()),
                schedule_args=self.schedule_args or {},
                **{"record": self.recorded(), **recorded},
            )
            return settings if spec is None else settings.for_model(spec)
        except ValueError as error:
            message = re.sub(r"\bcanvas_length\b", "max_completion_length", str(error))
            raise ValueError(re.sub(r"\bsteps=", "denoising_steps=", message)) from None


def _check_delta(config: DiffusionPolicyConfig) -> None:
    """Refuses a `delta` within the clip range, at whose upper end the loss of completions with A < 0 is not bounded."""
    high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    if config.delta is not None and not config.delta > 1 + high:
        raise ValueError(
            f"delta={config.delta} is not allowed; it must be larger than 1 + epsilon_high = {1 + high:g}, where "
            "ratios are clipped, or None"
        )


def check_view_key(config: DiffusionPolicyConfig, estimator: Estimator) -> None:
    """Refuses masks that completions share where the estimator has none that mean the same for all of them."""
    if config.views_keyed_by != "row" and not estimator.shares_masks:
        raise ValueError(
            f"views_keyed_by={config.views_keyed_by!r} is not supported: {estimator} has no masks that the completions "
            "of a prompt could share; allowed here: 'row'"
        )


def check_ratio_level(config: Any, estimator: Any) -> None:
    """Refuses ratios of whole sequences where the estimator's scores do not add up to a log-likelihood."""
    if not estimator.reweighted:
        return
    for name, value, allowed in (("importance_sampling_level", "sequence", "token"), ("loss_type", "vespo", "grpo")):
        if getattr(config, name) == value:
            raise ValueError(
                f"{name}={value!r} is not allowed: its ratio is one of whole sequences, but the scores of tokens are "
                f"reweighted and do not add up to a log-likelihood; choose another one, such as {allowed!r}"
            )


def set_but_not_supported(config: Any, reasons: dict[str, str], prefixes: tuple[str, ...] = ()) -> list[str]:
    """One sentence for each setting of a config dataclass that differs from its default and is not supported."""
    found = []
    for entry in fields(config):
        reason = reasons.get(entry.name) or (_CAUSAL_GENERATION if entry.name.startswith(prefixes) else None)
        default = entry.default if entry.default_factory is MISSING else entry.default_factory()
        value = getattr(config, entry.name)
        if reason and value != default:
            found.append(f"{entry.name}={value!r} is not supported: {reason}")
    return found


def refused_settings(config_class: type) -> list[str]:
    """Names of the settings of TRL's that an RL config refuses, or that its algorithm's loss does not read."""
    if not issubclass(config_class, DiffusionPolicyConfig):
        return []
    names = [entry.name for entry in fields(config_class)]
    return [name for name in names if name in _NOT_SUPPORTED or name.startswith("vllm_")]
