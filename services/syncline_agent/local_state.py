"""The state of an agent in a run, on its disk: one file per run, replaced atomically.

The file holds W_i, the agent's clock, its optimisers and schedules, the task's own state, and the tensors that never leave the
agent. A file belongs to one *submission* of a run, the id of head's manifest: a run of the same name that is submitted again
has another one. A file of another submission or another model, or a damaged one, is not used: the agent begins with the center.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from syncline.errors import SynclineError
from syncline.files import replacing
from syncline.model.manifest import Manifest
from syncline.model.tensors import bytes_of
from syncline_agent.nested_values import pack, unpack

log = logging.getLogger(__name__)

DIGEST = "digest"  # in a file's metadata: covers the rest of the file
PAIRS = " as pairs"  # suffix of the names of complex tensors: the format has no type for some of them
INNER = "inner"  # key in the metadata, and prefix of tensors' names
MOST_CLOCK = 1 << 48  # more periods than any agent can train


@dataclass(frozen=True)
class LocalState:
    """W_i after the period `clock`, and everything else that the next period depends on."""

    clock: int
    own_P: Tensor
    inner: Mapping[str, Any] = field(default_factory=dict)  # optimisers, schedules and the task: nested plain values
    pending: dict[int, Tensor] = field(default_factory=dict)  # elastic differences by clock, without a verdict
    variates: dict[str, Tensor] = field(default_factory=dict)  # control variates of SCAFFOLD
    local: dict[str, Tensor] = field(default_factory=dict)  # tensors that are not averaged, by name


def save_state(path: Path, kept: LocalState, layout: Manifest, submission: str) -> None:
    """Replace the file. A crash leaves the old file or the new one, never a part of one.

    Args:
        submission: id of the run's submission.

    Raises:
        OSError: the disk did not take the file. The library may raise SafetensorError for the same reason.
        ConfigError: a value of `inner` cannot be saved.
    """
    packed, inner = pack(dict(kept.inner), INNER)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = _apart(
        {
            "own": kept.own_P,
            **inner,
            **{f"pending.{clock}": t for clock, t in kept.pending.items()},
            **{f"variates.{name}": t for name, t in kept.variates.items()},
            **{f"local.{name}": t for name, t in kept.local.items()},
        }
    )
    metadata = {
        "clock": str(kept.clock),
        "layout": layout.layout_digest(),
        "submission": submission,
        INNER: json.dumps(packed),
    }
    with replacing(path, f"{path.stem}.new") as fresh:
        save_file(tensors, fresh, {**metadata, DIGEST: _digest(tensors, metadata)})


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors on the CPU, no two in one storage, as the format requires. Copies only tensors that need it."""
    made: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        there = tensor.detach().cpu().contiguous()
        if there.is_complex():
            name, there = f"{name}{PAIRS}", torch.view_as_real(there)
        place = there.untyped_storage().data_ptr()
        made[name] = there.clone() if place in storages else there
        storages.add(place)
    return made


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return a digest of everything that a file holds."""
    whole = xxhash.xxh3_128(json.dumps(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        whole.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        whole.update(bytes_of(tensor))
    return str(whole.hexdigest())


class Unusable(SynclineError):
    """A file that cannot be used, with the reason."""


def load_state(path: Path, layout: Manifest, submission: str) -> LocalState | None:
    """Return the saved state, or None, with a warning in the log, if no file can be used: the agent begins with the center."""
    try:
        return _read(path, layout, submission) if path.exists() else None
    except Unusable as why:
        log.warning("%s %s; beginning with the center", path, why)
    except Exception as error:  # a bad file of any kind must not keep the agent from training
        log.warning("%s is unreadable (%s: %s); beginning with the center", path, type(error).__name__, error)
    return None


def _read(path: Path, layout: Manifest, submission: str) -> LocalState:
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata() or {})
        if metadata.get("layout") != layout.layout_digest():
            raise Unusable("is of another model")
        if metadata.get("submission") != submission:
            raise Unusable("is of an earlier run of this name")
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no dict)
    if metadata.pop(DIGEST, "") != _digest(tensors, metadata):
        raise Unusable("is not as it was written")
    for name in [name for name in tensors if name.endswith(PAIRS)]:
        pairs = tensors.pop(name).clone()  # a file aligns to 8 bytes; torch may need 16 for complex numbers
        tensors[name.removesuffix(PAIRS)] = torch.view_as_complex(pairs)
    clock = int(metadata["clock"])
    if not 0 <= clock < MOST_CLOCK:
        raise Unusable(f"has the clock {clock}")
    variates, local = (_under(f"{what}.", tensors) for what in ("variates", "local"))
    pending = {int(at): t for at, t in _under("pending.", tensors).items()}
    for vector_P in (tensors["own"], *pending.values(), *variates.values()):
        if vector_P.shape != (layout.elements,):
            raise Unusable(f"holds a vector of {list(vector_P.shape)} elements, not {layout.elements}")
    inner = unpack(json.loads(metadata[INNER]), tensors)
    if not isinstance(inner, dict):
        raise Unusable("holds no state of an optimiser")
    return LocalState(clock, tensors["own"], inner, pending, variates, local)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
