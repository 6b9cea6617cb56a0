"""lm-eval's model class: its requests answered by the engine and by likelihood estimators.

Owns what a request of lm-eval (0.4.13 and later) becomes here. Completions are the engine's, with the texts that a task
stops at ending rows there; likelihoods are `log_likelihood`'s, by an estimator that the results name. Every draw is
keyed by what its request holds (its task, its tokens, and which of several equal ones it is), so that other requests,
their order and the size of batches change nothing. This file imports lm-eval, which is an extra.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

import rl4dlm
from rl4dlm.evaluation.likelihood import kind_of, log_likelihood, named_estimator, request_key
from rl4dlm.likelihood.estimator import Estimator
from rl4dlm.models.loading import check_tokenizer
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.models.taught import warn_of_canvas
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.rollout.engine import RolloutEngine
from rl4dlm.rollout.stopping import text_ends

logger = logging.getLogger(__name__)

LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_OFF: dict[str, tuple[Any, ...]] = {"num_beams": (1, None), "use_cache": (True, False, None), "n": (1, None)}
"""Settings of causal generation, and the values at which they mean nothing."""


class DiffusionLM(TemplateLM):
    """A denoiser for `lm_eval.simple_evaluate(model=...)`.

    Args:
        model: a denoiser, see `load_denoiser`; with an adapter or without.
        tokenizer: of the model.
        decoding: how completions are decoded. A task that samples gives temperature, top_p and top_k; one that limits
            tokens to fewer than the canvas ends rows there. Canvas, steps, schedule and cache are always these.
        estimator, num_views, block_length: of likelihoods, as for `log_likelihood`.
        seed: keys every draw.
        batch_rows: rows decoded, and sequences scored, at the same time.
        chat_template_kwargs: for the chat template.

    Raises:
        ValueError: a tokenizer that does not fit, or an estimator that has no meaning for the model.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        decoding: DecodingConfig,
        *,
        estimator: str | Estimator = "auto",
        num_views: int = 128,
        block_length: int | None = None,
        seed: int = 0,
        batch_rows: int = 16,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.spec = DiffusionSpec.of(model)
        check_tokenizer(tokenizer, self.spec)
        self.model, self.tokenizer, self.decoding, self.seed = model, tokenizer, decoding, seed
        self.decoding.for_model(self.spec)
        self.engine = RolloutEngine(model, self.spec, max_batch_rows=batch_rows, progress=True)
        self.batch_rows, self.template = batch_rows, dict(chat_template_kwargs or {})
        self.likelihood: dict[str, Any] = {
            "estimator": estimator,
            "num_views": num_views,
            "block_length": block_length,
            "seed": seed,
            "batch_rows": batch_rows,
        }
        self.estimator, self.estimator_name = named_estimator(
            estimator, model, num_views=num_views, block_length=block_length
        )
        self.truncated = 0  # contexts that did not fit and lost their beginning
        warn_of_canvas(model, decoding.canvas_length)
        self._device = model.device

    # --- what lm-eval asks of a tokenizer -----------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The first end-of-sequence token."""
        return self.spec.eos_token_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's fingerprint of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text; a begin-of-sequence token that it spells out is not doubled."""
        if add_special_tokens is None:
            begin = self.tokenizer.bos_token
            add_special_tokens = not (begin and string.startswith(begin))
        return list(self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"])

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text; with `add_generation_prompt` False its last message is continued."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **self.template,
        )
        return text

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into the configuration of its results."""
        return {
            "rl4dlm": {
                "version": rl4dlm.__version__,
                "model": str(getattr(self.model, "name_or_path", "") or type(self.model).__name__),
                "decoding": asdict(self.decoding),
                "likelihood": {
                    "estimator": self.estimator_name,
                    "kind": kind_of(self.estimator),
                    "settings": asdict(self.estimator),  # type: ignore[call-overload]
                    "is_greedy": self._measures_greedy,
                },
                "seed": self.seed,
                "truncated_contexts": self.truncated,
            }
        }

    # --- likelihoods --------------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        limit = self._positions
        prompts = [self._shortened(prompt, len(answer), limit) for _, prompt, answer in requests]
        answers = [answer for _, _, answer in requests]
        values = log_likelihood(self.model, prompts, answers, **self.likelihood).values
        results = list(zip(values, self._are_greedy(prompts, answers), strict=True))
        for (texts, _, _), result in zip(requests, results, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Sums over windows of what the model's positions hold, by the same estimator: bounds where it is one."""
        limit = self._positions or 2048
        found = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, limit - 1, 1)
            pairs = [make_disjoint_window(window) for window in windows]
            prompts, answers = [list(pair[0]) for pair in pairs], [list(pair[1]) for pair in pairs]
            found.append(sum(log_likelihood(self.model, prompts, answers, **self.likelihood).values))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), found[-1])
        return found

    @property
    def _measures_greedy(self) -> bool:
        return self.spec.noise == "mask"  # canvases of random tokens are drawn, there is no greedy answer

    def _are_greedy(self, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> list[bool]:
        """Whether decoding one token per step, the most probable one, writes each answer on a canvas of its length."""
        if not self._measures_greedy:
            return [False] * len(prompts)
        by_length: dict[int, dict[tuple[int, ...], list[int]]] = defaultdict(dict)
        for prompt, answer in zip(prompts, answers, strict=True):
            by_length[len(answer)][tuple(prompt)] = []
        for length, group in by_length.items():
            config = DecodingConfig(canvas_length=length, stop_at_eos=False).one_token_per_step(self.spec)
            rollout = self.engine.generate(list(map(list, group)), config, seed=self.seed)
            by_length[length] = dict(zip(group, rollout.canvas.tolist(), strict=True))
        pairs = zip(prompts, answers, strict=True)
        return [by_length[len(answer)][tuple(prompt)] == list(answer) for prompt, answer in pairs]

    # --- completions --------------------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Completions up to the first text that a request stops at; the engine ends their rows there."""
        groups: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            groups[repr(sorted(request.args[1].items()))].append(number)
        found = [""] * len(requests)
        for numbers in groups.values():
            settings = dict(requests[numbers[0]].args[1])
            texts = self._completions([requests[number] for number in numbers], settings)
            for number, text in zip(numbers, texts, strict=True):
                found[number] = text
                self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return found

    def _completions(self, requests: Sequence[Any], settings: dict[str, Any]) -> list[str]:
        config, most, until = self._settings(settings)
        stop, strings = text_ends(self.tokenizer, until, most)
        limit = self._positions
        prompts, keys, seen = [], [], Counter[tuple[str, tuple[int, ...]]]()
        for request in requests:
            ids = self._shortened(self.tok_encode(request.args[0]), config.canvas_length, limit)
            content = str(request.task_name), tuple(ids)
            keys.append(request_key(content[0], ids, seen[content]))
            seen[content] += 1
            prompts.append(ids)
        rollout = self.engine.generate(prompts, config, row_ids=keys, seed=self.seed, stop=stop)
        ends, texts = set(self.spec.eos_token_ids), []
        for row in rollout.completion_ids:
            text = self.tokenizer.decode([token for token in row if token not in ends], skip_special_tokens=True)
            texts.append(text if strings is None else strings.cut(text))
        return texts

    def _settings(self, given: dict[str, Any]) -> tuple[DecodingConfig, int | None, list[str]]:
        """What a task's generation settings make of the decoding: the settings, the most tokens, where to stop."""
        limited = any(given.get(name) is not None for name in LIMITS)
        settings = dict(normalize_gen_kwargs(given))
        most, until = settings.pop("max_gen_toks"), settings.pop("until", None) or []
        until = [until] if isinstance(until, str) else list(until)
        samples = settings.pop("do_sample", False)
        sampling = {name: settings.pop(name) for name in ("temperature", "top_p", "top_k") if name in settings}
        unknown = [name for name, value in settings.items() if name not in _OFF or value not in _OFF[name]]
        if unknown:
            raise ValueError(
                f"the task's generation_kwargs set {unknown[0]}={settings[unknown[0]]!r}, which is not supported; "
                f"allowed: until, do_sample, temperature, top_p, top_k, {', '.join(LIMITS)}"
            )
        config = self.decoding
        if samples:
            config = replace(config, **{name: value for name, value in sampling.items() if value is not None})
        if limited and most > config.canvas_length:
            logger.warning(
                "a task asks for up to %d tokens; the canvas has canvas_length=%d", most, config.canvas_length
            )
        return config, most if limited and most < config.canvas_length else None, [text for text in until if text]

    def _shortened(self, ids: Sequence[int], behind: int, limit: int | None) -> list[int]:
        """A context without its beginning, where it does not fit beside so many tokens behind it."""
        if limit is None or len(ids) + behind <= limit:
            return list(ids)
        if behind >= limit:
            raise ValueError(f"{behind} tokens behind a context do not fit into the model's {limit} positions")
        if not self.truncated:
            logger.warning("contexts longer than the model's %d positions allow lose their beginning", limit)
        self.truncated += 1
        return list(ids[len(ids) + behind - limit :])

    @property
    def _positions(self) -> int | None:
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return None if limit is None else int(limit)
