"""Self-distillation: a denoiser learns to say at once what it, or its reference, says with more steps or more context.

A state x of a completion y, the policy's own, the reference's or one of a corpus, is shown to the student; the teacher
sees a view x' of the same sequence, perhaps behind a prompt that says more (`teacher_context_column`: hints, a worked
solution). With p_i the student's and q_i the teacher's distribution at position i, T a temperature, and H_i the entropy
of p_i, the loss of a completion is the mean over the positions that count of

    w T^2 D(p_i, q_i)  +  h (-log p_i(y_i))  +  e 1[argmax p_i = y_i] H_i

and that of a batch the mean over completions, in which those that are not learnt from (`rewarded_from`) are zeros. What
published methods choose:

    SDTT         random states of a corpus; the teacher writes in m = 2 steps of a length dt, and q_i is its
                 distribution at the step that wrote i, or at the last one; reverse KL; every N updates the teacher
                 becomes the student, and dt doubles
    d-OPSD       recorded states; the teacher also sees a quarter of the answer behind the next block; reverse KL over
                 the teacher's 20 most probable tokens, at the two positions that it is surest of; right answers only
    T3D          recorded states of every block, mostly with all hidden; `ddo`: -log sigmoid(b (l(y) - l'(y)))
                 - a log(1 - sigmoid(b (l(z) - l'(z)))), l' the teacher's log-probabilities and z its most probable
                 token; rounds
    dParallel    one block half hidden, and its complement; no teacher; cross-entropy, and entropy where it is right
    d3LLM        the same with recorded states, of completions that the reference wrote one token at a time; the least
                 share that is hidden, and blocks, grow over training
    D2F          states of a corpus, with shares that rise from block to block; the student sees its own and earlier,
                 noisy blocks, the teacher everything; forward KL
    CD4LM        random states; the teacher sees some of what is hidden; KL and cross-entropy

One file for all: what differs are settings (`rl4dlm.training.self_distillation`), and `configs/self_distillation/`.

Decided differently from the released code of these:
- Everything happens in the loop of rollouts. A row of a corpus (`rollouts_by: corpus`) is there `num_generations`
  times, two at least, each time with states of its own.
- A divergence is limited as a whole: limiting entries of its sum, as d-OPSD's code does, can turn the gradient away
  from the teacher (`limit_entries` does that). Its positions are chosen by probability, there by logit.
- The second term of `ddo` leaves out positions where z is y: it would make what was written unlikely. Both are of
  single positions, where T3D's are of means over them, and T3D hides what was written first in the place of what was
  written last. Its path loss, a cross-entropy with weights for early tokens, and its random tokens in a tenth of the
  masks are not offered.
- What grows does so from step to step, over all of training (d3LLM: from epoch to epoch). SDTT's dt is a share of a
  completion's tokens here.
- D2F's weights 1 / share are not taken.
- Several steps of a teacher are compared through its `distill_top_k` most probable tokens, the others as one class,
  which bounds the divergence from below; one step (m = 1) is the state itself. SDTT's times have a slip there that
  only changes how many tokens a step writes.
- The entropy's positions, and the completions of dParallel and d3LLM, are as they are, not filtered by length.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor
from torch.nn.functional import logsigmoid

from rl4dlm.likelihood.estimator import Estimator
from rl4dlm.likelihood.scoring import ViewScores
from rl4dlm.likelihood.views import Rows, Views
from rl4dlm.models.adapters import base_model
from rl4dlm.models.attention import BLOCK_KINDS
from rl4dlm.models.distributions import (
    DIVERGENCES,
    Classes,
    Divergence,
    PositionReduction,
    Targets,
    Together,
    TopClasses,
    divergence,
    renormalised,
)
from rl4dlm.rollout.backends.backend import RolloutBackend
from rl4dlm.rollout.rollout import Rollout
from rl4dlm.training.checks import check_columns, check_prompt
from rl4dlm.training.corpus import COMPLETION, check_corpus, completion_ids, corpus_rollout, told_prompt, told_prompts
from rl4dlm.training.loss_parts import PolicyScores
from rl4dlm.training.self_distillation import SelfDistillationConfig
from rl4dlm.training.setup import of_noise, swapped
from rl4dlm.training.teaching import TeachingTrainer, Told
from rl4dlm.training.trainer import DiffusionPolicyConfig

__all__ = ["SelfDistillationConfig", "SelfDistillationTrainer"]


def no_reward(completions: list[str], **columns: Any) -> list[float]:
    """Zeros, where completions are learnt from whatever they are worth."""
    return [0.0] * len(completions)


class SelfDistillationTrainer(TeachingTrainer):
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
    _given: list[Any] | None = None
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
        self._check_data()
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
        args, state = self.args, self.state
        if args.states_change:
            progress = min(1.0, state.global_step / max(state.max_steps - 1, 1))
            self.estimator = of_noise(self.model, args.student_states(self.spec, progress))
        views = super()._draw(rows, iteration)
        return views if self.args.positions != "surest" else self._surest(rows, views)

    @torch.no_grad()
    def _surest(self, rows: Rows, views: Views) -> Views:
        """Only the positions of each view that the teacher is surest of count."""
        (_, classes) = self._ask(*self._of_teacher(rows, views), TopClasses(1), None, None)
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

    # --- completions --------------------------------------------------------------------------------------------------

    def _check_data(self) -> None:
        """Raises ValueError for a data set without what is learnt from, or what the teacher is told."""
        args = self.args
        if args.rollouts_by == "corpus":
            check_columns(self.train_dataset, "train_dataset", COMPLETION)
            check_corpus(self.train_dataset, "train_dataset", self._completion_of, self.decoding.canvas_length)
        column = args.teacher_context_column
        if column is None:
            return
        if self.spec.attention in BLOCK_KINDS and self.spec.grid_origin != "response":
            raise ValueError(
                f"teacher_context_column={column!r} is not supported for a model whose blocks start where the prompt "
                f"does (grid_origin={self.spec.grid_origin!r}): those of a longer prompt are others"
            )
        for name in ("train_dataset", "eval_dataset"):
            check_columns(getattr(self, name), name, column)
            for prompt in told_prompts(getattr(self, name), name, column, args.teacher_prompt_template):
                self._check_told(self._tokenize_prompts([prompt])[0][0], f"what the teacher is told of {name}")

    def _completion_of(self, row: Mapping[str, Any]) -> list[int]:
        """Token ids of a row of the corpus."""
        template = {"chat_template": self.chat_template, **self.chat_template_kwargs}
        return completion_ids(self._tokenizer, row["prompt"], row[COMPLETION], spec=self.spec, **template)

    def _check_told(self, ids: list[int], name: str) -> None:
        check_prompt(ids, name, self.spec.mask_token_id)
        positions = getattr(base_model(self.model).config.get_text_config(), "max_position_embeddings", None)
        limit = None if positions is None else positions - self.decoding.canvas_length
        if limit is not None and len(ids) > limit:
            raise ValueError(
                f"{name}: a prompt has {len(ids)} tokens; beside the canvas the model's positions are {limit}"
            )

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        with swapped(self, "_given", inputs):
            return super()._generate_and_score_completions(inputs)

    def extend_batch(self, batch: dict[str, Any], rollout: Rollout, rewards_per_func: Tensor) -> None:
        """Adds what the teacher is told in the place of the prompt, if anything."""
        column, template = self.args.teacher_context_column, self.args.teacher_prompt_template
        if column is None:
            return
        assert self._given is not None
        told = [told_prompt(row["prompt"], row[column], template) for row in self._given]
        prompts = self._tokenize_prompts(told)[0]
        for ids in prompts:
            self._check_told(ids, "what the teacher is told")
        width = max(map(len, prompts))
        device, pad = self.accelerator.device, self._tokenizer.pad_token_id
        batch["told_ids"] = torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts], device=device)
        batch["told_mask"] = torch.tensor(
            [[False] * (width - len(ids)) + [True] * len(ids) for ids in prompts], device=device
        )

    def _watch_draws(self, identical: float, groups: int) -> None:
        """Of drawn completions: those of a corpus are the same in a group."""
        if self.args.rollouts_by != "corpus":
            super()._watch_draws(identical, groups)

    def _audit(self, rollout: Rollout) -> None:
        """Of the policy's own rollouts: others were not drawn by it."""
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

    def _decode(self, ids: list[list[int]], row_ids: list[int], *args: Any, **kwargs: Any) -> Rollout:
        """By whom completions are that are learnt from; it is the policy that is evaluated."""
        if self.args.rollouts_by == "policy" or not self.model.training:
            return super()._decode(ids, row_ids, *args, **kwargs)
        if self.args.rollouts_by == "corpus":
            assert self._given is not None
            found = [self._completion_of(row) for row in self._given]
            given = {"seed": self.args.seed, "device": self.accelerator.device}
            return corpus_rollout(ids, found, row_ids, self.decoding, self.spec, **given)
        with ExitStack() as stack:
            stack.enter_context(self._as_taught())
            stack.enter_context(swapped(self, "spec", self.teacher_spec))
            if self.ref_model is not None:
                stack.enter_context(swapped(self, "model_wrapped", self.ref_model))
            else:
                stack.enter_context(self._reference())
            return super()._decode(ids, row_ids, *args, **kwargs)
