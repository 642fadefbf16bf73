"""Turn an image batch into a prediction: choose the variant, run its engine, note what happened."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rayloop.clock import Clock
from rayloop.config import ServeConfig
from rayloop.serve.batcher import (
    DEFAULT_PRIORITY,
    Batcher,
    DeadlinePassed,
    RequestTimes,
    still_there,
)
from rayloop.serve.counts import VariantCounts, failure_reason_name
from rayloop.serve.events.event import PredictionEvent, Verdict
from rayloop.serve.execution import EngineFailed
from rayloop.serve.protocol.error import ProtocolError
from rayloop.serve.protocol.spec import ModelSpec
from rayloop.serve.shadow.shadow import Copy, Shadow
from rayloop.serve.traffic.plan import TrafficPlan
from rayloop.serve.traffic.second_opinion import SecondOpinion, Settled


@dataclass(frozen=True, slots=True)
class Variant:
    """A model that is loaded, under a name, with the queue in front of it."""

    name: str
    spec: ModelSpec
    batcher: Batcher


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What one request gets back."""

    prediction_id: str

    variant: Variant
    """What the request was given to."""

    probabilities: NDArray[np.float32]
    """float32 [N, K]."""

    decisions: tuple[Verdict, ...]
    """What to do with each row."""

    second: tuple[int, ...] = ()
    """Rows that the fallback version answered."""

    fallback: str = ""
    """That version; empty where no row fell back."""

    @property
    def version(self) -> str:
        """The version that answered: the fallback's, if all rows fell back."""
        all_fell = len(self.second) == len(self.probabilities)
        return self.fallback if all_fell else self.variant.spec.version


@dataclass(frozen=True, kw_only=True, slots=True)
class ByHand:
    """What clients loaded and unloaded beside the traffic plan."""

    plan: int
    """Number of the plan in force then; a later one loads again what it needs."""

    loaded: tuple[str, ...] = ()
    unloaded: tuple[str, ...] = ()


class Shelf(Protocol):
    """Where a replica finds the versions of its model."""

    def published(self) -> list[str]:
        """All versions that could be loaded, as numbers in text."""
        ...

    def load(self, version: str) -> Variant:
        """A version, loaded, proven and warm.

        Raises:
            RequestError: There is no such version, or it is damaged.
        """
        ...

    def release(self, version: str) -> None:
        """Let go of what a version that was removed holds outside this process."""
        ...

    def shadow(self, version: str) -> Shadow:
        """A version that gets copies of requests; it is loaded in a process of its own."""
        ...

    def newer_plan(self, number: int) -> TrafficPlan | None:
        """The newest traffic plan after a number; None while there is none."""
        ...

    def remember(self, changes: "ByHand") -> None:
        """Note what was loaded and unloaded by hand, for replicas that start later."""
        ...


class Memory(Protocol):
    """What remembers predictions, and learns the truth about them later."""

    @property
    def writer(self) -> str:
        """The 16 hexadecimal digits that its prediction ids begin with."""
        ...

    def put(self, event: PredictionEvent) -> None:
        """Take an event; never waits and never raises."""
        ...

    async def learn(self, body: bytes, class_names: Sequence[str]) -> dict[str, Any]:
        """Take the truth about a prediction, as the body of `POST /feedback` has it.

        Raises:
            ProtocolError: It is malformed, unknown, or contradicts what was said before.
        """
        ...

    def counts(self) -> dict[str, int]:
        """What became of the events."""
        ...

    def close(self) -> None:
        """Write everything that was taken; blocks until it is done."""
        ...


class EmptyShelf:
    """The shelf of a server that was given its model: nothing else can be loaded."""

    def published(self) -> list[str]:
        """Nothing."""
        return []

    def load(self, version: str) -> Variant:
        """Refuse.

        Raises:
            ProtocolError: 404.
        """
        raise ProtocolError(404, f"Version {version!r} is in no registry this server knows.")

    def release(self, version: str) -> None:
        """Nothing to let go of."""

    def shadow(self, version: str) -> Shadow:
        """Refuse.

        Raises:
            ProtocolError: 404.
        """
        raise ProtocolError(404, f"Version {version!r} is in no registry this server knows.")

    def newer_plan(self, number: int) -> TrafficPlan | None:
        """None: the plan it was given stays."""
        return None

    def remember(self, changes: "ByHand") -> None:
        """Nothing to note."""


class ModelService:
    """The versions of one model in one replica: the plan's, and others loaded beside them.

    A request that names no version is answered by a variant of the plan. Any loaded version can be
    asked for by its number. A version that was unloaded keeps its place and can come back.

    Args:
        loaded: Loaded versions; all take the same images.
        plan: Which of them answers whom.
        config: Limits.
        clock: For the times in events.
        new_id: Makes a fresh prediction id.
        memory: Receives an event for each answered request; None makes no events.
        shelf: Where other versions are found.
    """

    def __init__(
        self,
        loaded: Iterable[Variant],
        plan: TrafficPlan,
        config: ServeConfig,
        clock: Clock,
        new_id: Callable[[], str],
        memory: Memory | None = None,
        shelf: Shelf | None = None,
    ) -> None:
        self._loaded = {variant.spec.version: variant for variant in loaded}
        self._config = config
        self._clock = clock
        self._new_id = new_id
        self.memory = memory
        self.shelf: Shelf = shelf or EmptyShelf()
        self.spec = next(iter(self._loaded.values())).spec
        self.counts: dict[tuple[str, str], VariantCounts] = {}
        self.shadows: dict[str, Shadow] = {}
        self.follow(plan)

    def follow(self, plan: TrafficPlan) -> None:
        """Let a plan decide from now on; requests under way end as they began.

        What the plan names should be loaded; a variant that is not is answered with 503.
        """
        self.plan = plan
        self.second_opinion = SecondOpinion(plan.low_confidence)
        self._name_variants()

    @property
    def queued_rows(self) -> int:
        """Rows that wait, over all versions."""
        return sum(variant.batcher.queued_rows for variant in self._loaded.values())

    @property
    def wait_s(self) -> float:
        """Seconds before even an urgent request could be done, at the version with least to do."""
        return min((v.batcher.wait_s() for v in self._loaded.values()), default=0.0)

    @property
    def versions(self) -> tuple[str, ...]:
        """The versions that are loaded, lowest first."""
        return tuple(sorted(self._loaded, key=int))

    @property
    def ready(self) -> bool:
        """Whether every variant that has a share of the traffic is loaded."""
        return all(v.name in self._variants for v in self.plan.variants if v.share > 0)

    def find(self, version: str = "") -> Variant:
        """A loaded version by its number; empty for the one that answers by default.

        Raises:
            ProtocolError: 404, it is not loaded; 503, the default one is not.
        """
        if not version:
            variant = self._variants.get(self.plan.variants[0].name)
            if variant is None:
                raise not_loaded(self.spec)
            return variant
        if version not in self._loaded:
            loaded = ", ".join(self.versions) or "none"
            raise ProtocolError(
                404,
                f"Version {version[:40]!r} of {self.spec.model!r} is not loaded; loaded: {loaded}.",
            )
        return self._by_version[version]

    def add(self, variant: Variant) -> None:
        """Take in a loaded version."""
        self._loaded[variant.spec.version] = variant
        self._name_variants()

    async def remove(self, version: str) -> None:
        """Let go of a version: what was accepted is still answered, then its memory is freed."""
        variant = self.drop(version)
        if variant is not None:
            await variant.batcher.drain()
            self.shelf.release(version)

    def drop(self, version: str) -> Variant | None:
        """Take a version out of what answers; None when it was not there."""
        variant = self._loaded.pop(version, None)
        self._name_variants()
        return variant

    def statistics(self) -> list[dict[str, Any]]:
        """`model_stats` of all loaded versions, lowest first."""
        return [
            self._loaded[version].batcher.statistics.to_json(self.spec.model, version)
            for version in self.versions
        ]

    def counts_of(self, name: str, version: str) -> VariantCounts:
        """What became of the requests that a version was asked under a name."""
        counts = self.counts.get((name, version))
        if counts is None:
            counts = self.counts[name, version] = VariantCounts()
        return counts

    def variant_for(self, unit: str, prediction_id: str, forced: str) -> Variant:
        """The variant that answers a request.

        Raises:
            ProtocolError: 404, the client asks for a variant that is not there.
        """
        if not forced:
            variant = self._variants.get(self.plan.assign(unit or prediction_id))
            if variant is None:
                raise not_loaded(self.spec)
            return variant
        if forced not in self._variants:
            raise ProtocolError(
                404, f"Variant {forced[:60]!r} is unknown; there are {', '.join(self._variants)}."
            )
        return self._variants[forced]

    async def predict(
        self,
        images: NDArray[np.uint8],
        *,
        unit: str,
        forced: str,
        timeout_s: float,
        version: str = "",
        priority: int = DEFAULT_PRIORITY,
        gone: Callable[[], bool] = still_there,
    ) -> Prediction:
        """Probabilities of an image batch, and its event.

        Args:
            images: uint8 [N, H, W, C].
            unit: Who the request is for; empty when nobody is named.
            forced: Name of the variant to use; empty leaves the choice to the plan.
            timeout_s: Seconds until nobody waits any more.
            version: Number of the version that must answer; empty leaves the choice to the plan.
            priority: 1 (most urgent) to `PRIORITY_LEVELS`.
            gone: Says, once asked, whether nobody waits any more.
        """
        prediction_id, plan, opinion = self._new_id(), self.plan, self.second_opinion
        variant = self.find(version) if version else self.variant_for(unit, prediction_id, forced)
        visit = _Visit(variant, plan.number, unit, bool(forced or version), self._clock.monotonic())
        try:
            first = await variant.batcher.submit(images, timeout_s, priority, gone, visit.times)
            doubtful = opinion.doubtful(first)
            if doubtful:
                left_s = timeout_s - (self._clock.monotonic() - visit.start)
                larger = None if version else self._loaded.get(plan.low_confidence.fallback)
                queue = larger.batcher if larger else None
                settled = await opinion.settle(queue, images, first, doubtful, left_s, priority)
            else:
                settled = Settled(first, ACCEPTED if len(first) == 1 else ACCEPTED * len(first))
        except BaseException as error:
            self._failed(visit, prediction_id, images, error)
            raise
        prediction = Prediction(
            prediction_id=prediction_id,
            variant=variant,
            probabilities=settled.probabilities,
            decisions=settled.decisions,
            second=settled.second,
            fallback=plan.low_confidence.fallback,
        )
        self._answered(visit, prediction, images, first)
        return prediction

    async def close(self) -> None:
        """Finish what runs and stop the engines' threads."""
        for shadow in self.shadows.values():
            shadow.close()
        for variant in self._loaded.values():
            await variant.batcher.close()
        if self.memory is not None:
            await asyncio.to_thread(self.memory.close)

    def _name_variants(self) -> None:
        self._variants = {
            planned.name: Variant(planned.name, loaded.spec, loaded.batcher)
            for planned in self.plan.variants
            if (loaded := self._loaded.get(planned.version)) is not None
        }
        named = {v.spec.version: v for v in reversed(self._variants.values())}
        self._by_version = self._loaded | named

    def _answered(
        self,
        visit: "_Visit",
        prediction: Prediction,
        images: NDArray[np.uint8],
        first: NDArray[np.float32],
    ) -> None:
        variant, now = visit.variant, self._clock.now()
        seconds = self._clock.monotonic() - visit.start
        latency_ms = seconds * 1000
        variant.batcher.statistics.finished(True, int(seconds * 1e9), now)
        counts = self.counts_of(variant.name, variant.spec.version)
        counts.latency.add(latency_ms)
        counts.forced += visit.forced
        for decision in prediction.decisions:
            counts.decisions[decision] += 1
        if self.shadows and not visit.forced:
            copy = Copy(prediction.prediction_id, images, first, variant.spec.version, latency_ms)
            for shadow in self.shadows.values():
                shadow.offer(copy)
        if self.memory is not None:
            own = variant.spec.version
            second = prediction.second
            versions = (
                tuple(prediction.fallback if row in second else own for row in range(len(images)))
                if second
                else ()
            )
            self.memory.put(
                visit.event(
                    prediction.prediction_id, now, latency_ms, 200, images,
                    prediction.probabilities, prediction.decisions, versions,
                )
            )  # fmt: skip

    def _failed(
        self,
        visit: "_Visit",
        prediction_id: str,
        images: NDArray[np.uint8],
        error: BaseException,
    ) -> None:
        seconds = self._clock.monotonic() - visit.start
        visit.variant.batcher.statistics.finished(False, int(seconds * 1e9), 0.0)
        self.counts_of(visit.variant.name, visit.variant.spec.version).failures[
            failure_reason_name(error)
        ] += 1
        status = 500 if isinstance(error, EngineFailed) else 504
        if self.memory is not None and isinstance(error, EngineFailed | DeadlinePassed):
            now = self._clock.now()
            self.memory.put(visit.event(prediction_id, now, seconds * 1000, status, images))


ACCEPTED: tuple[Verdict, ...] = ("accept",)


class _Visit:
    """A request between its assignment and its answer."""

    __slots__ = ("forced", "plan", "start", "times", "unit", "variant")

    def __init__(self, variant: Variant, plan: int, unit: str, forced: bool, start: float) -> None:
        self.variant, self.plan, self.unit, self.forced = variant, plan, unit, forced
        self.start = start
        self.times = RequestTimes()

    def event(
        self,
        prediction_id: str,
        now: float,
        latency_ms: float,
        status: int,
        images: NDArray[np.uint8],
        probabilities: NDArray[np.float32] | None = None,
        decisions: tuple[Verdict, ...] = (),
        versions: tuple[str, ...] = (),
    ) -> PredictionEvent:
        variant, times = self.variant, self.times
        return PredictionEvent(
            prediction_id=prediction_id,
            time=now,
            model=variant.spec.model,
            plan=self.plan,
            unit=self.unit,
            variant=variant.name,
            assigned_version=variant.spec.version,
            forced=self.forced,
            status=status,
            images=images,
            probabilities=probabilities,
            decisions=decisions,
            versions=versions,
            latency_ms=latency_ms,
            queue_ms=times.queue_ms,
            engine_ms=times.engine_ms,
        )


def not_loaded(spec: ModelSpec) -> ProtocolError:
    """The answer while the model that should answer is unloaded."""
    return ProtocolError(
        503, f"Model {spec.model!r} is unloaded; load it with /v2/repository/models/.../load.", 1
    )
