"""Settings of `SelfDistillationTrainer`: states, teachers, divergences.

Owns what is asked for and what does not go together; the algorithm is `rl4dlm.algorithms.self_distillation`'s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from rl4dlm.likelihood.estimator import SCOPES
from rl4dlm.likelihood.masks import check_choice, check_count, check_range
from rl4dlm.likelihood.student_states import POSITIONS, STATES, TEACHER_VIEWS, StudentStates
from rl4dlm.models.attention import BLOCK_KINDS
from rl4dlm.models.distributions import DIVERGENCES
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.training.corpus import check_template
from rl4dlm.training.ratio_free import RATIO_SETTINGS, RatioFreeConfig

TEACHERS = ("policy", "reference")
OBJECTIVES = (*DIVERGENCES, "ddo", "none")
ORDERS = ("random", "confidence")
WRITERS = ("policy", "teacher", "corpus")
TEMPLATE = "{prompt}\n\n{privileged_context}"
"""TRL's (`trl.experimental.sdft`)."""
_NO_ADVANTAGES = "completions are learnt from or not; there are no advantages"


@dataclass
class SelfDistillationConfig(RatioFreeConfig):
    """Settings of self-distillation; the defaults are SDTT's idea on the model's own completions.

    Args:
        states: what a student sees: `"random"`, `"recorded"` or `"rising"`; see
            `rl4dlm.likelihood.student_states`.
        share_range: the share of tokens that is hidden, of the completion or of a block.
        share_range_end: what `share_range` has become at the last step, from step to step; None: it stays.
        shares: these shares alone, in the place of a range, with weights that are their `shares_exponent`-th powers.
        block_states: hide and score one random block, everything behind it hidden; else all of the completion.
        every_block: hide the same share of every block; recorded states need a model that denoises block by block.
        state_block_length: of these blocks, and those of `"rising"`; None: `block_length`.
        state_block_length_end: what it has become at the last step; None: it stays.
        positions: what is learnt at: all that is `"hidden"`; with recorded states what the `"next"` step wrote; or the
            `num_positions` at which the teacher is `"surest"`.
        num_positions: of `"surest"`.
        complement: states come in pairs that hide complementary tokens.
        num_views: states per completion and pass.
        teacher: the `"reference"`: the model before training, an adapter switched off, or what `sync_ref_model` makes
            of it (rounds with `ref_model_mixup_alpha: 1`, a moving average below); or the `"policy"` as it is.
        teacher_view: what the teacher sees: the `"same"`; more of the answer (`"suffix"`, `"subset"`); or what it
            writes itself in `teacher_steps` steps (`"later"`).
        teacher_context_column: column with text that the teacher alone is told (a hint, a solution); None: nothing.
        teacher_prompt_template: how, with `{prompt}` and `{privileged_context}`; of messages in the user's last one.
        teacher_share: the share that suffix shows, or that subset still hides: a range.
        teacher_steps: of `"later"`: m. 1 is `"same"`.
        teacher_written: of `"later"`: the share of what is hidden that all m steps write.
        teacher_step: of `"later"`: dt, the share of the completion's tokens that each step writes, in the place of
            `teacher_written`.
        teacher_step_doubles: each time that `sync_ref_model` makes the policy the teacher, dt doubles.
        teacher_order: of `"later"`: positions at `"random"`, or by `"confidence"`.
        teacher_temperature: of `"later"`: of the tokens that it writes; 0: the most probable ones.
        divergence: of student and teacher: one of `rl4dlm.models.distributions.DIVERGENCES`; `"ddo"`: a contrast of the
            completion's tokens with the teacher's; or `"none"`.
        distill_top_k: compare the teacher's k most probable tokens, and all others as one class. None: the whole
            vocabulary, a chunk of positions at a time.
        renormalize: with `distill_top_k`: leave the others out, and let the k add up to 1.
        distill_temperature: T, divides both logits; the divergence is multiplied by T^2.
        divergence_limit: the largest divergence of a position, beyond which it teaches nothing; None: none.
        limit_entries: limit the entries of the divergence's sum instead, as d-OPSD's code does.
        divergence_weight: of the first term.
        hard_weight: of the cross-entropy of the completion's tokens.
        entropy_weight: of the entropy at positions whose most probable token is the completion's.
        entropy_temperature: divides the logits of that entropy.
        ddo_scale, ddo_negative_weight: b and a of `"ddo"`.
        rewarded_from: learn from completions whose reward is at least this; None: from all.
        rollouts_by: `"policy"`; `"teacher"`: completions of the reference; or `"corpus"`: those in the data set's
            column `completion`, without rollouts. Evaluation decodes with the policy.
        student_attention: `"block_causal"`: the student sees its own block and those before it, noisy ones, the teacher
            everything (D2F). The model is saved with that attention. None: as the model has it.
        num_iterations: passes over a batch of completions, each with states of its own.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    states: str = field(
        default="random",
        metadata={"help": f"What a student sees: {', '.join(STATES)}.", "choices": list(STATES)},
    )
    share_range: list[float] = field(
        default_factory=lambda: [0.0, 1.0], metadata={"help": "Range of the share of tokens that is hidden."}
    )
    share_range_end: list[float] | None = field(
        default=None, metadata={"help": "Range of that share at the last step, which it grows to. Default: it stays."}
    )
    shares: list[float] | None = field(default=None, metadata={"help": "Hidden shares, in the place of a range."})
    shares_exponent: float = field(default=0.0, metadata={"help": "Power of each of the shares that is its weight."})
    block_states: bool = field(default=False, metadata={"help": "Hide and score one block, and hide what follows it."})
    every_block: bool = field(default=False, metadata={"help": "Hide the same share of every block."})
    state_block_length: int | None = field(
        default=None, metadata={"help": "Length of the blocks of states. Default: block_length."}
    )
    state_block_length_end: int | None = field(
        default=None, metadata={"help": "That length at the last step, which it grows to. Default: it stays."}
    )
    positions: str = field(
        default="hidden",
        metadata={"help": f"Where is learnt: {', '.join(POSITIONS)}.", "choices": list(POSITIONS)},
    )
    num_positions: int = field(default=2, metadata={"help": "Positions of a state with positions=surest."})
    complement: bool = field(default=False, metadata={"help": "States come in pairs that hide complementary tokens."})
    num_views: int = field(default=1, metadata={"help": "States per completion and pass."})
    teacher: str = field(
        default="reference",
        metadata={"help": f"Who teaches: {', '.join(TEACHERS)}.", "choices": list(TEACHERS)},
    )
    teacher_view: str = field(
        default="later",
        metadata={"help": f"What the teacher sees: {', '.join(TEACHER_VIEWS)}.", "choices": list(TEACHER_VIEWS)},
    )
    teacher_context_column: str | None = field(
        default=None, metadata={"help": "Column with text that the teacher alone is told. Default: nothing."}
    )
    teacher_prompt_template: str = field(
        default=TEMPLATE, metadata={"help": "The teacher's prompt: {prompt} and {privileged_context}."}
    )
    teacher_share: list[float] = field(
        default_factory=lambda: [0.25, 0.25],
        metadata={"help": "Range of the share that suffix shows or subset hides."},
    )
    teacher_steps: int = field(default=2, metadata={"help": "Steps of the teacher that the student makes at once."})
    teacher_written: float = field(default=1.0, metadata={"help": "Share of what is hidden that these steps write."})
    teacher_step: float | None = field(
        default=None, metadata={"help": "Share of the completion that each of these steps writes, instead."}
    )
    teacher_step_doubles: bool = field(
        default=False, metadata={"help": "Double teacher_step whenever the policy becomes the teacher."}
    )
    teacher_order: str = field(
        default="confidence",
        metadata={"help": f"Which positions these steps write: {', '.join(ORDERS)}.", "choices": list(ORDERS)},
    )
    teacher_temperature: float = field(default=0.0, metadata={"help": "Temperature of the tokens that they write."})
    divergence: str = field(
        default="reverse_kl",
        metadata={"help": f"Of student and teacher: {', '.join(OBJECTIVES)}.", "choices": list(OBJECTIVES)},
    )
    distill_top_k: int | None = field(
        default=64, metadata={"help": "Teacher's tokens that are compared one by one, the others together; None: all."}
    )
    renormalize: bool = field(default=False, metadata={"help": "Leave out all others with distill_top_k."})
    distill_temperature: float = field(default=1.0, metadata={"help": "Divides the logits of student and teacher."})
    divergence_limit: float | None = field(default=None, metadata={"help": "Largest divergence that still teaches."})
    limit_entries: bool = field(default=False, metadata={"help": "Limit entries of the divergence, as published."})
    divergence_weight: float = field(default=1.0, metadata={"help": "Weight of the divergence."})
    hard_weight: float = field(default=0.0, metadata={"help": "Weight of the cross-entropy of the completion."})
    entropy_weight: float = field(default=0.0, metadata={"help": "Weight of the entropy where the student is right."})
    entropy_temperature: float = field(default=1.0, metadata={"help": "Divides the logits of that entropy."})
    ddo_scale: float = field(default=0.1, metadata={"help": "Factor of log-ratios with divergence=ddo."})
    ddo_negative_weight: float = field(default=1.0, metadata={"help": "Weight of the second term of divergence=ddo."})
    rewarded_from: float | None = field(default=None, metadata={"help": "Smallest reward that is learnt from."})
    rollouts_by: str = field(
        default="policy",
        metadata={
            "help": f"Whose completions are learnt from: {', '.join(WRITERS)}.",
            "choices": list(WRITERS),
        },
    )
    student_attention: str | None = field(default=None, metadata={"help": "block_causal, or as the model has it."})
    num_iterations: int = field(default=1, metadata={"help": "Passes over a batch of completions (mu)."})
    scope: str = field(
        default="valid",
        metadata={"help": "Tokens that are hidden and learnt: valid or canvas.", "choices": list(SCOPES)},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (
            ("teacher", TEACHERS),
            ("teacher_view", TEACHER_VIEWS),
            ("teacher_order", ORDERS),
            ("divergence", OBJECTIVES),
            ("rollouts_by", WRITERS),
        ):
            check_choice(name, getattr(self, name), allowed)
        check_range("teacher_share", tuple(self.teacher_share))  # type: ignore[arg-type]
        check_range("share_range", tuple(self.share_range))  # type: ignore[arg-type]
        if self.share_range_end is not None:
            check_range("share_range_end", tuple(self.share_range_end))  # type: ignore[arg-type]
        if self.block_states and self.every_block:
            raise ValueError(
                "every_block=True is not allowed with block_states=True: states are of one block, or of all"
            )
        for name in ("state_block_length", "state_block_length_end"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        check_count("teacher_steps", self.teacher_steps)
        check_count("num_positions", self.num_positions)
        if self.distill_top_k is not None:
            check_count("distill_top_k", self.distill_top_k)
        for name in ("distill_temperature", "entropy_temperature", "ddo_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed; it must be larger than 0, and finite")
        for name in ("divergence_weight", "hard_weight", "entropy_weight", "teacher_temperature"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed; it must be 0 or larger, and finite")
        if self.divergence != "none" and not self.divergence_weight:
            raise ValueError(
                f"divergence_weight=0 is not allowed with divergence={self.divergence!r}, for which a teacher would be "
                "asked in vain; choose divergence='none'"
            )
        if self.rewarded_from is not None and math.isnan(self.rewarded_from):
            raise ValueError("rewarded_from=nan is not allowed: no reward reaches it; give a number, or None for all")
        if not 0 < self.teacher_written <= 1:
            raise ValueError(
                f"teacher_written={self.teacher_written} is not allowed; it must be larger than 0 and at most 1"
            )
        if self.teacher_step is not None and not 0 < self.teacher_step <= 1:
            raise ValueError(
                f"teacher_step={self.teacher_step} is not allowed; it must be larger than 0 and at most 1, or None"
            )
        if self.teacher_step_doubles and not (self.teacher_step and self.sync_ref_model):
            raise ValueError(
                f"teacher_step_doubles=True is not allowed with teacher_step={self.teacher_step} and sync_ref_model="
                f"{self.sync_ref_model}: it is that step which doubles, whenever the policy becomes the teacher"
            )
        check_template(self.teacher_prompt_template)
        if self.teacher_context_column is not None and not self.has_teacher:
            raise ValueError(
                f"teacher_context_column={self.teacher_context_column!r} has no effect with divergence="
                f"{self.divergence!r} and positions={self.positions!r}, which ask no teacher"
            )
        if self.rollouts_by == "corpus":
            for name, value, idle in (
                ("states", self.states, self.states == "recorded"),
                ("log_replays", self.log_replays, bool(self.log_replays)),
            ):
                if idle:
                    raise ValueError(
                        f"{name}={value!r} is not allowed with rollouts_by='corpus': nobody knows how its completions "
                        "were written"
                    )
        if self.divergence_limit is not None and not self.divergence_limit > 0:
            raise ValueError(
                f"divergence_limit={self.divergence_limit} is not allowed; it must be larger than 0, or None"
            )
        if self.divergence == "none" and not (self.hard_weight or self.entropy_weight):
            raise ValueError("divergence='none' leaves nothing to learn from; set hard_weight, or choose a divergence")
        if self.teacher_view == "later" and self.divergence in DIVERGENCES and self.distill_top_k is None:
            raise ValueError(
                "distill_top_k=None is not allowed with teacher_view='later', whose tokens are written in several "
                "forwards of the teacher; set it, or choose another teacher_view"
            )
        if self.teacher == "policy" and self.rollouts_by != "teacher" and self.sync_ref_model:
            raise ValueError("sync_ref_model=True is not allowed with teacher='policy': there is no reference model")
        if self.student_attention is not None:
            if self.student_attention != "block_causal":
                raise ValueError(
                    f"student_attention={self.student_attention!r} is not allowed; it must be block_causal or None"
                )
            if self.rollouts_by == "policy" or self.teacher != "reference" or self.block_length is None:
                raise ValueError(
                    f"student_attention='block_causal' is not allowed with rollouts_by={self.rollouts_by!r}, teacher="
                    f"{self.teacher!r} and block_length={self.block_length}: it needs completions and distributions of "
                    "a reference that sees everything, or a corpus, and the length of its own blocks"
                )
        if not self.disable_dropout:
            raise ValueError("disable_dropout=False is not supported: teacher and student would differ by chance")
        if not self.every_block or self.state_block_length or self.block_length:  # else they are the model's
            for progress in (0.0, 1.0):
                self.student_states(None, progress)

    def refused_settings(self) -> dict[str, str]:
        """Those of policy ratios and advantages, and its own that others leave idle."""
        refused = {
            **RATIO_SETTINGS,
            "beta": "there is no KL term; set divergence",
            **dict.fromkeys(
                ("negative_advantage_weight", "scale_rewards", "multi_objective_aggregation"), _NO_ADVANTAGES
            ),
            "cfg_scale": "student and teacher are not guided",
            "score_temperature": "set distill_temperature",
        }
        idle: dict[str, tuple[str, ...]] = {}
        if self.shares is None:
            idle["shares=None"] = ("shares_exponent",)
        else:
            idle["shares"] = ("share_range", "share_range_end")
        if not (self.block_states or self.every_block or self.states == "rising"):
            idle["states of whole completions"] = ("state_block_length", "state_block_length_end")
        if self.teacher_step is not None:
            idle["teacher_step"] = ("teacher_written",)
        if self.teacher_context_column is None:
            idle["teacher_context_column=None"] = ("teacher_prompt_template",)
        if self.positions != "surest":
            idle[f"positions={self.positions!r}"] = ("num_positions",)
        if self.teacher_view not in ("suffix", "subset"):
            idle[f"teacher_view={self.teacher_view!r}"] = ("teacher_share",)
        if self.teacher_view != "later":
            own = ("teacher_steps", "teacher_written", "teacher_step", "teacher_order", "teacher_temperature")
            idle[f"teacher_view={self.teacher_view!r}"] = (*idle.get(f"teacher_view={self.teacher_view!r}", ()), *own)
        if self.divergence not in DIVERGENCES:
            idle[f"divergence={self.divergence!r}"] = (
                "distill_top_k",
                "renormalize",
                "distill_temperature",
                "divergence_limit",
                "limit_entries",
            )
        elif self.distill_top_k is None:
            idle["distill_top_k=None"] = ("renormalize",)
        if self.divergence_limit is None:
            idle["divergence_limit=None"] = ("limit_entries",)
        if self.divergence != "ddo":
            idle[f"divergence={self.divergence!r}."] = ("ddo_scale", "ddo_negative_weight")
        if not self.entropy_weight:
            idle["entropy_weight=0"] = ("entropy_temperature",)
        for what, names in idle.items():
            refused |= dict.fromkeys(names, f"it has no effect with {what.rstrip('.')}")
        return refused

    @property
    def has_teacher(self) -> bool:
        """Whether a teacher is asked for anything."""
        return self.divergence != "none" or self.positions == "surest"

    @property
    def states_change(self) -> bool:
        """Whether states are others at the end of training than at its start."""
        return self.share_range_end is not None or self.state_block_length_end is not None

    def student_states(self, spec: DiffusionSpec | None, progress: float = 0.0) -> StudentStates:
        """The states; blocks start where those of the model's attention do, if it has any.

        Args:
            spec: of the model, if it is known.
            progress: 0 at the first step, 1 at the last.
        """
        blocks = self.block_states or self.every_block or self.states == "rising"
        length = self.state_block_length or self.block_length or (None if spec is None else spec.block_length)
        if blocks and length is None:
            raise ValueError("block_states, every_block and states='rising' need blocks: set block_length")
        if length is not None and self.state_block_length_end is not None:
            length = round(length + (self.state_block_length_end - length) * progress)
        if blocks:
            self._check_blocks(spec, length)
        low, high = (
            first + (last - first) * progress
            for first, last in zip(self.share_range, self.share_range_end or self.share_range, strict=True)
        )
        return StudentStates(
            num_views=self.num_views,
            states=self.states,
            share_range=(low, high),
            shares=None if self.shares is None else tuple(self.shares),
            exponent=self.shares_exponent,
            block_length=length if blocks else None,
            every_block=self.every_block,
            positions=self.positions,
            complement=self.complement,
            scope=self.scope,
            block_origin="response" if spec is None else spec.grid_origin,
        )

    def _check_blocks(self, spec: DiffusionSpec | None, length: int | None) -> None:
        """Raises ValueError for blocks of states that the model's attention knows nothing of."""
        own = self.block_length if self.student_attention else None
        if spec is not None and spec.attention in BLOCK_KINDS:
            own = spec.block_length
        if own is not None and length != own:
            raise ValueError(
                f"state_block_length={self.state_block_length} and state_block_length_end={self.state_block_length_end}"
                f" are not allowed for a student that denoises blocks of {own}: states have the same ones"
            )
        if spec is not None and own is None and self.every_block and self.states == "recorded":
            raise ValueError(
                f"every_block=True is not allowed with states='recorded' for a model with attention={spec.attention!r}:"
                " it was never in such a state; choose block_states=True, or states='random'"
            )

    def recorded(self) -> tuple[str, ...]:
        """Nothing beside the steps that wrote tokens, which all rollouts have."""
        return ()
