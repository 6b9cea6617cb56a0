"""What the engine does with each part of a schedule, shown with rules made up for the purpose."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.rollout import EventKind, Rollout
from rl4dlm.rollout.schedules.llada import fixed_blocks
from rl4dlm.rollout.schedules.parts import CanvasInput, Resize, Schedule, Step, even_top, probability
from tests.rollout.denoisers import EOS, MASK, PROMPTS, VOCAB, assert_same_rows, denoiser, row_logits
from tests.rollout.table_model import TableModel, constant_table, random_table

LENGTH = 6
EARLY, TABLE_EOS, TABLE_MASK = 0, 1, 5  # ids of a table with six tokens


@dataclasses.dataclass(frozen=True)
class Parts(DecodingConfig):
    """One token per step in order of confidence, with some parts changed."""

    change: dict[str, Any] = dataclasses.field(default_factory=dict)

    def build_schedule(self) -> Schedule:
        base = Schedule(fixed_blocks(self), probability, even_top(self.steps_per_block))
        return dataclasses.replace(base, **self.change)


def parts(length: int = LENGTH, settings: dict[str, Any] | None = None, **change: Any) -> Parts:
    defaults = {"canvas_length": length, "steps": length, "stop_at_eos": False}
    return Parts(**{**defaults, **(settings or {})}, change=change)


def table(seed: int = 0) -> TableModel:
    return TableModel(random_table(seed, 6), 6, mask_token_id=TABLE_MASK, eos_token_ids=(TABLE_EOS,))


def fed_states(model: TableModel, rollout: Rollout) -> list[list[int]]:
    """What the model was fed of a single row's canvas, step by step."""
    prompt = rollout.prompt_ids[0]  # attaching the head fed another row
    return [list(row[len(prompt) :]) for row in model.rows_seen if list(row[: len(prompt)]) == prompt]


def replayed(rollout: Rollout, row: int = 0) -> list[list[int]]:
    """The same from the trace; slots that do not exist are left out."""
    states = list(rollout.states())[: int(rollout.trace.steps[row])]
    return [[token for token in state[row].tolist() if token >= 0] for state in states]


def at_step(number: int, where: Callable[[Step], Tensor]) -> Callable[..., Tensor]:
    """A rule that applies in one step of each row and nowhere else."""
    return lambda step, *rest: where(step) & (step.total_step == number)[:, None]


def slot(number: int) -> Callable[[Step], Tensor]:
    return lambda step: (step.offsets == number).expand(step.tokens.shape)


# --- taking back and replacing ----------------------------------------------------------------------------------------


def test_a_remasked_token_is_drawn_again_and_every_state_can_be_replayed():
    model, everything = table(), lambda step, scores: step.eligible
    rollout = RolloutEngine(model).generate([[2, 3]], parts(commit=everything, remask=at_step(0, slot(2))))
    assert fed_states(model, rollout) == replayed(rollout)
    assert rollout.trace.commit_step.tolist() == [[0, 0, 1, 0, 0, 0]]
    events = rollout.trace.events
    assert events is not None
    assert events.of(EventKind.REMASK).position.tolist() == [2]
    assert events.of(EventKind.COMMIT).position.tolist() == [0, 1, 2, 3, 4, 5, 2]
    again = events.of(EventKind.COMMIT).token[-1]
    assert int(rollout.canvas[0, 2]) == int(again)
    torch.testing.assert_close(rollout.trace.raw_log_prob[0, 2], events.of(EventKind.COMMIT).raw_log_prob[-1])


def test_given_slots_are_there_from_the_start_also_when_events_are_replayed():
    config = parts(remask=at_step(1, slot(0)), patience=1)
    rollout = RolloutEngine(table()).generate([[2, 3]], config, hints=[{3: 4}])
    assert all(state[3] == 4 for state in replayed(rollout))


def test_a_given_slot_is_neither_taken_back_nor_replaced():
    rule = at_step(1, lambda step: torch.ones_like(step.masked))
    config = parts(remask=rule, replace=rule, scope="canvas", patience=2)
    rollout = RolloutEngine(table()).generate([[2, 3]], config, hints=[{3: 4}])
    assert int(rollout.canvas[0, 3]) == 4
    assert rollout.trace.events is not None
    assert 3 not in rollout.trace.events.position.tolist()


def test_a_rule_that_takes_everything_back_gets_on_all_the_same():
    config = parts(remask=lambda step, commit: torch.ones_like(commit), patience=2)
    rollout = RolloutEngine(table()).generate([[2, 3]], config)
    # Two idle steps are allowed; in the third one a token stays. Then it and the next one are taken back together.
    assert rollout.stop_reason == ["step_cap"]
    assert TABLE_MASK not in rollout.canvas
    assert int(rollout.trace.steps) == 4 * LENGTH + 2 + LENGTH + 1


def test_without_patience_nothing_can_be_taken_back_for_nothing():
    config = parts(remask=lambda step, commit: torch.ones_like(commit))
    model = RolloutEngine(table())
    rollout = model.generate([[2, 3]], config)
    assert rollout.stop_reason == ["complete"]
    assert int(rollout.trace.steps) == LENGTH
    assert torch.equal(rollout.canvas, model.generate([[2, 3]], parts()).canvas)


def test_a_replaced_token_counts_from_the_step_of_its_replacement():
    model = table(3)
    config = parts(replace=at_step(4, lambda step: step.written), scope="block")
    rollout = RolloutEngine(model).generate([[2, 3]], config)
    assert fed_states(model, rollout) == replayed(rollout)
    events = rollout.trace.events
    assert events is not None
    replaced = events.of(EventKind.REPLACE)
    assert len(replaced) == 4
    assert bool((rollout.trace.commit_step[0, replaced.position] == 4).all())
    assert torch.equal(rollout.canvas[0, replaced.position], replaced.token)


def test_a_row_may_stay_in_a_full_block():
    config = parts(
        settings={"block_length": 3},
        stay=lambda step: step.step < 4,
        replace=lambda step, commit: torch.zeros_like(commit),
        scope="block",
    )
    rollout = RolloutEngine(table()).generate([[2, 3]], config)
    assert int(rollout.trace.steps) == 10  # three steps to fill a block of three, and two more, twice
    assert int(rollout.trace.commit_step[0, 3:].min()) == 5


def test_a_schedule_that_never_ends_is_ended():
    config = parts(stay=lambda step: torch.ones_like(step.step, dtype=torch.bool), scope="block")
    rollout = RolloutEngine(table()).generate([[2, 3]], config)
    assert rollout.stop_reason == ["step_cap"]
    assert int(rollout.trace.steps) == 4 * LENGTH + LENGTH + 1
    assert torch.equal(rollout.canvas, RolloutEngine(table()).generate([[2, 3]], parts()).canvas)


# --- canvases that change their length --------------------------------------------------------------------------------


def insert(number: int, at: int, count: int, token: int, only: int | None = None) -> Callable[[Step], Resize]:
    """Puts slots in at one step, in all rows or in the row of one id."""

    def resize(step: Step) -> Resize:
        now = (step.total_step == number) & (True if only is None else step.row_ids == only)
        full = torch.full_like(step.length, at)
        return Resize(full, torch.where(now, count, 0), torch.full_like(full, token), torch.full_like(full, 100))

    return resize


def test_slots_can_be_put_in_and_what_lies_behind_moves():
    model = table(1)
    config = parts(10, start_length=4, resize=insert(1, 1, 3, TABLE_MASK))
    rollout = RolloutEngine(model).generate([[2, 3]], config)
    assert fed_states(model, rollout) == replayed(rollout)
    assert rollout.trace.start_length is not None
    assert rollout.trace.length is not None
    assert (int(rollout.trace.start_length), int(rollout.trace.length)) == (4, 7)
    assert rollout.canvas[0, 7:].tolist() == [TABLE_EOS] * 3
    assert bool((rollout.trace.commit_step[0, :7] >= 0).all())
    assert TABLE_MASK not in rollout.canvas


def test_slots_that_a_schedule_gives_are_nobodys_choice():
    model = table(1)
    config = parts(10, start_length=4, resize=insert(0, 4, 2, 4))
    rollout = RolloutEngine(model).generate([[2, 3]], config)
    assert fed_states(model, rollout) == replayed(rollout)
    assert rollout.hinted[0].tolist() == [False] * 4 + [True] * 2 + [False] * 4
    assert rollout.canvas[0, 4:6].tolist() == [4, 4]
    assert rollout.trace.commit_step[0, 4:].tolist() == [-1] * 6


def test_slots_beyond_the_canvas_are_cut_off():
    model = table(1)
    config = parts(6, start_length=4, resize=insert(1, 1, 3, TABLE_MASK))
    rollout = RolloutEngine(model).generate([[2, 3]], config)
    assert fed_states(model, rollout) == replayed(rollout)
    assert rollout.trace.length is not None
    assert int(rollout.trace.length) == 6
    assert rollout.trace.events is not None
    assert rollout.trace.events.of(EventKind.TRUNCATE).position.tolist() == [6]


def test_a_cut_canvas_ends_there():
    def cut(step: Step) -> Resize:
        zero = torch.zeros_like(step.length)
        return Resize(zero, zero, zero, torch.where(step.total_step >= 1, 3, 100))

    model = table(2)
    rollout = RolloutEngine(model).generate([[2, 3]], parts(resize=cut))
    assert fed_states(model, rollout) == replayed(rollout)
    assert rollout.stop_reason == ["eos"]
    assert rollout.canvas[0, 3:].tolist() == [TABLE_EOS] * 3


@pytest.mark.parametrize("max_batch_rows", [1, 2, None])
def test_rows_of_different_length_do_not_touch_each_other(max_batch_rows: int | None):
    config = parts(12, settings={"temperature": 1.0}, start_length=6, resize=insert(2, 3, 4, MASK, only=7))
    rows = [7, 3, 5]
    together = RolloutEngine(denoiser(), max_batch_rows=max_batch_rows).generate(
        PROMPTS[:3], config, row_ids=rows, seed=3
    )
    for index, row in enumerate(rows):
        alone = RolloutEngine(denoiser()).generate([PROMPTS[index]], config, row_ids=[row], seed=3)
        assert_same_rows(alone, together, [index])
        assert replayed(alone) == replayed(together, index)


def test_hints_are_refused_where_slots_move():
    with pytest.raises(ValueError, match="hints is not supported"):
        RolloutEngine(table()).generate([[2]], parts(resize=insert(0, 0, 1, 4)), hints=[{0: 2}])


# --- what is fed and what is read -------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"cfg_scale": 0.5}, {"temperature": 0.8}])
def test_plain_embeddings_as_soft_inputs_change_nothing(settings: dict[str, Any]):
    engine = RolloutEngine(denoiser())
    plain = engine.generate(PROMPTS, parts(settings=settings))
    soft = engine.generate(PROMPTS, parts(settings=settings, inputs=lambda canvas: canvas.embeddings))
    assert_same_rows(soft, plain)
    assert plain.exact
    assert not soft.exact


def test_soft_inputs_reach_the_masked_slots():
    seen: list[Tensor] = []

    def inputs(canvas: CanvasInput) -> Tensor:
        seen.append(canvas.embeddings)
        return torch.where(canvas.masked[..., None], 0.5 * canvas.embeddings, canvas.embeddings)

    model = denoiser()
    rollout = RolloutEngine(model).generate([PROMPTS[0]], parts(inputs=inputs))
    prompt = model.get_input_embeddings()(torch.tensor([PROMPTS[0]]))
    with torch.no_grad():
        logits = model(inputs_embeds=torch.cat([prompt, 0.5 * seen[0]], 1)).logits[0, len(PROMPTS[0]) :]
    best = logits.softmax(-1)
    best[:, MASK] = 0
    assert int(best.amax(-1).argmax()) == int((rollout.trace.commit_step[0] == 0).nonzero())


def test_a_reading_belongs_to_its_slot():
    model, found = denoiser(), {}

    def commit(step: Step, scores: Tensor) -> Tensor:
        for row, prompt in enumerate(step.row_ids.tolist()):
            found[prompt, int(step.total_step[row])] = (step.tokens[row].clone(), step.read["logits"][row].clone())
        return even_top(3)(step, scores)

    settings = {"block_length": 3, "steps": 6}
    config = parts(settings=settings, commit=commit, reads={"logits": lambda scored: scored.log_probs}, scope="canvas")
    RolloutEngine(model).generate(PROMPTS, config)
    assert len(found) == len(PROMPTS) * LENGTH
    for (row, _), (state, log_probs) in found.items():
        torch.testing.assert_close(log_probs, row_logits(model, PROMPTS[row], state).log_softmax(-1))


def test_a_shadow_sees_everything_but_the_token_it_stands_for():
    model, found = denoiser(), []

    def commit(step: Step, scores: Tensor) -> Tensor:
        verified = step.written & step.inside & ~step.locked
        for row, slot in verified.nonzero().tolist():
            found.append((int(step.row_ids[row]), slot, step.tokens[row].clone(), step.read["shadow"][row, slot]))
        return even_top(3)(step, scores)

    config = parts(settings={"block_length": 3, "steps": 6}, commit=commit, shadow=True)
    RolloutEngine(model).generate(PROMPTS, config, hints=[{1: 9}] + [{}] * (len(PROMPTS) - 1))
    assert len(found) > 2 * len(PROMPTS)
    for row, position, state, log_prob in found:
        torch.testing.assert_close(log_prob, leave_one_out(model, PROMPTS[row], state, position))


def leave_one_out(model: Any, prompt: list[int], state: Tensor, position: int) -> Tensor:
    """Log-probability of a token at a mask token beside the row, at the same position, that does not see it."""
    tokens = torch.tensor([*prompt, *state.tolist(), MASK])
    at = len(prompt) + position
    visible = torch.ones(len(tokens), len(tokens), dtype=torch.bool)
    visible[:-1, -1] = False
    visible[-1, at] = False
    positions = torch.tensor([[*range(len(tokens) - 1), at]])
    with torch.no_grad():
        logits = model(input_ids=tokens[None], attention_mask=visible[None, None], position_ids=positions).logits
    return logits[0, -1].log_softmax(-1)[state[position]]


def test_the_shadow_does_not_change_what_is_decoded():
    engine = RolloutEngine(denoiser())
    assert_same_rows(engine.generate(PROMPTS, parts(shadow=True)), engine.generate(PROMPTS, parts()))


def test_logits_can_be_transformed_and_the_raw_log_probabilities_stay_the_models():
    favourite = 7

    def transform(logits: Tensor, places: Any) -> Tensor:
        return logits + 50.0 * (torch.arange(logits.shape[-1]) == favourite)

    model = denoiser()
    rollout = RolloutEngine(model).generate([PROMPTS[0]], parts(transform=transform))
    assert rollout.canvas.tolist() == [[favourite] * LENGTH]
    first = (rollout.trace.commit_step[0] == 0).nonzero().squeeze(-1)
    logits = row_logits(model, PROMPTS[0], torch.full((LENGTH,), MASK)).log_softmax(-1)
    torch.testing.assert_close(rollout.trace.raw_log_prob[0, first], logits[first, favourite])


# --- options of the engine --------------------------------------------------------------------------------------------


def test_choices_bind_what_is_drawn():
    choices = [{0: (3, 4), 2: (9,)}, {}, {5: (11, 12)}]
    for temperature in (0.0, 1.0):
        config = DecodingConfig(canvas_length=LENGTH, steps=3, temperature=temperature, stop_at_eos=False)
        rollout = RolloutEngine(denoiser()).generate(PROMPTS[:3], config, choices=choices)
        for row, given in enumerate(choices):
            for offset, allowed in given.items():
                assert int(rollout.canvas[row, offset]) in allowed
        free = RolloutEngine(denoiser()).generate(PROMPTS[:3], config)
        assert torch.equal(free.canvas[1], rollout.canvas[1])


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ([{}], "one per row"),
        ([{}, {99: (3,)}], "offset 99"),
        ([{}, {0: ()}], "at least one"),
        ([{0: (MASK,)}, {}], "at least one"),
    ],
)
def test_bad_choices_are_refused(choices: list[dict[int, tuple[int, ...]]], message: str):
    with pytest.raises(ValueError, match=message):
        RolloutEngine(denoiser()).generate(PROMPTS[:2], DecodingConfig(canvas_length=4), choices=choices)


def test_no_end_is_drawn_before_the_shortest_length():
    logits = [0.0, 5.0, 0.5, 1.0, 0.2, -3.0]
    model = TableModel(constant_table(logits), 6, mask_token_id=TABLE_MASK, eos_token_ids=(TABLE_EOS,))
    engine = RolloutEngine(model)
    assert engine.generate([[2]], DecodingConfig(canvas_length=6, steps=6)).completion_ids == [[TABLE_EOS]]
    for temperature in (0.0, 1.0):
        config = DecodingConfig(canvas_length=6, steps=6, min_new_tokens=4, temperature=temperature)
        [tokens] = engine.generate([[2]], config).completion_ids
        assert len(tokens) >= 4
        assert TABLE_EOS not in tokens[:4]


def test_a_penalty_moves_the_end_away():
    logits = [0.0, 2.0, 0.5, 1.5, 0.2, -3.0]
    model = TableModel(constant_table(logits), 6, mask_token_id=TABLE_MASK, eos_token_ids=(TABLE_EOS,))
    config = DecodingConfig(canvas_length=4, steps=4, eos_penalty=1.0)
    rollout = RolloutEngine(model).generate([[2]], config)
    assert rollout.canvas.tolist() == [[3] * 4]
    own = torch.tensor(
        logits, dtype=torch.float64
    )  # M5: the record is of the model, not of what the penalty made of it
    torch.testing.assert_close(rollout.trace.raw_log_prob[0], own.log_softmax(-1)[3].expand(4))
    changed = own - torch.tensor([0, 1.0, 0, 0, 0, 0])
    torch.testing.assert_close(rollout.trace.confidence[0], changed.softmax(-1)[3].expand(4))


def test_looking_for_the_end_at_full_blocks_only():
    engine = RolloutEngine(denoiser())
    found = 0
    for seed in range(12):
        settings = {"canvas_length": 12, "block_length": 4, "steps": 12, "temperature": 1.0}
        at_once = engine.generate(PROMPTS, DecodingConfig(**settings), seed=seed)
        at_blocks = engine.generate(PROMPTS, DecodingConfig(**settings, stop_at_eos="block"), seed=seed)
        assert at_once.completion_ids == at_blocks.completion_ids
        assert bool((at_blocks.trace.steps >= at_once.trace.steps).all())
        stopped = torch.tensor([reason == "eos" for reason in at_blocks.stop_reason])
        assert bool((at_blocks.trace.steps[stopped] % 4 == 0).all())
        found += int((at_blocks.trace.steps > at_once.trace.steps).sum())
    assert found > 0


def test_every_step_can_be_watched():
    seen: list[Any] = []
    rollout = RolloutEngine(denoiser(), max_batch_rows=2).generate(PROMPTS, parts(), on_step=seen.append)
    states = [*rollout.states(), rollout.canvas]
    for progress in seen:
        for index, row in enumerate(progress.slots.tolist()):
            step = int(progress.step[index])
            assert torch.equal(progress.canvas[index], states[step][row])
            assert torch.equal(progress.masked[index], states[step][row] == MASK)
    assert sum(len(progress.slots) for progress in seen) == int(rollout.trace.steps.sum())


@pytest.mark.parametrize("change", [{"scope": "canvas"}, {"shadow": True}, {"reopens": True}])
def test_a_cache_is_refused_where_whole_rows_are_needed(change: dict[str, Any]):
    with pytest.raises(ValueError, match="cache='prefix' cannot be used"):
        parts(settings={"cache": "prefix"}, **change)


def test_vocabulary_and_end_are_what_these_tests_think():
    assert VOCAB > 12 and EOS == 1
