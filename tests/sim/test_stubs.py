"""The stubs of a simulation behave as real children do."""

from __future__ import annotations

from syncline.shm import SharedMemory
from syncline_agent.training_child import PROGRESS_BYTES, Period
from syncline_sim.inline_children import Disk, StubEvaluator, StubTrainer
from syncline_sim.scenario import small_spec


def test_a_stub_goes_on_with_what_it_kept_of_the_same_submission_alone() -> None:
    disk: Disk = {}
    spec = small_spec().model_dump(mode="json")
    manifest = StubEvaluator(SharedMemory()).describe(spec, 4096)["manifest"]

    def clock(submission: str, *, periods: int = 0) -> int:
        memory = SharedMemory()
        memory.grow(PROGRESS_BYTES)
        stub = StubTrainer(memory, disk)
        found = int(stub.prepare(spec, manifest, "a1/run/a1.safetensors", submission)["clock"])
        for k in range(periods):
            stub.period(**Period(k, k + 1, 0, 1)._asdict())
        return found

    assert clock("first", periods=3) == 0
    assert clock("first") == 3
    assert clock("second", periods=1) == 0
    assert (clock("second"), clock("first")) == (1, 0)
