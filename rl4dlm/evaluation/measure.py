"""Decodes a task's prompts, has the task check the completions, and counts.

Owns the way from a task's rows to numbers. Decoding is the engine's, judging is the task's, writing is `results.py`'s.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from math import isnan
from typing import TYPE_CHECKING, Any

from rl4dlm.evaluation import pass_at as estimates
from rl4dlm.evaluation.intervals import wilson_interval
from rl4dlm.evaluation.results import EvaluationResult, Measurement, item_string, verdict_string
from rl4dlm.evaluation.rewards import Rewards, summary
from rl4dlm.evaluation.speed import Speed
from rl4dlm.models.loading import check_tokenizer
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.models.taught import warn_of_canvas
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.rollout import Rollout
from rl4dlm.tasks.prompts import encode_prompt

if TYPE_CHECKING:
    from rl4dlm.tasks import Task

logger = logging.getLogger(__name__)

BASELINE = "1 token/step"
"""Label of the measurement with one token per step."""


def evaluate(
    model: Any,
    tokenizer: Any,
    task: Task,
    *,
    decodings: Mapping[str | int, DecodingConfig],
    split: str = "test",
    limit: int | None = None,
    num_samples: int = 1,
    seed: int = 0,
    batch_rows: int | None = None,
    chosen_by: str = "not stated",
    progress: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    pass_at: Sequence[int] = (),
    baseline: bool = False,
    rewards: Rewards | None = None,
) -> EvaluationResult:
    """Measures how often a denoiser solves a task under each decoding setting.

    Every setting sees the same prompts with the same row ids, so the result depends on the weights, the settings and
    the seed alone, not on `batch_rows`. Completions are cut at the first end-of-sequence token and special tokens are
    stripped before they are checked.

    Args:
        model: a denoiser, see `load_denoiser`. tokenizer: of the model.
        task: whose prompts to decode and whose checker to ask.
        decodings: label to decoding setting, for example `{4: DecodingConfig(steps=4), 8: DecodingConfig(steps=8)}`.
        split: of the task.
        limit: use the first so many prompts at most; None uses all.
        num_samples: completions per prompt.
        seed: keys every draw.
        batch_rows: completions decoded at the same time; None decodes all at once.
        chosen_by: how this checkpoint was chosen, recorded as it is: "last", "best on validation", ….
        progress: shows a progress bar when decoding takes longer than a few seconds.
        chat_template_kwargs: for the chat template, as a trainer's setting of that name.
        pass_at: k for which pass@k is estimated, each at most `num_samples`; see `rl4dlm.evaluation.pass_at`. Samples
            are alike where `temperature` is 0.
        baseline: measure each setting with one token per step, too (`DecodingConfig.one_token_per_step`), which is what
            parallel decoding is compared with.
        rewards: reward functions to measure, too, or in the checker's place; means and standard errors are in
            `metrics`, under `reward` and `reward/NAME`.

    Raises:
        ValueError: names a setting that is not allowed, a tokenizer that does not fit, or a task without prompts.
        RuntimeError: the task runs programs, and this machine has no sandbox for them.
    """
    if not decodings:
        raise ValueError("decodings is empty; give at least one DecodingConfig")
    for name, value in (("limit", limit), ("num_samples", num_samples)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} is not allowed; it must be 1 or larger")
    for k in pass_at:
        if not 1 <= k <= num_samples:
            raise ValueError(f"pass_at={k} is not allowed; it must be between 1 and num_samples={num_samples}")
    spec = DiffusionSpec.of(model)
    check_tokenizer(tokenizer, spec)
    task.require()
    dataset = task.dataset(split)
    if "prompt" not in dataset.column_names:
        raise ValueError(f"task {task.name!r} has no column 'prompt' in split {split!r}, only {dataset.column_names}")
    rows = list(dataset if limit is None else dataset.select(range(min(limit, len(dataset)))))
    if not rows:
        raise ValueError(f"task {task.name!r} has no prompts in split {split!r}")
    prompts = [encode_prompt(tokenizer, row["prompt"], chat_template_kwargs=chat_template_kwargs) for row in rows]

    engine = RolloutEngine(model, spec, max_batch_rows=batch_rows, progress=progress)
    settings, compared_with = _with_baselines(decodings, spec) if baseline else (dict(decodings), {})
    measurements: dict[str, Measurement] = {}
    for label, config in settings.items():
        logger.info("%s: %d prompts, decoding %s", task.name, len(rows), label)
        warn_of_canvas(model, config.canvas_length)
        start = time.perf_counter()
        rollout = engine.generate(prompts, config, num_generations=num_samples, seed=seed)
        seconds = time.perf_counter() - start
        texts = completion_texts(tokenizer, rollout, spec)
        found = _measure(task, rows, texts, rollout, config, spec, seconds, pass_at, rewards)
        measurements[str(label)] = replace(found, baseline=compared_with.get(label))
    return EvaluationResult(
        task=task.name,
        split=split,
        model=str(getattr(model, "name_or_path", "") or type(model).__name__),
        chosen_by=chosen_by,
        seed=seed,
        measurements=measurements,
        style=getattr(task, "style", None),
        protocol=task.protocol,
        items=item_string(rows),
        speed=Speed.of([(found.tokens_per_forward, found.solve_rate) for found in measurements.values()]),
    )


def _with_baselines(
    decodings: Mapping[str | int, DecodingConfig], spec: DiffusionSpec
) -> tuple[dict[str | int, DecodingConfig], dict[str | int, str]]:
    """The settings with those of one token per step beside them, each once, and the label of each setting's own."""
    settings, compared_with = dict(decodings), dict[str | int, str]()
    fitted = {label: config.for_model(spec) for label, config in decodings.items()}
    for label, config in decodings.items():
        slow = config.one_token_per_step(spec)
        if fitted[label] == slow:
            continue
        same = next((other for other, known in fitted.items() if known == slow), None)
        if same is None:
            taken = sum(str(other).startswith(BASELINE) for other in settings)
            same = f"{BASELINE} ({taken + 1})" if taken else BASELINE
            settings[same], fitted[same] = slow, slow
        compared_with[label] = str(same)
    return settings, compared_with


def completion_texts(tokenizer: Any, rollout: Rollout, spec: DiffusionSpec) -> list[str]:
    """The text of each row up to its first end-of-sequence token, special tokens stripped."""
    ends = set(spec.eos_token_ids)
    written = [[token for token in ids if token not in ends] for ids in rollout.completion_ids]
    return tokenizer.batch_decode(written, skip_special_tokens=True)


def _measure(
    task: Task,
    rows: Sequence[Mapping[str, Any]],
    texts: Sequence[str],
    rollout: Rollout,
    config: DecodingConfig,
    spec: DiffusionSpec,
    seconds: float,
    ks: Sequence[int],
    rewards: Rewards | None,
) -> Measurement:
    samples = len(texts) // len(rows)
    asked = [rows[i // samples] for i in range(len(texts))]
    values = {} if rewards is None else rewards.values(texts, asked, rollout)
    verdicts: Sequence[bool | None]
    found: dict[str, float]
    if rewards is not None and rewards.threshold is not None:
        verdicts, found = rewards.verdicts(values["reward"]), {}
    else:
        verdicts, found = task.measured(texts, asked)
    found = {**found, **summary(values, samples)}
    judged = [verdict for verdict in verdicts if verdict is not None]
    if not judged:
        raise ValueError(f"task {task.name!r} cannot judge any of its {len(rows)} prompts by {sorted(rows[0])}")
    rate = sum(judged) / len(judged)
    trials = len({i // samples for i, verdict in enumerate(verdicts) if verdict is not None})
    valid, nfe = int(rollout.valid.sum()), int(rollout.nfe.sum())
    ends = set(spec.eos_token_ids)
    further = {name: value for name, value in found.items() if name != "solved"}
    return Measurement(
        decoding=asdict(config),
        solve_rate=rate,
        interval=wilson_interval(rate * trials, trials),
        prompts=len(rows),
        samples=samples,
        unjudged=len(verdicts) - len(judged),
        nfe=nfe / len(texts),
        tokens_per_forward=valid / nfe,
        completion_length=valid / len(texts),
        ended=sum(ids[-1] in ends for ids in rollout.completion_ids) / len(texts),
        seconds=round(seconds, 3),
        metrics={name: None if isnan(value) else value for name, value in further.items()},
        exact=rollout.exact,
        pass_at={str(k): estimates.pass_at(verdicts, samples, k) for k in ks},
        verdicts=verdict_string(verdicts),
    )
