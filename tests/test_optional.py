"""A missing optional dependency is named together with the extra that brings it."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from rl4dlm import _optional
from rl4dlm.cli import main


def test_an_installed_package_is_returned():
    import json.decoder

    assert _optional.require("json.decoder", extra="plots", purpose="a test") is json.decoder


@pytest.mark.parametrize("module", ["no_such_package", "no_such_package.pyplot"])
def test_a_missing_package_is_named_with_its_extra(module):
    with pytest.raises(ImportError, match=r"the plot needs no_such_package.*pip install 'rl4dlm\[plots\]'"):
        _optional.require(module, extra="plots", purpose="the plot")


def test_a_package_broken_inside_keeps_its_own_error(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        _optional.require("broken_package", extra="plots", purpose="the plot")


@pytest.mark.skipif(find_spec("fastapi") is not None, reason="FastAPI is installed")
def test_the_command_that_serves_says_what_to_install(capsys):
    assert main(["serve", "--model", "no_such_model"]) == 2
    assert "rl4dlm serve needs fastapi, which is not installed: pip install 'rl4dlm[serve]'" in capsys.readouterr().err


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_the_command_for_lm_eval_says_what_to_install(capsys):
    assert main(["lm-eval", "--model", "no_such_model", "--tasks", "gsm8k"]) == 2
    assert (
        "rl4dlm lm-eval needs lm_eval, which is not installed: pip install 'rl4dlm[lm-eval]'" in capsys.readouterr().err
    )
