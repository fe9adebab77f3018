"""Compare ways of averaging on one fleet through the Python client: `python examples/compare_averaging.py`.

The runs follow each other on the same three agents and the same data; only the settings of averaging differ.
"""

from __future__ import annotations

import asyncio
from typing import Any

import syncline

COMMON: dict[str, Any] = {
    "task": "syncline.tasks.digits:Digits",
    "agents": {"min": 3},
    "partition": {"kind": "dirichlet", "alpha": 0.5},
    "local": {"steps": 20, "optimizer": {"kind": "sgd", "lr": 0.2}},
    "stop": {"versions": 6},
    "seed": 1,
}
AVERAGING: dict[str, dict[str, Any]] = {
    "rounds": {},
    "asynchronous": {"sync": {"kind": "async", "buffer": 2}},
    "momentum": {"outer": {"kind": "momentum", "lr": 0.5}},
}


async def main() -> None:
    """Run every entry of `AVERAGING` and print the final accuracy and the bytes that the updates took."""
    async with syncline.local_fleet(agents=3) as client:
        for name, settings in AVERAGING.items():
            await client.submit(syncline.RunSpec.model_validate({**COMMON, **settings, "name": name}))
            accuracy: float | None = None
            async for progress in client.follow(name):
                accuracy = progress.metrics.get("accuracy", accuracy)
            sent = sum([commit.bytes_up async for commit in client.history(name)])
            print(
                f"{name:<13} accuracy {accuracy if accuracy is not None else float('nan'):.3f}  {sent / 1e6:.2f} MB up"
            )


if __name__ == "__main__":
    asyncio.run(main())
