"""`rl4dlm decode`: prompts denoised in the terminal, and a page that replays it; drawn by `rl4dlm.tracking`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rl4dlm import resources
from rl4dlm.cli.decoding import add_decoding_flags, count, decoding_settings, device_of, named_tasks, numbers, seconds


def add_decode_parser(commands: Any) -> None:
    """Adds the command to the subparsers of `rl4dlm`; its function is in `command` of the parsed arguments."""
    described = "Show a checkpoint denoise prompts, step by step, and write a page that replays it."
    command = commands.add_parser("decode", help=described, description=described, allow_abbrev=False)
    command.set_defaults(command=decode)
    add = command.add_argument
    add("--model", required=True, help="model folder, adapter folder or hub id")
    add("--prompt", action="append", metavar="TEXT", help="a prompt; may be given several times")
    add("--chat", action="store_true", help="prompts are a user's messages, for the tokenizer's chat template")
    add("--task", help="take prompts from this task instead")
    add("--task-args", metavar="JSON", help="options of the task")
    add("--split", default="test", help="split of the task (default: %(default)s)")
    add("--limit", type=count, default=1, metavar="N", help="first N prompts of the task (default: %(default)s)")
    add("--steps", type=count, metavar="N", help="denoising steps (default: half the canvas)")
    add_decoding_flags(add)
    add("--colour", default="step", choices=("step", "confidence"), help="what colours show (default: %(default)s)")
    add("--delay", type=seconds, default=0.0, metavar="SECONDS", help="wait after each step (default: %(default)s)")
    add("--output", default="replay.html", metavar="FILE", help="page to write (default: %(default)s)")
    add("--svg", metavar="FILE", help="write a picture of the terminal, too")
    add("--svg-steps", metavar="LIST", help="steps that it shows, with commas between them (default: halfway)")


def decode(arguments: argparse.Namespace) -> int:
    """Decodes a few prompts, showing each step, and writes a page that replays them."""
    from rich.console import Console

    from rl4dlm.cli.arguments import mapping
    from rl4dlm.models.loading import check_tokenizer, load_denoiser, load_tokenizer
    from rl4dlm.models.taught import warn_of_canvas
    from rl4dlm.rollout.decoding import DecodingConfig
    from rl4dlm.rollout.engine import RolloutEngine
    from rl4dlm.tasks.prompts import encode_prompt
    from rl4dlm.tracking.page import write_page
    from rl4dlm.tracking.replay import make_replay, printable
    from rl4dlm.tracking.terminal import LiveView, draw, replay_frames, write_svg

    device = device_of(arguments.device)
    config = DecodingConfig(steps=arguments.steps, **decoding_settings(arguments))
    prompts = _prompts(arguments)
    template = mapping("chat-template-kwargs", arguments.chat_template_kwargs)
    pictured = None if arguments.svg_steps is None else numbers("svg-steps", arguments.svg_steps)
    for name in ("output", "svg"):
        path = getattr(arguments, name)
        if path is not None and Path(path).is_dir():
            raise ValueError(f"{name}={path!r} is a folder; name a file")

    console, quiet = Console(), Console(stderr=True)
    with quiet.status(f"loading {arguments.model}"):
        path = resources.model_folder(arguments.model)
        tokenizer = load_tokenizer(path)
        model = load_denoiser(path, dtype=arguments.dtype, device=device).eval()
    engine = RolloutEngine(model, max_batch_rows=arguments.batch_rows)
    check_tokenizer(tokenizer, engine.spec)
    warn_of_canvas(model, config.canvas_length)
    ids = [encode_prompt(tokenizer, prompt, chat_template_kwargs=template) for prompt in prompts]
    view = LiveView(
        tokenizer,
        [printable(tokenizer.decode(prompt)) for prompt in ids for _ in range(arguments.num_samples)],
        last_step=config.steps_per_block * config.num_blocks - 1,
        forwards_per_step=1 + (config.cfg_scale > 0),
        colour=arguments.colour,
        delay=arguments.delay,
        console=console,
    )
    with view:
        rollout = engine.generate(
            ids,
            config,
            num_generations=arguments.num_samples,
            seed=arguments.seed,
            on_step=view if engine.spec.noise == "mask" else None,  # canvases of random tokens report no steps
        )
    replay = make_replay(rollout, tokenizer, blocks=view.blocks.rows)
    console.print(draw(replay_frames(replay), replay.texts, colour=arguments.colour, width=console.width))
    write_page(arguments.output, replay)
    quiet.print(f"written to {arguments.output}")
    if arguments.svg is not None:
        last = max(row.steps for row in replay.rows)
        steps = pictured or [last // 2]
        if not all(0 <= step <= last for step in steps):
            raise ValueError(f"svg-steps={arguments.svg_steps!r} is not allowed; this rollout has steps 0 to {last}")
        frames = [frame for step in steps for frame in replay_frames(replay, step)]
        write_svg(arguments.svg, frames, replay.texts, arguments.colour)
        quiet.print(f"written to {arguments.svg}")
    return 0


def _prompts(arguments: argparse.Namespace) -> list[Any]:
    """Texts or lists of messages, from `--prompt` or from a task."""
    if (arguments.prompt is None) == (arguments.task is None):
        raise ValueError("decode needs prompts: either --prompt, once or more, or --task")
    if arguments.prompt is not None:
        return [[{"role": "user", "content": text}] if arguments.chat else text for text in arguments.prompt]
    (task,) = named_tasks([arguments.task], arguments.task_args)
    dataset = task.dataset(arguments.split)
    if "prompt" not in dataset.column_names:
        raise ValueError(f"task {task.name!r} has no column 'prompt', only {dataset.column_names}")
    return list(dataset.select(range(min(arguments.limit, len(dataset))))["prompt"])
