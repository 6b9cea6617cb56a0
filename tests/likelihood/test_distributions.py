"""Losses on whole distributions, a chunk of positions at a time, against the dense computation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rl4dlm.likelihood.scoring import reduce_views, score_views
from rl4dlm.likelihood.views import Views
from rl4dlm.models import distributions
from rl4dlm.models.distributions import (
    DIVERGENCES,
    Classes,
    Divergence,
    HiddenStates,
    LogSoftmax,
    Targets,
    Together,
    TopClasses,
    divergence,
    renormalised,
)
from rl4dlm.models.scoring import attach_scoring, logits_of
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.models.tiny import tiny_diffusion_gemma, tiny_dream, tiny_llada, tiny_sdar
from tests.likelihood.test_scoring import batch

VOCABULARY, MASK, CANVAS = 16, 2, 5
SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "dtype": torch.float64, "initializer_range": 0.3}


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any, DiffusionSpec]:
    """A student, a teacher with other weights, and their spec."""
    student, teacher = (attach_scoring(tiny_llada(seed=seed, **SIZES)) for seed in (0, 1))
    return student, teacher, DiffusionSpec.of(student)


def more_shown(views: Views) -> Views:
    """What a teacher sees: every second hidden token more."""
    return Views(views.hidden & (torch.arange(views.hidden.shape[2]) % 2 == 0), views.weight)


def dense(model: Any, ids: Tensor, keys: Tensor, views: Views, temperature: float = 1.0) -> Tensor:
    """Log-probabilities `[n, V]` at the scored positions, from full logits of every view."""
    found = []
    positions = (keys.long().cumsum(-1) - 1).clamp(min=0)
    for b in range(len(ids)):
        for k in range(views.hidden.shape[1]):
            noised = torch.where(views.hidden[b, k], MASK, ids[b])[None]
            row = slice(b, b + 1)
            logits = model(input_ids=noised, attention_mask=keys[row].long(), position_ids=positions[row]).logits
            found.append((logits[0, -CANVAS:][views.scored[b, k]] / temperature).log_softmax(-1))
    return torch.cat(found)


def gradients(model: Any, values: Tensor) -> list[Tensor]:
    """Of a sum that counts every position differently."""
    weights = torch.linspace(-1, 2, len(values), dtype=values.dtype)
    return list(torch.autograd.grad((weights * values).sum(), list(model.parameters())))


def states_of(model: Any, spec: DiffusionSpec, ids: Tensor, keys: Tensor, views: Views) -> Tensor:
    with torch.no_grad():
        (states,) = reduce_views(model, spec, ids, keys, views, HiddenStates())
    return states


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("one_view", [False, True])
def test_divergences_and_gradients_are_those_of_the_dense_computation(
    pair: Any, monkeypatch: pytest.MonkeyPatch, kind: str, one_view: bool
) -> None:
    student, teacher, spec = pair
    ids, keys, views = batch()
    states = states_of(teacher, spec, ids, keys, more_shown(views))
    monkeypatch.setattr("rl4dlm.models.scoring.CHUNK_ELEMENTS", 3 * VOCABULARY)
    reduction = Divergence(states, lambda h: logits_of(teacher, h), kind, temperature=1.3)
    (found,) = reduce_views(student, spec, ids, keys, views, reduction, one_view=one_view)
    with torch.no_grad():
        told = dense(teacher, ids, keys, more_shown(views), 1.3)
    expected = divergence(dense(student, ids, keys, views, 1.3), told, kind)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    for ours, plain in zip(gradients(student, found), gradients(student, expected), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_teacher_that_is_the_student_gives_no_loss_and_no_gradient(pair: Any, kind: str) -> None:
    student, _, spec = pair
    ids, keys, views = batch()
    states = states_of(student, spec, ids, keys, views)
    reduction = Divergence(states, lambda h: logits_of(student, h), kind)
    (found,) = reduce_views(student, spec, ids, keys, views, reduction)
    assert float(found.detach().abs().max()) < 1e-14
    assert max(float(g.abs().max()) for g in gradients(student, found)) < 1e-13


def test_classes_of_a_teacher_and_what_a_student_gives_them(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, spec = pair
    ids, keys, views = batch()
    monkeypatch.setattr("rl4dlm.models.scoring.CHUNK_ELEMENTS", 3 * VOCABULARY)
    with torch.no_grad():
        top, told = reduce_views(teacher, spec, ids, keys, views, TopClasses(4), rows_per_forward=1)
        everything = dense(teacher, ids, keys, views)
    (found,) = reduce_views(student, spec, ids, keys, views, Classes(top))
    own = dense(student, ids, keys, views)
    best = everything.topk(4).indices
    assert torch.equal(top, best)

    def grouped(log_probs: Tensor) -> Tensor:
        rest = log_probs.scatter(-1, best, -torch.inf).logsumexp(-1, keepdim=True)
        return torch.cat([log_probs.gather(-1, best), rest], dim=-1)

    torch.testing.assert_close(told, grouped(everything), rtol=0, atol=1e-12)
    torch.testing.assert_close(found, grouped(own), rtol=0, atol=1e-12)
    assert float(told.exp().sum(-1).sub(1).abs().max()) < 1e-12
    ours = gradients(student, divergence(found, told, "forward_kl"))
    plain = gradients(student, divergence(grouped(own), told, "forward_kl"))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    only = renormalised(told)
    torch.testing.assert_close(only, everything.gather(-1, best).log_softmax(-1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd", "tv"])
def test_all_tokens_as_classes_are_the_full_divergence_and_fewer_are_less(pair: Any, kind: str) -> None:
    student, teacher, spec = pair
    ids, keys, views = batch()
    with torch.no_grad():
        full = divergence(dense(student, ids, keys, views), dense(teacher, ids, keys, views), kind)
        found = []
        for count in (VOCABULARY, 6, 2):
            top, told = reduce_views(teacher, spec, ids, keys, views, TopClasses(count))
            (own,) = reduce_views(student, spec, ids, keys, views, Classes(top))
            found.append(divergence(own, told, kind))
    torch.testing.assert_close(found[0], full, rtol=0, atol=1e-12)
    assert bool((found[1] <= full + 1e-12).all() and (found[2] <= found[1] + 1e-12).all())  # data processing


def test_all_classes_have_a_gradient_without_any_others(pair: Any) -> None:
    student, teacher, spec = pair
    ids, keys, views = batch()
    with torch.no_grad():
        top, told = reduce_views(teacher, spec, ids, keys, views, TopClasses(VOCABULARY))
        everything = dense(teacher, ids, keys, views)
    (own,) = reduce_views(student, spec, ids, keys, views, Classes(top))
    ours = gradients(student, divergence(own, told, "reverse_kl"))
    plain = gradients(student, divergence(dense(student, ids, keys, views), everything, "reverse_kl"))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_several_reductions_of_the_same_logits_are_one_forward(pair: Any) -> None:
    student, teacher, spec = pair
    ids, keys, views = batch()
    targets = ids[:, None, -CANVAS:].expand_as(views.scored)[views.scored]
    states = states_of(teacher, spec, ids, keys, views)
    both = Together([Targets(targets, temperature=0.5), Divergence(states, lambda h: logits_of(teacher, h))])
    log_probs, entropies, right, apart = reduce_views(student, spec, ids, keys, views, both)
    plain = dense(student, ids, keys, views)
    cool = dense(student, ids, keys, views, 0.5)
    torch.testing.assert_close(log_probs, plain.gather(-1, targets[:, None])[:, 0], rtol=0, atol=1e-12)
    torch.testing.assert_close(entropies, -(cool.exp() * cool).sum(-1), rtol=0, atol=1e-12)
    assert torch.equal(right.bool(), plain.argmax(-1) == targets) and not right.requires_grad
    with torch.no_grad():
        told = dense(teacher, ids, keys, views)
    expected = divergence(plain, told, "reverse_kl") - 0.3 * plain.gather(-1, targets[:, None])[:, 0]
    ours, wanted = gradients(student, apart - 0.3 * log_probs), gradients(student, expected)
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    (everything,) = reduce_views(student, spec, ids, keys, views, LogSoftmax())
    torch.testing.assert_close(everything, plain, rtol=0, atol=1e-12)


def test_equal_inputs_are_fed_once(pair: Any) -> None:
    student, _, spec = pair
    ids, keys, views = batch(views=1)
    twice = Views(views.hidden.repeat(1, 2, 1), views.weight.repeat(1, 2, 1))
    fed: list[int] = []
    hook = student.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: fed.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    try:
        with torch.no_grad():
            shared = reduce_views(student, spec, ids, keys, twice, LogSoftmax())[0]
            apart = reduce_views(student, spec, ids, keys, twice, LogSoftmax(), share=False)[0]
    finally:
        hook.remove()
    assert fed == [3, 6]
    torch.testing.assert_close(shared, apart, rtol=0, atol=1e-12)


@pytest.mark.parametrize("build", [tiny_dream, tiny_sdar, tiny_diffusion_gemma])
def test_other_families_reduce_what_they_score(build: Callable[..., Any]) -> None:
    """Shifted logits, blocks given finished ones, and canvases over an encoded prefix."""
    model = attach_scoring(build(dtype=torch.float64))
    spec, vocabulary = DiffusionSpec.of(model), model.config.get_text_config().vocab_size
    ids = torch.randint(8, min(30, vocabulary), (2, 4 + 8), generator=torch.Generator().manual_seed(0))
    keys = torch.ones_like(ids, dtype=torch.bool)
    hidden = torch.zeros(2, 2, 12, dtype=torch.bool)
    hidden[:, 0, 4::2] = hidden[:, 1, 5::2] = True
    noise = None if spec.noise == "mask" else torch.randint(8, 20, hidden.shape)
    views = Views(hidden, hidden[..., 4:].double(), noise)
    targets = ids[:, None, 4:].expand(2, 2, 8)[views.scored]
    plain = score_views(model, spec, ids, keys, views)
    for one_view in (False, True):
        found = reduce_views(model, spec, ids, keys, views, Targets(targets), one_view=one_view)
        torch.testing.assert_close(found[0], plain.log_probs[views.scored])
        torch.testing.assert_close(found[1], plain.entropies[views.scored])


class Largest(TorchDispatchMode):
    """The largest tensor that is made, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return found


@pytest.mark.parametrize("positions", [24, 96])
def test_no_tensor_is_larger_than_a_chunk(monkeypatch: pytest.MonkeyPatch, positions: int) -> None:
    """Of twice the positions and more: logits of eight of them are what exists at once, in both passes."""
    vocabulary, size = 5000, 8
    student = attach_scoring(tiny_llada(vocab_size=vocabulary, hidden_size=8))
    spec = DiffusionSpec.of(student)
    monkeypatch.setattr("rl4dlm.models.scoring.CHUNK_ELEMENTS", size * vocabulary)
    ids = torch.randint(7, 100, (1, 2 + positions), generator=torch.Generator().manual_seed(0))
    keys, hidden = torch.ones_like(ids, dtype=torch.bool), torch.zeros(1, 1, 2 + positions, dtype=torch.bool)
    hidden[..., 2:] = True
    views = Views(hidden, hidden[..., 2:].double())
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with Largest() as largest:
        states = states_of(student, spec, ids, keys, views)
        reduction = Divergence(states * 0.9, lambda h: logits_of(student, h), "jsd")
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            (found,) = reduce_views(student, spec, ids, keys, views, reduction)
        found.sum().backward()
    assert largest.elements == size * vocabulary
    weights = max(p.numel() for p in student.parameters())
    assert max(kept) <= max(weights, positions * 8 * 64)  # nothing of the vocabulary's width is kept between passes


def test_limits_of_a_position_and_of_entries(pair: Any) -> None:
    """d-OPSD's code limits entries of the sum, which turns the gradient away from the teacher; ours does not."""
    logits = torch.tensor([0.5, 0.4, 0.1], dtype=torch.float64).log().requires_grad_()
    teacher = torch.tensor([0.1, 0.6, 0.3], dtype=torch.float64).log()

    def run(**limits: Any) -> tuple[float, Tensor]:
        value = divergence(logits.log_softmax(-1), teacher, "reverse_kl", **limits)
        return value.item(), torch.autograd.grad(value, logits)[0]

    plain, towards = run()
    assert plain == pytest.approx(0.533, abs=1e-3)
    entries, turned = run(limit=0.05, by_entry=True)
    assert entries == pytest.approx(-0.22, abs=5e-3)
    assert torch.cosine_similarity(turned, towards, dim=0).item() == pytest.approx(-0.87, abs=5e-3)
    for limit in (0.05, 0.5, 0.6):
        value, slope = run(limit=limit)
        assert value == min(plain, limit) and float(slope @ towards) >= 0


def test_centred_logits_and_their_gradients(pair: Any) -> None:
    student, _, spec = pair
    ids, keys, views = batch()
    found = score_views(student, spec, ids, keys, views, of="centred_logit").log_probs
    plain = dense(student, ids, keys, views)  # logits up to a constant at each position
    targets = ids[:, None, -CANVAS:].expand_as(views.scored)[views.scored]
    expected = (plain - plain.mean(-1, keepdim=True)).gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(found[views.scored], expected, rtol=0, atol=1e-12)
    for ours, wanted in zip(gradients(student, found[views.scored]), gradients(student, expected), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-10)
    plain = dense(student, ids, keys, views)
    expected = (plain - plain.mean(-1, keepdim=True)).gather(-1, targets[:, None])[:, 0]
    twice = Views(views.hidden.repeat(1, 2, 1), views.weight.repeat(1, 2, 1))  # tokens that share a state
    both = score_views(student, spec, ids, keys, twice, of="centred_logit")
    value = (both.log_probs[twice.scored] + 0.3 * both.entropies[twice.scored]).sum()
    ours = torch.autograd.grad(value, list(student.parameters()))
    entropies = -(plain.exp() * plain).sum(-1)
    wanted = torch.autograd.grad(2 * (expected + 0.3 * entropies).sum(), list(student.parameters()))
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_what_is_refused(pair: Any) -> None:
    student, _, spec = pair
    ids, keys, views = batch()
    with pytest.raises(ValueError, match="divergence='kl' is not allowed"):
        divergence(torch.zeros(2), torch.zeros(2), "kl")
    with pytest.raises(ValueError, match="score_of='logit' is not allowed"):
        score_views(student, spec, ids, keys, views, of="logit")
    with pytest.raises(ValueError, match="HiddenStates is about states"):
        distributions.HiddenStates()(torch.zeros(1, 3), slice(0, 1))
    with pytest.raises(ValueError, match="no PositionReduction"):
        student(
            input_ids=ids, score_positions=torch.ones_like(ids, dtype=torch.bool), score_in_turn=3,
            score_reduce=lambda logits, part: (logits,),
        )  # fmt: skip
