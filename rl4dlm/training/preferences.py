"""What trainers on preferences share: completions of a data set, as bounds that are estimated in the same views for
policy and reference.

Owns how TRL's rows become the library's, how its preference trainers are built around a denoiser, and who the reference
is; losses are the algorithms'. TRL's private names are used here, and checked where a trainer names its TRL class.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rl4dlm.likelihood.estimator import Estimator
from rl4dlm.likelihood.scoring import score_views
from rl4dlm.likelihood.views import Rows, Views
from rl4dlm.models.adapters import base_model
from rl4dlm.models.loading import check_tokenizer, load_denoiser
from rl4dlm.models.spec import DiffusionSpec
from rl4dlm.rollout.decoding import DecodingConfig
from rl4dlm.tracking.trackers import TrackerSettings
from rl4dlm.training.checkpoints import CheckpointingTrainer
from rl4dlm.training.guard import MAX_SKIPPED_STEPS, GuardedTrainer
from rl4dlm.training.model_card import base_name, model_card
from rl4dlm.training.moving_reference import MovingReferenceTrainer
from rl4dlm.training.setup import copy_of, prepared, swapped, tokenizer_for

NAMES = ("create_model_from_path", "disable_gradient_checkpointing", "use_adapter")
"""Functions in the module of a TRL trainer on preferences that are used or replaced here."""

IN_THE_LOOP = "the reference is scored in the views of the policy, which are new in every step"
"""Why nothing of the reference is computed in advance."""

NO_EFFECT = {
    "precompute_ref_log_probs": IN_THE_LOOP,
    "precompute_ref_batch_size": IN_THE_LOOP,
    "label_smoothing_factor": "the loss is not a cross-entropy of tokens",
    "use_liger_kernel": "its losses are of autoregressive models",
}
"""Settings of TRL's trainers on preferences that would do nothing here, and why."""


@dataclass
class PreferenceSettings(TrackerSettings):
    """Settings of the bounds, beside those of a TRL trainer.

    Args:
        num_views: n, views of each completion, the same ones for policy and reference.
        complement: views come in pairs that hide complementary tokens; `num_views` is even then.
        one_view: score the views of a completion one after another: less memory, one forward more.
        max_skipped_steps: optimizer steps in a row that may be skipped because something in them is not finite.
    """

    num_views: int = field(default=8, metadata={"help": "Views per completion, for policy and reference alike."})
    complement: bool = field(default=False, metadata={"help": "Views come in pairs that hide complementary tokens."})
    one_view: bool = field(default=False, metadata={"help": "Score the views of a completion one after another."})
    max_skipped_steps: int = field(
        default=MAX_SKIPPED_STEPS,
        metadata={"help": "Steps in a row that may be skipped because something in them is not finite."},
    )


class PreferenceTrainer(GuardedTrainer, CheckpointingTrainer, MovingReferenceTrainer):
    """A TRL trainer on preferences whose likelihoods are a denoiser's bounds; to be put before that trainer.

    Args:
        model: a model or `PeftModel` with a spec, or the path of one (a folder, a hub id, an adapter folder).
        ref_model: None: the model without its adapter, or a copy of it.
        args: None: the defaults of the trainer's config.
        train_dataset: as TRL's trainer takes it.
        eval_dataset: the same.
        processing_class: the tokenizer; None loads the one saved with the model.
        kwargs: TRL's further arguments: `callbacks`, `optimizers`, `quantization_config`, `peft_config`.

    Raises:
        ValueError: a model without spec, a tokenizer without mask token, a data set that is not one of preferences.
        TypeError: an argument that has no meaning here.
    """

    config_class: type[Any]
    trl_module: ModuleType
    """Where TRL's trainer is defined."""
    estimator: Estimator
    ref_model: Any
    args: Any
    aux_loss_enabled: bool
    _tokenizer: Any
    _name: str
    _paper: dict[str, str]
    _tag_names: list[str]
    _metrics: dict[str, Any]

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        args = self.config_class() if args is None else args
        if not isinstance(args, self.config_class):
            raise TypeError(f"args is a {type(args).__name__}; {self._name} needs a {self.config_class.__name__}")
        for name in ("data_collator", "compute_metrics"):
            if kwargs.pop(name, None) is not None:
                raise TypeError(f"{name} is not supported: completions are scored without building logits")
        self.check_data(train_dataset, eval_dataset)
        model = os.fspath(model) if isinstance(model, os.PathLike) else model
        adapter = kwargs.get("peft_config")
        policy = None if isinstance(model, str) else prepared(model, adapter)
        if processing_class is None:
            processing_class = tokenizer_for(model, args.model_init_kwargs)

        def load(path: str, architecture: Any = None, **options: Any) -> Any:
            # The reference of a policy given as an instance is a copy of it: the folder it came from may differ.
            return copy_of(policy) if policy is not None else prepared(load_denoiser(path, **options), adapter)

        given: dict[str, Any] = {
            "model": model if policy is None else policy,
            "ref_model": None if ref_model is None else prepared(ref_model),
            "args": args,
            "train_dataset": train_dataset,
            "eval_dataset": eval_dataset,
            "processing_class": processing_class,
        }
        with swapped(self.trl_module, "create_model_from_path", load):
            super().__init__(**given, **kwargs)
        if hasattr(self.train_dataset, "__len__") and not len(self.train_dataset):
            raise ValueError(
                f"max_length={args.max_length} leaves nothing of train_dataset: every prompt is as long, so that no "
                "completion is there to learn from; raise it, or set it to None"
            )
        self.spec = DiffusionSpec.of(base_model(self.model))
        if self.spec.noise != "mask":
            raise ValueError(
                f"{type(self).__name__} is not offered for models with noise={self.spec.noise!r}: the completions of a "
                "data set have any length, and these models denoise whole canvases"
            )
        check_tokenizer(self._tokenizer, self.spec)
        self.estimator = self.build_estimator()
        if self.aux_loss_enabled:
            raise ValueError("the model adds a router loss, which is not supported; set router_aux_loss_coef=0.0")

    @abstractmethod
    def build_estimator(self) -> Estimator:
        """What stands for a log-likelihood, from `self.args` and `self.spec`."""

    def check_data(self, train_dataset: Any, eval_dataset: Any) -> None:
        """Raises ValueError for rows that the trainer cannot learn from, before anything is loaded."""

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None
    ) -> None:
        """Writes README.md into the output folder; see `rl4dlm.training.model_card`."""
        if not self.is_world_process_zero():
            return
        args = self.args
        text = model_card(
            name=self.hub_model_id or model_name or os.path.basename(os.path.abspath(args.output_dir)),
            path=self.hub_model_id or args.output_dir,
            base=base_name(base_model(self.model)),
            algorithm=self._name,
            paper=self._paper,
            tags=[*self._tag_names, *([tags] if isinstance(tags, str) else tags or ())],
            decoding=DecodingConfig().for_model(self.spec),
            facts={"beta": args.beta, "views": args.num_views, "learning rate": args.learning_rate},
            dataset=dataset_name,
        )
        Path(args.output_dir, "README.md").write_text(text, encoding="utf-8")

    def draw(self, rows: Rows) -> Views:
        """Views keyed by the tokens of a completion and the optimizer step; in evaluation always the same ones."""
        iteration = self.state.global_step if self.model.training else 0
        return self.estimator.draw(rows, seed=self.args.seed, iteration=iteration)

    def bounds(self, model: Any, rows: Rows, views: Views) -> tuple[Tensor, Tensor]:
        """What each token adds to the bound of its completion, and its mean entropy where it is hidden, `[B, L]`."""
        with self.accelerator.autocast():
            found = score_views(model, self.spec, rows.ids, rows.attention_mask, views, one_view=self.args.one_view)
        entropies = (found.entropies * views.scored).sum(1) / views.scored.sum(1).clamp(min=1)
        return self.estimator.reduce(found.log_probs, views) * rows.valid, entropies * rows.valid

    @torch.no_grad()
    def reference_bounds(self, rows: Rows, views: Views) -> Tensor:
        """As `bounds`, of the reference, `[B, L]`; sums are an equal policy's to the bit, in one order."""
        trl = self.trl_module
        with trl.disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            if self.ref_model is not None:
                return self.bounds(self.ref_model, rows, views)[0]
            model = self.accelerator.unwrap_model(self.model)
            with trl.use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
                return self.bounds(self.model, rows, views)[0]


def rows_of_completions(inputs: Any) -> tuple[Rows, Tensor]:
    """TRL's rows as ours, prompts padded on the left and completions on the right, and where their tokens come from.

    Args:
        inputs: `input_ids`, `attention_mask` and `completion_mask`, long `[B, T]`, padded on the right.

    Returns:
        B rows, keyed by their tokens; long `[B, L]`, the column of `inputs` that each canvas slot is.

    Raises:
        ValueError: a completion without a prompt, of whose first token TRL keeps no score.
    """
    ids, keys, completion = inputs["input_ids"], inputs["attention_mask"].bool(), inputs["completion_mask"].bool()
    if completion[:, 0].any():
        raise ValueError(
            "a completion has no prompt before it; max_length may have cut it: raise it, or set it to None"
        )
    starts = (keys & ~completion).sum(-1)
    lengths = completion.sum(-1)
    width, size = int(starts.max()), max(int(lengths.max()), 1)
    place = torch.arange(width, device=ids.device) - (width - starts)[:, None]  # [B, P]
    slots = starts[:, None] + torch.arange(size, device=ids.device)
    valid = torch.arange(size, device=ids.device) < lengths[:, None]
    columns = torch.where(valid, slots, 0)
    keyed = torch.arange(1, ids.shape[1] + 1, device=ids.device) * 0x2545F4914F6CDD1D
    row_ids = ((ids + 1) * keys * (keyed | 1)).sum(-1) & (2**62 - 1)
    prompt = ids.gather(1, place.clamp(min=0)).masked_fill(place < 0, 0)
    rows = Rows(prompt, place >= 0, ids.gather(1, columns).masked_fill(~valid, 0), valid, row_ids, seen=valid)
    return rows, columns
