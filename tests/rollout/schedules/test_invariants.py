"""What every schedule keeps, whatever it decides; a schedule that is registered without an entry here fails.

Rows of different length are decoded alone while everything that the model is fed is written down, and again together,
where they are padded, finish at different steps and leave the batch one by one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings as hypothesis_settings, strategies as st
from torch import Tensor, nn

from rl4dlm.models.scoring import attach_scoring
from rl4dlm.rollout.constraints.automata import one_of, repeat, sequence
from rl4dlm.rollout.decoding import available_schedules
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.policies.hidden_states import HiddenStatePolicy
from rl4dlm.rollout.policies.policy import Seen
from rl4dlm.rollout.rollout import EventKind, Events, Rollout
from rl4dlm.rollout.schedules import registry
from tests.rollout.denoisers import assert_same_rows, row_logits
from tests.rollout.schedules.examples import (
    EOS,
    EXAMPLES,
    HINTS,
    LENGTH,
    MASK,
    PROMPTS,
    ROW_IDS,
    SETTINGS,
    VOCAB,
    Run,
    alone,
    decoding,
    denoiser,
    parts,
    runs,
    written,
)
from tests.rollout.table_model import TableModel, constant_table

every_example = pytest.mark.parametrize(("name", "i"), EXAMPLES, ids=[f"{name}-{i}" for name, i in EXAMPLES])
every_schedule = pytest.mark.parametrize("name", SETTINGS)


def test_every_schedule_is_here():
    entries = {name: registry.lookup(name) for name in available_schedules()}
    ours = [name for name, entry in entries.items() if entry.build.__module__.startswith("rl4dlm.")]
    assert sorted(SETTINGS) == [name for name in ours if entries[name].noise == "mask"]


def test_the_examples_show_what_can_happen():
    """Else the tests below would be about less than they say."""
    happened: dict[str, set[str]] = {name: set() for name in SETTINGS}
    for name, i in EXAMPLES:
        for run in runs(name, i):
            seen, changes = happened[name], [written(b) - written(a) for a, b in itertools.pairwise(run.states)]
            seen |= {kind.name for kind in EventKind if run.events(kind)}
            seen |= {"writes several"} if max(changes, default=0) > 1 else set()
            seen |= {"waits"} if min(changes, default=1) < 1 else set()
            seen |= {"draws positions"} if run.rollout.trace.selection_log_prob is not None else set()

    def where(what: str) -> set[str]:
        return {name for name, seen in happened.items() if what in seen}

    assert where("writes several") == set(SETTINGS)
    assert where("REMASK") == {"hierarchical", "rcr", "saber", "wino"}
    assert where("REPLACE") == {"editing", "hierarchical", "levenshtein"}
    assert where("INSERT") == {"daedal", "levenshtein"} and where("TRUNCATE") == {"daedal", "learn2pd"}
    assert where("DELETE") == {"levenshtein"}
    assert where("waits") >= {"dream_origin", "latent_refinement"}
    dream = {"dream_entropy", "dream_maskgit_plus", "dream_origin", "dream_topk_margin"}
    assert where("draws positions") == dream | {"bernoulli", "ctrldiff", "edlm", "learned_order"}


# --- the invariants ---------------------------------------------------------------------------------------------------


def check_prompt_and_given(run: Run) -> None:
    """What was given is never changed, and the model sees it at every step."""
    assert run.rollout.prompt_ids == [run.prompt]
    for call in run.fed:
        if call.get("input_ids") is not None:
            assert call["input_ids"][0, : len(run.prompt)].tolist() == run.prompt
    for state in run.states:
        assert [state[offset] for offset in run.given] == list(run.given.values())
    if not run.schedule.moves:
        assert run.rollout.hinted[0].nonzero().squeeze(-1).tolist() == sorted(run.given)


def check_tokens(rollout: Rollout) -> None:
    """No mask is left, and every token is one of the vocabulary."""
    canvas = rollout.canvas
    assert not bool((canvas == MASK).any())
    assert bool(((canvas >= 0) & (canvas < VOCAB)).all())
    assert set(rollout.stop_reason) <= {"complete", "eos"}
    for completion in rollout.completion_ids:
        assert EOS not in completion[:-1]


def check_blocks(run: Run) -> None:
    """Each block starts where the one before ended, and nothing is written behind the active one and what is open."""
    spans, reaches = [(int(p.start), int(p.stop)) for p in run.progress], [int(p.reach) for p in run.progress]
    assert run.schedule.reach is not None or reaches == [stop for _, stop in spans]
    assert run.schedule.ahead or all(reach <= stop for reach, (_, stop) in zip(reaches, spans, strict=True))
    if run.schedule.resize is None:
        for (start, stop), (next_start, next_stop) in itertools.pairwise(spans):
            assert (next_start, next_stop) == (start, stop) or next_start >= stop
    for (start, stop), reach, before, after in zip(spans, reaches, run.states, run.states[1:], strict=False):
        assert 0 <= start <= stop
        if run.schedule.resize is None:
            assert stop <= LENGTH
        if not run.schedule.moves:
            new = [i for i, (old, token) in enumerate(zip(before, after, strict=True)) if old == MASK != token]
            assert all(i < reach for i in new)


def check_written_once(run: Run) -> None:
    """A monotone schedule writes each open slot once and never touches it again."""
    if not run.schedule.monotone:
        return
    rollout, trace = run.rollout, run.rollout.trace
    assert trace.events is None
    for step, (before, after) in enumerate(itertools.pairwise(run.states)):
        changed = [i for i, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
        assert all(before[i] == MASK for i in changed)
        assert changed == (trace.commit_step[0] == step).nonzero().squeeze(-1).tolist()
    if rollout.stop_reason[0] == "complete":
        assert torch.equal(trace.commit_step[0] >= 0, ~rollout.hinted[0])


def check_progress(run: Run) -> None:
    """Slots are gained or cut off, or the schedule said that it may wait so many steps; so there is a last step."""
    gains = [max(written(b) - written(a), len(a) - len(b)) for a, b in itertools.pairwise(run.states)]
    waiting = 0
    for gain, state in zip(gains, run.states, strict=False):
        waiting = 0 if gain > 0 or MASK not in state else waiting + 1
        assert waiting <= run.schedule.patience or run.schedule.stay is not None
    steps = int(run.rollout.trace.steps)
    assert steps == len(run.states) - 1 == len(run.progress)
    if run.schedule.monotone and run.schedule.stay is None:
        assert steps <= (LENGTH - len(run.given)) * (1 + run.schedule.patience)


def check_forwards(run: Run) -> None:
    """Every forward is counted: one per step, two with guidance, and one more where drafts are checked."""
    expected = len(run.fed) * (2 if run.config.cfg_scale else 1) + run.checks
    assert run.rollout.nfe.tolist() == [expected]
    assert len(run.fed) == int(run.rollout.trace.steps)


def check_replay(run: Run, model: Any) -> None:
    """The record gives back every canvas that the model was fed."""
    embed = model.get_input_embeddings() if run.schedule.inputs is not None else None
    for state, call in zip(run.states, run.fed, strict=False):
        columns = slice(len(run.prompt), len(run.prompt) + len(state))
        if embed is None:
            assert call["input_ids"][0, columns].tolist() == state
            continue
        # Soft inputs stand where nothing is written; written slots are fed as the tokens they hold.
        plain = torch.tensor(state) != MASK
        assert torch.equal(call["inputs_embeds"][0, columns][plain], embed(torch.tensor(state))[plain])


def check_balance(run: Run) -> None:
    """Commitments less remasks are the slots that were open at first or put in open, less those open at the end."""
    events = run.rollout.trace.events
    if events is None:
        return
    put_in = int((events.of(EventKind.INSERT).token == MASK).sum())
    cut = sum(state.count(MASK) for state in _cut_off(run.states, events))
    opened = run.states[0].count(MASK) + put_in - cut
    net = run.events(EventKind.COMMIT) - run.events(EventKind.REMASK)
    assert net == opened - run.states[-1].count(MASK)


def _cut_off(states: list[list[int]], events: Events) -> Iterator[list[int]]:
    """What each cut took away: replays a step's events up to the cut."""
    for step in sorted(set(events.step.tolist())):
        canvas = list(states[step])
        for kind, position, token in zip(
            *(column[events.step == step].tolist() for column in (events.kind, events.position, events.token)),
            strict=True,
        ):
            if kind == EventKind.INSERT:
                canvas.insert(position, token)
            elif kind == EventKind.TRUNCATE:
                yield canvas[position:]
                del canvas[position:]
            elif kind == EventKind.DELETE:
                assert token in (-1, canvas[position])
                yield [canvas.pop(position)]
            else:
                assert (canvas[position] == MASK) == (kind == EventKind.COMMIT), (
                    "open slots are written, others taken back"
                )
                assert token != MASK
                canvas[position] = MASK if kind == EventKind.REMASK else token


def check_log_probs(run: Run, model: Any) -> None:
    """Log-probabilities are the model's own on the recorded states."""
    if run.schedule.inputs is not None or run.schedule.verify is not None:
        return
    trace = run.rollout.trace
    if trace.events is None:
        steps = trace.commit_step[0].tolist()
        entries = [
            (step, i, int(run.rollout.canvas[0, i]), float(trace.raw_log_prob[0, i]))
            for i, step in enumerate(steps)
            if step >= 0
        ]
    else:
        chosen = (trace.events.kind == EventKind.COMMIT) | (trace.events.kind == EventKind.REPLACE)
        columns = ("step", "position", "token", "raw_log_prob")
        entries = list(zip(*(getattr(trace.events, name)[chosen].tolist() for name in columns), strict=True))
    by_step: dict[int, list[tuple[int, int, float]]] = {}
    for step, *entry in entries:
        by_step.setdefault(step, []).append(tuple(entry))
    for step, several in by_step.items():
        log_probs = row_logits(model, run.prompt, torch.tensor(run.states[step])).log_softmax(-1)
        for offset, token, found in several:
            assert found == pytest.approx(log_probs[offset, token].item(), abs=1e-9)


def check_all(run: Run, model: Any) -> None:
    check_prompt_and_given(run)
    check_tokens(run.rollout)
    check_blocks(run)
    check_written_once(run)
    check_progress(run)
    check_forwards(run)
    check_replay(run, model)
    check_balance(run)


@every_example
def test_what_is_given_stays(name: str, i: int):
    for run in runs(name, i):
        check_prompt_and_given(run)


@every_example
def test_every_slot_holds_a_token_at_the_end(name: str, i: int):
    for run in runs(name, i):
        check_tokens(run.rollout)


@every_example
def test_nothing_is_written_behind_the_active_block(name: str, i: int):
    for run in runs(name, i):
        check_blocks(run)


@every_example
def test_what_is_written_for_good_is_written_once(name: str, i: int):
    for run in runs(name, i):
        check_written_once(run)


@every_example
def test_rows_get_on(name: str, i: int):
    for run in runs(name, i):
        check_progress(run)


@every_example
def test_forwards_are_counted(name: str, i: int):
    for run in runs(name, i):
        check_forwards(run)


@every_example
def test_the_record_gives_back_what_the_model_was_fed(name: str, i: int):
    for run in runs(name, i):
        check_replay(run, denoiser())
        check_balance(run)


@every_example
def test_log_probabilities_are_those_of_the_recorded_states(name: str, i: int):
    for run in runs(name, i):
        check_log_probs(run, denoiser())


# --- batches ----------------------------------------------------------------------------------------------------------


def assert_same(a: Rollout, b: Rollout, rows: list[int]) -> None:
    """Rows of `a` are the rows `rows` of `b`, with everything that happened to them."""
    assert_same_rows(a, b, rows)
    assert torch.equal(a.extra_forwards, b.extra_forwards[rows])
    for name in ("start_length", "length"):
        mine, other = getattr(a.trace, name), getattr(b.trace, name)
        assert (mine is None) == (other is None)
        assert mine is None or torch.equal(mine, other[rows])
    for i, row in enumerate(rows):
        assert _history(a, i) == _history(b, row)
        assert _selection(a, i) == pytest.approx(_selection(b, row), abs=1e-10)


def _history(rollout: Rollout, row: int) -> list[tuple[int, ...]]:
    events = rollout.trace.events
    if events is None:
        return []
    columns = (events.step, events.kind, events.position, events.token)
    return list(zip(*(column[events.row == row].tolist() for column in columns), strict=True))


def _selection(rollout: Rollout, row: int) -> list[float]:
    values = rollout.trace.selection_log_prob
    return [0.0] * int(rollout.trace.steps[row]) if values is None else values[row, : rollout.trace.steps[row]].tolist()


@pytest.mark.parametrize("stop", [True, False])
@every_example
def test_a_row_is_the_same_in_every_batch(name: str, i: int, stop: bool):
    config, one_by_one = decoding(name, i, stop_at_eos=stop), runs(name, i, stop_at_eos=stop)
    moves = parts(config).moves

    def together(order: list[int], longer: bool, **engine: Any) -> Rollout:
        prompts, ids, hints = [PROMPTS[r] for r in order], [ROW_IDS[r] for r in order], [HINTS[r] for r in order]
        if longer:  # a row that pads all others further
            prompts, ids, hints = [*prompts, [3, 4, 5] * 4], [*ids, 99], [*hints, {}]
        return RolloutEngine(denoiser(), **engine).generate(
            prompts, config, row_ids=ids, seed=5, hints=None if moves else hints
        )

    batch = together([0, 1, 2, 3, 4], longer=False)
    for row, run in enumerate(one_by_one):
        assert_same(run.rollout, batch, [row])
    order = [3, 0, 4, 2, 1]
    other = together(order, longer=True, max_batch_rows=4)
    assert_same(batch, other, [order.index(row) for row in range(5)])


@every_example
def test_a_record_without_entropies_is_otherwise_the_same(name: str, i: int):
    """Also where the schedule reads them: then they are there, though the record does not keep them."""
    assert decoding(name, i).record == ("entropy",)
    for row, run in enumerate(runs(name, i)):
        config = decoding(name, i, record=())
        plain = alone(denoiser(), config, PROMPTS[row], HINTS[row], ROW_IDS[row], 5).rollout
        assert_same(run.rollout, plain, [0])
        assert plain.trace.entropy is None
        assert run.rollout.trace.entropy is not None and not bool(run.rollout.trace.entropy.isnan().any())


# --- the end of a sequence --------------------------------------------------------------------------------------------


@every_example
def test_an_early_stop_changes_no_valid_token(name: str, i: int):
    if parts(decoding(name, i)).reopens:
        pytest.skip("what is finished may be reopened, so there is no early stop")
    stopped, at_block, full = (runs(name, i, stop_at_eos=stop) for stop in (True, "block", False))
    for early, later, whole in zip(stopped, at_block, full, strict=True):
        assert early.rollout.completion_ids == later.rollout.completion_ids == whole.rollout.completion_ids
        assert int(early.rollout.nfe) <= int(later.rollout.nfe) <= int(whole.rollout.nfe)
        assert whole.rollout.stop_reason == ["complete"] or whole.schedule.resize is not None
        if early.rollout.stop_reason == ["eos"]:
            assert early.rollout.completion_ids[0][-1] == EOS
            unwritten = early.states[-1].count(MASK)
            assert early.rollout.canvas[0].tolist().count(EOS) > unwritten or early.schedule.resize is not None


@every_example
def test_what_looks_at_entropies_says_so(name: str, i: int):
    """Entropies that are not recorded are not there at all, unless a schedule says that it looks at them."""
    kept, dropped = (
        RolloutEngine(denoiser()).generate(PROMPTS[:2], decoding(name, i, record=record), seed=3)
        for record in (("entropy",), ())
    )
    assert torch.equal(kept.canvas, dropped.canvas) and torch.equal(kept.nfe, dropped.nfe)


@every_example
def test_forwards_are_fixed_where_that_is_promised(name: str, i: int):
    config = decoding(name, i, stop_at_eos=False)
    rows = RolloutEngine(denoiser()).generate([PROMPTS[0], PROMPTS[1]], config, num_generations=10, seed=3)
    if registry.lookup(name).fixed_forwards:
        assert len(set(rows.nfe.tolist())) == 1


# --- options of the engine --------------------------------------------------------------------------------------------

FIRST, SECOND = {0, 1, 3, 4}, {5, 6, 7, 8}
ALTERNATING = repeat(sequence(one_of(FIRST), one_of(SECOND)))
"""Canvases whose tokens come from two sets in turn."""


def turns(state: list[int]) -> bool:
    return all(token == MASK or token in (SECOND if i % 2 else FIRST) for i, token in enumerate(state))


@every_example
def test_a_constraint_holds_at_every_step(name: str, i: int):
    config = decoding(name, i)
    for prompt, row_id in zip(PROMPTS, ROW_IDS, strict=True):
        if takes_no_constraint(name, i):
            with pytest.raises(ValueError, match="constraint is not supported|not supported with constraint"):
                alone(denoiser(), config, prompt, {}, row_id, seed=5, constraint=ALTERNATING)
            return
        run = alone(denoiser(), config, prompt, {3: 7}, row_id, seed=5, constraint=ALTERNATING)
        assert all(turns(state) for state in run.states)
        check_all(run, denoiser())


def takes_no_constraint(name: str, i: int) -> bool:
    schedule = parts(decoding(name, i))
    return schedule.moves or schedule.replace is not None or schedule.verify is not None


class FromTheLeft:
    """Lets a token pass where everything before it is written: whole slots are refused, not tokens."""

    def admissible(self, canvas: list[int | None], offset: int, token: int) -> bool:
        return None not in canvas[:offset]


@every_example
def test_a_constraint_may_refuse_whole_slots(name: str, i: int):
    config = decoding(name, i)
    if takes_no_constraint(name, i):
        pytest.skip("takes no constraint")
    for prompt, row_id in zip(PROMPTS, ROW_IDS, strict=True):
        run = alone(denoiser(), config, prompt, {}, row_id, seed=5, constraint=FromTheLeft())
        check_all(run, denoiser())
        if parts(config).remask is None:
            assert all(MASK not in state[: LENGTH - state.count(MASK)] for state in run.states)


@every_example
def test_a_slot_takes_only_tokens_that_it_may(name: str, i: int):
    config = decoding(name, i, suppress_token_ids=(5,))
    if parts(config).moves:
        return
    choices = [{slot: SECOND if slot % 2 else FIRST for slot in range(1, LENGTH)}]
    for prompt, row_id in zip(PROMPTS, ROW_IDS, strict=True):
        run = alone(denoiser(), config, prompt, {}, row_id, seed=5, choices=choices)
        assert all(turns([MASK, *state[1:]]) and 5 not in state for state in run.states)
        check_all(run, denoiser())


@every_example
def test_ends_come_no_earlier_than_allowed(name: str, i: int):
    if name == "levenshtein":  # ends may move to the left
        with pytest.raises(ValueError, match="min_new_tokens=5 is not allowed"):
            decoding(name, i, min_new_tokens=5)
        return
    config = decoding(name, i, min_new_tokens=5, eos_penalty=-2.0)
    ended = 0
    for prompt, row_id in zip(PROMPTS, ROW_IDS, strict=True):
        run = alone(denoiser(), config, prompt, {}, row_id, seed=5)
        # A schedule that puts slots in may move an end, but only further back; one that searches a length closes it.
        assert all(EOS not in state[:5] for state in run.states) or name == "daedal"
        ended += EOS in run.states[-1]
    assert ended or name == "daedal"


@every_example
def test_deferred_tokens_wait_for_all_others(name: str, i: int):
    """At temperature 0, where candidates follow from the states: nothing else is open in the block when one comes."""
    deferred = (3, 8, EOS)
    config = decoding(name, i, temperature=0.0, defer_token_ids=deferred)
    schedule = parts(config)
    if schedule.inputs is not None or schedule.transform is not None or schedule.resize is not None:
        pytest.skip("candidates are not those of the plain model")
    came = 0
    for prompt, row_id in zip(PROMPTS, ROW_IDS, strict=True):
        run = alone(denoiser(), config, prompt, {}, row_id, seed=5)
        for before, after, progress in zip(run.states, run.states[1:], run.progress, strict=False):
            logits = row_logits(denoiser(), prompt, torch.tensor(before), config.cfg_scale)
            logits[:, MASK] = -torch.inf
            candidates = logits.argmax(-1).tolist()
            eligible = [slot for slot in range(int(progress.reach)) if before[slot] == MASK]
            early = [slot for slot in eligible if candidates[slot] in deferred and after[slot] != MASK]
            left = [slot for slot in eligible if candidates[slot] not in deferred and after[slot] == MASK]
            came += len(early)
            # What is taken back in the same step was written in it, too.
            assert not early or not left or schedule.remask is not None
    assert came


# --- models that misbehave --------------------------------------------------------------------------------------------


class Stub(TableModel):
    """The same logits `[V]` at every position, whatever is fed: tokens, soft inputs, shadows."""

    def __init__(self, logits: list[float]) -> None:
        zeros = [0.0] * VOCAB
        super().__init__(constant_table(zeros), VOCAB, mask_token_id=MASK, eos_token_ids=(EOS,))
        self.base_model = _SameEverywhere(torch.tensor(zeros, dtype=torch.float64))
        self.config.hidden_size = VOCAB
        self.embedding = nn.Embedding(VOCAB, 4, dtype=torch.float64)
        attach_scoring(self)  # which looks at some logits; from here on they need not be numbers
        self.base_model.logits = torch.tensor(logits, dtype=torch.float64)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding


class _SameEverywhere(nn.Module):
    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, **kwargs: Any) -> Any:
        fed = input_ids if inputs_embeds is None else inputs_embeds
        hidden = self.logits.expand(*fed.shape[:2], -1)
        return type("Output", (), {"last_hidden_state": hidden})()


class Indifferent(HiddenStatePolicy):
    """All slots are alike, whatever the states are."""

    kind, hidden_size = "indifferent", VOCAB
    settings: dict[str, Any] = {}  # noqa: RUF012

    def initialise(self, generator: torch.Generator) -> None: ...

    def forward(self, seen: Seen) -> Tensor:
        return torch.zeros(seen.masked.shape, dtype=torch.float64)


FOR_STUBS: dict[str, dict[str, Any]] = {"learned_order": {"schedule_args": {"policy": Indifferent()}}}
"""Settings for models whose states are no model's."""


def peaked(token: int, height: float) -> list[float]:
    return [height if t == token else 0.1 * t for t in range(VOCAB)]


MISBEHAVING: dict[str, list[float]] = {
    "wants masks": peaked(MASK, 50.0),
    "wants masks a little more": peaked(MASK, 3.0),
    "uniform": [0.0] * VOCAB,
    "sure": peaked(7, 200.0),
    "cannot see some tokens": [-torch.inf if t in (0, 3, 4) else 0.3 * t for t in range(VOCAB)],
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("model", MISBEHAVING)
@every_schedule
def test_every_model_comes_to_an_end(name: str, model: str, temperature: float):
    config = decoding(name, temperature=temperature, **FOR_STUBS.get(name, {}))
    engine = RolloutEngine(Stub(MISBEHAVING[model]))
    rollout = engine.generate([[3], [4, 5, 6]], config, seed=1)
    check_tokens(rollout)
    assert int(rollout.nfe.max()) <= 2 * 5 * LENGTH
    again = engine.generate([[3], [4, 5, 6]], config, seed=1)
    assert_same(again, rollout, [0, 1])
    if temperature == 0 and model == "sure":
        assert rollout.canvas.unique().tolist() == [7]


@every_schedule
def test_a_model_that_only_ends_is_stopped_after_a_block(name: str):
    config = decoding(name, stop_at_eos=True, **FOR_STUBS.get(name, {}))
    schedule = parts(config)
    rollout = RolloutEngine(Stub(peaked(EOS, 50.0))).generate([[3], [4, 5, 6]], config)
    check_tokens(rollout)
    assert bool((rollout.canvas == EOS).all())
    assert rollout.completion_ids == [[EOS], [EOS]]
    if schedule.resize is None and not schedule.reopens:
        in_first_block = config.block_length or LENGTH
        assert int(rollout.trace.steps.max()) <= in_first_block


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@every_schedule
def test_logits_that_are_not_numbers_are_refused(name: str, temperature: float):
    config = decoding(name, temperature=temperature, **FOR_STUBS.get(name, {}))
    with pytest.raises(ValueError, match="not numbers"):
        RolloutEngine(Stub(peaked(4, torch.nan))).generate([[3]], config)


# --- any settings -----------------------------------------------------------------------------------------------------


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    block = draw(st.sampled_from([1, 2, 4, None]))
    count = LENGTH // (block or LENGTH)
    return {
        "block_length": block,
        "steps": count * draw(st.integers(1, 8)),
        "temperature": draw(st.sampled_from([0.0, 0.7])),
        "stop_at_eos": draw(st.sampled_from([True, False, "block"])),
        "prompt": draw(st.lists(st.sampled_from([0, 1, 3, 4, 5, 6, 7, 8]), min_size=1, max_size=6)),
        "given": draw(st.dictionaries(st.integers(0, LENGTH - 1), st.sampled_from([0, 1, 3, 4, 8]), max_size=LENGTH)),
        "row_id": draw(st.integers(0, 2**40)),
        "seed": draw(st.integers(0, 3)),
        "model": draw(st.integers(0, 2)),
    }


@every_schedule
@hypothesis_settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(call=calls(), which=st.integers(0, 10))
def test_the_rules_hold_whatever_is_asked(name: str, call: dict[str, Any], which: int):
    i = which % len(SETTINGS[name])
    free = {key: call[key] for key in ("temperature", "stop_at_eos")}
    if parts(decoding(name, i)).blocks.on_grid and name != "learn2pd":  # whose network has a block length of its own
        free["block_length"] = call["block_length"]
    if registry.lookup(name).takes_steps:
        free["steps"] = call["steps"]
    model = denoiser(call["model"])
    run = alone(model, decoding(name, i, **free), call["prompt"], call["given"], call["row_id"], call["seed"])
    check_all(run, model)
