"""One step of every trainer on a small model of every family: which trains, and what the others say.

    python benchmarks/trainer_families.py            # into docs/recipes.md and README.md, between their markers
    python benchmarks/trainer_families.py --print    # on the screen

A step counts where finite weights have changed. What is refused is refused with a `ValueError`, whose sentence is
recorded; any other error ends this program. Two minutes on one core.
"""

from __future__ import annotations

import argparse
import tempfile
import textwrap
import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars

import rl4dlm
from rl4dlm.models import tiny

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "recipes.md"
README = ROOT / "README.md"
MARKERS = ("<!-- trainers and families: made by benchmarks/trainer_families.py -->", "<!-- end -->")

FAMILIES = {  # as a column is called: what builds the small model
    "llada": tiny.tiny_llada,
    "illada": tiny.tiny_illada,
    "llada_moe": tiny.tiny_llada_moe,
    "llada2": tiny.tiny_llada2,
    "dream": tiny.tiny_dream,
    "sdar": tiny.tiny_sdar,
    "sdar_moe": tiny.tiny_sdar_moe,
    "fast_dllm": tiny.tiny_fast_dllm,
    "a2d": tiny.tiny_a2d_qwen3,
    "nemotron_diffusion": tiny.tiny_nemotron_diffusion,
    "wedlm": tiny.tiny_wedlm,
    "diffusion_gemma": tiny.tiny_diffusion_gemma,
}

RUN = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "max_steps": 1,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "bf16": False,
    "use_cpu": True,
    "disable_tqdm": True,
    "activation_checkpointing": False,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
}
ROLLOUT = {"max_completion_length": 8, "num_generations": 4, "temperature": 1.0, "top_p": 1.0}
MASKS = {"denoising_steps": 4}
CANVAS = {"schedule": "entropy_bound_canvas", "schedule_args": {"max_steps": 2, "entropy_bound": 4.0}}

# What a trainer needs on eight slots; none of it chooses between families.
SETTINGS: dict[str, dict[str, Any]] = {
    "AGRPO": {"num_scored_steps": 2},
    "BGPO": {"num_views": 2},
    "BernoulliUnmasking": {"denoising_steps": None, "temperature": 0.8, "policy_hidden_size": 8, "warmup_steps": 0},
    "CtrlDiff": {"denoising_steps": None, "block_sizes": [1, 2, 4], "schedule_args": {"threshold": 0.0}},
    "D2": {"num_scored_steps": 2},
    "DMPO": {"alpha": 0.5},
    "DiPO": {"schedule": "low_confidence"},
    "EBPO": {"num_views": 2},
    "EGSPO": {"num_scored_steps": 2},
    "GDSD": {"num_views": 2},
    "IGPO": {"free_tail": 0, "hint_ratio": [0.5, 1.0], "chunk_length": [1, 2], "hide_answer": False},
    "JustGRPO": {"denoising_steps": 8},
    "LightningRL": {"min_speed_range": 0.0, "speed_reward": "letters", "accuracy_from": 0.5},
    "MDPO": {"num_trained_steps": 2, "score_temperature": 1.0, "schedule": "low_confidence"},
    "SelfDistillation": {"hard_weight": 0.5},
    "TraceRL": {"schedule": "low_confidence", "per_device_train_batch_size": 4},
    "TreeRPO": {"branches": [2, 2]},
}
POLICIES = ("BernoulliUnmasking", "CtrlDiff")
# What the page says to set for models whose noise is random tokens.
UNIFORM: dict[str, dict[str, Any]] = {
    "DMPO": {"form": "count"},
    "DreamCoderRL": {"cart_p": None},
    "ESPO": {"form": "count"},
    "GDSD": {"weights": "elbo", "form": "count"},
    "SPG": {"masking": "random"},
    "StableDRL": {"masking": "random"},
    "TreeRPO": {"cuts": [1]},
}
TRAINERS = sorted(
    name.removesuffix("Trainer")
    for name in rl4dlm.__all__
    if name.endswith("Trainer") and name not in ("DiffusionPolicyTrainer", "DiffusionSFTTrainer", "TrajectoryTrainer")
)


def eighths(completions: list[str], **columns: Any) -> list[float]:
    """A reward that differs between nearly any two texts."""
    return [sum(map(ord, text)) % 8 / 8 for text in completions]


def letters(completions: list[str], **columns: Any) -> list[float]:
    """What stands for speed."""
    return [sum(character.islower() for character in text) / 8 for text in completions]


def build(trainer: str, family: str, folder: str) -> Any:
    """A trainer on a small model of a family. Raises ValueError where the two do not go together."""
    model = FAMILIES[family](initializer_range=0.1)
    settings = {"output_dir": folder, **RUN}
    if trainer == "DiffusionSFT":
        rows = Dataset.from_list([{"prompt": "1+1=", "completion": "2"}] * 8)
        args = rl4dlm.DiffusionSFTConfig(**settings)
        return rl4dlm.DiffusionSFTTrainer(model, args, rows, None, tiny.tiny_tokenizer())
    if trainer == "VRPO":
        rows = Dataset.from_list([{"prompt": "1+1=", "chosen": "2", "rejected": "35"}] * 8)
        args = rl4dlm.VRPOConfig(**settings, num_views=2)
        return rl4dlm.VRPOTrainer(model, None, args, rows, None, tiny.tiny_tokenizer())
    if trainer == "ELBOKTO":
        rows = Dataset.from_list([{"prompt": "1+1=", "completion": c, "label": c == "2"} for c in ("2", "35")] * 4)
        args = rl4dlm.ELBOKTOConfig(**settings, num_views=2, reward_baseline="zero")
        return rl4dlm.ELBOKTOTrainer(model, None, args, rows, None, tiny.tiny_tokenizer())
    uniform = {"denoising_steps": None, **CANVAS, **UNIFORM.get(trainer, {})} if family == "diffusion_gemma" else {}
    if trainer in POLICIES:  # which have a schedule of their own
        uniform = {}
    settings |= {**ROLLOUT, **MASKS, **SETTINGS.get(trainer, {}), **uniform}
    if trainer == "JustGRPO":  # its one schedule
        settings |= {"schedule": "left_to_right", "schedule_args": None}
    rows = Dataset.from_dict(
        {"prompt": ["abc1", "de2", "fghi34", "j"], "answer": ["a", "b", "c", "d"], "solution": ["ab", "bc", "cd", "de"]}
    )
    made = getattr(rl4dlm, f"{trainer}Trainer")
    return made(
        model,
        [eighths, letters] if trainer == "LightningRL" else eighths,
        made.config_class(**settings),
        rows,
        processing_class=tiny.tiny_tokenizer(),
    )


def refusal(trainer: str, family: str) -> str | None:
    """None after one step that changed finite weights; else the sentence with which the pair was refused.

    Raises:
        RuntimeError: the step changed nothing, or left weights that are not finite.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            made = build(trainer, family, folder)
            before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
            made.train()
        except ValueError as error:
            return " ".join(str(error).split())
        after = dict(made.model.named_parameters())
        changed = any(not torch.equal(after[name], before[name]) for name in before)
        if not changed or not all(bool(p.isfinite().all()) for p in after.values()):
            raise RuntimeError(f"{trainer} on {family}: the step changed nothing, or broke the weights")
    return None


def table(found: dict[str, dict[str, str | None]]) -> str:
    """The matrix as a Markdown table."""
    columns = list(FAMILIES)
    lines = [
        "| trainer | " + " | ".join(f"`{name}`" for name in columns) + " |",
        "| --- |" + " :---: |" * len(columns),
    ]
    for trainer, outcomes in found.items():
        cells = ["yes" if outcomes[family] is None else "no" for family in columns]
        lines.append(f"| `{trainer}Trainer` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def reasons(found: dict[str, dict[str, str | None]]) -> str:
    """What was refused, and with which words."""
    said: dict[tuple[str, str], list[str]] = {}  # (families, sentence) -> trainers
    for trainer, where, sentence in _refusals(found):
        said.setdefault((where, sentence), []).append(trainer)
    lines = ["What a *no* says:", ""]
    for (where, sentence), trainers in said.items():
        text = f"- {', '.join(trainers)} on {where}: {sentence}"
        lines.append(textwrap.fill(text, 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False))
    return "\n".join(lines)


def _refusals(found: dict[str, dict[str, str | None]]) -> list[tuple[str, str, str]]:
    """(trainer, families, sentence) of everything that was refused."""
    rows = []
    for trainer, outcomes in found.items():
        for said in dict.fromkeys(sentence for sentence in outcomes.values() if sentence is not None):
            where = ", ".join(f"`{family}`" for family, sentence in outcomes.items() if sentence == said)
            rows.append((trainer, where, said.removeprefix(f"{trainer}Trainer is ")))
    return rows


def into_page(page: Path, text: str) -> None:
    """Puts a text between a page's markers."""
    before, _, rest = page.read_text(encoding="utf-8").partition(MARKERS[0])
    _, end, after = rest.partition(MARKERS[1])
    if not end:
        raise ValueError(f"{page} lacks one of the markers {MARKERS}")
    page.write_text(f"{before}{MARKERS[0]}\n\n{text}\n\n{MARKERS[1]}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", help="on the screen, not into the page")
    parser.add_argument("--trainers", nargs="+", default=[*TRAINERS, "DiffusionSFT"])
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    disable_progress_bars()
    torch.set_num_threads(1)
    found: dict[str, dict[str, str | None]] = {}
    for trainer in arguments.trainers:
        found[trainer] = {family: refusal(trainer, family) for family in FAMILIES}
        if found[trainer]["llada"] is not None:  # it is the settings here that are wrong
            raise RuntimeError(f"{trainer}: {found[trainer]['llada']}")
        print(trainer, *("no" if sentence else "yes" for sentence in found[trainer].values()), flush=True)
    if arguments.print:
        print(table(found), reasons(found), sep="\n\n")
    else:
        into_page(PAGE, f"{table(found)}\n\n{reasons(found)}")
        into_page(README, table(found))


if __name__ == "__main__":
    main()
