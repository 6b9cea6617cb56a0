"""The index of papers: everything that came from one is on it, and what it says of configurations and checks is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import rl4dlm
from benchmarks.proving_ground.settings import ALGORITHMS, RESULTS
from rl4dlm import resources
from rl4dlm.rollout.caches import available_caches
from rl4dlm.rollout.decoding import available_schedules
from tests.conformance.cases import COVERED, OBJECTIVES

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
TRAINERS = [name for name in rl4dlm.__all__ if name.endswith("Trainer")]
OF_SEVERAL = {"DiffusionPolicyTrainer", "DiffusionSFTTrainer", "TrajectoryTrainer"}
LITERATURE = r"\b(\d{4}\.\d{5})\b"


def rows(heading: str) -> list[list[str]]:
    """Cells of the tables of a section, without their heads."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("| --")]
    return [row for row in cells if row[0] != "paper"]


def recorded(cell: str) -> set[str]:
    return {name for found in re.findall(r"recorded \(([^)]*)\)", cell) for name in re.findall(r"`(\w+)`", found)}


ROWS = {name: row for row in rows("Algorithms") for name in re.findall(r"`(\w+Trainer)`", row[1]) if len(row) == 5}


def test_every_trainer_has_a_row_with_its_paper():
    assert {*TRAINERS} == {*ROWS, *OF_SEVERAL}
    for name in OF_SEVERAL:
        assert f"`{name}`" in PAGE
    for name, row in ROWS.items():
        assert getattr(rl4dlm, name)._paper["id"] in row[0], name


def test_every_configuration_is_named_by_the_row_of_its_trainer():
    configs = resources.find("configs")
    for row in ROWS.values():
        for pattern in re.findall(r"`configs/([^`]+)`", row[2]):
            assert list(configs.glob(pattern)), pattern
    named = {path for pattern in re.findall(r"`configs/([^`]+\.yaml)`", PAGE) for path in configs.glob(pattern)}
    published = {path for path in configs.glob("*/*.yaml") if "_tiny" not in path.stem}
    missing = {path for path in published if path.parent.name not in ("accelerate", "sft")} - named
    assert not missing
    for name, row in ROWS.items():
        for folder in {pattern.partition("/")[0] for pattern in re.findall(r"`configs/([^`]+)`", row[2])}:
            script = (resources.find("trainers") / f"{folder}.py").read_text(encoding="utf-8")
            assert name in script, f"{folder} is not the folder of {name}"


@pytest.mark.parametrize(("names", "found"), [(available_schedules(), "schedules"), (available_caches(), "caches")])
def test_every_schedule_and_cache_is_there(names, found):
    cells = " ".join(cell for row in rows("Decoding") for cell in row[1:3])
    assert set(names) - set(re.findall(r"`(\w+)`", cells)) == set(), found


def test_what_is_called_recorded_is_compared_with_a_record():
    of_trainers = {name for row in ROWS.values() for name in recorded(row[3])}
    assert of_trainers == {*OBJECTIVES, "d1", "mdpo"}
    everywhere = of_trainers | recorded(
        " ".join(cell for part in ("Decoding", "Models") for r in rows(part) for cell in r)
    )
    assert everywhere == COVERED.keys() - {"tinydlm"}  # the model that all of them run on


def test_which_trainers_have_run_on_the_proving_ground():
    """All but those that the page names behind "Not yet:"."""
    run = set()
    for name, line in ALGORITHMS.items():
        seeds = {
            task: len(list((RESULTS / task / "full").glob(f"{name}-completions-*.json")))
            for task in ("few_clue_sudoku", "countdown_small")
        }
        if seeds["few_clue_sudoku"] >= 3 and seeds["countdown_small"] >= 1:
            run.add(line.trainer)
    not_yet = PAGE.partition("Not yet:")[2].partition(".")[0]
    assert ROWS.keys() - run == set(re.findall(r"`(\w+)`", not_yet))


def test_every_paper_that_the_code_names_is_on_the_page():
    named = {}
    for folder in ("rl4dlm", "rewards", "configs", "examples"):
        for path in [*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.yaml")]:
            for paper in re.findall(LITERATURE, path.read_text(encoding="utf-8")):
                named.setdefault(paper, path)
    missing = {paper: str(path.relative_to(ROOT)) for paper, path in named.items() if paper not in PAGE}
    assert not missing


def test_links_go_to_the_paper_that_they_name():
    links = re.findall(r"\[(\d{4}\.\d{5})\]\(https://arxiv\.org/abs/([^)]+)\)", PAGE)
    assert links and all(shown == target for shown, target in links)
    assert len(links) == len(re.findall(r"arxiv\.org", PAGE))


def test_the_citation_is_that_of_the_file():
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "citing.md").read_text(encoding="utf-8")
    found = dict(re.findall(r"^  (\w+) +=? *= \{+([^}]+)\}+,?$", page, re.M))
    assert found["title"] == cff["title"] and found["version"] == cff["version"] == rl4dlm.__version__
    assert found["license"] == cff["license"] and [found["author"]] == [author["name"] for author in cff["authors"]]
