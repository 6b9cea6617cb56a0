"""Self-distillation: a denoiser learns to say at once what it, or its reference, says with more steps or more context.

A state x of one of the policy's (or the reference's) own completions y is shown to the student; the teacher sees a view
x' of the same sequence. With p_i the student's and q_i the teacher's distribution at position i, T a temperature, and
H_i the entropy of p_i, the loss of a completion is the mean over the positions that count of

    w T^2 D(p_i, q_i)  +  h (-log p_i(y_i))  +  e 1[argmax p_i = y_i] H_i

and that of a batch the mean over completions, in which those that are not learnt from (`rewarded_from`) are zeros. What
published methods choose:

    SDTT         random states; the teacher writes in m steps, and q_i is its distribution at the step that wrote i, or
                 at the last one; reverse KL; rounds in which the teacher becomes the student and steps double
    d-OPSD       recorded states; the teacher also sees a quarter of the answer behind the next block; reverse KL over
                 the teacher's 20 most probable tokens, at the two positions that it is surest of; right answers only
    T3D          recorded states; `ddo`: -log sigmoid(b (l(y) - l'(y))) - a log(1 - sigmoid(b (l(z) - l'(z)))), l' the
                 teacher's log-probabilities and z its most probable token
    dParallel    one block half hidden, and its complement; no teacher; cross-entropy, and entropy where it is right
    d3LLM        the same with recorded states, of completions that the reference wrote one token at a time
    D2F          shares that rise from block to block; the student sees its own and earlier, noisy blocks, the teacher
                 everything; forward KL
    CD4LM        random states; the teacher sees some of what is hidden; KL and cross-entropy

One file for all: what differs are settings (`rl4dlm.training.self_distillation`), and `configs/self_distillation/`.

Decided differently from the released code of these:
- States are of the model's own completions in a loop of rollouts; SDTT, D2F and CD4LM take a corpus there.
- A divergence is limited as a whole: limiting entries of its sum, as d-OPSD's code does, can turn the gradient away
  from the teacher (`limit_entries` does that). Its positions are chosen by probability, there by logit.
- The second term of `ddo` leaves out positions where z is y: it would make what was written unlikely. T3D's preference
  for states with all hidden is not offered, nor its weights of early tokens.
- D2F's weights 1 / share are not taken.
- Several steps of a teacher are compared through its `distill_top_k` most probable tokens, the others as one class,
  which bounds the divergence from below; one step (m = 1) is the state itself. SDTT's times have a slip there that
  only changes how many tokens a step writes.
- The entropy's positions, and the completions of dParallel and d3LLM, are as they are, not filtered by length.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import trl.trainer.grpo_trainer as grpo
from peft.utils import ModulesToSaveWrapper
from torch import Tensor
from torch.nn.functional import logsigmoid

from rl4dlm.likelihood.estimator import Estimator
from rl4dlm.likelihood.masks import RowNoise
from rl4dlm.likelihood.scoring import ViewScores, reduce_views
from rl4dlm.likelihood.student_states import teacher_views
from rl4dlm.likelihood.views import Rows, Views
from rl4dlm.models.distributions import (
    DIVERGENCES,
    Classes,
    Divergence,
    Draws,
    HiddenStates,
    PositionReduction,
    Targets,
    Together,
    TopClasses,
    divergence,
    renormalised,
)
from rl4dlm.models.scoring import logits_of
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.rollout.backends.backend import RolloutBackend
from rl4dlm.rollout.rollout import Rollout
from rl4dlm.training.loss_parts import PolicyScores
from rl4dlm.training.self_distillation import SelfDistillationConfig
from rl4dlm.training.setup import base_model, of_noise, swapped
from rl4dlm.training.trainer import DiffusionPolicyConfig, DiffusionPolicyTrainer

__all__ = ["SelfDistillationConfig", "SelfDistillationTrainer"]


class Told(NamedTuple):
    """What a teacher says at the n positions that count; None what it was not asked for."""

    classes: Tensor | None = None  # [n, k + 1], log-probabilities of its k most probable tokens, and of the others
    ids: Tensor | None = None  # long [n, k], these tokens
    states: Tensor | None = None  # [n, D], what its head is applied to
    targets: Tensor | None = None  # [n], log-probabilities of the completion's tokens


def no_reward(completions: list[str], **columns: Any) -> list[float]:
    """Zeros, where completions are learnt from whatever they are worth."""
    return [0.0] * len(completions)


class SelfDistillationTrainer(DiffusionPolicyTrainer):
    """Self-distillation in TRL's GRPO loop; `SelfDistillationConfig` has its settings, the module's docstring the rest.

    Args:
        reward_funcs: may be None where `rewarded_from` is.

    Raises:
        ValueError: as `DiffusionPolicyTrainer`; a teacher whose head cannot be asked beside the student's.
    """

    config_class = SelfDistillationConfig
    args: SelfDistillationConfig
    uses_old_policy = False
    advantages_read_scores = False
    per_iteration = ()
    _iteration = 0
    _tag_names = ["trl", "rl4dlm", "self-distillation"]  # noqa: RUF012  (TRL's own form)
    _name = "self-distillation"
    _paper = {  # noqa: RUF012  (TRL's own form)
        "title": "Beyond Autoregression: Fast LLMs via Self-Distillation Through Time",
        "id": "2410.21035",
    }

    def __init__(self, model: Any, reward_funcs: Any = None, args: Any = None, *rest: Any, **kwargs: Any) -> None:
        args = self.config_class() if args is None else args
        if kwargs.get("credit") is not None:
            raise ValueError("credit is not supported: completions are learnt from or not; there are no advantages")
        if reward_funcs is None and getattr(args, "rewarded_from", None) is None:
            reward_funcs = no_reward
        super().__init__(model, reward_funcs, args, *rest, **kwargs)
        self.teacher_spec = self.spec
        self._check_teacher()
        if args.student_attention is not None:
            block = {"attention": args.student_attention, "block_length": args.block_length}
            self.spec = replace(self.spec, **block)
            base_model(self.model).config.diffusion = self.spec.to_dict()

    def reference_weight(self, args: DiffusionPolicyConfig) -> float:
        """A reference that teaches, or whose completions are learnt from, is there."""
        assert isinstance(args, SelfDistillationConfig)
        needed = args.rollouts_by == "teacher" or (args.teacher == "reference" and args.has_teacher)
        return float(needed)

    def _check_teacher(self) -> None:
        args = self.args
        if args.student_attention is not None and (self.spec.attention != "full" or self.spec.noise != "mask"):
            raise ValueError(
                f"student_attention={args.student_attention!r} is not supported for a model with attention="
                f"{self.spec.attention!r} and noise={self.spec.noise!r}: its teacher sees all; allowed: full, mask"
            )
        if args.states == "recorded" and self.spec.noise != "mask":
            raise ValueError(
                "states='recorded' is not supported for noise='uniform': there is no step that wrote a token"
            )
        if args.divergence not in DIVERGENCES or args.distill_top_k is not None or args.teacher == "policy":
            return
        if self.ref_model is not None and (self._dist.is_zero3 or self.is_fsdp_enabled):
            raise ValueError(
                "distill_top_k=None is not supported where a reference model is sharded, whose head cannot be asked "
                "beside the student's; set distill_top_k"
            )
        head = base_model(self.model).get_output_embeddings()
        if self.ref_model is None and isinstance(head, ModulesToSaveWrapper):
            raise ValueError(
                "distill_top_k=None is not supported with modules_to_save for the head: the teacher's is another one; "
                "set distill_top_k"
            )

    @property
    def needs_masks(self) -> str:  # type: ignore[override]
        """Why models whose noise is random tokens are refused, by settings."""
        later = "a teacher that writes takes the place of masks, of which there are none"
        return later if self.args.teacher_view == "later" and self.args.has_teacher else ""

    def build_estimator(self) -> Estimator:
        """The student's states."""
        return of_noise(self.model, self.args.student_states(self.spec))

    def advantages(self, rewards: Tensor, batch: dict[str, Any]) -> Tensor | None:
        """Notes which completions are learnt from."""
        start = self.accelerator.process_index * len(batch["advantages"])
        if self.args.rewarded_from is not None:
            own = rewards.flatten()[start : start + len(batch["advantages"])]
            batch["learnt"] = own >= self.args.rewarded_from  # NaN is not
        return None

    def rows_that_count(self, batch: dict[str, Any]) -> Tensor | None:
        """Those that are learnt from."""
        return batch.get("learnt")

    def as_drawn(self, scores: PolicyScores, width: int) -> tuple[Tensor, Tensor | None]:
        """Losses are compared with no log-probability."""
        return scores.log_probs, torch.zeros_like(scores.log_probs, dtype=torch.bool)

    def _score_fixed_policies(self, batch: dict[str, Any], iterations: int) -> None:
        for name in ("old_per_token_logps", "ref_per_token_logps"):
            batch.pop(name, None)

    def loss(self, scores: PolicyScores, batch: dict[str, Any]) -> Tensor:
        """The mean over completions of the mean over what counts of each."""
        views, mask = scores.views, batch["completion_mask"]
        assert views is not None and scores.view_log_probs is not None
        count = views.weight.sum((1, 2))
        each = -(scores.view_log_probs * views.weight.to(scores.view_log_probs.dtype)).sum((1, 2)) / count.clamp(min=1)
        counts = mask.any(-1)
        if "learnt" in batch:
            counts = counts & batch["learnt"]
            self.log_mean("distillation/learnt_share", batch["learnt"], torch.ones_like(each))
        self.log_entropy(scores, mask)
        return self.mean_over_rows(each * counts)

    # --- student and teacher ------------------------------------------------------------------------------------------

    def _draw(self, rows: Rows, iteration: int) -> Views:
        self._iteration = iteration
        views = super()._draw(rows, iteration)
        return views if self.args.positions != "surest" else self._surest(rows, views)

    @torch.no_grad()
    def _surest(self, rows: Rows, views: Views) -> Views:
        """Only the positions of each view that the teacher is surest of count."""
        (_, classes) = self._ask(rows, self._shown(rows, views), TopClasses(1), None, None)
        sure = classes.new_full(views.weight.shape, -torch.inf).masked_scatter(views.scored, classes[:, 0])
        rank = sure.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1, stable=True)
        return replace(views, weight=views.weight * (rank < self.args.num_positions))

    def _view_scores(
        self,
        model: Any,
        rows: Rows,
        views: Views,
        rows_per_forward: int | None = None,
        rows_in_step: int | None = None,
    ) -> ViewScores:
        """Minus the losses `[B, K, L]` in the place of log-probabilities."""
        args, scored = self.args, views.scored
        targets = (rows.canvas_ids[:, None].expand_as(scored))[scored]
        told = self._told(rows, views, targets, rows_per_forward, rows_in_step)
        parts: list[PositionReduction] = [Targets(targets, args.entropy_temperature)]
        if told.states is not None:
            limits = args.divergence_limit, args.limit_entries
            parts.append(Divergence(told.states, self._head(), args.divergence, args.distill_temperature, *limits))
        elif told.ids is not None:
            parts.append(Classes(told.ids, args.distill_temperature))
        noisy = args.student_attention is not None
        asked = Together(parts)
        found = self._reduced_views(model, rows, views, asked, rows_per_forward, rows_in_step, noisy_history=noisy)
        log_probs, entropies, right = found[:3]
        losses = -args.hard_weight * log_probs + args.entropy_weight * entropies * right
        if len(found) > 3:
            apart = self._apart(found[3], log_probs, targets, told)
            losses = losses + args.divergence_weight * args.distill_temperature**2 * apart
            self.log_mean("distillation/divergence", apart.detach(), torch.ones_like(apart))
        ones = torch.ones_like(log_probs)
        self.log_mean("distillation/nll", -log_probs.detach(), ones)
        self.log_mean("distillation/agreement", right, ones)

        def placed(values: Tensor) -> Tensor:
            return values.new_zeros(scored.shape).masked_scatter(scored, values)

        return ViewScores(placed(-losses), placed(entropies.detach()))

    def _apart(self, found: Tensor, log_probs: Tensor, targets: Tensor, told: Told) -> Tensor:
        """The first term of the loss `[n]`, before its weights."""
        args = self.args
        if told.states is not None:
            return found
        if args.divergence == "ddo":
            assert told.ids is not None and told.targets is not None and told.classes is not None
            wanted = args.ddo_scale * (log_probs - told.targets)
            unwanted = args.ddo_scale * (found[:, 0] - told.classes[:, 0])
            other = (told.ids[:, 0] != targets).to(wanted.dtype)
            return -logsigmoid(wanted) - args.ddo_negative_weight * other * logsigmoid(-unwanted)
        assert told.classes is not None
        own, teacher = found, told.classes.to(found.dtype)
        if args.renormalize:
            own, teacher = renormalised(own), renormalised(teacher)
        return divergence(own, teacher, args.divergence, args.divergence_limit, args.limit_entries)

    def _shown(self, rows: Rows, views: Views) -> Views:
        args = self.args
        noise = RowNoise(rows, args.seed, self._iteration)
        shares = (args.teacher_share[0], args.teacher_share[1])
        return teacher_views(views, rows, noise, args.teacher_view, shares, self.decoding.block_length)

    @torch.no_grad()
    def _told(
        self, rows: Rows, views: Views, targets: Tensor, rows_per_forward: int | None, rows_in_step: int | None
    ) -> Told:
        """What the teacher says where `views` score."""
        args = self.args
        if args.divergence == "none":
            return Told()
        size = rows_per_forward, rows_in_step
        shown = self._shown(rows, views)
        if args.divergence == "ddo":
            both = Together([Targets(targets), TopClasses(1)])
            own, _, _, ids, classes = self._ask(rows, shown, both, *size)
            return Told(classes, ids, targets=own)
        if args.distill_top_k is None:
            return Told(states=self._ask(rows, shown, HiddenStates(), *size)[0])
        top = TopClasses(args.distill_top_k, args.distill_temperature)
        if args.teacher_view == "later":
            return self._told_later(rows, shown, top, *size)
        ids, classes = self._ask(rows, shown, top, *size)
        return Told(classes, ids)

    def _told_later(
        self, rows: Rows, views: Views, top: TopClasses, rows_per_forward: int | None, rows_in_step: int | None
    ) -> Told:
        """What the teacher says at the step at which it writes a token itself; at the last step of what stays open."""
        args, length = self.args, views.weight.shape[2]
        steps, mask = args.teacher_steps, self.spec.mask_token_id
        noise = RowNoise(rows, args.seed, self._iteration)
        written = torch.full((*views.hidden.shape,), mask, device=views.hidden.device)
        open_slots, total = views.scored, views.scored.sum(-1)
        told: Told | None = None
        for step in range(steps):
            now = replace(views, weight=views.weight * open_slots, ids=written)
            uniform = noise.per_token(f"teacher token {step}", views.weight.shape[1])[now.scored]
            asked = Together([top, Draws(uniform, args.teacher_temperature, mask)])
            ids, classes, tokens, sure = self._ask(rows, now, asked, rows_per_forward, rows_in_step)
            if told is None:
                told = Told(classes, ids)
            else:
                place = open_slots[views.scored]
                assert told.classes is not None and told.ids is not None
                told.classes[place], told.ids[place] = classes, ids
            if step + 1 == steps:
                break
            count = (total * args.teacher_written * (step + 1) / steps).ceil().long()
            count = count - (total - open_slots.sum(-1))  # of this step
            key = noise.per_token(f"teacher order {step}", views.weight.shape[1])
            if args.teacher_order == "confidence":
                key = -sure.new_zeros(open_slots.shape).masked_scatter(open_slots, sure).double()
            rank = key.masked_fill(~open_slots, torch.inf).argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)
            chosen = open_slots & (rank < count[..., None])
            canvas = torch.zeros_like(written[..., -length:]).masked_scatter(open_slots, tokens)
            written[..., -length:] = torch.where(chosen, canvas, written[..., -length:])
            open_slots = open_slots & ~chosen
        assert told is not None
        return told

    def _ask(
        self,
        rows: Rows,
        views: Views,
        reduction: PositionReduction,
        rows_per_forward: int | None,
        rows_in_step: int | None,
    ) -> tuple[Tensor, ...]:
        """The teacher, without gradients."""
        kwargs = self.args.gradient_checkpointing_kwargs
        with (
            torch.no_grad(),
            grpo.disable_gradient_checkpointing(self.model, kwargs),
            self._teacher() as (model, spec),
            swapped(self, "spec", spec),
        ):
            return self._reduced_views(model, rows, views, reduction, rows_per_forward, rows_in_step)

    def _reduced_views(
        self,
        model: Any,
        rows: Rows,
        views: Views,
        reduction: PositionReduction,
        rows_per_forward: int | None,
        rows_in_step: int | None,
        **more: Any,
    ) -> tuple[Tensor, ...]:
        everyone = self.accelerator.num_processes > 1
        with self.accelerator.autocast():
            return reduce_views(
                model,
                self.spec,
                rows.ids,
                rows.attention_mask,
                views,
                reduction,
                rows_per_forward=rows_per_forward,
                one_view=self.args.one_view,
                in_step=rows_in_step if everyone else None,
                **more,
            )

    @contextmanager
    def _teacher(self) -> Iterator[tuple[Any, DiffusionSpec]]:
        """Who is asked, and how it denoises."""
        with ExitStack() as stack:
            policy = self.args.teacher == "policy"
            model = self.model if policy else stack.enter_context(self._reference())
            stack.enter_context(self._as_taught())
            yield model, self.teacher_spec

    @contextmanager
    def _as_taught(self) -> Iterator[None]:
        """The attention that the model had before a student got another one."""
        with swapped(base_model(self.model).config, "diffusion", self.teacher_spec.to_dict()):
            yield

    def _head(self) -> Any:
        """The teacher's head: of states `[c, D]` to logits `[c, V]`."""
        separate = self.args.teacher == "reference" and self.ref_model is not None
        owner = self.accelerator.unwrap_model(self.ref_model if separate else self.model)
        return functools.partial(logits_of, base_model(owner))

    def _audit(self, rollout: Rollout) -> None:
        """Of the policy's own rollouts: the reference's were not drawn by it."""
        if self.args.rollouts_by == "policy":
            super()._audit(rollout)

    def _check_capabilities(self, backend: RolloutBackend) -> None:
        """As everywhere; a server has the policy's weights alone."""
        super()._check_capabilities(backend)
        if self.args.rollouts_by != "policy":
            raise ValueError(
                f"rollouts_by={self.args.rollouts_by!r} is not allowed with rollout_backend="
                f"{self.args.rollout_backend!r}, whose rollouts are the policy's; allowed: 'policy', or in_process"
            )

    def _decode(self, *args: Any, **kwargs: Any) -> Rollout:
        """By the reference, where its completions are learnt from; it is the policy that is evaluated."""
        if self.args.rollouts_by == "policy" or not self.model.training:
            return super()._decode(*args, **kwargs)
        with ExitStack() as stack:
            stack.enter_context(self._as_taught())
            stack.enter_context(swapped(self, "spec", self.teacher_spec))
            if self.ref_model is not None:
                stack.enter_context(swapped(self, "model_wrapped", self.ref_model))
            else:
                stack.enter_context(self._reference())
            return super()._decode(*args, **kwargs)
