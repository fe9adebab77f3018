"""The public API of `import syncline`: its names, and that importing it costs nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

import syncline


def test_the_public_names_are_those_of_the_modules() -> None:
    from syncline.client.client import connect, local_fleet
    from syncline.data.partition import Part
    from syncline.spec.run_spec import RunSpec, load_spec
    from syncline.tasks.base import Task

    assert syncline.__all__ == sorted(syncline.__all__)
    assert [getattr(syncline, name) for name in syncline.__all__] == [
        Part,
        RunSpec,
        Task,
        connect,
        load_spec,
        local_fleet,
    ]
    assert set(syncline.__all__) <= set(dir(syncline))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'conect'"):
        _ = syncline.conect


@pytest.mark.parametrize("use", ["", "syncline.RunSpec, syncline.load_spec, syncline.connect, syncline.local_fleet"])
def test_importing_the_library_and_using_the_client_imports_no_torch(use: str) -> None:
    code = (
        f"import sys, syncline\n({use})\nprint([m for m in ('torch', 'sklearn', 'syncline_cli') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
