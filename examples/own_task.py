"""A task of one's own, trained by a local fleet through the Python client: `python examples/own_task.py`.

The agents load `Rings` from this file, as services on other machines would load it from their own disks. The script submits a
run, follows it, prints the reasons of the last merge, and writes the model.
"""

from __future__ import annotations

import asyncio
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import syncline

HERE = Path(__file__).resolve()
ROWS, HELD_OUT = 1200, 300


class Rings(syncline.Task):
    """Three rings in the plane, one class each; a linear model cannot separate them."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 3))

    def dataset(self, part: syncline.Part) -> TensorDataset:
        chance = torch.Generator().manual_seed(part.seed)
        labels = torch.arange(ROWS + HELD_OUT) % 3
        angles = 2 * math.pi * torch.rand(len(labels), generator=chance)
        radii = 1.0 + labels + 0.2 * torch.randn(len(labels), generator=chance)
        points = torch.stack([radii * angles.cos(), radii * angles.sin()], dim=1)
        if part.held_out:
            return TensorDataset(points[ROWS:], labels[ROWS:])
        rows = part.rows(ROWS, label=labels[:ROWS])
        return TensorDataset(points[rows], labels[rows])

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        points, labels = batch
        return nn.functional.cross_entropy(model(points), labels)

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, float]:
        points, labels = batch
        right = model(points).argmax(dim=1) == labels
        return {"loss": self.loss(model, batch).item(), "accuracy": right.float().mean().item()}


async def main(model_file: Path) -> None:
    """Train `Rings` with three agents, each with few rows of some classes, and write the model."""
    spec = syncline.RunSpec.model_validate(
        {
            "name": "rings",
            "task": f"{HERE.name}:Rings",
            "agents": {"min": 3},
            "partition": {"kind": "dirichlet", "alpha": 0.5},
            "sync": {"kind": "rounds", "quorum": 2, "grace_s": 1.0},
            "local": {"steps": 20, "optimizer": {"kind": "adam", "lr": 0.02}},
            "stop": {"versions": 20},
            "seed": 1,
        }
    )
    async with syncline.local_fleet(agents=3, allow_task=[spec.task], task_dir=HERE.parent) as client:
        for warning in await client.submit(spec):
            print(f"warning: {warning}")
        shown = 0
        async for progress in client.follow(spec.name):
            if progress.version > shown and progress.metrics:
                shown = progress.version
                print(f"version {shown}: accuracy {progress.metrics.get('accuracy') or math.nan:.3f}")
        async for commit in client.history(spec.name, first=spec.stop.versions):
            merged = ", ".join(f"{update.agent} {update.weight:.2f}" for update in commit.plan.merged)
            print(f"version {commit.version} was made of: {merged}")
        await client.export(spec.name, model_file)
        print(f"wrote {model_file}")


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1] if len(sys.argv) > 1 else "rings.safetensors")))
