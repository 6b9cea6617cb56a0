"""What downstream code relies on: public names, the names of their parameters and settings, and those of metrics.

What is recorded here stays. New names may be added; one that goes, or moves to another place in a signature, breaks
somebody's code or dashboard, and needs a word in the changelog.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest

import rl4dlm
from rl4dlm.grading import available_rewards
from rl4dlm.grading.pool import Settings

ROOT = Path(__file__).resolve().parent.parent

SIGNATURES = {
    "AGRPOTrainer": "model reward_funcs args train_dataset eval_dataset processing_class intervention kwargs",
    "CJGRPOTrainer": "model reward_funcs args train_dataset eval_dataset processing_class intervention kwargs",
    "D2Trainer": "model reward_funcs args train_dataset eval_dataset processing_class intervention kwargs",
    "EGSPOTrainer": "model reward_funcs args train_dataset eval_dataset processing_class intervention kwargs",
    "DiPOTrainer": "model reward_funcs args train_dataset eval_dataset processing_class intervention kwargs",
    "TraceRLTrainer": "model reward_funcs args train_dataset eval_dataset processing_class intervention kwargs",
    "TrajectoryTrainer": "model reward_funcs args train_dataset eval_dataset processing_class intervention kwargs",
    "BernoulliUnmaskingTrainer": "args kwargs",
    "CtrlDiffTrainer": "args kwargs",
    "BGPOTrainer": "model reward_funcs args train_dataset eval_dataset processing_class intervention kwargs",
    "CoupledGRPOTrainer": "model reward_funcs args train_dataset eval_dataset processing_class intervention kwargs",
    "DMPOTrainer": "model reward_funcs args train_dataset eval_dataset processing_class intervention kwargs",
    "Credit": "",
    "DACA": "kind",
    "DecodingConfig": (
        "canvas_length schedule steps block_length temperature top_p top_k cfg_scale cache stop_at_eos "
        "min_new_tokens eos_penalty eos_penalty_decay suppress_token_ids defer_token_ids schedule_args "
        "known_tokens cache_args draft_steps draft_width record record_steps num_fillings"
    ),
    "DiffuGRPOTrainer": "model reward_funcs args train_dataset eval_dataset processing_class intervention kwargs",
    "DiffusionGDPOTrainer": ("model reward_funcs args train_dataset eval_dataset processing_class intervention kwargs"),
    "DiffusionPolicyTrainer": (
        "model reward_funcs args train_dataset eval_dataset processing_class intervention credit kwargs"
    ),
    "DiSPO": "states fillings weight epsilon",
    "DiffusionSFTTrainer": "model args train_dataset eval_dataset processing_class kwargs",
    "DiffusionSpec": "mask_token_id eos_token_ids logit_shift attention block_length grid_origin noise",
    "DreamCoderRLTrainer": "args kwargs",
    "EBPOTrainer": "model reward_funcs args train_dataset eval_dataset processing_class intervention kwargs",
    "ESPOTrainer": "model reward_funcs args train_dataset eval_dataset processing_class intervention kwargs",
    "GDSDTrainer": "model reward_funcs args train_dataset eval_dataset processing_class intervention kwargs",
    "IGPOTrainer": "model reward_funcs args train_dataset eval_dataset processing_class intervention kwargs",
    "Inpainting": (
        "trace_column answer_column trace_prefix hide_answer correctness_reward correct_from hint_ratio "
        "chunk_length max_replaced_share free_tail max_stretch max_gap"
    ),
    "Intervention": "",
    "LightningRLTrainer": "args kwargs",
    "LLaDOUTrainer": "model reward_funcs args train_dataset eval_dataset processing_class intervention kwargs",
    "JustGRPOTrainer": "model reward_funcs args train_dataset eval_dataset processing_class intervention kwargs",
    "Rollout": (
        "prompt_ids canvas valid hinted trace nfe stop_reason row_ids schedule cache exact seed mask_token_id "
        "extra_forwards weight_version decoding guesses recorded"
    ),
    "RolloutEngine": "model spec max_batch_rows progress in_step compile",
    "SelfDistillationTrainer": "model reward_funcs args rest kwargs",
    "SPGTrainer": "model reward_funcs args train_dataset eval_dataset processing_class intervention kwargs",
    "State": "canvas commit_step steps hinted raw_log_prob confidence log_prob entropy block_stop exact",
    "MDPOTrainer": "model reward_funcs args train_dataset eval_dataset processing_class intervention kwargs",
    "StableDRLTrainer": "model reward_funcs args train_dataset eval_dataset processing_class intervention kwargs",
    "Trace": "commit_step raw_log_prob log_prob steps refinement events selection_log_prob start_length length "
    "confidence entropy block_stop predictions fillings filling_log_probs flagged commit_rank policy_features "
    "policy_allowed policy_chosen blocks",
    "TreeRPOTrainer": "model reward_funcs args train_dataset eval_dataset processing_class intervention kwargs",
    "UniGRPOTrainer": "model reward_funcs args train_dataset eval_dataset processing_class intervention kwargs",
    "ELBOKTOTrainer": "model ref_model args train_dataset eval_dataset processing_class kwargs",
    "VRPOTrainer": "model ref_model args train_dataset eval_dataset processing_class kwargs",
    "Views": "hidden weight ids targets absent",
    "WD1Trainer": "model reward_funcs args train_dataset eval_dataset processing_class intervention kwargs",
    "adapt_causal_lm": (
        "path tokenizer attention block_length grid_origin logit_shift mask_token dtype device "
        "attn_implementation revision kwargs"
    ),
    "attach_scoring": "model",
    "available_schedules": "",
    "branch_row_ids": "parents steps branches",
    "check_adapter": "model peft_config",
    "completion_texts": "tokenizer rollout spec",
    "convert": "source target form revision mask_token_id block_length",
    "encode_prompt": "tokenizer prompt chat_template_kwargs options",
    "evaluate": (
        "model tokenizer task decodings split limit num_samples seed batch_rows chosen_by progress pass_at baseline "
        "rewards"
    ),
    "load_denoiser": (
        "path dtype device attn_implementation quantization_config revision mask_token_id block_length kwargs"
    ),
    "load_reward": "name",
    "load_rewards": "names",
    "load_task": "name options",
    "load_tokenizer": "path revision mask_token_id",
    "log_likelihood": (
        "model prompts continuations tokenizer estimator num_views block_length seed batch_rows chat_template_kwargs"
    ),
    "save_denoiser": "model path tokenizer form",
    "tiny_a2d_llama": "sizes",
    "tiny_a2d_qwen2": "sizes",
    "tiny_a2d_qwen3": "sizes",
    "tiny_diffusion_gemma": "sizes",
    "tiny_dream": "sizes",
    "tiny_fast_dllm": "sizes",
    "tiny_illada": "sizes",
    "tiny_llada": (
        "vocab_size mask_token_id eos_token_id pad_token_id hidden_size num_hidden_layers num_attention_heads "
        "intermediate_size max_position_embeddings rope_theta initializer_range dtype seed"
    ),
    "tiny_llada2": "sizes",
    "tiny_llada_moe": "sizes",
    "tiny_nemotron_diffusion": "sizes",
    "tiny_sdar": "sizes",
    "tiny_sdar_moe": "sizes",
    "tiny_tokenizer": "",
    "tiny_wedlm": "sizes",
}
"""Parameters of functions and classes, in their order."""

_TRAJECTORY = (
    "steps num_scored_steps merge step_proposal step_scale ratio_unit ratio_norm clip aggregation old_policy kl_unit "
    "value_model value_learning_rate value_clip value_loss_weight value_trains_trunk value_target value_rewards "
    "gae_lambda gae_gamma"
)
_FROZEN = "policy_path policy_temperature speed speed_alpha step_average policy_entropy"
SETTINGS = {
    "BGPOConfig": "num_views stratify complement",
    **dict.fromkeys(
        ["AGRPOConfig", "CJGRPOConfig", "D2Config", "DiPOConfig", "TraceRLConfig", "TrajectoryConfig"], _TRAJECTORY
    ),
    "BernoulliUnmaskingConfig": f"{_FROZEN} policy_hidden_size policy_heads",
    "CtrlDiffConfig": f"{_FROZEN} policy_hidden_size block_sizes",
    "CoupledGRPOConfig": "pairs level_range baseline",
    "DMPOConfig": (
        "alpha kappa weight_baseline weight_baseline_strength num_views level_range objective ddo_scale "
        "ddo_negative_weight ddo_split form"
    ),
    "DiffuGRPOConfig": "p_mask_prompt num_strata",
    "DiffusionGDPOConfig": "nodes masks_per_node masks weight ratio_norm",
    "DiffusionPolicyConfig": (
        "schedule denoising_steps block_length cfg_scale cache cache_args rollout_compile stop_at_eos min_new_tokens "
        "eos_penalty eos_penalty_decay suppress_token_ids defer_token_ids schedule_args rollout_batch_size scope "
        "kl_estimator kl_target negative_advantage_weight score_temperature one_view views_keyed_by max_prompt_length "
        "overlong_prompts log_replays clip self_normalize audit_share audit_bound audit_action rollout_correction "
        "rollout_correction_clip_max rollout_backend rollout_url rollout_weights_dir rollout_timeout"
    ),
    "DiffusionSFTConfig": (
        "loss_weight cart_p complementary_masks noise_levels mask_ratio_tilt block_length_schedule "
        "ar_loss_weight noise_floor eos_padding random_truncation turns causal_weight causal_layers causal_ratio "
        "causal_decay_steps causal_value_grad"
    ),
    "DreamCoderRLConfig": "cart_p substitute_groups",
    "EGSPOConfig": f"{_TRAJECTORY} step_lambda step_baseline",
    "EBPOConfig": "num_views complement stratify ratio_norm",
    "ESPOConfig": "num_views complement form baseline",
    "GDSDConfig": "psi target weights form unit residual residual_limit num_views baseline",
    "IGPOConfig": (
        "trace_column answer_column trace_prefix hide_answer correctness_reward correct_from hint_ratio "
        "chunk_length max_replaced_share free_tail max_stretch max_gap hint_entropy_share"
    ),
    "JustGRPOConfig": "tokens_per_view within",
    "LightningRLConfig": (
        "accuracy_reward accuracy_from speed_reward speed_gate speed_norm accuracy_norm advantage_norm "
        "keep_wrong_groups min_speed_range cap_margin nll_weight kl_average nll_average"
    ),
    "LLaDOUConfig": (
        f"{_TRAJECTORY} policy_path policy_kind policy_layers policy_heads policy_frequencies policy_learning_rate "
        "train_denoiser"
    ),
    "SelfDistillationConfig": (
        "states share_range block_states positions num_positions complement num_views teacher teacher_view "
        "teacher_share teacher_steps teacher_written teacher_order teacher_temperature divergence distill_top_k "
        "renormalize distill_temperature divergence_limit limit_entries divergence_weight hard_weight entropy_weight "
        "entropy_temperature ddo_scale ddo_negative_weight rewarded_from rollouts_by student_attention share_range_end "
        "shares shares_exponent every_block state_block_length state_block_length_end teacher_context_column "
        "teacher_prompt_template teacher_step teacher_step_doubles"
    ),
    "SPGConfig": "num_views masking negatives eubo_beta mix_weight p_mask_prompt block_choice scored",
    "MDPOConfig": "num_trained_steps confidence_weights",
    "StableDRLConfig": "num_views masking negatives eubo_beta mix_weight p_mask_prompt block_choice scored ratio_norm",
    "TreeRPOConfig": "branches cuts distillation distillation_steps",
    "UniGRPOConfig": "levels level_range",
    "ELBOKTOConfig": "num_views complement one_view reward_baseline length_normalize",
    "VRPOConfig": "num_views complement steps block_length tokens_per_step step_weight one_view",
    "WD1Config": "psi negative_weight weights_over p_mask_prompt num_predicted_steps",
}
"""Settings of configs, beside TRL's; those of `DiffusionPolicyConfig` belong to all but `DiffusionSFTConfig`, too."""

TASKS = {
    "acecode": "style size path validation_size evaluation_sets overlap hub_id subset",
    "arithmetic_steps": "size seed min_operations max_operations max_number max_value symbols",
    "code_mini": "size seed kinds min_level max_level tests",
    "countdown": "style size seed path numbers max_number max_target",
    "countdown_small": "size seed max_number max_target max_tries symbols",
    "few_clue_sudoku": "size seed min_clues max_clues",
    "gsm8k": "style size path hub_id hub_config validation_size",
    "humaneval": "style size path hub_id",
    "humaneval_plus": "style size path hub_id",
    "kodcode": "style size path validation_size evaluation_sets overlap hub_id",
    "livecodebench": "release since until difficulty private_tests size path hub_id",
    "mbpp": "style size path hub_id hub_config",
    "mbpp_plus": "style size path hub_id hub_config",
}
"""Options of tasks."""

REWARDS = {
    "code",
    "code:all_passed",
    "code:answer_tags",
    "code:code_compat",
    "code:format",
    "code:format_compat",
    "code:kodcode_compat",
    "reasoning_gym",
    "reasoning_gym:solved",
}
"""Names of rewards; those of other files are guarded by the tests that use them."""

REWARD_SETTINGS = (
    "workers deadline budget memory_gib startup_seconds sandbox_level sandbox_workers sandbox_backend sandbox_url"
)
"""Of rewards that run something outside the trainer's process."""

METRICS = {
    "diffusion/audit_agreement",
    "diffusion/audit_delta",
    "diffusion/audit_effective_share",
    "diffusion/audit_max_delta",
    "diffusion/audit_ratio",
    "diffusion/early_eos_share",
    "diffusion/explained_variance",
    "diffusion/causal_loss",
    "diffusion/causal_ratio",
    "diffusion/causal_weight",
    "diffusion/effective_sample_share",
    "diffusion/filling_advantage_share",
    "diffusion/filling_reward",
    "diffusion/identical_completion_groups",
    "diffusion/masked_nll",
    "diffusion/next_token_nll",
    "diffusion/nfe",
    "diffusion/place_log_prob",
    "diffusion/rollout_gap",
    "diffusion/rollout_tokens_per_second",
    "diffusion/rows_scored_share",
    "diffusion/scored_steps",
    "diffusion/scored_token_share",
    "diffusion/tokens_per_forward",
    "diffusion/value_loss",
}


def test_public_names_stay() -> None:
    assert {"__version__", *SIGNATURES, *SETTINGS} <= set(rl4dlm.__all__)
    new = set(rl4dlm.__all__) - {"__version__", *SIGNATURES, *SETTINGS}
    assert not new, f"record the parameters of {sorted(new)} in tests/test_public.py"


@pytest.mark.parametrize("name", sorted(SIGNATURES))
def test_parameters_stay(name: str) -> None:
    recorded = SIGNATURES[name].split()
    found = list(inspect.signature(getattr(rl4dlm, name)).parameters)
    assert [parameter for parameter in found if parameter in recorded] == recorded


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_settings_stay(name: str) -> None:
    of_others = "DiffusionSFTConfig", "ELBOKTOConfig", "VRPOConfig"
    shared = [] if name in of_others else SETTINGS["DiffusionPolicyConfig"].split()
    missing = {*shared, *SETTINGS[name].split()} - {field.name for field in fields(getattr(rl4dlm, name)) if field.init}
    assert not missing


@pytest.mark.parametrize("name", sorted(TASKS))
def test_options_of_tasks_stay(name: str) -> None:
    assert not set(TASKS[name].split()) - {field.name for field in fields(rl4dlm.load_task(name)) if field.init}


def test_names_of_rewards_stay() -> None:
    assert set(available_rewards()) >= REWARDS


def test_settings_of_rewards_stay() -> None:
    assert set(REWARD_SETTINGS.split()) <= set(Settings._fields)


def test_metrics_stay_and_are_explained() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "rl4dlm").rglob("*.py"))
    found = set(re.findall(r"[\"'](diffusion/[a-z_]+)[\"']", sources))
    assert found >= METRICS
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    unexplained = {name for name in found if f"| `{name}` |" not in page}
    assert not unexplained, f"docs/troubleshooting.md has no row for {sorted(unexplained)}"
