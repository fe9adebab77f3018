"""Tasks for the system tests: tiny models whose every number is known."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from syncline.data.partition import Part
from syncline.tasks.base import Task


class _Point(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(size, dtype=torch.float64))


class Scattered(Task):
    """Jumps to a place of its own in the first period and stays there: what moves it later is averaging alone.

    Its metrics *are* its weights. `wait_in` names a period in which part `wait_part` waits until the file `gate` exists.
    """

    def __init__(self, size: int = 3, wait_in: int = 0, wait_part: int = -1, gate: str = "") -> None:
        self.size, self.wait_in, self.wait_part, self.gate = size, wait_in, wait_part, gate
        self.periods = 0

    def model(self) -> nn.Module:
        return _Point(self.size)

    def dataset(self, part: Part) -> TensorDataset:
        number = -1 if part.held_out else part.index
        return TensorDataset(torch.tensor([[number]]))

    def loss(self, model: Any, batch: Any) -> Tensor:
        total: Tensor = model.w.sum()
        return total

    def metrics(self, model: Any, batch: Any) -> dict[str, float]:
        return {f"w{i}": float(w) for i, w in enumerate(model.w)}

    def train(self, model: Any, optimizer: Any, batches: Iterator[Any], on_step: Callable[[int], bool]) -> float | None:
        (numbers,) = next(batches)
        number = int(numbers[0, 0])
        self.periods += 1
        if self.periods == 1:
            place = torch.Generator().manual_seed(number)
            with torch.no_grad():
                model.w += torch.randn(self.size, dtype=torch.float64, generator=place)
        if self.periods == self.wait_in and number == self.wait_part:
            until = time.monotonic() + 30
            while not Path(self.gate).exists() and time.monotonic() < until:
                time.sleep(0.01)
        on_step(1)
        return None


class Many(Scattered):
    """The same beside `count` small tensors with long names."""

    def __init__(self, count: int = 400) -> None:
        super().__init__()
        self.count = count

    def model(self) -> nn.Module:
        model = super().model()
        for i in range(self.count):
            parameter = nn.Parameter(torch.full((2,), float(i), dtype=torch.float64))
            model.register_parameter(f"one_of_many_small_tensors_with_a_long_name_{i}", parameter)
        return model


class Slow(Task):
    """A period takes `seconds`, in ten steps."""

    def __init__(self, seconds: float = 0.3) -> None:
        self.seconds = seconds

    def model(self) -> nn.Module:
        return _Point(4)

    def dataset(self, part: Part) -> TensorDataset:
        return TensorDataset(torch.zeros(1, 1))

    def loss(self, model: Any, batch: Any) -> Tensor:
        total: Tensor = model.w.sum()
        return total

    def train(self, model: Any, optimizer: Any, batches: Iterator[Any], on_step: Callable[[int], bool]) -> float | None:
        for _ in range(10):
            time.sleep(self.seconds / 10)
            if not on_step(1):
                break
        return None


class Diverging(Slow):
    """Turns to NaN on one part."""

    def train(self, model: Any, optimizer: Any, batches: Iterator[Any], on_step: Callable[[int], bool]) -> float | None:
        with torch.no_grad():
            model.w += float("nan")
        on_step(1)
        return None


class Raising(Slow):
    """Its training code has a bug."""

    def train(self, model: Any, optimizer: Any, batches: Iterator[Any], on_step: Callable[[int], bool]) -> float | None:
        raise RuntimeError("a bug in the user's code")


class DivergingOne(Slow):
    """Turns to NaN on part 1 alone."""

    def dataset(self, part: Part) -> TensorDataset:
        return TensorDataset(torch.tensor([[-1 if part.held_out else part.index]]))

    def train(self, model: Any, optimizer: Any, batches: Iterator[Any], on_step: Callable[[int], bool]) -> float | None:
        (numbers,) = next(batches)
        if int(numbers[0, 0]) == 1:
            with torch.no_grad():
                model.w += float("nan")
        on_step(1)
        return None


class Bowls(Task):
    """F_i = ½ h_i ‖w − c_i‖²: part i has a centre and a curvature of its own; `same` gives all parts those of part 0.

    `rows`: how many (equal) rows each part has; one, if it is not given.
    """

    def __init__(
        self, curvatures: list[float], size: int = 3, same: bool = False, rows: list[int] | None = None
    ) -> None:
        self.curvatures, self.size, self.same, self.rows = curvatures, size, same, rows

    def model(self) -> nn.Module:
        return _Point(self.size)

    def dataset(self, part: Part) -> TensorDataset:
        number = 0 if part.held_out or self.same else part.index
        return TensorDataset(torch.tensor([[number]] * (1 if self.rows is None else self.rows[number])))

    def centre(self, number: int) -> Tensor:
        return torch.randn(self.size, dtype=torch.float64, generator=torch.Generator().manual_seed(number))

    def loss(self, model: Any, batch: Any) -> Tensor:
        number = int(batch[0][0, 0])
        loss: Tensor = 0.5 * self.curvatures[number] * ((model.w - self.centre(number)) ** 2).sum()
        return loss


class Watched(Bowls):
    """Bowls whose metrics are the weights. A period takes `pause_s`; part `wait_part` waits in its period `wait_in`, and in
    that alone, until the file `gate` exists."""

    def __init__(
        self, pause_s: float = 0.0, wait_in: int = 0, wait_part: int = -1, gate: str = "", **bowls: Any
    ) -> None:
        super().__init__(**bowls)
        self.pause_s, self.wait_in, self.wait_part, self.gate = pause_s, wait_in, wait_part, gate
        self.periods = 0

    def metrics(self, model: Any, batch: Any) -> dict[str, float]:
        return {f"w{i}": float(w) for i, w in enumerate(model.w)}

    def train(self, model: Any, optimizer: Any, batches: Iterator[Any], on_step: Callable[[int], bool]) -> float | None:
        first = next(batches)
        self.periods += 1
        time.sleep(self.pause_s)
        if self.periods == self.wait_in and int(first[0][0, 0]) == self.wait_part:
            until = time.monotonic() + 30
            while not Path(self.gate).exists() and time.monotonic() < until:
                time.sleep(0.01)
        return super().train(model, optimizer, itertools.chain([first], batches), on_step)


class Liar(Task):
    """Everybody goes half way to nearly the same place; part `liar` sends −10 times its update."""

    def __init__(self, size: int = 8, liar: int = 2) -> None:
        self.size, self.liar = size, liar

    def model(self) -> nn.Module:
        return _Point(self.size)

    def dataset(self, part: Part) -> TensorDataset:
        return TensorDataset(torch.tensor([[-1 if part.held_out else part.index]]))

    def loss(self, model: Any, batch: Any) -> Tensor:
        total: Tensor = model.w.sum()
        return total

    def place(self, number: int) -> Tensor:
        """At a distance of 1 from the start, and about 0.1 from each other's."""
        noise: Tensor = torch.randn(self.size, dtype=torch.float64, generator=torch.Generator().manual_seed(number))
        mean = torch.full((self.size,), float(self.size) ** -0.5, dtype=torch.float64)
        place: Tensor = mean + 0.1 * noise / noise.norm()
        return place

    def train(self, model: Any, optimizer: Any, batches: Iterator[Any], on_step: Callable[[int], bool]) -> float | None:
        (numbers,) = next(batches)
        number = int(numbers[0, 0])
        with torch.no_grad():
            model.w += (-10 if number == self.liar else 1) * 0.5 * (self.place(number) - model.w)
        on_step(1)
        return None
