"""Files of unmasking policies, and how policies ride on models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from rl4dlm.models.convert import convert, merge
from rl4dlm.models.loading import load_denoiser, save_denoiser
from rl4dlm.models.tiny import tiny_llada
from rl4dlm.rollout.policies.hidden_states import LinearPolicy, UnmaskingPolicyModule
from rl4dlm.rollout.policies.policy import Seen, UnmaskingPolicy, attach_policy, attached_policy, fresh
from rl4dlm.rollout.policies.saving import (
    FORMAT,
    POLICY_FILE,
    kinds,
    load_policy,
    load_weights,
    policy_of,
    save_policy,
)


def random_policy(seed: int = 0, **settings: Any) -> UnmaskingPolicy:
    """With no weight at 0."""
    policy = fresh(UnmaskingPolicyModule(**{"hidden_size": 8, "frequencies": 4, "heads": 2, **settings}), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    return policy


def seen(rows: int = 3, slots: int = 5, size: int = 8) -> Seen:
    generator = torch.Generator().manual_seed(1)
    flags = torch.rand(2, rows, slots, generator=generator) < 0.5
    exists = torch.arange(slots) < torch.tensor([[slots], [slots - 1], [slots]])[:rows]
    features = torch.randn(rows, slots, size, generator=generator)
    return Seen(features, flags[0], flags[1], exists, torch.tensor([0.0, 0.25, 0.5])[:rows])


@pytest.mark.parametrize("policy", [random_policy(), random_policy(layers=0), fresh(LinearPolicy(8), seed=0)])
def test_a_policy_comes_back_as_it_was(policy: UnmaskingPolicy, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    save_policy(policy, tmp_path)
    found = load_policy(tmp_path)
    assert type(found) is type(policy) and found.settings == policy.settings
    assert torch.equal(found(seen()), policy(seen()))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert sorted(path.name for path in tmp_path.iterdir()) == [POLICY_FILE]


def test_fresh_weights_depend_on_the_seed_alone() -> None:
    one, same, other = (fresh(UnmaskingPolicyModule(8, heads=2), seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert not one(seen()).any()  # all orders are equally likely


def test_rows_do_not_look_at_each_other() -> None:
    policy, every = random_policy().double(), seen()
    for row in range(3):
        one = Seen(
            *(getattr(every, name)[row : row + 1] for name in ("features", "masked", "inside", "exists", "time"))
        )
        assert torch.allclose(policy(one)[0], policy(every)[row], atol=1e-12)
    changed = seen()
    changed.features[1, -1] += 1.0  # a slot that does not exist
    assert torch.equal(policy(changed)[1, :-1], policy(every)[1, :-1])


def broken(folder: Path, change: Any) -> Path:
    policy = random_policy()
    weights = {name: value.clone() for name, value in policy.state_dict().items()}
    about = {"format": FORMAT, "kind": "upm", "settings": json.dumps(policy.settings)}
    change(weights, about)
    save_file(weights, folder / POLICY_FILE, metadata=about)
    return folder


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda weights, about: about.update(format="other"), "does not hold an unmasking policy"),
        (lambda weights, about: about.update(kind="other"), "kind='other'"),
        (lambda weights, about: about.update(settings="{"), "does not hold"),
        (lambda weights, about: about.update(settings='{"size": 3}'), "settings={'size': 3}"),
        (lambda weights, about: about.update(settings='{"hidden_size": 0}'), "hidden_size=0"),
        (lambda weights, about: about.update(settings='{"hidden_size": 16, "heads": 2}'), "should be"),
        (lambda weights, about: weights.pop("utility.bias"), "utility.bias"),
        (lambda weights, about: weights.update(more=torch.zeros(2)), "more"),
        (lambda weights, about: weights["utility.bias"].fill_(torch.nan), "not finite"),
    ],
)
def test_what_is_no_policy_is_refused(change: Any, word: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=word):
        load_policy(broken(tmp_path, change))


def test_a_file_that_is_missing_or_torn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is missing"):
        load_policy(tmp_path)
    save_policy(random_policy(), tmp_path)
    whole = (tmp_path / POLICY_FILE).read_bytes()
    (tmp_path / POLICY_FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        load_policy(tmp_path)


def test_weights_go_into_a_policy_of_the_same_settings_only(tmp_path: Path) -> None:
    save_policy(random_policy(), tmp_path)
    other = random_policy(seed=1)
    kept = dict(other.named_parameters())
    load_weights(other, tmp_path)
    assert torch.equal(other(seen()), random_policy()(seen()))
    assert all(value is kept[name] for name, value in other.named_parameters())
    with pytest.raises(ValueError, match="layers"):
        load_weights(random_policy(layers=0), tmp_path)


def test_a_policy_is_in_no_state_dictionary_of_its_model(tmp_path: Path) -> None:
    model = tiny_llada(hidden_size=8, num_attention_heads=2)
    names = set(model.state_dict())
    policy = attach_policy(model, random_policy())
    assert set(model.state_dict()) == names and attached_policy(model) is policy
    assert any("unmasking_policy" in name for name, _ in model.named_parameters())
    keys = model.load_state_dict(model.state_dict())
    assert not keys.missing_keys and not keys.unexpected_keys
    model.save_pretrained(tmp_path)
    loaded = load_denoiser(tmp_path)
    assert policy_of(loaded) is None
    save_policy(policy, tmp_path)
    again = load_denoiser(tmp_path)
    assert attached_policy(again) is None  # until somebody asks
    found = policy_of(again)
    assert found is not None and policy_of(again) is found and torch.equal(found(seen()), policy(seen()))


def test_a_policy_goes_wherever_its_model_goes(tmp_path: Path) -> None:
    """Saved, copied from a folder where nobody asked for it, converted, and merged: the adapter's before the base's."""
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    model = tiny_llada(hidden_size=8, num_attention_heads=2)
    policy, other = attach_policy(model, random_policy()), random_policy(layers=0)
    save_denoiser(model, base)
    adapter = LoraConfig(r=2, target_modules=["q_proj"], base_model_name_or_path=str(base))
    wrapped = get_peft_model(load_denoiser(base), adapter)
    save_denoiser(wrapped, tuned)
    convert(base, tmp_path / "converted")
    convert(base, tmp_path / "hub", "hub")
    for folder in (base, tuned, tmp_path / "converted", tmp_path / "hub"):
        assert same(policy_of(load_denoiser(folder)), policy), folder
    save_policy(other, tuned)
    merge(tuned, tmp_path / "merged")
    for found in (load_denoiser(tuned), load_denoiser(tmp_path / "merged")):
        assert same(policy_of(found), other)
    kept = load_denoiser(base)
    save_denoiser(kept, base)  # in the place of what it was loaded from
    assert same(policy_of(load_denoiser(base)), policy)
    assert policy_of(tiny_llada()) is None


def same(found: UnmaskingPolicy | None, expected: UnmaskingPolicy) -> bool:
    assert found is not None
    return found.settings == expected.settings and torch.equal(found(seen()), expected(seen()))


def test_the_kinds_are_known() -> None:
    assert {"linear", "upm"} <= set(kinds())
