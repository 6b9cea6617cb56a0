"""What a script in trainers/ says when something is wrong with what it was given: one line and an exit status.

Owns the choice between a line and a traceback. A line says all there is to know of a setting that is not allowed; of
what goes wrong while a run is on, where it happened counts.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

BAD_INPUT = 2
TRACEBACK = "RL4DLM_TRACEBACK"
"""Environment variable: set, errors are tracebacks always."""

_LIBRARY = str(Path(__file__).resolve().parent.parent) + os.sep


def start(main: Callable[[], Any]) -> None:
    """Runs a script; ends the process with `BAD_INPUT` and one line on stderr for bad input.

    Bad input is a ValueError, TypeError, OSError or ImportError before training starts, or one that the library itself
    raises at any time. Everything else keeps its traceback.
    """
    try:
        main()
    except (ValueError, TypeError, OSError, ImportError) as error:
        if os.environ.get(TRACEBACK) or not is_bad_input(error):
            raise
        said = " ".join(str(error).split()) or type(error).__name__
        sys.stderr.write(f"{Path(sys.argv[0]).name}: error: {said} ({TRACEBACK}=1 shows where)\n")
        sys.exit(BAD_INPUT)


def is_bad_input(error: BaseException) -> bool:
    """Whether an error speaks for itself; see `start`."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return False
    training = any(frame.name == "_inner_training_loop" for frame in frames)
    ours = frames[-1].filename.startswith(_LIBRARY)
    if training:  # a server that is gone while a run is on is nobody's input; before, its address may be wrong
        return ours and not isinstance(error, TypeError | ConnectionError)
    return ours or isinstance(error, ValueError | OSError)
