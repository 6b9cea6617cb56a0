"""Rollouts of other libraries' servers: vLLM's (DiffusionGemma) and SGLang's (block models), by their documented HTTP.

Owns what of their protocols is spoken and what becomes of an answer. They decode by a schedule of their own, chosen
where they are started, and tell no more than the tokens: a rollout has no record, so that it is for algorithms that
score completions apart from how they came about. Weights reach them as a checkpoint in the published form, in a folder
that they see under the same path.

Both clients were written from the documentation and are tested against recorded answers, not against the engines:

- vLLM: `POST /v1/completions` with token ids, `return_token_ids` and one `seed` a request, so that each row is a
  request of its own; `POST /collective_rpc` with `reload_weights` and `POST /reset_prefix_cache`, which need
  `VLLM_SERVER_DEV_MODE=1`. An answer does not say which weights it is by. Whether its diffusion sampler heeds `seed` is
  not documented.
- SGLang: `POST /generate` with `input_ids`; `POST /update_weights_from_disk` with a `weight_version`, which answers
  repeat and which is compared. Its diffusion algorithms took the most probable tokens whatever `temperature` said when
  this was written (sgl-project/sglang issue 16615); `diffusion/identical_completion_groups` tells.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from rl4dlm.models.saving import save_denoiser
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.rollout.backends.backend import BackendError, Capabilities, Policy
from rl4dlm.rollout.backends.http import TOKEN, Http, Pushed
from rl4dlm.rollout.backends.weights import remove_older
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.noise import mixed_ids
from rl4dlm.rollout.rollout import Rollout, StopReason, Trace, valid_mask
from rl4dlm.rollout.state import State

AT_A_TIME = 32
"""Requests that are sent to vLLM at the same time."""


class EngineBackend:
    """What both have in common.

    Args:
        url: of the server. folder: where checkpoints are written, which it sees under the same path.
        spec: of the policy; its end-of-sequence tokens count.
        run, writes, timeout, device, token: as `HTTPBackend`'s, but for the token, which need not be there.

    Raises:
        ValueError: a bad URL, or no such folder. BackendError: the server does not answer.
    """

    name = ""

    def __init__(
        self,
        url: str,
        folder: str | os.PathLike[str],
        spec: DiffusionSpec,
        *,
        run: str,
        writes: bool = True,
        timeout: float = 1800.0,
        device: Any = "cpu",
        token: str | None = None,
    ) -> None:
        if writes and not Path(folder).is_dir():
            raise ValueError(f"rollout_weights_dir={str(folder)!r} is not a folder; it is one that the server sees too")
        if not spec.eos_token_ids:
            raise ValueError(
                f"rollouts of {self.name} need an end-of-sequence token; the model's eos_token_ids is empty"
            )
        self.folder, self.spec, self.device = Path(folder).absolute(), spec, device
        self._http = Http(url, timeout, os.environ.get(TOKEN) if token is None else token)
        self._pushed = Pushed(run, self._push if writes else None)

    @property
    def capabilities(self) -> Capabilities:
        """Tokens, and nothing else."""
        return Capabilities(
            trace=False,
            log_probs=False,
            schedules=None,
            drafts=False,
            states=False,
            deterministic=False,
            remote=True,
        )

    def update_weights(self, policy: Policy, version: int) -> None:
        """Writes a checkpoint in the published form, and waits until the server has loaded it."""
        self._pushed.update(policy, version)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        config: DecodingConfig,
        *,
        row_ids: Sequence[int],
        seed: int,
        hints: Sequence[Mapping[int, int]] | None = None,
        start: State | None = None,
    ) -> Rollout:
        """A rollout without a record; see `RolloutBackend.generate`. ValueError for hints and states."""
        if hints is not None or start is not None:
            raise ValueError(f"rollouts of {self.name} can have no given slots, and do not go on from states")
        if self._pushed.name is None:
            raise RuntimeError("update_weights comes before generate: the server has no weights of this run yet")
        found = self._completions([list(map(int, prompt)) for prompt in prompts], config, list(row_ids), seed)
        rows = [self._checked(*row, config) for row in found]
        length, end = config.canvas_length, self.spec.eos_token_ids[0]
        canvas = torch.tensor([row + [end] * (length - len(row)) for row in rows], dtype=torch.long, device=self.device)
        canvas = canvas.view(len(rows), length)
        valid = valid_mask(canvas, self.spec.eos_token_ids)
        zeros, ended = torch.zeros(len(rows), dtype=torch.long, device=self.device), set(self.spec.eos_token_ids)
        unknown = torch.full(canvas.shape, torch.nan, dtype=torch.float32, device=self.device)
        return Rollout(
            prompt_ids=[list(map(int, prompt)) for prompt in prompts],
            canvas=canvas,
            valid=valid,
            hinted=torch.zeros_like(valid),
            trace=Trace(valid.long() - 1, unknown, None, zeros + 1),
            nfe=zeros,
            stop_reason=[StopReason.EOS if row and row[-1] in ended else StopReason.COMPLETE for row in rows],
            row_ids=list(map(int, row_ids)),
            schedule=self.name,
            cache=self.name,
            exact=False,
            seed=seed,
            mask_token_id=self.spec.mask_token_id,
            extra_forwards=zeros.clone(),
            weight_version=self._pushed.version,
            decoding=config,
            recorded=False,
        )

    def _checked(self, ids: Any, finish: Any, config: DecodingConfig) -> list[int]:
        """A completion up to its first end. BackendError for what is none."""
        if not isinstance(ids, list) or not all(type(token) is int and token >= 0 for token in ids):
            raise BackendError(f"{self._http.url} answers without token ids; {self.name} may be too old to send them")
        ends = [i for i, token in enumerate(ids) if token in self.spec.eos_token_ids]
        ids = ids[: ends[0] + 1] if ends else ids
        length = config.canvas_length
        if finish == "stop" and not ends and len(ids) < length:
            ids = [*ids, self.spec.eos_token_ids[0]]  # a server may leave out what it stopped at
        elif finish not in ("stop", "length") or len(ids) > length or (not ends and len(ids) < length):
            raise BackendError(
                f"{self._http.url} gave up a row after {len(ids)} tokens with finish_reason={finish!r}; asked for were "
                f"{length} (max_completion_length): start it with a longer context"
            )
        if config.known_tokens is not None and max(ids, default=0) >= config.known_tokens:
            raise BackendError(
                f"{self._http.url} has drawn token {max(ids)}, which is behind the tokenizer's; set "
                "draw_unknown_tokens=True if that is to be learnt from"
            )
        return ids

    def _push(self, model: Any, name: str) -> None:
        path = self.folder / name
        save_denoiser(model, path, form="hub")
        self._load(str(path), name)
        remove_older(self.folder, self._pushed.run)

    @abstractmethod
    def _completions(
        self, prompts: list[list[int]], config: DecodingConfig, row_ids: list[int], seed: int
    ) -> list[tuple[Any, Any]]:
        """Token ids and the reason of the end of each row, as they came."""

    @abstractmethod
    def _load(self, path: str, name: str) -> None:
        """Lets the server load a checkpoint."""


class VLLMBackend(EngineBackend):
    """Asks a vLLM server; see the module."""

    name = "vllm"

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        listed = self._http.ask_json("/v1/models")
        try:
            self._model = str(listed["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise BackendError(f"{self._http.url}/v1/models names no model") from None

    def _completions(
        self, prompts: list[list[int]], config: DecodingConfig, row_ids: list[int], seed: int
    ) -> list[tuple[Any, Any]]:
        """One request a row: all prompts of a request would draw with one seed, and the same."""
        seeds = mixed_ids("engine", torch.tensor(seed), torch.tensor(row_ids, dtype=torch.long)).tolist()

        def complete(row: int) -> tuple[Any, Any]:
            body = {
                "model": self._model,
                "prompt": prompts[row],
                "max_tokens": config.canvas_length,
                "seed": seeds[row],
                "return_token_ids": True,
                **_sampling(config),
            }
            said = self._http.ask_json("/v1/completions", body)
            choice = _first(said, "choices")
            if choice.get("prompt_token_ids") not in (None, prompts[row]):
                raise BackendError(f"{self._http.url} has decoded another prompt than it was asked for")
            return choice.get("token_ids"), choice.get("finish_reason")

        with ThreadPoolExecutor(AT_A_TIME) as pool:
            return list(pool.map(complete, range(len(prompts))))

    def _load(self, path: str, name: str) -> None:
        arguments = {"weights_path": path, "is_checkpoint_format": True}
        self._http.ask_json("/collective_rpc", {"method": "reload_weights", "kwargs": arguments})
        self._http.ask("/reset_prefix_cache", b"")


class SGLangBackend(EngineBackend):
    """Asks an SGLang server; see the module."""

    name = "sglang"

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self._http.ask("/health")

    def _completions(
        self, prompts: list[list[int]], config: DecodingConfig, row_ids: list[int], seed: int
    ) -> list[tuple[Any, Any]]:
        if not prompts:
            return []
        settings = {"max_new_tokens": config.canvas_length, **_sampling(config)}
        said = self._http.ask_json("/generate", {"input_ids": prompts, "sampling_params": settings})
        if not isinstance(said, list) or len(said) != len(prompts):
            raise BackendError(f"{self._http.url}/generate does not answer with {len(prompts)} rows")
        found = []
        for row in said:
            known = row.get("meta_info", {}) if isinstance(row, dict) else {}
            version = known.get("weight_version")
            if version not in (None, self._pushed.name):
                raise BackendError(
                    f"{self._http.url} has decoded with weights {version!r}, and {self._pushed.name!r} are the policy's"
                )
            reason = known.get("finish_reason")
            found.append((row.get("output_ids"), reason.get("type") if isinstance(reason, dict) else reason))
        return found

    def _load(self, path: str, name: str) -> None:
        body = {"model_path": path, "weight_version": name, "flush_cache": True}
        said = self._http.ask_json("/update_weights_from_disk", body)
        if not isinstance(said, dict) or said.get("success") is not True:
            why = said.get("message") if isinstance(said, dict) else said
            raise BackendError(f"{self._http.url} has not loaded {path}: {str(why)[:200]}")


def _sampling(config: DecodingConfig) -> dict[str, Any]:
    """All of it: what is left out takes the values of the checkpoint's `generation_config.json`."""
    return {
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k or -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }


def _first(said: Any, name: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = said[name][0]
        found.get("")
        return found
    except (KeyError, IndexError, TypeError, AttributeError):
        raise BackendError(f"the answer has no {name}") from None
