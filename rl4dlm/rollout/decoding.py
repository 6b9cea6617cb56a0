"""Decoding settings, and the registry of named schedules that they choose from.

Owns validation: a `DecodingConfig` that exists can be run. How schedules decide is in `schedules/`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from rl4dlm.models.attention import BLOCK_KINDS
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.rollout.caches import CachePolicy, build_cache, exact_cache
from rl4dlm.rollout.requests import check_fillings, check_policy, checked_names, checked_steps, completes
from rl4dlm.rollout.schedules import registry
from rl4dlm.rollout.schedules.parts import CanvasSchedule, Schedule


@dataclass(frozen=True)
class DecodingConfig:
    """How prompts are turned into completions.

    Args:
        canvas_length: completion slots L, in tokens.
        schedule: name of the schedule, see `available_schedules()`.
        steps: denoising steps S for the whole canvas; a multiple of the number of blocks. None: half the canvas length
            (two tokens per step), rounded up to a whole number per block. Schedules that decide for themselves how many
            steps they take (`threshold`) allow None only.
        block_length: length of the blocks that are written left to right; divides `canvas_length`. None: that of the
            model's attention blocks, or one block if it has none.
        temperature: 0 takes the most probable token.
        top_p: keep the smallest set of tokens whose probability reaches it. top_k: keep that many tokens; 0 is off.
        cfg_scale: weight w of classifier-free guidance `u + (w + 1)(c - u)`; 0 is off, otherwise each step costs two
            forwards.
        cache: name of the cache policy, see `available_caches()`. `"auto"`: the one that loses nothing, which is the
            exact block cache where the model's attention allows one and the schedule any, else `"none"`.
        cache_args: settings of the cache policy.
        stop_at_eos: finish a row as soon as an end-of-sequence token is written and every slot before it is too; the
            slots behind it are not decoded. `"block"` looks only when a block is complete, as dInfer does; schedules
            that can change what is written always do so, and those that reopen finished blocks never stop early. The
            valid part is the same either way, because it does not change any more.
        min_new_tokens: no end-of-sequence token is drawn for this many first slots.
        eos_penalty: subtracted from the logits of end-of-sequence tokens: larger values make longer completions.
        eos_penalty_decay: multiply it by the share of the canvas that is still open, so that it vanishes towards the
            end (Dream-Coder, arXiv 2509.01142, whose authors show 3.0).
        suppress_token_ids: ids taken out of the model's distribution (their logits become -inf).
        defer_token_ids: ids that may be candidates but are committed only when nothing else can be; for instruction
            models decoding one long block, which otherwise end too early (LLaDA, arXiv 2502.09992, appendix B.4).
        known_tokens: ids from this one on are never drawn: rows of an embedding that is larger than the tokenizer,
            which decode to nothing. They stay in the model's distribution. None: all may be.
        schedule_args: further settings of the schedule.
        draft_steps: D, guesses of a row's next states that are fed beside it; each that comes true is a step without a
            forward of its own, and all else is as without (`drafts.py`). 0 is off.
        draft_width: of the states so many steps ahead, how many are guessed; the first is the most likely one.
        record: what is kept besides what every rollout has, names in any order (`requests.py`): `"entropy"`, how sure
            the model was of each token, in `Trace.entropy` (leaving it out saves a quarter of a draw, and half of one
            at temperature 0, where the vocabulary is large); `"predictions"`, what the most probable tokens would make
            of the canvas at once; `"fillings"`, what draws would, and `"filling_log_probs"` of those; `"flagged"`,
            steps at which the schedule would have written nothing; `"policy"`, what a learned policy saw and chose;
            `"blocks"`, which block was active. Predictions and fillings need every open slot's logits, so that nothing
            is cached.
        record_steps: a row's own steps at which predictions and fillings are kept, from 0 on; None: every step.
        num_fillings: Z, fillings drawn at each of these; the first has the candidates of the step itself.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    canvas_length: int = 256
    schedule: str = "low_confidence"
    steps: int | None = None
    block_length: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    cfg_scale: float = 0.0
    cache: str = "auto"
    stop_at_eos: bool | Literal["block"] = True
    min_new_tokens: int = 0
    eos_penalty: float = 0.0
    eos_penalty_decay: bool = False
    suppress_token_ids: tuple[int, ...] = ()
    defer_token_ids: tuple[int, ...] = ()
    schedule_args: Mapping[str, Any] = field(default_factory=dict)
    known_tokens: int | None = None
    cache_args: Mapping[str, Any] = field(default_factory=dict)
    draft_steps: int = 0
    draft_width: int = 1
    record: tuple[str, ...] = ("entropy",)
    record_steps: tuple[int, ...] | None = None
    num_fillings: int = 1

    def __post_init__(self) -> None:
        for name in ("suppress_token_ids", "defer_token_ids"):
            ids = tuple(getattr(self, name))
            object.__setattr__(self, name, ids)
            if not all(isinstance(i, int) and i >= 0 for i in ids):
                raise ValueError(f"{name}={ids!r} is not allowed; token ids are integers from 0 on")
        required = ("canvas_length", "top_k", "min_new_tokens", "draft_steps", "draft_width")
        for name in (*required, "steps", "block_length", "known_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or (not isinstance(value, int) and (value is not None or name in required)):
                raise ValueError(f"{name}={value!r} is not allowed; it must be an integer")
        for name in ("temperature", "top_p", "cfg_scale", "eos_penalty"):
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), int | float):
                raise ValueError(f"{name}={getattr(self, name)!r} is not allowed; it must be a number")
        if self.known_tokens is not None and self.known_tokens < 1:
            raise ValueError(f"known_tokens={self.known_tokens} is not allowed; it must be 1 or larger, or None")
        if self.canvas_length < 1:
            raise ValueError(f"canvas_length={self.canvas_length} is not allowed; it must be 1 or larger")
        if self.block_length is not None and (self.block_length < 1 or self.canvas_length % self.block_length):
            raise ValueError(
                f"block_length={self.block_length} does not divide canvas_length={self.canvas_length}; "
                "allowed: its divisors, or None for one block"
            )
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} is not allowed; it must be 0 or larger, and finite")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} is not allowed; it must be in (0, 1]")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} is not allowed; it must be 0 (off) or larger")
        if not 0 <= self.cfg_scale < math.inf:
            raise ValueError(f"cfg_scale={self.cfg_scale} is not allowed; it must be 0 (off) or larger, and finite")
        if not 0 <= self.min_new_tokens <= self.canvas_length:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens} is not allowed; it must be 0 (off) to canvas_length="
                f"{self.canvas_length}"
            )
        if not math.isfinite(self.eos_penalty):
            raise ValueError(f"eos_penalty={self.eos_penalty} is not allowed; it must be finite (0 is off)")
        object.__setattr__(self, "record", checked_names(self.record))
        object.__setattr__(self, "record_steps", checked_steps(self.record_steps, self.record))
        check_fillings(self.num_fillings, self.record)
        if self.stop_at_eos not in (True, False, "block"):
            raise ValueError(f'stop_at_eos={self.stop_at_eos!r} is not allowed; choose True, False or "block"')
        if self.cache == "auto" and self.cache_args:
            raise ValueError(f"cache_args={self.cache_args!r} has no meaning for cache='auto'; name the policy")
        policy = build_cache("none" if self.cache == "auto" else self.cache, self.cache_args)
        entry = registry.lookup(self.schedule)
        if not entry.takes_steps and self.steps is not None:
            raise ValueError(
                f"steps={self.steps} has no meaning for schedule={self.schedule!r}, which takes as many steps as it "
                "needs; leave it None"
            )
        self._check_steps()
        schedule = self.build_schedule()
        check_policy(self.record, self.schedule, schedule)
        if isinstance(schedule, Schedule) and schedule.whole and policy.uses_store:
            raise ValueError(
                f"cache={self.cache!r} cannot be used with schedule={self.schedule!r}, which needs a forward of the "
                "whole row at every step; allowed: 'none' and 'auto'"
            )
        if completes(self.record) and policy.uses_store:
            raise ValueError(
                f"record={self.record!r} needs the logits of every open slot, which cache={self.cache!r} does not feed "
                "to it; allowed: 'none', and 'auto', which is 'none' then"
            )
        policy.check(self)
        self._check_drafts(schedule, policy)

    @property
    def num_blocks(self) -> int:
        """Number of blocks of the canvas."""
        return -(-self.canvas_length // (self.block_length or self.canvas_length))

    @property
    def steps_per_block(self) -> int:
        """Denoising steps in each block."""
        if self.steps is not None:
            return self.steps // self.num_blocks
        return -(-self.canvas_length // (2 * self.num_blocks))

    def arguments(self) -> Any:
        """`schedule_args` as the schedule's own settings dataclass. Raises ValueError on unknown or bad settings."""
        arguments = registry.lookup(self.schedule).arguments
        allowed = [f.name for f in fields(arguments) if f.init]
        if not isinstance(self.schedule_args, Mapping):
            raise ValueError(f"schedule_args={self.schedule_args!r} is not a mapping from setting to value")
        unknown = sorted(set(self.schedule_args) - set(allowed))
        if unknown:
            raise ValueError(
                f"schedule_args has unknown settings {unknown} for schedule={self.schedule!r}; allowed: {allowed}"
            )
        return arguments(**self.schedule_args)

    def for_model(self, spec: DiffusionSpec) -> DecodingConfig:
        """These settings for a model: where attention has blocks, they are the blocks that are written.

        There the canvas need not end with a block. A row whose prompt ends inside a block starts in that block, and so
        may have one block, and its share of the steps, more than others: `steps` is for rows that start a block.

        Raises:
            ValueError: the schedule is for another noise, `block_length` is not the model's, `steps` cannot be shared
                out over its blocks, or a canvas of random tokens would not be whole.
        """
        noise = registry.lookup(self.schedule).noise
        if spec.noise != "mask" and set(self.record) - {"entropy"}:
            raise ValueError(
                f"record={self.record!r} is not supported for noise={spec.noise!r}, whose states are all recorded; "
                "leave it at its default"
            )
        if noise != spec.noise:
            fitting = [name for name in registry.names() if registry.lookup(name).noise == spec.noise]
            raise ValueError(
                f"schedule={self.schedule!r} decodes models with noise={noise!r}, but this one has "
                f"noise={spec.noise!r}; choose one of {', '.join(fitting)}"
            )
        if spec.noise == "uniform" and (spec.block_length is None or self.canvas_length % spec.block_length):
            raise ValueError(
                f"canvas_length={self.canvas_length} is not a multiple of the {spec.block_length} tokens that the "
                "model denoises at a time"
            )
        schedule = self.build_schedule()
        if spec.attention == "written_first" and self.cfg_scale:
            raise ValueError(
                f"cfg_scale={self.cfg_scale} is not supported for attention='written_first', where a prompt of mask "
                "tokens would stand behind what is written; it must be 0"
            )
        if spec.attention not in BLOCK_KINDS:
            return self
        if isinstance(schedule, Schedule) and (schedule.whole or not schedule.blocks.on_grid):
            raise ValueError(
                f"schedule={self.schedule!r} cannot decode a model with attention={spec.attention!r}: it "
                + ("chooses its own blocks" if not schedule.blocks.on_grid else "looks beyond the active block")
                + f", and the model has blocks of {spec.block_length} tokens"
            )
        if self.block_length not in (None, spec.block_length):
            raise ValueError(
                f"block_length={self.block_length} contradicts the model, whose attention={spec.attention!r} has "
                f"blocks of {spec.block_length}; set it to {spec.block_length} or None"
            )
        settings = copy.copy(self)
        object.__setattr__(settings, "block_length", spec.block_length)
        settings._check_steps()
        return settings

    def one_token_per_step(self, spec: DiffusionSpec) -> DecodingConfig:
        """These settings with as many steps as slots, the baseline that parallel decoding is compared with.

        A schedule that decides for itself how many steps it takes gives way to `"low_confidence"`, and nothing is
        guessed ahead. Raises ValueError for a model without masks, whose canvases have no such steps.
        """
        if spec.noise != "mask":
            raise ValueError(f"one token per step has no meaning for noise={spec.noise!r}: canvases change as a whole")
        grid = spec.block_length if spec.attention in BLOCK_KINDS else self.block_length
        block = grid or self.canvas_length
        fixed = registry.lookup(self.schedule).takes_steps
        return replace(
            self,
            schedule=self.schedule if fixed else "low_confidence",
            schedule_args=self.schedule_args if fixed else {},
            steps=-(-self.canvas_length // block) * block,
            draft_steps=0,
            draft_width=1,
        ).for_model(spec)

    def knowing(self, tokens: int | None) -> DecodingConfig:
        """These settings with other `known_tokens`; those of a model stay those of that model."""
        settings = copy.copy(self)
        object.__setattr__(settings, "known_tokens", tokens)
        return settings

    def with_arguments(self, **arguments: Any) -> DecodingConfig:
        """These settings with other arguments of the schedule, where None takes one out; those of a model stay those of
        that model."""
        settings, changed = copy.copy(self), {**self.schedule_args, **arguments}
        left = {name: value for name, value in changed.items() if name not in arguments or value is not None}
        object.__setattr__(settings, "schedule_args", left)
        check_policy(self.record, self.schedule, settings.build_schedule())
        return settings

    def exactly(self) -> DecodingConfig:
        """These settings with the cache that loses nothing; those of a model stay those of that model."""
        settings = copy.copy(self)
        object.__setattr__(settings, "cache", "auto")
        object.__setattr__(settings, "cache_args", {})
        return settings

    def _check_steps(self) -> None:
        if self.steps is not None and (self.steps < self.num_blocks or self.steps % self.num_blocks):
            raise ValueError(
                f"steps={self.steps} cannot be shared out over {self.num_blocks} blocks (canvas_length="
                f"{self.canvas_length}, block_length={self.block_length}); it must be a positive multiple of "
                f"{self.num_blocks}"
            )

    def _check_drafts(self, schedule: Schedule | CanvasSchedule, policy: CachePolicy) -> None:
        if self.draft_steps < 0:
            raise ValueError(f"draft_steps={self.draft_steps} is not allowed; it must be 0 (off) or larger")
        if self.draft_width < 1 or (self.draft_width > 1 and not self.draft_steps):
            raise ValueError(
                f"draft_width={self.draft_width} is not allowed with draft_steps={self.draft_steps}; it must be 1, or "
                "larger where steps are guessed"
            )
        if self.draft_steps and not (isinstance(schedule, Schedule) and schedule.memoryless):
            raise ValueError(
                f"draft_steps={self.draft_steps} cannot be used with schedule={self.schedule!r}, whose steps follow "
                "from more than the tokens that are written; leave it 0"
            )
        if self.draft_steps and set(self.record) - {"entropy"}:
            raise ValueError(
                f"record={self.record!r} cannot be kept with draft_steps={self.draft_steps}, whose guesses would be "
                "recorded, too; allowed: 'entropy'"
            )
        if self.draft_steps and not policy.feeds_again:
            raise ValueError(
                f"draft_steps={self.draft_steps} cannot be used with cache={self.cache!r} and cache_args="
                f"{dict(self.cache_args)}, where a step of a block may see what the one before it stored; allowed: "
                "'none', and 'prefix' and 'dual' that are not refreshed inside a block"
            )

    def build_cache(self, spec: DiffusionSpec) -> CachePolicy:
        """The cache policy for a model."""
        if self.cache != "auto":
            return build_cache(self.cache, self.cache_args)
        schedule = self.build_schedule()
        fits = isinstance(schedule, Schedule) and not schedule.whole and not completes(self.record)
        return build_cache(exact_cache(spec.attention) if fits else "none")

    def build_schedule(self) -> Schedule | CanvasSchedule:
        """The schedule with these settings."""
        return registry.lookup(self.schedule).build(self.arguments(), self)


def available_schedules() -> list[str]:
    """Names that `DecodingConfig.schedule` allows."""
    return registry.names()


def schedule_arguments(name: str) -> type:
    """The settings dataclass of a schedule, for `schedule_args`. Raises ValueError for an unknown name."""
    return registry.lookup(name).arguments
