"""A missing extra is an error that names the setting, the package and the extra."""

from __future__ import annotations

import importlib.util

import pytest

from syncline.errors import ConfigError
from syncline.extras import require_modules


def test_installed_modules_are_accepted_and_not_imported() -> None:
    require_modules("demo", "local", "json", "xml.etree")


@pytest.mark.parametrize("module", ["no_such_package", "no_such_package.part", "json.no_such_part"])
def test_a_missing_module_names_the_extra(module: str) -> None:
    with pytest.raises(ConfigError) as caught:
        require_modules("demo", "local", "json", module)
    assert (caught.value.setting, caught.value.hint) == ("demo", "Run: pip install 'syncline[local]'")
    assert module in caught.value.problem


def test_the_error_is_that_of_the_first_missing_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="the Python package a is not installed"):
        require_modules("demo", "local", "a", "b")
