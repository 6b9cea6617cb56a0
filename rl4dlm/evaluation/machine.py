"""What ran a measurement: processor, accelerators and library versions. The machine is described, never named."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import rl4dlm

PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft", "datasets")


def machine() -> dict[str, Any]:
    """Processor model, the cores this process may use, torch's threads, memory in GiB, and the accelerators."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def versions() -> dict[str, str]:
    """Versions of Python, rl4dlm and the libraries it stands on."""
    return {
        "python": ".".join(map(str, sys.version_info[:3])),
        "rl4dlm": rl4dlm.__version__,
        **{name: metadata.version(name) for name in PACKAGES},
    }


def commit() -> str | None:
    """The commit that this library is of: that of an installation from a repository, or of a checkout; None: unknown.

    A checkout with changes that are not committed has `+` behind it.
    """
    with contextlib.suppress(metadata.PackageNotFoundError, ValueError):
        origin = json.loads(metadata.distribution("rl4dlm").read_text("direct_url.json") or "{}")
        if found := origin.get("vcs_info", {}).get("commit_id"):
            return str(found)
    checkout = Path(rl4dlm.__file__).resolve().parents[1]
    if not (checkout / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(checkout), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model", "cpu model") and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
