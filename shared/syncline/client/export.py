"""Export of a center: its tensors by name, checked against the run's digest, and as a safetensors file. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy
import xxhash

import syncline
from syncline.bus.base import Bus
from syncline.bus.blobs import BlobGone, get_blob
from syncline.bus.records import record_of
from syncline.client.history import commit_of
from syncline.client.runs import head_of
from syncline.errors import ConfigError, PeerError
from syncline.model.manifest import Manifest
from syncline.wire import subjects
from syncline.wire.dtypes import DTYPES
from syncline.wire.messages import BlobRef, Head, decode

MAX_TRIES = 20  # each fails if the version is purged meanwhile, as in a run with many rounds a second


@dataclass(frozen=True, slots=True)
class Model:
    """The tensors of a center."""

    tensors: dict[str, npt.NDArray[Any]]  # by name in the model's state_dict; views of one buffer
    about: dict[str, Any]  # run, version, term, digest, tensors, elements, bytes; local: names that do not travel


@dataclass(frozen=True, slots=True)
class _Kept:
    """The place of a version on the bus."""

    version: int
    term: int
    digest: str  # '' if no record names it
    model: BlobRef


async def fetch(bus: Bus, run: str, version: int | None = None) -> Model:
    """Fetch a center.

    Args:
        bus: a connection with a coordinator's key.
        version: one of the run's last `keep_models` versions; default: the newest.

    Raises:
        ConfigError: no such run, or the version is not on the bus.
        PeerError: the tensors do not have the digest that the run's records name.
    """
    for _ in range(MAX_TRIES):
        head = await head_of(bus, run)
        kept = await _kept(bus, head, head.version if version is None else version)
        assert head.manifest is not None
        try:
            layout = decode(Manifest, await record_of(bus, run, head.manifest))
            flat = bytearray(layout.nbytes)
            stream, prefix = subjects.model_stream(run), partial(subjects.model_prefix, run)
            await get_blob(bus, stream, prefix, kept.model, memoryview(flat), layout.chunk_bytes)
        except BlobGone:
            if version is None or version == head.version:
                continue  # a newer version was committed meanwhile
            raise _not_kept(head, version) from None
        return _model(layout, flat, kept, run)
    raise ConfigError("RUN", f"{run} commits versions faster than they can be fetched", "Raise keep_models in its spec")


async def _kept(bus: Bus, head: Head, version: int) -> _Kept:
    """Return the place of a version. Raises ConfigError if it is not kept."""
    if head.model is None or head.manifest is None:
        raise ConfigError("RUN", f"{head.run} has no model yet ({head.phase})", "Ask again when the run has started")
    if version == head.version:
        return _Kept(version, head.term, head.digest, head.model)
    if version == 0 and head.version == 1 and head.previous is not None:
        return _Kept(0, head.term, "", head.previous)
    if not 0 < version < head.version:
        raise _not_kept(head, version)
    commit = await commit_of(bus, head, version)
    return _Kept(version, commit.term, commit.digest, commit.model)


def _not_kept(head: Head, version: int) -> ConfigError:
    hint = f"The newest is {head.version}; a run keeps its last `keep_models` versions, by default 2"
    return ConfigError("--version", f"version {version} of {head.run} is not on the bus", hint)


def _model(layout: Manifest, flat: bytearray, kept: _Kept, run: str) -> Model:
    digest = xxhash.xxh3_128_hexdigest(flat)
    if kept.digest not in ("", digest):
        raise PeerError(f"version {kept.version} of {run} has digest {digest}, and its record says {kept.digest}")
    elements = np.frombuffer(flat, DTYPES[layout.dtype].little_endian)
    tensors = {t.name: elements[t.offset : t.offset + t.elements].reshape(t.shape) for t in layout.tensors}
    for entry in layout.tensors:
        length = float(np.linalg.norm(tensors[entry.name])) if entry.unit else 0.0
        if length > 0:  # a mean of unit vectors is shorter than 1
            tensors[entry.name] /= length
    about = {
        "run": run,
        "version": kept.version,
        "term": kept.term,
        "digest": digest,
        "tensors": len(tensors),
        "elements": layout.elements,
        "bytes": layout.nbytes,
        "local": list(layout.local),
    }
    return Model(tensors, about)


def save(model: Model, file: Path) -> None:
    """Write a safetensors file, whole or not at all. Raises ConfigError if it cannot be written."""
    about = {key: str(model.about[key]) for key in ("run", "version", "term", "digest")}
    metadata = {"format": "pt", "syncline": syncline.__version__, **about}
    partial_file = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        safetensors.numpy.save_file(model.tensors, partial_file, metadata)
        partial_file.replace(file)
    except (OSError, safetensors.SafetensorError) as error:
        raise ConfigError("FILE", f"{file}: {getattr(error, 'strerror', None) or error}", "Name another") from None
    finally:
        partial_file.unlink(missing_ok=True)
