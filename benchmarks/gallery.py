"""Replays of the small models that come with the repository: the pages of docs/gallery.md, made anew.

    python benchmarks/gallery.py

Decodes a few prompts of the puzzles and of Countdown under several schedules and kinds of attention, with fixed seeds,
so that the pages are the same each time. Writes `docs/gallery/*.html` and what was counted into `docs/gallery.md`,
between its markers. Half a minute on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.proving_ground.settings import SMALL, TASKS
from rl4dlm import DecodingConfig, RolloutEngine, encode_prompt, load_denoiser, load_task, load_tokenizer
from rl4dlm.tracking.page import write_page
from rl4dlm.tracking.replay import BlockLog, Replay, make_replay

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "gallery.md"
FOLDER = ROOT / "docs" / "gallery"
MARKERS = ("<!-- replays: made by benchmarks/gallery.py -->", "<!-- end -->")


@dataclass(frozen=True)
class Shown:
    """A page of the gallery.

    Args:
        title: of the page. task, model: as on the proving ground; `demo` is the demo's model.
        settings: of decoding, besides the length of the canvas. says: of the settings, in Markdown.
        prompts: how many rows of the task's test split are decoded.
    """

    title: str
    task: str
    model: str
    settings: Mapping[str, Any]
    says: str
    prompts: int = 8
    seed: int = 0


SHOWN = {
    "sudoku-one": Shown(
        "A Sudoku, one cell per step",
        "few_clue_sudoku",
        "demo",
        {"steps": 16},
        "`low_confidence` in 16 steps: the cell that the model is surest of, then the next",
    ),
    "sudoku-four": Shown(
        "A Sudoku, four cells per step",
        "few_clue_sudoku",
        "demo",
        {"steps": 4},
        "`low_confidence` in 4 steps: cells that are written together do not know of each other",
    ),
    "sudoku-saber": Shown(
        "A Sudoku that is corrected",
        "few_clue_sudoku",
        "demo",
        {"schedule": "saber", "temperature": 1.0},
        "`saber` at temperature 1: cells that have become unlikely are opened again",
    ),
    "countdown-full": Shown(
        "Countdown, full attention",
        "countdown_small",
        "full",
        {"schedule": "threshold", "schedule_args": {"threshold": 0.9}, "block_length": 8},
        "`threshold` 0.9 in blocks of 8: everything that is sure at once",
    ),
    "countdown-shifted": Shown(
        "Countdown, shifted logits",
        "countdown_small",
        "shifted",
        {"schedule": "entropy_bound", "schedule_args": {"gamma": 0.1}, "block_length": 8},
        "`entropy_bound` 0.1 in blocks of 8, on a model that predicts the next slot",
    ),
    "countdown-block": Shown(
        "Countdown, attention in blocks",
        "countdown_small",
        "block",
        {"steps": 16, "block_length": 8},
        "`low_confidence`, two tokens per step; finished blocks are kept in the exact cache",
    ),
}


def replay(shown: Shown) -> Replay:
    """Decodes its prompts; rows have a note that says whether the task's checker accepts them."""
    ground = TASKS[shown.task]
    folder = ROOT / ("examples/demo_checkpoint" if shown.model == "demo" else SMALL[shown.model])
    model, tokenizer = load_denoiser(folder).eval(), load_tokenizer(folder)
    task = load_task(shown.task, **ground.arguments)
    rows = task.rows("test")[: shown.prompts]
    config = DecodingConfig(canvas_length=ground.canvas, **shown.settings)
    blocks = BlockLog()
    with torch.no_grad():
        rollout = RolloutEngine(model).generate(
            [encode_prompt(tokenizer, row["prompt"]) for row in rows], config, seed=shown.seed, on_step=blocks
        )
    texts = tokenizer.batch_decode(rollout.completion_ids, skip_special_tokens=True)
    right = [task.check(text, row) for text, row in zip(texts, rows, strict=True)]
    notes = {i: {"solved": "yes" if solved else "no"} for i, solved in enumerate(right)}
    return make_replay(rollout, tokenizer, blocks=blocks.rows, notes=notes)


def line(name: str, shown: Shown, made: Replay) -> str:
    """The item of the page's list."""
    solved = sum(row.notes["solved"] == "yes" for row in made.rows)
    forwards = [row.nfe for row in made.rows]
    counted = f"{min(forwards)} to {max(forwards)}" if min(forwards) < max(forwards) else f"{forwards[0]}"
    return (
        f"- [{shown.title}](gallery/{name}.html): {shown.says}.\n"
        f"  {solved} of {len(made.rows)} solved, in {counted} forwards each."
    )


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    lines = []
    for name, shown in SHOWN.items():
        made = replay(shown)
        write_page(FOLDER / f"{name}.html", made)
        lines.append(line(name, shown, made))
        print(lines[-1], flush=True)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKERS[0])
    text = "\n".join(lines)
    PAGE.write_text(f"{before}{MARKERS[0]}\n\n{text}\n\n{MARKERS[1]}{rest.partition(MARKERS[1])[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
