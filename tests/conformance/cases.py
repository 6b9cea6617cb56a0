"""Reads conformance cases: which files there are, what family each belongs to and whether this version covers it.

Owns the case format. Nothing here depends on how many files there are or on their names beyond the family prefix: what
a case is about follows from its settings, its inputs and the recorded function's name.
"""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

COVERED = {
    "ass": "ascending step sizes",
    "spg": "SPG: bounds, losses, gradients",
    "stabledrl": "StableDRL: bounds, weights, losses, gradients",
    "dmpo": "DMPO: evidence lower bounds, losses, gradients",
    "cj": "CJ-GRPO: scores of recorded steps, losses, gradients, metrics",
    "egspo": "EGSPO: chosen steps, their advantages and scores, losses, gradients",
    "tracerl": "TraceRL: merged steps, slices, complementary masks, scores, values, returns, losses, gradients",
    "coupled": "coupled-GRPO: log-probabilities, losses, gradients",
    "wd1": "wd1: scores, weights, losses, gradients",
    "justgrpo": "JustGRPO: advantages, scores, losses, gradients",
    "igpo": "IGPO: the entropy filter, scores, losses, gradients, metrics",
    "dreamcoder": "Dream-Coder's RL: scores, losses of micro-batches, gradients, metrics",
    "bgpo": "BGPO: bounds, losses, gradients, metrics",
    "gdpo": "GDPO (diffusion): coefficients, bounds, losses, gradients, metrics",
    "dtreerpo": "d-TreeRPO: advantages, scores, distillation, losses, gradients",
    "ebpo": "EBPO (a port): bounds of all blocks, losses, gradients, metrics",
    "lightningrl": "LightningRL: rewards, advantages, scores, losses, gradients",
    "gdsd": "GDSD: scores of pairs, losses, gradients",
    "lladou": "LLaDOU: utilities, scores of steps, losses, gradients of model and unmasking policy",
    "espo": "ESPO: evidence lower bounds, losses, gradients",
    "eoser": "EOSER, alone and with ascending step sizes",
    "mdpo": "MDPO: its sampler, with and without running confidence remasking, its table of counts, losses",
    "daedal": "DAEDAL's variable length",
    "adablock": "AdaBlock-dLLM's adaptive blocks, without cache and with prefix and dual cache",
    "tinydlm": "logits of the model itself",
    "llada": "LLaDA's sampler and its table of counts",
    "d1": "diffu-GRPO: samplers, log-probabilities, losses, rewards",
    "fastdllm": "confidence threshold and the factor rule, without cache and with prefix and dual cache",
    "fastdllmdream": "Fast-dLLM's samplers for Dream, with prefix and dual cache",
    "dkvdecode": "dKV-Cache's decoding",
    "dkvgreedy": "dKV-Cache's greedy decoding",
    "dkvdream": "dKV-Cache on Dream: prefill, decoding, and both",
    "d3cache": "d3LLM's multi-block decoding with its delayed prefix cache",
    "freecache": "FreeCache's frozen prompt and blocks",
    "dinfer": "dInfer's decoders, without cache, with prefix and dual cache, and with the vicinity",
    "sdar": "SDAR's sampler, on checkpoints of models/",
    "s2d2": "S2D2's self-speculation, on checkpoints of models/",
    "llada2gen": "LLaDA2.0's sampler, on checkpoints of models/",
    "llada21gen": "LLaDA2.1's sampler with editing, on checkpoints of models/",
    "wino": "WINO's drafts and checks",
    "klass": "KLASS: confident and stable",
    "saber": "Saber: faster, and back",
    "pcsampler": "PC-Sampler: position and information",
    "d2f": "D2F's pipeline of blocks",
    "fastdllmv2": "Fast-dLLM v2's sub-blocks, on checkpoints of models/",
    "wedlm": "WeDLM's sliding window",
    "wedlmblock": "WeDLM's decoder of blocks",
    "d3multiblock": "d3LLM's multi-block decoding",
    "ebsampler": "the entropy bound",
    "learn2pd": "Learn2PD's filter",
    "freedave": "FreeDave's draft and verify, and the block decoding that it is compared with",
    "dream": "Dream's samplers, and Fast-dLLM's threshold in them",
}
"""Families that are run, by the first word of a case's name."""

NOT_COVERED: dict[str, str] = {}
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
        if self.name.startswith("mdpo_loss"):
            return "objective"
        if self.family == "tracerl" and self.settings.get("process_reward"):
            return "not covered: TraceRL's values of a process reward model"
        if self.family == "tinydlm":
            return "logits"
        if self.family == "d1" and self.name.startswith("d1_rewards"):
            return "rewards"
        if "table" in self.outputs:
            return "counts"
        if self.family in OBJECTIVES:
            return "objective"
        if self.family == "d1" and "loss" in self.outputs:
            return "loss"
        if self.family == "d1" and "per_token_logps" in self.outputs:
            return "logps"
        if "ids" in self.outputs:
            if self.family == "s2d2" and self.settings.get("draft_ver"):
                return "not covered: S2D2's drafts behind a start of the block that is causal"
            if self.family == "d3cache" and self.settings.get("early_stop"):
                return "not covered: d3LLM's early stop with a cache"
            if self.family == "fastdllmv2" and self._ends_in_a_batch:
                return "not covered: rows that end while others of their batch go on"
            for name in ("eager_acceptance_mode", "dual_cache", "temperature"):
                if self.family == "freedave" and self.settings.get(name):
                    return f"not covered: FreeDave with {name}={self.settings[name]}"
            if self.family == "dream" and (self.settings.get("temperature") or self.settings.get("alg_temp")):
                return "not covered: draws whose randomness is torch's own"
            return "sampler"
        return f"not covered: nothing known computes {', '.join(self.outputs) or 'its outputs'}"

    @property
    def prompts_end_in_a_block(self) -> bool:
        """Whether the blocks of prompts, from their start, are others than those counted back from the response."""
        length = self.settings["block_length"]
        return self.settings["block_origin"] == "response" and any(sum(m) % length for m in self.inputs["prompt_mask"])

    @property
    def _ends_in_a_batch(self) -> bool:
        """Whether a row of several stops at its stop token."""
        stop, prompts = self.settings.get("stop_token"), self.inputs["prompt_ids"]
        rows = zip(prompts, self.outputs["ids"], strict=True)
        return len(prompts) > 1 and any(stop in ids[len(prompt) :] for prompt, ids in rows)

    @property
    def cache(self) -> str:
        """The cache of a recorded sampler, from the name of the recorded function."""
        if self.settings.get("use_block_cache"):
            return "sub_block"
        function = str(self.source.get("function") or self.name)
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


KINDS = ("logits", "counts", "rewards", "loss", "logps", "sampler", "objective")
OBJECTIVES = (
    "bgpo", "cj", "coupled", "dmpo", "dreamcoder", "dtreerpo", "ebpo", "egspo", "espo", "gdpo", "gdsd", "igpo",
    "justgrpo", "lightningrl", "lladou", "spg", "stabledrl", "tracerl", "wd1",
)  # fmt: skip
"""Families of scores, losses and gradients that have a module in `losses/`."""


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


def not_covered() -> dict[str, list[str]]:
    """Reason to names of the cases that are not run."""
    reasons = defaultdict(list)
    for case in load_cases():
        if case.not_covered:
            reasons[case.not_covered].append(case.name)
    return dict(reasons)


def _floats(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_floats(item) for item in value]
    if isinstance(value, str):
        return {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}.get(value, value)
    return value
