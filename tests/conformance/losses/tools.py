"""What the families share: a trainer around the recorded model, the recorded batch, and comparisons.

The references attend to padding, so the attention mask of a batch is all ones; that trainers hide padding is tested
with the trainers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rl4dlm.likelihood.estimator import Estimator
from rl4dlm.likelihood.views import Rows, Views
from rl4dlm.models.spec import DiffusionSpec
from tests.conformance.cases import Case
from tests.conformance.denoisers import build, spec_of
from tests.conformance.losses import Verdict

SCORE_TOLERANCE = 2e-6  # the references round log-probabilities to float32
LOSS_TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 1e-4  # relative to the norm
NO_GRADIENT = 1e-9  # what rounding may leave of one that is zero


def ids_of(case: Case) -> tuple[Tensor, Tensor]:
    """Prompts `[B, P]` and completions `[B, L]`."""
    return torch.tensor(case.inputs["prompt_ids"]), torch.tensor(case.inputs["completion_ids"])


def mask_of(case: Case) -> Tensor:
    """The completion mask `[B, L]`; all ones where a reference scores the whole canvas and none is recorded."""
    mask = case.inputs.get("completion_mask")
    return torch.ones_like(ids_of(case)[1]) if mask is None else torch.tensor(mask)


def model_of(case: Case, name: str = "model") -> LlamaForCausalLM:
    """The recorded model for one case alone, so that it can be trained."""
    return build(name, spec_of(case), case.compute_dtype)


@dataclass(frozen=True)
class Recorded(Estimator):
    """An estimator with recorded views, whatever is asked for, reduced as the estimator under test does it."""

    views: Views
    inner: Estimator | None = None

    @property
    def scope(self) -> str:  # type: ignore[override]
        return "valid" if self.inner is None else self.inner.scope

    def draw(self, rows: Rows, *, seed: int, iteration: int) -> Views:
        return self.views

    def reduce(self, log_probs: Tensor, views: Views) -> Tensor:
        return super().reduce(log_probs, views) if self.inner is None else self.inner.reduce(log_probs, views)


def ratio_settings(case: Case) -> dict[str, float]:
    """Clip range and weight of the KL term, by our names."""
    recorded = case.settings
    return {"epsilon": recorded["epsilon_low"], "epsilon_high": recorded["epsilon_high"], "beta": recorded["beta"]}


def no_reward(completions: list[str], **columns: Any) -> list[float]:
    """Zeros."""
    return [0.0] * len(completions)


def trainer_for(
    case: Case,
    folder: Path,
    model: LlamaForCausalLM,
    trainer: type,
    views: Views,
    *,
    rewards: Any = no_reward,
    **settings: Any,
) -> Any:
    """A trainer around the recorded model with the recorded number of iterations, at the recorded one.

    Its estimator replays `views`. `settings` are those of its config: the recorded ones, by our names. `rewards` are
    its reward functions, which nothing calls.
    """
    iterations = case.settings.get("num_iterations", 1)
    if "one_view" in settings:
        raise TypeError("views are scored as by default")
    config = trainer.config_class(
        **{
            "output_dir": str(folder),
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "activation_checkpointing": False,
            "per_device_train_batch_size": 2,
            "num_generations": 2,
            "max_completion_length": len(case.inputs["completion_ids"][0]),
            "num_iterations": iterations,
            "stop_at_eos": False,
            **settings,
        }
    )
    built = trainer(
        model,
        reward_funcs=rewards,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["t5 t6"], "solution": ["t7 t8"]}),
        processing_class=tokenizer(case, model.config.vocab_size),
    )
    built.estimator = Recorded(views, built.estimator)
    assert built.args.steps_per_generation == 1
    built._step = case.settings.get("this_itr_idx", 0)
    built.current_gradient_accumulation_steps = 1
    built.model.train()
    return built


def batch_of(case: Case, advantages: Tensor | None = None, **scores: Any) -> dict[str, Tensor]:
    """The recorded micro-batch in the trainer's form.

    Args:
        case: the case.
        advantages: of its rows, `[B]`; None: the recorded ones.
        scores: `old` and `ref`, per token and iteration `[B, n, L]`; None and missing ones are left out.
    """
    prompts, completions = ids_of(case)
    mask = mask_of(case)
    if advantages is None:
        advantages = torch.tensor(case.inputs["advantages"])
    batch = {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": completions,
        "completion_mask": mask,
        "advantages": advantages.double(),
        "num_items_in_batch": mask.sum(),
        "canvas_ids": completions,
        "canvas_valid": mask.bool(),
        "row_ids": torch.arange(len(prompts)),
        "drawn": torch.zeros_like(mask).bool(),
        "drawn_log_probs": torch.zeros(mask.shape),
    }
    for name, value in scores.items():
        if value is not None:
            batch[f"{name}_per_token_logps"] = torch.as_tensor(value, dtype=torch.float64)
    return batch


def compare_gradients(recorded: dict[str, Any], model: LlamaForCausalLM, mask_token_id: int) -> None:
    """The model's gradients against all that is recorded of them."""
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    total = torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()
    assert total == pytest.approx(recorded["total_norm"], rel=GRADIENT_TOLERANCE, abs=NO_GRADIENT)
    near = GRADIENT_TOLERANCE * recorded["total_norm"] + NO_GRADIENT
    for name, value in (recorded.get("per_parameter_norm") or {}).items():
        assert gradients[name].norm().item() == pytest.approx(value, abs=near), name
    tables = {"lm_head": gradients["lm_head.weight"], "embed": gradients["model.embed_tokens.weight"]}
    for name, value in recorded.items():
        entry = re.fullmatch(r"(lm_head|embed)_(?:(mask)_row|row(\d+))_first(\d+)", name)
        if entry:
            table, is_mask, row, count = entry.groups()
            found = tables[table][mask_token_id if is_mask else int(row)][: int(count)]
            torch.testing.assert_close(found.double(), torch.tensor(value).double(), rtol=0, atol=near)


def packed(case: Case) -> Rows:
    """Rows of a reference that drops padding before the forward: nothing sees it, and positions count without it."""
    prompts, completions = ids_of(case)
    valid = mask_of(case).bool()
    mask = case.inputs.get("prompt_mask")
    prompt_mask = torch.ones_like(prompts) if mask is None else torch.tensor(mask)
    return Rows(prompts, prompt_mask, completions, valid, torch.arange(len(prompts)), seen=valid)


def of_rows(batch: dict[str, Tensor], rows: Rows) -> dict[str, Tensor]:
    """A batch that is scored as `rows` say."""
    seen = rows.valid if rows.seen is None else rows.seen
    return {**batch, "prompt_mask": rows.prompt_mask.long(), "canvas_valid": rows.valid, "canvas_seen": seen}


def check_outputs(case: Case, known: set[str]) -> None:
    """Refuses cases that record something that nothing here computes."""
    unknown = set(case.outputs) - known
    assert case.outputs and not unknown, f"nothing known computes {', '.join(sorted(unknown))}"


def compare(name: str, found: Any, recorded: Any, tolerance: float = SCORE_TOLERANCE) -> None:
    """Numbers against recorded ones of the same shape; large ones may differ by their rounding to float32."""
    found, recorded = (torch.as_tensor(value).detach().double() for value in (found, recorded))
    torch.testing.assert_close(found, recorded, rtol=1e-6, atol=tolerance, msg=lambda text: f"{name}: {text}")


def two_copies(prompt: int, completion: int, spec: DiffusionSpec) -> Tensor:
    """Who sees whom, bool `[2 T, 2 T]`: a noisy copy of a sequence before a clean one, in the blocks of a spec."""
    place = torch.arange(prompt + completion)
    assert spec.block_length is not None
    origin = prompt if spec.grid_origin == "response" else 0
    block = (place - origin).div(spec.block_length, rounding_mode="floor").repeat(2)
    clean = torch.arange(len(block)) >= len(place)
    query, key = block[:, None], block[None]
    own = (query == key) & ~clean[:, None] & ~clean[None]
    earlier = torch.where(clean[:, None], key <= query, key < query)
    return own | (clean[None] & earlier)


def compare_loss(case: Case, loss: Tensor, model: LlamaForCausalLM, tolerance: float = LOSS_TOLERANCE) -> None:
    """A loss with its graph, and its gradients, against what is recorded of them."""
    model.zero_grad()
    loss.backward()
    recorded = case.outputs["loss"]
    assert loss.item() == pytest.approx(recorded, abs=tolerance * max(1.0, abs(recorded)))
    if "grad" in case.outputs:
        compare_gradients(case.outputs["grad"], model, spec_of(case).mask_token_id)


def verdict(case: Case, loss: Callable[[], Tensor], literal: Callable[[], Tensor], model: Any, *rules: str) -> Verdict:
    """Equal where the library's loss is the recorded one; else what the reference does on purpose must be, exactly."""
    try:
        compare_loss(case, loss(), model)
    except AssertionError:
        if not rules:
            raise
        compare_loss(case, literal(), model)
        return Verdict(equal=False, rules=frozenset(rules))
    return Verdict(equal=True)


def compare_metrics(recorded: dict[str, float], logged: dict[str, list[float]]) -> None:
    """What a reference logs against what the trainer logged last, by the same names."""
    for name, value in recorded.items():
        assert logged[name][-1] == pytest.approx(value, abs=LOSS_TOLERANCE), name


def tokenizer(case: Case, vocab_size: int) -> PreTrainedTokenizerFast:
    """Words `t0`, `t1`, … for the ids of the recorded model."""
    spec = spec_of(case)
    pad = next(i for i in range(vocab_size) if i != spec.mask_token_id and i not in spec.eos_token_ids)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocab_size)}, unk_token=f"t{pad}"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=f"t{pad}",
        eos_token=f"t{spec.eos_token_ids[0]}",
        mask_token=f"t{spec.mask_token_id}",
    )


def disturbed(case: Case) -> list[tuple[str, Case]]:
    """Copies of a case with one recorded output changed a little, by what was changed; all of them must be noticed."""
    changed = []
    for name, value in case.outputs.items():
        for path, wrong in _wrong(value):
            changed.append((f"{name}{path}", replace(case, outputs={**case.outputs, name: wrong})))
    return changed


def _wrong(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        inside = [(key, path, wrong) for key, item in value.items() for path, wrong in _wrong(item)]
        return [(f".{key}{path}", {**value, key: wrong}) for key, path, wrong in inside]
    if isinstance(value, list) and value:
        return [(f"[-1]{path}", [*value[:-1], wrong]) for path, wrong in _wrong(value[-1])]
    if isinstance(value, float):
        return [("", value + 0.01 * max(1.0, abs(value)))]
    return []
