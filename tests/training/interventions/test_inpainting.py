"""Hints: when they are given, what they hold and never hold, and what replaces what, with any trainer."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings, strategies as st

import rl4dlm
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.models.tiny import tiny_llada, tiny_tokenizer
from rl4dlm.training.interventions.inpainting import (
    Inpainting,
    chunks_of,
    placed,
    shown_chunks,
    split_at_answers,
    stated_answers,
)
from rl4dlm.training.interventions.intervention import Context, Group, Intervention
from tests.training.steps import tiny_llada_that_ends

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def bound(length: int = 64, generations: int = 4, names: tuple[str, ...] = ("right",), **changes: Any) -> Inpainting:
    inpainting = Inpainting(**changes)
    spec = DiffusionSpec.of(tiny_llada())
    inpainting.bind(Context(tiny_tokenizer(), spec, length, generations, list(names), 0))
    return inpainting


def group(rewards: list[float], solution: str | None = "one two three four five six", answer: Any = "9") -> Group:
    row = {"solution": solution, "answer": answer}
    return Group(row, torch.tensor(rewards)[:, None], list(range(len(rewards))))


def test_only_groups_that_are_all_wrong_get_hints() -> None:
    inpainting = bound(free_tail=8)
    assert len(inpainting.attempts(group([0.0, 0.5, 0.0, 0.0]))) == 4
    for rewards in ([0.0, 1.0, 0.0, 0.0], [1.0] * 4, [0.0, torch.nan, 0.0, 0.0]):
        assert inpainting.attempts(group(rewards)) == []
    assert inpainting.attempts(group([0.0] * 4, solution=None)) == []
    assert inpainting.attempts(group([0.0] * 4, answer=None)) == [], "an answer that is not known cannot be hidden"
    assert bound(free_tail=8, max_replaced_share=0.2).attempts(group([0.0] * 4)) == [], "nothing could be replaced"


def test_the_reward_that_says_what_is_right_is_chosen_by_name() -> None:
    inpainting = bound(names=("form", "right"), correctness_reward="right", correct_from=2.0, free_tail=8)
    rewards = torch.tensor([[1.0, 0.0], [0.5, 0.5], [1.0, 1.0], [1.0, 0.0]])
    assert inpainting.attempts(Group({"solution": "a b c d e f g", "answer": "z"}, rewards, [0, 1, 2, 3]))
    rewards[2, 1] = 2.0
    assert not inpainting.attempts(Group({"solution": "a b c d e f g", "answer": "z"}, rewards, [0, 1, 2, 3]))
    with pytest.raises(ValueError, match=r"correctness_reward=None.*choose one of form, right"):
        bound(names=("form", "right"))
    with pytest.raises(ValueError, match=r"correctness_reward='wrong'.*form, right"):
        bound(names=("form", "right"), correctness_reward="wrong")


def test_at_most_a_share_is_replaced_by_right_attempts_only() -> None:
    inpainting = bound(generations=8)
    wrong = group([0.0] * 8)
    for right in range(9):
        for ids in range(5):
            some = Group(wrong.row, wrong.rewards, [100 * ids + i for i in range(8)])
            found = torch.tensor([[1.0]] * right + [[0.0]] * (8 - right))[torch.randperm(8)]
            chosen = inpainting.replacements(some, found)
            assert list(chosen) == list(range(min(right, 4)))
            assert len(set(chosen.values())) == len(chosen)
            assert all(found[attempt, 0] == 1 for attempt in chosen.values())
    assert inpainting.replacements(wrong, torch.full((8, 1), torch.nan)) == {}


@settings(max_examples=60, deadline=None)
@given(
    st.text("abcdefgh ", min_size=1, max_size=90),
    st.sampled_from([(0.0, 0.0), (0.2, 0.6), (1.0, 1.0)]),
    st.integers(0, 40),
    st.integers(0, 1000),
)
def test_hints_are_chunks_of_the_solution_in_order_in_the_window(
    text: str, ratio: tuple[float, float], tail: int, key: int
) -> None:
    inpainting = bound(free_tail=tail, hint_ratio=list(ratio))
    tokens = inpainting._tokens({"solution": text, "answer": "zzz"})
    assert tokens == tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]
    hints = inpainting._hints(tokens, ratio[0], key)
    offsets = sorted(hints)
    assert all(0 <= offset < 64 - tail for offset in offsets)
    remaining = iter(tokens)
    assert all(hints[offset] in remaining for offset in offsets), "a subsequence of the solution"
    if ratio[1] == 0:
        assert hints == {}
    if ratio[0] < 1 and len(tokens) <= 64 - tail:
        assert len(hints) < len(tokens)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 300), st.lists(st.integers(5, 10), min_size=61, max_size=61), st.floats(0, 1), st.randoms())
def test_chunks_keep_their_order_and_do_not_overlap(length: int, sizes: list[int], ratio: float, rng: Any) -> None:
    chunks = chunks_of(length, sizes, 5)
    assert all(a[1] == b[0] for a, b in itertools.pairwise(chunks))
    assert all(5 <= stop - start <= 10 for start, stop in chunks)
    assert length - (chunks[-1][1] if chunks else 0) < 5
    count = shown_chunks(len(chunks), ratio)
    assert 0 <= count <= len(chunks) and (ratio == 1 or not chunks or count < len(chunks))
    shown = sorted(rng.sample(chunks, count))
    places = placed(shown, 1.5, 100, 200)
    ends = [place + stop - start for place, (start, stop) in zip(places, shown, strict=False)]
    assert all(end <= place for end, place in zip(ends, places[1:], strict=False))
    assert all(place < 200 for place in places)


def test_distances_are_stretched_and_bounded() -> None:
    assert placed([(2, 7), (10, 15), (300, 305)], 1.5, 100, 400) == [3, 12, 117]
    assert placed([(2, 7), (10, 15), (300, 305)], 1.0, 1000, 400) == [2, 10, 300]
    assert placed([(2, 7), (300, 305)], 1.0, 1000, 100) == [2]
    assert [shown_chunks(n, 0.6) for n in (0, 1, 2, 5, 10)] == [0, 0, 1, 3, 6]
    assert shown_chunks(3, 1.0) == 3 and shown_chunks(3, 0.0) == 0


@pytest.mark.parametrize(
    ("trace", "answer", "left"),
    [
        ("3+2=5 so 15-10=5. #### 5", "5", "3+2= so 15-10=. #### "),
        ("it costs 1,000 dollars, $1000.00 in all", "1000", "it costs  dollars,  in all"),
        (r"then \frac{1}{2} and \boxed{\frac{1}{2}}.", None, r"then  and \boxed{}."),
        ("x = 7\nThe answer is: 7", None, "x = \nThe answer is: "),
        ("<answer> (b) </answer> since (b)", None, "<answer>  </answer> since "),
        ("5.2 and 5 and x5", "5", "5.2 and  and x"),
        ("so 10-5=5", "-5", "so 10=5"),
        ("The  final word is Blue Bird", "blue bird", "The  final word is "),
    ],
)
def test_the_answer_is_found_in_all_its_places(trace: str, answer: str | None, left: str) -> None:
    pieces = list(split_at_answers(trace, stated_answers(trace, answer)))
    assert "".join(text for text, _ in pieces) == trace
    assert "".join(text for text, is_answer in pieces if not is_answer) == left


@pytest.mark.parametrize(
    ("answer", "trace", "left"),
    [
        (r"\frac{1}{2}", r"is \dfrac{1}{2}, 1/2, 0.5, \frac12 or 50\%, not 5", "is , , ,  or , not 5"),
        (r"90^\circ", r"90$ degrees, 91 and 90^{\circ}", r" degrees, 91 and ^{\circ}"),
        (r"5\text{ cm}", "$5$ cm of 15 cm, or 5 m", " of 15 cm, or  m"),
        ("x=5", "x = 5. So 5 it is, not 15", ". So  it is, not 15"),
        (r"\text{Evelyn}", "Evelyn beats evelyn's, not Evelyns", " beats 's, not Evelyns"),
        (r"\text{(B)}", "(B) or B or (b), not Bob", " or  or , not Bob"),
        ("(3, 4)", "(3,4) and $3$ and $4$, not 34", " and $ and $, not 34"),
        (r"2+3\sqrt{2}", r"2 + 3\sqrt{2} but 7", " but 7"),
        (r"10,\!080", r"10{,}080 or 10\,080 or 10,080 or 10080, not 10.080", " or  or  or , not 10.080"),
        ("24", "(2,24) not 2,240 or 124", "(2,) not 2,240 or 124"),
        (r"-\frac{1}{2}", r"-1/2, -0.5, \frac{-1}{2}; |x| = 0.5", ", , ; |x| = 0.5"),
        (r"2\frac{1}{3}", "7/3 or 2 1/3, not 8/5", " or , not 8/5"),
        (r"\frac{\pi}{2}", r"\dfrac\pi 2 not \frac{\pi}{3}", r" not \frac{\pi}{3}"),
        ("y = 2x + 1", "y=2x+1 for 2x + 1", " for "),
    ],
)
def test_the_answer_is_found_however_it_is_written(answer: str, trace: str, left: str) -> None:
    pieces = list(split_at_answers(trace, stated_answers("", answer)))
    assert "".join(text for text, _ in pieces) == trace
    kept = "".join(text for text, is_answer in pieces if not is_answer)
    assert kept.replace("$", "") == left.replace("$", "")


def test_all_boxes_are_answers() -> None:
    assert set(stated_answers(r"\boxed{\frac{1}{2}} or \boxed{7}", None)) == {r"\frac{1}{2}", "7"}


@settings(max_examples=80, deadline=None)
@given(st.text(r"\{}()$,.5/ -=%^_frac", max_size=40), st.text(r"\{}()$,.5/ -=%^_frac", max_size=12))
def test_any_text_is_taken_apart(trace: str, answer: str) -> None:
    pieces = list(split_at_answers(trace, stated_answers(trace, answer)))
    assert "".join(text for text, _ in pieces) == trace


def test_the_answer_is_never_given() -> None:
    solution = "we add 40 and 2, so 40+2=42 and the result is 42\n#### 42"
    inpainting = bound(length=64, free_tail=0, hint_ratio=[1.0, 1.0], max_stretch=1.0)
    hints = inpainting.attempts(group([0.0] * 4, solution, "42"))
    text = tiny_tokenizer().decode([hints[0].get(i, tiny_tokenizer().mask_token_id) for i in range(len(solution))])
    assert "42" not in text and "40" in text and "add" in text
    shown = bound(length=64, free_tail=0, hint_ratio=[1.0, 1.0], max_stretch=1.0, hide_answer=False)
    given_tokens = shown.attempts(group([0.0] * 4, solution, None))[0]
    assert len(given_tokens) > len(hints[0])


def test_ratios_rise_over_the_attempts_and_are_keyed_by_rows() -> None:
    inpainting = bound(length=200, free_tail=0)
    wrong = group([0.0] * 4, "abcdefg " * 20)
    counts = [len(hints) for hints in inpainting.attempts(wrong)]
    assert counts[0] < counts[-1]
    assert inpainting.attempts(wrong) == inpainting.attempts(wrong)
    others = Group(wrong.row, wrong.rewards, [10, 11, 12, 13])
    assert inpainting.attempts(others) != inpainting.attempts(wrong)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("hint_ratio", [0.6, 0.2]),
        ("hint_ratio", [0.5]),
        ("hint_ratio", [0.0, 1.5]),
        ("chunk_length", [0, 4]),
        ("chunk_length", [2.5, 4]),
        ("max_replaced_share", 1.5),
        ("free_tail", -1),
        ("max_gap", -1),
        ("max_stretch", 0.5),
        ("correct_from", float("nan")),
    ],
)
def test_bad_settings_are_refused(setting: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{setting}="):
        Inpainting(**{setting: value})
    with pytest.raises(ValueError, match="free_tail=64"):
        bound(free_tail=64)


# --- in a trainer -----------------------------------------------------------------------------------------------------


HINT = {1: 9, 4: 10}


class Given(Intervention):
    """Gives the same hints to all attempts of every other group, and accepts some of them."""

    def __init__(self) -> None:
        self.groups: list[Group] = []
        self.columns = ("solution",)

    def bind(self, context: Context) -> None:
        self.context = context

    def attempts(self, group: Group) -> list[Any]:
        self.groups.append(group)
        return [HINT] * 4 if len(self.groups) % 2 else []

    def replacements(self, group: Group, rewards: torch.Tensor) -> dict[int, int]:
        self.found = rewards
        return {0: 3, 2: 1}


def solutions(count: int = 4) -> Dataset:
    return Dataset.from_dict(
        {
            "prompt": [f"{'ab' * (i % 3)}{i}" for i in range(count)],
            "solution": [f"abcdefg{i}" for i in range(count)],
            "answer": ["z"] * count,
        }
    )


def test_any_trainer_learns_from_what_replaced_its_completions(make_trainer: Any, recording_trainer: Any) -> None:
    calls: list[list[str]] = []

    def length(completions: list[str], completion_ids: Any, log_extra: Any, **columns: Any) -> list[float]:
        calls.append(completions)
        log_extra("seen", [f"call {len(calls)}"] * len(completions))
        return [float(len(ids) + 10 * (ids[1:2] == [9])) for ids in completion_ids]

    given_hints = Given()

    class Trainer(recording_trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, intervention=given_hints, **kwargs)

    trainer = make_trainer(
        trainer=Trainer, rewards=length, dataset=solutions(), max_steps=1, log_completions=True, beta=0.0
    )
    trainer.train()
    assert [len(texts) for texts in calls] == [8, 4], "each completion is rewarded once"
    seen = trainer.seen[0]
    by_row = {int(row): i for i, row in enumerate(seen["row_ids"])}
    assert set(by_row) >= {1, 3, 4, 5, 6, 7} and not {0, 2} & set(by_row)
    replaced = [i for row, i in by_row.items() if row > 7]
    assert seen["replaced"].nonzero().squeeze(-1).tolist() == sorted(replaced)
    for i in range(8):
        if i in replaced:
            assert [int(seen["canvas_ids"][i, offset]) for offset in HINT] == list(HINT.values())
            assert seen["hinted"][i].nonzero().squeeze(-1).tolist() == list(HINT)
            assert not seen["completion_mask"][i, 1], "what was given is not learnt from"
        else:
            assert not seen["hinted"][i].any()
    width = seen["completion_mask"].shape[1]
    assert torch.equal(seen["completion_mask"].bool(), (seen["canvas_valid"] & ~seen["hinted"])[:, :width])
    assert int(seen["num_items_in_batch"]) == int(seen["completion_mask"].sum())
    # Advantages are those of the rewards that are left.
    rewards = torch.tensor(
        [float(v.sum() + 10 * (c[1] == 9)) for c, v in zip(seen["canvas_ids"], seen["canvas_valid"], strict=True)]
    )
    group_of = torch.tensor([int(row) % 2**23 // 4 for row in seen["row_ids"]])
    for g in (0, 1):
        here = rewards[group_of == g]
        torch.testing.assert_close(seen["advantages"][group_of == g], here - here.mean())
    log = trainer.state.log_history[0]
    assert log["intervention/row_share"] == 0.25 and log["intervention/group_share"] == 0.5
    (written,) = (Path(trainer.args.output_dir) / "completions").glob("*.parquet")
    table = pd.read_parquet(written)
    assert table["replaced"].tolist() == [True, False, True, False] + [False] * 4
    assert table["completion"][0] == calls[1][3] and table["completion"][2] == calls[1][1]
    assert table["seen"].tolist() == ["call 2", "call 1", "call 2", "call 1"] + ["call 1"] * 4


def test_metrics_of_lengths_are_of_the_completions_that_count(make_trainer: Any, recording_trainer: Any) -> None:
    class Ended(Given):
        def attempts(self, group: Group) -> list[Any]:
            return [{0: 1}] * 4  # the end of sequence comes first

    class Trainer(recording_trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, intervention=Ended(), **kwargs)

    trainer = make_trainer(tiny_llada_that_ends(), trainer=Trainer, dataset=solutions(), max_steps=1)
    trainer.train()
    seen, log = trainer.seen[0], trainer.state.log_history[0]
    lengths = seen["canvas_valid"].sum(-1).float()
    assert (lengths[seen["replaced"]] == 1).all() and lengths.max() > 1
    last = seen["canvas_ids"].gather(1, seen["canvas_valid"].sum(-1, keepdim=True) - 1).squeeze(-1)
    for name, values in (("length", lengths), ("terminated_length", lengths[last == 1])):
        expected = [values.mean().item(), values.min().item(), values.max().item()]
        assert [log[f"completions/{kind}_{name}"] for kind in ("mean", "min", "max")] == pytest.approx(expected)
    assert log["completions/clipped_ratio"] == pytest.approx((last != 1).float().mean().item())


@pytest.mark.parametrize(
    "name",
    [
        *("DiffuGRPO", "CoupledGRPO", "UniGRPO", "SPG", "DiffusionGDPO", "ESPO", "BGPO", "DMPO", "WD1", "DreamCoderRL"),
    ],
)
def test_what_was_given_has_no_gradient(make_trainer: Any, name: str) -> None:
    trainer_class = getattr(rl4dlm, f"{name}Trainer")
    gradients: list[tuple[Any, torch.Tensor]] = []

    class Trainer(trainer_class):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, intervention=Given(), **kwargs)

        def loss(self, scores: Any, batch: dict[str, Any]) -> torch.Tensor:
            value: torch.Tensor = super().loss(scores, batch)
            (found,) = torch.autograd.grad(value, scores.view_log_probs, retain_graph=True)
            gradients.append((batch, found.abs().sum(1)))
            return value

    changes = {"loss_type": "grpo"} if name == "DiffuGRPO" else {}
    trainer = make_trainer(
        trainer=Trainer, config=trainer_class.config_class, dataset=solutions(), max_steps=2, **changes
    )
    trainer.train()
    assert gradients
    for batch, found in gradients:
        assert batch["hinted"].sum() == 4 and not found[batch["hinted"]].any()
        assert found[batch["replaced"]].any()


def test_without_a_trigger_nothing_changes(make_trainer: Any, recording_trainer: Any) -> None:
    def run(intervention: Intervention | None) -> list[Any]:
        class Trainer(recording_trainer):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, intervention=intervention, **kwargs)

        trainer = make_trainer(
            trainer=Trainer,
            dataset=solutions(),
            rewards=lambda completions, **_: [float(i % 2) for i in range(len(completions))],
        )
        trainer.train()
        return [seen["loss"] for seen in trainer.seen] + [p.detach().clone() for p in trainer.model.parameters()]

    plain, with_hints = run(None), run(Inpainting(free_tail=0))
    assert all(torch.equal(a, b) for a, b in zip(plain, with_hints, strict=True))


def test_what_does_not_fit_is_refused(make_trainer: Any, recording_trainer: Any) -> None:
    class Trainer(recording_trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, intervention=Inpainting(free_tail=0), **kwargs)

    with pytest.raises(ValueError, match="no column 'solution'"):
        make_trainer(trainer=Trainer)
    with pytest.raises(ValueError, match="no column 'answer'"):
        make_trainer(trainer=Trainer, dataset=solutions().remove_columns("answer"))
    for changes in ({"answer_column": None}, {"hide_answer": False}):
        assert Inpainting(**changes).columns == ("solution",)
    trainer = make_trainer(trainer=Trainer, dataset=solutions())
    trainer.num_generations = 3  # 8 rows on a process
    with pytest.raises(ValueError, match="whole groups on each process"):
        trainer._check_intervention()
    with pytest.raises(ValueError, match="length of the canvas"):
        make_trainer(trainer=Trainer, dataset=solutions(), schedule="daedal", denoising_steps=None)
