"""EBPO: bounds of all blocks in the recorded views, losses of recorded batches, gradients and metrics.

The record is of DARE's port; a reference that drops pads before the forward. Where its grid starts anew with the
response, the blocks of a prompt are counted from its start, and not back from the response as here: what differs is
which prompt tokens see which, and the record follows from that rule.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rl4dlm.likelihood.elbo import ELBO
from rl4dlm.likelihood.scoring import score_views
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.training import sequence_ratio
from rl4dlm.training.clipping import Clip, clipped_units, surrogate
from rl4dlm.training.losses import kl_estimate
from tests.conformance.cases import Case
from tests.conformance.denoisers import build, spec_of
from tests.conformance.losses import Verdict, tools

OUTPUTS = {"elbo", "token_terms", "loss", "metrics", "attention_view0_row0", "grad"}
KL = {None: "k2", "k2": "k2", "mse": "k2", "k3": "k3", "low_var_kl": "k3", "k1": "k1", "kl": "k1", "abs": "abs"}
ALLOWED = ("k2", "k3")
GRID = "EBPO's port counts the blocks of a prompt from its start where its grid starts anew with the response"
REFUSED = "EBPO's port has KL terms whose gradient does not hold the policy at the reference; here they are refused"
TERM_TOLERANCE = 1e-5  # float32 terms, of up to L_b times a log-probability
BOUND_TOLERANCE = 1e-4  # their sums


def run(case: Case, folder: Path) -> Verdict:
    """As `compared`, where nothing stays replaced; or from forwards with the port's own blocks of prompts."""
    if case.prompts_end_in_a_block:
        return by_its_grid(case)
    with pytest.MonkeyPatch.context() as monkeypatch:
        return compared(case, folder, monkeypatch)


def compared(case: Case, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Verdict:
    """Compares whatever the case records of: attention, terms of tokens, bounds, loss, gradients and metrics."""
    from rl4dlm.algorithms.ebpo import EBPOTrainer

    tools.check_outputs(case, OUTPUTS)
    settings, outputs, model, spec = case.settings, case.outputs, tools.model_of(case), spec_of(case)
    rows, mask = tools.packed(case), torch.tensor(case.noise["is_mask"]).bool()
    count = mask.shape[1]
    assert count == settings["mc_num"]
    beta, kind = settings["kl_loss_coef"] or 0.0, KL[settings.get("kl_loss_type")]
    blocks = {"per_block": True, "block_length": spec.block_length, "block_origin": spec.grid_origin}
    inner = ELBO(count, "count", **blocks)
    views = inner.views(rows, mask, torch.zeros(mask.shape[:2]))  # counts give the weights
    with torch.no_grad():
        found = score_views(model, spec, rows.ids, rows.attention_mask, views)
    terms = found.log_probs * views.weight * count
    bounds = inner.reduce(found.log_probs, views).sum(-1)
    if "token_terms" in outputs:
        tools.compare("token_terms", terms, outputs["token_terms"], TERM_TOLERANCE)
    if "elbo" in outputs:
        tools.compare("elbo", bounds, outputs["elbo"], BOUND_TOLERANCE)
    if "attention_view0_row0" in outputs:
        lengths = int(rows.prompt_mask[0].sum()), int(rows.valid[0].sum())
        assert outputs["attention_view0_row0"] == tools.two_copies(*lengths, spec).int().tolist()

    if beta and kind not in ALLOWED:
        with pytest.raises(ValueError, match="kl_estimator="):
            EBPOTrainer.config_class(output_dir=str(folder), bf16=False, use_cpu=True, beta=beta, kl_estimator=kind)
        monkeypatch.setattr(sequence_ratio, "kl_estimate", lambda difference, _: divergence(difference, kind))

    low, high = settings["clip_ratio_low"], settings["clip_ratio_high"]
    trainer = tools.trainer_for(
        case,
        folder,
        model,
        EBPOTrainer,
        views,
        num_views=count,
        epsilon=low,
        epsilon_high=high,
        beta=beta,
        **({"kl_estimator": kind if kind in ALLOWED else "k2"} if beta else {}),
    )
    old = torch.tensor(case.inputs["old_elbo"], dtype=torch.float64)
    ref = case.inputs.get("ref_elbo")
    ref = None if ref is None else torch.tensor(ref, dtype=torch.float64)
    known = None if ref is None else per_token(ref, mask.shape[2])
    batch = tools.of_rows(tools.batch_of(case, old=per_token(old, mask.shape[2]), ref=known), rows)
    clip, advantages = Clip("log", low, high), batch["advantages"]
    losses = surrogate(bounds - old, bounds, advantages, clip)
    apart = divergence(bounds - (old if ref is None else ref), kind)
    check_metrics(case, bounds, old, losses, apart, clip, beta)
    tools.compare_loss(case, trainer._compute_loss(trainer.model, batch), model, BOUND_TOLERANCE)
    refused = bool(beta) and kind not in ALLOWED
    return Verdict(equal=not refused, rules=frozenset([REFUSED] if refused else []))


def check_metrics(
    case: Case, bounds: Tensor, old: Tensor, losses: Tensor, apart: Tensor, clip: Clip, beta: float
) -> None:
    """What the port logs, a number for each of its micro-batches."""
    advantages = torch.tensor(case.inputs["advantages"], dtype=torch.float64)
    metrics = {
        "actor/pg_loss": losses,
        "actor/pg_clipfrac": torch.stack(clipped_units(bounds - old, advantages, clip)).any(0).double(),
        "actor/ppo_kl": old - bounds,
        "actor/pg_clipfrac_lower": torch.zeros_like(losses),
        "actor/ebpo_old_elbo": old,
        "actor/ebpo_new_elbo": bounds,
        "actor/ebpo_log_ratio": bounds - old,
        "actor/kl_loss": apart,
        "actor/kl_coef": torch.full_like(losses, beta),
    }
    size = case.settings["ppo_micro_batch_size_per_gpu"]
    for name, value in (case.outputs.get("metrics") or {}).items():
        each = [part.mean() for part in metrics[name].split(size)]
        tools.compare(name, torch.stack(each), value, BOUND_TOLERANCE)


def divergence(difference: Tensor, kind: str) -> Tensor:
    """The port's estimates, those that a trainer here refuses included."""
    return difference.abs() if kind == "abs" else kl_estimate(difference, kind)


def per_token(sums: Tensor, length: int) -> Tensor:
    """Bounds `[B]` as scores of tokens `[B, 1, L]` with these sums."""
    return torch.nn.functional.pad(sums[:, None, None], (0, length - 1))


def by_its_grid(case: Case) -> Verdict:
    """All that is recorded, from a forward of two copies for each row and view, with the port's blocks."""
    tools.check_outputs(case, OUTPUTS)
    settings, inputs, outputs = case.settings, case.inputs, case.outputs
    spec = spec_of(case)
    model = build("model", DiffusionSpec(spec.mask_token_id, spec.eos_token_ids), case.compute_dtype).train()
    prompts, completions = tools.ids_of(case)
    masks, valid = torch.tensor(case.noise["is_mask"]).bool(), tools.mask_of(case).bool()
    seen = torch.tensor(inputs["prompt_mask"]).bool()
    terms = torch.zeros(masks.shape, dtype=torch.float64)
    for row, prompt, answer in ((i, p[seen[i]], completions[i][valid[i]]) for i, p in enumerate(prompts)):
        block, see = blocks_of_port(len(prompt), len(answer), settings["block_length"], settings["block_origin"])
        if row == 0 and "attention_view0_row0" in outputs:
            assert outputs["attention_view0_row0"] == see.int().tolist()
        places = torch.arange(len(prompt) + len(answer)).repeat(2)[None]
        for view in range(masks.shape[1]):
            hidden = masks[row, view][valid[row]]
            shown = torch.where(hidden, spec.mask_token_id, answer)
            ids = torch.cat([prompt, shown, prompt, answer])[None]
            keys = torch.where(see, 0.0, -torch.inf).to(model.dtype)[None, None]
            states = model.model(input_ids=ids, attention_mask=keys, position_ids=places).last_hidden_state[0]
            logits = model.lm_head(states[len(prompt) : len(prompt) + len(answer)]).log_softmax(-1)
            each = logits.gather(-1, answer[:, None]).squeeze(-1).double()
            own = block[len(prompt) :]
            size, count = (torch.bincount(own, weight.double())[own] for weight in (hidden >= 0, hidden))
            slots = valid[row].nonzero().squeeze(-1)
            terms = terms.index_put(
                (torch.tensor(row), torch.tensor(view), slots), torch.where(hidden, each * size / count, 0.0)
            )
    bounds = terms.sum(-1).mean(-1)
    if "token_terms" in outputs:
        tools.compare("token_terms", terms, outputs["token_terms"], TERM_TOLERANCE)
    if "elbo" in outputs:
        tools.compare("elbo", bounds, outputs["elbo"], BOUND_TOLERANCE)
    old, advantages = (torch.tensor(inputs[name], dtype=torch.float64) for name in ("old_elbo", "advantages"))
    ref, beta = inputs.get("ref_elbo"), settings["kl_loss_coef"] or 0.0
    apart = bounds - (old if ref is None else torch.tensor(ref, dtype=torch.float64))
    clip = Clip("log", settings["clip_ratio_low"], settings["clip_ratio_high"])
    losses = surrogate(bounds - old, bounds, advantages, clip)
    check_metrics(case, bounds, old, losses, divergence(apart, KL[settings.get("kl_loss_type")]), clip, beta)
    loss = losses + beta * divergence(apart, KL[settings.get("kl_loss_type")])
    tools.compare_loss(case, loss.mean(), model, BOUND_TOLERANCE)
    return Verdict(equal=False, rules=frozenset([GRID]))


def blocks_of_port(prompt: int, answer: int, length: int, origin: str) -> tuple[Tensor, Tensor]:
    """The block of each token, long `[T]`, and who sees whom, bool `[2 T, 2 T]`: a noisy copy before a clean one."""
    place = torch.arange(prompt + answer)
    block = place // length
    if origin == "response":
        block = torch.where(place < prompt, block, -(-prompt // length) + (place - prompt) // length)
    both, clean = block.repeat(2), torch.arange(2 * len(block)) >= len(block)
    query, key = both[:, None], both[None]
    earlier = torch.where(clean[:, None], key <= query, key < query)
    return block, torch.where(clean[None], earlier, (query == key) & ~clean[:, None])
