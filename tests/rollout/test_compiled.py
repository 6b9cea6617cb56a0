"""Compiled forwards decode the same."""

from __future__ import annotations

import pytest
import torch

from rl4dlm.models.scoring import attach_scoring
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from tests.rollout.denoisers import assert_same_rows
from tests.rollout.queues import model, prompts, settings


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cache", ["dual", pytest.param("prefix", marks=pytest.mark.slow)])
def test_a_compiled_trunk_decodes_the_same(cache: str):
    found = attach_scoring(model())
    config = DecodingConfig(**settings(steps=6, cache=cache, stop_at_eos=False))
    torch._dynamo.reset()
    compiled = RolloutEngine(found, compile="aot_eager").generate(prompts()[1:2] * 2, config)
    frames = torch._dynamo.utils.counters["frames"]["ok"]
    assert frames, "nothing was compiled"
    assert "forward" not in vars(found.base_model)
    assert_same_rows(compiled, RolloutEngine(found).generate(prompts()[1:2] * 2, config))


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="compile='nonsense' is no backend of torch.compile here; choose one of"):
        RolloutEngine(model(), compile="nonsense")
