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

from rl4dlm.models.adapters import base_model
from rl4dlm.models.attention import Sight, attention_mask
from rl4dlm.models.canvas import denoises_canvases
from rl4dlm.models.scoring import attach_scoring
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.rollout.caches import CachePolicy
from rl4dlm.rollout.checks import as_choices, check_call, check_no_text, check_parts, check_start
from rl4dlm.rollout.compiling import check_backend, compiled, keep_freed_memory
from rl4dlm.rollout.constraints.automata import Automaton, Constraint
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.drafts import DraftBatch
from rl4dlm.rollout.noise import KeyedNoise, NoiseSource
from rl4dlm.rollout.record import Record
from rl4dlm.rollout.requests import Requests
from rl4dlm.rollout.rollout import Rollout, valid_mask
from rl4dlm.rollout.rows import Progress, most_steps
from rl4dlm.rollout.schedules.parts import CanvasSchedule, Schedule
from rl4dlm.rollout.state import State
from rl4dlm.rollout.step import Batch
from rl4dlm.rollout.stopping import Stop
from rl4dlm.rollout.uniform import CanvasBatch, CanvasRecord
from rl4dlm.rollout.verifying import VerifiedBatch

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
        base = base_model(model)
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
        start: State | None = None,
        choices: Sequence[Mapping[int, Collection[int]]] | None = None,
        constraint: Constraint | None = None,
        noise: NoiseSource | None = None,
        on_step: Callable[[Progress], None] | None = None,
        stop: Stop | None = None,
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
            start: one state per row to go on from, as `Rollout.state_at` gives them. What is written there counts as
                drawn, with the steps, log-probabilities and forwards it had, and each row goes on with its next step as
                if nothing had happened: with its own row id, seed and settings it becomes the row that it was taken
                from. Given slots are those of the state, so there are no `hints` beside it. A row is fed whole at its
                first step, so that what an inexact cache held of it is lost. None: open canvases.
            choices: per row, a mapping from canvas offset to the token ids that may be drawn there; other slots are
                free. Confidences keep the softmax over the whole vocabulary.
            constraint: says of each token that is about to be written whether it may be; see `constraints.py`. An
                `Automaton` also gives `choices` where there are none.
            noise: where randomness is taken from; None draws keyed noise from `seed`.
            on_step: called after each step of each batch of rows, to watch it.
            stop: says where a row ends besides its first end-of-sequence token, such as `StopStrings`. A row leaves
                when its end is written and nothing before it is open; what lies behind is cut off and counts as never
                drawn, with the end-of-sequence token in its place.

        Returns:
            A `Rollout` whose tensors are on the model's device.

        Raises:
            ValueError: a bad prompt, row id, hint, state or choice, a schedule that cannot go on from a state, blocks
                that are not the model's, or logits that are not numbers.
        """
        if num_generations < 1:
            raise ValueError(f"num_generations={num_generations} is not allowed; it must be 1 or larger")
        check_no_text(prompts)
        rows = [list(map(int, prompt)) for prompt in prompts for _ in range(num_generations)]
        ids = list(range(len(rows))) if row_ids is None else [int(i) for i in row_ids]
        check_call(self.model, self.spec, prompts, rows, ids, hints, choices, config)
        config = config.for_model(self.spec)
        schedule, cache = config.build_schedule(), config.build_cache(self.spec)
        parts = schedule if isinstance(schedule, Schedule) else None
        if config.cache == "auto":
            self._say_cache(config, cache, max(map(len, rows), default=0))
        check_parts(self.model, self.spec, schedule, config, cache, hints, choices, constraint, on_step, self.in_step)
        if stop is not None and not self.spec.eos_token_ids:
            raise ValueError("stop needs an end-of-sequence token to end rows with; the model's eos_token_ids is empty")
        if choices is None and isinstance(constraint, Automaton):  # candidates that can never be written waste a step
            choices = [constraint.choices(config.canvas_length)] * len(rows)
        if start is not None:
            if hints is not None:
                raise ValueError("hints cannot be given beside start, whose states say which slots were given")
            vocabulary = self.model.config.get_text_config().vocab_size
            check_start(start, len(rows), config, self.spec, vocabulary, schedule)
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
        if start is not None:
            record.begin(start, 1 + (config.cfg_scale > 0))
        limits = None if choices is None else as_choices(self.model, choices, length, record.canvas.device)
        slots = int((~record.hinted & (record.commit_step < 0)).sum())
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
                before = 0 if start is None else int(start.steps.max())
                noise = KeyedNoise(seed, 0 if parts is None else most_steps(config, parts) + 1 + before)
            if isinstance(schedule, CanvasSchedule):
                for begin in range(0, len(rows), size):
                    part = slice(begin, begin + size)
                    work = record.part(part)
                    assert isinstance(work, CanvasRecord)
                    batches.append(
                        CanvasBatch(self.model, self.spec, rows[part], ids[part], work, config, schedule, noise, stop)
                    )
            else:
                batches.append(
                    (VerifiedBatch if schedule.verify is not None else DraftBatch if config.draft_steps else Batch)(
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
                        stop=stop,
                    )
                )
            for batch in batches:
                if isinstance(batch, Batch):
                    batch.counts = self.progress
                for committed in batch.decode():
                    bar.update(committed)
            if self.in_step is not None:
                self._wait_for_others(self.in_step)
        exact = self.spec.attention in cache.exact_for and (parts is None or parts.inputs is None)
        return Rollout(
            prompt_ids=rows,
            canvas=record.canvas,
            valid=valid_mask(record.canvas, self.spec.eos_token_ids),
            hinted=record.hinted,
            trace=record.trace(
                drawn=config.temperature > 0,
                monotone=parts is None or parts.monotone,
                resizes=parts is not None and parts.moves,
                draws_positions=parts is not None and parts.draws_positions,
                requests=Requests(config.record, config.record_steps, config.num_fillings),
            ),
            nfe=record.nfe,
            extra_forwards=record.extra_forwards,
            stop_reason=record.stop_reasons(),
            row_ids=ids,
            schedule=config.schedule,
            cache=cache.name,
            exact=exact and (start is None or start.exact),
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


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
