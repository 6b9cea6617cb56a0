"""Plug-ins of credit: fillings are unbiased at a state, weights are 1 on average, and any trainer can have both."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import rl4dlm
from rl4dlm import DACA, Credit, DiSPO
from rl4dlm.models.tiny import tiny_diffusion_gemma, tiny_sdar
from rl4dlm.training.advantages import leave_one_out
from rl4dlm.training.credit.daca import progress_weights, settled_after
from rl4dlm.training.credit.dispo import filling_losses
from tests.likelihood.tabular import MASK, TOKENS, Tabular
from tests.training.steps import check_gradient, check_splits, one_step, plain_log_probs, tiny_llada_that_ends

END, LENGTH = 0, 3
ANY = {"num_iterations": 1, "beta": 0.0}


# --- enumeration ------------------------------------------------------------------------------------------------------


def ended(texts: Tensor) -> Tensor:
    """The slots up to the first end, bool."""
    return ((texts == END).cumsum(-1) - (texts == END).long()) == 0


def rewards(texts: Tensor) -> Tensor:
    """Some number of what is not behind the end."""
    return ((texts * ended(texts) * torch.tensor([5, 3, 7])).sum(-1) % 4).double() - 1


def fillings_of(state: list[int]) -> Tensor:
    """All of them, long `[F, L]`."""
    slots = [range(TOKENS) if token == MASK else [token] for token in state]
    return torch.tensor(list(itertools.product(*slots)))


@pytest.mark.parametrize("state", [[MASK, MASK, MASK], [MASK, 1, MASK], [2, MASK, 1]])
@pytest.mark.parametrize("count", [2, 3])
def test_fillings_give_the_gradient_of_what_a_state_is_worth(state: list[int], count: int) -> None:
    """The mean over all draws of Z fillings of the loss's gradient, against that of E[R] over all fillings."""
    table = Tabular(LENGTH, seed=5)
    table.logits.requires_grad_()
    opened = torch.tensor(state) == MASK
    if count == 3 and opened.all():
        opened, state = torch.tensor([False, True, True]), [1, MASK, MASK]
    texts = fillings_of(state)
    log_probs = table.log_probs(texts, opened) * opened
    worth = (log_probs.sum(-1).exp() * rewards(texts)).sum()
    exact = -torch.autograd.grad(worth, table.logits, retain_graph=True)[0] / opened.sum()
    draws = torch.tensor(list(itertools.product(range(len(texts)), repeat=count)))
    chance = log_probs.sum(-1).detach().exp()[draws].prod(-1)
    assert float(chance.sum()) == pytest.approx(1.0, abs=1e-12)

    def found(advantages: Tensor, scored: Tensor, by: Tensor) -> Tensor:
        each = log_probs[draws]  # [draws, Z, L]
        losses = filling_losses(each, each - each.detach(), advantages, scored, by, 0.2)
        gradient: Tensor = torch.autograd.grad((chance * losses.mean(-1)).sum(), table.logits, retain_graph=True)[0]
        return gradient

    drawn = rewards(texts)[draws]
    within = (opened & ended(texts))[draws]
    size = opened.sum().expand(draws.shape)
    assert exact.norm() > 1e-3
    above = leave_one_out(drawn)
    assert float((found(above, within, size) - exact).abs().max()) < 1e-14
    everywhere = opened.expand_as(within)  # scores behind the end add noise, and nothing else
    assert float((found(above, everywhere, size) - exact).abs().max()) < 1e-14
    # Controls: a baseline with the filling itself in it, and a mean over what the filling has left to be scored.
    mean = found(drawn - drawn.mean(-1, keepdim=True), within, size)
    assert float((mean - exact * (count - 1) / count).abs().max()) < 1e-14
    if int(opened.sum()) > 1:
        assert float((found(above, within, within.sum(-1)) - exact).abs().max()) > 1e-4


# --- weights ----------------------------------------------------------------------------------------------------------


def test_when_predictions_were_final() -> None:
    """By hand: the last step that predicted something else; steps that a row did not make say nothing."""
    canvas = torch.tensor([[4, 5, 6], [4, 5, 6]])
    predictions = torch.tensor([[[4, 1, 6], [4, 5, 1], [4, 5, 1]], [[1, 5, 6], [4, 5, 6], [-1, -1, -1]]])
    settled = settled_after(predictions, canvas)
    assert settled.tolist() == [[0, 1, 3], [1, 0, 0]]
    share = settled / torch.tensor([[3.0], [2.0]], dtype=torch.float64)
    everything = torch.ones_like(canvas).bool()
    torch.testing.assert_close(
        progress_weights(share, everything, "late"),
        torch.tensor([[0.0, 0.75, 2.25], [3.0, 0.0, 0.0]], dtype=torch.float64),
    )
    early = progress_weights(share, everything, "early")
    torch.testing.assert_close(early, torch.tensor([[1.8, 1.2, 0.0], [0.6, 1.2, 1.2]], dtype=torch.float64))
    some = torch.tensor([[True, True, False], [False, True, True]])
    found = progress_weights(share, some, "late")
    assert found[0].tolist() == [0.0, 2.0, 1.0] and found[1].tolist() == [1.0, 1.0, 1.0]  # nothing to weigh by


@pytest.mark.parametrize("kind", ["late", "early"])
def test_weights_are_one_on_average_and_of_gradients_alone(make_trainer: Any, kind: str) -> None:
    trainer, gradients = one_step(
        make_trainer, rl4dlm.DiffuGRPOTrainer, credit=DACA(kind), model=tiny_llada_that_ends(), **ANY
    )
    record = trainer.seen[0]
    weights, valid = record["token_weights"], record["canvas_valid"]
    mean = (weights * valid).sum(-1) / valid.sum(-1)
    torch.testing.assert_close(mean, torch.ones_like(mean))
    assert bool((weights[~valid] == 1).all()) and bool((~valid).any()) and float(weights[valid].std()) > 0.2
    log_probs, views = plain_log_probs(trainer, record)
    mask = record["completion_mask"]
    scores = (log_probs * views.weight.to(log_probs.dtype)).sum(1)[:, : mask.shape[1]]
    weighed = weights[:, : mask.shape[1]].to(scores) * scores
    check_gradient(trainer, -(mask * record["advantages"][:, None] * weighed).sum() / mask.sum(), gradients)
    without, _ = one_step(make_trainer, rl4dlm.DiffuGRPOTrainer, model=tiny_llada_that_ends(), **ANY)
    assert torch.equal(without.seen[0]["scores"], record["scores"])
    assert without.state.log_history[0]["loss"] == trainer.state.log_history[0]["loss"]


class Twice(Credit):
    """Every token counts for 2."""

    weighs_tokens = True

    def recorded(self, decoding: Any) -> dict[str, Any]:
        return {}

    def token_weights(self, rollout: Any) -> Tensor:
        return torch.full(rollout.canvas.shape, 2.0)


TRAINERS = ["DiffuGRPO", "WD1", "ESPO", "SPG", "EGSPO", "JustGRPO", "MDPO"]


def quick(name: str) -> dict[str, Any]:
    """Settings under which a step is small, and policy gradients of two runs can be compared."""
    settings = {**ANY, "temperature": 1.0}
    if name in ("WD1", "SPG"):
        settings.pop("beta")
    if name == "EGSPO":
        settings["num_scored_steps"] = 2
    if name == "SPG":
        settings["num_views"] = 2
    if name == "JustGRPO":
        settings["denoising_steps"] = 8
    if name == "MDPO":
        settings |= {"score_temperature": 1.0, "num_trained_steps": 2}
    return settings


@pytest.mark.parametrize("name", TRAINERS)
def test_any_trainer_has_both(make_trainer: Any, name: str) -> None:
    """Weights of 2 double the gradient; fillings add theirs, computed here from the model's plain logits."""
    trainer = getattr(rl4dlm, f"{name}Trainer")
    _, plain = one_step(make_trainer, trainer, **quick(name))
    if name != "MDPO":  # whose predictions are other tokens
        _, doubled = one_step(make_trainer, trainer, credit=Twice(), **quick(name))
        for key, gradient in plain.items():
            torch.testing.assert_close(doubled[key], 2 * gradient, rtol=1e-3, atol=5e-6, msg=key)
    made, both = one_step(make_trainer, trainer, credit=DiSPO(states=(0, 2), fillings=3, weight=0.5), **quick(name))
    objective = 0.5 * fillings_by_hand(made, made.seen[0])
    check_gradient(made, objective, {key: gradient - plain[key] for key, gradient in both.items()})


def fillings_by_hand(trainer: Any, record: dict[str, Tensor]) -> Tensor:
    """The loss of fillings, one after another; the recorded tokens differ from their states in open slots alone."""
    advantages, states = record["filling_advantages"], record["filling_states"]
    rows, kinds, count = advantages.shape
    tokens = record["filling_tokens"].view(rows, kinds, count, -1)
    mask = torch.cat([record["prompt_mask"], torch.ones_like(record["canvas_ids"])], dim=1)
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    total = torch.zeros(())
    for k in range(kinds):
        shown = states[:, k]
        ids = torch.cat([record["prompt_ids"], shown], dim=1)
        logits = trainer.model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -shown.shape[1] :]
        log_probs, opened = logits.log_softmax(-1), shown == trainer.spec.mask_token_id
        for z in range(count):
            filled = tokens[:, k, z]
            assert torch.equal(filled[~opened], shown[~opened])
            until = (filled == trainer.spec.eos_token_ids[0]).cumsum(-1) - (
                filled == trainer.spec.eos_token_ids[0]
            ).long()
            each = log_probs.gather(-1, filled[..., None]).squeeze(-1) * (opened & (until == 0))
            total = total - (advantages[:, k, z] * each.sum(-1) / opened.sum(-1).clamp(min=1)).sum()
    return total / (rows * kinds * count)


# --- fillings in a trainer --------------------------------------------------------------------------------------------


def test_fillings_are_rewarded_and_learnt_from_alone(make_trainer: Any) -> None:
    """Completions that are all worth the same are scored for the sake of their fillings."""
    asked: list[list[str]] = []

    def reward(completions: list[str], **columns: Any) -> list[float]:
        asked.append(list(completions))
        return [0.5] * 8 if len(completions) == 8 else [len(set(text)) / 8 for text in completions]

    made, gradients = one_step(
        make_trainer, rl4dlm.WD1Trainer, credit=DiSPO(states=2, fillings=3), rewards=reward, num_iterations=1
    )
    record, log = made.seen[0], made.state.log_history[0]
    assert [len(texts) for texts in asked] == [8, 48]
    assert not bool(record["advantages"].any()) and bool((record["filling_advantages"] != 0).flatten(1).any(-1).all())
    check_gradient(made, fillings_by_hand(made, record), gradients)
    given = torch.tensor([len(set(text)) / 8 for text in asked[1]]).view(6, 8).T.view(8, 2, 3)
    order = record["row_ids"].argsort()
    torch.testing.assert_close(record["filling_advantages"][order].float(), leave_one_out(given), rtol=0, atol=1e-6)
    assert log["diffusion/filling_reward"] == pytest.approx(float(given.mean()), abs=1e-6)
    share = (given != given.mean(-1, keepdim=True)).double().mean()
    assert log["diffusion/filling_advantage_share"] == pytest.approx(float(share), abs=0.2)
    assert "filling_log_probs" not in record  # the first pass is its own old policy


def test_splits_and_later_passes(make_trainer: Any) -> None:
    """Micro-batches change nothing, and in a second pass ratios are to the policy that decoded."""
    check_splits(make_trainer, rl4dlm.DiffuGRPOTrainer, credit=DiSPO(2, 2), beta=0.0, model=None)
    trainer, _ = one_step(
        make_trainer, rl4dlm.DiffuGRPOTrainer, credit=DiSPO(2, 2, weight=3.0), max_steps=2, beta=0.0, num_iterations=2
    )
    first, second = trainer.seen
    assert torch.equal(first["filling_log_probs"], second["filling_log_probs"])
    assert float(first["filling_log_probs"].abs().max()) > 0


def test_rows_that_end_early_have_no_later_states(make_trainer: Any) -> None:
    settings = {"denoising_steps": 8, "block_length": 1, **ANY}  # from left to right, until the end is written
    credit, model = DiSPO(states=(0, 6), fillings=2), tiny_llada_that_ends()
    made, _ = one_step(make_trainer, rl4dlm.DiffuGRPOTrainer, credit=credit, model=model, **settings)
    record = made.seen[0]
    opened = (record["filling_states"] == made.spec.mask_token_id).any(-1)
    assert bool(opened[:, 0].all()) and not bool(opened[:, 1].all())
    assert not bool(record["filling_advantages"][~opened].any())
    tokens = record["filling_tokens"].view(8, 2, 2, 8)
    assert torch.equal(tokens[~opened], record["canvas_ids"][:, None, None].expand_as(tokens)[~opened])


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"states": 0}, "states=0.*1 or larger"),
        ({"states": ()}, "states=.*steps from 0 on"),
        ({"states": (-1,)}, "states=.*steps from 0 on"),
        ({"states": "2"}, "states='2'"),
        ({"fillings": 1}, "fillings=1.*2 or larger"),
        ({"weight": 0}, "weight=0.*larger than 0"),
        ({"epsilon": -1}, "epsilon=-1"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiSPO(**arguments)


def test_bad_kind() -> None:
    with pytest.raises(ValueError, match="kind='middle'.*late"):
        DACA("middle")


THRESHOLD = {"schedule": "threshold", "denoising_steps": None}


@pytest.mark.parametrize(
    ("credit", "trainer", "settings", "message"),
    [
        (DiSPO(8), "DiffuGRPO", {}, "states=8.*there are 4"),
        (DiSPO((4,)), "DiffuGRPO", {}, r"states=\(4,\).*the last is 3"),
        (DiSPO(2), "DiffuGRPO", THRESHOLD, "states=2.*name steps"),
        (DiSPO(2), "DiffuGRPO", {"temperature": 0.0}, "temperature=0.*credit=DiSPO"),
        (DiSPO(2), "DiffuGRPO", {"cache": "prefix"}, "credit=DiSPO needs.*cache='prefix'"),
        (DiSPO(2), "DiffuGRPO", {"mask_truncated_completions": True}, "mask_truncated_completions=True.*DiSPO"),
        (DACA(), "MDPO", {"temperature": 1.0, "score_temperature": 1.0}, "credit=DACA.*MDPOTrainer"),
        (DACA(), "TreeRPO", {"branches": [2, 2]}, "credit=DACA.*branches"),
        (DACA(), "DiffuGRPO", {"schedule": "daedal", "denoising_steps": None}, "schedule='daedal'.*DACA"),
    ],
)
def test_what_does_not_go_together(make_trainer: Any, credit: Any, trainer: str, settings: Any, message: str) -> None:
    kind, config = (getattr(rl4dlm, f"{trainer}{what}") for what in ("Trainer", "Config"))
    with pytest.raises(ValueError, match=message):
        make_trainer(trainer=kind, config=config, credit=credit, **settings)


@pytest.mark.parametrize(
    ("model", "message", "more"),
    [
        (tiny_sdar, "credit=DiSPO.*block", {"max_completion_length": 8}),
        (
            tiny_diffusion_gemma,
            "credit=DiSPO.*noise='uniform'",
            {"schedule": "entropy_bound_canvas", "denoising_steps": None},
        ),
    ],
)
def test_models_it_is_not_for(make_trainer: Any, model: Any, message: str, more: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(model(), credit=DiSPO(1, 2), **more)
