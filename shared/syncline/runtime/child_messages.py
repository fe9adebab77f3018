"""Typed records between a service and its child process: questions, answers, and two messages of any child.

| child | question | answer |
|---|---|---|
| training child | `DescribeDevice` | `DeviceDescription` |
| | `PrepareRun` | `RunPrepared` |
| | `TrainPeriod` | `PeriodReport` |
| | `MakeElasticUpdate` | `UpdateReport` |
| | `RetrySave` | `SaveReport` |
| evaluating child | `MakeModel` | `ModelLayout` |
| | `WriteInitialModel`, `CopyCenter` | `Done` |
| | `EvaluateCenter` | `EvaluationReport` |
| any | – | `Doing` (before the answer), `Failed` (instead of it) |

Records are validated when they are made and when they are read, because answers hold results of the user's code. On the socket
a record is a msgpack map with its `kind` under `t`. Tensors do not travel in records: they are in shared memory.

This module imports no torch, so that the agent service stays small.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Generic, TypeVar

import msgpack
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

from syncline.settings import parse
from syncline.spec.run_spec import RunSpec

MAX_MESSAGE_BYTES = 64 << 20  # the manifest of a very large model, with room


def sendable(text: str) -> str:
    """Return the text without surrogates, which UTF-8 cannot hold: names of files may contain them."""
    return text.encode(errors="replace").decode()


def _as_spec(value: Any) -> RunSpec:
    return value if isinstance(value, RunSpec) else parse(RunSpec, value)


Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Seconds = Annotated[float, Field(ge=0)]
Text = Annotated[str, BeforeValidator(sendable)]
Spec = (
    Annotated[  # travels as JSON values; reading it raises ConfigError for settings that this version does not accept
        RunSpec, BeforeValidator(_as_spec), PlainSerializer(lambda spec: spec.model_dump(mode="json"))
    ]
)


class Message(BaseModel):
    """Base of all records of this module. Subclasses with a `kind` travel; the others are parts of them."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")
    kind: ClassVar[str] = ""


class Answer(Message):
    """Base of all answers."""


A = TypeVar("A", bound=Answer)


class Question(Message, Generic[A]):
    """Base of all questions. A subclass names the type of its answer twice: for the type checker and for decoding."""

    answer: ClassVar[type[Answer]]


def encode(message: Message) -> bytes:
    """Return the record as it travels."""
    assert message.kind, f"{type(message).__name__} is a part, not a message"
    return bytes(msgpack.packb({"t": message.kind, **message.model_dump()}))


def decode(data: bytes, *expected: type[Message]) -> Message:
    """Return the record in `data`.

    Raises:
        ValueError: `data` is not msgpack, not of an expected kind, or does not match its type (pydantic's ValidationError).
        ConfigError: it holds a spec with settings that this version does not accept.
    """
    fields = msgpack.unpackb(data, max_bin_len=MAX_MESSAGE_BYTES, strict_map_key=False)
    kind = fields.pop("t", None) if isinstance(fields, dict) else None
    for message in expected:
        if message.kind == kind:
            return message.model_validate(fields)
    raise ValueError(f"a message of kind {kind!r}, not {' or '.join(repr(message.kind) for message in expected)}")


# -- any child -------------------------------------------------------------------------------------------------------------
class Doing(Message):
    """What the child is doing, in words for people; sent before the answer, any number of times."""

    kind: ClassVar[str] = "doing"
    text: Text


class Failed(Message):
    """An error in place of the answer. A `setting` means that the user's input caused it, else the code did."""

    kind: ClassVar[str] = "failed"
    problem: Text
    setting: Text = ""
    hint: Text = ""


class Done(Answer):
    """An answer without content."""

    kind: ClassVar[str] = "done"


# -- the training child ----------------------------------------------------------------------------------------------------
class DeviceDescription(Answer):
    """The device that the training child has claimed."""

    kind: ClassVar[str] = "device"
    name: Text
    shared: bool  # with other agents of this host


class DescribeDevice(Question[DeviceDescription]):
    """Claim a device with the first such question, and describe the device."""

    kind: ClassVar[str] = "describe-device"
    answer = DeviceDescription


class RunPrepared(Answer):
    """The model is made, with the state of an earlier process of this agent if the disk has one."""

    kind: ClassVar[str] = "run-prepared"
    clock: Count  # local periods in the restored state; 0: the agent begins with the center
    advice: list[Text] = []


class PrepareRun(Question[RunPrepared]):
    """Load the task, make the model and restore the agent's state from its disk."""

    kind: ClassVar[str] = "prepare-run"
    answer = RunPrepared
    spec: Spec
    manifest: bytes  # a wire record
    state_path: Text
    submission: str  # id of head's manifest: tells apart the runs that have had this name


class SaveReport(Answer):
    """Result of writing the agent's state to its disk."""

    kind: ClassVar[str] = "save"
    problem: Text = ""  # why the disk did not take it; empty: it is saved, or not due yet
    blocks_offer: bool = False  # the update must not be offered before the state is on the disk


class UpdateReport(Answer):
    """An update that lies in its outbox."""

    kind: ClassVar[str] = "update"
    broken: bool = False  # the update is not finite: it will be dropped, and the next period needs a center
    save: SaveReport = SaveReport()


class EvaluationReport(Answer):
    """Metrics of a model on the held-out data, as the task names them."""

    kind: ClassVar[str] = "evaluation"
    metrics: dict[Text, float]
    skipped: dict[Text, Count] = {}  # batches without a value, by metric
    seconds: Seconds = 0.0  # that it took


class PeriodReport(Answer):
    """Result of one local period."""

    kind: ClassVar[str] = "period"
    stopped: bool = False  # ended early at the service's request: it has made no update
    steps: Count = 0
    rows: Count = 0  # of the agent's part
    loss: float | None = None  # mean of the period, as the task returns it
    seconds: Seconds = 0.0  # of training
    samples_per_s: Seconds = 0.0
    advice: list[Text] = []
    evaluation: EvaluationReport | None = None  # of the agent's own model, where the run asks for it
    evaluation_problem: Text = ""  # why that failed
    update: UpdateReport | None = None  # None: stopped, or `MakeElasticUpdate` makes it


class TrainPeriod(Question[PeriodReport]):
    """Train one local period, beginning with the center in the inbox if that is fresh."""

    kind: ClassVar[str] = "train-period"
    answer = PeriodReport
    version: Count  # of the center in the inbox
    clock: Count  # local periods finished with this one
    part: Count  # number of the agent's part of the data
    parts: Count
    fresh_center: bool = True  # the center in the inbox is newer than the one that the child took over last
    outbox: Count = 0  # number of the outbox that takes the update
    verdicts: dict[int, bool] = {}  # by clock, of the updates that were judged last: whether they were merged


class MakeElasticUpdate(Question[UpdateReport]):
    """After a period of elastic averaging: make the update from the center that is in the inbox by now."""

    kind: ClassVar[str] = "make-elastic-update"
    answer = UpdateReport
    period: TrainPeriod
    fresh_center: bool


class RetrySave(Question[SaveReport]):
    """Write the state to the disk again, after the disk did not take it."""

    kind: ClassVar[str] = "retry-save"
    answer = SaveReport
    clock: Count


# -- the evaluating child --------------------------------------------------------------------------------------------------
class ModelLayout(Answer):
    """The layout of the task's model in the flat vector."""

    kind: ClassVar[str] = "layout"
    manifest: bytes  # a wire record


class MakeModel(Question[ModelLayout]):
    """Load the task and make its model."""

    kind: ClassVar[str] = "make-model"
    answer = ModelLayout
    spec: Spec
    chunk_bytes: Count
    manifest: bytes = b""  # of the run; empty: make it
    check_optimizer: bool = True  # try the settings of the agents' optimiser, which loads some 80 MB of modules


class WriteInitialModel(Question[Done]):
    """Write version 0 of the center into shared memory."""

    kind: ClassVar[str] = "write-initial-model"
    answer = Done


class CopyCenter(Question[Done]):
    """Copy the center out of shared memory, so that the service may write the next version."""

    kind: ClassVar[str] = "copy-center"
    answer = Done


class EvaluateCenter(Question[EvaluationReport]):
    """Evaluate the center that was copied last on the held-out data."""

    kind: ClassVar[str] = "evaluate-center"
    answer = EvaluationReport
    version: Count  # of that center: seeds the random numbers
