"""The tensors of a model by name: which of them change, which are averaged, and which module holds them."""

from __future__ import annotations

import ctypes
import fnmatch
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

COMPILED = "_orig_mod"  # the attribute under which `torch.compile` holds the module that it wraps


class Slot(NamedTuple):
    """The place of a tensor in a model."""

    owner: nn.Module
    attribute: str
    tensor: Tensor


def slots_of(model: nn.Module) -> Iterator[tuple[str, Slot]]:
    """Yield parameters, then buffers, by the names that the model has without `torch.compile`; tied ones under each name."""
    modules = [(_plain(prefix), module) for prefix, module in model.named_modules(remove_duplicate=False)]
    for holder in ("_parameters", "_buffers"):
        for prefix, module in modules:
            for attribute, tensor in getattr(module, holder).items():
                if tensor is not None:
                    yield f"{prefix}.{attribute}" if prefix else attribute, Slot(module, attribute, tensor)


def _plain(name: str) -> str:
    """Return a module's name without the wrapper of `torch.compile`, which puts a module into another one."""
    return ".".join(part for part in name.split(".") if part != COMPILED)


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters, then buffers, by name; each shared tensor once."""
    seen: set[int] = set()
    for name, slot in slots_of(model):
        if id(slot.tensor) not in seen:
            seen.add(id(slot.tensor))
            yield name, slot.tensor


def saved_buffers(model: nn.Module) -> set[str]:
    """Return the names of the buffers that the model saves. The state dict cannot tell them: hooks may rename its
    entries.
    """
    return {
        name
        for name, slot in slots_of(model)
        if not isinstance(slot.tensor, nn.Parameter) and slot.attribute not in slot.owner._non_persistent_buffers_set
    }


def changing_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield trainable parameters, then buffers that are saved; each shared tensor once."""
    saved = saved_buffers(model)
    for name, tensor in tensors_of(model):
        if tensor.requires_grad if isinstance(tensor, nn.Parameter) else name in saved:
            yield name, tensor


def averaged_of(model: nn.Module, local: Sequence[str], shared: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield those of the changing tensors that are floating-point numbers and not `local`, and the `shared` ones.

    A buffer that holds an infinity, as an attention mask does, is no statistic: its mean with others has no meaning. An empty
    one may grow as the model trains, and needs memory of its own for that.
    """
    changing = {id(tensor) for _, tensor in changing_of(model)}
    for name, tensor in tensors_of(model):
        wanted = id(tensor) in changing or matches(name, shared)
        if not wanted or not tensor.is_floating_point() or matches(name, local):
            continue
        if isinstance(tensor, nn.Parameter) or (tensor.numel() and bool(torch.isfinite(tensor).all())):
            yield name, tensor


def is_trained(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and tensor.requires_grad


def matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def unit_vectors(model: nn.Module) -> Iterator[str]:
    """Yield names of the vectors that spectral norm keeps at length 1, for its power iteration (arXiv:1802.05957)."""
    for name, slot in slots_of(model):
        hooks = slot.owner._forward_pre_hooks.values()
        hooked = {f"{h.name}_{end}" for h in hooks if isinstance(h, SpectralNorm) for end in "uv"}
        if slot.attribute in hooked or (isinstance(slot.owner, _SpectralNorm) and slot.attribute in ("_u", "_v")):
            yield name


def overlapping(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, str]]:
    """Yield the names of neighbours that lie in the same memory."""
    ranges = [(t.data_ptr(), t.data_ptr() + t.nbytes, name) for name, t in tensors if t.is_contiguous() and t.nbytes]
    for (_, end, first), (begin, _, second) in pairwise(sorted(ranges)):
        if begin < end:
            yield first, second


def bytes_of(tensor: Tensor) -> ctypes.Array[ctypes.c_ubyte]:
    """Return a view of the bytes of a contiguous tensor on the CPU, valid as long as the tensor is.

    `Tensor.numpy` would do, but makes the tensor one that can never be resized, as observers of quantisation do.

    Raises:
        TypeError: the tensor has no memory of its own, as those of some subclasses.
    """
    if tensor.nbytes and not tensor.data_ptr():
        raise TypeError(f"a {type(tensor).__name__} does not show its bytes")
    return (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
