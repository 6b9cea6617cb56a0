"""What is installed is what the checkout holds: dependencies are declared and pinned, the wheel is complete, and the
files for `accelerate launch` are understood by it.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import rl4dlm
from rl4dlm import resources

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
ACCELERATE_CONFIGS = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))


def requirements(lines: list[str]) -> dict[str, Requirement]:
    parsed = map(Requirement, lines)
    return {canonicalize_name(r.name): r for r in parsed if canonicalize_name(r.name) != "rl4dlm"}


DECLARED = requirements([*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)])


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {
        canonicalize_name(name): version
        for name, version in (line.split("==") for line in lines if line and line[0] != "#")
    }


@pytest.mark.parametrize("name", sorted(DECLARED))
def test_every_dependency_has_a_tested_version_within_its_bounds(name):
    assert name in pins(), f"constraints.txt does not say which {name} is tested"
    assert DECLARED[name].specifier, f"pyproject.toml gives no bound for {name}"
    assert DECLARED[name].specifier.contains(pins()[name])


@pytest.mark.parametrize("folder", ["rl4dlm", "rewards", "trainers"])
def test_every_imported_package_is_declared(folder):
    distributions = metadata.packages_distributions()
    undeclared = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module]
            for package in {module.partition(".")[0] for module in modules} - sys.stdlib_module_names - {"rl4dlm"}:
                owners = {canonicalize_name(owner) for owner in distributions.get(package, [package])}
                if owners.isdisjoint(DECLARED):
                    undeclared.add(f"{path.relative_to(ROOT)} imports {package}")
    assert not undeclared


def test_one_version_everywhere():
    assert metadata.version("rl4dlm") == rl4dlm.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == rl4dlm.__version__
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    build = "import hatchling.build, sys; print(hatchling.build.build_wheel(sys.argv[1]))"
    printed = subprocess.run(
        [sys.executable, "-c", build, str(folder)], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    with zipfile.ZipFile(folder / printed.split()[-1]) as archive:
        yield archive


@pytest.mark.parametrize("folder", ["rl4dlm", *resources.FOLDERS])
def test_the_wheel_holds_every_file(wheel, folder):
    prefix = "rl4dlm/" if folder == "rl4dlm" else f"rl4dlm/_bundled/{folder}/"
    here = {
        prefix + path.relative_to(ROOT / folder).as_posix()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    packed = {name for name in wheel.namelist() if name.startswith(prefix)}
    if folder == "rl4dlm":
        packed = {name for name in packed if not name.startswith("rl4dlm/_bundled/")}
        assert "rl4dlm/py.typed" in packed
    assert here and packed == here


def test_the_wheel_holds_nothing_else(wheel):
    top = {name.partition("/")[0] for name in wheel.namelist()}
    assert top == {"rl4dlm", f"rl4dlm-{rl4dlm.__version__}.dist-info"}


def test_the_unpacked_wheel_finds_its_folders(wheel, tmp_path):
    wheel.extractall(tmp_path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from rl4dlm import resources\n"
        "print(*map(resources.find, resources.FOLDERS), sep='\\n')"
    )
    printed = subprocess.run(
        [sys.executable, "-I", "-c", code, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert printed.splitlines() == [str(tmp_path / "rl4dlm" / "_bundled" / folder) for folder in resources.FOLDERS]


def test_the_metadata_says_what_is_needed(wheel):
    dist_info = f"rl4dlm-{rl4dlm.__version__}.dist-info"
    about = metadata.PathDistribution(zipfile.Path(wheel, f"{dist_info}/"))
    assert about.metadata["License-Expression"] == "Apache-2.0"
    assert about.metadata["Requires-Python"] == ">=3.11"
    assert "Apache License" in wheel.read(f"{dist_info}/licenses/LICENSE").decode()
    (script,) = about.entry_points.select(group="console_scripts")
    assert (script.name, script.value) == ("rl4dlm", "rl4dlm.cli:main")
    assert callable(script.load())


def test_make_prints_every_command():
    printed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    listed = re.findall(r"^  make (\S+)", printed, flags=re.MULTILINE)
    assert {"demo", "demo-checkpoint", "test", "lint", "bench", "help"} <= set(listed)


@pytest.mark.parametrize("target", ["demo", "test"])
def test_make_refuses_an_old_python(tmp_path, target):
    old = tmp_path / "python3.9"
    old.write_text(
        '#!/bin/sh\nexec "$REAL_PYTHON" -c "import sys; sys.version = \'3.9.2\'; sys.version_info = (3, 9); $2"\n'
    )
    old.chmod(0o755)
    outcome = subprocess.run(
        ["make", target, f"PYTHON={old}", f"VENV={tmp_path / 'venv'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "REAL_PYTHON": sys.executable},
    )
    assert outcome.returncode != 0
    assert "needs Python 3.11 or newer" in outcome.stderr and "3.9.2" in outcome.stderr
    assert not (tmp_path / "venv").exists()


def test_there_is_a_file_for_every_way_to_launch():
    assert [path.stem for path in ACCELERATE_CONFIGS] == [
        "fsdp2", "multi_gpu", "multi_node", "one_process", "zero2", "zero3",
    ]  # fmt: skip


@pytest.mark.parametrize("path", ACCELERATE_CONFIGS, ids=lambda path: path.stem)
def test_accelerate_understands_its_configuration(path):
    from accelerate.commands import launch
    from accelerate.utils import DistributedType

    parser = launch.launch_command_parser()
    arguments = parser.parse_args(["--config_file", str(path), "script.py"])
    flags = set(vars(arguments))
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    # accelerate checks the names at the top level itself; inside a section it ignores what it does not know.
    for section in ("deepspeed_config", "fsdp_config"):
        assert set(settings.get(section, {})) <= flags

    arguments, defaults, precision_from_file = launch._validate_launch_command(arguments)
    kind = defaults.distributed_type
    assert arguments.use_deepspeed == (kind == DistributedType.DEEPSPEED)
    assert arguments.use_fsdp == (kind == DistributedType.FSDP)
    assert arguments.multi_gpu == (kind == DistributedType.MULTI_GPU)
    assert arguments.num_processes == settings["num_processes"]
    assert (arguments.num_processes > 1) == (kind != DistributedType.NO)
    assert arguments.num_machines == (2 if path.stem == "multi_node" else 1)
    # Precision is said once, in the training configuration.
    assert precision_from_file and arguments.mixed_precision == "no"
    if path.stem.startswith("zero"):
        assert arguments.zero_stage == int(path.stem[-1])
    if path.stem == "fsdp2":
        assert int(arguments.fsdp_version) == 2
