"""What was counted of each sharding agrees with the model of docs/scaling.md, whose tables are these numbers."""

from __future__ import annotations

import json

import pytest

from benchmarks import sharding

FOUND = json.loads(sharding.RESULTS.read_text(encoding="utf-8"))["found"]
PAGE = sharding.PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", sharding.KINDS)
@pytest.mark.parametrize(("what", "micro_batches"), [("update", 1), ("update_of_two", 2)])
def test_what_is_sent_in_an_update(kind, what, micro_batches):
    weights = 4 * FOUND[kind]["parameters"]
    model = sharding.modelled(kind, weights=weights, gradients=weights, micro_batches=micro_batches)
    counted = FOUND[kind][what]
    assert counted.keys() == model.keys()
    # FSDP2 keeps the root's weights from forward to backward, ZeRO-3 those of the last layers.
    assert sharding.sent(counted, 2) == pytest.approx(sharding.sent(model, 2), rel=0.05)


def test_what_a_forward_without_gradient_gathers():
    weights = 4 * FOUND["ddp"]["parameters"]
    assert FOUND["ddp"]["forward"] == FOUND["zero2"]["forward"] == {}
    for kind in ("zero3", "fsdp2"):
        assert FOUND[kind]["forward"]["all_gather"] == pytest.approx(weights, rel=0.06)


def test_what_is_held():
    """Weights, gradients where they stay, and Adam's two numbers per weight; DeepSpeed copies weights."""
    share = {kind: FOUND[kind]["held"] / (4 * FOUND[kind]["parameters"]) for kind in sharding.KINDS}
    assert share["ddp"] == pytest.approx(1 + 2 + 1, rel=0.01)
    assert share["zero2"] == pytest.approx(1 + (2 + 1) / 2, rel=0.05)
    assert share["zero3"] == pytest.approx((1 + 2 + 1 + 1) / 2, rel=0.05)
    assert share["fsdp2"] == pytest.approx((1 + 2) / 2, rel=0.01)


def test_a_ring_sends_its_share():
    assert sharding.sent({"all_reduce": 8}, 4) == 12 and sharding.sent({"all_gather": 8, "reduce_scatter": 4}, 4) == 9
    assert sharding.sent({"broadcast": 100}, 1) == 0


def test_the_page_has_the_tables():
    assert sharding.measured_table(FOUND) in PAGE
    assert sharding.modelled_table() in PAGE
