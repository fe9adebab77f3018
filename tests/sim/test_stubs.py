"""The stubs of a simulation behave as real children do."""

from __future__ import annotations

from syncline.runtime.child_messages import MakeModel, PrepareRun, TrainPeriod
from syncline.shm import SharedMemory
from syncline_agent.training_child import PROGRESS_BYTES
from syncline_sim.inline_children import Disk, StubEvaluator, StubTrainer
from syncline_sim.scenario import small_spec


def test_a_stub_goes_on_with_what_it_kept_of_the_same_submission_alone() -> None:
    disk: Disk = {}
    spec = small_spec()
    manifest = StubEvaluator(SharedMemory()).make_model(MakeModel(spec=spec, chunk_bytes=4096)).manifest

    def clock(submission: str, *, periods: int = 0) -> int:
        memory = SharedMemory()
        memory.grow(PROGRESS_BYTES)
        stub = StubTrainer(memory, disk)
        path = "a1/run/a1.safetensors"
        question = PrepareRun(spec=spec, manifest=manifest, state_path=path, submission=submission)
        found = stub.prepare(question).clock
        for k in range(periods):
            stub.period(TrainPeriod(version=k, clock=k + 1, part=0, parts=1))
        return found

    assert clock("first", periods=3) == 0
    assert clock("first") == 3
    assert clock("second", periods=1) == 0
    assert (clock("second"), clock("first")) == (1, 0)
