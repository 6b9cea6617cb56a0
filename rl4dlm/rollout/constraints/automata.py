"""Constraints: what a whole canvas may look like, checked before each token is written.

A constraint says of a token that is about to be written whether the canvas could still be completed with it.
`constrain` applies that to what a schedule wants to write: within a step tokens are checked one after another, best
score first, each beside those written before it; a token that is not admissible gives way to the most probable one that
is, a slot without one stays open, and a row that could write nothing at all is a dead end. `Automaton` is the
constraint for regular languages over tokens, exact for canvases with holes: there all of the vocabulary is looked at
(`paths.py`). Of other constraints, which can only be asked token by token, the most probable ones are tried.

Constraints see tokens, not text: build them with the tokenizer that the model uses.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol, TypeGuard

import torch
from torch import Tensor

from rl4dlm.rollout.constraints.paths import Paths, best_of_sets
from rl4dlm.rollout.drawing import Drawn, Reading, Scored
from rl4dlm.rollout.schedules.parts import Step

CANDIDATES = 16
"""How many of a slot's most probable tokens may take the place of one that is not admissible, where a constraint is not
an `Automaton`."""

Canvas = Sequence[int | None]
"""Tokens of a row's canvas, None where it is masked."""


class Constraint(Protocol):
    """Which canvases are allowed. It must be a pure function: it is asked in no particular order of rows."""

    def admissible(self, canvas: Canvas, offset: int, token: int) -> bool:
        """Whether the token may be written at a masked slot: whether the canvas can still be completed after that.

        Args:
            canvas: all slots of the row as they are now.
            offset: of the masked slot.
            token: never the mask token.
        """
        ...


class Candidate(NamedTuple):
    """A token that a slot could take, with the numbers that are recorded of it."""

    token: int
    raw_log_prob: float
    log_prob: float
    confidence: float


def reading_of(constraint: Constraint) -> Reading:
    """What has to be known of each slot for `constrain`, a reading named `candidates`."""
    return best_of_sets(constraint) if is_automaton(constraint) else candidates


def is_automaton(constraint: Constraint) -> TypeGuard[Automaton]:
    """Whether a constraint is an automaton whose own rule decides."""
    return isinstance(constraint, Automaton) and type(constraint).admissible is Automaton.admissible


def candidates(scored: Scored) -> Tensor:
    """A reading: the most probable tokens of each slot that may be drawn there, best first, lower ids among equals.

    Returns:
        float64 `[n, 16, 4]` (fewer for a smaller vocabulary): token id, or -1 behind the last; raw log-probability;
        log-probability of the tempered distribution, before top-k and top-p, which may have excluded the token (0 at
        temperature 0, where nothing is drawn); untempered probability.
    """
    ids = scored.allowed.topk(min(CANDIDATES, scored.allowed.shape[-1])).indices.sort(-1).values
    ids = ids.gather(-1, scored.allowed.gather(-1, ids).argsort(dim=-1, descending=True, stable=True))
    raw = scored.own_log_probs.gather(-1, ids)
    log_prob = torch.zeros_like(raw)
    if scored.temperature > 0:
        log_prob = (scored.allowed / scored.temperature).log_softmax(-1).gather(-1, ids)
    confidence = scored.log_probs.gather(-1, ids).exp()
    tokens = ids.masked_fill(scored.allowed.gather(-1, ids) == -torch.inf, -1)
    return torch.stack([value.double() for value in (tokens, raw, log_prob, confidence)], dim=-1)


def constrain(step: Step, scores: Tensor, commit: Tensor, constraint: Constraint) -> tuple[Tensor, Drawn, Tensor]:
    """What of a step's commitments a constraint lets pass, and with which tokens.

    A row that wants to write something writes at least one token, at one of its other open slots if need be.

    Args:
        step: with the constraint's reading (`reading_of`) under the name `candidates`.
        scores: `[R, W]`, in whose descending order tokens are checked.
        commit: bool `[R, W]`, eligible slots that are to be written.

    Returns:
        commit: bool `[R, W]`, slots that are written. drawn: their tokens and what is known of them. dead: bool `[R]`,
        rows that wanted to write something and had no admissible token for any open slot.
    """
    passed, drawn = torch.zeros_like(commit), Drawn(*(value.clone() for value in step.drawn))
    dead = torch.zeros(len(commit), dtype=torch.bool, device=commit.device)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    for row in commit.any(-1).nonzero().squeeze(-1).tolist():
        by_score = order[row].tolist()
        wanted, eligible = commit[row].tolist(), step.eligible[row].tolist()
        slots = [slot for slot in by_score if wanted[slot]]
        spare = [slot for slot in by_score if eligible[slot] and not wanted[slot]]
        if is_automaton(constraint):
            written = _pass_automaton(step, row, slots, spare, constraint)
        else:
            written = _pass_row(step, row, slots, spare, constraint)
        dead[row] = not written
        for slot, chosen in written.items():
            passed[row, slot] = True
            if chosen is not None:
                for name, value in chosen._asdict().items():
                    getattr(drawn, name)[row, slot] = value
    return passed, drawn, dead


def _pass_row(
    step: Step, row: int, wanted: list[int], spare: list[int], constraint: Constraint
) -> dict[int, Candidate | None]:
    """What a row writes: slot -> what takes the place of its drawn token, None where that is admissible.

    Args:
        wanted: slots to write. spare: slots to try if none of them can be. Both by descending score.
    """
    canvas = _canvas(step, row)
    drawn = step.drawn.token[row].tolist()
    written: dict[int, Candidate | None] = {}

    def write(slot: int) -> None:
        if constraint.admissible(canvas, slot, drawn[slot]):
            written[slot], canvas[slot] = None, drawn[slot]
            return
        for number, *values in step.read["candidates"][row, slot].tolist():
            token = int(number)
            if token >= 0 and token != drawn[slot] and constraint.admissible(canvas, slot, token):
                written[slot], canvas[slot] = Candidate(token, *values), token
                return

    for slot in wanted:
        write(slot)
    for slot in spare:
        if written:
            break
        write(slot)
    return written


def _pass_automaton(
    step: Step, row: int, wanted: list[int], spare: list[int], automaton: Automaton
) -> dict[int, Candidate | None]:
    """`_pass_row` for an automaton, over all tokens: a slot that some path goes through is written."""
    canvas, seen, drawn = _canvas(step, row), step.seen[row].tolist(), step.drawn.token[row].tolist()
    best = step.read["candidates"][row].tolist()
    drawable = [
        {number for number, entry in enumerate(best[slot]) if entry[0] >= 0} if seen[slot] and token is None else None
        for slot, token in enumerate(canvas)
    ]
    paths = Paths(automaton, canvas, drawable)
    written: dict[int, Candidate | None] = {}
    for slot in [*wanted, *spare]:
        if written and slot in spare:
            break
        if paths.admits(slot, drawn[slot]):
            written[slot] = None
            paths.write(slot, drawn[slot])
            continue
        found = [Candidate(int(best[slot][n][0]), *best[slot][n][1:]) for n in sorted(paths.sets(slot))]
        if found:
            chosen = min(found, key=lambda one: (-one.confidence, one.token))
            written[slot] = chosen
            paths.write(slot, chosen.token)
    return written


def _canvas(step: Step, row: int) -> list[int | None]:
    held = zip(step.tokens[row].tolist(), step.masked[row].tolist(), strict=True)
    return [None if masked else token for token, masked in held][: int(step.length[row])]


# --- regular languages ------------------------------------------------------------------------------------------------

Tokens = frozenset[int] | None
"""Which tokens lead from one state to another; None for any."""


@dataclass(frozen=True, eq=False)
class Automaton:
    """A finite automaton over tokens, the constraint for a regular language. It need not be deterministic.

    A canvas is allowed if some path from a start state to an accepting one spells all of it. Strings shorter than the
    canvas need an end, too: `sequence(language, repeat(one_of(eos_token_ids)))`.

    Args:
        edges: for each state, what leads from it where. start, accept: states.
    """

    edges: tuple[tuple[tuple[Tokens, int], ...], ...]
    start: frozenset[int]
    accept: frozenset[int]

    @classmethod
    def of(cls, transitions: Mapping[int, Mapping[int, int]], start: int, accept: Collection[int]) -> Automaton:
        """From a table: state -> token -> next state. Any integers name states.

        Raises:
            ValueError: no accepting state is named.
        """
        if not accept:
            raise ValueError("accept is empty; an automaton that accepts nothing allows no canvas")
        follow = {state: set(row.values()) for state, row in transitions.items()}
        numbers = {state: i for i, state in enumerate({start, *accept, *follow, *set().union(*follow.values())})}
        edges: list[tuple[tuple[Tokens, int], ...]] = [()] * len(numbers)
        for state, row in transitions.items():
            edges[numbers[state]] = tuple(
                (frozenset(token for token, target in row.items() if target == goal), numbers[goal])
                for goal in sorted(follow[state])
            )
        return cls(tuple(edges), frozenset({numbers[start]}), frozenset(numbers[state] for state in accept))

    @cached_property
    def token_sets(self) -> tuple[Tokens, ...]:
        """The different sets of tokens on its edges, in order of their first occurrence."""
        return tuple(dict.fromkeys(tokens for row in self.edges for tokens, _ in row))

    @cached_property
    def numbered(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """`edges`, with the place in `token_sets` instead of a set."""
        number = {tokens: n for n, tokens in enumerate(self.token_sets)}
        return tuple(tuple((number[tokens], goal) for tokens, goal in row) for row in self.edges)

    def after(self, states: Iterable[int], token: int | None) -> set[int]:
        """States that a token leads to from any of some states; None stands for every token."""
        return {
            goal
            for state in states
            for tokens, goal in self.edges[state]
            if token is None or tokens is None or token in tokens
        }

    def run(self, states: Iterable[int], canvas: Iterable[int | None]) -> set[int]:
        """States that tokens lead to, masked ones standing for every token."""
        reached = set(states)
        for token in canvas:
            reached = self.after(reached, token)
            if not reached:
                break
        return reached

    def completable(self, canvas: Canvas) -> bool:
        """Whether the masked slots can be filled so that the canvas is allowed. Exact: slots are filled independently,
        so that a path through the states exists if and only if tokens do."""
        return not self.accept.isdisjoint(self.run(self.start, canvas))

    def admissible(self, canvas: Canvas, offset: int, token: int) -> bool:
        """See `Constraint`."""
        before = self.run(self.start, canvas[:offset])
        return not self.accept.isdisjoint(self.run(self.after(before, token), canvas[offset + 1 :]))

    def choices(self, length: int) -> dict[int, frozenset[int]]:
        """Which tokens occur at each slot in any allowed canvas of that length, for `RolloutEngine.generate`. Slots
        that take any token are left out. With them, candidates are not wasted on tokens that are never admissible.

        Raises:
            ValueError: no canvas of that length is allowed.
        """
        reached = [set(self.start)]
        for _ in range(length):
            reached.append(self.after(reached[-1], None))
        useful = reached[length] & self.accept
        if not useful:
            raise ValueError(f"no string of {length} tokens is allowed, so there is no canvas of that length")
        found: dict[int, frozenset[int]] = {}
        for offset in reversed(range(length)):
            edges = [(s, tokens) for s in reached[offset] for tokens, goal in self.edges[s] if goal in useful]
            useful = {state for state, _ in edges}
            sets = {tokens for _, tokens in edges}
            if None not in sets:
                found[offset] = _union(tokens for tokens in sets if tokens is not None)
        return dict(sorted(found.items()))


def one_of(tokens: Collection[int] | None) -> Automaton:
    """One token of a collection; None for any token."""
    if tokens is not None and not tokens:
        raise ValueError("tokens is empty; name at least one, or None for any")
    return Automaton((((None if tokens is None else frozenset(tokens), 1),), ()), frozenset({0}), frozenset({1}))


def literal(tokens: Sequence[int]) -> Automaton:
    """Exactly these tokens, one after another."""
    edges = [((frozenset({token}), i + 1),) for i, token in enumerate(tokens)]
    return Automaton((*edges, ()), frozenset({0}), frozenset({len(tokens)}))


def sequence(*parts: Automaton) -> Automaton:
    """One language after another."""
    whole = literal([])
    for part in parts:
        whole = _joined(whole, part)
    return whole


def any_of(*parts: Automaton) -> Automaton:
    """Any of several languages."""
    if not parts:
        raise ValueError("any_of needs at least one language")
    edges: tuple[tuple[tuple[Tokens, int], ...], ...] = ()
    start: frozenset[int] = frozenset()
    accept: frozenset[int] = frozenset()
    for part in parts:
        moved = _shifted(part, len(edges))
        edges, start, accept = edges + moved.edges, start | moved.start, accept | moved.accept
    return Automaton(edges, start, accept)


def repeat(part: Automaton, at_least: int = 0, at_most: int | None = None) -> Automaton:
    """A language several times in a row.

    Args:
        at_most: None for any number of times.
    """
    if at_least < 0 or (at_most is not None and at_most < at_least):
        raise ValueError(f"at_least={at_least}, at_most={at_most} is not allowed; 0 <= at_least <= at_most")
    required = [part] * at_least
    if at_most is None:
        return sequence(*required, _star(part))
    optional = any_of(literal([]), part)
    return sequence(*required, *[optional] * (at_most - at_least))


def sized(part: Automaton, length: int) -> Automaton:
    """The strings of a language that have exactly this many tokens.

    Raises:
        ValueError: it has none.
    """
    layers = [set(part.start)]
    for _ in range(length):
        layers.append(part.after(layers[-1], None))
    layers[length] &= part.accept
    if not layers[length]:
        raise ValueError(f"no string of {length} tokens is in the language")
    for i in reversed(range(length)):  # what cannot be completed any more is left out
        layers[i] = {s for s in layers[i] if any(goal in layers[i + 1] for _, goal in part.edges[s])}
    numbers = {state: n for n, state in enumerate((i, s) for i, layer in enumerate(layers) for s in sorted(layer))}
    edges = [
        tuple((tokens, numbers[i + 1, goal]) for tokens, goal in part.edges[s] if (i + 1, goal) in numbers)
        for i, s in numbers
    ]
    ends = (frozenset(numbers[i, s] for s in layers[i]) for i in (0, length))
    return Automaton(tuple(edges), *ends)


def _shifted(part: Automaton, by: int) -> Automaton:
    edges = tuple(tuple((tokens, goal + by) for tokens, goal in row) for row in part.edges)
    return Automaton(edges, frozenset(s + by for s in part.start), frozenset(s + by for s in part.accept))


def _joined(first: Automaton, second: Automaton) -> Automaton:
    """One language behind another: whoever may stop in the first may go on as from the start of the second."""
    moved = _shifted(second, len(first.edges))
    going_on = tuple(edge for state in second.start for edge in moved.edges[state])
    edges = [row + going_on if state in first.accept else row for state, row in enumerate(first.edges)]
    accept = moved.accept if second.start.isdisjoint(second.accept) else moved.accept | first.accept
    return Automaton((*edges, *moved.edges), first.start, accept)


def _star(part: Automaton) -> Automaton:
    """A language any number of times. A state of its own starts it, so that no other accepts the empty string."""
    again = tuple(edge for state in part.start for edge in part.edges[state])
    edges = [row + again if state in part.accept else row for state, row in enumerate(part.edges)]
    first = len(edges)
    return Automaton((*edges, again), frozenset({first}), part.accept | {first})


def _union(sets: Iterable[frozenset[int]]) -> frozenset[int]:
    """The union; the very same object for one set, which may be as large as a vocabulary."""
    first, *others = sets
    return first.union(*others) if others else first
