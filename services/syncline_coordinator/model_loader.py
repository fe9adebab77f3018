"""Load a run's task in a child process: its model, and the model's manifest."""

from __future__ import annotations

from syncline.bus.base import Bus
from syncline.errors import ConfigError
from syncline.model.manifest import Manifest
from syncline.runtime.child import Asked, ChildFailed, Start
from syncline.runtime.child_messages import MakeModel
from syncline.shm import SharedMemory
from syncline.spec.run_spec import RunSpec
from syncline.wire.messages import decode
from syncline_coordinator.merge.reducer import chunk_bytes_for
from syncline_coordinator.reservation import most_agents

MAX_MANIFEST_BYTES = 64 << 20


class ModelLoader:
    """Starts child processes that load a run's task, and reports their progress."""

    def __init__(self, bus: Bus, start_child: Start) -> None:
        self._bus = bus
        self._start_child = start_child
        self._loading: dict[str, Asked] = {}  # by run

    def doing(self, run: str) -> str:
        """Return the activity of the child that loads a run, as reported; '' without a report or a child."""
        child = self._loading.get(run)
        return child.doing if child is not None else ""

    async def load(
        self, spec: RunSpec, memory: SharedMemory, manifest: bytes = b"", *, check: bool = True
    ) -> tuple[Asked, Manifest]:
        """Start a child process with the task's model.

        Args:
            memory: the center's, shared with the child.
            manifest: that of a run which has one already, to be compared with the model's.
            check: try the optimiser's settings, which loads modules of some 80 MB into the child. They are tried at submit.

        Raises:
            ConfigError: the task cannot be used.
            ChildDied: the process died, killed for memory perhaps.
        """
        child = await self._start_child(memory)
        chunk = chunk_bytes_for(spec, most_agents(spec), self._bus.max_payload)
        self._loading[spec.name] = child
        try:
            question = MakeModel(spec=spec, chunk_bytes=chunk, manifest=manifest, check_optimizer=check)
            layout = await child.ask(question)
            return child, decode(Manifest, layout.manifest, limit=MAX_MANIFEST_BYTES)
        except ChildFailed as error:
            await child.close()
            raise error.config or ConfigError("task", error.problem, "Correct the task's code") from None
        except BaseException:
            await child.close()
            raise
        finally:
            self._loading.pop(spec.name, None)

    async def manifest_of(self, spec: RunSpec) -> Manifest:
        """Return the manifest of the task's model. Raises as `load`."""
        memory = SharedMemory()
        try:
            child, manifest = await self.load(spec, memory)
            await child.close()
        finally:
            memory.close()
        return manifest
