"""The `rl4dlm` command: `train` starts a trainer, `eval` measures a checkpoint, `decode` shows it at work, `convert`
changes its form, `env` says what is installed.

Owns arguments, messages and tables. Heavy libraries are imported by the command that needs them, so `--help` is quick.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import yaml

import rl4dlm
from rl4dlm import resources
from rl4dlm.cli.convert import add_convert_parser

if TYPE_CHECKING:
    from rl4dlm.evaluation import EvaluationResult
    from rl4dlm.rollout.decoding import DecodingConfig
    from rl4dlm.tasks import Task

BAD_INPUT = 2
LAUNCHER_ONLY = (
    "--config_file",
    "--num_processes",
    "--num_machines",
    "--machine_rank",
    "--main_process_ip",
    "--gpu_ids",
)
DTYPES = ("auto", "float32", "bfloat16", "float16")
STOPS = {"yes": True, "no": False, "block": "block"}
OPTIONAL = ("deepspeed", "bitsandbytes", "wandb", "tensorboard", "trackio", "matplotlib")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status. Bad input is status 2 with one line that says what is wrong."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        # The trainer's own flags are not known here, so `train` is taken apart by hand.
        if arguments[:1] == ["train"] and arguments[1:2] not in (["-h"], ["--help"]):
            return train(arguments[1:])
        parsed = _parser().parse_args(arguments)
        command: Callable[[argparse.Namespace], int] = parsed.command
        return command(parsed)
    except (ValueError, OSError, ImportError) as error:
        print(f"rl4dlm: error: {error}", file=sys.stderr)
        return BAD_INPUT


# --- train ------------------------------------------------------------------------------------------------------------


def train(arguments: Sequence[str]) -> NoReturn:
    """Replaces this process by a script of trainers/, or for several processes by `accelerate launch` with it.

    Args:
        arguments: a trainer's name, then `[accelerate options] -- [trainer flags]`, or trainer flags alone.

    Raises:
        ValueError: an unknown trainer, or an option of accelerate where the trainer's flags are.
    """
    sys.stdout.flush()
    os.execv(sys.executable, launch_command(arguments))


def launch_command(arguments: Sequence[str]) -> list[str]:
    """The command that `train` becomes: for one process the script itself, so that signals reach the trainer."""
    folder = resources.find("trainers")
    names = sorted(path.stem for path in folder.glob("*.py"))
    name, *rest = arguments or [""]
    if name not in names:
        given = f"trainer {name!r} is unknown" if name else "train needs the name of a trainer"
        raise ValueError(f"{given}; choose one of {', '.join(names)}")
    launcher, flags = [], rest
    if "--" in rest:
        split = rest.index("--")
        launcher, flags = rest[:split], rest[split + 1 :]
    misplaced = [flag for flag in flags if flag.partition("=")[0] in LAUNCHER_ONLY]
    if misplaced:
        raise ValueError(
            f"{misplaced[0]} belongs to accelerate; its options go before a `--`, the trainer's behind it: "
            f"rl4dlm train {name} {misplaced[0]} ... -- --config ..."
        )
    launcher, flags = _shipped(launcher, "--config_file"), _shipped(flags, "--config")
    script = [str(folder / f"{name}.py"), *flags]
    if _is_one_process(launcher):
        return [sys.executable, *script]
    return [sys.executable, "-m", "accelerate.commands.launch", *launcher, *script]


def _is_one_process(launcher: list[str]) -> bool:
    """Whether options of accelerate ask for one process and nothing else; without any, whether there is one device."""
    if launcher in (["--num_processes", "1"], ["--num_processes=1"]):
        return True
    if len(launcher) == 2 and launcher[0] == "--config_file":
        return _asks_for_one_process(Path(launcher[1]))
    if launcher:
        return False
    cache = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface")) / "accelerate"
    for default in ("default_config.yaml", "default_config.yml", "default_config.json"):
        if (cache / default).is_file():
            return _asks_for_one_process(cache / default)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return "," not in visible
    return len(list(Path("/dev").glob("nvidia[0-9]*"))) <= 1  # without importing torch


def _asks_for_one_process(config: Path) -> bool:
    """Whether a configuration of accelerate says nothing but "one process"."""
    try:
        found = yaml.safe_load(config.read_text())
    except (OSError, yaml.YAMLError):
        return False  # accelerate says what is wrong with it
    if not isinstance(found, dict) or found.get("num_processes") != 1:
        return False
    idle = {
        "num_processes": (1,),
        "compute_environment": ("LOCAL_MACHINE",),
        "distributed_type": ("NO", False),
        "num_machines": (1,),
        "machine_rank": (0,),
        "mixed_precision": ("no", False),
        "main_training_function": ("main",),
        "rdzv_backend": ("static",),
    }
    return all(value in idle.get(name, (False, None)) for name, value in found.items())


def _shipped(arguments: Sequence[str], flag: str) -> list[str]:
    """Lets a configuration that ships with rl4dlm be named as in a checkout, `configs/...`, from any folder."""
    found = list(arguments)
    for i, argument in enumerate(found):
        if i and found[i - 1] == flag and not Path(argument).exists():
            shipped = resources.find("configs").parent / argument
            if argument.startswith("configs/") and shipped.is_file():
                found[i] = str(shipped)
    return found


# --- eval -------------------------------------------------------------------------------------------------------------


def evaluate(arguments: argparse.Namespace) -> int:
    """Measures a checkpoint on tasks; prints a table per task and writes the JSON file after each."""
    from rich.console import Console

    from rl4dlm.evaluation import evaluate, write_results
    from rl4dlm.models.loading import load_denoiser, load_tokenizer

    # Everything that can be wrong is looked at before weights are read.
    device = _device(arguments.device)
    decodings = _decodings(arguments)
    tasks = _load_tasks(_listed("task", arguments.task), arguments.task_args)
    for task in tasks:
        task.dataset(arguments.split)  # raises if there is no such split, or a file or the hub cannot be read
    if arguments.output is not None and Path(arguments.output).is_dir():
        raise ValueError(f"output={arguments.output!r} is a folder; name a .json file")

    console = Console(stderr=True)
    with console.status(f"loading {arguments.model}"):
        tokenizer = load_tokenizer(arguments.model)
        model = load_denoiser(arguments.model, dtype=arguments.dtype, device=device).eval()
    results: list[EvaluationResult] = []
    for task in tasks:
        result = evaluate(
            model,
            tokenizer,
            task,
            decodings=decodings,
            split=arguments.split,
            limit=arguments.limit,
            num_samples=arguments.num_samples,
            seed=arguments.seed,
            batch_rows=arguments.batch_rows,
            chosen_by=arguments.chosen_by,
            progress=True,
        )
        results.append(result)
        _show(result)
        if arguments.output is not None:
            write_results(arguments.output, results)
            console.print(f"written to {arguments.output}")
    return 0


def _decodings(arguments: argparse.Namespace) -> dict[str | int, DecodingConfig]:
    from rl4dlm.rollout.decoding import DecodingConfig

    shared = _decoding_settings(arguments)
    if arguments.steps is None:
        return {arguments.schedule: DecodingConfig(**shared)}
    steps = _numbers("steps", arguments.steps)
    return {step: DecodingConfig(steps=step, **shared) for step in steps}


def _decoding_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `eval` and `decode` have in common, all but the number of steps."""
    from rl4dlm.cli.arguments import mapping

    return {
        "canvas_length": arguments.canvas_length,
        "schedule": arguments.schedule,
        "block_length": arguments.block_length,
        "temperature": arguments.temperature,
        "top_p": arguments.top_p,
        "top_k": arguments.top_k,
        "cfg_scale": arguments.cfg_scale,
        "cache": arguments.cache,
        "stop_at_eos": STOPS[arguments.stop_at_eos],
        "min_new_tokens": arguments.min_new_tokens,
        "eos_penalty": arguments.eos_penalty,
        "eos_penalty_decay": arguments.eos_penalty_decay,
        "suppress_token_ids": _ids("suppress-token-ids", arguments.suppress_token_ids),
        "defer_token_ids": _ids("defer-token-ids", arguments.defer_token_ids),
        "schedule_args": mapping("schedule-args", arguments.schedule_args),
    }


def _load_tasks(names: list[str], given: str | None) -> list[Task]:
    from rl4dlm.cli.arguments import mapping
    from rl4dlm.tasks import load_task

    options = mapping("task-args", given)
    if len(names) == 1:
        return [load_task(names[0], **options)]
    unknown = sorted(set(options) - set(names))
    if unknown or not all(isinstance(value, dict) for value in options.values()):
        problem = f"names {unknown[0]!r}" if unknown else "holds something that is not a mapping"
        raise ValueError(f"task-args {problem}; with several tasks, give each one's options under its name")
    return [load_task(name, **options.get(name, {})) for name in names]


def _device(name: str | None) -> Any:
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise ValueError(f"device={name!r} cannot be used: {error}") from None
    return device


def _show(result: EvaluationResult) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result.task}, {result.split} split, {result.model} (chosen by: {result.chosen_by})")
    further = sorted({name for measured in result.measurements.values() for name in measured.metrics})
    for heading in ("decoding", "solved", "95 % interval", *further, "NFE", "tokens/forward", "length", "n"):
        table.add_column(heading, justify="right")
    for label, measured in result.measurements.items():
        low, high = measured.interval
        table.add_row(
            label,
            f"{measured.solve_rate:.3f}",
            f"{low:.3f} to {high:.3f}",
            *("" if value is None else f"{value:.3f}" for value in map(measured.metrics.get, further)),
            f"{measured.nfe:.1f}",
            f"{measured.tokens_per_forward:.2f}",
            f"{measured.completion_length:.1f}",
            str(measured.prompts) + (f" x {measured.samples}" if measured.samples > 1 else ""),
        )
    Console().print(table)


def _listed(name: str, text: str) -> list[str]:
    values = [value.strip() for value in text.split(",") if value.strip()]
    if not values:
        raise ValueError(f"{name}={text!r} names nothing")
    if len(set(values)) < len(values):
        raise ValueError(f"{name}={text!r} names one thing twice")
    return values


def _ids(name: str, text: str | None) -> tuple[int, ...]:
    return () if text is None else tuple(_numbers(name, text))


def _numbers(name: str, text: str) -> list[int]:
    try:
        return [int(value) for value in _listed(name, text)]
    except ValueError:
        raise ValueError(f"{name}={text!r} is not a list of whole numbers, such as 4,8,16") from None


# --- decode -----------------------------------------------------------------------------------------------------------


def decode(arguments: argparse.Namespace) -> int:
    """Decodes a few prompts, showing each step, and writes a page that replays them."""
    from rich.console import Console

    from rl4dlm.evaluation.measure import encode_prompt
    from rl4dlm.models.loading import check_tokenizer, load_denoiser, load_tokenizer
    from rl4dlm.rollout.decoding import DecodingConfig
    from rl4dlm.rollout.engine import RolloutEngine
    from rl4dlm.tracking.page import write_page
    from rl4dlm.tracking.replay import make_replay, printable
    from rl4dlm.tracking.terminal import LiveView, draw, replay_frames, write_svg

    device = _device(arguments.device)
    config = DecodingConfig(steps=arguments.steps, **_decoding_settings(arguments))
    prompts = _prompts(arguments)
    pictured = None if arguments.svg_steps is None else _numbers("svg-steps", arguments.svg_steps)
    for name in ("output", "svg"):
        path = getattr(arguments, name)
        if path is not None and Path(path).is_dir():
            raise ValueError(f"{name}={path!r} is a folder; name a file")

    console, quiet = Console(), Console(stderr=True)
    with quiet.status(f"loading {arguments.model}"):
        tokenizer = load_tokenizer(arguments.model)
        model = load_denoiser(arguments.model, dtype=arguments.dtype, device=device).eval()
    engine = RolloutEngine(model, max_batch_rows=arguments.batch_rows)
    check_tokenizer(tokenizer, engine.spec)
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
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
    (task,) = _load_tasks([arguments.task], arguments.task_args)
    dataset = task.dataset(arguments.split)
    if "prompt" not in dataset.column_names:
        raise ValueError(f"task {task.name!r} has no column 'prompt', only {dataset.column_names}")
    return list(dataset.select(range(min(arguments.limit, len(dataset))))["prompt"])


# --- env --------------------------------------------------------------------------------------------------------------


def env(_: argparse.Namespace) -> int:
    """Prints versions, devices, optional packages and where the folders are that ship with rl4dlm."""
    from rl4dlm.evaluation import machine, versions

    found = machine()
    lines = {
        **versions(),
        "system": found["system"],
        "processor": f"{found['cpu']}, {found['cores']} cores, {found['memory_gib']} GiB",
        "GPUs": ", ".join(found["gpus"]) or "none",
        **{name: _version(name) for name in OPTIONAL},
        **{f"{folder}/": str(resources.find(folder)) for folder in resources.FOLDERS},
    }
    for name, value in lines.items():
        print(f"{name:<14} {value}")
    return 0


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed (optional)"


# --- arguments --------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rl4dlm",
        description="Reinforcement-learning post-training of diffusion language models.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"rl4dlm {rl4dlm.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    described = "Start a trainer: a script of trainers/, by `accelerate launch` where there are several processes."
    command = commands.add_parser(
        "train",
        help=described,
        description=described,
        usage="rl4dlm train NAME [trainer flags]\n       rl4dlm train NAME [accelerate options] -- [trainer flags]",
        epilog=f"Trainers: {', '.join(sorted(path.stem for path in resources.find('trainers').glob('*.py')))}. "
        "`accelerate launch --help` lists the options of accelerate, `rl4dlm train NAME --help` the trainer's flags.",
    )
    command.set_defaults(command=lambda _: 0)

    described = "Measure how often a checkpoint solves a task, and how many forwards that takes."
    command = commands.add_parser("eval", help=described, description=described, allow_abbrev=False)
    command.set_defaults(command=evaluate)
    add = command.add_argument
    add("--model", required=True, help="model folder, adapter folder or hub id")
    add("--task", required=True, help="names of tasks, with commas between them")
    add("--task-args", metavar="JSON", help="options of the task; with several tasks, an object per name")
    add("--split", default="test", help="split of the task (default: %(default)s)")
    add("--limit", type=_count, metavar="N", help="use the first N prompts at most")
    add("--steps", help="numbers of denoising steps to measure, with commas between them (default: half the canvas)")
    _add_decoding_flags(add)
    add("--chosen-by", default="not stated", metavar="TEXT", help="how this checkpoint was chosen, for the record")
    add("--output", metavar="FILE", help="JSON file to write")

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
    add("--limit", type=_count, default=1, metavar="N", help="first N prompts of the task (default: %(default)s)")
    add("--steps", type=_count, metavar="N", help="denoising steps (default: half the canvas)")
    _add_decoding_flags(add)
    add("--colour", default="step", choices=("step", "confidence"), help="what colours show (default: %(default)s)")
    add("--delay", type=_seconds, default=0.0, metavar="SECONDS", help="wait after each step (default: %(default)s)")
    add("--output", default="replay.html", metavar="FILE", help="page to write (default: %(default)s)")
    add("--svg", metavar="FILE", help="write a picture of the terminal, too")
    add("--svg-steps", metavar="LIST", help="steps that it shows, with commas between them (default: halfway)")

    add_convert_parser(commands)

    described = "Print versions, devices, optional packages and folders."
    command = commands.add_parser("env", help=described, description=described)
    command.set_defaults(command=env)
    return parser


def _add_decoding_flags(add: Callable[..., Any]) -> None:
    """How to decode, and on what."""
    add("--schedule", default="low_confidence", help="decoding schedule (default: %(default)s)")
    add("--schedule-args", metavar="JSON", help="settings of the schedule")
    add("--canvas-length", type=int, default=256, metavar="N", help="completion slots (default: %(default)s)")
    add("--block-length", type=int, metavar="N", help="length of the blocks written left to right (default: one block)")
    add("--temperature", type=float, default=0.0, help="0 takes the most probable token (default: %(default)s)")
    add("--top-p", type=float, default=1.0, help="keep the most probable tokens that reach it (default: %(default)s)")
    add("--top-k", type=int, default=0, help="keep that many tokens; 0 is off (default: %(default)s)")
    add("--cfg-scale", type=float, default=0.0, help="classifier-free guidance; 0 is off (default: %(default)s)")
    add("--cache", default="none", help="cache policy (default: %(default)s)")
    add("--stop-at-eos", default="yes", choices=STOPS, help="when rows stop early (default: %(default)s)")
    add("--min-new-tokens", type=int, default=0, metavar="N", help="no end before that many tokens (default: none)")
    add("--eos-penalty", type=float, default=0.0, help="off the logits of end tokens (default: %(default)s)")
    add("--eos-penalty-decay", action="store_true", help="multiply it by the share of the canvas that is still open")
    add("--suppress-token-ids", metavar="LIST", help="tokens that are never drawn, with commas between them")
    add("--defer-token-ids", metavar="LIST", help="tokens that are written only when nothing else can be")
    add("--num-samples", type=_count, default=1, metavar="N", help="completions per prompt (default: %(default)s)")
    add("--seed", type=int, default=0, help="keys every draw (default: %(default)s)")
    add("--batch-rows", type=_count, metavar="N", help="completions decoded at the same time (default: all)")
    add("--dtype", default="auto", choices=DTYPES, help="of the weights (default: %(default)s, as saved)")
    add("--device", help="for example cpu or cuda:1 (default: a GPU if there is one)")


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not allowed; it must be 1 or larger")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not allowed; it must be 0 or larger, and finite")
    return value


if __name__ == "__main__":
    sys.exit(main())
