"""What is trained on what and how: tasks, models, a line for every algorithm and variation, and what a run is.

Owns every number of the proving ground. Nothing is imported that is slow to import.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "algorithms"
TRAINED = 4
"""Tokens per step that all train with."""
SPEEDS = (1, 2, 4, 8)
"""Tokens per step that all are measured with."""
THRESHOLD = 0.9


@dataclass(frozen=True)
class Ground:
    """A task as it is used here.

    Args:
        arguments: of the task.
        taught: those of the rows that the models were taught with, where these were others.
        canvas: completion slots. block: length of the blocks that are written left to right.
        rewards: what is right, and the partial credit beside it.
        checkpoints: models that know the task, by kind.
        ends: whether an answer ends with an end token; else it fills the canvas.
        own: settings of single algorithms that this task needs, by algorithm.
    """

    arguments: Mapping[str, Any]
    canvas: int
    block: int
    rewards: tuple[str, str]
    checkpoints: Mapping[str, str]
    ends: bool = True
    own: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    taught: Mapping[str, Any] | None = None


SMALL = {kind: f"benchmarks/proving_ground/checkpoints/{kind}" for kind in ("full", "shifted", "block")}
_LANGUAGE = {
    "sft": {"loss_weight": "none"},  # as `benchmarks/make_models.py` teaches
    # What is below the baseline teaches here too: without it validation rows are lost, see `--variants negatives`.
    **{
        name: {"negative_advantage_weight": 1.0}
        for name in [
            "coupled_grpo",
            "unigrpo",
            "diffusion_gdpo",
            "espo",
            "gdsd",
            "bgpo",
            "justgrpo",
            "dream_coder_rl",
            "ebpo",
        ]
    },
}
TASKS = {
    "arithmetic_steps": Ground(
        {"min_operations": 3, "max_operations": 4, "max_number": 9, "max_value": 50},
        canvas=32,
        block=8,
        rewards=("arithmetic_steps", "arithmetic_steps:steps"),
        checkpoints=SMALL,
        own=_LANGUAGE,
        taught={"max_operations": 3, "max_number": 9, "max_value": 50},
    ),
    "countdown_small": Ground(
        {"max_number": 12, "max_tries": 1, "symbols": "+-*"},
        canvas=32,
        block=8,
        rewards=("countdown_small", "countdown_small:tries"),
        checkpoints=SMALL,
        own=_LANGUAGE,
    ),
    "few_clue_sudoku": Ground(
        {"max_clues": 3},
        canvas=16,
        block=16,
        rewards=("few_clue_sudoku", "few_clue_sudoku:units"),
        checkpoints={"full": "examples/demo_checkpoint"},
        ends=False,
        own={
            "spg": {"masking": "random"},
            "stabledrl": {"masking": "random"},
            "igpo": {"hide_answer": False, "chunk_length": [1, 2]},
        },
    ),
}
"""Language tasks as `benchmarks/make_models.py` has them, and the demo's puzzles."""
MODELS = ("full", "shifted", "block")

COMMON: dict[str, Any] = {
    "num_generations": 8,
    "num_iterations": 1,
    "temperature": 1.0,
    "beta": 0.0,
    "reward_weights": [0.7, 0.3],
    "scale_rewards": "group",
    "learning_rate": 2e-4,
}
"""What all algorithms of RL share. Rates rise over five steps and fall linearly to zero over the budget."""

RIGHT = "right"  # stands for the name of a task's first reward
RANDOM = "random"
_ABOVE = {"negative_advantage_weight": 0.0}  # only completions above the baseline teach; see docs/evidence.md
_QUICK = {"schedule": "threshold", "schedule_args": {"threshold": THRESHOLD}, "denoising_steps": None}


@dataclass(frozen=True)
class Line:
    """An algorithm.

    Args:
        title: what it is called. trainer: a name in `rl4dlm`, or a control's.
        settings: that differ from `COMMON`.
        rewards: in the place of the task's two.
    """

    title: str
    trainer: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    rewards: tuple[str, ...] | None = None


ALGORITHMS = {
    "diffu_grpo": Line("diffu-GRPO", "DiffuGRPOTrainer", {"p_mask_prompt": 0.0}),
    "coupled_grpo": Line("coupled-GRPO", "CoupledGRPOTrainer", {"pairs": 1, "top_p": 1.0, **_ABOVE}),
    "unigrpo": Line("UniGRPO", "UniGRPOTrainer", {"levels": "structured", **_ABOVE}),
    "spg": Line("SPG", "SPGTrainer", {"num_views": 2, "p_mask_prompt": 0.0, "negatives": "zero"}),
    "diffusion_gdpo": Line("GDPO (diffusion)", "DiffusionGDPOTrainer", {"nodes": 3, **_ABOVE}),
    "espo": Line("ESPO", "ESPOTrainer", {"num_views": 4, **_ABOVE}),
    "gdsd": Line("GDSD", "GDSDTrainer", {"num_views": 4, **_ABOVE}),
    "bgpo": Line("BGPO", "BGPOTrainer", {"num_views": 4, **_ABOVE}),
    "dmpo": Line(
        "DMPO",
        "DMPOTrainer",
        {"num_views": 4, "alpha": 0.25, "weight_baseline": "none", "scale_rewards": "none"},
    ),
    "wd1": Line("wd1", "WD1Trainer", {"p_mask_prompt": 0.0, "psi": 4.0, "scale_rewards": "none"}),
    "justgrpo": Line(
        "JustGRPO",
        "JustGRPOTrainer",
        {
            "schedule": "left_to_right",
            "tokens_per_view": TRAINED,
            "one_view": False,
            "learning_rate": 4e-4,
            **_ABOVE,
        },
    ),
    "dream_coder_rl": Line(
        "Dream-Coder RL", "DreamCoderRLTrainer", {"schedule": "low_confidence", "top_p": 1.0, **_ABOVE}
    ),
    "igpo": Line("IGPO", "IGPOTrainer", {"chunk_length": [2, 4], "free_tail": 0, "correctness_reward": RIGHT}),
    "stabledrl": Line("StableDRL", "StableDRLTrainer", {"num_views": 2, "p_mask_prompt": 0.0, "num_iterations": 2}),
    "cj_grpo": Line("CJ-GRPO", "CJGRPOTrainer"),
    "tracerl": Line("TraceRL", "TraceRLTrainer"),
    "agrpo": Line("AGRPO", "AGRPOTrainer", {"num_scored_steps": 4}),
    "d2": Line("d2", "D2Trainer", {"num_scored_steps": 4}),
    "dipo": Line("DiPO", "DiPOTrainer", {"schedule_args": {"threshold": THRESHOLD}, "denoising_steps": None}),
    "ebpo": Line("EBPO", "EBPOTrainer", {"num_views": 4, **_ABOVE}),
    "egspo": Line("EGSPO", "EGSPOTrainer", {"num_scored_steps": 4}),
    "egspo_sa": Line("EGSPO-SA", "EGSPOTrainer", {"num_scored_steps": 4, "step_lambda": 0.5, "scale_rewards": "none"}),
    "tree_rpo": Line("d-TreeRPO", "TreeRPOTrainer", {"branches": [4, 2]}),
    "mdpo": Line(
        "MDPO",
        "MDPOTrainer",
        {"num_trained_steps": 4, "schedule": "low_confidence", "score_temperature": 1.0, "one_view": False},
    ),
    "lightningrl": Line(
        "LightningRL",
        "LightningRLTrainer",
        {**_QUICK, "scale_rewards": "none", "reward_weights": [1.0, 1.0]},
        rewards=(RIGHT, "speed:tokens_per_forward"),
    ),
}
"""One line for each."""
ON_ALL_KINDS = ("diffu_grpo", "tracerl", "ebpo", "spg", "cj_grpo")
"""Those that are also run with shifted logits and on blocks."""
CONTROLS = {
    "sft": Line("SFT goes on", "DiffusionSFTTrainer", {"learning_rate": 2e-4}),
    "positives": Line(
        "SFT on own right answers", "PositivesTrainer", {"num_views": 4, "reward_weights": [1.0]}, rewards=(RIGHT,)
    ),
    "random_reward": Line(
        "diffu-GRPO, random rewards",
        "DiffuGRPOTrainer",
        {"p_mask_prompt": 0.0, "reward_weights": [1.0]},
        rewards=(RANDOM,),
    ),
}
"""What an algorithm has to beat: SFT on the task's worked answers, for as many positions; masked SFT on those of the
model's own completions that are right; and rewards that know nothing."""
LINES = {**ALGORITHMS, **CONTROLS}
DISTILLATION = {
    "self_distillation": Line(
        "Self-distillation", "SelfDistillationTrainer", {"scale_rewards": "none", "tokens_per_step": 1}
    )
}
"""What makes steps fewer, not answers better: it is run as a question of its own."""
ORDER = {"lladou": Line("LLaDOU", "LLaDOUTrainer", {"policy_learning_rate": 1e-3})}
"""What learns the order of writing, too, with which it has to be decoded: also a question of its own."""
_POLICY = {
    "reward_weights": [1.0],
    "scale_rewards": "none",
    "temperature": 0.0,
    "denoising_steps": None,
    "num_generations": 16,
}
UNMASKING = {
    "bernoulli_unmasking": Line(
        "Bernoulli unmasking",
        "BernoulliUnmaskingTrainer",
        {
            **_POLICY,
            "schedule": "bernoulli",
            "policy_hidden_size": 32,
            "num_iterations": 4,
            "learning_rate": 3e-3,
        },
        rewards=(RIGHT,),
    ),
    "ctrldiff": Line(
        "CtrlDiff",
        "CtrlDiffTrainer",
        {
            **_POLICY,
            "schedule": "ctrldiff",
            "schedule_args": {"threshold": THRESHOLD},
            "block_length": None,
            "block_sizes": [2, 4, 8, 16],
            "speed_alpha": 0.5,
            "learning_rate": 3e-3,
        },
        rewards=(RIGHT,),
    ),
}
"""Policies that decide where a frozen model writes: what they change is how many forwards an answer takes."""
EVERY_LINE = {**LINES, **DISTILLATION, **ORDER, **UNMASKING}


def _each(algorithms: str, what: str, settings: Mapping[str, Any]) -> dict[str, tuple[str, Mapping[str, Any]]]:
    return {f"{name}+{what}": (name, settings) for name in algorithms.split()}


_CACHE = {"cache": "dual", "audit_bound": None}
_BLOCKS = {"masking": "block_elbo", "p_mask_prompt": 0.15}  # hides no prompt, whatever the share
_TWICE = {"num_iterations": 2, "negative_advantage_weight": 1.0}
_UNCONDITIONAL = {"clip": "unconditional", "epsilon": 1.0, "epsilon_high": 4.0}
_VALUES = {"value_model": "steps", "value_target": "advantage", "value_learning_rate": 3e-3}
_TRACE = {"states": "recorded", "teacher_view": "same", "divergence": "none", "hard_weight": 1.0, "rewarded_from": 1.0}
QUESTIONS: dict[str, dict[str, tuple[str, Mapping[str, Any]]]] = {
    "distillation": {
        **_each("self_distillation", "two_steps", {"teacher_steps": 2, "num_views": 2}),
        **_each("self_distillation", "four_steps", {"teacher_steps": 4, "num_views": 2}),
        **_each("self_distillation", "trace", {**_TRACE, "num_views": 2}),
        **_each(
            "self_distillation",
            "trace_sure",
            {**_TRACE, "num_views": 2, "entropy_weight": 2.0, "entropy_temperature": 0.5},
        ),
        **_each(
            "self_distillation",
            "trace_sure_long",
            {
                **_TRACE,
                "num_views": 2,
                "entropy_weight": 2.0,
                "entropy_temperature": 0.5,
                "num_iterations": 4,
                "learning_rate": 5e-4,
            },
        ),
        **_each(
            "self_distillation",
            "own_answer",
            {
                "states": "recorded",
                "teacher_view": "suffix",
                "teacher_share": [0.25, 0.25],
                "block_length": 4,
                "rewarded_from": 1.0,
                "num_views": 2,
            },
        ),
    },
    "order": {
        **_each("lladou", "both", {"policy_learning_rate": 2e-3}),
        **_each("lladou", "policy_alone", {"train_denoiser": False, "policy_learning_rate": 2e-3}),
        **_each("lladou", "policy_alone_fast", {"train_denoiser": False, "policy_learning_rate": 6e-3}),
        **_each(
            "lladou",
            "policy_alone_passes",
            {"train_denoiser": False, "policy_learning_rate": 3e-3, "num_iterations": 4},
        ),
    },
    "unmasking": {
        **_each("bernoulli_unmasking", "alpha_half", {"speed_alpha": 0.5}),
        **_each("bernoulli_unmasking", "alpha_3", {"speed_alpha": 3.0}),
        **_each("bernoulli_unmasking", "one_block", {"block_length": None}),
        **_each("ctrldiff", "less_sure", {"schedule_args": {"threshold": 0.7}}),
    },
    "negatives": {
        **_each("coupled_grpo unigrpo diffusion_gdpo espo bgpo", "negatives_1", {"negative_advantage_weight": 1.0}),
        **_each("gdsd", "negatives_1", {"negative_advantage_weight": 1.0}),
        **_each("coupled_grpo unigrpo diffusion_gdpo espo bgpo", "negatives_half", {"negative_advantage_weight": 0.5}),
        **_each("diffu_grpo coupled_grpo unigrpo diffusion_gdpo espo bgpo justgrpo ebpo", "negatives_0", _ABOVE),
        **_each("coupled_grpo espo bgpo", "negatives_0_slow", {**_ABOVE, "learning_rate": 0.67e-4}),
        **_each("spg", "negatives_mix", {"negatives": "mix"}),
        **_each("spg", "block_elbo", _BLOCKS),
        **_each("spg", "block_elbo_negatives", {**_BLOCKS, "negatives": "elbo"}),
        **_each("espo bgpo", "negatives_1_slow", {"negative_advantage_weight": 1.0, "learning_rate": 0.67e-4}),
        **_each("espo bgpo", "negatives_1_two_tokens", {"negative_advantage_weight": 1.0, "tokens_per_step": 2}),
    },
    "clips": {
        **_each("espo bgpo coupled_grpo diffu_grpo", "two_passes", _TWICE),
        **_each("espo bgpo coupled_grpo diffu_grpo", "unconditional", {**_TWICE, **_UNCONDITIONAL}),
        **_each("espo coupled_grpo", "self_normalized", {**_TWICE, **_UNCONDITIONAL, "self_normalize": "group"}),
    },
    "inexact": {
        **_each("diffu_grpo espo", "cache", _CACHE),
        **_each("diffu_grpo espo", "threshold", _QUICK),
        **_each("justgrpo", "cache_corrected", {**_CACHE, "rollout_correction": "token_truncate"}),
        **_each("cj_grpo", "cache_recorded", {**_CACHE, "old_policy": "recorded"}),
        **_each("cj_grpo", "threshold", _QUICK),
    },
    "speed": {
        **_each("lightningrl", "published_sum", {"speed_gate": "none"}),
        **_each("lightningrl", "no_speed", {"reward_weights": [1.0, 0.0]}),
    },
    "values": {
        **_each("tracerl", "values", _VALUES),
        **_each("tracerl", "values_half_lambda", {**_VALUES, "gae_lambda": 0.5}),
        **_each("tracerl", "values_of_rewards", {**_VALUES, "value_target": "reward"}),
    },
    "views_key": {
        **_each("diffu_grpo wd1", "masks_by_row", {"p_mask_prompt": 0.15}),
        **_each("diffu_grpo wd1", "masks_by_prompt", {"p_mask_prompt": 0.15, "views_keyed_by": "prompt"}),
        **_each("coupled_grpo unigrpo", "masks_by_prompt", {"views_keyed_by": "prompt"}),
    },
    "views": {
        **_each("espo bgpo", "views_2", {"num_views": 2}),
        **_each("espo bgpo", "views_8", {"num_views": 8}),
        **_each("bgpo spg", "views_1", {"num_views": 1}),
        **_each("spg", "views_4", {"num_views": 4}),
        **_each("coupled_grpo", "pairs_3", {"pairs": 3}),
    },
    "learning_rate": {
        name: variation
        for algorithm, line in ALGORITHMS.items()
        for what, factor in (("slow", 1 / 3), ("fast", 3))
        for rate in [line.settings.get("learning_rate", COMMON["learning_rate"])]
        for name, variation in _each(algorithm, what, {"learning_rate": float(f"{factor * rate:.2g}")}).items()
    },
}
"""By question: what varies, each an algorithm and the settings that differ from its own."""
VARIANTS = {name: variation for found in QUESTIONS.values() for name, variation in found.items()}


@dataclass(frozen=True)
class Scale:
    """How much is done.

    Args:
        batches: generation batches with the budget `completions`; one optimizer step each, or `num_iterations`.
        completions: in a batch. views: what the budget `positions` allows each completion beside its rollout.
        test: rows of the test split that are decoded greedily. validation: rows of the learning curve.
        curve: points of the learning curve.
        prompts, samples: of the test split that completions are drawn for, and how many for each.
        drifted: drawn completions that the distance to the start is estimated on. bounds: views of each.
    """

    batches: int = 60
    completions: int = 64
    views: int = 2
    test: int = 256
    validation: int = 128
    curve: int = 4
    prompts: int = 64
    samples: int = 8
    drifted: int = 128
    bounds: int = 4


@dataclass(frozen=True)
class Run:
    """One training, or with the name `before` the measurement of what all start from.

    Args:
        task, model: keys of `TASKS`, and of its checkpoints. name: of a line or of a variation.
        budget: what all have the same of: `completions` or `positions`.
    """

    task: str
    model: str
    name: str
    budget: str = "completions"
    seed: int = 0
    scale: Scale = Scale()

    @property
    def ground(self) -> Ground:
        return TASKS[self.task]

    @property
    def algorithm(self) -> str:
        return VARIANTS[self.name][0] if self.name in VARIANTS else self.name

    @property
    def title(self) -> str:
        what = self.name.partition("+")[2].replace("_", " ")
        return EVERY_LINE[self.algorithm].title + (f", {what}" if what else "")

    @property
    def exists(self) -> bool:
        """Whether the task has the model, and the model blocks that the algorithm can be run in.

        Maskings of blocks need several. JustGRPO writes single tokens where prompts end inside of blocks, and MDPO
        predicts all open slots, which models of blocks do not; policies of the order look beyond blocks.
        """
        if self.ground.block == self.ground.canvas and "block_elbo" in self.name:
            return False
        return self.model in self.ground.checkpoints and (
            self.model != "block" or self.algorithm not in ("justgrpo", "mdpo", *ORDER, *UNMASKING)
        )

    @property
    def checkpoint(self) -> Path:
        return ROOT / self.ground.checkpoints[self.model]

    def path(self, results: Path = RESULTS) -> Path:
        """Where its result is."""
        name = "before" if self.name == "before" else f"{self.name}-{self.budget}-{self.seed}"
        return results / self.task / self.model / f"{name}.json"

    def settings(self) -> dict[str, Any]:
        """The trainer's settings, but for those of where and how it runs."""
        line, ground = EVERY_LINE[self.algorithm], self.ground
        if self.algorithm == "sft":
            return {**line.settings, **ground.own.get("sft", {})}
        own = {**line.settings, **ground.own.get(self.algorithm, {}), **VARIANTS.get(self.name, ("", {}))[1]}
        tokens = own.pop("tokens_per_step", TRAINED)
        given: dict[str, Any] = {
            **COMMON,
            "max_completion_length": ground.canvas,
            "block_length": ground.block,
            "denoising_steps": ground.canvas // tokens,
            **own,
        }
        if given.get("correctness_reward") == RIGHT:
            given["correctness_reward"] = ground.rewards[0]
        if self.algorithm == "justgrpo":  # says it by `tokens_per_view`
            given.pop("denoising_steps")
        return given

    @property
    def rewards(self) -> tuple[str, ...]:
        """Names of reward functions, or `RANDOM`."""
        own = EVERY_LINE[self.algorithm].rewards or self.ground.rewards
        return tuple(self.ground.rewards[0] if name == RIGHT else name for name in own)

    def fingerprint(self) -> str:
        """Of everything that its result depends on: settings, task, scale, and the weights of the start."""
        parts: dict[str, Any] = {
            "task": self.task,
            "arguments": dict(self.ground.arguments),
            "scale": asdict(self.scale),
        }
        parts |= {"canvas": self.ground.canvas, "block": self.ground.block, "speeds": SPEEDS, "threshold": THRESHOLD}
        if self.name != "before":
            parts |= {"trainer": EVERY_LINE[self.algorithm].trainer, "settings": self.settings(), "budget": self.budget}
            parts |= {"seed": self.seed, "rewards": self.rewards}
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
        for file in sorted(self.checkpoint.glob("*.safetensors")):
            digest.update(file.read_bytes())
        return digest.hexdigest()[:16]
