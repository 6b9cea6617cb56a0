"""Paired comparisons: the statistics against enumeration and tables, and that items find each other."""

from __future__ import annotations

import json
from dataclasses import replace
from math import comb

import pytest

from rl4dlm import DecodingConfig, evaluate
from rl4dlm.cli import main
from rl4dlm.evaluation import compare, paired, read_results, write_results
from rl4dlm.evaluation.compare import mcnemar, newcombe_interval, student_quantile

ONE = DecodingConfig(canvas_length=1, steps=1, temperature=1.0)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 10])
def test_students_quantiles_are_the_tables(freedom):
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 7: 2.365, 10: 2.228}
    assert student_quantile(0.975, freedom) == pytest.approx(table[freedom], abs=5e-4)
    assert student_quantile(0.975, 5000) == pytest.approx(1.96, abs=1e-3)


def test_mcnemar_is_the_binomial_test():
    for gained in range(7):
        for lost in range(7):
            n, likely = gained + lost, comb(gained + lost, gained)
            # With equal chances the outcomes at least as far from the middle are those that are no likelier.
            extreme = sum(comb(n, k) for k in range(n + 1) if comb(n, k) <= likely)
            assert mcnemar(gained, lost) == pytest.approx(min(1.0, extreme / 2**n))


def test_newcombes_interval_covers_the_difference():
    """Of all outcomes of 20 items, weighted by their probabilities, about 95 % have the true difference inside."""
    n, covered, cells = 20, [], [(0.5, 0.1, 0.2, 0.2), (0.3, 0.3, 0.1, 0.3), (0.1, 0.02, 0.1, 0.78), (0.8, 0.1, 0.1, 0)]
    for p in cells:
        inside = total = 0.0
        for a in range(n + 1):
            for b in range(n + 1 - a):
                for c in range(n + 1 - a - b):
                    d = n - a - b - c
                    ways = comb(n, a) * comb(n - a, b) * comb(n - a - b, c)
                    weight = ways * p[0] ** a * p[1] ** b * p[2] ** c * p[3] ** d
                    low, high = newcombe_interval(a, b, c, d)
                    assert -1 <= low <= (c - b) / n <= high <= 1
                    total += weight
                    inside += weight * (low <= p[2] - p[1] <= high)
        assert total == pytest.approx(1)
        covered.append(inside)
    assert all(0.93 <= share <= 1 for share in covered)
    # Unpaired, the same rates leave more open; with nothing changed something still is.
    assert newcombe_interval(10, 0, 0, 10)[1] - newcombe_interval(10, 0, 0, 10)[0] < 0.4
    low, high = newcombe_interval(10, 2, 3, 10)
    assert newcombe_interval(10, 3, 2, 10) == pytest.approx((-high, -low))


def test_items_right_or_wrong_and_items_with_samples():
    found = paired([1, 1, 0, 0, 0], [1, 0, 1, 1, 0])
    assert (found.items, found.first, found.second, found.difference) == (5, 0.4, 0.6, pytest.approx(0.2))
    assert (found.gained, found.lost, found.p_value) == ([2, 3], [1], 1.0)
    samples = paired([0.5, 0.25, 1.0], [0.75, 0.5, 0.75])
    half = 4.3027 * 0.288675 / 3**0.5
    assert samples.difference == pytest.approx(1 / 12) and samples.p_value is None
    assert samples.interval == pytest.approx((1 / 12 - half, 1 / 12 + half), abs=1e-4)
    for first, second, settings, said in (
        ([], [], {}, "0 and 0 items"),
        ([1], [1, 0], {}, "1 and 2 items"),
        ([0.5], [1], {}, "1 item with several samples"),
        ([1], [1], {"confidence": 1}, "confidence=1"),
    ):
        with pytest.raises(ValueError, match=said):
            paired(first, second, **settings)


def measured(constant_model, tokenizer, letters, probabilities, prompts, answers, **settings):
    return evaluate(constant_model(probabilities), tokenizer, letters(prompts, answers), decodings={1: ONE}, **settings)


def test_shared_items_are_compared(constant_model, tokenizer, letters, tmp_path, capsys):
    prompts, answers = ["x", "y", "z", "x", "w", "v"], ["a", "b", "a", None, "b", "a"]
    one = measured(constant_model, tokenizer, letters, {"a": 1.0}, prompts, answers)
    # Other items in another order, of which four are the same; one of them cannot be judged.
    again = ["new", "z", "y", "x", "x"], ["b", "a", "b", None, "a"]
    other = measured(constant_model, tokenizer, letters, {"b": 1.0}, *again)
    assert one.measurements["1"].verdicts == "101-01" and other.measurements["1"].verdicts == "101-0"
    found = compare(one, other, ("1", "1"))
    assert (found.items, found.gained, found.lost) == (3, [1], [0, 2])
    styled = compare(one, replace(other, style="other"), ("1", "1"))  # another prompt for the same columns
    assert styled.items == 4
    with pytest.raises(ValueError, match="letters has no decoding '2'; it has 1"):
        compare(one, other, ("1", "2"))
    with pytest.raises(ValueError, match="no item in common"):
        compare(one, measured(constant_model, tokenizer, letters, {"a": 1.0}, ["q"], ["a"]), ("1", "1"))

    files = [str(tmp_path / name) for name in ("a.json", "b.json", "out.json")]
    write_results(files[0], [one])
    write_results(files[1], [other])
    assert main(["compare", *files[:2], "--output", files[2]]) == 0
    shown = capsys.readouterr().out
    assert "better: 1" in shown and "worse: 0, 2" in shown and "AUP" in shown
    (written,) = json.loads((tmp_path / "out.json").read_text())["comparisons"]
    assert written["gained"] == [1] and written["labels"] == ["1", "1"]
    for flags, said in (
        (["--labels", "1"], "labels='1' is not allowed"),
        (["--labels", "1,9"], "letters has no decoding '9'"),
        (["--output", str(tmp_path)], "is a folder"),
        (["--confidence", "2"], "confidence=2.0"),
    ):
        assert main(["compare", *files[:2], *flags]) == 2
        assert said in capsys.readouterr().err


def test_a_file_is_read_as_it_was_written_and_others_are_refused(constant_model, tokenizer, letters, tmp_path):
    one = measured(
        constant_model, tokenizer, letters, {"a": 0.5, "b": 0.5}, ["x"] * 5, ["a"] * 5, num_samples=3, pass_at=(1, 2)
    )
    path = tmp_path / "results.json"
    write_results(path, [one])
    (read,) = read_results(path)
    # What JSON knows as lists stays lists inside decoding settings; all else is equal.
    before = one.measurements["1"]
    assert read == replace(one, measurements={"1": replace(before, decoding=read.measurements["1"].decoding)})
    assert len(before.verdicts) == 15 and len(read.items.split()) == 5
    assert read.measurements["1"].item_values() == before.item_values()
    content = json.loads(path.read_text())
    assert (content["schema"], content["version"]) == ("rl4dlm.results", 1)

    def changed(**changes):
        path.write_text(json.dumps({**content, **changes}))
        return path

    entry = content["results"][0]
    for changes, said in (
        ({"schema": None}, "its schema is not 'rl4dlm.results'"),
        ({"version": 99}, "has version 99 of rl4dlm.results; this library reads version 1"),
        ({"results": [{**entry, "more": 1}]}, "unknown entries .'more'."),
        ({"results": [{name: value for name, value in entry.items() if name != "seed"}]}, "lacks .'seed'."),
    ):
        with pytest.raises(ValueError, match=said):
            read_results(changed(**changes))
    path.write_text("{")
    with pytest.raises(ValueError, match="is no JSON file"):
        read_results(path)
