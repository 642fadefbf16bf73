"""One replica with several versions: plans put in force, doubtful rows, shadows, events."""

import asyncio
import threading
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayloop.clock import SYSTEM_CLOCK
from rayloop.config import ServeConfig
from rayloop.errors import Corrupt
from rayloop.serve import service as service_module
from rayloop.serve.assemble import make_service, make_variant
from rayloop.serve.load import load_service
from rayloop.serve.protocol.error import ProtocolError
from rayloop.serve.protocol.spec import ModelSpec
from rayloop.serve.repository import Repository
from rayloop.serve.shelf import ByHand
from rayloop.serve.snapshot import snapshot
from rayloop.serve.traffic.confidence import BURST_ROWS, FallbackCap, doubtful_rows
from rayloop.serve.traffic.follow import PlanFollower
from rayloop.serve.traffic.plan import LowConfidence, PlannedVariant, TrafficPlan, plan_of, single
from rayloop.serve.traffic.store import PlanStore
from tests.releases import MODEL, register_all

CONFIG = ServeConfig(max_batch_rows=8)
SURE, UNSURE, UNSURE_TOO = 250, 130, 131


class Engine:
    """Two classes; the first pixel over 255 is the confidence, but for version 9, which is sure."""

    def __init__(self, version: str) -> None:
        self.version = version
        self.rows = 0
        self.fails = self.entered = False
        self.door = threading.Event()
        self.door.set()

    def predict(self, images: np.ndarray) -> np.ndarray:
        self.entered = True
        assert self.door.wait(20)
        if self.fails:
            raise ValueError("no")
        self.rows += len(images)
        first = images[:, 0, 0, 0].astype(np.float32) / 255
        if self.version == "9":
            first = np.where(images[:, 0, 0, 0] == UNSURE_TOO, first, 0.99).astype(np.float32)
            return np.stack([1 - first, first], 1)
        return np.stack([first, 1 - first], 1)

    def warm(self, batch_sizes) -> None:
        pass


class FakeShadow:
    def __init__(self, version: str) -> None:
        self.version, self.copies, self.closed = version, [], False

    def offer(self, copy) -> None:
        self.copies.append(copy)

    def close(self) -> None:
        self.closed = True


class Shelf:
    """Versions 1 to 9, of which 6 is damaged, and the plans to come."""

    def __init__(self) -> None:
        self.engines: dict[str, Engine] = {}
        self.loads: Counter[str] = Counter()
        self.plans: list[TrafficPlan] = []
        self.shadows: list[FakeShadow] = []
        self.noted: list[ByHand] = []
        self.released: list[str] = []
        self.broken = False

    def published(self) -> list[str]:
        return [str(number) for number in range(1, 10)]

    def load(self, version: str):
        self.loads[version] += 1
        if version == "6":
            raise Corrupt("version 6 is damaged")
        self.engines[version] = Engine(version)
        return make_variant(f"version-{version}", self.engines[version], spec(version), CONFIG)

    def release(self, version: str) -> None:
        self.released.append(version)

    def shadow(self, version: str) -> FakeShadow:
        self.shadows.append(FakeShadow(version))
        return self.shadows[-1]

    def newer_plan(self, number: int):
        if self.broken:
            raise OSError("the disk is gone")
        return self.plans[-1] if self.plans and self.plans[-1].number > number else None

    def remember(self, changes: ByHand) -> None:
        self.noted.append(changes)


def spec(version: str) -> ModelSpec:
    return ModelSpec(model="m", version=version, shape=(1, 1, 1), class_names=("a", "b"))


class Memory:
    writer = "0" * 16

    def __init__(self) -> None:
        self.events: list = []
        self.put = self.events.append

    def counts(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        pass


class Replica:
    def __init__(self) -> None:
        self.shelf, self.memory = Shelf(), Memory()
        self.engine = Engine("1")
        self.service = make_service(self.engine, spec("1"), CONFIG, self.memory, self.shelf)
        self.repository = Repository(self.service)
        self.follower = PlanFollower(self.service, self.repository, 0.01, SYSTEM_CLOCK)

    async def ask(self, *pixels: int, unit: str = "", forced: str = "", version: str = ""):
        images = np.array(pixels, np.uint8).reshape(-1, 1, 1, 1)
        return await self.service.predict(
            images, unit=unit, forced=forced, timeout_s=20, version=version
        )

    def plan(self, *triples: tuple[str, str, float], **others) -> TrafficPlan:
        variants = tuple(PlannedVariant(name=n, version=v, share=s) for n, v, s in triples)
        base = self.shelf.plans[-1] if self.shelf.plans else self.service.plan
        self.shelf.plans.append(plan_of("m", variants, base, **others))
        return self.shelf.plans[-1]


def run(talk):
    async def main():
        replica = Replica()
        try:
            return await talk(replica)
        finally:
            await replica.service.close()

    return asyncio.run(main())


def test_a_plan_is_followed_and_the_way_back_needs_no_load() -> None:
    async def talk(replica: Replica) -> None:
        shelf, service = replica.shelf, replica.service
        replica.plan(("champion", "1", 0.5), ("challenger", "2", 0.5), shadows=("3",))
        await replica.follower.look()
        assert (service.plan.number, service.versions) == (2, ("1", "2"))
        answers = [await replica.ask(SURE, unit=f"user-{n}") for n in range(100)]
        for n, answer in enumerate(answers):
            assert answer.variant.name == service.plan.assign(f"user-{n}")
        assert {(a.variant.name, a.version) for a in answers} == {
            ("champion", "1"), ("challenger", "2")
        }  # fmt: skip
        assert len(shelf.shadows[0].copies) == 100

        replica.plan(("champion", "2", 1.0), shadows=())
        await replica.follower.look()
        assert {(await replica.ask(SURE)).version for _ in range(20)} == {"2"}
        assert service.versions == ("1", "2")  # of the plan before
        while not shelf.shadows[0].closed:
            await asyncio.sleep(0)
        replica.plan(("champion", "1", 1.0))
        await replica.follower.look()
        replica.plan(("champion", "1", 0.9), ("version-4", "4", 0.1))
        await replica.follower.look()
        assert service.versions == ("1", "2", "4")  # the way back to version 2 is open still
        replica.plan(("champion", "4", 1.0))
        await replica.follower.look()
        assert service.versions == ("1", "4")
        while not shelf.released:
            await asyncio.sleep(0)
        assert shelf.released == ["2"]
        assert shelf.loads == {"2": 1, "4": 1}
        assert [event.plan for event in replica.memory.events] == [2] * 100 + [3] * 20

    run(talk)


def test_a_plan_that_cannot_be_put_in_force_changes_nothing_and_is_tried_again() -> None:
    async def talk(replica: Replica) -> None:
        replica.plan(("champion", "2", 0.5), ("challenger", "6", 0.5))
        for _ in range(3):
            await replica.follower.look()
        assert replica.shelf.loads["6"] == 1  # not at every look
        assert replica.service.plan.number == 1
        assert (await replica.ask(SURE)).version == "1"
        state = snapshot(replica.service, replica.follower, "r")
        assert (state["plan"], state["refused_plan"]) == (1, 2)
        assert "version 6 is damaged" in state["refused_reason"]
        replica.follower._retry_at = 0
        await replica.follower.look()
        assert replica.shelf.loads["6"] == 2
        replica.plan(("champion", "3", 1.0))
        await replica.follower.look()
        assert (replica.service.plan.number, replica.follower.refused) == (3, 0)
        replica.shelf.broken = True
        await replica.follower.look()
        assert (replica.service.plan.number, replica.follower.refused) == (3, 0)
        assert "the disk is gone" in replica.follower.reason
        replica.shelf.broken = False
        await replica.follower.look()
        assert replica.follower.reason == ""

    run(talk)


def test_requests_under_way_end_in_the_version_they_began_with() -> None:
    async def talk(replica: Replica) -> None:
        replica.engine.door.clear()
        waiting = [asyncio.create_task(replica.ask(SURE)) for _ in range(20)]
        await asyncio.sleep(0)
        replica.plan(("champion", "2", 1.0))
        await replica.follower.look()
        assert (await replica.ask(SURE)).version == "2"
        replica.plan(("champion", "3", 1.0))
        following = asyncio.create_task(replica.follower.look())
        while replica.service.plan.number != 3:
            await asyncio.sleep(0.001)
        assert (await replica.ask(SURE)).version == "3"
        replica.engine.door.set()
        assert {answer.version for answer in await asyncio.gather(*waiting)} == {"1"}
        await following
        while replica.shelf.released != ["1"]:
            await asyncio.sleep(0)
        assert replica.service.versions == ("2", "3")

    run(talk)


def test_what_clients_loaded_by_hand_stays_and_is_noted() -> None:
    async def talk(replica: Replica) -> None:
        await replica.repository.load("m", {"version": "5"})
        await replica.repository.unload("m", {"version": "1"})
        with pytest.raises(ProtocolError, match="is unloaded"):
            await replica.ask(SURE)
        assert replica.shelf.noted[-1] == ByHand(plan=1, loaded=("5",), unloaded=("1",))
        replica.plan(("champion", "1", 0.5), ("challenger", "2", 0.5))
        await replica.follower.look()
        assert replica.service.versions == ("1", "2", "5")
        assert (await replica.ask(SURE, version="5")).variant.name == "version-5"

    run(talk)


LOW = LowConfidence(below=0.7, fallback="9", max_share=1.0)


def test_doubtful_rows_get_the_larger_versions_answer_and_the_rest_their_own() -> None:
    async def talk(replica: Replica) -> None:
        replica.plan(("champion", "1", 1.0), low_confidence=LOW)
        await replica.follower.look()
        answer = await replica.ask(SURE, UNSURE, UNSURE_TOO, SURE)
        assert answer.decisions == ("accept", "fallback", "review", "accept")
        assert answer.second == (1, 2)
        assert (answer.version, answer.fallback) == ("1", "9")
        assert answer.probabilities.argmax(axis=1).tolist() == [0, 1, 1, 0]
        assert replica.shelf.engines["9"].rows == 2
        alone = await replica.ask(UNSURE)
        assert (alone.version, alone.variant.spec.version) == ("9", "1")
        assert [event.versions for event in replica.memory.events] == [("1", "9", "9", "1"), ("9",)]
        named = await replica.ask(UNSURE, version="1")
        assert (named.version, named.decisions) == ("1", ("review",))

    run(talk)


def test_a_fallback_that_fails_is_never_felt() -> None:
    async def talk(replica: Replica) -> None:
        replica.plan(("champion", "1", 1.0), low_confidence=LOW)
        await replica.follower.look()
        replica.shelf.engines["9"].fails = True
        answer = await replica.ask(SURE, UNSURE)
        assert (answer.decisions, answer.second) == (("accept", "review"), ())
        assert replica.service.second_opinion.failed == 1
        await replica.repository.unload("m", {"version": "9"})
        assert (await replica.ask(UNSURE)).decisions == ("review",)

    run(talk)


def test_drift_cannot_overload_the_larger_version() -> None:
    async def talk(replica: Replica) -> None:
        low = LowConfidence(below=0.7, fallback="9", max_share=0.1)
        replica.plan(("champion", "1", 1.0), low_confidence=low)
        await replica.follower.look()
        answers = [await replica.ask(UNSURE) for _ in range(500)]
        fell = sum(answer.decisions == ("fallback",) for answer in answers)
        assert 50 <= fell <= 50 + BURST_ROWS
        opinion = replica.service.second_opinion
        assert opinion.capped == 500 - fell

    run(talk)


@given(st.floats(0, 1), st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), max_size=60))
def test_the_share_that_falls_back_is_capped_over_any_stretch(max_share, requests) -> None:
    cap = FallbackCap(max_share)
    log = []
    for rows, doubtful in requests:
        cap.seen(rows)
        log.append((rows, cap.take(min(doubtful, rows))))
    for start in range(len(log)):
        rows = fell = 0
        for some, taken in log[start:]:
            rows, fell = rows + some, fell + taken
            assert fell <= max_share * rows + BURST_ROWS + 1e-6
    assert max_share > 0 or all(taken == 0 for _, taken in log)


def test_doubt_is_below_the_limit_and_what_is_no_number() -> None:
    rows = np.array([[0.7, 0.3], [0.69, 0.31], [np.nan, np.nan], [0.2, 0.8]], np.float32)
    assert doubtful_rows(rows, 0.7) == [1, 2]
    assert doubtful_rows(rows, 0.65) == [2]
    assert doubtful_rows(rows, 0.0) == []
    assert [doubtful_rows(rows[n : n + 1], 0.65) for n in range(4)] == [[], [], [0], []]


def test_forced_requests_are_marked_and_no_shadow_sees_them() -> None:
    async def talk(replica: Replica) -> None:
        replica.plan(("champion", "1", 1.0), ("challenger", "2", 0.0), shadows=("3",))
        await replica.follower.look()
        assert (await replica.ask(SURE, forced="challenger")).version == "2"
        assert (await replica.ask(SURE)).version == "1"
        assert [event.forced for event in replica.memory.events] == [True, False]
        assert len(replica.shelf.shadows[0].copies) == 1
        with pytest.raises(ProtocolError, match="unknown; there are champion, challenger"):
            await replica.ask(SURE, forced="nobody")
        counts = replica.service.counts_of("challenger", "2")
        assert (counts.forced, sum(counts.latency.counts)) == (1, 1)

    run(talk)


def test_a_failure_is_an_event_too_and_counted_by_reason() -> None:
    async def talk(replica: Replica) -> None:
        replica.engine.fails = True
        with pytest.raises(Exception, match="failed on this input"):
            await replica.ask(SURE)
        (event,) = replica.memory.events
        assert (event.status, event.probabilities, event.variant) == (500, None, "champion")
        assert replica.service.counts_of("champion", "1").failures == {"BACKEND": 1}

    run(talk)


def test_two_names_of_one_version_share_its_engine() -> None:
    async def talk(replica: Replica) -> None:
        replica.plan(("champion", "1", 0.5), ("twin", "1", 0.5))
        await replica.follower.look()
        names = Counter([(await replica.ask(SURE)).variant.name for _ in range(200)])
        assert set(names) == {"champion", "twin"}
        assert replica.engine.rows == 200
        assert replica.shelf.loads == {}

    run(talk)


def test_the_default_plan_says_what_was_the_rule_before() -> None:
    plan = single("m", "champion", "1")
    assert (plan.low_confidence.below, plan.low_confidence.fallback) == (0.7, "")


def test_a_replica_starts_with_what_it_can_load(tmp_path) -> None:
    storage = register_all(tmp_path, 4)
    plans = PlanStore(storage, MODEL)
    first = single(MODEL, "champion", "1")
    low = LowConfidence(fallback="3")
    second = plan_of(
        MODEL, (PlannedVariant(name="champion", version="2", share=1.0),), first,
        low_confidence=low,
    )  # fmt: skip
    for plan in (first, second):
        plans.put(plan)
    note = {"plan": 2, "loaded": ["4"], "unloaded": []}
    storage.write_json(f"serving/d/{MODEL}.json", note)

    def start() -> tuple[int, tuple[str, ...]]:
        async def main() -> tuple[int, tuple[str, ...]]:
            service = load_service(storage, MODEL, CONFIG, deployment="d")
            found = service.plan.number, service.versions
            await service.close()
            return found

        return asyncio.run(main())

    assert start() == (2, ("2", "3", "4"))
    for version in ("3", "4"):  # a fallback, and one that was loaded by hand
        storage.write(f"models/{MODEL}/{version}/model.onnx", b"damaged")
    assert start() == (2, ("2",))
    storage.write(f"models/{MODEL}/2/model.onnx", b"damaged")
    assert start() == (1, ("1",))
    storage.write("traffic/classifier/000002.json", b"{")
    assert start() == (1, ("1",))
    storage.write(f"models/{MODEL}/1/model.onnx", b"damaged")
    with pytest.raises(Corrupt):
        start()


def test_a_live_version_is_not_compared_with_itself() -> None:
    async def talk(replica: Replica) -> None:
        replica.plan(("champion", "1", 0.5), ("challenger", "2", 0.5), shadows=("2",))
        await replica.follower.look()
        versions = Counter([(await replica.ask(SURE)).version for _ in range(100)])
        assert len(replica.shelf.shadows[0].copies) == versions["1"]

    run(talk)


def test_an_engine_that_hangs_does_not_cost_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "FAREWELL_S", 0.2)

    async def main() -> bool:
        replica = Replica()
        closed: list[bool] = []
        replica.memory.close = lambda: closed.append(True)
        replica.engine.door.clear()
        waiting = asyncio.create_task(replica.ask(SURE))
        while not replica.engine.entered:
            await asyncio.sleep(0.001)
        await replica.service.close()
        replica.engine.door.set()
        await waiting
        return closed == [True]

    assert asyncio.run(main())
