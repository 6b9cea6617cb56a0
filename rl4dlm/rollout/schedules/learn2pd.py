"""Learn2PD: a small network says which candidates are final (Bao et al., arXiv 2509.25188).

The network sees the probabilities of all candidates of a block, those at written slots included, and nothing else.
What it accepts is written, and always the most probable candidate. It belongs to a model, a block length, a temperature
and a cache; `examples/train_learn2pd_filter.py` trains one.

`truncate` cuts the canvas off behind an end-of-sequence token that is written before everything before it is, so that
what would come behind it is no longer computed (EoTP).

Differences from the released code: one token per step is added to what is accepted, however many steps are asked for;
any number of rows; where a block is shorter than the network's, the rest counts as certain. The canvas is cut only
where the token is written, and either nothing before it is open or it was accepted with a large probability; never at a
token that is merely predicted. Without `truncate` a row still ends at an end-of-sequence token once all before it is
written.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from rl4dlm.files import writing
from rl4dlm.rollout.schedules.checks import check_flag, check_number
from rl4dlm.rollout.schedules.llada import fixed_blocks
from rl4dlm.rollout.schedules.parts import Resize, Schedule, Step, probability, top
from rl4dlm.rollout.schedules.registry import register

FORMAT = "rl4dlm.learn2pd"
ACCEPTED = "accepted"


@dataclass(frozen=True)
class Learn2PDArguments:
    """Settings of `learn2pd`.

    Args:
        filter_path: of the network, a safetensors file; needed unless `acceptance` is 1.
        acceptance: θ, a candidate is accepted when the network gives it a larger probability of being final; with 1
            nothing is, and one token is written per step.
        truncate: cuts the canvas off behind end-of-sequence tokens.
        eos_threshold: probability that an accepted end-of-sequence token must exceed for that while slots before it are
            open.
    """

    filter_path: str | None = None
    acceptance: float = 0.96
    truncate: bool = False
    eos_threshold: float = 0.9

    def __post_init__(self) -> None:
        check_number(self, "acceptance", 0, 1)
        check_number(self, "eos_threshold", 0)
        check_flag(self, "truncate")
        if self.filter_path is not None and not isinstance(self.filter_path, str | os.PathLike):
            raise ValueError(f"filter_path={self.filter_path!r} is not allowed; it must be the path of a file, or None")
        if self.filter_path is None and self.acceptance < 1:
            raise ValueError(
                f"filter_path=None is not allowed with acceptance={self.acceptance!r}; give the path of a filter "
                "(examples/train_learn2pd_filter.py makes one), or set acceptance=1"
            )


@register("learn2pd", Learn2PDArguments, takes_steps=False)
def learn2pd(arguments: Learn2PDArguments, config: Any) -> Schedule:
    """Commits the candidates that a trained network accepts, and always the most probable one."""
    network = None if arguments.filter_path is None else _load_for(arguments.filter_path, config)

    def commit(step: Step, scores: Tensor) -> Tensor:
        accepted = torch.zeros_like(step.eligible)
        if network is not None:
            final = network.to(scores.device).probabilities(step)
            accepted = step.eligible & (final > arguments.acceptance) & (scores > -torch.inf)  # deferred tokens wait
        step.memory.slots[ACCEPTED] = accepted
        return accepted | top(scores, step.eligible, torch.ones_like(step.block))

    def cut(step: Step) -> Resize | None:
        ends = step.written & step.is_eos(step.tokens)
        settled = ends & (step.masked.cumsum(-1) == 0)
        sure = ends & step.memory.slots[ACCEPTED] & (step.drawn.confidence > arguments.eos_threshold)
        last = (settled | sure).long().argmax(-1)  # the first of them
        limit = torch.where((settled | sure).any(-1), last + 1, step.length)
        nothing = torch.zeros_like(limit)
        return Resize(step.length, nothing, nothing, limit)

    return Schedule(
        fixed_blocks(config),
        probability,
        commit,
        scope="eligible" if network is None else "block",
        resize=cut if arguments.truncate else None,
    )


class TokenFilter(nn.Module):
    """Two layers from the B probabilities of a block's candidates to logits of their being final, `[..., B]` both.

    It runs in float64, so that a row's result does not hinge on the rows it is computed with.
    """

    def __init__(self, block_length: int, hidden_size: int | None = None) -> None:
        super().__init__()
        self.block_length = block_length
        self.hidden = nn.Linear(block_length, hidden_size or block_length, dtype=torch.float64)
        self.output = nn.Linear(hidden_size or block_length, block_length, dtype=torch.float64)

    def forward(self, confidences: Tensor) -> Tensor:
        logits: Tensor = self.output(torch.relu(self.hidden(confidences.double())))
        return logits

    def probabilities(self, step: Step) -> Tensor:
        """Of being final, float64 `[R, W]`; 0 outside of the active block."""
        window = BlockWindow.of(step, self.block_length)
        return window.spread(self(window.gather(step.drawn.confidence, 1.0)).sigmoid())


@dataclass(frozen=True)
class BlockWindow:
    """The active block of each row as B places, some of which may lie outside of it.

    Args:
        slots: long `[R, B]`, canvas offsets. inside: bool `[R, B]`. width: W, slots of the canvas.
    """

    slots: Tensor
    inside: Tensor
    width: int

    @classmethod
    def of(cls, step: Step, block_length: int) -> BlockWindow:
        """A block that ends before the canvas does ends where whole blocks end; a shorter one lacks its beginning then,
        as where the prompt ends inside a block of the model's attention, and its end otherwise."""
        first = torch.where(step.stop < step.length, step.stop - block_length, step.start)
        slots = first[:, None] + torch.arange(block_length, device=first.device)
        inside = (slots >= step.start[:, None]) & (slots < step.stop[:, None])
        return cls(slots, inside, step.tokens.shape[1])

    def gather(self, values: Tensor, outside: float) -> Tensor:
        """`[R, B]` from `[R, W]`."""
        return torch.where(self.inside, values.gather(-1, self.slots.clamp(0, self.width - 1)), outside)

    def spread(self, values: Tensor) -> Tensor:
        """`[R, W]` from `[R, B]`, 0 outside of the block."""
        wide = values.new_zeros(len(values), self.width)
        return wide.scatter_add(-1, self.slots.clamp(0, self.width - 1), torch.where(self.inside, values, 0.0))


def save_filter(network: TokenFilter, path: str | Path, *, temperature: float, cache: str) -> None:
    """Writes a network and what it was trained for; the file is complete or not there."""
    about = {
        "format": FORMAT,
        "block_length": str(network.block_length),
        "temperature": repr(float(temperature)),
        "cache": cache,
    }
    weights = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    with writing(path) as file:
        file.write(save(weights, about))


def load_filter(path: str | Path) -> tuple[TokenFilter, Mapping[str, str]]:
    """A network and what it was trained for: `block_length`, `temperature`, `cache`.

    Raises:
        ValueError: there is no such file, or it does not hold such a network.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about: dict[str, str] = file.metadata() or {}
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no mapping)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"filter_path={str(path)!r} cannot be read as a safetensors file: {error}") from error
    length, hidden = about.get("block_length", ""), weights.get("hidden.bias")
    if about.get("format") != FORMAT or not length.isdecimal() or int(length) < 1 or hidden is None:
        raise ValueError(
            f"filter_path={str(path)!r} does not hold a filter; its metadata is {about}, but needs "
            f"format={FORMAT!r} and block_length, as examples/train_learn2pd_filter.py writes them"
        )
    with torch.device("meta"):  # so that no random numbers are drawn for weights that are replaced
        network = TokenFilter(int(length), hidden.numel())
    try:
        network.load_state_dict({key: value.double() for key, value in weights.items()}, assign=True)
    except RuntimeError as error:
        raise ValueError(f"filter_path={str(path)!r} does not hold a filter for blocks of {length}: {error}") from error
    if not all(bool(value.isfinite().all()) for value in weights.values()):
        raise ValueError(f"filter_path={str(path)!r} holds numbers that are not finite")
    return network.requires_grad_(False), about


def _load_for(path: str, config: Any) -> TokenFilter:
    network, about = load_filter(path)
    length = config.block_length or config.canvas_length
    if network.block_length != length:
        raise ValueError(
            f"filter_path={str(path)!r} holds a filter for blocks of {network.block_length} tokens, but block_length "
            f"is {length}; set block_length={network.block_length} or train another filter"
        )
    for name, here in (("temperature", repr(float(config.temperature))), ("cache", config.cache)):
        if about.get(name) != here and {about.get(name), here} != {"none", "auto"}:
            warnings.warn(
                f"the filter of filter_path={str(path)!r} was trained with {name}={about.get(name)}, but decodes with "
                f"{name}={here}; its probabilities may be off",
                stacklevel=2,
            )
    return network
