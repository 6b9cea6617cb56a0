"""The folders beside the library are found in a checkout and in a wheel; test_packaging.py builds a real wheel."""

from __future__ import annotations

from pathlib import Path

import pytest

from rl4dlm import resources


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """An installed package with nothing beside it, which `resources` takes for its own."""
    folder = tmp_path / "site-packages" / "rl4dlm"
    folder.mkdir(parents=True)
    monkeypatch.setattr(resources, "_PACKAGE", folder)
    return folder


@pytest.mark.parametrize("folder", resources.FOLDERS)
def test_the_wheel_comes_before_a_checkout(package, folder):
    (package / "_bundled" / folder).mkdir(parents=True)
    (package.parent / "pyproject.toml").touch()
    (package.parent / folder).mkdir()
    assert resources.find(folder) == package / "_bundled" / folder


@pytest.mark.parametrize("folder", resources.FOLDERS)
def test_a_checkout_has_it_beside_the_package(package, folder):
    (package.parent / "pyproject.toml").touch()
    (package.parent / folder).mkdir()
    assert resources.find(folder) == package.parent / folder


def test_a_folder_of_another_package_is_not_ours(package):
    (package.parent / "configs").mkdir()
    with pytest.raises(FileNotFoundError, match=r"configs/ .*reinstall"):
        resources.find("configs")


def test_an_absent_folder_is_named_with_both_places(package):
    with pytest.raises(FileNotFoundError) as error:
        resources.find("rewards")
    assert str(package / "_bundled" / "rewards") in str(error.value)
    assert str(package.parent / "rewards") in str(error.value)


@pytest.mark.parametrize("folder", ["data", "", "../configs", "configs/accelerate"])
def test_other_folders_are_refused_with_the_allowed_ones(folder):
    with pytest.raises(ValueError) as error:
        resources.find(folder)
    assert repr(folder) in str(error.value)
    assert all(name in str(error.value) for name in resources.FOLDERS)


def test_p4_the_demo_checkpoint_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = Path(resources.model_folder("examples/demo_checkpoint"))
    assert (found / "model.safetensors").is_file()
    assert resources.model_folder("owner/model") == "owner/model"
    (tmp_path / "examples" / "demo_checkpoint").mkdir(parents=True)
    assert resources.model_folder("examples/demo_checkpoint") == "examples/demo_checkpoint"  # the user's own
