"""The page of recipes: it names every configuration of a published model, and how each is launched."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from rl4dlm import resources
from tests.published_settings import PUBLISHED

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
EVERYWHERE = ("GSAI-ML/LLaDA-8B-Instruct", "examples/demo_checkpoint")  # models with many configurations


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
