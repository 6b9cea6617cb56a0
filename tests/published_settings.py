"""What the authors of the papers ran: their settings, and the files of their repositories that state them.

Owns facts read in those files, under the names that the settings have here (`THEIR_NAMES` has the others), and nothing
of what the configurations of this repository say. Where these deviate on purpose, `DELIBERATE` says why.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

REPOSITORIES = {
    "coupled_grpo": "apple/ml-diffucoder",
    "diffu_grpo": "dllm-reasoning/d1",
    "dmpo": "yuchen-zhu-zyc/DMPO",
    "dream_coder_rl": "DreamLM/Dream-Coder",
    "cj_grpo": "yjyddq/EOSER-ASS-RL",
    "egspo": "vishnutez/egspo-dllm-rl",
    "espo": "ML-GSAI/ESPO",
    "gdsd": "GaryBall/GDSD",
    "igpo": "facebookresearch/igpo",
    "justgrpo": "LeapLabTHU/JustGRPO",
    "lightningrl": "SJTU-DENG-Lab/LightningRL",
    "mdpo": "autonomousvision/mdpo",
    "self_distillation": "Tyrion58/T3D",
    "spg": "facebookresearch/SPG",
    "stabledrl": "JianyuanZhong/StableDRL",
    "tracerl": "Gen-Verse/dLLM-RL",
    "tree_rpo": "THU-BPM/d-TreeRPO",
    "wd1": "xiaohangt/wd1",
}

THEIR_NAMES = {
    "denoising_steps": "diffusion_steps",
    "warmup_steps": "warmup_ratio (d1, SPG, wd1, ESPO, DMPO: a share of all steps)",
    "num_views": "num_t (SPG), 2 * num_mc (ESPO, GDSD), num_replicates (DMPO), num_mc_samples (StableDRL)",
    "masking": "forward_type",
    "epsilon_high": "ais_clip_iw - 1 (StableDRL)",
    "self_normalize": "use_snis (StableDRL)",
    "negatives": "logp_estimation",
    "task_args.style": "the prompt",
    "hint_ratio": "inpaint_chunk_ratio_low, inpaint_chunk_high_initial_ratio",
    "chunk_length": "min_chunk_size, max_chunk_size",
    "max_replaced_share": "max_replacements / num_generations",
    "speed_norm": "tpf_norm_mode",
    "min_speed_range": "filter_tpf_threshold",
    "nll_weight": "nll_loss_weight",
    "hint_entropy_share": "entropy_clipping_ratio_inpaint",
    "branches": "num_tree_samples, tree_branch_factor (d-TreeRPO)",
    "distillation": "self_distillation_lambda_max (d-TreeRPO)",
    "num_trained_steps": "sample_train_steps (MDPO)",
    "cart_p": "context_adaptive_reweight_p",
    "shares": "mask_ratios (T3D)",
    "shares_exponent": "mask_ratio_exponent (T3D)",
    "ddo_scale": "beta (T3D)",
    "ddo_negative_weight": "alpha (T3D)",
    "hard_weight": "lambda_path (T3D)",
    "substitute_groups": "dynamic_filtering",
}


@dataclass(frozen=True)
class Flag:
    """A setting of the authors and where they state it."""

    value: Any
    file: str


def _in(file: str, **settings: Any) -> dict[str, Flag]:
    return {name.replace("__", "."): Flag(value, file) for name, value in settings.items()}


_LORA = {"use_peft": True, "lora_r": 128, "lora_alpha": 64, "lora_dropout": 0.05}
_ADAM = {"adam_beta1": 0.9, "adam_beta2": 0.99, "max_grad_norm": 0.2}

# What d1, SPG and wd1 have in the same file, each in a copy of its own.
_D1 = {
    **_LORA,
    **_ADAM,
    "dtype": "bfloat16",
    "load_in_4bit": True,
    "seed": 42,
    "weight_decay": 0.1,
    "warmup_steps": 1e-4,
    "learning_rate": 3e-6,
    "lr_scheduler_type": "constant_with_warmup",
    "num_generations": 6,
    "per_device_train_batch_size": 6,
    "max_completion_length": 256,
    "max_prompt_length": 200,
    "block_length": 32,
    "denoising_steps": 128,
    "p_mask_prompt": 0.15,
    "disable_dropout": False,
}
_D1_FILE = "diffu-grpo/slurm_scripts/train.yaml"


def _d1(task: str, iterations: int) -> dict[str, Flag]:
    return {
        **_in(_D1_FILE, **_D1, epsilon=0.5, beta=0.04, gradient_accumulation_steps=2),
        **_in("diffu-grpo/diffu_grpo_trainer.py", loss_type="bnpo", scale_rewards="none"),
        **_in("diffu-grpo/diffu_grpo_config.py", temperature=0.9),
        **_in(f"diffu-grpo/slurm_scripts ({task})", num_iterations=iterations),
    }


def _cj(iterations: int) -> dict[str, Flag]:
    mine = {name: value for name, value in _D1.items() if name not in ("p_mask_prompt", "block_length")}
    return _in(
        "cj-grpo/slurm_scripts/train.yaml",
        **mine,
        block_length=128,
        temperature=1.0,
        epsilon=0.5,
        beta=0.04,
        gradient_accumulation_steps=2,
        num_iterations=iterations,
    )


_EGSPO = {
    "learning_rate": 3e-5,
    "lr_scheduler_type": "constant",
    "num_generations": 8,
    "temperature": 0.9,
    "num_scored_steps": 8,
    "step_lambda": 0.5,
    "epsilon": 0.2,
    "epsilon_high": 0.5,
    "beta": 0.04,
    "gradient_accumulation_steps": 2,
}
_TRACERL = {
    "epsilon": 0.2,
    "beta": 0.01,
    "learning_rate": 1e-6,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
}


def _wd1(task: str, iterations: int) -> dict[str, Flag]:
    return {
        **_in("wd1/train.yaml", **_D1, gradient_accumulation_steps=2, num_train_epochs=10),
        **_in("wd1/trainers/diffu_grpo_config.py", temperature=0.9),
        **_in(f"run/wll_NP_{task}.sh", num_iterations=iterations),
    }


def _spg(script: str, eubo_beta: float, **settings: Any) -> dict[str, Flag]:
    file = f"spg/slurm_scripts/spg_mix/{script}.sbatch"
    return {
        **_in("spg/slurm_scripts/train.yaml", **_D1),
        **_in("spg/diffu_grpo_config.py", temperature=0.9),
        **_in("spg/spg_trainer.py", block_choice="published"),
        **_in(
            file,
            num_iterations=4,
            masking="block_random",
            num_views=2,
            per_device_train_batch_size=6,
            gradient_accumulation_steps=2,
            beta=0.0,
            negatives="mix",
            mix_weight=0.5,
            eubo_beta=eubo_beta,
        ),
        **_in(file, **settings),
    }


def _stabledrl(script: str, learning_rate: float) -> dict[str, Flag]:
    return {
        **_in(
            f"configs/{script}_spg_snis.yaml",
            **_ADAM,
            dtype="bfloat16",
            seed=113,
            weight_decay=0.1,
            learning_rate=learning_rate,
            lr_scheduler_type="linear",
            max_steps=2000,
            num_generations=16,  # 8, taken twice
            per_device_train_batch_size=16,
            gradient_accumulation_steps=4,
            num_iterations=2,
            max_completion_length=256,
            denoising_steps=128,
            block_length=32,
            temperature=0.9,
            num_views=2,
            p_mask_prompt=0.15,
            eubo_beta=1.5,
            mix_weight=0.5,
            self_normalize="group",
            epsilon_high=4.0,
        ),
        **_in("training/training_loop_spg_snis.py", negatives="mix"),
        **_in("networks/llada_svpo.py", masking="block_random", epsilon=1.0, ratio_norm="length", scale_rewards="none"),
    }


_ESPO_FILE = "recipes/train.yaml"


def _espo(script: str, **settings: Any) -> dict[str, Flag]:
    return {
        **_in(
            _ESPO_FILE,
            **_ADAM,
            dtype="bfloat16",
            seed=42,
            epsilon=0.2,
            scale_rewards="none",
            max_completion_length=256,
            temperature=1.0,
            complement=True,
            num_train_epochs=1,
        ),
        **_in("espo/data_utils.py", task_args__style="espo"),
        **_in(
            f"recipes/{script}",
            num_iterations=8,
            num_views=4,
            warmup_steps=1e-3,
            max_prompt_length=400,
            lr_scheduler_type="constant_with_warmup",
            **settings,
        ),
    }


def _gdsd(script: str, **settings: Any) -> dict[str, Flag]:
    return {
        **_in(
            "scripts/train_gdsd.yaml",
            **_LORA,
            **_ADAM,
            dtype="bfloat16",
            seed=42,
            epsilon=4e-4,
            scale_rewards="none",
            temperature=1.0,
            warmup_steps=1e-3,
            num_train_epochs=1,
            disable_dropout=False,
        ),
        **_in("gdsd/trainers/gdsd_trainer_tlc.py", weights="elbo", residual="clamped", baseline="leave_one_out"),
        **_in(
            f"scripts/{script}",
            num_iterations=8,
            num_views=4,
            num_generations=16,  # 2 for each of 8 GPUs
            max_completion_length=256,
            max_prompt_length=400,
            weight_decay=0.01,
            lr_scheduler_type="constant_with_warmup",
            denoising_steps=256,
            psi=10.0,
            **settings,
        ),
    }


_ESPO_LORA = {**_LORA, "learning_rate": 3e-6, "weight_decay": 0.01, "disable_dropout": False}

_IGPO = {
    **_in("train.yaml", **_LORA, weight_decay=0.1, warmup_steps=50, max_prompt_length=600, disable_dropout=False),
    **_in("train.yaml", **_ADAM),
    # The file names no scheduler, so it is that of transformers' TrainingArguments.
    **_in("train.yaml", lr_scheduler_type="linear"),
    **_in("utils/data_utils.py", task_args__style="igpo"),
    **_in(
        "run_igpo.sh",
        learning_rate=5e-7,
        num_iterations=4,
        temperature=1.2,
        num_train_epochs=10,
        max_completion_length=256,
        denoising_steps=128,
        block_length=32,
        gradient_accumulation_steps=8,
        num_generations=8,
        per_device_train_batch_size=8,
        beta=0.01,
        epsilon=0.2,
        seed=3,
        importance_sampling_level="sequence",
        hint_ratio=[0.2, 0.6],
        chunk_length=[5, 10],
        max_replaced_share=0.5,
        hint_entropy_share=0.2,
    ),
}

_DMPO = {
    **_in("DMPO/dmpo_train_config.yaml", **_LORA, **_ADAM, load_in_4bit=True, seed=42, weight_decay=0.1),
    **_in(
        "DMPO/dmpo_train_config.yaml",
        warmup_steps=1e-4,
        learning_rate=1e-6,
        lr_scheduler_type="constant_with_warmup",
        num_train_epochs=10,
        gradient_accumulation_steps=2,
        block_length=32,
        num_views=4,
        disable_dropout=False,
    ),
    **_in("DMPO/run_dmpo.sh", alpha=0.04, num_generations=16, num_iterations=8),
}

_JUSTGRPO = _in(
    "train.py",
    max_steps=125,
    learning_rate=5e-6,
    weight_decay=0.0,
    max_grad_norm=1.0,
    seed=1234,
    num_generations=16,  # 8, taken twice
    max_completion_length=256,
    adam_beta1=0.9,
    adam_beta2=0.999,
    lr_scheduler_type="constant",
    use_peft=False,
)

_TRACERL_SDAR = _in(
    "configs/rl_sdar.yaml",
    **_TRACERL,
    max_completion_length=2000,
    num_generations=16,
    temperature=1.0,
    merge=1,
    schedule="threshold",
)

PUBLISHED: dict[str, dict[str, Flag]] = {
    "diffu_grpo/gsm8k_llada-8b": _d1("gsm8k", 12),
    "diffu_grpo/math_llada-8b": _d1("math", 12),
    "diffu_grpo/countdown_llada-8b": _d1("countdown", 8),
    "diffu_grpo/sudoku_llada-8b": _d1("sudoku", 8),
    "wd1/gsm8k_llada-8b": _wd1("gsm8k", 12),
    "wd1/math_llada-8b": _wd1("math", 12),
    "wd1/countdown_llada-8b": _wd1("countdown", 12),
    "wd1/sudoku_llada-8b": _wd1("sudoku", 8),
    "spg/gsm8k_llada-8b": _spg("gsm_base_spg_mix_beta1.5_weight0.5", 1.5),
    "spg/math_llada-8b": _spg("math_base_spg_mix_beta1.5_weight0.5", 1.5),
    "spg/countdown_llada-8b": _spg("countdown_base_spg_mix_beta1.5_weight0.5", 1.5),
    "spg/sudoku_llada-8b": _spg(
        "sudoku_new_base_spg_mix_beta1.0_weight0.5",
        1.0,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=4,
        temperature=0.3,
        max_prompt_length=1500,
        task_args__style="spg",
    ),
    "stabledrl/gsm8k_llada-8b": _stabledrl("gsm8k_math", 2e-6),
    "stabledrl/math_llada-8b": _stabledrl("math", 2e-6),
    "stabledrl/countdown_llada-8b": _stabledrl("countdown", 1e-6),
    "stabledrl/sudoku_llada-8b": _stabledrl("sudoku", 1e-6),
    "espo/gsm8k_llada-8b": _espo(
        "run_gsm8k_llada.sh",
        **_ESPO_LORA,
        beta=1e-3,
        num_generations=6,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=4,
        denoising_steps=256,
    ),
    "espo/math_llada-8b": _espo(
        "run_math_llada.sh",
        **_ESPO_LORA,
        beta=1e-3,
        num_generations=16,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=16,
        denoising_steps=256,
    ),
    "espo/countdown_llada-8b": _espo(
        "run_countdown_llada.sh",
        **_ESPO_LORA,
        beta=3e-3,
        epsilon=0.0,
        num_generations=6,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=4,
        denoising_steps=128,
    ),
    "espo/sudoku_llada-8b": _espo(
        "run_sudoku_llada.sh",
        **_ESPO_LORA,
        beta=1e-2,
        num_generations=6,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=4,
        denoising_steps=128,
    ),
    "gdsd/gsm8k_llada-8b": _gdsd(
        "run_gdsd_llada_gsm8k.sh",
        learning_rate=3e-6,
        beta=1e-3,
        per_device_train_batch_size=10,
        gradient_accumulation_steps=4,
    ),
    "espo/acecode_llada-8b": _espo(
        "run_code_llada.sh",
        use_peft=False,
        beta=1e-2,
        max_grad_norm=0.8,
        num_generations=10,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=20,
        denoising_steps=256,
    )
    | _in("recipes/process_data.py", task_args__subset="hard")
    | _in("espo/rewards.py", reward_funcs=["code:code_compat"])
    | _in(_ESPO_FILE, learning_rate=1e-6, weight_decay=0.1, sync_ref_model=True, ref_model_sync_steps=64),
    "igpo/gsm8k_llada-8b": _IGPO,
    "igpo/math_llada-8b": _IGPO,
    "dmpo/gsm8k_llada-8b": _DMPO,
    "dmpo/math_llada-8b": _DMPO,
    "dmpo/countdown_llada-8b": _DMPO,
    "dmpo/sudoku_llada-8b": _DMPO,
    "justgrpo/gsm8k_llada-8b": _JUSTGRPO,
    "justgrpo/acecode_llada-8b": _JUSTGRPO,
    "lightningrl/gsm8k_sdar-8b": {
        **_in(
            "configs/lightningrl.yaml",
            max_steps=640,  # 80 times 8
            num_generations=32,
            temperature=1.0,
            top_p=1.0,
            max_completion_length=8192,
            schedule_args__threshold=0.9,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=8,
            steps_per_generation=64,  # 128 prompts of 32 completions, on 8 devices
            num_iterations=1,
            seed=10086,
            max_grad_norm=1.0,
            max_prompt_length=1024,
            epsilon=0.2,
            epsilon_high=0.2,
            kl_estimator="k3",
            nll_weight=0.1,
            beta=0.01,
            loss_type="grpo",
            kl_average="token",
            nll_average="token",
            min_speed_range=0.01,
            keep_wrong_groups=False,
            speed_norm="z_score",
            accuracy_norm="z_score",
            advantage_norm="batch",
            learning_rate=1e-6,
            adam_beta1=0.9,
            adam_beta2=0.999,
            weight_decay=0.0,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=10,
            use_peft=False,
        ),
        **_in("reward/rl_reward.py", speed_gate="none", cap_margin=5),
    },
    "coupled_grpo/acecode_diffucoder-7b": {
        **_in(
            "recipes/config_coupled_code.yaml",
            **_ADAM,
            dtype="bfloat16",
            sync_ref_model=True,
            ref_model_sync_steps=64,
            beta=0.01,
            epsilon=0.5,
            scale_rewards="none",
            num_generations=10,
            num_iterations=2,
            per_device_train_batch_size=5,
            gradient_accumulation_steps=2,
            learning_rate=1e-6,
            weight_decay=0.1,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": 0.1},
            num_train_epochs=1,
            max_prompt_length=200,
            max_completion_length=256,
            denoising_steps=256,
            temperature=1.0,
            reward_weights=[2.0, 0.5],
            reward_funcs=["code:code_compat", "code:format_compat"],  # code, code_format
            seed=42,
            warmup_steps=1e-4,
        ),
        **_in("src/open_r1/grpo.py", task_args__style="diffucoder"),
        **_in("recipes/process_data.py", task_args__subset="hard"),
        **_in("src/open_r1/coupled_grpo.py", baseline="leave_one_out"),
    },
    "egspo/sudoku_llada-8b": _in(
        "egspo/slurm_scripts/train.yaml",
        **{name: value for name, value in (_D1 | _EGSPO).items() if name not in ("p_mask_prompt", "warmup_steps")},
    ),
    "cj_grpo/gsm8k_llada-8b": _cj(12),
    "cj_grpo/sudoku_llada-8b": _cj(8),
    "tracerl/math_sdar-8b": _TRACERL_SDAR,
    "tracerl/math_sdar-4b": _TRACERL_SDAR,
    "tracerl/math_llada-8b": _in(
        "configs/rl_llada.yaml",
        **_TRACERL,
        max_completion_length=512,
        block_length=32,
        num_generations=8,
        temperature=0.8,
        merge=8,
    ),
    "tree_rpo/countdown_llada-8b": _in(
        "dtreerpo/slurm_scripts/dtreerpo.yaml",
        **_LORA,
        **_ADAM,
        load_in_4bit=True,
        seed=42,
        weight_decay=0.1,
        learning_rate=3e-5,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=1e-4,
        per_device_train_batch_size=16,  # 4 edges of one state; here the tree's leaves
        gradient_accumulation_steps=1,
        max_steps=30_000,
        max_completion_length=256,
        max_prompt_length=200,
        block_length=32,
        denoising_steps=128,
        beta=0.01,
        epsilon=0.4,
        num_iterations=12,
        branches=[4, 4],  # num_tree_samples, tree_branch_factor
        distillation=3e-3,
        distillation_steps=30_000,
    ),
    "mdpo/math_llada-8b": _in(
        "training.sh",
        learning_rate=7e-7,
        temperature=0.4,
        beta=0.02,
        block_length=512,
        max_completion_length=512,
        denoising_steps=128,
        num_trained_steps=8,
        max_prompt_length=320,
        num_train_epochs=1,
    )
    | _in(
        "recipes/LLaDA-Instruct/mdpo/config_demo.yaml",
        dtype="bfloat16",
        lr_scheduler_type="constant",
        warmup_steps=0.1,
        seed=42,
    ),
    "dream_coder_rl/code_dream-coder-7b": _in(
        "instruct/examples/training/run_rl.sh",
        epsilon_high=0.28,
        top_p=0.95,
        max_prompt_length=512,
        overlong_prompts="filter",
        max_completion_length=768,
        learning_rate=5e-7,
        cart_p=0.1,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=12,  # 96 prompts of 16 completions, on 8 devices
        num_iterations=2,
        beta=0.0,
        num_generations=16,
        temperature=1.0,
        denoising_steps=768,
        substitute_groups=True,
        num_train_epochs=15,
    ),
    "self_distillation/math_sdar-4b_t3d": _in(
        "configs/ddo_sdar_full_self.yaml",
        activation_checkpointing=True,
        num_train_epochs=30,
        max_prompt_length=512,
        max_completion_length=1024,
        shares=[1.0, 0.75, 0.5, 0.25],
        shares_exponent=8.0,
        ddo_scale=0.1,
        ddo_negative_weight=0.5,
        hard_weight=0.2,
        learning_rate=1e-5,
        adam_beta1=0.9,
        adam_beta2=0.999,
        weight_decay=0.01,
        max_grad_norm=1.0,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=20,
        seed=10086,
        bf16=True,
    ),
}
"""For each configuration with published settings, what the authors' files say, by the setting's name here."""

_DROPOUT = "the authors train with dropout; here it is off, so that ratios start at 1, as the configuration says"
_CUT = "the authors cut prompts from the left, which can cut the chat header off; here all are kept whole"

DELIBERATE: dict[tuple[str, str], str] = {
    ("*", "disable_dropout"): _DROPOUT,
    ("diffu_grpo/sudoku_llada-8b", "temperature"): "0.3 is what d1's script means: a missing backslash loses the flag",
    ("diffu_grpo/sudoku_llada-8b", "max_prompt_length"): _CUT,
    ("wd1/sudoku_llada-8b", "max_prompt_length"): _CUT,
    ("cj_grpo/sudoku_llada-8b", "max_prompt_length"): _CUT,
    ("egspo/sudoku_llada-8b", "max_prompt_length"): _CUT,
    (
        "lightningrl/gsm8k_sdar-8b",
        "speed_gate",
    ): "a wrong answer that is fast would earn most",
    ("coupled_grpo/acecode_diffucoder-7b", "temperature"): "the paper's 1.2",
    ("coupled_grpo/acecode_diffucoder-7b", "baseline"): "the paper's",
}
"""Settings that deviate on purpose, and why; `*` is every configuration."""

NOT_HELD = {
    "lladou/gsm8k_llada-8b": "the files of its settings are not in a published snapshot that was read",
    "dipo/math_sdar-8b": "the files of its settings are not in a published snapshot that was read",
    "spg/code_llada-8b": "the repository has no script for code",
    "sft/s1k_llada-8b": "its settings are held by `test_sft_has_the_published_settings`",
}
"""Configurations that speak of published settings and are not in the table."""
