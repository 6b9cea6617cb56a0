"""The README.md beside a model that was trained here: where it comes from, how it was trained, how it is used.

Owns the text. TRL's card has a quick start that writes left to right, which on a denoiser prints garbage.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any

from rl4dlm.rollout.decoding import DecodingConfig


def base_name(model: Any) -> str | None:
    """What a model (not wrapped in an adapter) was loaded from, a folder or hub id; None: it was made in memory."""
    return getattr(model, "name_or_path", "") or getattr(model.config, "_name_or_path", "") or None


def model_card(
    *,
    name: str,
    path: str,
    base: str | None,
    algorithm: str,
    paper: Mapping[str, Any] | None,
    tags: Iterable[str],
    decoding: DecodingConfig,
    rewards: Iterable[tuple[str, float]] = (),
    facts: Mapping[str, Any] | None = None,
    dataset: str | None = None,
) -> str:
    """The text of a card, in Markdown behind a YAML header.

    Args:
        name: of the model.
        path: that the quick start loads: its hub id, or the folder it is saved in.
        base: as `base_name` has it.
        algorithm: that trained it. paper: TRL's `_paper`: `title`, and `id` on arXiv.
        tags: for the hub.
        decoding: how its completions were written in training, or may be.
        rewards: names and weights.
        facts: further lines of the table of training.
        dataset: its hub id, if it has one.
    """
    is_hub_id = base is not None and not os.path.isdir(base) and not base.startswith((".", "/", "~"))
    header = ["---", "library_name: rl4dlm", f"model_name: {name}"]
    header += [f"base_model: {base}"] if is_hub_id else []
    header += [f"datasets: {dataset}"] if dataset else []
    header += ["tags:", *(f"- {tag}" for tag in sorted({*tags, "diffusion-language-model"})), "---"]
    if base is None:
        origin = "a model that was made in memory"
    else:
        origin = f"[{base}](https://huggingface.co/{base})" if is_hub_id else f"the model in the folder `{base}`"
    source = f" ([{paper['title']}](https://arxiv.org/abs/{paper['id']}))" if paper and paper.get("id") else ""
    settings = _differing(decoding)
    written = ", ".join(f"{key}={value!r}" for key, value in settings.items())
    table = {
        "algorithm": algorithm,
        "rewards": ", ".join(f"`{reward}` (weight {weight:g})" for reward, weight in rewards),
        "decoding": ", ".join(f"`{key}={value!r}`" for key, value in settings.items()),
        **(facts or {}),
    }
    rows = [f"| {key} | {_cell(value)} |" for key, value in table.items() if value not in (None, "")]
    return f"""{chr(10).join(header)}

# {name}

A diffusion language model, trained from {origin} with {algorithm}{source} by
[rl4dlm](https://pypi.org/project/rl4dlm/). It denoises a canvas of masked tokens. It does not write from left to right:
`generate` and the `pipeline` of transformers print garbage with it.

## Quick start

```python
from rl4dlm import DecodingConfig, RolloutEngine, load_denoiser, load_tokenizer
from rl4dlm.evaluation import encode_prompt

model, tokenizer = load_denoiser({path!r}), load_tokenizer({path!r})
prompt = encode_prompt(tokenizer, "Your question")  # or a list of chat messages
rollout = RolloutEngine(model).generate([prompt], DecodingConfig({written}))
print(tokenizer.batch_decode(rollout.completion_ids, skip_special_tokens=True)[0])
```

or `rl4dlm decode --model {path} --prompt "Your question" --canvas-length {decoding.canvas_length}`.

## Training

| | |
|---|---|
{chr(10).join(rows)}
"""


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _differing(decoding: DecodingConfig) -> dict[str, Any]:
    """The length of the canvas, and the settings of decoding that are not the defaults."""
    found: dict[str, Any] = {}
    for entry in fields(decoding):
        value = getattr(decoding, entry.name)
        default = entry.default_factory() if entry.default_factory is not MISSING else entry.default
        if entry.name == "canvas_length" or value != default:
            found[entry.name] = value
    return found
