"""What a model can do: solved at several speeds, how different its completions are, and how far it is from the start.

Owns the definitions. Greedy decoding and judging are `rl4dlm.evaluation`'s.

- `solved` at 1, 2, 4 and 8 tokens per step: share of test rows, greedy, the most confident slots of a block first. A
  speed that does not fit into a block is left out. `threshold`: everything at least 0.9 sure is written at once.
- `learned`: where a model learns the order of writing, the same with the order that it says, greedy.
- `area`: accuracy over speed. The integral of `solved` over the binary logarithm of tokens per step, by trapezoids
  between the fixed speeds, over the length of that interval: the mean accuracy over octaves of speed, between 0 and 1.
- `pass@k`: share of prompts that one of k completions at temperature 1 solves, in 4 tokens per step; of n drawn
  completions with c right ones it is estimated without bias by 1 - C(n - c, k) / C(n, k) (Chen et al.,
  arXiv 2107.03374). `right` holds how many prompts have 0, 1, ..., n right ones, from which all k follow.
- `ended`: share with an end token. `empty`: share that ends at once. `length`: tokens up to the end.
- `drift`: mean over drawn completions y of ELBO(y) - ELBO_start(y), in nats, both in the same views; with its standard
  error. Were bounds log-likelihoods and y drawn from what they are of, it would be the divergence KL(model || start).
  They are not: completions are drawn several tokens at a time, and the gaps of both bounds may differ.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from math import sqrt
from typing import Any

import torch

from benchmarks.proving_ground.settings import ORDER, SPEEDS, THRESHOLD, TRAINED, Run
from benchmarks.proving_ground.unmasking import decides, policy_decoding
from rl4dlm import DecodingConfig, RolloutEngine, attach_scoring, load_denoiser, load_task
from rl4dlm.evaluation import area, encode_prompt, evaluate
from rl4dlm.evaluation.measure import completion_texts
from rl4dlm.likelihood.elbo import ELBO
from rl4dlm.likelihood.scoring import score_views
from rl4dlm.likelihood.views import Rows
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.rollout.rollout import Rollout


def measure(run: Run, model: Any, tokenizer: Any) -> dict[str, Any]:
    """All of the above, on the test split."""
    ground, scale = run.ground, run.scale
    decodings: dict[str | int, DecodingConfig] = {
        speed: decoding(run, speed) for speed in SPEEDS if speed <= ground.block
    }
    decodings["threshold"] = DecodingConfig(
        canvas_length=ground.canvas,
        block_length=ground.block,
        schedule="threshold",
        schedule_args={"threshold": THRESHOLD},
    )
    learned = {}
    if run.algorithm in ORDER:
        learned = {f"learned {speed}": in_learned_order(d) for speed, d in decodings.items() if speed != "threshold"}
    task = load_task(run.task, **ground.arguments)
    decodings |= learned
    result = evaluate(model, tokenizer, task, decodings=decodings, split="test", limit=scale.test)
    greedy = {
        speed: {
            "solved": found.solve_rate,
            "tokens_per_forward": round(found.tokens_per_forward, 3),
            "forwards": round(found.nfe, 2),
            "length": round(found.completion_length, 2),
            "ended": round(found.ended, 4),
        }
        for speed, found in result.measurements.items()
    }
    apart = {name.removeprefix("learned "): greedy.pop(name) for name in learned}
    rows = task.rows("test")[: scale.prompts]
    rollout = drawn(run, model, tokenizer, rows)
    verdicts = task.check_many(
        completion_texts(tokenizer, rollout, DiffusionSpec.of(model)),
        [row for row in rows for _ in range(scale.samples)],
    )
    right = Counter(sum(map(bool, verdicts[i : i + scale.samples])) for i in range(0, len(verdicts), scale.samples))
    lengths, ends = rollout.valid.sum(-1), set(DiffusionSpec.of(model).eos_token_ids)
    ended = torch.tensor([ids[-1] in ends for ids in rollout.completion_ids])
    return {
        "rows": len(task.rows("test")[: scale.test]),
        "solved": greedy,
        **({"learned": apart} if apart else {}),
        "area": round(area([(float(s), v["solved"]) for s, v in greedy.items() if s != "threshold"]), 4),
        "drawn": {
            "right": [right[count] for count in range(scale.samples + 1)],
            "length": round(lengths.float().mean().item(), 2),
            "ended": round(ended.float().mean().item(), 4),
            "empty": round((ended & (lengths == 1)).float().mean().item(), 4),
        },
        "drift": drift(run, model, rollout),
    }


def validate(run: Run, model: Any, tokenizer: Any) -> float:
    """Share of validation rows solved at the speed of training, in the order that is learnt, if one is, or as a policy
    that is trained decides, greedily."""
    task = load_task(run.task, **run.ground.arguments)
    decodings = {"": decoding(run, TRAINED)}
    if run.algorithm in ORDER:
        decodings = {"": in_learned_order(decodings[""])}
    if decides(run):
        decodings = {"": policy_decoding(run, model.unmasking_policy)}
    limit = run.scale.validation
    found = evaluate(model, tokenizer, task, decodings=decodings, split="validation", limit=limit)
    return found.solve_rates[""]


def decoding(run: Run, speed: int, temperature: float = 0.0) -> DecodingConfig:
    """So many tokens per step."""
    canvas, block = run.ground.canvas, run.ground.block
    return DecodingConfig(canvas_length=canvas, steps=canvas // speed, block_length=block, temperature=temperature)


def in_learned_order(decoding: DecodingConfig) -> DecodingConfig:
    """As many tokens per step, in the order of the model's unmasking policy."""
    return replace(decoding, schedule="learned_order")


def drawn(run: Run, model: Any, tokenizer: Any, rows: Sequence[Any]) -> Rollout:
    """Completions at temperature 1, at the speed of training."""
    prompts = [encode_prompt(tokenizer, row["prompt"]) for row in rows]
    return RolloutEngine(model).generate(prompts, decoding(run, TRAINED, 1.0), num_generations=run.scale.samples)


@torch.no_grad()
def drift(run: Run, model: Any, rollout: Rollout) -> list[float]:
    """Mean difference of bounds to the start on completions of different prompts first, and its standard error."""
    start, spec = attach_scoring(load_denoiser(run.checkpoint)), DiffusionSpec.of(model)
    order = [i for first in range(run.scale.samples) for i in range(first, len(rollout), run.scale.samples)]
    chosen = order[: run.scale.drifted]
    width = max(len(rollout.prompt_ids[i]) for i in chosen)
    prompts = [rollout.prompt_ids[i] for i in chosen]
    rows = Rows(
        prompt_ids=torch.tensor([[0] * (width - len(p)) + p for p in prompts]),
        prompt_mask=torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts]),
        canvas_ids=rollout.canvas[chosen],
        valid=rollout.valid[chosen],
        row_ids=torch.tensor(chosen),
    )
    estimator = ELBO(num_views=run.scale.bounds)
    views = estimator.draw(rows, seed=0, iteration=0)
    bounds = []
    for policy in (model, start):
        training = policy.training
        policy.eval()
        found = score_views(policy, spec, rows.ids, rows.attention_mask, views)
        policy.train(training)
        bounds.append(estimator.reduce(found.log_probs, views).double().sum(-1))
    difference = bounds[0] - bounds[1]
    return [round(difference.mean().item(), 4), round(difference.std().item() / sqrt(len(difference)), 4)]
