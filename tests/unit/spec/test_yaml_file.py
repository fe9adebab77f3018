"""The loader of settings: numbers and texts, and files that are refused without a traceback."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from syncline.errors import ConfigError
from syncline.spec.yaml_file import read_yaml


def read(tmp_path: Path, text: str) -> Any:
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    return read_yaml(path)


def refused(tmp_path: Path, text: str) -> str:
    with pytest.raises(ConfigError) as error:
        read(tmp_path, text)
    assert error.value.hint, "an error says what to do"
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1e5", 1e5),
        ("1E+3", 1e3),
        ("-1e-4", -1e-4),
        (".5", 0.5),
        ("5.", 5.0),
        ("1.5e-3", 1.5e-3),
        ("1_000.5", 1000.5),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("7", 7),
        ("-7", -7),
        ("1_000", 1000),
        ("010", 10),
        ("0x1f", 31),
        ("0o17", 15),
        ("18446744073709551615", 2**64 - 1),
        ("12:30", "12:30"),
        ("2026-01-31", "2026-01-31"),
        ("1e", "1e"),
        ("1.2.3", "1.2.3"),
        ("'1e-4'", "1e-4"),
        ("yes", True),
        ("~", None),
        ("=", "="),
    ],
)
def test_a_plain_value_has_the_type_that_it_looks_like(tmp_path: Path, text: str, value: Any) -> None:
    (read_value,) = read(tmp_path, f"a: {text}").values()
    assert read_value == value and type(read_value) is type(value)


def test_a_value_that_is_not_a_number_is_read(tmp_path: Path) -> None:
    assert math.isnan(read(tmp_path, "a: .nan")["a"])


def test_names_are_texts_and_merge_keys_work(tmp_path: Path) -> None:
    text = "base: &base {1: x, true: y}\nmore: {<<: *base, 1: z}\n"
    assert read(tmp_path, text) == {"base": {"1": "x", "true": "y"}, "more": {"1": "z", "true": "y"}}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: {b: 1e400}", "a.b: line 1: 1e400 is not a number"),
        ("a: " + "9" * 5000, "a: line 1: 99999999999999999999… (5000 characters) is not a whole number of 64 bits"),
        ("a: [1, 18446744073709551616]", "a: line 1: 18446744073709551616 is not a whole number of 64 bits"),
        ("a: !!int x", "a: line 1: x is not a whole number of 64 bits"),
        ("a: !!float x", "a: line 1: x is not a number"),
        ("a: !!bool x", "a: line 1: x is not a boolean"),
        ("b: 1\n? [a]\n: 1", "spec: line 2: a list stands where the name of a setting belongs"),
        ("{[a]: 1}", "spec: line 1: a list stands where the name of a setting belongs"),
        ("a:\n  {b: 1}: 1", "a: line 2: a section stands where the name of a setting belongs"),
        ("a: " + "[" * 3000 + "]" * 3000, "spec: line 1: sections are nested more than 100 deep"),
        ("a: " + "{a: " * 3000 + "}" * 3000, "spec: line 1: sections are nested more than 100 deep"),
        ("a: &a [*a]", "spec: line 1: an alias is used inside the value that it names"),
        ("a: &a {b: *a}", "spec: line 1: an alias is used inside the value that it names"),
        ("a: {<<: &x {<<: *x}}", "spec: line 1: an alias is used inside the value that it names"),
    ],
)  # fmt: skip
def test_a_file_that_would_end_in_a_traceback_is_refused(tmp_path: Path, text: str, said: str) -> None:
    assert refused(tmp_path, text).startswith(said)


@pytest.mark.parametrize("value", ["!!timestamp x", "!!binary ////", "!!set {a}", "!!map [1]", "!!int [1]", "!foo x"])
def test_a_tag_that_no_setting_needs_is_refused(tmp_path: Path, value: str) -> None:
    assert "is not YAML" in refused(tmp_path, f"a: {value}")


def test_aliases_that_stand_for_too_many_values_are_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)]
    assert "more than 100000 values" in refused(tmp_path, "\n".join(lines))


def test_a_file_without_end_is_refused(tmp_path: Path) -> None:
    assert "is larger than 1 MiB" in refused(tmp_path, "# " + "x" * (1 << 20))
