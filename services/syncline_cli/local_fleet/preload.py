"""The early start of a local fleet's nursery: every service waits until the nursery has imported torch."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from syncline.runtime.nursery import Nursery
from syncline_cli.local_fleet.fleet import LocalFleet


def start_nursery(*modules: str) -> Nursery:
    """Start importing torch and all services in the background.

    The nursery prints to standard error: standard output of this command is for results.

    Args:
        modules: more modules to import.
    """
    keep_torch_out_of_the_temporary_directory()
    sys.stdout.flush()
    stdout = os.dup(1)
    try:
        os.dup2(2, 1)
        return LocalFleet.preload(*modules)
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


def keep_torch_out_of_the_temporary_directory() -> None:
    """Set the cache directory of torch's compiler, which otherwise appears in the temporary directory on import."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "torch", "inductor")
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # the home directory is read-only
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
