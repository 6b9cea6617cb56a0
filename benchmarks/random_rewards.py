"""Why do rewards that know nothing gain on Sudoku? Ten seeds of them, and weights that are only shaken.

On the proving ground the control with random rewards gains points on Sudoku for some seeds. Here it runs with ten
seeds, and each model that comes out has a counterpart: the start with normal noise added to its weights, tensor by
tensor of the same norm as what training has moved. All are measured on the same test rows.

    python benchmarks/random_rewards.py

writes `benchmarks/results/random_rewards.json` and prints the table of `docs/evidence.md`, in four minutes of a core.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.proving_ground.measuring import decoding
from benchmarks.proving_ground.settings import Run
from benchmarks.proving_ground.statistics import student_half
from benchmarks.proving_ground.training import train
from rl4dlm import DecodingConfig, load_denoiser, load_task, load_tokenizer
from rl4dlm.evaluation import encode_prompt, evaluate, machine, versions
from rl4dlm.files import write_text
from rl4dlm.models.spec import DiffusionSpec

RESULT = Path(__file__).parent / "results" / "random_rewards.json"
SEEDS = range(10)
SPEEDS = (1, 2, 4, 8)
RUN = Run("few_clue_sudoku", "full", "random_reward")
KINDS = {"before": "start", "random": "random rewards", "shaken": "weights shaken as far"}


def main() -> None:
    began = time.process_time()
    tokenizer = load_tokenizer(RUN.checkpoint)
    models: list[dict[str, Any]] = [{"kind": "before", **measured(load_denoiser(RUN.checkpoint), tokenizer)}]
    for seed in SEEDS:
        start, trained = load_denoiser(RUN.checkpoint), load_denoiser(RUN.checkpoint)
        run = Run(RUN.task, RUN.model, RUN.name, seed=seed)
        train(run, trained, tokenizer, lambda _: 0.0)
        models.append({"kind": "random", "seed": seed, **measured(trained, tokenizer)})
        models.append({"kind": "shaken", "seed": seed, **measured(shaken(start, trained, seed), tokenizer)})
        print({m["kind"]: m["solved"]["4"] for m in models[-2:]}, flush=True)
    report = {
        "command": "python benchmarks/random_rewards.py",
        "settings": RUN.settings(),
        "models": models,
        "cpu_seconds": round(time.process_time() - began, 1),
        "machine": machine(),
        "versions": versions(),
    }
    write_text(RESULT, json.dumps(report, indent=1) + "\n")
    print(table(report))


def shaken(start: Any, trained: Any, seed: int) -> Any:
    """The start with noise as large, tensor by tensor, as the way to the trained model."""
    model, generator = copy.deepcopy(start), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight, other in zip(model.parameters(), trained.parameters(), strict=True):
            noise = torch.randn(weight.shape, generator=generator)
            weight += noise * ((other - weight).norm() / noise.norm().clamp(min=1e-12))
    return model


@torch.no_grad()
def measured(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Share of test rows solved by tokens per step, and the entropy of a slot while all are open, in nats."""
    model.eval()
    task = load_task(RUN.task, **RUN.ground.arguments)
    decodings: dict[str | int, DecodingConfig] = {n: decoding(RUN, n) for n in SPEEDS}
    found = evaluate(model, tokenizer, task, decodings=decodings, split="test", limit=RUN.scale.test)
    prompts = [encode_prompt(tokenizer, row["prompt"]) for row in task.rows("test")[: RUN.scale.test]]
    masks = [DiffusionSpec.of(model).mask_token_id] * RUN.ground.canvas
    logits = model(input_ids=torch.tensor([ids + masks for ids in prompts])).logits[:, -len(masks) :].double()
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean().item()
    return {"solved": {str(n): share for n, share in found.solve_rates.items()}, "first_entropy": round(entropy, 4)}


def table(report: Mapping[str, Any]) -> str:
    """Means over seeds with Student's intervals, and the standard deviation between seeds at four tokens per step."""
    lines = ["| | " + " | ".join(f"{n} per step" for n in SPEEDS) + " | between seeds at 4 | entropy of open slots |"]
    lines.append("|---|" + "---:|" * (len(SPEEDS) + 2))
    for kind, title in KINDS.items():
        found = [model for model in report["models"] if model["kind"] == kind]
        columns = [[model["solved"][str(n)] for model in found] for n in SPEEDS]
        columns.append([model["first_entropy"] for model in found])
        if len(found) == 1:
            cells = [f"{column[0]:.3f}" for column in columns]
            spread = ""
        else:
            cells = [f"{mean(column):.3f} ± {student_half(column):.3f}" for column in columns]
            spread = f"{stdev(columns[SPEEDS.index(4)]):.3f}"
        lines.append(f"| {title} | " + " | ".join([*cells[:-1], spread, cells[-1]]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
