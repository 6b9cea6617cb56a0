"""The public names of rl4dlm, loaded on first use.

This file owns the list of what `from rl4dlm import ...` offers and nothing else. A name's module is imported when the
name is first asked for, so that `import rl4dlm` is quick and imports neither torch nor trl.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rl4dlm.algorithms.agrpo import AGRPOConfig as AGRPOConfig, AGRPOTrainer as AGRPOTrainer
    from rl4dlm.algorithms.bernoulli_unmasking import (
        BernoulliUnmaskingConfig as BernoulliUnmaskingConfig,
        BernoulliUnmaskingTrainer as BernoulliUnmaskingTrainer,
    )
    from rl4dlm.algorithms.bgpo import BGPOConfig as BGPOConfig, BGPOTrainer as BGPOTrainer
    from rl4dlm.algorithms.cj_grpo import CJGRPOConfig as CJGRPOConfig, CJGRPOTrainer as CJGRPOTrainer
    from rl4dlm.algorithms.coupled_grpo import (
        CoupledGRPOConfig as CoupledGRPOConfig,
        CoupledGRPOTrainer as CoupledGRPOTrainer,
    )
    from rl4dlm.algorithms.ctrldiff import CtrlDiffConfig as CtrlDiffConfig, CtrlDiffTrainer as CtrlDiffTrainer
    from rl4dlm.algorithms.d2 import D2Config as D2Config, D2Trainer as D2Trainer
    from rl4dlm.algorithms.diffu_grpo import DiffuGRPOConfig as DiffuGRPOConfig, DiffuGRPOTrainer as DiffuGRPOTrainer
    from rl4dlm.algorithms.diffusion_gdpo import (
        DiffusionGDPOConfig as DiffusionGDPOConfig,
        DiffusionGDPOTrainer as DiffusionGDPOTrainer,
    )
    from rl4dlm.algorithms.dipo import DiPOConfig as DiPOConfig, DiPOTrainer as DiPOTrainer
    from rl4dlm.algorithms.dmpo import DMPOConfig as DMPOConfig, DMPOTrainer as DMPOTrainer
    from rl4dlm.algorithms.dream_coder_rl import (
        DreamCoderRLConfig as DreamCoderRLConfig,
        DreamCoderRLTrainer as DreamCoderRLTrainer,
    )
    from rl4dlm.algorithms.ebpo import EBPOConfig as EBPOConfig, EBPOTrainer as EBPOTrainer
    from rl4dlm.algorithms.egspo import EGSPOConfig as EGSPOConfig, EGSPOTrainer as EGSPOTrainer
    from rl4dlm.algorithms.elbo_kto import ELBOKTOConfig as ELBOKTOConfig, ELBOKTOTrainer as ELBOKTOTrainer
    from rl4dlm.algorithms.espo import ESPOConfig as ESPOConfig, ESPOTrainer as ESPOTrainer
    from rl4dlm.algorithms.gdsd import GDSDConfig as GDSDConfig, GDSDTrainer as GDSDTrainer
    from rl4dlm.algorithms.igpo import IGPOConfig as IGPOConfig, IGPOTrainer as IGPOTrainer
    from rl4dlm.algorithms.justgrpo import JustGRPOConfig as JustGRPOConfig, JustGRPOTrainer as JustGRPOTrainer
    from rl4dlm.algorithms.lightningrl import (
        LightningRLConfig as LightningRLConfig,
        LightningRLTrainer as LightningRLTrainer,
    )
    from rl4dlm.algorithms.lladou import LLaDOUConfig as LLaDOUConfig, LLaDOUTrainer as LLaDOUTrainer
    from rl4dlm.algorithms.mdpo import MDPOConfig as MDPOConfig, MDPOTrainer as MDPOTrainer
    from rl4dlm.algorithms.self_distillation import (
        SelfDistillationConfig as SelfDistillationConfig,
        SelfDistillationTrainer as SelfDistillationTrainer,
    )
    from rl4dlm.algorithms.spg import SPGConfig as SPGConfig, SPGTrainer as SPGTrainer
    from rl4dlm.algorithms.stabledrl import StableDRLConfig as StableDRLConfig, StableDRLTrainer as StableDRLTrainer
    from rl4dlm.algorithms.tracerl import TraceRLConfig as TraceRLConfig, TraceRLTrainer as TraceRLTrainer
    from rl4dlm.algorithms.tree_rpo import TreeRPOConfig as TreeRPOConfig, TreeRPOTrainer as TreeRPOTrainer
    from rl4dlm.algorithms.unigrpo import UniGRPOConfig as UniGRPOConfig, UniGRPOTrainer as UniGRPOTrainer
    from rl4dlm.algorithms.vrpo import VRPOConfig as VRPOConfig, VRPOTrainer as VRPOTrainer
    from rl4dlm.algorithms.wd1 import WD1Config as WD1Config, WD1Trainer as WD1Trainer
    from rl4dlm.evaluation import (
        completion_texts as completion_texts,
        encode_prompt as encode_prompt,
        evaluate as evaluate,
        log_likelihood as log_likelihood,
    )
    from rl4dlm.grading import load_reward as load_reward, load_rewards as load_rewards
    from rl4dlm.likelihood.views import Views as Views
    from rl4dlm.models.adapters import check_adapter as check_adapter
    from rl4dlm.models.convert import convert as convert
    from rl4dlm.models.loading import (
        load_denoiser as load_denoiser,
        load_tokenizer as load_tokenizer,
        save_denoiser as save_denoiser,
    )
    from rl4dlm.models.scoring import attach_scoring as attach_scoring
    from rl4dlm.models.spec import DiffusionSpec as DiffusionSpec
    from rl4dlm.models.tiny import (
        tiny_a2d_llama as tiny_a2d_llama,
        tiny_a2d_qwen2 as tiny_a2d_qwen2,
        tiny_a2d_qwen3 as tiny_a2d_qwen3,
        tiny_diffusion_gemma as tiny_diffusion_gemma,
        tiny_dream as tiny_dream,
        tiny_fast_dllm as tiny_fast_dllm,
        tiny_illada as tiny_illada,
        tiny_llada as tiny_llada,
        tiny_llada2 as tiny_llada2,
        tiny_llada_moe as tiny_llada_moe,
        tiny_nemotron_diffusion as tiny_nemotron_diffusion,
        tiny_sdar as tiny_sdar,
        tiny_sdar_moe as tiny_sdar_moe,
        tiny_tokenizer as tiny_tokenizer,
        tiny_wedlm as tiny_wedlm,
    )
    from rl4dlm.rollout.decoding import DecodingConfig as DecodingConfig, available_schedules as available_schedules
    from rl4dlm.rollout.engine import RolloutEngine as RolloutEngine
    from rl4dlm.rollout.rollout import Rollout as Rollout, Trace as Trace
    from rl4dlm.rollout.state import State as State, branch_row_ids as branch_row_ids
    from rl4dlm.sft.adapt import adapt_causal_lm as adapt_causal_lm
    from rl4dlm.sft.trainer import (
        DiffusionSFTConfig as DiffusionSFTConfig,
        DiffusionSFTTrainer as DiffusionSFTTrainer,
    )
    from rl4dlm.tasks import load_task as load_task
    from rl4dlm.training.credit.credit import Credit as Credit
    from rl4dlm.training.credit.daca import DACA as DACA
    from rl4dlm.training.credit.dispo import DiSPO as DiSPO
    from rl4dlm.training.interventions.inpainting import Inpainting as Inpainting
    from rl4dlm.training.interventions.intervention import Intervention as Intervention
    from rl4dlm.training.trainer import (
        DiffusionPolicyConfig as DiffusionPolicyConfig,
        DiffusionPolicyTrainer as DiffusionPolicyTrainer,
    )
    from rl4dlm.training.trajectory import TrajectoryTrainer as TrajectoryTrainer
    from rl4dlm.training.trajectory_settings import TrajectoryConfig as TrajectoryConfig

__version__ = "0.1.0.dev0"

# The imports above are for type checkers and editors, this table is what runs; tests/test_import.py holds them equal.
_MODULE_OF = {
    "AGRPOConfig": "rl4dlm.algorithms.agrpo",
    "AGRPOTrainer": "rl4dlm.algorithms.agrpo",
    "CJGRPOConfig": "rl4dlm.algorithms.cj_grpo",
    "CJGRPOTrainer": "rl4dlm.algorithms.cj_grpo",
    "EGSPOConfig": "rl4dlm.algorithms.egspo",
    "EGSPOTrainer": "rl4dlm.algorithms.egspo",
    "D2Config": "rl4dlm.algorithms.d2",
    "D2Trainer": "rl4dlm.algorithms.d2",
    "DiPOConfig": "rl4dlm.algorithms.dipo",
    "DiPOTrainer": "rl4dlm.algorithms.dipo",
    "LLaDOUConfig": "rl4dlm.algorithms.lladou",
    "LLaDOUTrainer": "rl4dlm.algorithms.lladou",
    "TraceRLConfig": "rl4dlm.algorithms.tracerl",
    "TraceRLTrainer": "rl4dlm.algorithms.tracerl",
    "TrajectoryConfig": "rl4dlm.training.trajectory_settings",
    "TrajectoryTrainer": "rl4dlm.training.trajectory",
    "BernoulliUnmaskingConfig": "rl4dlm.algorithms.bernoulli_unmasking",
    "BernoulliUnmaskingTrainer": "rl4dlm.algorithms.bernoulli_unmasking",
    "BGPOConfig": "rl4dlm.algorithms.bgpo",
    "BGPOTrainer": "rl4dlm.algorithms.bgpo",
    "CoupledGRPOConfig": "rl4dlm.algorithms.coupled_grpo",
    "CoupledGRPOTrainer": "rl4dlm.algorithms.coupled_grpo",
    "CtrlDiffConfig": "rl4dlm.algorithms.ctrldiff",
    "CtrlDiffTrainer": "rl4dlm.algorithms.ctrldiff",
    "DMPOConfig": "rl4dlm.algorithms.dmpo",
    "DMPOTrainer": "rl4dlm.algorithms.dmpo",
    "DecodingConfig": "rl4dlm.rollout.decoding",
    "DiffuGRPOConfig": "rl4dlm.algorithms.diffu_grpo",
    "DiffuGRPOTrainer": "rl4dlm.algorithms.diffu_grpo",
    "DiffusionGDPOConfig": "rl4dlm.algorithms.diffusion_gdpo",
    "DiffusionGDPOTrainer": "rl4dlm.algorithms.diffusion_gdpo",
    "DiffusionPolicyConfig": "rl4dlm.training.trainer",
    "DiffusionPolicyTrainer": "rl4dlm.training.trainer",
    "DiffusionSFTConfig": "rl4dlm.sft.trainer",
    "DiffusionSFTTrainer": "rl4dlm.sft.trainer",
    "DiffusionSpec": "rl4dlm.models.spec",
    "EBPOConfig": "rl4dlm.algorithms.ebpo",
    "EBPOTrainer": "rl4dlm.algorithms.ebpo",
    "ELBOKTOConfig": "rl4dlm.algorithms.elbo_kto",
    "ELBOKTOTrainer": "rl4dlm.algorithms.elbo_kto",
    "ESPOConfig": "rl4dlm.algorithms.espo",
    "ESPOTrainer": "rl4dlm.algorithms.espo",
    "JustGRPOConfig": "rl4dlm.algorithms.justgrpo",
    "JustGRPOTrainer": "rl4dlm.algorithms.justgrpo",
    "LightningRLConfig": "rl4dlm.algorithms.lightningrl",
    "LightningRLTrainer": "rl4dlm.algorithms.lightningrl",
    "DreamCoderRLConfig": "rl4dlm.algorithms.dream_coder_rl",
    "DreamCoderRLTrainer": "rl4dlm.algorithms.dream_coder_rl",
    "GDSDConfig": "rl4dlm.algorithms.gdsd",
    "GDSDTrainer": "rl4dlm.algorithms.gdsd",
    "IGPOConfig": "rl4dlm.algorithms.igpo",
    "IGPOTrainer": "rl4dlm.algorithms.igpo",
    "Credit": "rl4dlm.training.credit.credit",
    "DACA": "rl4dlm.training.credit.daca",
    "DiSPO": "rl4dlm.training.credit.dispo",
    "Inpainting": "rl4dlm.training.interventions.inpainting",
    "Intervention": "rl4dlm.training.interventions.intervention",
    "Rollout": "rl4dlm.rollout.rollout",
    "RolloutEngine": "rl4dlm.rollout.engine",
    "MDPOConfig": "rl4dlm.algorithms.mdpo",
    "MDPOTrainer": "rl4dlm.algorithms.mdpo",
    "SelfDistillationConfig": "rl4dlm.algorithms.self_distillation",
    "SelfDistillationTrainer": "rl4dlm.algorithms.self_distillation",
    "SPGConfig": "rl4dlm.algorithms.spg",
    "SPGTrainer": "rl4dlm.algorithms.spg",
    "State": "rl4dlm.rollout.state",
    "StableDRLConfig": "rl4dlm.algorithms.stabledrl",
    "StableDRLTrainer": "rl4dlm.algorithms.stabledrl",
    "Trace": "rl4dlm.rollout.rollout",
    "TreeRPOConfig": "rl4dlm.algorithms.tree_rpo",
    "TreeRPOTrainer": "rl4dlm.algorithms.tree_rpo",
    "UniGRPOConfig": "rl4dlm.algorithms.unigrpo",
    "UniGRPOTrainer": "rl4dlm.algorithms.unigrpo",
    "Views": "rl4dlm.likelihood.views",
    "VRPOConfig": "rl4dlm.algorithms.vrpo",
    "VRPOTrainer": "rl4dlm.algorithms.vrpo",
    "WD1Config": "rl4dlm.algorithms.wd1",
    "WD1Trainer": "rl4dlm.algorithms.wd1",
    "attach_scoring": "rl4dlm.models.scoring",
    "available_schedules": "rl4dlm.rollout.decoding",
    "branch_row_ids": "rl4dlm.rollout.state",
    "adapt_causal_lm": "rl4dlm.sft.adapt",
    "check_adapter": "rl4dlm.models.adapters",
    "completion_texts": "rl4dlm.evaluation",
    "convert": "rl4dlm.models.convert",
    "encode_prompt": "rl4dlm.evaluation",
    "evaluate": "rl4dlm.evaluation",
    "load_denoiser": "rl4dlm.models.loading",
    "load_reward": "rl4dlm.grading",
    "load_rewards": "rl4dlm.grading",
    "load_task": "rl4dlm.tasks",
    "load_tokenizer": "rl4dlm.models.loading",
    "log_likelihood": "rl4dlm.evaluation",
    "save_denoiser": "rl4dlm.models.loading",
    "tiny_a2d_llama": "rl4dlm.models.tiny",
    "tiny_a2d_qwen2": "rl4dlm.models.tiny",
    "tiny_a2d_qwen3": "rl4dlm.models.tiny",
    "tiny_diffusion_gemma": "rl4dlm.models.tiny",
    "tiny_dream": "rl4dlm.models.tiny",
    "tiny_fast_dllm": "rl4dlm.models.tiny",
    "tiny_illada": "rl4dlm.models.tiny",
    "tiny_llada": "rl4dlm.models.tiny",
    "tiny_llada2": "rl4dlm.models.tiny",
    "tiny_llada_moe": "rl4dlm.models.tiny",
    "tiny_nemotron_diffusion": "rl4dlm.models.tiny",
    "tiny_sdar": "rl4dlm.models.tiny",
    "tiny_sdar_moe": "rl4dlm.models.tiny",
    "tiny_tokenizer": "rl4dlm.models.tiny",
    "tiny_wedlm": "rl4dlm.models.tiny",
}

__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'rl4dlm' has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
