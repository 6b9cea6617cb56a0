"""Reads conformance cases: which files there are, what family each belongs to and whether this version covers it.

Owns the case format. Nothing here depends on how many files there are or on their names beyond the family prefix: what
a case is about follows from its settings, its inputs and the recorded function's name.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

COVERED = {
    "tinydlm": "logits of the model itself",
    "llada": "LLaDA's sampler and its table of counts",
    "d1": "diffu-GRPO: samplers, log-probabilities, losses, rewards",
    "fastdllm": "confidence threshold, without cache and with prefix cache",
}
"""Families that are run, by the first word of a case's name."""

NOT_COVERED = {
    "adablock": "AdaBlock-dLLM's adaptive blocks",
    "ass": "ascending step sizes",
    "coupled": "coupled-GRPO",
    "daedal": "DAEDAL's variable length",
    "dmpo": "DMPO",
    "dream": "Dream's samplers",
    "eoser": "EOSER",
    "espo": "ESPO",
    "freedave": "FreeDave's draft and verify",
    "mdpo": "MDPO and running-confidence remasking",
    "spg": "SPG",
}
"""Families that are known and not run yet; the terminal summary names every one of their cases."""


@dataclass(frozen=True)
class Case:
    """One recorded case."""

    path: Path
    name: str
    source: dict[str, Any]
    settings: dict[str, Any]
    inputs: dict[str, Any]
    noise: dict[str, Any]
    outputs: dict[str, Any]

    @classmethod
    def load(cls, path: Path) -> Case:
        """Reads a file; the strings that stand for non-finite floats become floats."""
        raw = _floats(json.loads(path.read_text(encoding="utf-8")))
        parts = {key: raw.get(key) or {} for key in ("source", "settings", "inputs", "noise", "outputs")}
        return cls(path, raw.get("name") or path.stem, **parts)

    @property
    def family(self) -> str:
        return self.name.split("_")[0].lower()

    @property
    def kind(self) -> str:
        """What is to be done with a case of a covered family: one of `KINDS`, or why it is not covered."""
        if self.family == "tinydlm":
            return "logits"
        if self.family == "llada" and "table" in self.outputs:
            return "counts"
        if self.family == "d1" and self.name.startswith("d1_rewards"):
            return "rewards"
        if self.family == "d1" and "loss" in self.outputs:
            return "loss"
        if self.family == "d1" and "per_token_logps" in self.outputs:
            return "logps"
        if "ids" in self.outputs:
            if self.settings.get("factor") is not None:
                return "not covered: the factor rule"
            if self.cache not in ("none", "prefix"):
                return f"not covered: the {self.cache} cache"
            return "sampler"
        return f"not covered: nothing known computes {', '.join(self.outputs) or 'its outputs'}"

    @property
    def cache(self) -> str:
        """The cache of a recorded sampler, from the name of the recorded function."""
        function = str(self.source.get("function") or self.name) if self.family == "fastdllm" else ""
        return next((kind for kind in ("prefix", "dual") if kind in function), "none")

    @property
    def not_covered(self) -> str | None:
        """Why the case is not run, or None."""
        if self.family in COVERED:
            return self.kind.removeprefix("not covered: ") if self.kind.startswith("not covered") else None
        return NOT_COVERED.get(self.family, "an unknown family")

    @property
    def compute_dtype(self) -> str:
        """The dtype the reference's model ran in; notes behind it (casts of results) do not matter here."""
        words = str(self.settings.get("compute_dtype", "float64")).replace(",", " ").split()
        return next((w for w in words if w in ("float64", "float32", "bfloat16")), "float64")


KINDS = ("logits", "counts", "rewards", "loss", "logps", "sampler")


def folder() -> Path:
    """Where the cases are; it need not exist."""
    return Path(os.environ.get("RL4DLM_CONFORMANCE") or ROOT.parent / "shared" / "conformance")


def case_files() -> list[Path]:
    """Every case file, sorted."""
    cases = folder() / "cases"
    return sorted((cases if cases.is_dir() else folder()).rglob("*.json")) if folder().is_dir() else []


def load_cases() -> list[Case]:
    """Every case. JSON files that are not cases (a model's configuration beside them) are left out."""
    found = [Case.load(path) for path in case_files()]
    return [case for case in found if case.outputs]


def _floats(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_floats(item) for item in value]
    if isinstance(value, str):
        return {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}.get(value, value)
    return value
