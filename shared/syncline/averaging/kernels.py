"""Numerical kernels of the merge rules: sums, order statistics and the geometric median.

Sums are taken over blocks of fixed size, so they do not depend on the size of the slices in which a vector arrives. The
geometric median is computed from distances alone. The module imports no torch; it calls methods of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 1024  # elements; chunks hold whole blocks, so that a sum over blocks does not depend on the size of the chunks
SAME = 1e-13  # squared distances below this share of the squared norms are rounding errors and count as 0
WIDE_ELEMENTS = 1 << 18  # elements of all updates together that are converted to float64 at a time
SCRATCH_ELEMENTS = 1 << 17  # elements of all rows of a sorting network together, so that they fit into the cache


# -- sums over slices --------------------------------------------------------------------------------------------------
def squares(x_E: Tensor) -> Tensor:
    """Return Σ x² of each block, float64, (B,). A sum is not finite if an element is not, or if a square overflows."""
    return _blocks(x_E.square()).sum(1).double()


def products(updates: Sequence[Tensor]) -> Tensor:
    """Return ⟨x_i, x_j⟩ of each block, float64, (B, N, N).

    The loop takes a few blocks at a time, because their float64 copies are twice as large as the updates.
    """
    n, blocks = len(updates), -(-updates[0].numel() // BLOCK)
    found_BNN = updates[0][:0].double().new_empty((blocks, n, n))
    step = max(1, WIDE_ELEMENTS // (n * BLOCK))
    for first in range(0, blocks, step):
        part = slice(first * BLOCK, (first + step) * BLOCK)
        wide_BNK = found_BNN.new_empty((min(step, blocks - first), n, BLOCK))
        for i, x_E in enumerate(updates):
            wide_BNK[:, i] = _blocks(x_E[part])
        found_BNN[first : first + step] = wide_BNK.bmm(wide_BNK.transpose(1, 2))
    return found_BNN


def finite(x_E: Tensor) -> bool:
    """Return whether no element is NaN or infinite.

    A finite sum proves that all elements are finite. An infinite sum may be an overflow: then every element is checked.
    """
    return bool(x_E.sum().isfinite()) or bool(x_E.isfinite().all())


def _blocks(x_E: Tensor) -> Tensor:
    """Reshape (E,) to (B, 1024); the last block is filled up with zeros."""
    missing = -x_E.numel() % BLOCK
    if missing:
        padded_E = x_E.new_zeros(x_E.numel() + missing)
        padded_E[: x_E.numel()] = x_E
        x_E = padded_E
    return x_E.view(-1, BLOCK)


class Sums:
    """The sum of the blocks' figures. Slices may arrive in any order and are added in their own, so the bits are the same."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self._early: dict[int, Tensor] = {}
        self._next = 0

    def add(self, k: int, figures_BF: Tensor) -> None:
        """Add the figures of slice k; the tensor is overwritten."""
        self._early[k] = figures_BF
        while (figures := self._early.pop(self._next, None)) is not None:
            if self.total is not None:
                figures[0] += self.total
            self.total = figures.cumsum(0)[-1].clone()
            self._next += 1


# -- order statistics --------------------------------------------------------------------------------------------------
def middle_mean(updates: Sequence[Tensor], scales: Sequence[float], trim: int, out_E: Tensor) -> None:
    """Write the trimmed mean of the scaled updates: for each element, without the `trim` smallest and largest values.

    A sorting network compares whole rows, at about 0.3 ns per element and comparison. Sorting the column of each element takes
    a hundred times as long.

    Args:
        updates: N tensors of E elements.
        scales: the factor of each update.
        trim: number of values left out at either end; 2 trim < N.
        out_E: receives the result.
    """
    n, size = len(updates), out_E.numel()
    comparisons = network(n, trim, n - trim)
    step = min(max(2048, SCRATCH_ELEMENTS // n), 16384, size)
    scratch_NE = out_E.new_empty((n + 1, step))
    for start in range(0, size, step):
        stop = min(start + step, size)
        *rows, spare = (row[: stop - start] for row in scratch_NE)
        for row_E, x_E, scale in zip(rows, updates, scales, strict=True):
            row_E.copy_(x_E[start:stop])
            if scale != 1:
                row_E.mul_(scale)
        for i, j, lower, upper in comparisons:
            _compare_(rows[i], rows[j], spare, lower, upper)
        part_E = out_E[start:stop].copy_(rows[trim])
        for row_E in rows[trim + 1 : n - trim]:
            part_E.add_(row_E)
        part_E.div_(n - 2 * trim)


def _compare_(a_E: Tensor, b_E: Tensor, spare_E: Tensor, lower: bool, upper: bool) -> None:
    """Write the smaller of each pair to a if `lower`, and the larger to b if `upper`; `spare_E` is overwritten."""
    if lower and upper:
        spare_E.copy_(a_E)
        a_E.clamp_(max=b_E)
        b_E.clamp_(min=spare_E)
    elif lower:
        a_E.clamp_(max=b_E)
    else:
        b_E.clamp_(min=a_E)


@lru_cache(maxsize=16)
def network(n: int, first: int, last: int) -> tuple[tuple[int, int, bool, bool], ...]:
    """Return the comparisons (i, j, lower, upper) after which row r holds rank r, for first ≤ r < last.

    The network is Batcher's merge exchange (Knuth, The Art of Computer Programming 3, algorithm 5.2.2 M). Comparisons on which
    no wanted row depends are left out. `lower`: the smaller value is needed in row i; `upper`: the larger one in row j.
    """
    wanted, found = set(range(first, last)), []
    for i, j in reversed(list(_merge_exchange(n))):
        if i in wanted or j in wanted:
            found.append((i, j, i in wanted, j in wanted))
            wanted |= {i, j}
    return tuple(reversed(found))


def _merge_exchange(n: int) -> Iterator[tuple[int, int]]:
    """Yield the pairs of rows that merge exchange compares to sort n rows, in order."""
    top = 1 << (n - 1).bit_length() >> 1
    p = top
    while p:
        q, r, d = top, 0, p
        while d:
            yield from ((i, i + d) for i in range(n - d) if i & p == r)
            d, q, r = q - p, q >> 1, p
        p >>= 1


# -- points known by their products ------------------------------------------------------------------------------------
def squared_distances(products_NN: Tensor, scales: Sequence[float]) -> Tensor:
    """Return ‖s_i x_i − s_j x_j‖² computed from ⟨x_i, x_j⟩, (N, N), float64; 0 for a pair that differs by rounding alone."""
    s_N = products_NN.new_tensor(scales)
    scaled_NN = products_NN * s_N[:, None] * s_N
    norms_N = scaled_NN.diagonal()
    both_NN = norms_N[:, None] + norms_N
    d_NN = (both_NN - scaled_NN - scaled_NN.T).clamp(min=0)
    return d_NN.masked_fill(d_NN <= SAME * both_NN, 0.0)


def geometric_median(d_NN: Tensor, shares: Sequence[float], most_steps: int = 1000) -> list[float]:
    """Return the weights w of the geometric median z = Σ w_i x_i, which minimises Σ a_i ‖z − x_i‖.

    Point k is the median itself if the pull of the others on x_k, of length ‖Σ a_i (x_i − x_k) / ‖x_i − x_k‖‖, is at most its
    own share a_k (Kuhn 1973); then it has the whole weight. Otherwise Weiszfeld's steps are made, w_i ∝ a_i / ‖z − x_i‖, with
    ‖z − x_i‖² = Σ w_j d_ij − ½ ΣΣ w_j w_k d_jk.

    Args:
        d_NN: squared distances between the points, float64.
        shares: a, with Σ a_i = 1.
        most_steps: Weiszfeld's steps after which the result is taken as it is.

    Returns:
        w, with Σ w_i = 1.
    """
    a_N = d_NN.new_tensor(shares)
    for k in range(len(shares)):
        here_N = d_NN[k] == 0
        pull_N = (a_N / d_NN[k].sqrt()).masked_fill(here_N, 0.0)
        inner_NN = (d_NN[k][:, None] + d_NN[k] - d_NN) / 2  # ⟨x_i − x_k, x_j − x_k⟩
        if math.sqrt(max(0.0, float(pull_N @ inner_NN @ pull_N))) <= float(a_N[here_N].sum()):
            return [float(i == k) for i in range(len(shares))]
    w_N = a_N
    for _ in range(most_steps):
        reach_N = d_NN @ w_N
        away_N = (reach_N - w_N @ reach_N / 2).clamp(min=0).sqrt()
        next_N = a_N / away_N.clamp(min=1e-12 * float(d_NN.max()) ** 0.5)
        next_N /= next_N.sum()
        still = float((next_N - w_N).abs().max()) < 1e-15
        w_N = next_N
        if still:
            break
    return [float(w) for w in w_N]
