"""A second implementation of the merge arithmetic, in numpy and float64, written as the formulas are printed.

Tests and the simulation compare the services' results with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from syncline.averaging.merge import Rule
from syncline.averaging.outer import Outer
from syncline.spec.run_spec import RunSpec

Vector = NDArray[np.float64]


def expected_center(
    spec: RunSpec,
    center: Vector,
    updates: Sequence[Vector],
    weights: Sequence[float],
    kept: list[Vector],
    version: int,
    buffers: Sequence[slice] = (),
) -> tuple[Vector, list[Vector]]:
    """Return the next center and its state vectors.

    Args:
        spec: settings of the merge rule, the outer optimiser and mixing.
        center: W of `version`.
        updates: the updates in the order of the plan.
        weights: the planned weights.
        kept: state vectors of the rule, then of the outer optimiser; [] stands for zeros.
        version: the version of `center`.
        buffers: places of buffers in the flat vector.
    """
    kept = kept or [np.zeros_like(center) for _ in range(spec.state_vectors)]
    parameter = np.ones(len(center))
    for buffer in buffers:
        parameter[buffer] = 0
    differences = [x * parameter for x in updates]
    d, last = merge_updates(spec.merge, differences, weights, kept[: spec.merge.state_vectors])
    w, state = outer_step(spec.outer, center, d, kept[spec.merge.state_vectors :], version)
    mean = _mean_of_buffers(spec, center, updates, weights, _selected(spec.merge, differences, weights, d))
    return np.where(parameter > 0, w, mean), [*last, *state]


def _mean_of_buffers(
    spec: RunSpec, center: Vector, values: Sequence[Vector], weights: Sequence[float], selected: list[int]
) -> Vector:
    """Return (1 − Σ w) W + Σ w v over the updates that the rule selects."""
    n = len(values)
    w = np.array([min(spec.mix.alpha, 1 / n)] * n if spec.mix.kind == "elastic" else weights)
    total = w.sum()
    shares = w[selected] * total / w[selected].sum()
    mean: Vector = (1 - total) * center + shares @ np.stack(values)[selected]
    return mean


def _selected(rule: Rule, differences: Sequence[Vector], weights: Sequence[float], d: Vector) -> list[int]:
    """Return the numbers of the updates whose weight in the rule's result is not 0."""
    r: Any = rule
    everything = list(range(len(weights)))
    match r.rule:
        case "krum" | "multi_krum":
            return _best(r, _scaled(differences, weights))
        case "geometric_median":
            apart = np.linalg.norm(np.stack(differences) - d / sum(weights), axis=1)
            return [int(apart.argmin())] if apart.min() < 1e-6 else everything
    return everything


def _scaled(updates: Sequence[Vector], weights: Sequence[float]) -> Vector:
    """Return N w_i x_i, the updates as a rule without weights receives them."""
    seen: Vector = len(weights) * np.array(weights)[:, None] * np.stack(updates)
    return seen


def _best(r: Any, u: Vector) -> list[int]:
    """Return the numbers of the updates that Krum selects."""
    n = len(u)
    f = min(r.f, max(0, (n - 3) // 2))
    squared = ((u[:, None] - u) ** 2).sum(-1)
    scores = [np.sort(np.delete(row, i))[: max(0, n - f - 2)].sum() for i, row in enumerate(squared)]
    m = 1 if r.rule == "krum" else min(n, max(1, n - f - 2) if r.m is None else r.m)
    return [int(i) for i in np.argsort(scores, kind="stable")[:m]]


def merge_updates(
    rule: Rule, updates: Sequence[Vector], weights: Sequence[float], kept: Sequence[Vector]
) -> tuple[Vector, list[Vector]]:
    """Return D and the rule's state vectors for the next merge."""
    r: Any = rule
    p, x = np.array(weights), np.stack(updates)
    n = len(p)
    u = _scaled(updates, weights)
    match r.rule:
        case "mean":
            return p @ x, []
        case "median":
            return np.median(u, axis=0), []
        case "trimmed_mean":
            k = min(int(r.trim) if r.trim >= 1 else int(r.trim * n + 1e-9), (n - 1) // 2)
            return np.sort(u, axis=0)[k : n - k].mean(0), []
        case "norm_clip":
            return (p * np.minimum(1, r.max_norm / _norms(x))) @ x, []
        case "centred_clip":
            away = u - kept[0]
            d = kept[0] + (away * np.minimum(1, r.tau / _norms(away))[:, None]).mean(0)
            return d, [d]
        case "krum" | "multi_krum":
            return u[_best(r, u)].mean(0), []
        case "geometric_median":
            return p.sum() * _geometric_median(x, p / p.sum()), []
    raise AssertionError(f"no formula for {r.rule}")


def _norms(x: Vector) -> Vector:
    found: Vector = np.maximum(np.linalg.norm(x, axis=1), 1e-300)
    return found


def _geometric_median(x: Vector, shares: Vector) -> Vector:
    """Return the geometric median by smoothed Weiszfeld steps in the space of the updates (arXiv:1912.13445)."""
    z: Vector = shares @ x
    for _ in range(5000):
        w = shares / np.maximum(1e-10, np.linalg.norm(x - z, axis=1))
        z = w @ x / w.sum()
    return z


def outer_step(outer: Outer, w: Vector, d: Vector, state: list[Vector], version: int) -> tuple[Vector, list[Vector]]:
    """Return W and the state vectors after one step of the outer optimiser."""
    o: Any = outer
    match o.kind:
        case "sgd":
            return w + o.lr * d, []
        case "momentum":
            m = o.momentum * state[0] + d
            return w + o.lr * m, [m]
        case "nesterov":
            m = o.momentum * state[0] + d
            return w + o.lr * (d + o.momentum * m), [m]
        case "delayed_nesterov":
            m, gathered = state[0], state[1] + d
            if (version + 1) % o.every:
                return w + o.lr * d / o.every, [m, gathered]
            m = o.momentum * m + gathered / o.every
            return w + o.lr * (o.momentum * m + d / o.every), [m, np.zeros_like(w)]
        case "adam" | "yogi" | "adagrad":
            m, v = o.beta1 * state[0] + (1 - o.beta1) * d, state[1] if version else np.full_like(w, o.tau**2)
            if o.kind == "adam":
                v = o.beta2 * v + (1 - o.beta2) * d**2
            elif o.kind == "yogi":
                v = v - (1 - o.beta2) * d**2 * np.sign(v - d**2)
            else:
                v = v + d**2
            return w + o.lr * m / (np.sqrt(v) + o.tau), [m, v]
    raise AssertionError(f"no formula for {o.kind}")
