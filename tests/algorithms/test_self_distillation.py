"""Self-distillation: states, teachers and losses against plain logits, what published methods set, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from rl4dlm import SelfDistillationConfig, SelfDistillationTrainer, tiny_llada
from rl4dlm.likelihood.masks import RowNoise
from rl4dlm.likelihood.student_states import StudentStates, teacher_views
from rl4dlm.likelihood.views import Rows, Views
from rl4dlm.models.distributions import divergence
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.training.moving_reference import REFERENCE_FILE, load_reference
from rl4dlm.training.trainer import rows_of
from tests.models.float64 import exactly_float64

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

PROMPT, CANVAS, BLOCK, MASK = 3, 8, 4, 2
SAME: dict[str, Any] = {"teacher_view": "same"}


def rows(count: int = 4, ends: bool = True) -> Rows:
    """Completions that were written two tokens a step in a known order; the last ones end early."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(7, 20, (count, PROMPT + CANVAS), generator=generator)
    valid = torch.ones(count, CANVAS, dtype=torch.bool)
    if ends:
        valid[-1, 5:] = False
    order = torch.stack([torch.cat([torch.randperm(4, generator=generator) // 2 + b for b in (0, 2)]) for _ in ids])
    mask = torch.ones(count, PROMPT, dtype=torch.bool)
    return Rows(ids[:, :PROMPT], mask, ids[:, PROMPT:], valid, torch.arange(count), commit_step=order)


def hidden_of(views: Views) -> Tensor:
    return views.hidden[..., PROMPT:]


# --- states -----------------------------------------------------------------------------------------------------------


def test_complements_hide_and_score_every_token_once() -> None:
    batch = rows()
    for settings in ({}, {"states": "recorded"}, {"block_length": BLOCK}):
        views = StudentStates(2, complement=True, share_range=(0.3, 0.8), **settings).draw(batch, seed=0, iteration=0)
        once = views.weight.sum(1)
        own = batch.valid if "block_length" not in settings else views.scored.any(1)
        assert torch.equal(once, own.double())
        assert bool((hidden_of(views) | ~views.scored).all())
        if "block_length" in settings:
            block = views.scored.any(1)
            assert bool((block.sum(-1) <= BLOCK).all())
            behind = (torch.arange(CANVAS) > (block * torch.arange(CANVAS)).amax(-1, keepdim=True)) | ~batch.valid
            assert bool(hidden_of(views)[:, 0][behind].all()) and not views.scored[:, 0][behind].any()


def test_recorded_states_are_those_that_the_completion_went_through() -> None:
    batch = rows(ends=False)
    views = StudentStates(6, "recorded").draw(batch, seed=0, iteration=0)
    assert batch.commit_step is not None
    step = batch.commit_step[:, None].expand(-1, 6, -1)
    for row in range(len(batch)):
        for view in range(6):
            hidden = hidden_of(views)[row, view]
            first = int(step[row, view][hidden].min())
            assert torch.equal(hidden, batch.commit_step[row] >= first)
    following = StudentStates(6, "recorded", positions="next").draw(batch, seed=0, iteration=0)
    assert torch.equal(following.hidden, views.hidden)
    first = step.masked_fill(~hidden_of(views), 99).amin(-1, keepdim=True)
    assert torch.equal(following.scored, step == first)


def test_shares_of_blocks_never_fall() -> None:
    states = StudentStates(3, "rising", share_range=(0.2, 0.7), block_length=2)
    batch = rows(64, ends=False)
    noise = RowNoise(batch, 0, 0)
    shares = states.rising_shares(0.2 + 0.5 * noise.per_view("a", 3), noise.per_token("b", 3))
    assert bool((shares[..., 1:] >= shares[..., :-1]).all()) and float(shares.max()) <= 1
    assert float((shares[..., 1:] - shares[..., :-1]).max()) <= 0.7
    hidden = hidden_of(states.draw(batch, seed=0, iteration=0)).double().view(64, 3, 4, 2).mean((0, 1, 3))
    assert bool((hidden.diff() > 0).all())


def test_states_depend_on_seed_row_and_iteration_alone() -> None:
    states, batch = StudentStates(2, "random", block_length=BLOCK), rows(6)
    whole = states.draw(batch, seed=0, iteration=1)
    part = states.draw(batch[torch.tensor([4, 1])], seed=0, iteration=1)
    assert torch.equal(whole.hidden[[4, 1]], part.hidden) and torch.equal(whole.weight[[4, 1]], part.weight)
    assert not torch.equal(states.draw(batch, seed=0, iteration=2).hidden, whole.hidden)


def test_what_teachers_see() -> None:
    batch = rows(16, ends=False)
    views = StudentStates(2, "recorded", share_range=(0.9, 1.0)).draw(batch, seed=0, iteration=0)
    noise = RowNoise(batch, 0, 0)

    def seen(kind: str, low: float, high: float) -> Tensor:
        shown = teacher_views(views, batch, noise, kind, (low, high), BLOCK)
        assert torch.equal(shown.weight, views.weight) and not (shown.hidden & ~views.hidden).any()
        return hidden_of(views) & ~hidden_of(shown)

    for kind in ("same", "later"):
        assert not seen(kind, 1.0, 1.0).any()
    assert not seen("suffix", 0.0, 0.0).any()  # suffix of nothing is the same
    assert not seen("suffix", 1.0, 1.0)[..., :BLOCK].any() and bool(seen("suffix", 1.0, 1.0)[..., BLOCK:].all())
    assert torch.equal(seen("suffix", 0.5, 0.5).sum(-1), torch.full((16, 2), 2))
    assert torch.equal(seen("subset", 0.0, 0.0), hidden_of(views)) and not seen("subset", 1.0, 1.0).any()


# --- the trainer ------------------------------------------------------------------------------------------------------


def build(make_trainer: Any, **settings: Any) -> Any:
    model = settings.pop("model", None)
    model = exactly_float64(tiny_llada(initializer_range=0.2, dtype=torch.float64)) if model is None else model
    common = {"max_grad_norm": 0.0, "num_iterations": 1, "max_steps": 1}
    return make_trainer(model, trainer=SelfDistillationTrainer, config=SelfDistillationConfig, **{**common, **settings})


def batch_of(trainer: Any) -> dict[str, Any]:
    """A batch of rollouts, before the first step."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    inputs = [{"prompt": text} for text in ["abc0", "abc0", "abc0", "abc0", "de1", "de1", "de1", "de1"]]
    batch: dict[str, Any] = trainer._generate_and_score_completions(inputs)
    return batch


def loss_and_gradient(trainer: Any, batch: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    loss = trainer._compute_loss(trainer.model, dict(batch))
    wanted = [p for p in trainer.model.parameters() if p.requires_grad]
    return loss.detach(), list(torch.autograd.grad(loss, wanted))


def plain(trainer: Any, model: Any, batch: dict[str, Any], views: Views, hidden: Tensor | None = None) -> Tensor:
    """Log-probabilities `[n, V]` where views score, from the model's own logits."""
    found, batch_rows = [], rows_of(batch)
    shown = views.hidden if hidden is None else hidden
    positions = (batch_rows.attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    for b in range(len(batch_rows)):
        for k in range(views.hidden.shape[1]):
            noised = torch.where(shown[b, k], trainer.spec.mask_token_id, batch_rows.ids[b])[None]
            keys = batch_rows.attention_mask[b : b + 1].long()
            logits = model(input_ids=noised, attention_mask=keys, position_ids=positions[b : b + 1]).logits
            found.append(logits[0, -views.weight.shape[2] :][views.scored[b, k]].log_softmax(-1))
    return torch.cat(found)


def mean_of(batch: dict[str, Any], views: Views, values: Tensor) -> Tensor:
    """The mean over rows of the means over what counts of each."""
    placed = values.new_zeros(views.weight.shape).masked_scatter(views.scored, values)
    return (placed.sum((1, 2)) / views.weight.sum((1, 2)).clamp(min=1)).mean()


@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("teacher", ["policy", "reference"])
def test_a_teacher_that_is_the_student_teaches_nothing(make_trainer: Any, teacher: str, top_k: int | None) -> None:
    trainer = build(make_trainer, teacher=teacher, distill_top_k=top_k, **SAME)
    loss, gradient = loss_and_gradient(trainer, batch_of(trainer))
    near = 1e-12 if teacher == "policy" else 1e-6  # the copy has rotary angles in float32
    assert abs(loss.item()) < 1e-12 and max(float(g.abs().max()) for g in gradient) < near
    assert (trainer.ref_model is None) == (teacher == "policy")


def test_one_step_of_the_teacher_is_the_identity_and_several_are_not(make_trainer: Any) -> None:
    trainer = build(make_trainer, teacher_steps=1)
    batch = batch_of(trainer)
    loss, gradient = loss_and_gradient(trainer, batch)
    assert abs(loss.item()) < 1e-12 and max(float(g.abs().max()) for g in gradient) < 1e-6
    trainer.args.teacher_steps = 2
    loss, gradient = loss_and_gradient(trainer, batch)
    assert loss.item() > 1e-4 and max(float(g.abs().max()) for g in gradient) > 1e-5


def test_two_steps_of_the_teacher_are_those_made_by_hand(make_trainer: Any) -> None:
    """Half of what is hidden is written by its arg-max, the surest first; targets are of the step that wrote them."""
    trainer = build(make_trainer, teacher="policy", distill_top_k=200, divergence="forward_kl", share_range=[0.6, 1.0])
    batch = batch_of(trainer)
    views = trainer._draw(rows_of(batch), 0)
    with torch.no_grad():
        first = plain(trainer, trainer.model, batch, views)
        told, after = first.clone(), rows_of(batch)
        place = views.scored.nonzero()
        ids = after.ids.clone()
        hidden = views.hidden[:, 0].clone()
        for row in range(len(after)):
            mine = (place[:, 0] == row).nonzero().squeeze(-1)
            allowed = first[mine].index_fill(-1, torch.tensor([trainer.spec.mask_token_id]), -torch.inf)
            sure, best = allowed.softmax(-1).max(-1)
            chosen = sure.argsort(descending=True, stable=True)[: -(len(mine) // -2)]
            slots = place[mine][chosen][:, 2] + after.ids.shape[1] - after.canvas_ids.shape[1]
            ids[row, slots], hidden[row, slots] = best[chosen], False
            keys = after.attention_mask[row : row + 1]
            positions = (keys.long().cumsum(-1) - 1).clamp(min=0)
            noised = torch.where(hidden[row], trainer.spec.mask_token_id, ids[row])[None]
            logits = trainer.model(input_ids=noised, attention_mask=keys.long(), position_ids=positions).logits[0]
            rest = [m for i, m in enumerate(mine.tolist()) if i not in chosen.tolist()]
            columns = place[rest][:, 2] + after.ids.shape[1] - after.canvas_ids.shape[1]
            told[rest] = logits[columns].log_softmax(-1)
    expected = mean_of(batch, views, divergence(plain(trainer, trainer.model, batch, views), told, "forward_kl"))
    loss, _ = loss_and_gradient(trainer, batch)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-10) and loss.item() > 1e-4


@pytest.mark.parametrize("one_view", [False, True])
@pytest.mark.parametrize("settings", [{"distill_top_k": None}, {"distill_top_k": 3, "renormalize": True}])
def test_an_adapter_learns_from_the_model_without_it(make_trainer: Any, settings: Any, one_view: bool) -> None:
    """Gradients of the adapter against those of plain logits; the teacher sees more of the answer."""
    adapter = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    settings = {**settings, "teacher_view": "suffix", "teacher_share": [1.0, 1.0], "block_length": BLOCK}
    weights = {"hard_weight": 0.3, "entropy_weight": 0.2, "entropy_temperature": 0.5, "distill_temperature": 2.0}
    more = {"states": "recorded", "num_views": 2, "one_view": one_view, "peft_config": adapter}
    trainer = build(make_trainer, **settings, **weights, **more)
    assert trainer.ref_model is None
    trainer.model.double()
    batch = batch_of(trainer)
    views = trainer._draw(rows_of(batch), 0)
    shown = trainer._shown(rows_of(batch), views)
    assert not torch.equal(shown.hidden, views.hidden)
    loss, gradient = loss_and_gradient(trainer, batch)
    with torch.no_grad(), trainer.model.disable_adapter():
        teacher = (plain(trainer, trainer.model, batch, views, shown.hidden) / 2).log_softmax(-1)
    student = plain(trainer, trainer.model, batch, views)
    targets = rows_of(batch).canvas_ids[:, None].expand(views.scored.shape)[views.scored]
    own, told = (student / 2).log_softmax(-1), teacher
    if settings["distill_top_k"]:
        best = teacher.topk(3).indices
        own, told = own.gather(-1, best).log_softmax(-1), teacher.gather(-1, best).log_softmax(-1)
    cool = (student / 0.5).log_softmax(-1)
    entropies = -(cool.exp() * cool).sum(-1)
    values = 4 * divergence(own, told, "reverse_kl") - 0.3 * student.gather(-1, targets[:, None])[:, 0]
    values = values + 0.2 * entropies * (student.argmax(-1) == targets)
    expected = mean_of(batch, views, values)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-10)
    wanted = torch.autograd.grad(expected, [p for p in trainer.model.parameters() if p.requires_grad])
    assert any(float(g.abs().max()) > 1e-4 for g in wanted)
    for found, right in zip(gradient, wanted, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-7, atol=1e-10)


def test_a_contrast_with_the_teachers_most_probable_token(make_trainer: Any) -> None:
    trainer = build(make_trainer, divergence="ddo", ddo_scale=0.4, ddo_negative_weight=0.7, states="recorded", **SAME)
    for p in trainer.model.parameters():
        p.data.mul_(1.1)  # or log-ratios are zero
    batch = batch_of(trainer)
    views = trainer._draw(rows_of(batch), 0)
    targets = rows_of(batch).canvas_ids[:, None].expand(views.scored.shape)[views.scored]
    with torch.no_grad():
        teacher, student = (plain(trainer, m, batch, views) for m in (trainer.ref_model, trainer.model))
    z = teacher.argmax(-1)
    gap = [0.4 * (student - teacher).gather(-1, ids[:, None])[:, 0] for ids in (targets, z)]
    values = -gap[0].sigmoid().log() - 0.7 * (z != targets) * (1 - gap[1].sigmoid()).log()
    assert loss_and_gradient(trainer, batch)[0].item() == pytest.approx(mean_of(batch, views, values).item(), abs=1e-7)


def test_hard_targets_need_no_teacher(make_trainer: Any) -> None:
    """dParallel's settings: a block and its complement, cross-entropy, and the entropy of what is right."""
    trainer = build(
        make_trainer, divergence="none", hard_weight=1.0, entropy_weight=2.0, entropy_temperature=0.5,
        block_states=True, block_length=BLOCK, share_range=[0.5, 0.5], complement=True, num_views=2,
        teacher_view="same",
    )  # fmt: skip
    assert trainer.ref_model is None
    trainer.train()
    assert trainer.state.log_history[0]["distillation/nll"] > 0


def test_the_surest_positions_of_the_teacher_count(make_trainer: Any) -> None:
    trainer = build(make_trainer, positions="surest", num_positions=2, distill_top_k=5, **SAME)
    batch = batch_of(trainer)
    views = trainer._draw(rows_of(batch), 0)
    assert torch.equal(views.scored.sum(-1), trainer.estimator.draw(
        rows_of(batch), seed=trainer.args.seed, iteration=0
    ).scored.sum(-1).clamp(max=2))  # fmt: skip


def halves(completions: list[str], **columns: Any) -> list[float]:
    return [float(sum(map(ord, text)) % 2) for text in completions]


def test_only_rewarded_completions_are_learnt_from(make_trainer: Any) -> None:
    trainer = build(make_trainer, rewards=halves, rewarded_from=1.0, hard_weight=1.0, divergence="none", **SAME)
    batch = batch_of(trainer)
    learnt = batch["learnt"]
    assert 0 < int(learnt.sum()) < len(learnt)
    loss, _ = loss_and_gradient(trainer, batch)
    everything, _ = loss_and_gradient(trainer, {**batch, "learnt": torch.ones_like(learnt)})
    views = trainer._draw(rows_of(batch), 0)
    targets = rows_of(batch).canvas_ids[:, None].expand(views.scored.shape)[views.scored]
    with torch.no_grad():
        nll = -plain(trainer, trainer.model, batch, views).gather(-1, targets[:, None])[:, 0]
    counts = learnt.repeat_interleave(views.scored.sum((1, 2)))
    assert loss.item() == pytest.approx(mean_of(batch, views, nll * counts).item(), abs=1e-10)
    assert everything.item() == pytest.approx(mean_of(batch, views, nll).item(), abs=1e-10)


@pytest.mark.parametrize("adapter", [False, True])
def test_completions_may_be_the_references(make_trainer: Any, adapter: bool) -> None:
    lora = LoraConfig(r=2, lora_alpha=64, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    more = {"peft_config": lora} if adapter else {}
    base = tiny_llada(initializer_range=0.2)
    trainer = build(make_trainer, model=base, rollouts_by="teacher", **SAME, **more)
    plain_trainer = build(make_trainer, model=tiny_llada(initializer_range=0.2), **SAME)
    if not adapter:
        with torch.no_grad():
            for p in trainer.model.parameters():
                p.mul_(-1.0)  # the policy is another one by now
    for each in (trainer, plain_trainer):
        each.model.train()
    expected = plain_trainer.rollout(["abc0", "de1"])
    assert torch.equal(trainer.rollout(["abc0", "de1"]).canvas, expected.canvas)
    trainer.args.rollouts_by = "policy"
    own = trainer.rollout(["abc0", "de1"]).canvas
    assert not torch.equal(own, expected.canvas)
    # It is the policy that is evaluated, whoever wrote what it learns from.
    trainer.model.eval()
    trainer.args.rollouts_by, row = "policy", trainer._eval_rows
    own = trainer.rollout(["abc0", "de1"]).canvas
    trainer.args.rollouts_by, trainer._eval_rows = "teacher", row
    assert torch.equal(trainer.rollout(["abc0", "de1"]).canvas, own)


def test_rounds_and_moving_averages_are_trls(make_trainer: Any) -> None:
    more = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 1.0, "max_steps": 2}
    trainer = build(make_trainer, hard_weight=1.0, **SAME, **more)
    trainer.train()
    for p, q in zip(trainer.model.parameters(), trainer.ref_model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_run_that_is_resumed_has_the_reference_that_it_had(make_trainer: Any, tmp_path: Path) -> None:
    more: dict[str, Any] = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5, **SAME}
    more |= {"hard_weight": 1.0, "max_steps": 4, "save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-2}
    whole = build(make_trainer, **more)
    whole.train()
    checkpoint = Path(whole.args.output_dir) / "checkpoint-3"
    assert (checkpoint / REFERENCE_FILE).is_file()
    resumed = build(make_trainer, **more)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for owner in ("model", "ref_model"):
        pairs = zip(getattr(whole, owner).parameters(), getattr(resumed, owner).parameters(), strict=True)
        assert all(torch.equal(p, q) for p, q in pairs), owner
    other = {f"x.{name}": value for name, value in load_file(checkpoint / REFERENCE_FILE).items()}
    save_file(other, tmp_path / REFERENCE_FILE)
    with pytest.raises(ValueError, match="of another reference model"):
        load_reference(whole.ref_model, tmp_path)
    (tmp_path / REFERENCE_FILE).unlink()
    assert not load_reference(whole.ref_model, tmp_path)


def test_a_student_with_blocks_learns_from_a_teacher_without(make_trainer: Any, tmp_path: Path) -> None:
    """D2F: the student sees its own and earlier blocks, noisy as they are; it is saved with that attention."""
    trainer = build(
        make_trainer, states="rising", share_range=[0.2, 0.7], student_attention="block_causal", block_length=BLOCK,
        rollouts_by="teacher", divergence="forward_kl", distill_top_k=None, teacher_view="same",
    )  # fmt: skip
    batch = batch_of(trainer)
    views = trainer._draw(rows_of(batch), 0)
    with torch.no_grad():
        teacher = plain(trainer, trainer.ref_model, batch, views)
    found, batch_rows = [], rows_of(batch)
    prompt = batch_rows.prompt_ids.shape[1]
    place = torch.arange(batch_rows.ids.shape[1]) - prompt
    block = torch.where(place < 0, -1, place // BLOCK)
    for b in range(len(batch_rows)):
        keys = batch_rows.attention_mask[b]
        before = (place[None] < 0) & (place[:, None] < 0)
        # the grid goes on to the left of the response, through the prompt
        grid = place.div(BLOCK, rounding_mode="floor")
        seen = (grid[None] <= grid[:, None]) & keys[None]
        assert bool((seen | ~before | ~keys[None] | (grid[None] > grid[:, None])).all()) and block[-1] == 1
        noised = torch.where(views.hidden[b, 0], MASK, batch_rows.ids[b])[None]
        positions = (keys.long().cumsum(-1) - 1).clamp(min=0)[None]
        logits = trainer.model(input_ids=noised, attention_mask=seen[None, None], position_ids=positions).logits
        found.append(logits[0, prompt:][views.scored[b, 0]].log_softmax(-1))
    expected = mean_of(batch, views, divergence(torch.cat(found), teacher, "forward_kl"))
    assert loss_and_gradient(trainer, batch)[0].item() == pytest.approx(expected.item(), abs=1e-9)
    assert expected.item() > 1e-3
    trainer.model.eval()
    assert len(trainer.rollout(["abc0", "de1"])) == 2  # evaluation is the student's
    trainer.train()
    spec = DiffusionSpec.of(trainer.model)
    assert (spec.attention, spec.block_length) == ("block_causal", BLOCK)


def test_d_opsd_trains(make_trainer: Any) -> None:
    trainer = build(
        make_trainer, rewards=halves, rewarded_from=1.0, states="recorded", positions="surest", num_positions=2,
        block_states=True, block_length=BLOCK, teacher_view="suffix", teacher_share=[0.25, 0.25],
        divergence="reverse_kl", distill_top_k=20, renormalize=True, divergence_limit=1.0, num_views=2, max_steps=2,
    )  # fmt: skip
    trainer.train()
    log = trainer.state.log_history[0]
    assert 0 < log["distillation/learnt_share"] < 1 and log["distillation/divergence"] >= 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"states": "last"}, "states='last' is not allowed"),
        ({"teacher_view": "later", "distill_top_k": None}, "distill_top_k=None is not allowed with teacher_view"),
        ({"divergence": "none"}, "divergence='none' leaves nothing to learn from"),
        ({"divergence": "kl"}, "divergence='kl' is not allowed"),
        ({"states": "rising"}, "states='rising' need blocks: set block_length"),
        ({"positions": "next"}, "positions='next' is not allowed with states='random'"),
        ({"complement": True}, "num_views=1 is not allowed with complement=True"),
        ({"teacher_view": "same", "teacher_steps": 3}, "teacher_steps=3 is not supported: it has no effect"),
        ({"teacher_share": [0.1, 0.2]}, "it has no effect with teacher_view='later'"),
        ({"ddo_scale": 0.3}, "ddo_scale=0.3 is not supported"),
        ({"limit_entries": True}, "limit_entries=True is not supported: it has no effect with divergence_limit=None"),
        ({"divergence_limit": 0.0}, "divergence_limit=0.0 is not allowed"),
        ({"teacher_written": 0.0}, "teacher_written=0.0 is not allowed"),
        ({"student_attention": "causal"}, "student_attention='causal' is not allowed"),
        ({"student_attention": "block_causal"}, "it needs completions and distributions of a reference"),
        ({"beta": 0.1}, "there is no KL term; set divergence"),
        ({"disable_dropout": False}, "disable_dropout=False is not supported"),
        ({"negative_advantage_weight": 0.0}, "completions are learnt from or not"),
    ],
)
def test_what_is_refused(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as error:
        SelfDistillationConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, block_length=None, **settings)
    assert said in str(error.value)


def test_an_adapter_on_the_head_needs_classes(make_trainer: Any) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match="distill_top_k=None is not supported with modules_to_save for the head"):
        build(make_trainer, distill_top_k=None, peft_config=lora, model=tiny_llada(), **SAME)
    assert build(make_trainer, distill_top_k=4, peft_config=lora, model=tiny_llada(), **SAME).ref_model is None


def test_steps_of_the_teacher_that_have_nothing_left_to_write(make_trainer: Any) -> None:
    trainer = build(make_trainer, teacher_steps=4, share_range=[0.0, 0.0])
    batch = batch_of(trainer)
    views = trainer._draw(rows_of(batch), 0)
    assert bool((views.scored.sum(-1) == 1).all())
    loss = loss_and_gradient(trainer, batch)[0]
    trainer.args.teacher_steps = 1
    assert loss.item() == pytest.approx(loss_and_gradient(trainer, batch)[0].item(), abs=1e-12)
