"""How views become scores of a batch: of the old policy, of the reference, and of the current one under gradients.

Owns when a policy is scored, in which views, and the gap to what was recorded while decoding. Estimators say what is
hidden and how log-probabilities become scores, an algorithm what its loss is. TRL's private names are used here, and
checked when the file is imported.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import trl.trainer.grpo_trainer as grpo
from torch import Tensor
from trl import GRPOTrainer

from rl4dlm.likelihood.choices import Choices
from rl4dlm.likelihood.scoring import ViewScores, score_views
from rl4dlm.likelihood.views import Rows, StepFacts, Views
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.training.backward_per_view import loss_per_view
from rl4dlm.training.contract import check_contract
from rl4dlm.training.credit.trainer import CreditTrainer
from rl4dlm.training.interventions.trainer import groups
from rl4dlm.training.loss_parts import PolicyScores, resized
from rl4dlm.training.metrics import rollout_gap
from rl4dlm.training.setup import swapped

check_contract(
    GRPOTrainer,
    parameters={
        "_get_per_token_logps_and_entropies": ["model", "input_ids", "attention_mask", "logits_to_keep"],
        "_compute_loss": ["model", "inputs"],
    },
    attributes=[
        "_buffered_inputs",
        "_step",
        "_metrics",
        "num_generations",
        "num_generations_eval",
        "num_iterations",
        "ref_model",
    ],
    keys={"_compute_loss": ["old_per_token_logps", "ref_per_token_logps", "num_items_in_batch"]},
    module=grpo,
    names=["disable_gradient_checkpointing", "use_adapter"],
)  # fmt: skip


class ScoringTrainer(CreditTrainer):
    """Scores rows in an estimator's views; the loss of those scores is an algorithm's."""

    spec: DiffusionSpec
    _current_scores: PolicyScores | None
    _backward_per_view: bool
    _weighed_at: tuple[int, int]

    needs_old_entropies: bool = False
    """Whether `old_entropies` `[B, n, C]`, of the policy that made the completions, are wanted in the batch."""

    score_of: str = "log_prob"
    """What the score of a token is, one of `rl4dlm.models.reductions.SCORES`."""

    needs_values: bool = False
    """Whether the policy's value head is asked, and `old_values` `[B, n, C]` are in the batch where old scores are."""

    advantages_read_scores: bool = True
    """Whether `advantages` or `prepare_batch` read old or reference scores of the batch, or change which rows count.

    If not, a first pass over a batch is its own old policy, and rows without an advantage are never scored. A subclass
    that defines one of the two is taken to read them unless it says that it does not.
    """

    per_iteration: tuple[str, ...] = ("old_per_token_logps", "ref_per_token_logps", "old_entropies", "old_values")
    """Entries `[B, n, ...]` of the batch of which the loss sees the current inner iteration's, `[B, ...]`."""

    def compared(self, scores: PolicyScores) -> Tensor:
        """What is kept of old and reference scores, `[B, ...]`, for a loss to compare with; scores per token."""
        return scores.log_probs

    def as_drawn(self, scores: PolicyScores, width: int) -> tuple[Tensor, Tensor | None]:
        """What is compared with the log-probabilities at drawing, `[B, C]`, and where; None: at every token."""
        return scores.log_probs, None

    def view_choices(self, rows: Rows, views: Views) -> Choices | None:
        """What the model's unmasking policy is asked about the steps of these views; None: nothing."""
        return None

    def rows_that_count(self, batch: dict[str, Any]) -> Tensor | None:
        """bool `[B]`, the completions whose scores the loss depends on; the others are not scored. None: all.

        A loss that is linear in the advantages may leave out completions without one: see `with_advantage`. Scores and
        entropies of what is left out are those of no policy, but finite, and `loss` gets the whole batch. A subclass
        with a `loss` of its own scores all completions unless it defines this, too.

        Args:
            batch: as for `loss`.
        """
        return None

    @abstractmethod
    def loss(self, scores: PolicyScores, batch: dict[str, Any]) -> Tensor:
        """The loss of a micro-batch, from the scores of the current policy."""

    def _score_fixed_policies(self, batch: dict[str, Any], iterations: int) -> None:
        """Replaces TRL's placeholders by old and reference scores in each iteration's views, `[B, n, C]`.

        Whether they are needed is TRL's decision: it is whether the placeholder is there.
        """
        rows, width = rows_of(batch), batch["completion_ids"].shape[1]
        size = self.args.per_device_train_batch_size if self.model.training else self.args.per_device_eval_batch_size
        count = iterations if self.estimator.fresh else 1
        first = self._scores_come_first()
        kept = None if first else self._kept(batch)
        current = 0 if first or self.needs_old_entropies else self._passes_of_one_policy()

        def scores(model: Any, first: int = 0) -> tuple[Tensor, Tensor, list[Tensor]]:
            each = [self._score(model, rows, n, width, kept, rows_per_forward=size) for n in range(first, count)]
            values = [s.values for s in each if s.values is not None]
            compared, entropies = ([self.compared(s) for s in each], [s.entropies for s in each])
            return torch.stack(compared, dim=1), torch.stack(entropies, dim=1), values

        with torch.no_grad(), grpo.disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            if "old_per_token_logps" in batch or self.needs_old_entropies:
                if current:
                    batch["old_is_current"] = torch.ones(len(rows), dtype=torch.bool, device=rows.row_ids.device)
                if current < count:
                    log_probs, entropies, values = scores(self.model, first=current)
                    if "old_per_token_logps" in batch:
                        nothing = torch.zeros_like(log_probs[:, :1]).expand(-1, current, *log_probs.shape[2:])
                        batch["old_per_token_logps"] = torch.cat([nothing, log_probs], dim=1)
                    if self.needs_old_entropies:
                        batch["old_entropies"] = entropies
                    if values:
                        batch["old_values"] = torch.stack(values, dim=1)
                else:
                    batch["old_per_token_logps"] = batch["old_per_token_logps"][:, None]  # until the first pass
            if "ref_per_token_logps" in batch:
                with self._reference() as reference:
                    batch["ref_per_token_logps"] = scores(reference)[0]
            if "filling_tokens" in batch and self._passes_of_one_policy() < iterations:
                shown = self._filling_views(rows, batch)
                batch["filling_log_probs"] = self._view_scores(self.model, rows, shown, size, len(rows)).log_probs

    @contextmanager
    def _reference(self) -> Iterator[Any]:
        if self.ref_model is not None:
            yield self.ref_model
            return
        model = self.accelerator.unwrap_model(self.model)
        with grpo.use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
            yield self.model

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor, None]:
        # TRL asks twice: while it builds a batch, before views can be drawn (a placeholder will do), and in its loss.
        if self._current_scores is not None:
            return self._current_scores.log_probs, self._current_scores.entropies, None
        nothing = torch.zeros(len(input_ids), logits_to_keep, device=input_ids.device)
        return nothing, nothing, None

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        iteration = 0
        if self.model.training:
            # Passes over the batch, not micro-steps as in the papers' code, which skips views when it accumulates.
            iteration = self._step // self.args.steps_per_generation % self.num_iterations
        rows, width = rows_of(inputs), inputs["completion_ids"].shape[1]
        batch = self._of_iteration(inputs, iteration)
        views, kept = self._draw(rows, iteration), self._kept(batch, log=True)
        every = self._with_fillings(views, rows, batch)
        self_is_old = "old_is_current" in inputs and iteration < self._passes_of_one_policy()
        if self.model.training and self.weights_are_split and not (self_is_old or self.is_on_policy(batch)):
            self._weigh_all(iteration)
        else:  # where the policy is the old one, all weights are 1
            self._ready_weights = None

        def loss(found: ViewScores) -> Tensor:
            found, of_fillings = self._credited(found, every, views.hidden.shape[1], batch, kept)
            scores = self._reduced(found, views, width, kept)
            if self_is_old:
                batch["old_per_token_logps"] = self.compared(scores).detach()
                if not self.estimator.fresh:  # later passes have the same views, and compare with these scores
                    inputs["old_per_token_logps"] = batch["old_per_token_logps"][:, None]
                    if scores.values is not None:
                        inputs["old_values"] = scores.values.detach()[:, None]
            if kept is not None:
                scores = self._completed(scores, batch, kept)
            # Under other noise tokens are drawn until the last step, not once; other engines record no draws.
            if iteration == 0 and self.spec.noise == "mask" and "drawn_log_probs" in inputs:
                self._log_rollout_gap(*self.as_drawn(scores, width), inputs, kept)
            self._note(scores, batch)
            return self.loss(scores, batch) + of_fillings

        scored, shown = (rows, every) if kept is None else (rows[kept], every[kept])
        if not (self._backward_per_view and torch.is_grad_enabled() and every.hidden.shape[1] > 1):
            return loss(self._view_scores(model, scored, shown))
        with grpo.disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs), torch.no_grad():
            found = self._view_scores(model, scored, shown)
        return loss_per_view(
            found, shown, lambda one: self._view_scores(model, scored, one), loss, self._backward_of_part
        )

    def _of_iteration(self, inputs: dict[str, Any], iteration: int) -> dict[str, Any]:
        """A copy of the buffered batch, which is used again, with the entries of one inner iteration."""
        batch = dict(inputs)
        for name in self.per_iteration:
            if batch.get(name) is not None:
                batch[name] = batch[name][:, min(iteration, batch[name].shape[1] - 1)]
        return batch

    def _weigh_all(self, iteration: int) -> None:
        """Weights of all micro-batches under the current policy, normalised; once for each step of the optimizer.

        They are what the losses of the micro-batches ask for, which are computed without gradients and come to nothing.
        """
        step = self.state.global_step, self._step // self.args.steps_per_generation
        if self._ready_weights is not None and self._weighed_at == step:
            return
        collected: list[tuple[Tensor, Tensor, Tensor]] = []
        nowhere: dict[str, Any] = {mode: defaultdict(list) for mode in self._metrics}
        with (
            grpo.disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
            torch.no_grad(),
            swapped(self, "_metrics", nowhere),
            swapped(self, "_collected", collected),
        ):
            for inputs in self._buffered_inputs or ():
                batch = self._of_iteration(inputs, iteration)
                kept = self._kept(batch)
                scores = self._score(self.model, rows_of(batch), iteration, batch["completion_ids"].shape[1], kept)
                self.loss(scores if kept is None else self._completed(scores, batch, kept), batch)
        weights, counts, together = (torch.cat(each) for each in zip(*collected, strict=True))
        found = self.normalised(weights, counts, together)
        self._ready_weights = list(found.split([len(each) for each, *_ in collected]))
        self._weighed_at = step

    def _kept(self, batch: dict[str, Any], log: bool = False) -> Tensor | None:
        """Which rows are scored in training, long `[n]` and never none, so that processes stay in step; None: all."""
        if not self.model.training or not _says(self, "rows_that_count", "loss"):
            return None
        counted = self.rows_that_count(batch)
        if counted is None:
            return None
        counted = self._with_filled(counted, batch)
        if log:
            self.log_mean("diffusion/rows_scored_share", counted, torch.ones_like(counted, dtype=torch.float32))
        kept = counted.nonzero().squeeze(-1)
        if len(kept) == len(counted):
            return None
        return kept if len(kept) else torch.zeros(1, dtype=torch.long, device=counted.device)

    def _completed(self, scores: PolicyScores, batch: dict[str, Any], kept: Tensor) -> PolicyScores:
        """What stands for rows that are not scored: a ratio of 1, and the others' mean entropy."""
        assert scores.views is not None
        absent = torch.ones(len(scores.log_probs), dtype=torch.bool, device=kept.device).index_fill(0, kept, False)
        old = batch.get("old_per_token_logps")
        if old is not None:
            where = absent.view(-1, *[1] * (old.dim() - 1))
            batch["old_per_token_logps"] = torch.where(where, self.compared(scores).detach().to(old.dtype), old)
        if batch.get("drawn") is not None:
            batch["drawn"] = batch["drawn"] & ~absent[:, None]
        shown = resized(scores.views.scored.any(1), scores.log_probs.shape[1])
        counted = (shown & batch["completion_mask"].bool())[kept]
        mean = (scores.entropies[kept].detach() * counted).sum() / counted.sum().clamp(min=1)
        return scores._replace(entropies=torch.where(absent[:, None] & shown, mean, scores.entropies))

    def _note_rows_weighed(self, batch: dict[str, Any]) -> None:
        """Notes in a batch that is being built which rows count, where that depends on rows of other micro-batches."""
        if self.args.self_normalize != "none" and self.model.training and _says(self, "rows_that_count", "loss"):
            counted = self.rows_that_count(batch)
            if counted is not None:
                batch["rows_weighed"] = counted

    def _passes_of_one_policy(self) -> int:
        """How many first passes over a new batch surely come before the next step of the optimizer.

        A pass is `steps_per_generation` micro-batches. Where generation does not begin with an optimizer step, or a
        pass is longer than one, none is sure to.
        """
        length, accumulated = self.args.steps_per_generation, self.args.gradient_accumulation_steps
        cycle = length * self.num_iterations
        aligned = self.model.training and cycle % accumulated == 0 and self._step % cycle < accumulated
        return min(accumulated // length, self.num_iterations) if aligned else 0

    def _scores_come_first(self) -> bool:
        said = _says(self, "advantages_read_scores", "advantages", "prepare_batch")
        return self.advantages_read_scores if said else True

    def _backward_of_part(self, forward: Callable[[], Tensor]) -> None:
        """A forward and its backward pass, whose gradients are added up in this process until another one."""
        with self.accelerator.no_sync(self.model_wrapped):  # of DDP
            value = forward()
            if self.is_deepspeed_enabled:
                self.accelerator.deepspeed_engine_wrapped.backward(value, sync_gradients=False, scale_wrt_gas=False)
            else:
                self.accelerator.backward(value)

    def _draw(self, rows: Rows, iteration: int) -> Views:
        keyed = rows
        if self.args.views_keyed_by == "prompt":  # by the id of the group's first row
            size = self.num_generations if self.model.training else self.num_generations_eval
            keyed = replace(rows, row_ids=groups(rows.row_ids, size))
        views = self.estimator.draw(keyed, seed=self.args.seed, iteration=iteration)
        if self.estimator.views_vary:
            views = views.first(self._views_of_all(views))
        return views if rows.given is None or self.scores_hints else views.without(rows.given)

    def _views_of_all(self, views: Views) -> int:
        """How many views some process needs: all score as many, so that sharded models' forwards stay in step."""
        used = views.scored.any(-1).any(0).nonzero()
        count = torch.tensor([int(used.max()) + 1 if len(used) else 1], device=views.hidden.device)
        return min(int(self.accelerator.gather(count).max()), views.hidden.shape[1])

    def _view_scores(
        self,
        model: Any,
        rows: Rows,
        views: Views,
        rows_per_forward: int | None = None,
        rows_in_step: int | None = None,
    ) -> ViewScores:
        everyone = self.accelerator.num_processes > 1
        with self.accelerator.autocast():
            return score_views(
                model,
                self.spec,
                rows.ids,
                rows.attention_mask,
                views,
                temperature=self.args.score_temperature,
                cfg_scale=self.args.cfg_scale,
                rows_per_forward=rows_per_forward,
                one_view=self.args.one_view,
                in_step=rows_in_step if everyone else None,
                values=self.needs_values and model is not self.ref_model,
                of=self.score_of,
                choices=self.view_choices(rows, views),
            )

    def _reduced(self, found: ViewScores, views: Views, width: int, kept: Tensor | None = None) -> PolicyScores:
        """Scores `[B, C]` from those of the views, cut or padded to C = `width`; zero for rows that are not `kept`."""
        if kept is not None:
            assert found.values is None  # every row has a value
            parts = {name: part for name, part in found._asdict().items() if part is not None}
            zeros = {name: part.new_zeros(len(views), *part.shape[1:]) for name, part in parts.items()}
            found = ViewScores(**{name: zeros[name].index_copy(0, kept, part) for name, part in parts.items()})
        entropies = (found.entropies * views.scored).sum(1) / views.scored.sum(1).clamp(min=1)
        scores = resized(self.estimator.reduce(found.log_probs, views), width)
        values = None if found.values is None else resized(found.values.sum(1), width)
        return PolicyScores(scores, resized(entropies, width), views, found.log_probs, values, found.choices)

    def _score(
        self,
        model: Any,
        rows: Rows,
        iteration: int,
        width: int,
        kept: Tensor | None = None,
        *,
        rows_per_forward: int | None = None,
    ) -> PolicyScores:
        """Scores `[B, C]` of rows, or those `kept`, in an iteration's views, cut or padded to C = `width`."""
        views = self._draw(rows, iteration)
        scored, shown = (rows, views) if kept is None else (rows[kept], views[kept])
        found = self._view_scores(model, scored, shown, rows_per_forward, rows_in_step=len(rows))
        return self._reduced(found, views, width, kept)

    @torch.no_grad()
    def _note(self, scores: PolicyScores, batch: dict[str, Any]) -> None:
        """Tells the guard what the loss is made of, so that it can name the first thing that is not finite."""
        current, counted = self.compared(scores).detach(), scores.log_probs.detach()
        parts = {"advantage": batch["advantages"], "score": counted}
        for name, other in (("score of the old policy", "old"), ("score of the reference", "ref")):
            if batch.get(f"{other}_per_token_logps") is not None:
                parts[name] = batch[f"{other}_per_token_logps"]
        if batch.get("old_per_token_logps") is not None and current.shape == batch["old_per_token_logps"].shape:
            parts["ratio"] = (current - batch["old_per_token_logps"]).exp()
        self.note(parts, batch["row_ids"])

    @torch.no_grad()
    def _log_rollout_gap(
        self, scores: Tensor, where: Tensor | None, inputs: dict[str, Any], kept: Tensor | None
    ) -> None:
        width = scores.shape[1]
        mask = inputs["completion_mask"].bool() & resized(inputs["drawn"], width)
        mask = mask if where is None else mask & where
        if kept is not None:
            mask = torch.zeros_like(mask).index_copy(0, kept, mask[kept])
        local = rollout_gap(resized(inputs["drawn_log_probs"], width), scores, mask)
        total, tokens = self.accelerator.reduce(local, reduction="sum").tolist()
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["diffusion/rollout_gap"].append(total / max(tokens, 1))


def rows_of(batch: dict[str, Any]) -> Rows:
    """The rows of a batch that are to be scored, with what was recorded of them."""
    facts = StepFacts(
        entropy=batch.get("commit_entropy"),
        confidence=batch.get("commit_confidence"),
        threshold=batch.get("entropy_threshold"),
        shown=batch.get("step_states"),
        predicted=batch.get("step_predictions"),
        rank=batch.get("commit_rank"),
    )
    return Rows(
        prompt_ids=batch["prompt_ids"],
        prompt_mask=batch["prompt_mask"],
        canvas_ids=batch["canvas_ids"],
        valid=batch["canvas_valid"],
        row_ids=batch["row_ids"],
        seen=batch.get("canvas_seen"),
        given=batch.get("hinted"),
        commit_step=batch.get("commit_step"),
        facts=facts,
        told_ids=batch.get("told_ids"),
        told_mask=batch.get("told_mask"),
    )


def _says(trainer: Any, name: str, *others: str) -> bool:
    """Whether a trainer's class says `name` of its own, and not only a class that it takes one of the `others` from."""
    owner = next(cls for cls in type(trainer).__mro__ if {name, *others} & vars(cls).keys())
    return name in vars(owner)
