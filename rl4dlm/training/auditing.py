"""Rollouts of inexact caches in training: a share of them is audited, and draws may be corrected for.

Owns which rows are audited, what happens above the bound, and the importance weights. The comparison itself is
`rl4dlm.rollout.audit`'s. TRL's private names are used here, and checked when the file is imported.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from rl4dlm.rollout.audit import audit, count_forwards, summary, why_not
from rl4dlm.rollout.noise import keyed_uniform
from rl4dlm.rollout.rollout import Rollout
from rl4dlm.training.audit_settings import AUDIT_SHARE
from rl4dlm.training.contract import check_contract
from rl4dlm.training.decoder import DecoderTrainer
from rl4dlm.training.loss_parts import PolicyScores, resized
from rl4dlm.training.setup import swapped

logger = logging.getLogger(__name__)

check_contract(
    GRPOTrainer,
    parameters={"_log_metric": ["name", "value"]},
    attributes=["use_vllm", "vllm_importance_sampling_correction"],
    keys={"_compute_loss": ["importance_sampling_ratio"]},
)

METRICS = {
    "delta": "diffusion/audit_delta",
    "max_delta": "diffusion/audit_max_delta",
    "agreement": "diffusion/audit_agreement",
    "ratio": "diffusion/audit_ratio",
    "effective_share": "diffusion/audit_effective_share",
}
"""Names of what `rl4dlm.rollout.audit.summary` says."""

FALLBACK = "RolloutFallback"
"""Where the state of training, and so a checkpoint, says that rollouts are decoded exactly from now on."""


class AuditingTrainer(DecoderTrainer):
    """Measures what an inexact cache does to rollouts, and what to do about it."""

    _current_scores: PolicyScores | None
    _warned_of: float = 0.0
    _told_why_not: bool = False

    def _audit(self, rollout: Rollout) -> None:
        """Audits a share of a generation batch, of which `rollout` has this process's rows, and acts on what it finds.

        All processes find the same, since what they measure is gathered, and so fall back together.
        """
        share = (0.0 if rollout.exact else AUDIT_SHARE) if self.args.audit_share is None else self.args.audit_share
        if not share or not rollout.recorded:
            return
        reason = why_not(rollout.decoding)
        if reason is not None:
            if not self._told_why_not:
                logger.warning("rollouts are not audited: %s", reason)
                self._told_why_not = True
            return
        rows, size = self._audited_rows(rollout.row_ids, share), self.args.per_device_train_batch_size
        forwards: int | None = None
        if self._sharded:  # every process makes as many forwards as the one that has most to do
            count = torch.tensor([count_forwards(rollout, rows, size)], device=self.accelerator.device)
            forwards = int(self.accelerator.gather(count).max())
        with self._policy_that_decodes() as model:
            found = audit(model, rollout, rows, rows_per_forward=size, forwards=forwards)
        said = summary(self.accelerator.gather(found.sums()[None]))
        for name, value in said.items():
            self._log_metric(METRICS[name], value)
        if self.args.audit_bound is not None and said.get("delta", 0.0) > self.args.audit_bound and not rollout.exact:
            self._act_on(said, rollout.cache)

    def _audited_rows(self, row_ids: list[int], share: float) -> list[int]:
        """Those of this process's rows that are audited: which ones they are of all processes' depends on ids alone."""
        ids = torch.tensor(row_ids, device=self.accelerator.device)
        mine = keyed_uniform(self.args.seed, "audit", ids)
        everyone: Tensor = self.accelerator.gather(mine)
        last = everyone.sort().values[math.ceil(share * len(everyone)) - 1]
        rows: list[int] = (mine <= last).nonzero().squeeze(-1).tolist()
        return rows

    def _act_on(self, said: dict[str, float], cache: str) -> None:
        action, main = self.args.audit_action, self.accelerator.is_main_process
        numbers = (
            f"rollouts with cache={cache!r} were drawn from log-probabilities {said['delta']:.3g} nats per token off "
            f"those of the model, which is above audit_bound={self.args.audit_bound} (largest {said['max_delta']:.3g}, "
            f"mean importance weight {said['ratio']:.3g}, effective share {said['effective_share']:.3g})"
        )
        if action != "exact" and main and said["delta"] >= 2 * self._warned_of:  # again if it has doubled
            logger.warning("%s", numbers)
            self._warned_of = said["delta"]
        if action != "warn" and FALLBACK not in self.state.stateful_callbacks:
            # Where transformers keeps what callbacks have to say, so that it is in checkpoints.
            self.state.stateful_callbacks[FALLBACK] = {"args": {}, "attributes": {"delta": said["delta"]}}
            if main:
                logger.log(
                    logging.INFO if action == "exact" else logging.WARNING,
                    "%s; from the next generation batch on they are decoded exactly, also when the run is resumed",
                    "they" if action == "both" else numbers,
                )

    def _fall_back_if_told(self) -> None:
        """Decodes exactly from now on if an audit has said so, in this run or in the one that it goes on from."""
        if FALLBACK in self.state.stateful_callbacks:
            self.decoding = self.decoding.exactly()

    def _check_correction(self) -> None:
        """Refuses weights that would be no importance weights."""
        if self.args.rollout_correction != "none" and not self.estimator.as_drawn:
            raise ValueError(
                f"rollout_correction={self.args.rollout_correction!r} is not supported: {type(self).__name__} scores "
                "tokens in other contexts than those they were drawn in, so that the ratio of the two says nothing "
                "about the cache; set it to 'none'"
            )

    def trl_loss(self, batch: dict[str, Any]) -> Tensor:
        """TRL's loss of a micro-batch, its terms weighted as `rollout_correction` says."""
        if self.args.rollout_correction == "none":
            return super().trl_loss(batch)
        # TRL's own correction, of what another engine has drawn: the same formula, switched on by that engine.
        with swapped(self, "use_vllm", True):
            return super().trl_loss({**batch, "importance_sampling_ratio": self._drawn_ratio(batch)})

    @torch.no_grad()
    def _drawn_ratio(self, batch: dict[str, Any]) -> Tensor:
        """min(C, old over recorded probability of the draws), `[B, C]` per token or `[B, 1]` per sequence."""
        assert self._current_scores is not None
        current, mask = self._current_scores.log_probs.detach(), batch["completion_mask"]
        old = batch.get("old_per_token_logps")
        old = current if old is None else old
        width = current.shape[1]
        drawn = mask * resized(batch["drawn"], width)
        difference = (old - resized(batch["drawn_log_probs"], width)) * drawn
        whole = self.args.rollout_correction == "sequence_truncate"
        ratio = (difference.sum(-1, keepdim=True) if whole else difference).exp()
        ratio = ratio.clamp(max=self.args.rollout_correction_clip_max).to(current)
        weight = drawn.bool().any(-1, keepdim=True) if whole else drawn
        self.log_mean("sampling/importance_sampling_ratio/mean", ratio, weight)
        return ratio
