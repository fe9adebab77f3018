"""The reducer over a bus that is a dict: chunk by chunk what the formula says, and every bad update named."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from syncline.averaging.merge import RULES, Mean, Rule
from syncline.bus.base import Stored
from syncline.bus.blobs import get_chunk, put_blob
from syncline.errors import StreamFull
from syncline.model.flat import manifest_of
from syncline.model.manifest import Manifest
from syncline.shm import SharedMemory
from syncline.spec.run_spec import RunSpec, parse
from syncline.wire import subjects
from syncline.wire.chunks import pack_chunk
from syncline.wire.messages import Plan, PlanEntry
from syncline_coordinator.merge.center import Center
from syncline_coordinator.merge.reducer import LEAST_DEPTH, STAGING_BYTES, Reducer, chunk_bytes_for, digest_of
from syncline_coordinator.merge.updates import UpdateUnusable
from syncline_sim.reference_merge import expected_center

RUN = "run-1"
ELEMENTS = 5000  # five chunks of 1,024 elements, the last one short


def vectors(n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(ELEMENTS, generator=generator, dtype=dtype) for _ in range(n)]


def spec_of(**settings: Any) -> RunSpec:
    return parse(RunSpec, {"name": RUN, "task": "a.b:C", **settings})


Make = Callable[..., "Place"]


class Place:
    """A coordinator's center and reducer, and agents that put updates."""

    def __init__(
        self,
        bus: Any,
        dtype: torch.dtype = torch.float32,
        executor: Any = None,
        *,
        buffer: int = 0,
        **settings: Any,
    ) -> None:
        """`buffer`: so many of the last elements are a buffer."""
        self.bus, self.dtype, self.memory = bus, dtype, SharedMemory()
        self.spec = spec = spec_of(**settings)
        model = nn.ParameterList([nn.Parameter(torch.zeros(ELEMENTS - buffer, dtype=dtype))])
        if buffer:
            model.register_buffer("statistic", torch.zeros(buffer, dtype=dtype))
        self.layout: Manifest = manifest_of(model, 4096, sections=spec.local.sections)
        self.center = Center(self.layout, self.memory, spec.state_vectors)
        self.center.w_P.copy_(vectors(1, dtype, seed=99)[0])
        self.before_P = self.center.w_P.clone()  # when the last plan was made
        self._on_bus = False
        self.reducer = Reducer(bus, spec, self.layout, self.center, executor)

    async def offered(self, agent: str, update: Tensor, weight: float) -> PlanEntry:
        prefix = partial(subjects.update_prefix, RUN, agent)
        data = memoryview(bytearray(update.numpy().tobytes()))
        how: dict[str, Any] = {"sections": self.layout.sections}
        ref, digest = await put_blob(self.bus, prefix, data, self.layout.chunk_bytes, **how)
        return PlanEntry(agent=agent, clock=3, weight=weight, blob=ref, digest=digest)

    async def plan(
        self, updates: Sequence[Tensor], weights: Sequence[float] | None = None, *, version: int = 1
    ) -> Plan:
        if not self._on_bus:
            await self.reducer.put_center()
            self._on_bus = True
        self.before_P = self.center.w_P.clone()
        weights = weights or [1 / len(updates)] * len(updates)
        entries = [await self.offered(f"a{i}", u, w) for i, (u, w) in enumerate(zip(updates, weights, strict=True), 1)]
        return Plan(version=version, reason="all", merged=entries)

    def state(self) -> Tensor:
        """All of the outer state, vector after vector."""
        return torch.stack(self.center.states(slice(0, ELEMENTS)))

    def put_frame(self, entry: PlanEntry, k: int, frame: bytes) -> None:
        self.bus.held[f"{subjects.update_prefix(RUN, entry.agent, entry.blob.id)}.{k}"] = frame


@pytest.fixture
def make(bus: Any) -> Iterator[Make]:
    """Places on one bus; their memory is given back at the end."""
    made: list[Place] = []

    def one(*args: Any, **options: Any) -> Place:
        made.append(Place(bus, *args, **options))
        return made[-1]

    yield one
    for place in made:
        place.memory.close()


@pytest.fixture
def place(make: Make) -> Place:
    return make()


async def unusable(place: Place, plan: Plan) -> UpdateUnusable:
    states = place.spec.state_vectors
    before, kept = place.center.w_P.clone(), place.state().clone() if states else None
    with pytest.raises(UpdateUnusable) as error:
        await place.reducer.merge(plan)
    assert torch.equal(place.center.w_P, before), "the center stays as it was"
    assert kept is None or torch.equal(place.state(), kept), "and so does what is kept beside it"
    return error.value


# -- what the formula says ---------------------------------------------------------------------------------------------
async def test_the_update_of_one_agent_makes_the_center_that_agents_model_to_the_last_bit(place: Place) -> None:
    (update,) = vectors(1)
    await place.reducer.merge(await place.plan([update]))
    assert torch.equal(place.center.w_P, place.before_P + update)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("n", [2, 4, 7])
async def test_uniform_weights_make_the_center_the_mean_of_the_models(
    make: Make, n: int, dtype: torch.dtype, tolerance: float
) -> None:
    place = make(dtype)
    updates = vectors(n, dtype)
    await place.reducer.merge(await place.plan(updates))
    models = torch.stack([place.before_P + u for u in updates])
    assert torch.allclose(place.center.w_P, models.mean(0), rtol=tolerance, atol=tolerance)


async def test_weights_and_the_outer_learning_rate_are_applied(make: Make) -> None:
    place = make(torch.float64, outer={"lr": 0.5})
    x, y = vectors(2, torch.float64)
    await place.reducer.merge(await place.plan([x, y], [0.25, 0.75]))
    assert torch.allclose(place.center.w_P, place.before_P + 0.5 * (0.25 * x + 0.75 * y), rtol=1e-12)


async def test_the_next_center_lies_on_the_bus_and_another_coordinator_reads_it(place: Place, make: Make) -> None:
    merged = await place.reducer.merge(await place.plan(vectors(3)))
    assert (merged.model.size, merged.model.chunks) == (place.layout.nbytes, 5)
    other = make()
    await other.reducer.get_center(merged.model, 1)
    assert torch.equal(other.center.w_P, place.center.w_P)
    assert digest_of(other.center.w_P) == merged.digest


async def test_bytes_are_counted(place: Place, bus: Any) -> None:
    merged = await place.reducer.merge(await place.plan(vectors(3)))
    assert merged.bytes_got == 3 * place.layout.nbytes
    prefix = subjects.model_prefix(RUN, merged.model.id)
    assert merged.bytes_put == sum(len(data) for subject, data in bus.held.items() if subject.startswith(prefix))


async def test_version_zero_is_put_as_it_is(place: Place, make: Make) -> None:
    put = await place.reducer.put_center()
    other = make()
    await other.reducer.get_center(put.model, 0)
    assert torch.equal(other.center.w_P, place.center.w_P) and put.digest == digest_of(place.center.w_P)


async def test_rounds_take_turns_in_the_two_places(place: Place) -> None:
    expected = place.center.w_P.clone()
    for seed in range(4):
        (update,) = vectors(1, seed=seed)
        await place.reducer.merge(await place.plan([update]))
        expected += update
        assert torch.equal(place.center.w_P, expected)


SCAFFOLD: dict[str, Any] = {"local": {"control_variates": "scaffold"}}


async def test_changes_of_control_variates_are_added_up_whatever_the_weights(make: Make) -> None:
    place = make(torch.float64, **SCAFFOLD)
    place.center.control_P.copy_(control := vectors(1, torch.float64, seed=5)[0])
    deltas, changes = vectors(3, torch.float64), vectors(3, torch.float64, seed=1)
    both = [torch.cat(pair) for pair in zip(deltas, changes, strict=True)]
    merged = await place.reducer.merge(await place.plan(both, [0.5, 0.2, 0.3]))
    moved = 0.5 * deltas[0] + 0.2 * deltas[1] + 0.3 * deltas[2]
    assert torch.allclose(place.center.w_P, place.before_P + moved, rtol=1e-12)
    assert torch.allclose(place.center.control_P, control + sum(changes), rtol=1e-12)
    assert (merged.model.size, merged.model.chunks) == (2 * place.layout.nbytes, 10)
    assert merged.digest == digest_of(place.center.w_P)


async def test_another_coordinator_reads_the_sum_of_control_variates_with_the_center(make: Make) -> None:
    settings: dict[str, Any] = {**SCAFFOLD, "outer": {"kind": "momentum"}}
    place, other = make(**settings), make(**settings)
    merged = await place.reducer.merge(await place.plan([torch.cat(vectors(2))]))
    await other.reducer.get_center(merged.model, 1)
    assert torch.equal(other.center.w_P, place.center.w_P)
    assert torch.equal(other.center.control_P, place.center.control_P) and place.center.control_P.any()
    assert torch.equal(other.state(), place.state()) and place.state().any()


async def test_version_0_has_control_variates_of_zero(make: Make) -> None:
    place, other = make(**SCAFFOLD), make(**SCAFFOLD)
    first = await place.reducer.put_center()
    other.center.control_P.fill_(7.0)
    await other.reducer.get_center(first.model, 0)
    assert torch.equal(other.center.w_P, place.center.w_P) and not other.center.control_P.any()


async def test_a_bad_control_variate_is_named_and_changes_nothing(make: Make) -> None:
    place = make(**SCAFFOLD)
    good, bad = vectors(2), vectors(2, seed=1)
    bad[1][4999] = float("nan")
    error = await unusable(place, await place.plan([torch.cat(good), torch.cat(bad)]))
    assert (error.agent, error.why) == ("a2", "it holds NaN or infinite values: its training diverged")
    assert not place.center.control_P.any()
    plan = await place.plan([torch.cat(good)])
    flipped = plan.merged[0].blob
    data = memoryview(cast(Any, vectors(1, seed=3)[0][:1024].numpy())).cast("B")
    place.put_frame(plan.merged[0], 5, pack_chunk(flipped.id, 5, 10, "raw", data))
    assert (await unusable(place, plan)).why == "its content does not match the digest that its agent signed"


# -- every rule --------------------------------------------------------------------------------------------------------
NEEDED: dict[str, dict[str, Any]] = {"norm_clip": {"max_norm": 9.0}, "centred_clip": {"tau": 9.0}}


def ruled(make: Make, rule: str, dtype: torch.dtype = torch.float64, **more: Any) -> Place:
    section = {"rule": rule, **NEEDED.get(rule, {})}
    return make(dtype, agents={"min": 9}, merge=section, **more)


@pytest.fixture(params=sorted(RULES))
def rule(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def test_every_rule_makes_what_its_formula_says_with_any_outer_optimiser(make: Make, rule: str) -> None:
    place = ruled(make, rule, outer={"kind": "adam", "lr": 0.5})
    spec, kept = place.spec, [np.zeros(ELEMENTS) for _ in range(place.spec.state_vectors)]
    for version in range(3):
        updates, before = vectors(7, torch.float64, seed=version), place.center.w_P.numpy().copy()
        await place.reducer.merge(await place.plan(updates, version=version + 1))
        expected, kept = expected_center(spec, before, [u.numpy() for u in updates], [1 / 7] * 7, kept, version)
        assert np.allclose(place.center.w_P.numpy(), expected, rtol=1e-7, atol=1e-7)
        assert np.allclose(place.state().numpy(), np.stack(kept), rtol=1e-7, atol=1e-7)


BUFFER = 1500  # the last elements, over a border between chunks


@pytest.mark.parametrize("outer", ["sgd", "nesterov", "adam"])
async def test_a_buffer_becomes_the_mean_of_values_with_any_rule_and_outer_optimiser(
    make: Make, rule: str, outer: str
) -> None:
    """An update holds differences of the parameters, and values of the buffers."""
    place = ruled(make, rule, buffer=BUFFER, outer={"kind": outer, "lr": 0.5})
    spec, kept = place.spec, [np.zeros(ELEMENTS) for _ in range(place.spec.state_vectors)]
    places = place.layout.buffers
    assert places == [slice(ELEMENTS - BUFFER, ELEMENTS)]
    for version in range(3):
        updates, before = vectors(7, torch.float64, seed=version), place.center.w_P.numpy().copy()
        merged = await place.reducer.merge(await place.plan(updates, version=version + 1))
        values = torch.stack(updates)[:, -BUFFER:]
        expected, kept = expected_center(spec, before, [u.numpy() for u in updates], [1 / 7] * 7, kept, version, places)
        assert np.allclose(place.center.w_P.numpy(), expected, rtol=1e-7, atol=1e-7)
        if rule not in ("krum", "multi_krum"):  # those take the values of the updates that they choose
            assert torch.allclose(place.center.w_P[-BUFFER:], values.mean(0), rtol=1e-12, atol=1e-12)
        assert np.allclose(merged.norms, [float(u[:-BUFFER].norm()) for u in updates]), "a norm is of parameters"


async def test_a_rule_chooses_by_the_parameters_alone(make: Make) -> None:
    """The second update is the one in the middle; its buffer is far from all others'."""
    place = make(torch.float64, agents={"min": 5}, merge={"rule": "krum", "f": 1}, buffer=BUFFER)
    updates = [torch.full((ELEMENTS,), x, dtype=torch.float64) for x in (1.0, 3.0, 4.9, 0.0, 7.2)]
    updates[1][-BUFFER:] = 1e6
    merged = await place.reducer.merge(await place.plan(updates))
    assert torch.allclose(place.center.w_P[:-BUFFER], place.before_P[:-BUFFER] + 1.0), "the one of 0, 1 and 3"
    assert torch.equal(place.center.w_P[-BUFFER:], updates[0][-BUFFER:])
    assert max(merged.norms) == pytest.approx(7.2 * (ELEMENTS - BUFFER) ** 0.5)


async def test_fednova_does_not_scale_buffers(make: Make) -> None:
    place = make(torch.float64, buffer=BUFFER, merge={"normalize": "fednova"})
    updates = vectors(2, torch.float64)
    plan = await place.plan(updates, [0.5 * 7.5 / 5, 0.5 * 7.5 / 10])  # p (Σ p a) / a, with 5 and 10 steps
    steps = [entry.model_copy(update={"steps": a}) for entry, a in zip(plan.merged, (5, 10), strict=True)]
    await place.reducer.merge(plan.model_copy(update={"merged": steps}))
    assert torch.allclose(place.center.w_P[-BUFFER:], torch.stack(updates)[:, -BUFFER:].mean(0), rtol=1e-12)
    moved = place.center.w_P[:-BUFFER] - place.before_P[:-BUFFER]
    assert torch.allclose(moved, 0.75 * updates[0][:-BUFFER] + 0.375 * updates[1][:-BUFFER], rtol=1e-9)


async def test_a_stale_value_moves_a_buffer_a_little_and_not_beyond_the_others(make: Make) -> None:
    """Differences to versions that are gone by add up to a negative variance: 10 − 9 − 0.7 · 9."""
    place = make(torch.float64, buffer=BUFFER, agents={"min": 2}, sync={"kind": "async", "buffer": 1})
    place.center.w_P[-BUFFER:] = 10.0
    for version, weight in enumerate((1.0, 0.7), 1):
        value = torch.zeros(ELEMENTS, dtype=torch.float64)
        value[-BUFFER:] = 1.0
        await place.reducer.merge(await place.plan([value], [weight], version=version))
        assert torch.allclose(place.center.w_P[-BUFFER:], value[-BUFFER:])


async def test_elastic_averaging_takes_the_mean_of_buffers_too(make: Make) -> None:
    elastic = {"kind": "elastic", "alpha": 0.25}
    place = make(torch.float64, buffer=BUFFER, agents={"min": 2}, mix=elastic)
    updates = vectors(2, torch.float64)
    await place.reducer.merge(await place.plan(updates, [1.0, 1.0]))
    expected = 0.5 * place.before_P + 0.25 * (updates[0] + updates[1])
    assert torch.allclose(place.center.w_P[-BUFFER:], expected[-BUFFER:], rtol=1e-12)


async def test_no_rule_takes_an_update_that_is_not_finite(make: Make, rule: str) -> None:
    """In the middle of sorted values, or with a weight of zero, it would not show in the result."""
    for bad in (float("nan"), float("inf"), float("-inf")):
        updates = vectors(7)
        updates[4][3000] = bad
        place = ruled(make, rule, torch.float32)
        error = await unusable(place, await place.plan(updates))
        assert str(error) == "a5: it holds NaN or infinite values: its training diverged" and error.clock == 3
        assert bool(error.blob) != RULES[rule].two_pass, "nothing is put before all updates were seen"


async def test_no_rule_takes_values_that_are_too_large_to_be_squared(make: Make, rule: str) -> None:
    updates = vectors(7)
    updates[2][7] = 1e25
    place = ruled(make, rule, torch.float32)
    error = await unusable(place, await place.plan(updates))
    assert str(error) == "a3: it holds values too large to add up: its training diverged"


async def test_no_rule_takes_content_that_was_not_signed(make: Make, rule: str) -> None:
    place = ruled(make, rule)
    plan = await place.plan(vectors(7, torch.float64))
    entries = [e.model_copy(update={"digest": b"x" * 32}) if e.agent == "a6" else e for e in plan.merged]
    assert (
        str(await unusable(place, plan.model_copy(update={"merged": entries})))
        == "a6: its content does not match the digest that its agent signed"
    )


async def test_the_window_and_an_executor_change_no_bit_of_any_rule(make: Make, rule: str) -> None:
    digests = set()
    with ThreadPoolExecutor(2) as executor, pytest.MonkeyPatch.context() as patch:
        patch.setattr("syncline_coordinator.merge.reducer.ON_LOOP_BYTES", 1)
        for window, given in ((1, None), (8, executor), (3, executor)):
            place = ruled(make, rule, torch.float32, executor=given, wire={"window": window})
            digests.add((await place.reducer.merge(await place.plan(vectors(7)))).digest)
    assert len(digests) == 1


async def test_the_norms_of_the_updates_and_of_what_they_make_are_told(make: Make, rule: str) -> None:
    place = ruled(make, rule)
    updates = vectors(7, torch.float64)
    merged = await place.reducer.merge(await place.plan(updates))
    assert merged.norms == pytest.approx([float(u.norm()) for u in updates], rel=1e-12)
    assert merged.norm == pytest.approx(float((place.center.w_P - place.before_P).norm()), rel=1e-9)


async def test_drift_is_one_where_the_updates_agree_and_one_over_n_where_they_are_orthogonal(make: Make) -> None:
    (x,), apart = vectors(1, torch.float64), [torch.zeros(ELEMENTS, dtype=torch.float64) for _ in range(4)]
    for i, y in enumerate(apart):
        y[1000 * i : 1000 * i + 500] = 2.0
    for updates, drift in (([x] * 4, 1.0), (apart, 0.25), ([x, -x], 0.0)):
        place = make(torch.float64)
        merged = await place.reducer.merge(await place.plan(updates))
        assert merged.drift([1 / len(updates)] * len(updates)) == pytest.approx(drift, abs=1e-12)
    assert (await place.reducer.merge(await place.plan([torch.zeros_like(x)]))).drift([1.0]) is None


async def test_krum_gets_only_the_one_it_takes_a_second_time(make: Make, bus: Any) -> None:
    place = ruled(make, "krum")
    plan = await place.plan(vectors(7, torch.float64))
    bus.calls.clear()
    merged = await place.reducer.merge(plan)
    assert sum(what == "get" for what, _ in bus.calls) == (7 + 1) * place.layout.chunks
    assert merged.bytes_got == (7 + 1) * place.layout.nbytes


async def test_an_update_that_is_another_one_in_the_second_pass_is_named(make: Make, bus: Any) -> None:
    place = ruled(make, "multi_krum")
    plan, get, seen = await place.plan(vectors(7, torch.float64)), bus.get, dict[str, int]()

    async def other_the_second_time(stream: str, subject: str, **options: Any) -> Any:
        seen[subject] = seen.get(subject, 0) + 1
        stored = await get(stream, subject, **options)
        if seen[subject] < 2:
            return stored
        blob, k = subject.split(".")[-2], int(subject[-1])
        return Stored(subject, pack_chunk(blob, k, 5, "raw", bytes(8 * (1024 if k < 4 else 904))), 1, 0.0)

    bus.get = other_the_second_time
    assert "its content does not match the digest that its agent signed" in str(await unusable(place, plan))


# -- the outer state ---------------------------------------------------------------------------------------------------
ADAM = {"outer": {"kind": "adam", "lr": 1.0}}


async def test_outer_state_is_committed_with_its_version_and_another_coordinator_goes_on_from_it(make: Make) -> None:
    """Two coordinators in turns, each reading from the bus, end where one ends."""
    one, turns = make(torch.float64, **ADAM), make(torch.float64, **ADAM)
    for version, update in enumerate(vectors(4, torch.float64), 1):
        plan = await one.plan([update], version=version)
        await one.reducer.merge(plan)
        merged = await turns.reducer.merge(plan)
        turns = make(torch.float64, **ADAM)
        await turns.reducer.get_center(merged.model, version)
        assert torch.equal(turns.center.w_P, one.center.w_P)
        assert torch.equal(turns.state(), one.state()) and one.state().all()


async def test_outer_state_lies_beside_its_model_vector_after_vector(make: Make, bus: Any) -> None:
    place = make(**ADAM)
    merged = await place.reducer.merge(await place.plan(vectors(2)))
    ref = place.reducer.outer_ref(merged.model)
    assert (ref.id, ref.size, ref.chunks) == (merged.model.id, 2 * place.layout.nbytes, 10)
    chunks = [
        get_chunk(bus, "", partial(subjects.outer_prefix, RUN), ref, k, size)
        for k, size in enumerate([4096, 4096, 4096, 4096, 3616] * 2)
    ]
    assert b"".join([await chunk for chunk in chunks]) == place.state().numpy().tobytes()


async def test_a_merge_that_is_given_up_changes_no_outer_state(make: Make) -> None:
    place = make(**ADAM)
    await place.reducer.merge(await place.plan(vectors(2)))
    before, bad = place.state().clone(), vectors(2, seed=1)
    bad[1][-1] = float("nan")
    await unusable(place, await place.plan(bad, version=2))
    assert torch.equal(place.state(), before)


async def test_a_plan_that_is_executed_again_by_another_makes_the_same_bits_under_another_name(make: Make) -> None:
    first, second = make(**ADAM), make(**ADAM)
    plan = await first.plan(vectors(2))
    await second.reducer.put_center()
    one, two = await first.reducer.merge(plan), await second.reducer.merge(plan)
    assert one.digest == two.digest and one.model.id != two.model.id
    assert torch.equal(first.state(), second.state())


async def test_without_outer_state_nothing_is_put_beside_the_model(place: Place, bus: Any) -> None:
    await place.reducer.merge(await place.plan(vectors(2)))
    assert not any(".outer." in subject for subject in bus.held)


async def test_delayed_nesterov_knows_from_the_version_when_its_time_has_come(make: Make) -> None:
    moved = []
    for version in (1, 2, 3, 4):
        place = make(outer={"kind": "delayed_nesterov", "every": 2})
        await place.reducer.merge(await place.plan(vectors(1), version=version))
        m, gathered = place.state()
        moved.append((bool(m.any()), bool(gathered.any())))
    assert moved == [(False, True), (True, False)] * 2


# -- the same bits, however it comes about -----------------------------------------------------------------------------
async def test_the_order_in_which_chunks_come_changes_no_bit(
    bus: Any, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = set()
    for seed in range(4):
        place = make(wire={"window": 1 + 3 * seed})
        plan = await place.plan(vectors(4))
        draw, get = random.Random(seed), bus.get

        async def slowly(*args: Any, **options: Any) -> Any:
            for _ in range(draw.randint(0, 20)):  # noqa: B023 (used in this turn of the loop only)
                await bus._call("wait", "")
            return await get(*args, **options)  # noqa: B023

        monkeypatch.setattr(bus, "get", slowly)
        digests.add((await place.reducer.merge(plan)).digest)
        monkeypatch.setattr(bus, "get", get)
    assert len(digests) == 1


async def test_an_executor_changes_no_bit(make: Make) -> None:
    layout_bytes = make().layout.nbytes
    digests = set()
    with ThreadPoolExecutor(2) as executor, pytest.MonkeyPatch.context() as patch:
        patch.setattr("syncline_coordinator.merge.reducer.ON_LOOP_BYTES", layout_bytes - 1)
        for given in (None, executor):
            place = make(executor=given)
            digests.add((await place.reducer.merge(await place.plan(vectors(4)))).digest)
    assert len(digests) == 1


# -- bad updates -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
async def test_an_update_that_is_not_finite_is_named(place: Place, bad: float) -> None:
    updates = vectors(3)
    updates[1][ELEMENTS - 1] = bad
    error = await unusable(place, await place.plan(updates))
    assert str(error) == "a2: it holds NaN or infinite values: its training diverged" and error.clock == 3


async def test_infinities_that_cancel_are_found_all_the_same(place: Place) -> None:
    x, y, z = vectors(3)
    x[7], y[7] = float("inf"), float("-inf")
    assert (await unusable(place, await place.plan([x, y, z]))).agent == "a1"


async def test_content_that_was_not_signed_is_named(place: Place) -> None:
    plan = await place.plan(vectors(3))
    entries = [e.model_copy(update={"digest": b"x" * 32}) if e.agent == "a3" else e for e in plan.merged]
    error = await unusable(place, plan.model_copy(update={"merged": entries}))
    assert str(error) == "a3: its content does not match the digest that its agent signed"


async def test_content_that_was_replaced_by_another_good_frame_is_named(place: Place) -> None:
    plan = await place.plan(vectors(2))
    entry = plan.merged[0]
    place.put_frame(entry, 2, pack_chunk(entry.blob.id, 2, 5, "raw", b"\x00" * 4096))
    assert str(await unusable(place, plan)) == "a1: its content does not match the digest that its agent signed"


async def test_a_corrupt_frame_is_named(place: Place, bus: Any) -> None:
    plan = await place.plan(vectors(2))
    entry = plan.merged[1]
    subject = f"{subjects.update_prefix(RUN, 'a2', entry.blob.id)}.3"
    frame = bytearray(bus.held[subject])
    frame[-100] ^= 0x10
    bus.held[subject] = bytes(frame)
    assert str(await unusable(place, plan)) == f"a2: chunk 3 of blob {entry.blob.id[:8]}: the checksum does not match"


@pytest.mark.parametrize("frame", [b"", b"junk", pack_chunk("f" * 32, 0, 5, "raw", b"\x00" * 4096)])
async def test_a_frame_that_is_none_or_anothers_is_named(place: Place, frame: bytes) -> None:
    plan = await place.plan(vectors(2))
    place.put_frame(plan.merged[0], 0, frame)
    assert str(await unusable(place, plan)).startswith(f"a1: chunk 0 of blob {plan.merged[0].blob.id[:8]}: ")


async def test_an_update_that_is_gone_is_named(place: Place, bus: Any) -> None:
    plan = await place.plan(vectors(2))
    del bus.held[f"{subjects.update_prefix(RUN, 'a1', plan.merged[0].blob.id)}.4"]
    assert str(await unusable(place, plan)) == f"a1: chunk 4 of blob {plan.merged[0].blob.id[:8]} is not on the bus"


async def test_a_merge_is_given_up_only_when_nobody_writes_to_the_center_any_more(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread may be at work on another slice when one turns out to be bad."""
    monkeypatch.setattr("syncline_coordinator.merge.reducer.ON_LOOP_BYTES", 1)
    late = threading.Event()

    def slow(self: Mean, *args: Any) -> None:
        late.wait(0.2)
        Rule.reduce(self, *args)

    monkeypatch.setattr(Mean, "reduce", slow)
    with ThreadPoolExecutor(4) as executor:
        place = make(executor=executor)
        updates = vectors(2)
        updates[1][4500] = float("nan")
        await unusable(place, await place.plan(updates))
        before = place.center.w_P.clone()
    assert torch.equal(place.center.w_P, before), "somebody wrote afterwards"


async def test_after_a_bad_update_the_others_can_be_merged(place: Place) -> None:
    updates = vectors(2)
    updates[0][0] = float("nan")
    plan = await place.plan(updates, [0.5, 0.5])
    await unusable(place, plan)
    rest = plan.model_copy(update={"merged": [plan.merged[1].model_copy(update={"weight": 1.0})]})
    await place.reducer.merge(rest)
    assert torch.equal(place.center.w_P, place.before_P + updates[1])


async def test_a_bus_without_room_is_nobodys_bad_update(place: Place, bus: Any) -> None:
    plan = await place.plan(vectors(2))
    bus.fail("put", StreamFull("limit reached"))
    with pytest.raises(StreamFull):
        await place.reducer.merge(plan)


# -- memory ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("agents", [1, 8, 64, 1000])
def test_chunks_are_so_small_that_those_of_all_agents_fit_into_the_staging_memory(agents: int) -> None:
    spec, payload = spec_of(), 1 << 20
    chunk = chunk_bytes_for(spec, agents, payload)
    assert 4096 <= chunk <= payload - 16 * 1024
    assert chunk * agents * LEAST_DEPTH <= 2 * STAGING_BYTES or chunk == 4096


def test_a_chunk_size_that_is_set_is_kept_where_a_message_holds_it() -> None:
    for wanted, given in ((4096, 4096), (1 << 19, 1 << 19), (64 << 20, (1 << 20) - 16 * 1024)):
        assert chunk_bytes_for(spec_of(wire={"chunk_bytes": wanted}), 4, 1 << 20) == given
