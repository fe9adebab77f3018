"""The nursery of a fleet on this machine, started as early as can be: everything else waits until torch is imported."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from syncline.runtime.nursery import Nursery
from syncline_cli.local_fleet.fleet import LocalFleet


def start_nursery(*modules: str) -> Nursery:
    """Begins to import torch and all services in the background. What they print is not on *our* standard output."""
    logging.getLogger().addHandler(logging.NullHandler())  # what matters is shown as events
    keep_torch_out_of_the_temporary_directory()
    sys.stdout.flush()
    ours = os.dup(1)
    try:
        os.dup2(2, 1)
        return LocalFleet.preload(*modules)
    finally:
        os.dup2(ours, 1)
        os.close(ours)


def keep_torch_out_of_the_temporary_directory() -> None:
    """Its compiler makes a cache directory as soon as it is imported, used or not: where caches belong, please."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "torch", "inductor")
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # a home that nobody may write to
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
