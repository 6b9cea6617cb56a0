"""The recorded model's own logits: that it loads into a stock class, and that scoring sees the same logits."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from tests.conformance import report
from tests.conformance.cases import Case, load_cases
from tests.conformance.denoisers import denoiser

TOLERANCE = 2e-6
FORM = re.compile(r"(logits|argmax|logsumexp)_(no_mask|with_attention_mask)(?:_row(\d+))?")


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in load_cases() if c.kind == "logits"])
def test_logits(case: Case):
    ids = torch.tensor(case.inputs["input_ids"])
    mask = torch.tensor(case.inputs.get("attention_mask") or torch.ones_like(ids).tolist())
    compared = 0
    for name, outputs in case.outputs.items():
        model = denoiser(case, name)
        for attended, positions in ((torch.ones_like(mask), "no_mask"), (mask, "with_attention_mask")):
            padded = torch.arange(ids.shape[1]).expand_as(ids)  # the record counts positions over the padded row
            with torch.no_grad():
                plain = model(input_ids=ids, attention_mask=attended, position_ids=padded).logits
                scored = all_logits(model, ids, attended, padded)
                corrected = all_logits(model, ids, attended, None)
            torch.testing.assert_close(scored, plain, rtol=0, atol=1e-10)
            # Left padding moves all positions of a row alike, which rotary embeddings do not notice.
            alike = attended.bool() & (attended.diff(dim=-1) >= 0).all(-1, keepdim=True)
            torch.testing.assert_close(corrected[alike], plain[alike], rtol=0, atol=1e-10)
            for key, value in outputs.items():
                kind, which, row = FORM.fullmatch(key).groups()
                if which != positions:
                    continue
                computed = scored if row is None else scored[int(row)]
                if kind == "argmax":
                    assert torch.equal(computed.argmax(-1), torch.tensor(value))
                else:
                    computed = computed.logsumexp(-1) if kind == "logsumexp" else computed
                    expected = torch.tensor(value, dtype=computed.dtype)
                    torch.testing.assert_close(computed, expected, rtol=0, atol=TOLERANCE)
                compared += 1
    assert compared == sum(len(outputs) for outputs in case.outputs.values())
    report.equal[case.family].append(case.name)


def all_logits(model: torch.nn.Module, ids: Tensor, mask: Tensor, positions: Tensor | None) -> Tensor:
    """Logits `[B, T, V]` as the library's scoring hands them to a reduction."""
    (flat,) = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        score_positions=torch.ones_like(ids).bool(),
        score_reduce=lambda logits, part: (logits,),
    )
    return flat.view(*ids.shape, -1)
