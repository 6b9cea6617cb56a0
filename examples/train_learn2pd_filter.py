"""Trains the filter of the schedule `learn2pd`: which candidates of a block are final, from their probabilities alone.

Decodes prompts of a task one token per step; what comes out is the reference. Then decodes them again with an oracle,
which at each step writes exactly the candidates that equal the reference, and writes down the probabilities of all
candidates of the block and which of them were right. A network of two layers learns the second from the first. Where no
candidate is right the oracle fills the block with the reference.

    python examples/train_learn2pd_filter.py
    python examples/train_learn2pd_filter.py --model GSAI-ML/LLaDA-8B-Instruct --task gsm8k --canvas-length 256 \\
        --block-length 32 --prompts 500 --batch-rows 16

The filter is good for this model, block length and cache, at temperature 0. Of ten prompts eight are learnt from, one
chooses the best epoch and one is measured on. Decode with it by

    DecodingConfig(schedule="learn2pd", schedule_args={"filter_path": "outputs/learn2pd/filter.safetensors"}, ...)
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from rl4dlm import DecodingConfig, RolloutEngine, evaluate, load_denoiser, load_task
from rl4dlm.evaluation import encode_prompt
from rl4dlm.rollout.schedules.learn2pd import BlockWindow, TokenFilter, save_filter
from rl4dlm.rollout.schedules.llada import fixed_blocks
from rl4dlm.rollout.schedules.parts import Schedule, Step, probability

BATCH, LEARNING_RATE = 256, 3e-3


@dataclass(frozen=True)
class Examples:
    """What the oracle saw, one entry per row and step.

    Args:
        confidences: float64 `[N, B]`, probabilities of the block's candidates. final: bool `[N, B]`, which equal the
            reference. open: bool `[N, B]`, slots that were open. prompt: long `[N]`, whose row it was.
    """

    confidences: Tensor
    final: Tensor
    open: Tensor
    prompt: Tensor

    def where(self, chosen: Tensor) -> Examples:
        """Those of a bool `[N]`."""
        return Examples(*(getattr(self, f.name)[chosen] for f in dataclasses.fields(self)))

    def shuffled(self, generator: torch.Generator) -> Examples:
        return self.where(torch.randperm(len(self.prompt), generator=generator))


@dataclass(frozen=True)
class OracleReplay(DecodingConfig):
    """Decoding settings with an oracle for a schedule.

    Args:
        reference: long `[N, L]`, what the row with id i has to become. log: gets one `Examples` per step.
    """

    reference: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.long))
    log: list[Examples] = field(default_factory=list)

    def build_schedule(self) -> Schedule:
        block_length = self.block_length or self.canvas_length

        def propose(step: Step) -> Any:
            reference = self.reference[step.row_ids]
            right = step.drawn.token == reference
            window = BlockWindow.of(step, block_length)
            self.log.append(
                Examples(
                    window.gather(step.drawn.confidence.double(), 1.0).cpu(),
                    window.gather(right, False).cpu(),
                    window.gather(step.eligible, False).cpu(),
                    step.row_ids.cpu(),
                )
            )
            stuck = ~(right & step.eligible).any(-1, keepdim=True)
            return step.drawn._replace(token=torch.where(stuck, reference, step.drawn.token))

        def commit(step: Step, scores: Tensor) -> Tensor:
            return step.drawn.token == self.reference[step.row_ids]

        return Schedule(fixed_blocks(self), probability, commit, propose=propose, scope="block")


def collect(engine: RolloutEngine, prompts: list[list[int]], settings: dict[str, Any]) -> Examples:
    """Decodes prompts one token per step, replays that with the oracle and returns what the oracle saw."""
    settings = {**settings, "stop_at_eos": False}
    slow = DecodingConfig(**settings, schedule="low_confidence", steps=settings["canvas_length"])
    reference = engine.generate(prompts, slow)
    oracle = OracleReplay(**settings, reference=reference.canvas)
    replay = engine.generate(prompts, oracle)
    assert torch.equal(replay.canvas, reference.canvas)
    print(
        f"{len(prompts)} prompts: {reference.nfe.double().mean():.1f} forwards each one token at a time, "
        f"{replay.nfe.double().mean():.1f} with the oracle"
    )
    return Examples(*(torch.cat([getattr(e, f.name) for e in oracle.log]) for f in dataclasses.fields(Examples)))


def fit(examples: Examples, epochs: int, seed: int) -> TokenFilter:
    """The network that is best on every tenth prompt, learnt from all but that and the next."""
    learn, choose = examples.where(examples.prompt % 10 < 8), examples.where(examples.prompt % 10 == 8)
    generator = torch.Generator().manual_seed(seed)
    network = TokenFilter(examples.confidences.shape[1])
    for layer in (network.hidden, network.output):
        nn.init.xavier_uniform_(layer.weight, generator=generator)
        nn.init.zeros_(layer.bias)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE)
    best, lowest = copy.deepcopy(network), float("inf")
    for epoch in range(epochs):
        shuffled = learn.shuffled(generator)
        for start in range(0, len(shuffled.prompt), BATCH):
            part = slice(start, start + BATCH)
            optimizer.zero_grad()
            loss(network, shuffled.confidences[part], shuffled.final[part], shuffled.open[part]).backward()
            optimizer.step()
        with torch.no_grad():
            value = loss(network, choose.confidences, choose.final, choose.open).item()
        if value < lowest:
            best, lowest = copy.deepcopy(network), value
        if epoch % max(1, epochs // 5) == 0:
            print(f"  epoch {epoch:>3}: cross-entropy {value:.4f} on validation prompts")
    return best


def loss(network: TokenFilter, confidences: Tensor, final: Tensor, open_slots: Tensor) -> Tensor:
    """Binary cross-entropy over open slots, the only ones that the filter decides about."""
    return nn.functional.binary_cross_entropy_with_logits(network(confidences)[open_slots], final[open_slots].double())


def report(network: TokenFilter, examples: Examples, acceptance: float) -> None:
    with torch.no_grad():
        accepted = (network(examples.confidences).sigmoid() > acceptance) & examples.open
    right = int((accepted & examples.final).sum())
    print(
        f"On test prompts, of {int(examples.open.sum())} open slots {int((examples.final & examples.open).sum())} hold "
        f"their final candidate; accepted above {acceptance}: {int(accepted.sum())}, of which {right} are final"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(Path(__file__).parent / "demo_checkpoint"))
    parser.add_argument("--task", default="few_clue_sudoku", help="whose prompts to learn from")
    parser.add_argument("--split", default="train", help="of the task; it is measured on the test split")
    parser.add_argument("--canvas-length", type=int, default=16)
    parser.add_argument("--block-length", type=int, help="default: the canvas")
    parser.add_argument("--cache", default="none")
    parser.add_argument("--prompts", type=int, default=500, help="to collect examples from; at least 10")
    parser.add_argument("--epochs", type=int, default=500)
    parser.add_argument("--acceptance", type=float, default=0.96)
    parser.add_argument("--measure", type=int, default=200, help="test prompts to decode with the filter; 0 for none")
    parser.add_argument("--batch-rows", type=int, help="rows decoded at the same time; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/learn2pd/filter.safetensors"))
    options = parser.parse_args(argv)
    if options.prompts < 10:
        parser.error(f"--prompts {options.prompts} is not allowed; it must be 10 or larger")
    logging.getLogger("rl4dlm").setLevel(logging.ERROR)

    model, tokenizer = load_denoiser(options.model), AutoTokenizer.from_pretrained(options.model)
    if torch.cuda.is_available():
        model.cuda()
    task = load_task(options.task)
    rows = task.dataset(options.split)
    rows = rows.select(range(min(options.prompts, len(rows))))
    settings = {
        "canvas_length": options.canvas_length,
        "block_length": options.block_length,
        "cache": options.cache,
    }
    engine = RolloutEngine(model, max_batch_rows=options.batch_rows, progress=True)
    examples = collect(engine, [encode_prompt(tokenizer, row["prompt"]) for row in rows], settings)
    network = fit(examples, options.epochs, options.seed)
    report(network, examples.where(examples.prompt % 10 == 9), options.acceptance)
    save_filter(network, options.output, temperature=0.0, cache=options.cache)
    print(f"wrote {options.output} ({sum(p.numel() for p in network.parameters()):,} parameters)")
    if not options.measure:
        return
    filtered = {"filter_path": str(options.output), "acceptance": options.acceptance}
    decodings: dict[str | int, DecodingConfig] = {
        "one token per step": DecodingConfig(**settings, steps=options.canvas_length),
        "learn2pd": DecodingConfig(**settings, schedule="learn2pd", schedule_args=filtered),
    }
    measured = evaluate(
        model, tokenizer, task, decodings=decodings, limit=options.measure, batch_rows=options.batch_rows
    )
    for name, numbers in measured.measurements.items():
        print(f"{name:>20}: solves {numbers.solve_rate:.3f} in {numbers.nfe:.1f} forwards")


if __name__ == "__main__":
    main()
