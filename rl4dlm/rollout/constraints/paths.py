"""What an automaton lets a canvas with holes take, exactly: the best token of each set of tokens, and where paths lead.

A slot's admissible tokens are the union of the token sets on edges that a path from a start state to an accepting one
can use there. So the best admissible token is the best of the best tokens of these sets, and a reading of one token per
set is all that has to be kept of a slot's logits, whatever the vocabulary.

Owns that reading and the paths. The automaton is `automata.py`'s, and so is the order in which slots are written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rl4dlm.rollout.drawing import Scored, lowest_argmax

if TYPE_CHECKING:
    from rl4dlm.rollout.constraints.automata import Automaton


def best_of_sets(automaton: Automaton) -> Callable[[Scored], Tensor]:
    """A reading: for each slot the most probable token that may be drawn of each of `automaton.token_sets`.

    Returns:
        A function to float64 `[n, S, 4]` for S sets: token id, or -1 where none may be drawn; raw log-probability;
        log-probability of the tempered distribution, before top-k and top-p (0 at temperature 0, where nothing is
        drawn); untempered probability.
    """
    ids_on: dict[tuple[torch.device, int], list[Tensor | None]] = {}

    def reading(scored: Scored) -> Tensor:
        allowed, size = scored.allowed, scored.allowed.shape[-1]
        key = (allowed.device, size)
        if key not in ids_on:
            ids_on[key] = [
                None if tokens is None else torch.tensor(sorted(t for t in tokens if 0 <= t < size), dtype=torch.long)
                for tokens in automaton.token_sets
            ]
            ids_on[key] = [None if ids is None else ids.to(allowed.device) for ids in ids_on[key]]
        chosen = []
        for ids in ids_on[key]:
            if ids is not None and not len(ids):
                chosen.append(torch.full((len(allowed),), -1, device=allowed.device))
                continue
            place = lowest_argmax(allowed if ids is None else allowed.index_select(-1, ids))
            chosen.append(place if ids is None else ids[place])
        tokens = torch.stack(chosen, dim=-1)  # [n, S]
        at = tokens.clamp(min=0)
        tokens = tokens.masked_fill(allowed.gather(-1, at) == -torch.inf, -1)
        log_prob = torch.zeros_like(scored.own_log_probs.gather(-1, at))
        if scored.temperature > 0:
            log_prob = (allowed / scored.temperature).log_softmax(-1).gather(-1, at)
        values = (tokens, scored.own_log_probs.gather(-1, at), log_prob, scored.log_probs.gather(-1, at).exp())
        return torch.stack([value.double() for value in values], dim=-1)

    return reading


class Paths:
    """Which states of an automaton a row's slots can be in, given what is written and what may still be drawn.

    Args:
        automaton: the language.
        canvas: tokens of the row, None where a slot is open; changed by `write`.
        drawable: for each slot the numbers of the token sets of which something may be drawn there; None: of all.
    """

    def __init__(self, automaton: Automaton, canvas: list[int | None], drawable: Sequence[set[int] | None]) -> None:
        self.automaton, self.canvas, self.drawable = automaton, canvas, drawable
        self.before: list[set[int]] = [set(automaton.start)] + [set() for _ in canvas]
        self.behind: list[set[int]] = [set() for _ in canvas] + [set(automaton.accept)]
        self._forward(0)
        self._backward(len(canvas) - 1)

    def sets(self, slot: int) -> set[int]:
        """Numbers of the token sets that some path through an open slot uses."""
        usable = self.drawable[slot]
        return {
            number
            for state in self.before[slot]
            for number, goal in self.automaton.numbered[state]
            if goal in self.behind[slot + 1] and (usable is None or number in usable)
        }

    def admits(self, slot: int, token: int) -> bool:
        """Whether the canvas can still be completed with a token in an open slot."""
        sets = self.automaton.token_sets
        return any(
            goal in self.behind[slot + 1] and (sets[number] is None or token in (sets[number] or ()))
            for state in self.before[slot]
            for number, goal in self.automaton.numbered[state]
        )

    def write(self, slot: int, token: int) -> None:
        """Writes a token that is admitted."""
        self.canvas[slot] = token
        self._forward(slot)
        self._backward(slot)

    def _goals(self, slot: int, state: int) -> set[int]:
        token, usable, sets = self.canvas[slot], self.drawable[slot], self.automaton.token_sets
        return {
            goal
            for number, goal in self.automaton.numbered[state]
            if (
                (usable is None or number in usable)
                if token is None
                else (sets[number] is None or token in (sets[number] or ()))
            )
        }

    def _forward(self, slot: int) -> None:
        for i in range(slot, len(self.canvas)):
            found: set[int] = set().union(*(self._goals(i, state) for state in self.before[i]))
            if found == self.before[i + 1]:
                return
            self.before[i + 1] = found

    def _backward(self, slot: int) -> None:
        for i in range(slot, -1, -1):
            ahead = self.behind[i + 1]
            found = {s for s in range(len(self.automaton.edges)) if not ahead.isdisjoint(self._goals(i, s))}
            if found == self.behind[i]:
                return
            self.behind[i] = found
