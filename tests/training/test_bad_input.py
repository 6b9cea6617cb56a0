"""Bad settings, models, tokenizers, datasets, prompts and rewards: a clear error, and before compute if possible."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from rl4dlm.algorithms.diffu_grpo import DiffuGRPOConfig
from rl4dlm.models.loading import save_denoiser
from rl4dlm.models.tiny import tiny_llada, tiny_llada_moe, tiny_tokenizer
from rl4dlm.sft.trainer import DiffusionSFTConfig
from rl4dlm.training.checks import check_prompts, checked_rewards
from rl4dlm.training.contract import ContractError, check_contract

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "best_first"}, r"schedule='best_first' is unknown; choose one of .*low_confidence"),
        ({"max_completion_length": 16, "block_length": 5}, "block_length=5 does not divide max_completion_length=16"),
        ({"max_completion_length": 16, "block_length": 4, "denoising_steps": 2}, "denoising_steps=2 .* 4 blocks"),
        ({"temperature": -0.5}, "temperature=-0.5"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"cfg_scale": -1.0}, "cfg_scale=-1.0"),
        ({"cache": "magic"}, "cache='magic' is unknown; choose one of"),
        ({"schedule_args": {"speed": 3}}, r"schedule_args has unknown settings \['speed'\]"),
        ({"schedule_args": "threshold 0.9"}, "schedule_args='threshold 0.9' is not a mapping"),
        ({"schedule": "threshold", "denoising_steps": 8}, "denoising_steps=8 has no meaning"),
        ({"max_completion_length": None}, "max_completion_length=None"),
        ({"rollout_batch_size": 0}, "rollout_batch_size=0"),
        ({"max_prompt_length": 0}, "max_prompt_length=0"),
        ({"overlong_prompts": "truncate"}, "overlong_prompts='truncate' is not allowed; choose one of error, filter"),
        ({"score_temperature": 0.0}, "score_temperature=0.0"),
        ({"p_mask_prompt": 1.5}, "p_mask_prompt=1.5"),
        ({"router_aux_loss_coef": 0.1}, "router_aux_loss_coef=0.1"),
        ({"use_vllm": True}, "use_vllm=True is not supported"),
        ({"vllm_gpu_memory_utilization": 0.9}, "vllm_gpu_memory_utilization=0.9 is not supported"),
        ({"use_transformers_continuous_batching": True}, "use_transformers_continuous_batching=True is not supported"),
        ({"cache_implementation": "static"}, "cache_implementation='static' is not supported.*`cache`"),
        ({"min_p": 0.1}, "min_p=0.1 is not supported"),
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2 is not supported"),
        ({"generation_kwargs": {"num_beams": 2}}, "generation_kwargs=.*schedule_args"),
        ({"max_tool_calling_iterations": 2}, "max_tool_calling_iterations=2 is not supported"),
        ({"cast_lm_head_to_fp32": True}, "cast_lm_head_to_fp32=True is not supported"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 is not supported"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0 is not supported"),
    ],
)
def test_a_bad_setting_of_rl_is_named_with_its_value(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiffuGRPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, **changes)


def test_schedule_args_reach_the_schedule_from_yaml_and_from_the_command_line(tmp_path: Path) -> None:
    for given in ({"threshold": 0.7}, '{"threshold": 0.7}'):
        config = DiffuGRPOConfig(
            output_dir=str(tmp_path), bf16=False, use_cpu=True, schedule="threshold", schedule_args=given
        )
        assert config.decoding().arguments().threshold == 0.7


def test_decoding_states_nothing_twice(tmp_path: Path) -> None:
    config = DiffuGRPOConfig(
        output_dir=str(tmp_path), bf16=False, use_cpu=True, max_completion_length=32, denoising_steps=8, block_length=8,
        temperature=0.3, top_p=0.9, top_k=5, cfg_scale=0.5, cache="prefix", stop_at_eos=False, suppress_token_ids=[4],
        defer_token_ids=[1],
    )  # fmt: skip
    decoding = config.decoding()
    assert (decoding.canvas_length, decoding.steps, decoding.block_length) == (32, 8, 8)
    assert (decoding.temperature, decoding.top_p, decoding.top_k, decoding.cfg_scale) == (0.3, 0.9, 5, 0.5)
    assert (decoding.cache, decoding.stop_at_eos) == ("prefix", False)
    assert (decoding.suppress_token_ids, decoding.defer_token_ids) == ((4,), (1,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packing": True}, "packing=True is not supported"),
        ({"padding_free": True}, "padding_free=True is not supported"),
        ({"loss_type": "dft"}, "loss_type='dft' is not supported"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 is not supported"),
        ({"dataset_kwargs": {"skip_prepare_dataset": True}}, "skip_prepare_dataset"),
        ({"noise_floor": 0.0}, "noise_floor=0.0"),
        ({"eos_padding": "yes"}, "eos_padding='yes' is not allowed; choose one of none, longest, max_length"),
        ({"eos_padding": "max_length", "max_length": None}, "eos_padding='max_length' needs max_length"),
    ],
)
def test_a_bad_setting_of_sft_is_named_with_its_value(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiffusionSFTConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, **changes)


# --- models and tokenizers --------------------------------------------------------------------------------------------


def causal(**config: Any) -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=110, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, **config
        )
    )


def test_a_model_without_a_spec_is_refused(make_trainer: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no `config\.diffusion`"):
        make_trainer(causal())
    causal().save_pretrained(tmp_path / "causal")
    tiny_tokenizer().save_pretrained(tmp_path / "causal")
    with pytest.raises(ValueError, match="`diffusion`"):
        make_trainer(str(tmp_path / "causal"))


def test_a_causal_model_is_refused(make_trainer: Any) -> None:
    with pytest.raises(ValueError, match="is_causal"):
        make_trainer(causal(diffusion={"mask_token_id": 2, "eos_token_ids": [1]}))


def test_a_tokenizer_that_does_not_fit_is_refused(make_trainer: Any) -> None:
    without = tiny_tokenizer()
    without.mask_token = None
    with pytest.raises(ValueError, match="no mask token"):
        make_trainer(tokenizer=without)
    with pytest.raises(ValueError, match="mask_token_id=2, but the model was trained with"):
        make_trainer(tiny_llada(mask_token_id=3))


@pytest.mark.parametrize("given", ["path", "instance"])
def test_an_adapter_that_misses_what_it_names_is_refused(make_trainer: Any, tmp_path: Path, given: str) -> None:
    model = tiny_llada_moe()
    save_denoiser(model, tmp_path / "mixture", tiny_tokenizer())
    with pytest.raises(ValueError, match="target_modules=.*names gate_proj"):
        make_trainer(
            str(tmp_path / "mixture") if given == "path" else model,
            peft_config=LoraConfig(target_modules=["q_proj", "gate_proj"]),
        )


def test_a_model_made_in_memory_needs_a_tokenizer(recording_trainer: Any, tmp_path: Path) -> None:
    config = DiffuGRPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True)
    with pytest.raises(ValueError, match="processing_class=None needs a model that was loaded"):
        recording_trainer(tiny_llada(), len, config, Dataset.from_dict({"prompt": ["a"]}))


def test_arguments_without_meaning_are_refused(make_trainer: Any, recording_trainer: Any, tmp_path: Path) -> None:
    config = DiffuGRPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True)
    for name in ("tools", "environment_factory", "rollout_func"):
        with pytest.raises(TypeError, match=f"{name} is not supported"):
            recording_trainer(tiny_llada(), len, config, Dataset.from_dict({"prompt": ["a"]}), **{name: [len]})
    with pytest.raises(TypeError, match="DiffusionSFTConfig; a DiffuGRPOConfig is needed"):
        make_trainer(config=lambda **_: DiffusionSFTConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True))


FIXED = {"stop_at_eos": False}
UNEVEN = [
    ({"stop_at_eos": True}, {}),
    ({"schedule": "threshold", "denoising_steps": None, **FIXED}, {}),
    (FIXED, {"attention": "block_causal", "block_length": 4, "grid_origin": "position_zero"}),
]


@pytest.mark.parametrize(("changes", "spec"), UNEVEN, ids=["ends", "threshold", "grid"])
def test_sharded_models_wait_for_each_other_where_forwards_differ(
    make_trainer: Any, changes: dict[str, Any], spec: dict[str, Any]
) -> None:
    for zero_stage, fsdp, waits in ((None, False, False), (None, True, True), (3, False, True)):
        trainer = make_trainer(tiny_with(**spec), **changes)
        trainer.is_fsdp_enabled, trainer._dist.zero_stage = fsdp, zero_stage
        trainer.args.ds3_gather_for_generation = False
        assert trainer._forwards_differ == waits


def test_the_same_number_of_forwards_everywhere_needs_no_waiting(make_trainer: Any) -> None:
    trainer = make_trainer(**FIXED)
    trainer.is_fsdp_enabled = True
    assert not trainer._forwards_differ


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_length": 8}, "block_length=8 contradicts the model, whose attention='block_causal' has blocks of 4"),
        ({"denoising_steps": 3}, "denoising_steps=3 cannot be shared out over 2 blocks .max_completion_length=8"),
    ],
)
def test_decoding_that_does_not_fit_the_models_blocks_is_found_at_construction(
    make_trainer: Any, changes: dict[str, Any], message: str
) -> None:
    model = tiny_with(attention="block_causal", block_length=4)
    assert make_trainer(model).decoding.block_length == 4
    with pytest.raises(ValueError, match=message):
        make_trainer(tiny_with(attention="block_causal", block_length=4), **changes)


@pytest.mark.parametrize("schedule", ["d2f", "multi_block"])
def test_blocks_that_depend_on_unfinished_ones_are_not_scored_as_if_they_did_not(
    make_trainer: Any, schedule: str
) -> None:
    blocks = {"attention": "block_causal", "block_length": 4}
    with pytest.raises(ValueError, match=f"schedule='{schedule}'.*unfinished.*attention='block_causal'"):
        make_trainer(tiny_with(**blocks), schedule=schedule, denoising_steps=None)
    make_trainer(schedule=schedule, denoising_steps=None)  # full attention is scored as it was drawn


def tiny_with(**spec: Any) -> Any:
    model = tiny_llada()
    model.config.diffusion.update(spec)
    return model


# --- datasets and prompts ---------------------------------------------------------------------------------------------


def test_a_dataset_without_prompts_is_refused(make_trainer: Any) -> None:
    wrong = Dataset.from_dict({"question": ["a"] * 4})
    stream = IterableDataset.from_generator(lambda: iter([{"question": "a"}]))
    good = Dataset.from_dict({"prompt": ["a"] * 4})
    for data, evaluation, name in (
        (wrong, None, "train_dataset"),
        (stream, None, "train_dataset"),
        (good, wrong, "eval_dataset"),
        (good, {"math": wrong}, r"eval_dataset\['math'\]"),
    ):
        with pytest.raises(ValueError, match=f"{name} has no column 'prompt'; its columns are .*question"):
            make_trainer(dataset=data, eval_dataset=evaluation)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("", r"train_dataset\[2\]\['prompt'\] is empty"),
        ("a<mask>b", r"train_dataset\[2\]\['prompt'\] contains the mask"),
    ],
)
def test_a_bad_prompt_is_found_before_training(make_trainer: Any, bad: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(dataset=Dataset.from_dict({"prompt": ["a", "b", bad, "c"]}))


def test_over_long_prompts_are_refused_or_left_out_but_never_cut(make_trainer: Any) -> None:
    data = Dataset.from_dict({"prompt": ["abcdef", "ab", "abc", "a"] * 2})
    with pytest.raises(ValueError, match="2 of 8 prompts in train_dataset are longer than 3 tokens"):
        make_trainer(dataset=data, max_prompt_length=3)
    trainer = make_trainer(dataset=data, max_prompt_length=3, overlong_prompts="filter")
    assert sorted(trainer.train_dataset["prompt"]) == ["a", "a", "ab", "ab", "abc", "abc"]
    with pytest.raises(ValueError, match="prompt 0 has 6 tokens; at most 3 are allowed"):
        trainer.rollout(["abcdef"])
    with pytest.raises(ValueError, match="no prompt of at most 1 tokens"):
        make_trainer(dataset=Dataset.from_dict({"prompt": ["ab"] * 4}), max_prompt_length=1, overlong_prompts="filter")


def test_prompt_and_canvas_must_fit_into_the_models_positions(make_trainer: Any) -> None:
    data = Dataset.from_dict({"prompt": ["abcdefghij"] * 4})
    make_trainer(tiny_llada(max_position_embeddings=18), dataset=data)
    with pytest.raises(ValueError, match="longer than 9 tokens"):
        make_trainer(tiny_llada(max_position_embeddings=17), dataset=data)


def test_a_stream_is_filtered_as_it_comes() -> None:
    stream = IterableDataset.from_generator(lambda: ({"prompt": "a" * n} for n in range(1, 6)))
    kept = check_prompts(
        stream, "train_dataset", lambda texts: [list(map(ord, t)) for t in texts], mask_token_id=0, limit=2,
        overlong="filter",
    )  # fmt: skip
    assert [row["prompt"] for row in kept] == ["a", "aa"]


# --- rewards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "returned 1 rewards for 8 completions"),
        ([1.0] * 7 + [math.nan], "returned nan for completion 7"),
        ([math.inf] * 8, "returned inf for completion 0"),
        (3.0, "returned float '3.0'; it must return a list"),
        (["good"] * 8, "it must return a list with one number"),
        (None, "returned NoneType"),
    ],
)
def test_a_reward_function_must_return_one_finite_number_per_completion(
    make_trainer: Any, returned: Any, message: str
) -> None:
    def my_reward(completions: list[str], **columns: Any) -> Any:
        return returned

    trainer = make_trainer(rewards=my_reward, max_steps=1)
    with pytest.raises(
        ValueError, match=f"reward function 'my_reward' {message}" if "returned" in message else message
    ):
        trainer.train()


def test_checked_rewards_keep_their_names_and_values() -> None:
    class Judge:
        def __call__(self, completions: list[str], **columns: Any) -> Any:
            return torch.arange(len(completions))

    def scaled(completions: list[str], factor: float, **columns: Any) -> list[float | None]:
        return [factor, None]

    async def later(completions: list[str], **columns: Any) -> list[float]:
        return [math.nan]

    judge, partial, late, name = checked_rewards([Judge(), functools.partial(scaled, factor=2.0), later, "some/model"])
    assert (judge.__name__, partial.__name__, late.__name__, name) == ("Judge", "scaled", "later", "some/model")
    assert judge(completions=["a", "b"]) == [0.0, 1.0]
    assert partial(completions=["a", "b"]) == [2.0, None]
    coroutine = late(completions=["a"])
    with pytest.raises(ValueError, match="reward function 'later' returned nan"):
        coroutine.send(None)


# --- the surface of TRL -----------------------------------------------------------------------------------------------


def test_a_trl_without_the_hooks_is_named_when_a_trainer_is_imported() -> None:
    class Other:
        def __init__(self) -> None:
            self.kept = 1

        def method(self, inputs: Any) -> dict[str, Any]:
            return {"key": inputs}

    check_contract(Other, parameters={"method": ["inputs"]}, attributes=["kept"], keys={"method": ["key"]})
    with pytest.raises(ContractError) as raised:
        check_contract(
            Other,
            parameters={"gone": [], "method": ["outputs"]},
            attributes=["lost"],
            keys={"method": ["no"]},
            module=math,
            names=["nope"],
        )
    for missing in ("Other.gone", "Other.method(outputs)", "Other().lost", "Other.method: 'no'", "math.nope"):
        assert missing in str(raised.value)
