"""wd1: scores, weights, losses and gradients of a micro-batch, which is one group.

The reference attends to padding, and adds up over the rows of the micro-batch: the loss here is a mean over groups.
"""

from __future__ import annotations

from pathlib import Path

import torch

from rl4dlm.likelihood.views import Views
from rl4dlm.training.advantages import softmax_weights
from tests.conformance.cases import Case
from tests.conformance.losses import Verdict, tools
from tests.conformance.test_log_probs import hidden_tokens, log_probs

OUTPUTS = {"loss", "per_token_logps", "positive_weights", "negative_weights", "grad"}


def run(case: Case, folder: Path) -> Verdict:
    """Compares scores, weights, loss and gradients."""
    from rl4dlm.algorithms.wd1 import WD1Trainer, signed_weights

    tools.check_outputs(case, OUTPUTS)
    settings, outputs, model = case.settings, case.outputs, tools.model_of(case)
    hidden = hidden_tokens(case)
    hidden = hidden[settings.get("this_itr_idx", 0) if len(hidden) > 1 else 0]
    if "per_token_logps" in outputs:
        tools.compare("per_token_logps", log_probs(case, hidden[None], model)[0], outputs["per_token_logps"])
    advantages = torch.tensor(case.inputs["advantages"], dtype=torch.float64)[None]
    for name, sign in (("positive_weights", 1), ("negative_weights", -1)):
        if outputs.get(name) is not None:
            tools.compare(name, softmax_weights(sign * advantages)[0], outputs[name])
    rows, negative = advantages.shape[1], float(settings.get("negatives", True))
    trainer = tools.trainer_for(
        case,
        folder,
        model,
        WD1Trainer,
        Views(hidden[:, None], tools.mask_of(case).double()[:, None]),
        negative_weight=negative,
        p_mask_prompt=settings["p_mask_prompt"],
        cfg_scale=settings.get("cfg_scale") or 0.0,
        num_generations=rows,
        per_device_train_batch_size=rows,
    )
    batch = tools.batch_of(case)
    batch["advantages"] = signed_weights(advantages, 1.0, negative)[0]
    tools.compare_loss(case, trainer._compute_loss(trainer.model, batch), model)
    return Verdict(equal=True)
