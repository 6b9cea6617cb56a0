"""d2 with StepMerge (Wang et al., arXiv 2509.21474): GRPO on a completion's steps in N stretches.

The S steps of a record are cut into N stretches of equal length, and the tokens of a stretch are scored in the state
before it: N = 1 is the mean field of d1, N = S is exact, and the distance to the exact trajectory likelihood is at most
L log(S / N + 1) and a part that does not depend on N. With rho the ratio of a token there, the loss of a completion is

    1 / L  sum over tokens of  -min(rho A, clip(rho, 1 - epsilon, 1 + epsilon) A).

N is 16 for Sudoku and 8 for GSM8K in the paper. No code was found: what the paper says of clipping, advantages and KL
could not be read, and is TRL's here. d2-AnyOrder needs models that predict in any order from what was written before
alone, which masked models that attend both ways are not.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from rl4dlm.training.trajectory import TrajectoryTrainer
from rl4dlm.training.trajectory_settings import AGGREGATIONS, STEPS, TrajectoryConfig


@dataclass
class D2Config(TrajectoryConfig):
    """Settings of d2 with StepMerge.

    Args:
        steps: `"segments"`. num_scored_steps: N, stretches of a completion.
        aggregation: `"canvas"`: the sum over tokens, over the length of the canvas.

    Raises:
        ValueError: names the setting, the value and what is allowed.
    """

    steps: str = field(default="segments", metadata={"help": "Recorded steps that are scored.", "choices": list(STEPS)})
    num_scored_steps: int | None = field(
        default=8, metadata={"help": "Stretches that a completion's steps are cut into."}
    )
    aggregation: str = field(
        default="canvas",
        metadata={"help": "How losses of tokens become one number.", "choices": list(AGGREGATIONS)},
    )

    def __post_init__(self) -> None:
        if self.steps != "segments":
            raise ValueError(f"steps={self.steps!r} is not allowed; d2 cuts them into segments")
        super().__post_init__()


class D2Trainer(TrajectoryTrainer):
    """d2 in TRL's GRPO loop; `D2Config` has its settings, the module's docstring the algorithm."""

    config_class = D2Config
    args: D2Config
    _tag_names = ["trl", "rl4dlm", "d2"]  # noqa: RUF012  (TRL's own form)
    _name = "d2"
    _paper = {  # noqa: RUF012  (TRL's own form)
        "title": "d2: Improved Techniques for Training Reasoning Diffusion Language Models",
        "id": "2509.21474",
    }
