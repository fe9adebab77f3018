"""What a merge costs the coordinator: `python tests/bench/merge.py`. A real broker; the reducer alone in a process of its own.

Prints, for each rule and number of agents, the seconds of a merge and the peak memory of that process, beside the budget:
2 × (model + what is kept beside it) + 256 MiB, everything that is imported included.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from syncline.bus.blobs import put_chunk, windowed
from syncline.bus.nats.bus import NatsBus
from syncline.bus.nats.lane import Connection
from syncline.bus.server.accounts import read_seed
from syncline.bus.server.embedded import EmbeddedBroker
from syncline.chance import new_id
from syncline.model.manifest import ALIGN_ELEMENTS, Manifest
from syncline.runtime.service import loop_factory
from syncline.shm import SharedMemory
from syncline.spec.run_spec import RunSpec, parse
from syncline.wire import subjects
from syncline.wire.chunks import BlobDigest, chunk_digest, pack_chunk
from syncline.wire.messages import BlobRef, Plan, PlanEntry, decode, encode
from syncline_coordinator.app import REDUCERS
from syncline_coordinator.merge.center import Center
from syncline_coordinator.merge.reducer import Reducer, chunk_bytes_for
from syncline_coordinator.reservation import Reservation, most_agents

BUDGET_BYTES = 256 << 20
NEEDED: dict[str, dict[str, Any]] = {"norm_clip": {"max_norm": 1.0}, "centred_clip": {"tau": 1.0}}
EXAMPLES = ("mean", "median", "krum", "geometric_median", "mean+adam")


@dataclass(frozen=True, slots=True)
class Case:
    """One row: the run's spec, as a worker is told it."""

    rule: str
    agents: int
    params: int
    merges: int

    @property
    def spec(self) -> RunSpec:
        rule, _, outer = self.rule.partition("+")
        merge = {"rule": rule, **NEEDED.get(rule, {}), **({"f": 0} if rule == "krum" else {})}
        asked = {"name": "bench", "task": "a:B", "agents": {"min": max(3, self.agents)}, "merge": merge}
        return parse(RunSpec, {**asked, "outer": {"kind": outer or "sgd"}})

    def layout(self, max_payload: int) -> Manifest:
        chunk = chunk_bytes_for(self.spec, most_agents(self.spec), max_payload)
        elements = max(ALIGN_ELEMENTS, chunk // 4 // ALIGN_ELEMENTS * ALIGN_ELEMENTS)
        return Manifest(dtype="fp32", elements=self.params, chunk_elements=elements, tensors=[])


async def measure(cases: list[Case]) -> list[dict[str, Any]]:
    rows = []
    async with EmbeddedBroker() as broker:
        seed = broker.keyring.identity(subjects.COORDINATOR).seed
        bus = await NatsBus.connect(Connection(broker.url, subjects.COORDINATOR, seed))
        held: tuple[int, int] = (0, 0)
        plan = b""
        for case in sorted(cases, key=lambda c: c.agents):
            layout = case.layout(bus.max_payload)
            if held != (case.agents, case.params):
                plan, held = await offer(bus, case, layout), (case.agents, case.params)
            (broker.directory / "plan").write_bytes(plan)
            asked = [sys.executable, __file__, "--worker", broker.url, str(broker.keyring.path(subjects.COORDINATOR))]
            said = await asyncio.to_thread(
                subprocess.run,
                [
                    *asked,
                    str(broker.directory / "plan"),
                    json.dumps([case.rule, case.agents, case.params, case.merges]),
                ],
                check=True,
                capture_output=True,
                text=True,
            )
            rows.append(json.loads(said.stdout))
            print(shown(rows[-1]), flush=True)
        await bus.close()
    return rows


async def offer(bus: NatsBus, case: Case, layout: Manifest) -> bytes:
    """Puts an update of every agent, chunk by chunk; returns the plan that merges them."""
    space = Reservation.of(case.spec, layout, case.agents)
    for stream in space.streams("bench"):
        await bus.delete_stream(stream.name)
        await bus.ensure_stream(stream)
    entries = []
    for i in range(case.agents):
        agent, ref = f"a{i:03d}", BlobRef(id=new_id(), size=layout.nbytes, chunks=layout.chunks)
        digest = BlobDigest()

        async def one(k: int, agent: str = agent, ref: BlobRef = ref, digest: BlobDigest = digest) -> None:
            part = layout.chunk(k)
            data = torch.randn(part.stop - part.start).numpy().data.cast("B")
            digest.add(k, chunk_digest(data))
            frame = pack_chunk(ref.id, k, ref.chunks, "raw", data)
            await put_chunk(bus, f"{subjects.update_prefix('bench', agent, ref.id)}.{k}", frame)

        await windowed(layout.chunks, 8, one)
        entries.append(PlanEntry(agent=agent, clock=1, weight=1 / case.agents, blob=ref, digest=digest.digest()))
    return encode(Plan(version=1, reason="bench", merged=entries))


async def work(url: str, key: str, plan_data: bytes, case: Case) -> dict[str, Any]:
    """The coordinator's part of it."""
    bus = await NatsBus.connect(Connection(url, subjects.COORDINATOR, read_seed(Path(key))))
    spec, layout, memory = case.spec, case.layout(bus.max_payload), SharedMemory()
    plan = decode(Plan, plan_data)
    imported = peak_bytes()
    center = Center(layout, memory, spec.state_vectors)
    seconds, cpu_s = [], []
    with ThreadPoolExecutor(REDUCERS) as executor:
        reducer = Reducer(bus, spec, layout, center, executor)
        for _ in range(case.merges):
            began, began_cpu = time.perf_counter(), time.process_time()
            merged = await reducer.merge(plan)
            seconds.append(time.perf_counter() - began)
            cpu_s.append(time.process_time() - began_cpu)
            for prefix in (subjects.model_prefix, subjects.outer_prefix):
                await bus.purge(subjects.model_stream("bench"), f"{prefix('bench', merged.model.id)}.>")
    await bus.close()
    kept = (1 + spec.state_vectors) * layout.nbytes
    return {
        "rule": case.rule, "agents": case.agents, "params": case.params, "merge_s": statistics.median(seconds),
        "cpu_s": statistics.median(cpu_s), "imports_bytes": imported, "vectors_bytes": kept,
        "peak_bytes": peak_bytes(), "budget_bytes": 2 * kept + BUDGET_BYTES,
    }  # fmt: skip


def peak_bytes() -> int:
    """The largest resident memory of this process so far; of this program alone, not of what it was forked from."""
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def shown(row: dict[str, Any]) -> str:
    mib = {name: row[f"{name}_bytes"] / 2**20 for name in ("vectors", "imports", "peak", "budget")}
    return (
        f"{row['rule']:>18}  {row['agents']:>4} agents  merge {row['merge_s']:6.2f} s, CPU {row['cpu_s']:6.2f} s  "
        f"peak {mib['peak']:5.0f} MiB of {mib['budget']:.0f} (vectors {mib['vectors']:.0f}, imports {mib['imports']:.0f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=int, default=10_000_000, help="parameters of the model, float32")
    parser.add_argument("--agents", type=int, nargs="+", default=[2, 8, 64])
    parser.add_argument("--rules", nargs="+", default=list(EXAMPLES), help="rules, or rule+outer")
    parser.add_argument("--merges", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        if asked.worker:
            url, key, plan, case = asked.worker
            print(json.dumps(runner.run(work(url, key, Path(plan).read_bytes(), Case(*json.loads(case))))))
            return
        cases = [Case(rule, n, asked.params, asked.merges) for n in asked.agents for rule in asked.rules]
        rows = runner.run(measure(cases))
    over = [row for row in rows if row["peak_bytes"] > row["budget_bytes"]]
    if asked.json:
        print(json.dumps({"rows": rows, "over_budget": len(over)}))
    sys.exit(1 if over else 0)


if __name__ == "__main__":
    main()
