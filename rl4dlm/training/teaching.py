"""A teacher beside a policy that is trained: who it is, what it sees, and what it says of a student's positions.

Owns the teacher's forwards, for `rl4dlm.algorithms.self_distillation`; losses are made there. TRL's private names are
used here, and checked in `rl4dlm.training.scores`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import trl.trainer.grpo_trainer as grpo
from torch import Tensor

from rl4dlm.likelihood.masks import RowNoise, in_scope
from rl4dlm.likelihood.scoring import reduce_views
from rl4dlm.likelihood.student_states import teacher_views
from rl4dlm.likelihood.views import Rows, Views
from rl4dlm.models.adapters import base_model
from rl4dlm.models.distributions import (
    Draws,
    HiddenStates,
    PositionReduction,
    Targets,
    Together,
    TopClasses,
)
from rl4dlm.models.scoring import logits_of
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.training.self_distillation import SelfDistillationConfig
from rl4dlm.training.setup import swapped
from rl4dlm.training.trainer import DiffusionPolicyTrainer


class Told(NamedTuple):
    """What a teacher says at the n positions that count; None what it was not asked for."""

    classes: Tensor | None = None  # [n, k + 1], log-probabilities of its k most probable tokens, and of the others
    ids: Tensor | None = None  # long [n, k], these tokens
    states: Tensor | None = None  # [n, D], what its head is applied to
    targets: Tensor | None = None  # [n], log-probabilities of the completion's tokens


class TeachingTrainer(DiffusionPolicyTrainer):
    """Asks a teacher: the policy, or the reference, which may have another attention than the student."""

    args: SelfDistillationConfig
    teacher_spec: DiffusionSpec
    _iteration = 0

    def _shown(self, rows: Rows, views: Views) -> Views:
        args = self.args
        noise = RowNoise(rows, args.seed, self._iteration)
        shares = (args.teacher_share[0], args.teacher_share[1])
        return teacher_views(views, rows, noise, args.teacher_view, shares, self.decoding.block_length)

    def _of_teacher(self, rows: Rows, views: Views) -> tuple[Rows, Views]:
        """Rows and views as the teacher has them: what it sees of the answer, and what it alone is told."""
        return rows.as_told(self._shown(rows, views))

    @torch.no_grad()
    def _told(
        self, rows: Rows, views: Views, targets: Tensor, rows_per_forward: int | None, rows_in_step: int | None
    ) -> Told:
        """What the teacher says where `views` score."""
        args = self.args
        if args.divergence == "none":
            return Told()
        size = rows_per_forward, rows_in_step
        rows, shown = self._of_teacher(rows, views)
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
            count = self._written(rows, total, (step + 1) / steps) - (total - open_slots.sum(-1))  # of this step
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

    def _written(self, rows: Rows, total: Tensor, share: float) -> Tensor:
        """How many of `total` hidden tokens, long `[B, K]`, the teacher has written after this share of its steps."""
        args = self.args
        if args.teacher_step is None:
            return (total * args.teacher_written * share).ceil().long()
        length = args.teacher_step * args.teacher_steps * 2.0 ** self.rounds()
        size = in_scope(rows, args.scope).sum(-1, keepdim=True)
        return (size * length * share).ceil().long().minimum(total)

    def rounds(self) -> int:
        """How often the step of the teacher has doubled: once for each time that the reference became the policy."""
        args = self.args
        return self.state.global_step // args.ref_model_sync_steps if args.teacher_step_doubles else 0

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
