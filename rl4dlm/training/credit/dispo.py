"""DiSPO: states of the rollout are filled in several times, and judged by what becomes of them (arXiv 2602.06462).

At K chosen states x of a completion, Z fillings z of all open slots M are drawn from the logits that the rollout has
computed anyway, each slot by itself. What a state is worth is J(x) = E[R(x with z)], and with b_z the mean reward of
the state's other fillings

    E[(R(x with z) - b_z) sum over M of grad log p(z_i | x)] = grad J(x)

exactly, whatever the state (enumerated in the tests). The loss beside the trainer's own is

    weight * mean over completions, states, fillings of
        1/|M| sum over i in M, up to the first end, of  -min(rho_i A_z, clip(rho_i, 1 - epsilon, 1 + epsilon) A_z),

A_z = R - b_z and rho_i the ratio of p(z_i | x) to that of the policy that decoded. Tokens behind the end of a filled
canvas change no reward, and leaving them out changes no expectation; dividing by what is left would.

The paper's abstract has the objective; which states, Z and the weight beside the rollout's own loss could not be read,
and are ours: given steps, or K evenly spread ones, decided before the rollout, since a choice that has seen what came
of a state biases the gradient. Log-probabilities are at `score_temperature`, as everywhere: where draws were at another
temperature, or filtered, the identity holds no more exactly for fillings than for completions.

A state's Z fillings are scored from one forward; with `one_view=True`, which feeds one view at a time, from Z.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from rl4dlm.likelihood.masks import check_count
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.requests import completes
from rl4dlm.rollout.rollout import Rollout
from rl4dlm.rollout.schedules import registry
from rl4dlm.training.clipping import Clip, surrogate
from rl4dlm.training.credit.credit import Credit, Fillings

FILLINGS = "fillings"


class DiSPO(Credit):
    """A loss of fillings of recorded states; see the module.

    Every reward function is called once more, with K Z canvases per completion, and rollouts have no cache.

    Args:
        states: K, evenly spread over the steps from the first on, or the steps themselves, from 0 (nothing is written).
            Schedules that take as many steps as they need allow steps only; a row that has ended has no state.
        fillings: Z, at least 2; the first has what the step itself chose from.
        weight: of this loss beside the trainer's, above 0.
        epsilon: clip range of a token's ratio, above 0.

    Raises:
        ValueError: names the argument, the value and what is allowed; with a trainer, also settings that do not fit.
    """

    def __init__(
        self, states: int | Collection[int] = 4, fillings: int = 4, weight: float = 1.0, epsilon: float = 0.2
    ) -> None:
        whole = not isinstance(states, bool | str) and isinstance(states, int | Collection)
        if not whole or not (states >= 1 if isinstance(states, int) else states and all(map(_is_step, states))):
            raise ValueError(
                f"states={states!r} is not allowed; it is a number of states, 1 or larger, or steps from 0 on"
            )
        check_count("fillings", fillings)
        if fillings < 2:
            raise ValueError(
                f"fillings={fillings} is not allowed; it must be 2 or larger, since each is compared with the others"
            )
        for name, value in (("weight", weight), ("epsilon", epsilon)):
            if not 0 < value < float("inf"):
                raise ValueError(f"{name}={value} is not allowed; it must be larger than 0, and finite")
        self.states, self.count = states, fillings
        self.weight, self.epsilon = weight, epsilon
        self._steps: tuple[int, ...] = ()

    def recorded(self, decoding: DecodingConfig) -> dict[str, Any]:
        """Fillings at the chosen steps, or at all if the algorithm records all for itself."""
        schedule = decoding.build_schedule()
        for name, does in (("resize", "changes the length of the canvas"), ("inputs", "feeds something else than ids")):
            if getattr(schedule, name, None) is not None:
                raise ValueError(f"schedule={decoding.schedule!r} is not allowed with credit=DiSPO: it {does}")
        if not decoding.temperature:
            raise ValueError(
                "temperature=0 is not allowed with credit=DiSPO: all fillings of a state would be the same"
            )
        known = registry.lookup(decoding.schedule).takes_steps
        total = decoding.steps_per_block * decoding.num_blocks
        if isinstance(self.states, int):
            if not known or self.states > total:
                raise ValueError(
                    f"states={self.states} cannot be spread over the steps of schedule={decoding.schedule!r}, "
                    + (
                        f"of which there are {total}"
                        if known
                        else "which takes as many as it needs; name steps instead"
                    )
                )
            self._steps = tuple(k * total // self.states for k in range(self.states))
        else:
            self._steps = tuple(sorted(set(self.states)))
            if known and self._steps[-1] >= total:
                raise ValueError(
                    f"states={self.states!r} is not allowed: denoising_steps are {total}, counted from 0; the last is "
                    f"{total - 1}"
                )
        everything = completes(decoding.record)
        return {
            "record": (*decoding.record, FILLINGS),
            "record_steps": None if everything else self._steps,
            "num_fillings": self.count,
        }

    def fillings(self, rollout: Rollout) -> Fillings:
        """Those of the chosen states; a row that made no such step has its completion there, with nothing open."""
        trace, config = rollout.trace, rollout.decoding
        assert trace.fillings is not None and config is not None
        canvas = rollout.canvas
        shown = {step: state for step, state in enumerate(rollout.states()) if step in self._steps}
        states, tokens = [], []
        for place, step in enumerate(self._steps):
            column = step if config.record_steps is None else place
            made = (trace.steps > step)[:, None]
            states.append(torch.where(made, shown[step], canvas) if step in shown else canvas)
            filled = canvas[:, None].expand(-1, self.count, -1)
            if step in shown:
                filled = torch.where(made[:, None], trace.fillings[:, column].long(), filled)
            tokens.append(filled)
        return Fillings(torch.stack(states, dim=1), torch.stack(tokens, dim=1))


def filling_losses(
    log_probs: Tensor, log_ratio: Tensor, advantages: Tensor, scored: Tensor, opened: Tensor, epsilon: float
) -> Tensor:
    """The loss of each filling, `[..., Z]`, as in the module.

    Args:
        log_probs: `[..., Z, L]`. log_ratio: the same, to the policy that decoded. advantages: `[..., Z]`.
        scored: bool `[..., Z, L]`, open slots up to the first end. opened: `[..., Z]`, |M|.
        epsilon: the clip range.
    """
    losses = surrogate(log_ratio, log_probs, advantages[..., None], Clip("ppo", epsilon))
    return torch.where(scored, losses, torch.zeros_like(losses)).sum(-1) / opened.clamp(min=1)


def _is_step(step: Any) -> bool:
    return isinstance(step, int) and not isinstance(step, bool) and step >= 0
