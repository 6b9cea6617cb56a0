"""FreeDave's draft and verify (arXiv 2510.00294), and the block decoding with prefix cache that it is compared with.

A forward's candidates give the next state and guesses of those after it; the next forward takes all of them beside each
other, and the guesses that agree with what decoding makes of the ones before are kept. Records list all states of a
forward, one below the other or, with tree attention, one behind the other.
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.rollout import Rollout
from tests.conformance.cases import Case, folder
from tests.conformance.literals.llada import FULL_BLOCK
from tests.conformance.literals.tools import MASK_DRAWN, MASK_IN_PROMPT, Forwards, best, blank
from tests.conformance.samplers import Literal, Recorded, Run

JUMP = (
    "with a threshold decoding may write at once what two guesses write one after the other, and the reference then "
    "keeps the second; here each guess stands for a step of its own"
)
FILLED = "a state that is complete is fed to the reference once more"
SUBSET = (
    "the reference keeps a guess that holds a part of what decoding writes, which with a threshold may be less than "
    "all; here a guess is kept that is the same, so that the result is that of decoding without guesses"
)


def record(case: Case) -> Recorded:
    """The record with all that was fed, guesses too."""
    found = Recorded.of(case)
    return dataclasses.replace(found, forwards=[torch.tensor(fed) for fed in case.outputs["forward_inputs"]])


def config(recorded: Recorded) -> DecodingConfig:
    threshold = _threshold(recorded)
    assert recorded.temperature == 0, "the references' randomness is torch's own"
    return DecodingConfig(
        canvas_length=recorded.length,
        block_length=recorded.block_length,
        schedule="low_confidence" if threshold is None else "threshold",
        schedule_args={} if threshold is None else {"threshold": threshold},
        steps=recorded.length if threshold is None else None,
        cache="prefix",
        draft_steps=max(0, _states(recorded) - 1),
        stop_at_eos=False,
    )


@dataclass
class _Drafted(Literal):
    """What a sampler did that makes several steps of a forward."""

    path: list[Tensor] = field(default_factory=list)  # long [1, T] each, the row before each step

    def working(self) -> Run:
        return Run(self.ids, [[state[0] for state in self.path]], [sum(bool(wrote) for wrote in self.wrote)])


def rows(recorded: Recorded, rollout: Rollout) -> Run:
    """A rollout with the row before each step, of which there are more than forwards."""
    states = [torch.cat([recorded.prompts, state], dim=1)[0] for state in rollout.states()]
    return Run(torch.cat([recorded.prompts, rollout.canvas], dim=1), [states], [int(rollout.nfe)])


def difference(recorded: Recorded, ours: Run | None) -> str:
    """Ids and forwards are compared as they are. States: those of a sampler that feeds what the record lists."""
    if ours is None:
        return "the prompt is refused"
    if not torch.equal(ours.ids, recorded.ids):
        return f"ids differ: {ours.ids.tolist()}"
    if ours.nfe != [recorded.nfe]:
        return f"forwards differ: {ours.nfe} and {recorded.nfe}"
    predicted = literal(recorded, deviations=False)
    fed, states = recorded.forwards or [], predicted.working().states[0]
    if len(fed) != len(predicted.forwards) or not all(map(torch.equal, fed, predicted.forwards)):
        return "what was fed differs"
    if len(states) != len(ours.states[0]) or not all(map(torch.equal, states, ours.states[0])):
        return "states differ"
    return ""


@torch.no_grad()
def literal(recorded: Recorded, *, deviations: bool = True) -> _Drafted:
    assert len(recorded.prompts) == 1, "the reference decodes one row"
    ids, low = blank(recorded), recorded.prompts.shape[1]
    result = _Drafted(ids)
    if deviations and recorded.masks_in_prompt:
        result.rules.add(MASK_IN_PROMPT)
    model = Forwards(recorded)
    while low < ids.shape[1]:
        block = _Block(recorded, slice(low, low + recorded.block_length), result, deviations)
        result.forwards.append(ids.clone())
        result.wrote.append(torch.ones(1).bool())
        result.path.append(ids.clone())
        (_decode if _states(recorded) else _decode_plainly)(block, model, ids, block.candidates(ids, model(ids)))
        low += recorded.block_length
    return result


def _decode_plainly(block: _Block, model: Forwards, ids: Tensor, candidates: tuple[Tensor, Tensor]) -> None:
    """One step per forward; after the first one of the block at least one more."""
    low, result = block.part.start, block.result
    ids[:] = block.step(ids, *candidates)
    entered = True
    while block.masked(ids).any() or (entered and block.deviations):
        result.forwards.append(ids[:, low:].clone())
        result.wrote.append(block.masked(ids).any()[None])
        if bool(result.wrote[-1]):
            result.path.append(ids.clone())
        else:
            result.rules.add(FULL_BLOCK)
        ids[:] = block.step(ids, *block.candidates(ids, model(ids, low, cached=True)))
        entered = False


def _decode(block: _Block, model: Forwards, ids: Tensor, candidates: tuple[Tensor, Tensor]) -> None:
    """Several states per forward."""
    low, result = block.part.start, block.result
    flat = block.recorded.case.settings.get("draft_mode") == "tree_attention"
    while block.masked(ids).any():
        drafts = block.drafts(ids, *candidates)
        left = int(block.masked(drafts[0]).sum())
        if int(block.masked(ids).sum()) == 1 or (not block.deviations and not left):
            ids[:] = drafts[0]
            return
        fed = torch.cat(drafts)[:, low:]
        result.forwards.append(fed.reshape(1, -1) if flat else fed)
        result.wrote.append(torch.tensor([left > 0]))
        if not left:
            result.rules.add(FILLED)
        found = [block.candidates(draft, model(draft, low, cached=True)) for draft in drafts]
        targets = [block.step(draft, *found) for draft, found in zip(drafts, found, strict=True)]
        reached = 0
        path = [0]
        while agreeing := [j for j in range(reached + 1, len(drafts)) if block.agree(drafts[j], targets[reached])]:
            if not block.deviations:  # at most one guess is the same state
                if agreeing[0] > reached + 1:
                    break
            elif agreeing[-1] > reached + 1:
                result.rules.add(JUMP)
            reached = agreeing[-1]
            path.append(reached)
        result.path += [drafts[j].clone() for j in path if bool(block.masked(drafts[j]).any())]
        ids[:], candidates = drafts[reached], found[reached]


@dataclass
class _Block:
    """A block and the rules of decoding in it."""

    recorded: Recorded
    part: slice
    result: Literal
    deviations: bool

    def masked(self, ids: Tensor) -> Tensor:
        masked = torch.zeros_like(ids, dtype=torch.bool)
        masked[:, self.part] = ids[:, self.part] == self.recorded.mask
        return masked

    def candidates(self, ids: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and their probabilities `[1, T]`."""
        allowed = logits.clone()
        if not self.deviations:
            allowed[..., self.recorded.mask] = -torch.inf
        token = allowed.argmax(-1)
        if bool(((token == self.recorded.mask) & self.masked(ids)).any()):
            self.result.rules.add(MASK_DRAWN)
        return token, logits.softmax(-1).gather(-1, token[..., None]).squeeze(-1)

    def step(self, ids: Tensor, token: Tensor, probability: Tensor) -> Tensor:
        """The state after it: what reaches the threshold is written, or the best one."""
        masked, threshold = self.masked(ids), _threshold(self.recorded)
        scores = probability.masked_fill(~masked, -torch.inf)
        sure = torch.zeros_like(masked) if threshold is None else masked & (scores >= threshold)
        if not bool(sure.any()):
            counts = masked.sum(-1).clamp(max=1)
            sure = best(scores, masked, counts, deviations=self.deviations, rules=self.result.rules)
        return torch.where(sure, token, ids)

    def drafts(self, ids: Tensor, token: Tensor, probability: Tensor) -> list[Tensor]:
        """The next state, which is certain, and guesses: one more each time of the best that are left."""
        drafts = [self.step(ids, token, probability)]
        masked = self.masked(ids)
        for _ in range(1, min(_states(self.recorded), int(masked.sum()))):
            scores = probability.masked_fill(~self.masked(drafts[-1]), -torch.inf)
            left = self.masked(drafts[-1])
            more = best(scores, left, left.sum(-1).clamp(max=1), deviations=self.deviations, rules=self.result.rules)
            drafts.append(torch.where(more, token, drafts[-1]))
        return drafts

    def agree(self, guess: Tensor, target: Tensor) -> bool:
        guess, target = guess[:, self.part], target[:, self.part]
        part = bool((guess == target)[guess != self.recorded.mask].all())
        if part and not torch.equal(guess, target):
            if self.deviations:
                self.result.rules.add(SUBSET)
            return self.deviations
        return part


def _states(recorded: Recorded) -> int:
    """States of a forward; 0 for the sampler that the others are compared with."""
    return int(recorded.case.settings.get("draft_steps") or 0)


def _threshold(recorded: Recorded) -> float | None:
    threshold: float | None = recorded.case.settings.get("confidence_threshold")
    return threshold


def made_up(seed: int) -> Recorded:
    """Other prompts, blocks and numbers of guesses, with a threshold every other time."""
    rng, generator = random.Random(f"freedave {seed}"), torch.Generator().manual_seed(seed)
    blocks, size = rng.randint(1, 3), rng.choice([1, 4, 7, 12])
    settings: dict[str, Any] = {"block_length": size, "max_gen_length": blocks * size, "temperature": 0.0}
    settings["confidence_threshold"] = rng.choice([0.3, 0.6, 0.9]) if seed % 2 else None
    if seed % 5:
        settings["draft_steps"] = rng.randint(1, 6)
        settings["draft_mode"] = rng.choice(["batch_expanding", "tree_attention"])
    prompts = torch.randint(0, 62, (1, rng.randint(1, 12)), generator=generator)
    case = Case(folder(), "freedave_made_up", {}, settings, {}, {}, {})
    return Recorded(case, prompts, torch.ones_like(prompts).bool(), prompts, None, nfe=10**9)
