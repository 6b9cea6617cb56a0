"""Finds the folders that ship beside the library: trainers/, rewards/ and configs/, and the demo checkpoint.

Owns where they are, in a checkout (also `pip install -e .`) and in an installed wheel. What lies in them is read
elsewhere.
"""

from __future__ import annotations

from pathlib import Path

FOLDERS = ("trainers", "rewards", "configs")
DEMO_CHECKPOINT = "examples/demo_checkpoint"

_PACKAGE = Path(__file__).resolve().parent


def find(folder: str) -> Path:
    """The absolute path of a folder that ships with rl4dlm.

    Args:
        folder: one of `FOLDERS`.

    Raises:
        ValueError: `folder` is not one of `FOLDERS`.
        FileNotFoundError: neither the installed package nor a checkout has it.
    """
    if folder not in FOLDERS:
        raise ValueError(f"folder={folder!r} does not ship with rl4dlm; choose one of {', '.join(FOLDERS)}")
    bundled = _PACKAGE / "_bundled" / folder
    if bundled.is_dir():
        return bundled
    checkout = _PACKAGE.parent
    # pyproject.toml tells a checkout from site-packages, where some other package may own a folder of this name.
    if (checkout / "pyproject.toml").is_file() and (checkout / folder).is_dir():
        return checkout / folder
    raise FileNotFoundError(
        f"rl4dlm's {folder}/ is neither in the installed package ({bundled}) nor in a checkout "
        f"({checkout / folder}); reinstall rl4dlm from a complete wheel or checkout"
    )


def model_folder(path: str) -> str:
    """A model's path as given, or where the demo checkpoint that ships with rl4dlm lies, if that is what it names.

    So `examples/demo_checkpoint`, as the tiny configurations have it, works from any folder.
    """
    if path != DEMO_CHECKPOINT or Path(path).exists():
        return path
    places = (_PACKAGE / "_bundled" / path, _PACKAGE.parent / path)
    return next((str(place) for place in places if (place / "config.json").is_file()), path)
