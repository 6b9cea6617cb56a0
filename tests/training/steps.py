"""What first steps are tested with: a recorded step, and log-probabilities from the model's plain logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from rl4dlm.models.tiny import tiny_llada
from rl4dlm.training.trainer import rows_of

SMALL_RUN = {
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "optim": "sgd",  # plain, so that differences are not amplified
    "max_steps": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "bf16": False,
    "use_cpu": True,
    "disable_tqdm": True,
    "activation_checkpointing": False,
}
"""Settings of a run of any trainer that is quick, quiet and kept nowhere."""


def tiny_llada_that_ends() -> Any:
    """A denoiser that writes the end of sequence about every third time."""
    model = tiny_llada()
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        hidden = model.base_model(torch.full((1, 8), 2)).last_hidden_state.mean((0, 1))
        head[1] += 3.5 * hidden / hidden.norm() ** 2
    return model


def recording(trainer: type) -> type:
    """A trainer that keeps what its losses were computed from, in `seen`."""

    def loss(self: Any, scores: Any, batch: dict[str, Any]) -> Tensor:
        value: Tensor = trainer.loss(self, scores, batch)  # type: ignore[attr-defined]
        copies = {name: v.detach().clone() for name, v in batch.items() if isinstance(v, Tensor)}
        self.seen = [*getattr(self, "seen", []), {**copies, "scores": scores.log_probs.detach().clone()}]
        return value

    return type(trainer.__name__, (trainer,), {"loss": loss})


def one_step(make_trainer: Callable[..., Any], trainer: type, **settings: Any) -> tuple[Any, dict[str, Tensor]]:
    """A trainer after one plain SGD step, and the gradients of that step; its weights are those before it again."""
    values = {"max_steps": 1, "max_grad_norm": 0.0, **settings}
    made = make_trainer(trainer=recording(trainer), config=trainer.config_class, **values)  # type: ignore[attr-defined]
    trained = {name: p for name, p in made.model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    made.train()
    gradients = {name: (before[name] - p.detach()) / 0.1 for name, p in trained.items()}
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(before[name])
    return made, gradients


def plain_log_probs(trainer: Any, batch: dict[str, Any], iteration: int = 0) -> tuple[Tensor, Any]:
    """Log-probabilities `[B, K, L]` of canvas tokens from the model's own logits, in the views of the estimator."""
    rows = rows_of(batch)
    views = trainer.estimator.draw(rows, seed=trainer.args.seed, iteration=iteration)
    positions = (rows.attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    canvas, each = rows.canvas_ids, []
    for hidden in views.hidden.unbind(1):
        noised = torch.where(hidden, trainer.spec.mask_token_id, rows.ids)
        logits = trainer.model(input_ids=noised, attention_mask=rows.attention_mask, position_ids=positions).logits
        chosen = logits[:, -canvas.shape[1] :].log_softmax(-1).gather(-1, canvas[..., None])
        each.append(chosen.squeeze(-1))
    return torch.stack(each, dim=1), views


def check_gradient(trainer: Any, objective: Tensor, gradients: dict[str, Tensor]) -> None:
    """The gradient of a step against that of an objective which was computed from plain logits."""
    parameters = dict(trainer.model.named_parameters())
    found = torch.autograd.grad(objective, [parameters[name] for name in gradients])
    assert any(gradient.abs().max() > 1e-4 for gradient in found)
    for (name, gradient), expected in zip(gradients.items(), found, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=2e-6, msg=f"gradient of {name}")


def check_first_iteration(trainer: Any) -> None:
    """All policies score alike before the first update: ratios are 1, the KL term is 0, nothing is clipped."""
    record, logs = trainer.seen[0], trainer.state.log_history[0]
    mask = record["completion_mask"].bool()
    for policy in ("old_per_token_logps", "ref_per_token_logps"):
        torch.testing.assert_close(record[policy][mask], record["scores"][mask], rtol=0, atol=2e-6)
    assert logs["kl"] == pytest.approx(0, abs=1e-7)
    assert logs["clip_ratio/region_mean"] == 0


def lora_step(make_trainer: Callable[..., Any], trainer: type, **settings: Any) -> None:
    """A step that trains an adapter, with the model without it as the reference."""
    check_first_iteration(adapter_step(make_trainer, trainer, **settings))


def adapter_step(make_trainer: Callable[..., Any], trainer: type, **settings: Any) -> Any:
    """A trainer after a step of its adapter: that and nothing else was trained, without a second model."""
    adapter = LoraConfig(r=2, lora_alpha=4, lora_dropout=0.5, target_modules=["q_proj", "v_proj"])
    made, gradients = one_step(make_trainer, trainer, peft_config=adapter, **settings)
    assert made.ref_model is None
    assert gradients and all("lora_" in name for name in gradients)
    assert any(gradient.abs().max() > 1e-6 for gradient in gradients.values())
    return made


def check_splits(make_trainer: Callable[..., Any], trainer: Any, **settings: Any) -> None:
    """Splitting a batch into micro-batches changes nothing: the losses of two steps."""
    found = []
    for size, accumulation in ((8, 1), (4, 2)):
        split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        made = make_trainer(trainer=trainer, config=trainer.config_class, **split, **settings)
        made.train()
        found.append([entry["loss"] for entry in made.state.log_history if "loss" in entry])
    assert len(found[0]) == 2 and found[0] == pytest.approx(found[1], abs=5e-6)


def tokens_mean(trainer: Any, record: dict[str, Any]) -> Tensor:
    """-A s, averaged over all completion tokens."""
    log_probs, views = plain_log_probs(trainer, record)
    mask = record["completion_mask"]
    scores = (log_probs * views.weight.to(log_probs.dtype)).sum(1)[:, : mask.shape[1]]
    return -(mask * record["advantages"][:, None] * scores).sum() / mask.sum()


def sequences_mean(trainer: Any, record: dict[str, Any]) -> Tensor:
    """-A B / n, averaged over completions; B is the sum of a sequence's scores, n the number of its tokens."""
    log_probs, views = plain_log_probs(trainer, record)
    bounds = (log_probs * views.weight.to(log_probs.dtype)).sum((1, 2))
    return -(record["advantages"] * bounds / record["completion_mask"].sum(-1)).mean()
