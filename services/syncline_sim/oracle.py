"""The arithmetic of a merge a second time, in numpy and float64, as the formulas are printed: what the services are held to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from syncline.engine.outer import Outer
from syncline.spec import RunSpec

Vector = NDArray[np.float64]


def next_center(
    spec: RunSpec, center: Vector, updates: Sequence[Vector], weights: Sequence[float], kept: list[Vector], version: int
) -> tuple[Vector, list[Vector]]:
    """W of the next version, and what is kept beside it. `version`: of `center`; `kept`: empty stands for zeros."""
    kept = kept or [np.zeros_like(center) for _ in range(spec.states)]
    merged = np.sum([w * x for w, x in zip(weights, updates, strict=True)], axis=0)
    return stepped(spec.outer, center, merged, kept, version)


def stepped(outer: Outer, w: Vector, d: Vector, state: list[Vector], version: int) -> tuple[Vector, list[Vector]]:
    """One step of the outer optimiser."""
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
            m, v = o.beta1 * state[0] + (1 - o.beta1) * d, state[1]
            if o.kind == "adam":
                v = o.beta2 * v + (1 - o.beta2) * d**2
            elif o.kind == "yogi":
                v = v - (1 - o.beta2) * d**2 * np.sign(v - d**2)
            else:
                v = v + d**2
            return w + o.lr * m / (np.sqrt(v) + o.tau), [m, v]
    raise AssertionError(f"no formula for {o.kind}")
