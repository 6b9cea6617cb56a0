"""CtrlDiff: block sizes drawn from a policy."""

from __future__ import annotations

import functools
import math
import pickle
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.policies.block_sizes import FEATURES, LearnedSizes, UniformSizes, offered
from rl4dlm.rollout.policies.policy import fresh
from rl4dlm.rollout.policies.saving import load_policy, save_policy
from rl4dlm.rollout.rollout import Rollout
from rl4dlm.rollout.rows import Progress
from tests.rollout.chi_square import chi_square
from tests.rollout.denoisers import EOS, MASK, PROMPTS, assert_same_rows, denoiser, row_logits
from tests.rollout.table_model import TableModel, constant_table

LENGTH = 12


def config(canvas_length: int = LENGTH, **more: Any) -> DecodingConfig:
    general = {name: more.pop(name) for name in ("temperature", "cache") if name in more}
    return DecodingConfig(
        canvas_length=canvas_length, schedule="ctrldiff", stop_at_eos=False, **general, schedule_args=more
    )


def decode(model: Any, settings: DecodingConfig, prompts: list[list[int]], **more: Any) -> tuple[Rollout, list[Any]]:
    """The rollout, and each row's blocks as a mapping from the step a block begins with to its `(start, stop)`."""
    steps: list[Progress] = []
    rollout = RolloutEngine(model).generate(prompts, settings, on_step=steps.append, **more)
    blocks: list[dict[int, tuple[int, int]]] = [{} for _ in rollout.prompt_ids]
    for number, step in enumerate(steps):
        for slot, *span in zip(step.slots.tolist(), step.start.tolist(), step.stop.tolist(), strict=True):
            if tuple(span) not in blocks[slot].values():
                blocks[slot][number] = tuple(span)
    return rollout, blocks


@dataclass
class Fixed:
    """A policy with the same probabilities wherever it is; it notes what it was shown."""

    sizes: tuple[int, ...]
    probabilities: tuple[float, ...]
    shown: list[Tensor] = field(default_factory=list)

    def log_probs(self, features: Tensor) -> Tensor:
        self.shown.append(features)
        return features.new_tensor(self.probabilities).log().expand(len(features), -1)


# --- drawing sizes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["none", "prefix"])
@pytest.mark.parametrize("size", [3, 5, 20])
def test_with_one_size_it_is_the_threshold(size: int, cache: str):
    """Bit by bit; a size beyond the canvas is the canvas."""
    engine = RolloutEngine(denoiser())
    for temperature in (0.0, 0.8):
        ours = config(15, sizes=(size,), threshold=0.5, temperature=temperature, cache=cache)
        fixed = DecodingConfig(
            canvas_length=15,
            block_length=min(size, 15),
            schedule="threshold",
            schedule_args={"threshold": 0.5},
            stop_at_eos=False,
            temperature=temperature,
            cache=cache,
        )
        a, b = engine.generate(PROMPTS, ours, seed=3), engine.generate(PROMPTS, fixed, seed=3)
        assert_same_rows(a, b)
        assert torch.equal(a.trace.raw_log_prob, b.trace.raw_log_prob)
        assert not a.trace.selection_log_prob.any()


@pytest.mark.parametrize(("sizes", "probabilities"), [((1, 2, 5), None), ((1, 3, 4), (0.5, 0.2, 0.3))])
def test_sizes_are_drawn_as_the_policy_says(sizes: tuple[int, ...], probabilities: tuple[float, ...] | None):
    model = TableModel(constant_table([0.0] * 4), 4, mask_token_id=MASK, eos_token_ids=(EOS,))
    arguments = {"sizes": sizes} if probabilities is None else {"policy": Fixed(sizes, probabilities)}
    rows = 1000
    _, blocks = decode(model, config(12, threshold=0.0, **arguments), [[3]], num_generations=rows)
    expected = torch.tensor(probabilities or [1 / len(sizes)] * len(sizes))
    spans = [list(row.values()) for row in blocks]
    firsts = [row[0] for row in spans]
    seconds = [row[1] for row in spans if row[1][0] + max(sizes) <= 12]  # where all of them fit
    for found in (firsts, seconds):
        counts = [sum(stop - start == size for start, stop in found) for size in sizes]
        assert sum(counts) == len(found)
        chi_square(torch.tensor(counts), expected)


def test_what_does_not_fit_is_not_on_offer():
    """With two slots left of sizes 1, 3 and 4 only the smallest remains; it is then no choice."""
    model = TableModel(constant_table([0.0] * 4), 4, mask_token_id=MASK, eos_token_ids=(EOS,))
    policy = Fixed((1, 3, 4), (0.2, 0.5, 0.3))
    rollout, blocks = decode(model, config(5, threshold=0.0, policy=policy), [[3]], num_generations=60)
    seen: set[tuple[int, int]] = set()
    for row, spans in enumerate(blocks):
        assert [start for start, _ in spans.values()] == [0] + [stop for _, stop in list(spans.values())[:-1]]
        for step, (start, stop) in spans.items():
            left = 5 - start
            offered = {s: p for s, p in zip(policy.sizes, policy.probabilities, strict=True) if s <= left}
            seen.add((left, stop - start))
            expected = math.log(offered[stop - start] / sum(offered.values()))
            assert float(rollout.trace.selection_log_prob[row, step]) == pytest.approx(expected, abs=1e-12)
        assert list(spans.values())[-1][1] == 5
    assert {(5, 1), (5, 3), (5, 4), (4, 1), (4, 3), (4, 4), (3, 3), (2, 1), (1, 1)} <= seen


def test_the_smallest_size_is_always_on_offer():
    model = TableModel(constant_table([0.0] * 4), 4, mask_token_id=MASK, eos_token_ids=(EOS,))
    rollout, [spans] = decode(model, config(5, threshold=0.0, sizes=(3, 4)), [[3]])
    assert [stop for _, stop in spans.values()] in ([3, 5], [4, 5])
    assert float(rollout.trace.selection_log_prob[0, 0]) == pytest.approx(-math.log(2))
    assert float(rollout.trace.selection_log_prob[0, 1]) == 0.0


def test_a_size_of_probability_zero_is_never_drawn():
    model = TableModel(constant_table([0.0] * 4), 4, mask_token_id=MASK, eos_token_ids=(EOS,))
    settings = config(8, threshold=0.0, policy=Fixed((1, 2, 4), (0.0, 1.0, 0.0)))
    _, blocks = decode(model, settings, [[3]], num_generations=20)
    assert all(list(spans.values()) == [(0, 2), (2, 4), (4, 6), (6, 8)] for spans in blocks)


@functools.cache
def several(temperature: float, cache: str, row: int | None = None) -> tuple[Rollout, list[Any]]:
    rows = range(len(PROMPTS)) if row is None else [row]
    settings = config(sizes=(1, 2, 5), threshold=0.5, temperature=temperature, cache=cache)
    return decode(denoiser(), settings, [PROMPTS[r] for r in rows], row_ids=[7 * r + 1 for r in rows], seed=9)


@pytest.mark.parametrize(("temperature", "cache"), [(0.0, "none"), (0.8, "prefix")])
def test_a_batch_is_its_rows(temperature: float, cache: str):
    rollout, blocks = several(temperature, cache)
    assert len({tuple(spans.values()) for spans in blocks}) > 2
    for row in range(len(PROMPTS)):
        alone, own = several(temperature, cache, row)
        assert_same_rows(alone, rollout, [row])
        assert own == [blocks[row]]
        steps = int(alone.trace.steps)
        kept = rollout.trace.selection_log_prob[row]
        torch.testing.assert_close(alone.trace.selection_log_prob[0], kept[:steps], rtol=0, atol=1e-12)
        assert not bool(kept[steps:].any())


def test_only_first_steps_of_blocks_are_choices():
    rollout, blocks = several(0.0, "none")
    for row, spans in enumerate(blocks):
        drawn = rollout.trace.selection_log_prob[row].nonzero().squeeze(-1).tolist()
        assert drawn == [step for step, (start, _) in spans.items() if LENGTH - start >= 2]


# --- what a policy sees -----------------------------------------------------------------------------------------------


def test_features_are_those_of_the_forward():
    """Probability, entropy and openness of the next slots, in the rows that begin a block; 0 where nothing is open."""
    policy = Fixed((2, 5), (0.5, 0.5))
    given = {0: 6, 3: 7, 9: 3, 10: 4, 11: 5}
    [prompt] = PROMPTS[:1]
    rollout, [spans] = decode(denoiser(), config(policy=policy, threshold=0.6), [prompt], hints=[given], seed=1)
    assert len(policy.shown) == len(spans) >= 2
    states = list(rollout.states())
    for (step, _), shown in zip(spans.items(), policy.shown, strict=True):
        state = states[step][0]
        log_probs = row_logits(denoiser(), prompt, state).log_softmax(-1)
        assert shown.shape == (1, 5, len(FEATURES))
        first = int((state == MASK).nonzero()[0])
        for offset in range(5):
            slot = first + offset
            if slot >= LENGTH or state[slot] != MASK:
                assert shown[0, offset].tolist() == [0.0, 0.0, 0.0]
                continue
            p = log_probs[slot].exp()
            likeliest = max(float(value) for token, value in enumerate(p) if token != MASK)
            expected = [likeliest, float(-(p * log_probs[slot]).sum()), 1.0]
            assert shown[0, offset].tolist() == pytest.approx(expected, abs=1e-10)


# --- a policy that learns ---------------------------------------------------------------------------------------------


def features(rows: int, slots: int = 4) -> Tensor:
    return torch.rand(rows, slots, len(FEATURES), generator=torch.Generator().manual_seed(rows), dtype=torch.float64)


def learned(sizes: tuple[int, ...], *, hidden: int = 32, seed: int = 0) -> LearnedSizes:
    return fresh(LearnedSizes(sizes, hidden=hidden), seed=seed, dtype=torch.float64)


def trained(sizes: tuple[int, ...] = (1, 2, 4)) -> LearnedSizes:
    """A policy with weights of some training, so that rows get different answers."""
    policy = learned(sizes, hidden=6, seed=1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.normal_(generator=generator)
    return policy


def test_before_any_training_all_sizes_are_equally_likely():
    policy = learned((1, 2, 4))
    uniform = UniformSizes((1, 2, 4)).log_probs(features(3))
    torch.testing.assert_close(policy.log_probs(features(3)), uniform, rtol=0, atol=1e-15)
    assert uniform.exp().tolist() == [[pytest.approx(1 / 3)] * 3] * 3


def test_weights_come_from_the_seed_alone():
    state = torch.get_rng_state()
    a, b, c = (learned((1, 2), seed=seed).hidden.weight for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_row_is_judged_alone():
    policy = trained()
    together = policy.log_probs(features(7))
    assert together.exp().sum(-1).tolist() == pytest.approx([1.0] * 7)
    assert len({round(v, 6) for v in together[:, 0].tolist()}) == 7
    for row in range(7):
        torch.testing.assert_close(policy.log_probs(features(7)[row : row + 1])[0], together[row], rtol=0, atol=1e-14)


def test_the_gradient_of_a_choice_is_that_of_a_softmax():
    """d log p(a) / d logit_k = [k = a] - p(k), and it reaches the weights below too."""
    policy = trained()
    log_probs = policy.log_probs(features(1))
    log_probs[0, 2].backward()
    expected = torch.eye(3)[2] - log_probs[0].exp().detach()
    torch.testing.assert_close(policy.choice.bias.grad, expected.double(), rtol=0, atol=1e-12)
    assert bool(policy.hidden.weight.grad.any())


def test_a_saved_policy_is_the_same(tmp_path: Path):
    policy = trained((1, 2, 5))
    path = save_policy(policy, tmp_path)
    again = load_policy(tmp_path)
    assert isinstance(again, LearnedSizes) and again.sizes == (1, 2, 5)
    assert torch.equal(again.log_probs(features(3, 5)), policy.log_probs(features(3, 5)))
    by_path, blocks = decode(denoiser(), config(policy=str(path), threshold=0.5), PROMPTS)
    by_object, same = decode(denoiser(), config(policy=policy, threshold=0.5), PROMPTS)
    assert_same_rows(by_path, by_object)
    assert blocks == same
    _, others = decode(denoiser(), config(sizes=(1, 2, 5), threshold=0.5), PROMPTS)
    assert blocks != others


def wrong_files(folder: Path) -> dict[str, Path]:
    weights = trained((1, 2)).state_dict()
    about = {"format": "rl4dlm.unmasking_policy", "kind": "block_sizes", "settings": '{"sizes": [1, 2], "hidden": 6}'}
    files = {name: folder / name for name in WRONG}
    files["text"].write_text("policy")
    files["pickle"].write_bytes(pickle.dumps(weights))
    save_file(weights, files["no_sizes"])
    save_file(weights, files["other_sizes"], metadata={**about, "settings": '{"sizes": [1, 1000000000000]}'})
    save_file({"choice.bias": weights["choice.bias"]}, files["lacking"], metadata=about)
    bad = {name: value * torch.nan if name == "choice.bias" else value for name, value in weights.items()}
    save_file(bad, files["nan"], metadata=about)
    save_file({"weight": torch.zeros(3)}, files["other_kind"], metadata={**about, "kind": "linear", "settings": LINEAR})
    return files


WRONG = ("missing", "text", "pickle", "no_sizes", "other_sizes", "lacking", "nan", "other_kind")
LINEAR = '{"hidden_size": 3}'


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_saved_policy(name: str, tmp_path: Path):
    path = wrong_files(tmp_path)[name]
    with pytest.raises(ValueError, match=f"{path}.*(is missing|read|does not|not finite|of kind 'linear')"):
        config(policy=str(path))


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(), (4, 2), (2, 2), (0, 1), 4, (1.5,), (True, 2)])
def test_bad_sizes(sizes: Any):
    with pytest.raises(ValueError, match=r"sizes=.* is not allowed"):
        config(sizes=sizes)


def test_other_bad_settings():
    with pytest.raises(ValueError, match="threshold=-1 is not allowed"):
        config(threshold=-1)
    with pytest.raises(ValueError, match="policy=3 is not allowed"):
        config(policy=3)
    with pytest.raises(ValueError, match=r"sizes=\(1, 2\) has no meaning beside a policy"):
        config(policy=UniformSizes((1, 2)), sizes=(1, 2))
    with pytest.raises(ValueError, match=r"sizes=\(2, 1\) is not allowed"):
        config(policy=UniformSizes((2, 1)))
    with pytest.raises(ValueError, match="unknown settings"):
        config(chosen=UniformSizes((1, 2)))
    with pytest.raises(ValueError, match=r"block_length=4 has no meaning.*sizes in schedule_args"):
        DecodingConfig(canvas_length=16, schedule="ctrldiff", block_length=4)


# --- the record -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("places", [None, 2])
def test_what_the_policy_saw_and_chose_is_recorded(places: int | None):
    """What it is shown again gives the recorded log-probabilities, and the blocks add up to the canvas."""
    policy = trained((1, 2, 5))
    settings = replace(config(13, policy=policy, threshold=0.5), record=("policy", "blocks"))
    engine = RolloutEngine(denoiser(), max_batch_rows=places)
    rollout = engine.generate(PROMPTS, settings, seed=2)
    assert_same_rows(rollout, engine.generate(PROMPTS, replace(settings, record=()), seed=2))
    trace = rollout.trace
    allowed, chosen, blocks = trace.policy_allowed, trace.policy_chosen, trace.blocks
    assert trace.policy_features is not None and allowed is not None and chosen is not None and blocks is not None
    steps = int(trace.steps.max())
    assert trace.policy_features.shape == (len(PROMPTS), steps, 5, 3) and allowed.shape[2] == 3
    assert not bool((chosen & ~allowed).any()) and torch.equal(chosen.sum(-1), allowed.any(-1).long())
    rows, at = allowed.any(-1).nonzero(as_tuple=True)
    log_probs = offered(policy.log_probs(trace.policy_features[rows, at]), allowed[rows, at])
    found = log_probs[chosen[rows, at]]
    torch.testing.assert_close(trace.selection_log_prob[rows, at], found, rtol=0, atol=1e-12)
    assert not bool(trace.selection_log_prob[~allowed.any(-1)].any())
    sizes = torch.tensor(policy.sizes)
    for row in range(len(PROMPTS)):
        made = int(trace.steps[row])
        assert bool((blocks[row, made:] == -1).all())
        spans = blocks[row, :made]
        new = torch.cat([torch.ones(1, dtype=torch.bool), (spans[1:] != spans[:-1]).any(-1)])
        assert torch.equal(new, allowed[row, :made].any(-1)), "a size is drawn where a block begins"
        lengths = (spans[:, 1] - spans[:, 0])[new]
        assert int(lengths.sum()) == 13 and int(spans.max()) == 13
        drawn = (sizes * chosen[row, :made][new]).sum(-1)
        assert torch.equal(lengths[:-1], drawn[:-1]) and int(lengths[-1]) <= int(drawn[-1])
        written = trace.commit_step[row]
        assert torch.equal(trace.block_stop[row], spans[written][:, 1])


def test_the_most_probable_size_at_temperature_zero():
    policy = Fixed((1, 2, 4), (0.3, 0.5, 0.2))
    rollout, blocks = decode(denoiser(), config(9, policy=policy, threshold=0.5, policy_temperature=0), PROMPTS)
    spans = [(0, 2), (2, 4), (4, 6), (6, 8), (8, 9)]
    assert all(list(row.values()) == spans for row in blocks)
    assert not bool(rollout.trace.selection_log_prob.any())


def test_a_record_of_a_policy_needs_one():
    with pytest.raises(ValueError, match="schedule='threshold' has no policy that decides"):
        DecodingConfig(schedule="threshold", record=("policy",))
