"""`rl4dlm lm-eval`: tasks of lm-eval, answered by a denoiser; the model class is `rl4dlm.evaluation.harness`'s."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rl4dlm import resources
from rl4dlm._optional import require
from rl4dlm.cli.decoding import add_decoding_flags, count, decoding_settings, device_of, listed

BATCH_ROWS = 16


def add_lm_eval_parser(commands: Any) -> None:
    """Adds the command to the subparsers of `rl4dlm`; its function is in `command` of the parsed arguments."""
    described = "Run tasks of lm-eval (the extra lm-eval) with the engine and a likelihood estimator that results name."
    command = commands.add_parser("lm-eval", help=described, description=described, allow_abbrev=False)
    command.set_defaults(command=run)
    add = command.add_argument
    add("--model", required=True, help="model folder, adapter folder or hub id")
    add("--tasks", required=True, help="names of lm-eval's tasks, with commas between them")
    add("--include-path", action="append", metavar="DIR", help="folder with tasks of one's own, as YAML")
    add("--num-fewshot", type=int, metavar="N", help="solved examples in the prompt (default: the task's own)")
    add("--limit", type=count, metavar="N", help="use the first N documents of each task at most")
    add("--apply-chat-template", action="store_true", help="render prompts with the tokenizer's chat template")
    add("--system-instruction", metavar="TEXT", help="system message, or text before the prompt")
    add("--estimator", default="auto", help="of likelihoods: auto, left_to_right, elbo, block_elbo or mean_field "
        "(default: %(default)s)")  # fmt: skip
    add("--num-views", type=count, default=128, metavar="N", help="views of a bound (default: %(default)s)")
    add("--likelihood-block-length", type=count, metavar="N", help="blocks of --estimator block_elbo")
    add("--steps", type=count, metavar="N", help="denoising steps (default: half the canvas)")
    add_decoding_flags(add)
    add("--log-samples", action="store_true", help="write each document, request and answer into the output, too")
    add("--output", metavar="FILE", help="JSON file to write: lm-eval's results, and what they were made with")


def run(arguments: argparse.Namespace) -> int:
    """Runs the tasks, prints lm-eval's table and writes its results."""
    require("lm_eval", extra="lm-eval", purpose="rl4dlm lm-eval")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import handle_non_serializable, make_table
    from rich.console import Console

    from rl4dlm.cli.arguments import mapping
    from rl4dlm.evaluation.harness import DiffusionLM
    from rl4dlm.evaluation.likelihood import ESTIMATORS
    from rl4dlm.files import write_text
    from rl4dlm.models.loading import load_denoiser, load_tokenizer
    from rl4dlm.rollout.decoding import DecodingConfig

    # Everything that can be wrong is looked at before weights are read.
    device = device_of(arguments.device)
    config = DecodingConfig(steps=arguments.steps, **decoding_settings(arguments))
    template = mapping("chat-template-kwargs", arguments.chat_template_kwargs)
    if arguments.num_samples != 1:
        raise ValueError(f"num-samples={arguments.num_samples} has no meaning here; a task's `repeats` says how many")
    if arguments.estimator not in ESTIMATORS:
        raise ValueError(f"estimator={arguments.estimator!r} is not known; choose one of {', '.join(ESTIMATORS)}")
    if arguments.output is not None and Path(arguments.output).is_dir():
        raise ValueError(f"output={arguments.output!r} is a folder; name a .json file")
    for folder in arguments.include_path or ():
        if not Path(folder).is_dir():
            raise ValueError(f"include-path={folder!r} is no folder")
    names = listed("tasks", arguments.tasks)
    manager = TaskManager(include_path=arguments.include_path)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise ValueError(f"tasks={arguments.tasks!r}: lm-eval has no task {unknown[0]!r}; name a folder of your own "
                         "with --include-path")  # fmt: skip

    console = Console(stderr=True)
    with console.status(f"loading {arguments.model}"):
        path = resources.model_folder(arguments.model)
        tokenizer = load_tokenizer(path)
        model = load_denoiser(path, dtype=arguments.dtype, device=device).eval()
    denoiser = DiffusionLM(
        model,
        tokenizer,
        config,
        estimator=arguments.estimator,
        num_views=arguments.num_views,
        block_length=arguments.likelihood_block_length,
        seed=arguments.seed,
        batch_rows=arguments.batch_rows or BATCH_ROWS,
        chat_template_kwargs=template,
    )
    results = simple_evaluate(
        model=denoiser,
        tasks=names,
        num_fewshot=arguments.num_fewshot,
        limit=arguments.limit,
        apply_chat_template=arguments.apply_chat_template,
        system_instruction=arguments.system_instruction,
        task_manager=manager,
        log_samples=arguments.log_samples,
        # The library draws from no global generator; examples are drawn from one of lm-eval's own.
        random_seed=None,
        numpy_random_seed=None,
        torch_random_seed=None,
    )
    Console().print(make_table(results), markup=False, soft_wrap=True)
    if arguments.output is not None:
        written = json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False)
        write_text(arguments.output, written + "\n")
        console.print(f"written to {arguments.output}")
    return 0
