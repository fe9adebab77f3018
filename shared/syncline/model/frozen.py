"""Frozen tensors do not travel, so every machine has its own: their digests show whether these are equal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import xxhash
from torch import Tensor, nn

from syncline.errors import ConfigError
from syncline.model.manifest import Manifest, NamedDigest
from syncline.model.tensors import averaged_of, bytes_of, is_trained, matches, saved_buffers, tensors_of

PIECE_ELEMENTS = 1 << 24  # that are copied to the CPU at a time


def frozen_of(model: nn.Module, local: Sequence[str], shared: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that must be equal on every machine: frozen parameters, and saved buffers that are not averaged.

    Args:
        local: name patterns of tensors that may differ.
        shared: name patterns of frozen tensors that are averaged.
    """
    travelling = {name for name, _ in averaged_of(model, local, shared)}
    saved = saved_buffers(model)
    for name, tensor in tensors_of(model):
        common = not is_trained(tensor) if isinstance(tensor, nn.Parameter) else name in saved
        if common and name not in travelling and not matches(name, local) and tensor.layout is torch.strided:
            yield name, tensor


def digests_of(model: nn.Module, local: Sequence[str], shared: Sequence[str]) -> list[NamedDigest]:
    """Return the digests of those tensors, for the manifest."""
    found = [(name, digest_of(tensor)) for name, tensor in frozen_of(model, local, shared)]
    return [NamedDigest(name=name, digest=digest) for name, digest in found if digest]


def insist_on_frozen(model: nn.Module, layout: Manifest, local: Sequence[str], shared: Sequence[str]) -> None:
    """Compare a new model's frozen tensors with those of the coordinator.

    Raises:
        ConfigError: a tensor differs. Names the tensor.
    """
    expected = {entry.name: entry.digest for entry in layout.frozen}
    for name, tensor in frozen_of(model, local, shared):
        digest = digest_of(tensor) if name in expected else ""
        if digest and digest != expected[name]:
            raise ConfigError(
                "task",
                f"the model's {name} does not travel and differs from the coordinator's: its digest is {digest} here, "
                f"{expected[name]} there",
                "Give every machine the same file (random values differ between kinds of processors); or name it in the task's "
                "`shared`, and it travels, or in `local`, and it "
                "may differ",
            )


def digest_of(tensor: Tensor) -> str:
    """Return the xxh3-64 of a tensor's dtype, shape and bytes; '' for a kind of tensor that does not show its bytes."""
    whole = xxhash.xxh3_64(f"{tensor.dtype} {list(tensor.shape)}".encode())
    try:
        elements = tensor.detach().resolve_conj().reshape(-1)
        if elements.is_complex():
            elements = torch.view_as_real(elements).reshape(-1)
        for begin in range(0, elements.numel(), PIECE_ELEMENTS):
            piece = elements[begin : begin + PIECE_ELEMENTS].cpu().contiguous()
            whole.update(bytes_of(piece))
    except (RuntimeError, NotImplementedError, TypeError):  # a tensor subclass, or one with quantised elements
        return ""
    return str(whole.hexdigest())
