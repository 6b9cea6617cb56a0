"""The flags of the scripts in trainers/, as `--help` shows them: in groups, without those that are refused.

Owns the layout of the help text. The flags themselves are the fields of the dataclasses that a script names.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import fields
from typing import Any

from trl import GRPOConfig, ModelConfig, SFTConfig, TrlParser

from rl4dlm.training.config import DiffusionPolicyConfig, refused_settings

ROLLOUT = (
    "max_completion_length", "num_generations", "num_generations_eval", "temperature", "top_p", "top_k", "schedule",
    "denoising_steps", "block_length", "cfg_scale", "cache", "cache_args", "rollout_compile",
    "stop_at_eos", "min_new_tokens", "eos_penalty",
    "eos_penalty_decay", "suppress_token_ids", "draw_unknown_tokens", "defer_token_ids", "schedule_args",
    "rollout_batch_size",
    "max_prompt_length", "overlong_prompts", "chat_template_kwargs", "mask_truncated_completions",
)  # fmt: skip
LIKELIHOOD = (
    "scope", "score_temperature", "one_view", "views_keyed_by", "p_mask_prompt", "num_views", "num_mc_samples",
    "quadrature", "beta", "kl_estimator", "kl_target", "use_bias_correction_kl", "disable_dropout",
)  # fmt: skip
GROUPS = ("data and rewards", "rollout", "likelihood", "algorithm", "model", "TRL and transformers")


class GroupedParser(TrlParser):
    """TRL's parser of dataclasses; its help has a section for each of `GROUPS`."""

    def format_help(self) -> str:
        """The help text; refused settings are left out, and so are second spellings of switches."""
        groups: dict[str, list[argparse.Action]] = {name: [] for name in GROUPS}
        given = [*self.dataclass_types]
        hidden = {name for kind in given for name in refused_settings(kind)}
        for action in self._actions:
            name = action.dest
            negation = isinstance(action, argparse._StoreFalseAction) and action.option_strings[0].startswith("--no")
            if isinstance(action, argparse._HelpAction) or name in hidden or negation:
                continue
            shown = copy.copy(action)
            shown.option_strings = action.option_strings[:1]  # the other is the same with hyphens
            groups[_group(name, given)].append(shown)
        formatter = self._get_formatter()
        formatter.add_usage("%(prog)s [--config FILE.yaml] [--SETTING VALUE ...]", [], [])
        formatter.add_text("Flags override the YAML file, and the file the defaults.")
        for title, actions in groups.items():
            if actions:
                formatter.start_section(title)
                formatter.add_arguments(actions)
                formatter.end_section()
        return formatter.format_help()


def _group(name: str, given: list[Any]) -> str:
    """The group of a setting: that of the first class, of those given, which has it."""
    owners = [kind for kind in given if any(field.name == name for field in fields(kind))]
    owner = owners[0] if owners else None
    if owner is None:
        return GROUPS[-1]
    if issubclass(owner, GRPOConfig | SFTConfig):
        if issubclass(owner, DiffusionPolicyConfig) and name in ROLLOUT:
            return "rollout"
        if name in LIKELIHOOD:
            return "likelihood"
        base = GRPOConfig if issubclass(owner, GRPOConfig) else SFTConfig
        return GROUPS[-1] if any(field.name == name for field in fields(base)) else "algorithm"
    return "model" if issubclass(owner, ModelConfig) else "data and rewards"
