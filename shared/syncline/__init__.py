"""Syncline trains one PyTorch model on many machines that communicate only over a NATS message bus.

The names in `__all__` are the public API. Each is imported when it is first used, so that `import syncline` loads neither torch
nor the bus.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from syncline.client.client import connect, local_fleet
    from syncline.data.partition import Part
    from syncline.spec.run_spec import RunSpec, load_spec
    from syncline.tasks.base import Task

__version__ = "0.1.0"
__all__ = ["Part", "RunSpec", "Task", "connect", "load_spec", "local_fleet"]

_MODULES = {
    "Part": "syncline.data.partition",
    "RunSpec": "syncline.spec.run_spec",
    "Task": "syncline.tasks.base",
    "connect": "syncline.client.client",
    "load_spec": "syncline.spec.run_spec",
    "local_fleet": "syncline.client.client",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
