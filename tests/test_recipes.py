"""The page of recipes: it names every configuration of a published model, and what it says of trainers is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from benchmarks import trainer_families
from rl4dlm import resources
from tests.published_settings import PUBLISHED

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
EVERYWHERE = ("GSAI-ML/LLaDA-8B-Instruct", "examples/demo_checkpoint")  # models with many configurations

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


def recipes() -> dict[str, str]:
    """Configuration (folder/name) -> the row of the table that names it."""
    found = {}
    for row in re.findall(r"^\|.*configs/.*\|$", PAGE, re.M):
        folder, first = re.search(r"`configs/([\w*]+)/([\w.*-]+)\.yaml`", row).groups()
        if "*" in folder:
            continue
        names = [first, *re.findall(r"`([\w.-]+)\.yaml`", row)]
        names += [first + suffix for suffix in re.findall(r"`(_value)`", row)]
        found |= {f"{folder}/{name}": row for name in names}
    return found


def test_the_table_names_every_configuration_of_a_published_model():
    configs = resources.find("configs")
    models = {}
    for path in configs.glob("*/*.yaml"):
        if path.parent.name not in ("accelerate", "sft"):
            name = yaml.safe_load(path.read_text(encoding="utf-8"))["model_name_or_path"]
            models[f"{path.parent.name}/{path.stem}"] = name
    assert recipes().keys() == {name for name, model in models.items() if model not in EVERYWHERE}
    for name, row in recipes().items():
        launcher = re.search(r"`(zero2|zero3|one_process)`", row)[1]
        text = (configs / f"{name}.yaml").read_text(encoding="utf-8")
        # One row for both, which differ in the launcher.
        assert f"configs/accelerate/{launcher}.yaml" in text or name.endswith("_value"), name


def test_what_is_called_published_is_held_to_the_authors_files():
    claimed = {name for name, row in recipes().items() if row.rstrip("| ").rpartition("|")[2].strip() == "published"}
    assert claimed and claimed <= PUBLISHED.keys()


def cells() -> dict[tuple[str, str], str]:
    """(trainer, family) -> what the page's table says."""
    text = PAGE.partition(trainer_families.MARKERS[0])[2].partition(trainer_families.MARKERS[1])[0]
    head, _, *rows = [
        [cell.strip(" `") for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    return {(row[0].removesuffix("Trainer"), name): cell for row in rows for name, cell in zip(head, row, strict=True)}


def test_the_readme_has_the_same_matrix():
    readme = trainer_families.README.read_text(encoding="utf-8")
    copy = readme.partition(trainer_families.MARKERS[0])[2].partition(trainer_families.MARKERS[1])[0]
    page = PAGE.partition(trainer_families.MARKERS[0])[2].partition("What a *no* says:")[0]
    assert copy.strip() == page.strip() != ""


def test_the_matrix_is_of_all_trainers_and_families():
    found = cells()
    assert {trainer for trainer, _ in found} == {*trainer_families.TRAINERS, "DiffusionSFT"}
    assert {name for _, name in found} - {"trainer"} == set(trainer_families.FAMILIES)
    assert {cell for (_, name), cell in found.items() if name != "trainer"} == {"yes", "no"}


@pytest.mark.parametrize(
    ("trainer", "family"),
    [
        ("TraceRL", "fast_dllm"),
        ("TraceRL", "wedlm"),
        ("MDPO", "nemotron_diffusion"),
        ("MDPO", "sdar"),
        ("ESPO", "diffusion_gemma"),
        ("AGRPO", "diffusion_gemma"),
        ("DiffusionSFT", "diffusion_gemma"),
        ("IGPO", "llada2"),
    ],
)
def test_a_sample_of_the_matrix_is_so(trainer, family):
    said = trainer_families.refusal(trainer, family)
    assert cells()[trainer, family] == ("no" if said else "yes")
    if said:
        page = " ".join(PAGE.split())
        sentence = re.escape(said.removeprefix(f"{trainer}Trainer is "))
        assert re.search(rf"- [\w, ]*\b{trainer}\b[\w, ]* on [^:]*`{family}`[^:]*: {sentence}", page)
