"""Settings of `SelfDistillationTrainer`: states, teachers, divergences.

Owns what is asked for and what does not go together; the algorithm is `rl4dlm.algorithms.self_distillation`'s.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from rl4dlm.likelihood.estimator import SCOPES
from rl4dlm.likelihood.masks import check_choice, check_count, check_range
from rl4dlm.likelihood.student_states import POSITIONS, STATES, TEACHER_VIEWS, StudentStates
from rl4dlm.models.distributions import DIVERGENCES
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.training.ratio_free import RATIO_SETTINGS, RatioFreeConfig

TEACHERS = ("policy", "reference")
OBJECTIVES = (*DIVERGENCES, "ddo", "none")
ORDERS = ("random", "confidence")
_NO_ADVANTAGES = "completions are learnt from or not; there are no advantages"


@dataclass
class SelfDistillationConfig(RatioFreeConfig):
    """Settings of self-distillation; the defaults are SDTT's idea on the model's own completions.

    Args:
        states: what a student sees: `"random"`, `"recorded"` or `"rising"`; see
            `rl4dlm.likelihood.student_states`.
        share_range: the share of tokens that is hidden, of the completion or of a block.
        block_states: hide and score one random block of `block_length`, everything behind it hidden; else all of the
            completion.
        positions: what is learnt at: all that is `"hidden"`; with recorded states what the `"next"` step wrote; or the
            `num_positions` at which the teacher is `"surest"`.
        num_positions: of `"surest"`.
        complement: states come in pairs that hide complementary tokens.
        num_views: states per completion and pass.
        teacher: the `"reference"`: the model before training, an adapter switched off, or what `sync_ref_model` makes
            of it (rounds with `ref_model_mixup_alpha: 1`, a moving average below); or the `"policy"` as it is.
        teacher_view: what the teacher sees: the `"same"`; more of the answer (`"suffix"`, `"subset"`); or what it
            writes itself in `teacher_steps` steps (`"later"`).
        teacher_share: the share that suffix shows, or that subset still hides: a range.
        teacher_steps: of `"later"`: m. 1 is `"same"`.
        teacher_written: of `"later"`: the share of what is hidden that all m steps write.
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
        rollouts_by: `"policy"`, or `"teacher"`: completions of the reference. Evaluation decodes with the policy.
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
    block_states: bool = field(default=False, metadata={"help": "Hide and score one block, and hide what follows it."})
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
    teacher_share: list[float] = field(
        default_factory=lambda: [0.25, 0.25],
        metadata={"help": "Range of the share that suffix shows or subset hides."},
    )
    teacher_steps: int = field(default=2, metadata={"help": "Steps of the teacher that the student makes at once."})
    teacher_written: float = field(default=1.0, metadata={"help": "Share of what is hidden that these steps write."})
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
        metadata={"help": "Whose completions are learnt from: policy or teacher.", "choices": ["policy", "teacher"]},
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
            ("rollouts_by", ("policy", "teacher")),
        ):
            check_choice(name, getattr(self, name), allowed)
        check_range("teacher_share", tuple(self.teacher_share))  # type: ignore[arg-type]
        check_count("teacher_steps", self.teacher_steps)
        check_count("num_positions", self.num_positions)
        if self.distill_top_k is not None:
            check_count("distill_top_k", self.distill_top_k)
        for name in ("distill_temperature", "entropy_temperature", "ddo_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed; it must be larger than 0")
        for name in ("divergence_weight", "hard_weight", "entropy_weight", "teacher_temperature"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed; it must be 0 or larger")
        if not 0 < self.teacher_written <= 1:
            raise ValueError(
                f"teacher_written={self.teacher_written} is not allowed; it must be larger than 0 and at most 1"
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
        if self.teacher == self.rollouts_by == "policy" and self.sync_ref_model:
            raise ValueError("sync_ref_model=True is not allowed with teacher='policy': there is no reference model")
        if self.student_attention is not None:
            if self.student_attention != "block_causal":
                raise ValueError(
                    f"student_attention={self.student_attention!r} is not allowed; it must be block_causal or None"
                )
            if self.rollouts_by != "teacher" or self.teacher != "reference" or self.block_length is None:
                raise ValueError(
                    f"student_attention='block_causal' is not allowed with rollouts_by={self.rollouts_by!r}, teacher="
                    f"{self.teacher!r} and block_length={self.block_length}: it needs completions and distributions of "
                    "a reference that sees everything, and the length of its own blocks"
                )
        if not self.disable_dropout:
            raise ValueError("disable_dropout=False is not supported: teacher and student would differ by chance")
        self.student_states(None)

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
        if self.positions != "surest":
            idle[f"positions={self.positions!r}"] = ("num_positions",)
        if self.teacher_view not in ("suffix", "subset"):
            idle[f"teacher_view={self.teacher_view!r}"] = ("teacher_share",)
        if self.teacher_view != "later":
            own = ("teacher_steps", "teacher_written", "teacher_order", "teacher_temperature")
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

    def student_states(self, spec: DiffusionSpec | None) -> StudentStates:
        """The states; blocks start where those of the model's attention do, if it has any."""
        blocks = self.block_states or self.states == "rising"
        if blocks and self.block_length is None and (spec is None or spec.block_length is None):
            raise ValueError("block_states and states='rising' need blocks: set block_length")
        length = self.block_length or (None if spec is None else spec.block_length)
        return StudentStates(
            num_views=self.num_views,
            states=self.states,
            share_range=tuple(self.share_range),  # type: ignore[arg-type]
            block_length=length if blocks else None,
            positions=self.positions,
            complement=self.complement,
            scope=self.scope,
            block_origin="response" if spec is None else spec.grid_origin,
        )

    def recorded(self) -> tuple[str, ...]:
        """Nothing beside the steps that wrote tokens, which all rollouts have."""
        return ()
