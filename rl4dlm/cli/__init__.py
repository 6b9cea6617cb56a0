"""The `rl4dlm` command: `train` starts a trainer, `eval` measures a checkpoint, `compare` sets two
measurements against each other, `lm-eval` runs tasks of that harness, `serve` answers OpenAI's clients, `decode` shows
it at work, `filter` keeps prompts that it can learn from, `convert` changes its form, `merge` puts an adapter into its
base, `env` says what is installed.

Owns the way from arguments to a command and what becomes of its errors; each command has a file of its own. Heavy
libraries are imported by the command that needs them, so `--help` is quick.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import rl4dlm
from rl4dlm.cli.compare import add_compare_parser
from rl4dlm.cli.convert import add_convert_parser
from rl4dlm.cli.decode import add_decode_parser
from rl4dlm.cli.env import add_env_parser
from rl4dlm.cli.eval import add_eval_parser
from rl4dlm.cli.filter import add_filter_parser
from rl4dlm.cli.lm_eval import add_lm_eval_parser
from rl4dlm.cli.merge import add_merge_parser
from rl4dlm.cli.serve import add_serve_parser
from rl4dlm.cli.train import add_train_parser, launch_command, train

__all__ = ["BAD_INPUT", "launch_command", "main", "train"]

BAD_INPUT = 2


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rl4dlm",
        description="Reinforcement-learning post-training of diffusion language models.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"rl4dlm {rl4dlm.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in (
        add_train_parser,
        add_eval_parser,
        add_compare_parser,
        add_lm_eval_parser,
        add_serve_parser,
        add_decode_parser,
        add_filter_parser,
        add_convert_parser,
        add_merge_parser,
        add_env_parser,
    ):
        add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
