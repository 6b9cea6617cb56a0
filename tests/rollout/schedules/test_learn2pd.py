"""Learn2PD: its filter, its file, cutting the canvas off, and the script that trains it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.rollout import EventKind, Rollout
from rl4dlm.rollout.schedules.learn2pd import BlockWindow, TokenFilter, load_filter, save_filter
from tests.rollout.denoisers import PROMPTS, assert_same_rows, denoiser, row_logits
from tests.rollout.schedules import hand_tables
from tests.rollout.schedules.hand_tables import EOS, MASK, A, B, C
from tests.rollout.schedules.one_row import Row, assert_decodes, decode

LENGTH, BLOCK = 12, 6


def random_filter(block_length: int, seed: int = 0, scale: float = 1.5) -> TokenFilter:
    network, generator = TokenFilter(block_length, 8), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in network.parameters():
            weight.normal_(std=scale, generator=generator)
    return network


def accepting(path: Path, block_length: int, above: float) -> str:
    """A filter that accepts a candidate whose probability is above a number, whatever the others are."""
    network = TokenFilter(block_length)
    with torch.no_grad():
        for layer in (network.hidden, network.output):
            layer.weight.copy_(torch.eye(block_length))
            layer.bias.zero_()
        network.output.weight.mul_(1e4)
        network.output.bias.fill_(-1e4 * above)
    save_filter(network, path, temperature=0.0, cache="none")
    return str(path)


def saved(path: Path, network: TokenFilter, temperature: float = 0.0) -> str:
    save_filter(network, path, temperature=temperature, cache="none")
    return str(path)


def generate(prompts: list[list[int]] = PROMPTS, **more: Any) -> Rollout:
    defaults = {"canvas_length": LENGTH, "block_length": BLOCK, "schedule": "learn2pd", "stop_at_eos": False}
    return RolloutEngine(denoiser()).generate(prompts, DecodingConfig(**{**defaults, **more}), seed=3)


# --- which candidates are written -------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_when_nothing_is_accepted_one_token_is_written_per_step(tmp_path: Path, temperature: float):
    slow = DecodingConfig(
        canvas_length=LENGTH, block_length=BLOCK, steps=LENGTH, temperature=temperature, stop_at_eos=False
    )
    plain = RolloutEngine(denoiser()).generate(PROMPTS, slow, seed=3)
    everything = saved(tmp_path / "filter", random_filter(BLOCK, scale=100.0), temperature)
    for arguments in ({"acceptance": 1}, {"acceptance": 1.0, "filter_path": everything}):
        assert_same_rows(generate(schedule_args=arguments, temperature=temperature), plain)


def test_it_follows_its_definition(tmp_path: Path):
    network = random_filter(BLOCK)
    weights = [weight.detach() for weight in network.parameters()]
    accepted = 0

    def rule(row: Row, logits: Tensor) -> set[int]:
        nonlocal accepted
        p = torch.tensor([row.p[i] for i in row.block], dtype=torch.float64)  # at written slots too
        hidden = (weights[0] @ p + weights[1]).clamp(min=0)
        final = torch.sigmoid(weights[2] @ hidden + weights[3])
        chosen = {i for i in row.open if final[i - row.block.start] > 0.8}
        accepted += len(chosen)
        return chosen | {row.best(row.open)}

    arguments = {"filter_path": saved(tmp_path / "filter", network), "acceptance": 0.8}
    rollout = generate(schedule_args=arguments)
    for index, prompt in enumerate(PROMPTS):

        def look(row: Row, prompt: list[int] = prompt) -> Tensor:
            return row_logits(denoiser(), prompt, torch.tensor(row.canvas))

        assert_decodes(rollout, index, decode(LENGTH, BLOCK, look, rule))
    assert 0 < accepted < rollout.canvas.numel()


def test_what_a_row_is_told_depends_on_it_alone():
    network, confidences = random_filter(BLOCK), torch.rand(40, BLOCK, generator=torch.Generator().manual_seed(1))
    together = network(confidences)
    for row in range(len(confidences)):
        torch.testing.assert_close(network(confidences[row]), together[row], rtol=0, atol=1e-12)


def window(start: int, stop: int, length: int, width: int = 10) -> BlockWindow:
    step: Any = SimpleNamespace(
        start=torch.tensor([start]),
        stop=torch.tensor([stop]),
        length=torch.tensor([length]),
        tokens=torch.zeros(1, width),
    )
    return BlockWindow.of(step, 4)


@pytest.mark.parametrize(
    ("start", "stop", "length", "expected"),
    [
        (4, 8, 10, [4, 5, 6, 7]),
        (8, 10, 10, [8, 9, -1, -1]),  # the canvas ends inside the block
        (4, 6, 6, [4, 5, -1, -1]),  # it was cut off there
        (0, 3, 10, [-1, 0, 1, 2]),  # the block began in the prompt
        (0, 4, 10, [0, 1, 2, 3]),
    ],
)
def test_a_short_block_keeps_its_places(start: int, stop: int, length: int, expected: list[int]):
    found = window(start, stop, length)
    values = torch.arange(10.0)[None] + 10
    assert found.gather(values, 1.0).tolist() == [[1.0 if slot < 0 else slot + 10 for slot in expected]]
    marks = torch.tensor([[5.0, 6.0, 7.0, 8.0]])
    spread = {slot: 5.0 + i for i, slot in enumerate(expected) if slot >= 0}
    assert found.spread(marks).tolist() == [[spread.get(slot, 0.0) for slot in range(10)]]


# --- the file ---------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded(tmp_path: Path):
    network = random_filter(5)
    path = saved(tmp_path / "deep" / "filter.safetensors", network, temperature=0.5)
    state = torch.random.get_rng_state()
    loaded, about = load_filter(path)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (about["block_length"], about["temperature"], about["cache"]) == ("5", "0.5", "none")
    values = torch.rand(3, 5)
    assert torch.equal(loaded(values), network(values))
    assert [entry.name for entry in Path(path).parent.iterdir()] == ["filter.safetensors"]


def configure(path: object, **more: Any) -> DecodingConfig:
    return DecodingConfig(
        **{"canvas_length": 12, "block_length": 6, **more}, schedule="learn2pd", schedule_args={"filter_path": path}
    )


def test_a_filter_is_for_one_block_length(tmp_path: Path):
    path = saved(tmp_path / "filter", random_filter(6))
    configure(path)
    with pytest.raises(ValueError, match="filter for blocks of 6 tokens, but block_length is 12; set block_length=6"):
        configure(path, block_length=None)


def test_a_filter_for_another_temperature_warns(tmp_path: Path):
    path = saved(tmp_path / "filter", random_filter(6))
    with pytest.warns(UserWarning, match=r"trained with temperature=0\.0, but decodes with temperature=0\.7"):
        configure(path, temperature=0.7)


def test_files_that_hold_no_filter(tmp_path: Path):
    missing, garbage, other, odd, infinite = (str(tmp_path / name) for name in "abcde")
    Path(garbage).write_bytes(b"\x80\x04pickle")
    save_file({"hidden.bias": torch.zeros(3)}, other)
    about = {"format": "rl4dlm.learn2pd", "block_length": "6"}
    save_file({"hidden.bias": torch.zeros(3), "hidden.weight": torch.zeros(3, 5)}, odd, about)
    network = random_filter(6)
    with torch.no_grad():
        network.hidden.bias[2] = torch.nan
    saved(Path(infinite), network)
    for path, message in [
        (missing, "cannot be read as a safetensors file"),
        (garbage, "cannot be read as a safetensors file"),
        (other, "does not hold a filter"),
        (odd, "does not hold a filter for blocks of 6"),
        (infinite, "not finite"),
    ]:
        with pytest.raises(ValueError, match=message) as failure:
            configure(path)
        assert f"filter_path={path!r}" in str(failure.value)


@pytest.mark.parametrize(
    "arguments",
    [
        {"filter_path": None}, {"filter_path": 3}, {"acceptance": 1.1}, {"truncate": "yes", "acceptance": 1},
        {"eos_threshold": -0.1, "acceptance": 1},
    ],
)  # fmt: skip
def test_settings_outside_of_what_is_allowed(arguments: dict[str, Any]):
    with pytest.raises(ValueError, match=rf"{next(iter(arguments))}=.* is not allowed"):
        DecodingConfig(schedule="learn2pd", schedule_args=arguments)


# --- cutting the canvas off -------------------------------------------------------------------------------------------


def cutting(path: Path, wishes: hand_tables.Wishes, *, accept: float, eos: float = 0.9, **more: Any) -> Rollout:
    arguments = {"filter_path": accepting(path, 4, accept), "truncate": True, "eos_threshold": eos}
    return hand_tables.decode(wishes, 8, "learn2pd", arguments, block_length=4, **more)


def late_end(probability: float) -> hand_tables.Wishes:
    """An end at slot 2 that is written first, before slots 0 and 1 are."""
    wishes = [(A, 0.5), (B, 0.4), (EOS, probability), (C, 0.3)]
    return lambda canvas: [*wishes, *wishes][: len(canvas)]


def test_behind_a_sure_accepted_end_nothing_is_computed(tmp_path: Path):
    rollout = cutting(tmp_path / "filter", late_end(0.95), accept=0.92)
    assert hand_tables.states(rollout)[:3] == [[MASK] * 8, [MASK, MASK, EOS, *[-1] * 5], [A, MASK, EOS, *[-1] * 5]]
    assert rollout.canvas.tolist() == [[A, B, *[EOS] * 6]]
    assert rollout.trace.length is not None
    assert rollout.trace.length.tolist() == [3]
    assert rollout.nfe.tolist() == [3]
    assert rollout.stop_reason == ["eos"]
    assert hand_tables.happened(rollout, EventKind.TRUNCATE) == [(0, 3, -1)]


@pytest.mark.parametrize(("accept", "eos"), [(0.92, 0.97), (0.96, 0.5)], ids=["not sure enough", "not accepted"])
def test_other_ends_wait_until_everything_before_them_is_written(tmp_path: Path, accept: float, eos: float):
    rollout = cutting(tmp_path / "filter", late_end(0.95), accept=accept, eos=eos)
    assert hand_tables.happened(rollout, EventKind.TRUNCATE) == [(2, 3, -1)]  # after slots 2, 0 and 1
    assert rollout.canvas.tolist() == [[A, B, *[EOS] * 6]]


def test_an_end_that_is_merely_predicted_cuts_nothing(tmp_path: Path):
    """It is the most probable candidate of its slot from the start, but another one by the time it would be written."""

    def wishes(canvas: tuple[int, ...]) -> list[hand_tables.Wish]:
        second = (EOS, 0.5) if canvas[0] == MASK else (B, 0.5)
        return [(A, 0.6), second, *[(C, 0.4)] * 6]

    rollout = cutting(tmp_path / "filter", wishes, accept=0.95, eos=0.0)
    assert rollout.canvas.tolist() == [[A, B, *[C] * 6]]
    assert hand_tables.happened(rollout, EventKind.TRUNCATE) == []
    assert rollout.trace.length is not None
    assert rollout.trace.length.tolist() == [8]


def test_what_was_written_behind_the_end_goes_too(tmp_path: Path):
    wishes = [(A, 0.5), (EOS, 0.95), (B, 0.97), (C, 0.3), *[(C, 0.9)] * 4]
    rollout = cutting(tmp_path / "filter", lambda canvas: wishes[: len(canvas)], accept=0.92)
    assert hand_tables.happened(rollout, EventKind.COMMIT)[:2] == [(0, 1, EOS), (0, 2, B)]
    assert hand_tables.states(rollout)[1] == [MASK, EOS, *[-1] * 6]
    assert rollout.canvas.tolist() == [[A, *[EOS] * 7]]


def test_completions_end_with_an_end_or_with_the_canvas(tmp_path: Path):
    path = saved(tmp_path / "filter", random_filter(BLOCK))
    ended = set()
    for seed in range(4):
        arguments = {"filter_path": path, "acceptance": 0.6, "truncate": True, "eos_threshold": 0.2}
        config = DecodingConfig(
            canvas_length=LENGTH, block_length=BLOCK, schedule="learn2pd", schedule_args=arguments, eos_penalty=-2.0
        )
        rollout = RolloutEngine(denoiser(seed=seed)).generate(PROMPTS, config)
        assert rollout.trace.length is not None
        for canvas, length in zip(rollout.canvas.tolist(), rollout.trace.length.tolist(), strict=True):
            ended.add(length < LENGTH)
            assert length == LENGTH or canvas[length - 1] == 1
            assert canvas[length:] == [1] * (LENGTH - length)
    assert ended == {True, False}


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[3] / "examples" / "train_learn2pd_filter.py"
    spec = importlib.util.spec_from_file_location("train_learn2pd_filter", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_oracle_writes_what_is_right_and_fills_in_where_nothing_is(script: ModuleType):
    settings = {"canvas_length": LENGTH, "block_length": BLOCK, "stop_at_eos": False}
    engine = RolloutEngine(denoiser())
    reference = torch.randint(3, 24, (len(PROMPTS), LENGTH), generator=torch.Generator().manual_seed(0))
    slow = engine.generate(PROMPTS, DecodingConfig(**settings, steps=LENGTH))
    reference[:3] = slow.canvas[:3]  # three that the model wants, others that it mostly does not
    oracle = script.OracleReplay(**settings, reference=reference)
    replay = engine.generate(PROMPTS, oracle)
    assert torch.equal(replay.canvas, reference)
    assert (replay.nfe[:3] < slow.nfe[:3]).all()
    states = list(replay.states())
    assert len(oracle.log) == len(states)
    filled = 0
    for step, examples in enumerate(oracle.log):
        for entry, row in enumerate(examples.prompt.tolist()):
            state = states[step][row]
            start = 0 if MASK in state[:BLOCK] else BLOCK
            logits = row_logits(denoiser(), PROMPTS[row], state)[start : start + BLOCK]
            allowed = logits.clone()
            allowed[:, MASK] = -torch.inf
            token = allowed.argmax(-1)
            p = logits.softmax(-1).gather(-1, token[:, None]).squeeze(-1)
            right, is_open = token == reference[row, start : start + BLOCK], state[start : start + BLOCK] == MASK
            torch.testing.assert_close(examples.confidences[entry], p)
            assert torch.equal(examples.final[entry], right)
            assert torch.equal(examples.open[entry], is_open)
            written = replay.trace.commit_step[row, start : start + BLOCK] == step
            stuck = not bool((right & is_open).any())
            filled += stuck
            assert torch.equal(written, is_open if stuck else right & is_open)
    assert filled


def test_training_finds_what_decides(script: ModuleType):
    """Slots are final where their probability is large; trained on that the network says so of probabilities unseen."""
    generator = torch.Generator().manual_seed(0)
    confidences = torch.rand(600, 8, generator=generator, dtype=torch.float64)
    slots = torch.rand(600, 8, generator=generator) < 0.7
    examples = script.Examples(confidences, confidences > 0.5, slots, torch.arange(600))
    network = script.fit(examples, epochs=200, seed=0)
    unseen = torch.rand(200, 8, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        said = network(unseen) > 0
    clear = (unseen - 0.5).abs() > 0.1
    assert (said == (unseen > 0.5))[clear].double().mean() > 0.9
    assert torch.equal(
        script.fit(examples, epochs=2, seed=1).hidden.weight, script.fit(examples, epochs=2, seed=1).hidden.weight
    )


def test_the_script_leaves_a_filter_to_decode_with(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture):
    output = tmp_path / "filter.safetensors"
    flags = {
        "--split": "validation",
        "--prompts": 10,
        "--epochs": 2,
        "--measure": 2,
        "--block-length": 8,
        "--output": output,
    }
    script.main([str(word) for pair in flags.items() for word in pair])
    assert load_filter(output)[1]["block_length"] == "8"
    printed = capsys.readouterr().out
    assert f"wrote {output}" in printed
    assert "learn2pd: solves" in printed
