"""The rollout engine: prompts to rollouts under a schedule and a cache policy.

`RolloutEngine` owns what goes in and what comes out: it checks a call, shares rows out over batches and collects what
they record. It knows nothing about tokenization, rewards or training; the loops over steps are in `step.py` and, for
models whose noise is random tokens, in `uniform.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tqdm.auto import tqdm

from rl4dlm.models.attention import Sight, attention_mask
from rl4dlm.models.canvas import denoises_canvases
from rl4dlm.models.scoring import attach_scoring
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.rollout.caches import CachePolicy
from rl4dlm.rollout.compiling import check_backend, compiled, keep_freed_memory
from rl4dlm.rollout.constraints.automata import Automaton, Constraint
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.drafts import DraftBatch
from rl4dlm.rollout.noise import KeyedNoise, NoiseSource
from rl4dlm.rollout.record import Record
from rl4dlm.rollout.rollout import Rollout, valid_mask
from rl4dlm.rollout.rows import Choices, Progress, most_steps
from rl4dlm.rollout.schedules.parts import CanvasSchedule, Schedule
from rl4dlm.rollout.step import Batch
from rl4dlm.rollout.uniform import CanvasBatch, CanvasRecord

logger = logging.getLogger(__name__)

_said: set[tuple[str, str, str]] = set()
"""Of which caches, attention and schedules it has been logged what `cache="auto"` stands for."""

PROGRESS_DELAY = 5.0
"""Seconds after which a progress bar appears."""


class RolloutEngine:
    """Decodes prompts with a denoiser.

    Args:
        model: a denoiser (or a PEFT model around one); scoring is attached if it is not yet.
        spec: how it denoises; None reads it from the model.
        max_batch_rows: rows decoded at the same time; None decodes all at once.
        progress: shows a progress bar when decoding takes longer than a few seconds.
        in_step: for models that are sharded over processes (FSDP, ZeRO-3), where every process must make each forward
            that another makes. Called before each forward with True, and with False by a process that has none left;
            returns, once all have called it, whether any said True. While that is so a process that has nothing left
            to decode makes idle forwards of one token. None: processes need not wait for each other.
        compile: backend of `torch.compile` for the model's trunk, `"inductor"` or another one; shapes repeat where rows
            are of one length and blocks of another, so that little is compiled again. None: nothing is compiled.
    """

    def __init__(
        self,
        model: Any,
        spec: DiffusionSpec | None = None,
        *,
        max_batch_rows: int | None = None,
        progress: bool = False,
        in_step: Callable[[bool], bool] | None = None,
        compile: str | None = None,
    ) -> None:
        check_backend("compile", compile)
        if max_batch_rows is not None and max_batch_rows < 1:
            raise ValueError(f"max_batch_rows={max_batch_rows} is not allowed; it must be 1 or larger, or None")
        self.model = attach_scoring(model)
        own = DiffusionSpec.of(model)
        self.spec = spec or own
        for name in ("logit_shift", "attention", "block_length", "grid_origin", "noise"):
            given, true = getattr(self.spec, name), getattr(own, name)
            if given != true:
                raise ValueError(f"spec has {name}={given!r}, but the model says {name}={true!r}")
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if self.spec.noise == "uniform" and not denoises_canvases(base):
            raise ValueError(
                f"noise='uniform' can be decoded with models that denoise a canvas over an encoded prefix only "
                f"(DiffusionGemma), not with {type(base).__name__}"
            )
        self.max_batch_rows = max_batch_rows
        self.progress = progress
        self.in_step = in_step
        self.compile = compile
        self.weight_version: int | None = None

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        config: DecodingConfig,
        *,
        num_generations: int = 1,
        row_ids: Sequence[int] | None = None,
        seed: int = 0,
        hints: Sequence[Mapping[int, int]] | None = None,
        choices: Sequence[Mapping[int, Collection[int]]] | None = None,
        constraint: Constraint | None = None,
        noise: NoiseSource | None = None,
        on_step: Callable[[Progress], None] | None = None,
    ) -> Rollout:
        """Decodes each prompt `num_generations` times.

        Args:
            prompts: token ids, without padding.
            config: the decoding settings.
            num_generations: G; rows are prompt-major, `row = prompt * G + g`.
            row_ids: one integer per row that keys its randomness; a row's result depends on it, the seed, the prompt
                and the weights alone. None: 0, 1, 2, ….
            seed: of the run.
            hints: per row, a mapping from canvas offset to token id: written from the start, visible, never changed.
            choices: per row, a mapping from canvas offset to the token ids that may be drawn there; other slots are
                free. Confidences keep the softmax over the whole vocabulary.
            constraint: says of each token that is about to be written whether it may be; see `constraints.py`. An
                `Automaton` also gives `choices` where there are none.
            noise: where randomness is taken from; None draws keyed noise from `seed`.
            on_step: called after each step of each batch of rows, to watch it.

        Returns:
            A `Rollout` whose tensors are on the model's device.

        Raises:
            ValueError: a bad prompt, row id, hint or choice, blocks that are not the model's, or logits that are not
                numbers.
        """
        if num_generations < 1:
            raise ValueError(f"num_generations={num_generations} is not allowed; it must be 1 or larger")
        _check_no_text(prompts)
        rows = [list(map(int, prompt)) for prompt in prompts for _ in range(num_generations)]
        ids = list(range(len(rows))) if row_ids is None else [int(i) for i in row_ids]
        self._check(prompts, rows, ids, hints, choices, config)
        config = config.for_model(self.spec)
        schedule, cache = config.build_schedule(), config.build_cache(self.spec)
        parts = schedule if isinstance(schedule, Schedule) else None
        if config.cache == "auto":
            self._say_cache(config, cache, max(map(len, rows), default=0))
        self._check_parts(schedule, config, cache, hints, choices, constraint, on_step)
        if choices is None and isinstance(constraint, Automaton):  # candidates that can never be written waste a step
            choices = [constraint.choices(config.canvas_length)] * len(rows)
        size = self.max_batch_rows or max(1, len(rows))
        length = config.canvas_length
        wide = torch.promote_types(self.model.dtype, torch.float32)
        record: Record
        if isinstance(schedule, CanvasSchedule):
            assert config.block_length is not None  # set by `for_model`
            limit = schedule.max_steps * config.num_blocks
            record = CanvasRecord.blank(len(rows), length, limit, config.block_length, self.model.device, wide)
        else:
            record = Record.empty(len(rows), length, self.model.device, wide)
        for row, given in enumerate(hints or ()):
            for offset, token in given.items():
                record.canvas[row, offset], record.hinted[row, offset] = token, True
        limits = None if choices is None else self._choices(choices, length, record.canvas.device)
        slots = int((~record.hinted).sum())
        if self.model.device.type == "cpu":
            keep_freed_memory()
        with (
            _evaluating(self.model),
            compiled(self.model, self.compile),
            tqdm(
                total=slots, desc="decoding", unit="tok", delay=PROGRESS_DELAY, disable=not self.progress, leave=False
            ) as bar,
        ):
            batches: list[Batch | CanvasBatch] = []
            if noise is None:
                noise = KeyedNoise(seed, 0 if parts is None else most_steps(config, parts) + 1)
            if isinstance(schedule, CanvasSchedule):
                for start in range(0, len(rows), size):
                    part = slice(start, start + size)
                    work = record.part(part)
                    assert isinstance(work, CanvasRecord)
                    batches.append(
                        CanvasBatch(self.model, self.spec, rows[part], ids[part], work, config, schedule, noise)
                    )
            else:
                batches.append(
                    (DraftBatch if config.draft_steps else Batch)(
                        self.model,
                        self.spec,
                        rows,
                        ids,
                        record,
                        config,
                        schedule,
                        cache,
                        noise,
                        limits,
                        constraint,
                        on_step,
                        capacity=size,
                        in_step=self.in_step,
                    )
                )
            for batch in batches:
                if isinstance(batch, Batch):
                    batch.counts = self.progress
                for committed in batch.decode():
                    bar.update(committed)
            if self.in_step is not None:
                self._wait_for_others(self.in_step)
        return Rollout(
            prompt_ids=rows,
            canvas=record.canvas,
            valid=valid_mask(record.canvas, self.spec.eos_token_ids),
            hinted=record.hinted,
            trace=record.trace(
                drawn=config.temperature > 0,
                monotone=parts is None or parts.monotone,
                resizes=parts is not None and parts.resize is not None,
                draws_positions=parts is not None and parts.draws_positions,
                entropy=config.record_entropy,
            ),
            nfe=record.nfe,
            extra_forwards=record.extra_forwards,
            stop_reason=record.stop_reasons(),
            row_ids=ids,
            schedule=config.schedule,
            cache=cache.name,
            exact=self.spec.attention in cache.exact_for and (parts is None or parts.inputs is None),
            seed=seed,
            mask_token_id=self.spec.mask_token_id,
            weight_version=self.weight_version,
            decoding=config,
            guesses=record.guesses if parts is not None else None,
        )

    def _wait_for_others(self, in_step: Callable[[bool], bool]) -> None:
        """Idle forwards until no process has one of its own left."""
        token = torch.zeros(1, 1, dtype=torch.long, device=self.model.device)
        score = torch.ones_like(token, dtype=torch.bool)
        sight = None if self.spec.attention == "full" else Sight(token, token + 1)
        mask = attention_mask(score, 1, self.model.config._attn_implementation, self.model.dtype, sight)
        while in_step(False):
            self.model(
                input_ids=token, attention_mask=mask, position_ids=token, score_positions=score, score_targets=token
            )

    def _say_cache(self, config: DecodingConfig, cache: CachePolicy, prompt: int) -> None:
        """Logs once what `cache="auto"` stands for, and what an inexact policy would buy."""
        if (cache.name, self.spec.attention, config.schedule) in _said:
            return
        _said.add((cache.name, self.spec.attention, config.schedule))
        line = f"cache='auto' is {cache.name!r} here, which is exact for attention={self.spec.attention!r}"
        schedule = config.build_schedule()
        if self.spec.attention == "full" and isinstance(schedule, Schedule) and not schedule.whole:
            width, block = prompt + config.canvas_length, config.canvas_length // config.num_blocks
            steps = config.steps_per_block
            gain = steps * width / (width + (steps - 1) * block)
            line += (
                f"; cache='dual' is not exact, and would feed about {gain:.1f} times fewer positions at {steps} steps "
                f"per block of {block} in rows of {width} (docs/rollouts.md says what that risks)"
            )
        logger.info(line)

    def _check(
        self,
        prompts: Sequence[Sequence[int]],
        rows: list[list[int]],
        row_ids: list[int],
        hints: Sequence[Mapping[int, int]] | None,
        choices: Sequence[Mapping[int, Collection[int]]] | None,
        config: DecodingConfig,
    ) -> None:
        text = self.model.config.get_text_config()
        mask, vocabulary = self.spec.mask_token_id, text.vocab_size
        limit = getattr(text, "max_position_embeddings", None)
        for name in ("suppress_token_ids", "defer_token_ids"):
            outside = [i for i in getattr(config, name) if i >= vocabulary]
            if outside:
                raise ValueError(f"{name} has ids {outside} outside 0..{vocabulary - 1}, the model's vocabulary")
        if len({*config.suppress_token_ids, mask}) == vocabulary:
            raise ValueError("suppress_token_ids leaves nothing to draw but the mask token")
        for i, prompt in enumerate(prompts):
            if not len(prompt):
                raise ValueError(f"prompts[{i}] is empty; a prompt has at least one token")
            if mask in prompt:
                raise ValueError(f"prompts[{i}] contains the mask token (id {mask}); prompts hold written text only")
            if min(prompt) < 0 or max(prompt) >= vocabulary:
                raise ValueError(f"prompts[{i}] has a token id outside 0..{vocabulary - 1}, the model's vocabulary")
            if limit is not None and len(prompt) + config.canvas_length > limit:
                raise ValueError(
                    f"prompts[{i}] has {len(prompt)} tokens, which with canvas_length={config.canvas_length} exceeds "
                    f"the model's {limit} positions; at most {limit - config.canvas_length} are allowed"
                )
        if len(row_ids) != len(rows) or len(set(row_ids)) != len(row_ids):
            raise ValueError(f"row_ids must be {len(rows)} different integers (prompts x num_generations)")
        if choices is not None:
            self._check_choices(choices, len(rows), config)
        if hints is None:
            return
        if self.spec.noise != "mask":
            raise ValueError(f"hints are not supported for noise={self.spec.noise!r}, where every token may change")
        if len(hints) != len(rows):
            raise ValueError(f"hints has {len(hints)} entries; one per row is needed: {len(rows)}")
        for row, given in enumerate(hints):
            for offset, token in given.items():
                if not 0 <= offset < config.canvas_length or not 0 <= token < vocabulary or token == mask:
                    raise ValueError(
                        f"hints[{row}] maps offset {offset} to token {token}; allowed: offsets 0.."
                        f"{config.canvas_length - 1}, ids 0..{vocabulary - 1} except the mask token {mask}"
                    )

    def _check_parts(
        self,
        schedule: Schedule | CanvasSchedule,
        config: DecodingConfig,
        cache: CachePolicy,
        hints: object,
        choices: object,
        constraint: object,
        on_step: object,
    ) -> None:
        """Whether the schedule can do with this model what it is asked to."""
        if isinstance(schedule, CanvasSchedule):
            given = {"choices": choices, "constraint": constraint, "on_step": on_step, "in_step": self.in_step}
            for name, value in given.items():
                if value is not None:
                    raise ValueError(f"{name} is not supported for noise={self.spec.noise!r}; leave it None")
            return
        if schedule.check is not None:
            schedule.check(self.model)
        if constraint is not None and schedule.replace is not None:
            raise ValueError(
                f"constraint is not supported for schedule={config.schedule!r}, which replaces written tokens; "
                "leave it None"
            )
        if constraint is not None and cache.foresees:
            raise ValueError(
                f"constraint is not supported for cache={cache.name!r}, which looks at no other slots than those "
                "that are written next; leave it None, or choose another cache"
            )
        if constraint is not None and not self.spec.eos_token_ids:
            raise ValueError(
                "constraint needs an end-of-sequence token, which fills what is open in a row that cannot go on; the "
                "model's spec has eos_token_ids=()"
            )
        if schedule.resize is not None:
            for name, value in (("hints", hints), ("choices", choices), ("constraint", constraint)):
                if value is not None:
                    raise ValueError(
                        f"{name} is not supported for schedule={config.schedule!r}, which changes the length of the "
                        "canvas; leave it None"
                    )
            if not self.spec.eos_token_ids:
                raise ValueError(
                    f"schedule={config.schedule!r} changes the length of the canvas, which needs an end-of-sequence "
                    "token; the model's eos_token_ids is empty"
                )
        if schedule.shadow and self.spec.attention != "full":
            raise ValueError(
                f"schedule={config.schedule!r} feeds masked copies of slots beside the row, which needs full "
                f"attention; it cannot be used with attention={self.spec.attention!r}"
            )
        if schedule.shadow and self.spec.logit_shift:
            raise ValueError(
                f"schedule={config.schedule!r} verifies tokens at their own slot; it cannot be used with logit_shift="
                f"{self.spec.logit_shift}"
            )

    def _choices(self, choices: Sequence[Mapping[int, Collection[int]]], length: int, device: torch.device) -> Choices:
        vocabulary = self.model.config.get_text_config().vocab_size
        numbers: dict[frozenset[int], int] = {}
        index = torch.full((len(choices), length), -1)
        for row, given in enumerate(choices):
            for offset, tokens in given.items():
                index[row, offset] = numbers.setdefault(frozenset(tokens), len(numbers))
        sets = torch.zeros(max(1, len(numbers)), vocabulary, dtype=torch.bool)
        for allowed, number in numbers.items():
            sets[number, list(allowed)] = True
        return Choices(sets.to(device), index.to(device))

    def _check_choices(
        self, choices: Sequence[Mapping[int, Collection[int]]], rows: int, config: DecodingConfig
    ) -> None:
        vocabulary, mask = self.model.config.get_text_config().vocab_size, self.spec.mask_token_id
        if len(choices) != rows:
            raise ValueError(f"choices has {len(choices)} entries; one per row is needed: {rows}")
        checked: set[frozenset[int]] = set()  # one may be as large as the vocabulary and bind every slot of every row
        for row, given in enumerate(choices):
            for offset, tokens in given.items():
                if not 0 <= offset < config.canvas_length:
                    raise ValueError(
                        f"choices[{row}] has offset {offset}; allowed: offsets 0..{config.canvas_length - 1}"
                    )
                if isinstance(tokens, frozenset) and tokens in checked:
                    continue
                checked.add(frozenset(tokens))
                left = set(tokens) - {mask, *config.suppress_token_ids}
                if not left or not all(0 <= token < vocabulary for token in tokens):
                    raise ValueError(
                        f"choices[{row}] allows {sorted(tokens)[:8]} at offset {offset}; it takes at least one token "
                        f"that can be drawn, and ids 0..{vocabulary - 1}"
                    )


def _check_no_text(prompts: Any) -> None:
    """Raises ValueError for prompts that are text where token ids are needed."""
    for i, prompt in enumerate([prompts] if isinstance(prompts, str) else prompts):
        if isinstance(prompt, str) or any(isinstance(token, str) for token in prompt):
            name = "prompts" if isinstance(prompts, str) else f"prompts[{i}]"
            raise ValueError(
                f"{name}={prompt!r} is text; the engine takes lists of token ids, such as tokenizer.encode(text) gives"
            )


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
