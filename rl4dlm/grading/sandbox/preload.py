"""Packages that a server has beside the standard library: trusted code, imported once and before anything is sealed.

Owns which folders that takes, which the trainer's side finds, and the import, which the server's side does. The modules
of this library among them are imported without what their packages import: `rl4dlm` and `rl4dlm.grading` are empty
there.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

_FOLDERS = ("site-packages", "dist-packages")
# What a server that preloads gets of the environment. Libraries that start threads when they are imported could not be
# forked.
_ONE_THREAD = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")
_PASSED_ON = ("LD_LIBRARY_PATH",)


class Preload(NamedTuple):
    """What a server has, beside the standard library.

    Attributes:
        modules: `package.module`, or `package.module:name`, whose name must be there.
        paths: folders in which they and what they import are found. Programs may read them.
    """

    modules: Sequence[str] = ()
    paths: Sequence[str] = ()


def find(modules: Sequence[str]) -> Preload:
    """The folders of this environment's packages, and those in which modules lie that are found elsewhere."""
    if not modules:
        return Preload()
    import importlib.util  # not in the server: each module makes every fork dearer

    known = [os.path.abspath(path) for path in sys.path]
    wanted = {path for path in known if os.path.basename(path) in _FOLDERS}
    for name in modules:
        top = name.partition(":")[0].partition(".")[0]
        if top == __name__.partition(".")[0] or top in sys.stdlib_module_names:
            continue
        spec = importlib.util.find_spec(top)
        if spec is None:
            continue  # which the server will say
        places = spec.submodule_search_locations or ([spec.origin] if spec.origin and spec.has_location else [])
        wanted |= {os.path.dirname(os.path.abspath(place)) for place in places}
    found = [path for path in [*sorted(wanted - set(known)), *known] if path in wanted and os.path.isdir(path)]
    return Preload(tuple(modules), tuple(dict.fromkeys(found)))


def environment(preload: Preload) -> dict[str, str]:
    """Of the server's process."""
    if not preload.modules:
        return {}
    return dict.fromkeys(_ONE_THREAD, "1") | {name: os.environ[name] for name in _PASSED_ON if name in os.environ}


def load(preload: Preload) -> str:
    """Imports the modules, in the server; "" or why that cannot be done."""
    sys.path += preload.paths
    if preload.modules:
        import logging

        logging.disable(logging.CRITICAL)  # no one reads what they log
    for name in preload.modules:
        module, _, attribute = name.partition(":")
        try:
            found = importlib.import_module(module)
            if attribute:
                getattr(found, attribute)
        except Exception as error:
            return f"{name} could not be imported: {type(error).__name__}: {error}"
    tasks = "/proc/self/task"
    if os.path.isdir(tasks) and len(os.listdir(tasks)) > 1:
        return f"importing {', '.join(preload.modules)} starts threads, and a process that has some cannot be forked"
    return ""
