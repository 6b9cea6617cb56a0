"""What a rollout says about itself, as numbers for the log.

Owns the definitions of the `diffusion/*` metrics. Gathering over processes and averaging over steps are TRL's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rl4dlm.rollout.rollout import Rollout


def rollout_metrics(rollout: Rollout, seconds: float, num_processes: int) -> dict[str, float]:
    """Averages over the rows of one process; TRL then averages over processes.

    - `nfe`: forwards per row; guidance counts two. Not of rollouts without a record, as the next.
    - `tokens_per_forward`: canvas tokens written, over forwards.
    - `early_eos_share`: rows whose first end-of-sequence token comes before the last slot.
    - `rollout_tokens_per_second`: valid tokens of all processes, over wall time.
    """
    valid = rollout.valid.sum(-1)
    written = (rollout.trace.commit_step >= 0).sum()
    forwards = {
        "diffusion/nfe": rollout.nfe.float().mean().item(),
        "diffusion/tokens_per_forward": (written / rollout.nfe.sum().clamp(min=1)).item(),
    }
    return {
        **(forwards if rollout.recorded else {}),
        "diffusion/early_eos_share": (valid < rollout.canvas.shape[1]).float().mean().item(),
        "diffusion/rollout_tokens_per_second": num_processes * valid.sum().item() / max(seconds, 1e-9),
    }


def identical_groups(canvas: Tensor, valid: Tensor, num_generations: int) -> float:
    """Share of groups whose completions are all the same; they teach nothing.

    Args:
        canvas: long `[N * G, L]`, groups one after another. valid: bool `[N * G, L]`.
        num_generations: G.
    """
    text = torch.where(valid, canvas, -1).view(-1, num_generations, canvas.shape[1])  # [N, G, L]
    return (text == text[:, :1]).all(-1).all(-1).float().mean().item()


def rollout_gap(drawn: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
    """Sum over tokens of |log-probability at drawing time - score|, and the number of tokens: `[2]`.

    Args:
        drawn: `[B, C]`, log-probability with which each token was drawn: untempered, over the whole vocabulary; where
            scores are tempered, that of the distribution that it was drawn from.
        scores: `[B, C]`, its score in training. mask: `[B, C]`, the tokens to count.
    """
    mask = mask.bool()
    return torch.stack([(drawn - scores.detach()).abs()[mask].sum(), mask.sum().to(scores.dtype)])
