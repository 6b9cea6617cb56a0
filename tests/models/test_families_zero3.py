"""Loading while DeepSpeed partitions: each process builds shards, the first reads the values (two processes, gloo)."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from rl4dlm.models.loading import save_denoiser
from tests.launch import launch
from tests.models.families import build

WORKER = Path(__file__).with_name("zero3_worker.py")


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="deepspeed is not installed")
def test_every_weight_arrives(tmp_path: Path):
    """Renamed, split and fused ones, a tied head and buffers, from both forms."""
    for name in ("llada", "llada2", "sdar_moe", "a2d_qwen3", "diffusion_gemma"):
        (tmp_path / name).mkdir()
        model = build(name)
        if name == "llada2":
            model.model.layers[1].mlp.gate.e_score_correction_bias += 0.5
        torch.save(model.state_dict(), tmp_path / name / "weights.pt")
        for form in ("hub", "rl4dlm"):
            save_denoiser(model, tmp_path / name / form, form=form)
    launch(WORKER, tmp_path, tmp_path)
    assert [json.loads((tmp_path / f"wrong{rank}.json").read_text()) for rank in (0, 1)] == [[], []]
