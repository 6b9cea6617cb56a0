"""Settings of every schedule for tests, and rows decoded with them while all that the model is fed is written down."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import isfunction
from pathlib import Path
from typing import Any

import torch

from rl4dlm.models.scoring import attach_scoring
from rl4dlm.models.tiny import tiny_llada
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.policies.bernoulli import BernoulliPolicy
from rl4dlm.rollout.policies.hidden_states import UnmaskingPolicyModule
from rl4dlm.rollout.policies.policy import fresh
from rl4dlm.rollout.policies.saving import save_policy
from rl4dlm.rollout.rollout import EventKind, Rollout
from rl4dlm.rollout.rows import Progress
from rl4dlm.rollout.schedules.learn2pd import TokenFilter, save_filter
from rl4dlm.rollout.schedules.parts import Schedule
from tests.models.float64 import exactly_float64
from tests.rollout.causal_models import random_causal

VOCAB, MASK, EOS, LENGTH = 9, 2, 1, 8
PROMPTS = [[5, 6, 7], [8], [3, 4, 5, 6, 7, 8, 3], [1, 1, 1], [3, 1, 4]]
HINTS: list[dict[int, int]] = [{}, {2: 7}, {4: 8, 5: 3, 6: 4, 7: 5}, {0: EOS}, {0: 3, 1: 4, 3: 5, 7: 6}]
"""Slots that are given, row by row, where a schedule takes them: none, one, a whole block, an end, most."""
ROW_IDS = [10, 7, 2**40, 3, 0]


@functools.cache
def token_filter(block_length: int) -> str:
    """The path of a random network for `learn2pd`; the file is there as long as the tests run."""
    network = TokenFilter(block_length)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in network.parameters():
            weight.normal_(generator=generator)
    path = Path(SCRATCH.name) / f"filter-{block_length}.safetensors"
    save_filter(network, path, temperature=0.0, cache="none")
    return str(path)


@functools.cache
def order_policy(layers: int) -> str:
    """The path of a random policy for `learned_order`; the file is there as long as the tests run."""
    size = denoiser().config.hidden_size
    policy = fresh(UnmaskingPolicyModule(size, frequencies=8, layers=layers, heads=2), seed=0, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    folder = Path(SCRATCH.name) / f"policy-{layers}"
    folder.mkdir()
    return str(save_policy(policy, folder))


@functools.cache
def unmasking_policy() -> BernoulliPolicy:
    """A random network for `bernoulli`."""
    policy = fresh(BernoulliPolicy(hidden_size=8), seed=0, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.normal_(std=0.5, generator=generator)
    return policy


def judge() -> Any:
    """A causal model with the vocabulary of the denoisers."""
    return random_causal(VOCAB)


SCRATCH = tempfile.TemporaryDirectory()
WHOLE = {"block_length": None}
"""One block, or blocks of the schedule's own."""

SETTINGS: dict[str, tuple[dict[str, Any], ...]] = {
    "adablock": (
        {**WHOLE, "schedule_args": {"delimiter_ids": (3, 8), "default_block": 3, "threshold": 0.4}},
        {
            **WHOLE,
            "schedule_args": {"delimiter_ids": (4, 5, 6), "delimiter_threshold": 0.1, "threshold": 0.5},
            "temperature": 0.8,
        },
    ),
    "ass": ({**WHOLE}, {**WHOLE, "schedule_args": {"num_blocks": 3}, "temperature": 1.0}),
    "bernoulli": (
        {"schedule_args": {"policy": lambda: unmasking_policy()}},
        {**WHOLE, "schedule_args": {"policy": lambda: unmasking_policy(), "policy_temperature": 0.5}},
        {**WHOLE, "schedule_args": {"policy": lambda: unmasking_policy(), "policy_temperature": 0}, "temperature": 0.7},
    ),
    "credit": (
        {"schedule_args": {"threshold": 0.5}},
        {**WHOLE, "schedule_args": {"threshold": 0.4, "weight": 2.0, "power": 0.5, "decay": 0.5}, "temperature": 0.8},
    ),
    "ctrldiff": (
        {**WHOLE, "schedule_args": {"sizes": (1, 2, 3), "threshold": 0.4}},
        {**WHOLE, "schedule_args": {"sizes": (2, 5), "threshold": 0.6}, "temperature": 0.7},
    ),
    "d2f": (
        {"block_length": 2, "schedule_args": {"threshold": 0.4, "add_threshold": 0.5, "active_threshold": 0.5}},
        {"schedule_args": {"threshold": 0.5, "add_threshold": 0.25}, "temperature": 0.8},
    ),
    "daedal": (
        {**WHOLE, "schedule_args": {"start_length": 2, "window": 3, "growth": 2, "end_slots": 2, "low": 0.4}},
        {
            **WHOLE,
            "schedule_args": {
                "start_length": 4,
                "growth": 4,
                "end_slots": 1,
                "low": 0.6,
                "length_end": 0,
                "insert_end": 2,
            },
            "temperature": 0.6,
        },
    ),
    "dream_entropy": (
        {**WHOLE, "steps": 5},
        {"steps": 4, "schedule_args": {"alg_temp": 0.3}, "temperature": 0.7, "top_p": 0.9},
    ),
    "dream_maskgit_plus": (
        {**WHOLE, "steps": 3, "top_k": 4},
        {"steps": 8, "schedule_args": {"counts": "floor", "alg_temp": 0.2}, "temperature": 1.0, "top_p": 0.8},
    ),
    "dream_origin": ({**WHOLE, "steps": 5}, {"steps": 6, "schedule_args": {"eps": 0.2}, "temperature": 0.9}),
    "dream_threshold": (
        {**WHOLE, "steps": 4, "schedule_args": {"threshold": 0.4}},
        {"steps": 2, "schedule_args": {"threshold": 0.3}, "temperature": 0.6},
    ),
    "dream_topk_margin": (
        {**WHOLE, "steps": 8, "schedule_args": {"counts": "floor"}},
        {"steps": 4, "schedule_args": {"alg_temp": 0.1}, "temperature": 0.7, "top_k": 3},
    ),
    "editing": (
        {"steps": 4, "schedule_args": {"threshold": 0.5, "editing_threshold": 0.2, "max_post_steps": 2}},
        {"steps": 8, "schedule_args": {"threshold": 0.6, "editing_threshold": 0.4}, "temperature": 0.8},
    ),
    "edlm": (
        {**WHOLE, "steps": 4, "schedule_args": {"energy": judge, "drafts": 3}, "temperature": 0.9},
        {
            "steps": 8,
            "schedule_args": {"energy": judge, "window": (0.6, 1.0), "order": "low_confidence"},
            "temperature": 0.7,
        },
    ),
    "entropy_bound": (
        {**WHOLE, "schedule_args": {"gamma": 1.2}},
        {"schedule_args": {"gamma": 0.6}, "temperature": 0.8},
    ),
    "eoser": ({"steps": 4}, {"steps": 6, "schedule_args": {"min_gamma": 0.1, "max_gamma": 0.5}, "temperature": 1.0}),
    "eoser_ass": ({**WHOLE}, {**WHOLE, "schedule_args": {"num_blocks": 2}, "temperature": 1.0}),
    "factor": (
        {**WHOLE, "schedule_args": {"factor": 1.6}},
        {"schedule_args": {"factor": 1.0}, "temperature": 0.7, "cfg_scale": 0.5},
    ),
    "guided": (
        {**WHOLE, "schedule_args": {"guide": judge, "top_k": 4, "ratio": 0.1}},
        {"schedule_args": {"guide": judge, "accept": "all", "top_k": 3, "ratio": 0.2}, "temperature": 0.7},
    ),
    "hierarchical": (
        {**WHOLE, "schedule_args": {"threshold": 0.6, "low_threshold": 0.2}},
        {
            **WHOLE,
            "schedule_args": {"threshold": 0.7, "low_threshold": 0.3, "remask_threshold": 0.6},
            "temperature": 0.7,
        },
    ),
    "klass": (
        {"steps": 8, "schedule_args": {"threshold": 0.3, "kl_threshold": 0.3, "history": 1}},
        {
            **WHOLE,
            "steps": 8,
            "schedule_args": {"threshold": 0.2, "kl_threshold": 0.2, "kl_tokens": 4},
            "temperature": 0.6,
        },
    ),
    "latent_refinement": (
        {**WHOLE, "schedule_args": {"threshold": 0.5, "refine_steps": 3, "settle_divergence": 0.01}},
        {"schedule_args": {"threshold": 0.6, "feedback": 0.5, "refine_steps": 2}, "temperature": 0.7},
    ),
    "levenshtein": (
        {"schedule_args": {"delete_token_id": 5, "insert_token_id": 6, "threshold": 0.3, "max_post_steps": 3}},
        {
            "schedule_args": {
                "delete_token_id": 4,
                "insert_token_id": 8,
                "editing_threshold": 0.2,
                "max_post_steps": 2,
            },
            "temperature": 0.8,
        },
    ),
    "learn2pd": (
        {**WHOLE, "schedule_args": {"filter_path": lambda: token_filter(LENGTH), "acceptance": 0.8}},
        {
            "schedule_args": {"filter_path": lambda: token_filter(4), "acceptance": 0.5},
            "temperature": 0.7,
        },
        {
            **WHOLE,
            "schedule_args": {
                "filter_path": lambda: token_filter(LENGTH),
                "acceptance": 0.6,
                "truncate": True,
                "eos_threshold": 0.1,
            },
        },
    ),
    "learned_order": (
        {"steps": 4, "schedule_args": {"policy": lambda: order_policy(1)}},
        {**WHOLE, "steps": 4, "schedule_args": {"policy": lambda: order_policy(0)}, "temperature": 0.8},
    ),
    "left_to_right": ({"steps": 6}, {**WHOLE, "steps": 3, "temperature": 1.0}),
    "low_confidence": ({"steps": 4}, {**WHOLE, "steps": 3, "temperature": 0.8, "top_p": 0.9}),
    "multi_block": (
        {"block_length": 2, "schedule_args": {"entropy_threshold": 1.2, "add_threshold": 0.5}},
        {"schedule_args": {"entropy_threshold": 0.8, "add_threshold": 0.25}, "temperature": 0.8},
    ),
    "pc_sampler": (
        {"steps": 6},
        {
            **WHOLE,
            "steps": 4,
            "schedule_args": {"frequencies": {3: 10, 4: 1, 8: 5}, "decay": 0.1, "alpha": 0.5},
            "temperature": 0.8,
        },
    ),
    "random": ({"steps": 6}, {"steps": 4, "block_length": 2, "temperature": 1.0, "cfg_scale": 0.5}),
    "rcr": (
        {"steps": 4, "schedule_args": {"counts": "cosine"}},
        {"steps": 8, "schedule_args": {"confidence": "topk_margin", "update": "min"}, "temperature": 0.8},
        {**WHOLE, "steps": 8, "schedule_args": {"counts": "pow", "remask": False}},
    ),
    "s2d2": (
        {"steps": 6, "schedule_args": {"threshold": 0.4, "min_span": 2}},
        {
            "steps": 8,
            "schedule_args": {"policy": "hysteresis", "penalty": 1.0, "threshold_on": 0.3, "ratio_threshold": 0.8},
            "temperature": 0.9,
        },
    ),
    "saber": (
        {**WHOLE, "schedule_args": {"min_tokens": 3}},
        {**WHOLE, "schedule_args": {"min_tokens": 2}, "temperature": 1.5},
        {"schedule_args": {"backtrack": False}},
    ),
    "schema": ({**WHOLE, "steps": 3}, {**WHOLE, "schedule_args": {"tokens_per_step": 2}, "temperature": 0.8}),
    "sdar_dynamic": (
        {"steps": 6, "schedule_args": {"threshold": 0.4}},
        {"steps": 8, "schedule_args": {"threshold": 0.5}, "temperature": 0.9, "top_k": 3},
    ),
    "sliding_window": (
        {**WHOLE, "schedule_args": {"window": 3, "entropy_threshold": 1.5, "distance_penalty": 0.1}},
        {**WHOLE, "schedule_args": {"window": 5, "entropy_threshold": 1.2}, "temperature": 0.8},
    ),
    "smoothing": (
        {**WHOLE, "schedule_args": {"threshold": 0.4, "start_threshold": 0.6, "threshold_decay": 0.1}},
        {
            "schedule_args": {"threshold": 0.3, "start_threshold": 0.6, "threshold_decay": 0.1, "max_weight": 0.8},
            "temperature": 0.7,
        },
    ),
    "sub_blocks": (
        {"schedule_args": {"sub_block_length": 2, "threshold": 0.4}},
        {**WHOLE, "schedule_args": {"sub_block_length": 3, "threshold": 0.3, "first_alone": False}, "temperature": 0.8},
    ),
    "threshold": (
        {"schedule_args": {"threshold": 0.4}},
        {**WHOLE, "schedule_args": {"threshold": 0.3}, "temperature": 0.7},
    ),
    "wino": (
        {**WHOLE, "schedule_args": {"threshold": 0.3, "verify_threshold": 0.5, "min_cap": 3}},
        {"schedule_args": {"threshold": 0.2, "verify_threshold": 0.9, "min_cap": 2, "max_cap": 3}, "temperature": 0.8},
    ),
}
"""Settings of each schedule that decodes masked models, with thresholds that the models below reach now and then; what
is a function is called for its value."""

EXAMPLES = [(name, i) for name, several in SETTINGS.items() for i in range(len(several))]

# --- decoding and looking on ------------------------------------------------------------------------------------------


@functools.cache
def denoiser(seed: int = 0) -> Any:
    """A random float64 Llama with few tokens, so that ends and high probabilities occur; shared, so never change it."""
    model = tiny_llada(vocab_size=VOCAB, initializer_range=0.4, dtype=torch.float64, seed=seed)
    return attach_scoring(exactly_float64(model))


def decoding(name: str, i: int = 0, **more: Any) -> DecodingConfig:
    usual = {"canvas_length": LENGTH, "block_length": 4, "schedule": name, "stop_at_eos": False}
    chosen = {**usual, **SETTINGS[name][i], **more}
    arguments = {key: value() if isfunction(value) else value for key, value in chosen.get("schedule_args", {}).items()}
    if name == "edlm" and chosen.get("temperature", 0) == 0:
        arguments["drafts"] = 1  # all would be the same
    return DecodingConfig(**{**chosen, "schedule_args": arguments})


def parts(config: DecodingConfig) -> Schedule:
    schedule = config.build_schedule()
    assert isinstance(schedule, Schedule)
    return schedule


@dataclass
class Run:
    """A row decoded alone."""

    config: DecodingConfig
    schedule: Schedule
    prompt: list[int]
    given: dict[int, int]
    rollout: Rollout
    fed: list[Mapping[str, Any]]  # what the model's body was called with, one entry per step
    checks: int  # forwards besides, of drafts that are checked
    progress: list[Progress]  # after each step

    @functools.cached_property
    def states(self) -> list[list[int]]:
        """The canvas before each step, and the last one, without slots that do not exist."""
        trace = self.rollout.trace
        last = self.rollout.canvas[0]
        still_open = (trace.commit_step[0] < 0) & ~self.rollout.hinted[0]
        last = torch.where(still_open, MASK, last)
        if trace.length is not None:
            last = last[: int(trace.length[0])]
        return [[token for token in state[0].tolist() if token >= 0] for state in self.rollout.states()] + [
            last.tolist()
        ]

    def events(self, kind: EventKind) -> int:
        return 0 if self.rollout.trace.events is None else len(self.rollout.trace.events.of(kind))


@contextmanager
def watched(model: Any) -> Iterator[list[Mapping[str, Any]]]:
    seen: list[Mapping[str, Any]] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        # What is fed may be a view of rows that are written to afterwards.
        seen.append({name: v.clone() if isinstance(v, torch.Tensor) else v for name, v in kwargs.items()})

    hook = model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


def alone(
    model: Any, config: DecodingConfig, prompt: list[int], given: dict[int, int], row_id: int, seed: int, **more: Any
) -> Run:
    """Decodes a row on its own. `given`: its hints, which schedules that change the length do not take."""
    progress: list[Progress] = []
    schedule = parts(config)
    hints = None if schedule.moves else [given]
    with watched(model) as fed:
        rollout = RolloutEngine(model).generate(
            [prompt], config, row_ids=[row_id], seed=seed, hints=hints, on_step=progress.append, **more
        )
    steps = fed
    if schedule.verify is not None:  # masks are fed beside the block, in the same positions
        steps = [call for call in fed if bool((call["position_ids"][0].diff() > 0).all())]
    return Run(config, schedule, prompt, given if hints else {}, rollout, steps, len(fed) - len(steps), progress)


def runs(name: str, i: int, stop_at_eos: Any = False) -> list[Run]:
    """Every prompt decoded alone with its hints; remembered, since many tests look at the same."""
    return _runs(name, i, stop_at_eos)


@functools.cache
def _runs(name: str, i: int, stop_at_eos: Any) -> list[Run]:
    config = decoding(name, i, stop_at_eos=stop_at_eos)
    return [alone(denoiser(), config, *row, seed=5) for row in zip(PROMPTS, HINTS, ROW_IDS, strict=True)]


def written(state: list[int]) -> int:
    return sum(token != MASK for token in state)
