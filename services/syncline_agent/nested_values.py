"""Turns nested Python values into tensors and JSON, and back. Nothing is pickled.

A task's state and an optimiser's state are numbers, strings, tensors and arrays in lists, tuples and dicts. In the JSON,
lists and plain values stand for themselves, everything else is an object of one entry:

    {"tensor": name}, {"array": name}, {"scalar": name}     a torch tensor, a numpy array, a number of numpy
    {"tuple": [...]}, {"dict": [[key, value], ...]}, {"OrderedDict": [...]}, {"Counter": [...]}
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from syncline.errors import ConfigError

DEEPEST = 50  # levels
MAPPINGS: dict[str, type[Any]] = {kind.__name__: kind for kind in (dict, OrderedDict, Counter)}


def pack(value: Any, where: str) -> tuple[Any, dict[str, Tensor]]:
    """Return the value as JSON, and its tensors by name. The tensors share memory with the value.

    Args:
        value: numbers, strings, None, tensors, arrays, and lists, tuples and dicts of them.
        where: a name for the value, used in errors and as prefix of the tensors' names.

    Raises:
        ConfigError: the value holds an object of another kind; the error names the object's place.
    """
    tensors: dict[str, Tensor] = {}
    return _packed(value, where, tensors, DEEPEST), tensors


def unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return what `pack` was given. Raises ValueError or KeyError for anything that `pack` does not make."""
    if isinstance(packed, list):
        return [unpack(item, tensors) for item in packed]
    if not isinstance(packed, dict):
        return packed
    [(kind, content)] = packed.items()
    if kind == "tensor":
        return tensors[content]
    if kind in ("array", "scalar"):
        array = tensors[content].numpy()
        return array if kind == "array" else array[()]
    if kind == "tuple":
        return tuple(unpack(item, tensors) for item in content)
    return MAPPINGS[kind]({unpack(k, tensors): unpack(v, tensors) for k, v in content})


def can_be_kept(value: Any) -> bool:
    """Return whether `pack` takes the value."""
    try:
        pack(value, "")
    except ConfigError:
        return False
    return True


def is_finite(value: Any) -> bool:
    """Return whether no number in the nested value is NaN or infinite."""
    if isinstance(value, Mapping):
        return all(map(is_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(is_finite, value))
    if isinstance(value, Tensor):
        return bool(torch.isfinite(value).all())
    if isinstance(value, float | np.generic | np.ndarray):
        return not np.issubdtype(np.asarray(value).dtype, np.inexact) or bool(np.isfinite(value).all())
    return True


def _packed(value: Any, where: str, tensors: dict[str, Tensor], levels: int) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        if value.layout is not torch.strided:
            raise _unkeepable(f"a tensor of layout {value.layout}", where)
        return {"tensor": _add(value.detach(), where, tensors)}
    if isinstance(value, np.ndarray | np.generic):
        kind = "array" if isinstance(value, np.ndarray) else "scalar"
        try:
            return {kind: _add(torch.from_numpy(np.array(value, order="C")), where, tensors)}
        except TypeError:
            raise _unkeepable(f"a numpy array of {value.dtype}", where) from None
    if levels == 0:
        raise _unkeepable(f"more than {DEEPEST} levels deep", where)
    if type(value) is list:
        return [_packed(item, f"{where}.{i}", tensors, levels - 1) for i, item in enumerate(value)]
    if type(value) is tuple:
        return {"tuple": [_packed(item, f"{where}.{i}", tensors, levels - 1) for i, item in enumerate(value)]}
    if type(value) in MAPPINGS.values():
        items = [
            [
                _packed(key, f"a key of {where}", tensors, levels - 1),
                _packed(item, f"{where}.{key}", tensors, levels - 1),
            ]
            for key, item in value.items()
        ]
        return {type(value).__name__: items}
    raise _unkeepable(f"a {type(value).__qualname__}", where)


def _add(tensor: Tensor, name: str, tensors: dict[str, Tensor]) -> str:
    """Keys of dicts may hold dots, so that two places have one name: the second gets a number."""
    name = name if name not in tensors else f"{name} {len(tensors)}"
    tensors[name] = tensor
    return name


def _unkeepable(kind: str, where: str) -> ConfigError:
    return ConfigError(
        "task",
        f"{where} is {kind}, which an agent cannot keep on its disk",
        "Hold numbers, strings, tensors and arrays there, in lists, tuples and dicts",
    )
