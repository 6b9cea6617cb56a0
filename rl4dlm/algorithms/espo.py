"""ESPO (Ou et al., arXiv 2512.03759): policy optimisation with one ratio per sequence, of evidence lower bounds.

B(y) is an unbiased Monte Carlo estimate of the evidence lower bound of log p(y), from pairs of views that hide
complementary tokens (`rl4dlm.likelihood.elbo`), the same ones for the current, the old and the reference policy. With n
the length of the canvas and A = r - mean of the others' r, the loss of a completion is

    -min(rho A, clip(rho, 1 - epsilon, 1 + epsilon) A) + beta / (2 n) (B - B_ref)^2,    rho = exp((B - B_old) / n).

The KL term is of the whole bounds, divided by n once; `kl_estimator` and `kl_target` offer others. A batch of
completions is used for mu passes with views of their own.

Where the paper and its released code differ, or both are wrong, this is decided:
- Baseline: the code leaves one out (the default here); the paper writes the group's mean, which is (G - 1) / G of it.
- The code draws the number of hidden tokens of a row from its place in the micro-batch and rounds halves to even, which
  leaves out half of all numbers for some sizes. Here levels are spread over rows by their ids and all numbers occur.
- The code noises and scores the whole canvas, and n is its length. `scope="canvas"`, the default, is the same;
  with `"valid"` tokens behind the first end stay hidden, and n is the number of the others.
- The code's switch for complementary views has no effect; here `complement=False` is live.
- The weights of its pairs add up to (n + 1) / 2 where a view hides nothing, else to n + 1; those of `form="count"` to n
  always, which varies less. It cancels where the policy has not moved; the KL term and random tokens feel it.
- The code passes no attention mask when it scores; here padding is hidden.
- The code logs minus the bound per token as `entropy`. Here that is the mean entropy of hidden tokens, as in TRL.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from rl4dlm.likelihood.elbo import ELBO
from rl4dlm.likelihood.estimator import SCOPES, Estimator
from rl4dlm.likelihood.masks import check_choice
from rl4dlm.training.advantages import BASELINES, above_baseline, check_baseline
from rl4dlm.training.sequence_ratio import SequenceRatioConfig, SequenceRatioTrainer
from rl4dlm.training.setup import of_noise

PAIR_FORMS = ("count_with_zero", "count")


@dataclass
class ESPOConfig(SequenceRatioConfig):
    """Settings of ESPO; the defaults are those of the paper's GSM8K runs, but for `denoising_steps`, 256 there.

    Args:
        num_generations: G, completions of a prompt; `per_device_train_batch_size` is one group. block_length: 32.
        learning_rate: of AdamW.
        num_views: views per completion: 4 are two pairs.
        complement: views come in pairs that hide complementary tokens; `num_views` is even then.
        form: how many tokens a view hides: `"count_with_zero"`, 0 to n, as published, or `"count"`, 1 to n; see
            `rl4dlm.likelihood.elbo`.
        scope: which tokens are noised and scored: the whole `"canvas"`, or `"valid"` ones, up to the first end.
        stop_at_eos: off, since what is behind the end is scored, too; only with scope `"valid"` may rows stop there.
        baseline: `"leave_one_out"` or `"group_mean"`.
        kl_estimator: `"k2"`; the paper finds that with `"k3"` it stagnates, and with `"k1"`, which is refused here,
            that it oscillates.
        num_iterations: mu, passes over a batch of completions.
        epsilon: clip range: 0.2, which hardly ever clips a ratio of this scale, and 0 for Countdown.
        beta: weight of the KL term: 0.001 for GSM8K and MATH, 0.003 for Countdown, 0.01 for Sudoku and code.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    paper_block_length: ClassVar[int | None] = 32
    num_generations: int | None = field(default=6, metadata={"help": "Completions of a prompt (G), the paper's 6."})
    per_device_train_batch_size: int = field(
        default=6, metadata={"help": "Completions per process and pass; one group."}
    )
    learning_rate: float = field(default=3e-6, metadata={"help": "Learning rate of AdamW, the paper's."})
    num_views: int = field(default=4, metadata={"help": "Views that a bound is estimated from, per completion."})
    complement: bool = field(default=True, metadata={"help": "Views come in pairs that hide complementary tokens."})
    form: str = field(
        default="count_with_zero",
        metadata={"help": f"How many tokens views hide: {', '.join(PAIR_FORMS)}.", "choices": list(PAIR_FORMS)},
    )
    scope: str = field(
        default="canvas",
        metadata={"help": "Tokens that are noised and scored: valid or canvas.", "choices": list(SCOPES)},
    )
    stop_at_eos: bool = field(
        default=False, metadata={"help": "Stop a row at its end; not with scope=canvas, which scores what follows."}
    )
    baseline: str = field(
        default="leave_one_out",
        metadata={"help": "What rewards are compared with: group_mean or leave_one_out.", "choices": list(BASELINES)},
    )
    num_iterations: int = field(default=8, metadata={"help": "Passes over a batch of completions (mu)."})
    epsilon: float = field(default=0.2, metadata={"help": "Clip range of the policy ratio, per sequence."})
    beta: float = field(default=1e-3, metadata={"help": "Weight of the KL term; 0 needs no reference model."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("form", self.form, PAIR_FORMS)
        self.estimator()
        check_baseline(self)

    def estimator(self) -> ELBO:
        """The estimator that these settings describe; ValueError for settings that describe none."""
        return ELBO(self.num_views, self.form, self.complement, stratify="rows", scope=self.scope)


class ESPOTrainer(SequenceRatioTrainer):
    """ESPO in TRL's GRPO loop; `ESPOConfig` has its settings, the module's docstring the algorithm."""

    config_class = ESPOConfig
    args: ESPOConfig
    advantages_read_scores = False
    _tag_names = ["trl", "rl4dlm", "espo"]  # noqa: RUF012  (TRL's own form)
    _name = "ESPO"
    _paper = {  # noqa: RUF012  (TRL's own form)
        "title": "Principled RL for Diffusion LLMs Emerges from a Sequence-Level Perspective",
        "id": "2512.03759",
    }

    def build_estimator(self) -> Estimator:
        """Pairs of complementary views with the weights of their counts."""
        return of_noise(self.model, self.args.estimator())

    def advantages(self, rewards: Tensor, batch: dict[str, Any]) -> Tensor | None:
        """Rewards above the baseline."""
        return above_baseline(rewards, self.args.baseline, self.args.scale_rewards)
