"""Runs and their files: what is there is not made again, what cannot be made is said, and several are made at a time.

Owns the results folder. A file appears under its name only when it is complete.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.proving_ground.settings import RESULTS, ROOT, Run

LOGS = ROOT / "outputs" / "algorithms"
_parent = 0


def state_of(run: Run, results: Path = RESULTS) -> str:
    """`missing`, `there`, or `changed`: made with other settings, another scale or another start."""
    path = run.path(results)
    if not path.is_file():
        return "missing"
    return "there" if json.loads(path.read_text())["fingerprint"] == run.fingerprint() else "changed"


def make(run: Run, results: Path = RESULTS, logs: Path = LOGS, again: bool = False) -> str:
    """Makes the result of a run that has none: `made`, or what `state_of` says, or `failed` with a log.

    A training that is given up because something is not finite has a result, which says so.

    Args:
        again: also where the settings have changed.
    """
    state = state_of(run, results)
    if state == "there" or (state == "changed" and not again):
        return state
    log = logs / run.task / run.model / f"{run.path().stem}.log"
    try:
        if run.name != "before":
            make(replace(run, name="before"), results, logs, again=True)
        write(run.path(results), _result(run))
    except Exception:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(traceback.format_exc())
        return f"failed, see {log}"
    log.unlink(missing_ok=True)
    return "made"


def _result(run: Run) -> dict[str, Any]:
    import torch
    from transformers import AutoTokenizer

    from benchmarks.proving_ground.measuring import measure, validate
    from benchmarks.proving_ground.training import train
    from benchmarks.proving_ground.unmasking import decides, points
    from rl4dlm import load_denoiser
    from rl4dlm.evaluation import machine, versions
    from rl4dlm.training.guard import NonFiniteError

    model, tokenizer = load_denoiser(run.checkpoint), AutoTokenizer.from_pretrained(run.checkpoint)
    found: dict[str, Any] = {
        "task": run.task,
        "model": run.model,
        "name": run.name,
        "fingerprint": run.fingerprint(),
        "scale": asdict(run.scale),
    }
    if run.name == "before":
        parameters = sum(p.numel() for p in model.parameters())
        found |= {"task_args": dict(run.ground.arguments), "parameters": parameters}
        found |= {"validation": validate(run, model, tokenizer)}
    else:
        found |= {"algorithm": run.algorithm, "budget": run.budget, "seed": run.seed, "settings": run.settings()}
        try:
            found |= train(run, model, tokenizer, lambda policy: validate(run, policy, tokenizer))
        except NonFiniteError as error:
            return {**found, "given_up": str(error)}
    with torch.no_grad():
        found["measured"] = measure(run, model, tokenizer)
        if decides(run) and run.name != "before":
            found["points"] = points(run, model, tokenizer)
    return {**found, "machine": machine(), "versions": versions()}


def write(path: Path, result: dict[str, Any]) -> None:
    """A file that is never seen half-written: one line for each entry."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in result.items())
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(f"{{\n{lines}\n}}\n")
    os.replace(temporary, path)


def make_all(
    runs: Sequence[Run], jobs: int, results: Path = RESULTS, again: bool = False, nice: int = 0
) -> dict[Run, str]:
    """Makes runs in this order, so many processes of one thread at a time; each process imports once.

    Returns what `make` says of each, and of the measurements of what they start from.
    """
    starts = list(dict.fromkeys(replace(run, name="before", budget="completions", seed=0) for run in runs))
    states: dict[Run, str] = {}
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that are started now
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_quiet, initargs=(os.getpid(), nice)) as pool:
        for first in (starts, runs):  # what all start from is measured once, not by several at a time
            waiting = {run: pool.submit(_make, run, results, again) for run in first}
            for run, found in waiting.items():
                states[run] = found.result()
                if states[run] != "there":
                    print(f"{run.path().relative_to(RESULTS)}: {states[run]}", flush=True)
    return states


def _make(run: Run, results: Path, again: bool) -> str:
    if os.getppid() != _parent:  # nobody asks any more
        os._exit(1)
    return make(run, results, again=again)


def _quiet(parent: int, nice: int) -> None:
    global _parent
    _parent = parent
    os.nice(nice)
    logging.getLogger().setLevel(logging.ERROR)
    import torch
    from transformers.utils.logging import disable_progress_bar

    torch.set_num_threads(1)
    disable_progress_bar()
