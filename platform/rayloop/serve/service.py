"""Turn an image batch into a prediction: choose the variant, run its engine, note what happened."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rayloop.clock import Clock, iso_utc
from rayloop.config import ServeConfig
from rayloop.serve.batcher import DEFAULT_PRIORITY, Batcher, still_there
from rayloop.serve.events import PredictionEvent, decide
from rayloop.serve.protocol.error import ProtocolError
from rayloop.serve.protocol.spec import ModelSpec
from rayloop.serve.traffic import TrafficPlan

EventSink = Callable[[PredictionEvent], None]


@dataclass(frozen=True, slots=True)
class Variant:
    """A model that is loaded, with the queue in front of it."""

    name: str
    spec: ModelSpec
    batcher: Batcher


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What one request gets back."""

    prediction_id: str
    variant: Variant
    probabilities: NDArray[np.float32]
    """float32 [N, K]."""


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

    def remember(self, versions: tuple[str, ...]) -> None:
        """Note which versions are loaded, for replicas that start later."""
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

    def remember(self, versions: tuple[str, ...]) -> None:
        """Nothing to note."""


class ModelService:
    """The versions of one model in one replica: the plan's variants, and others loaded beside them.

    A request that names no version is answered by a variant of the plan. Any loaded version can be
    asked for by its number. A version that was unloaded keeps its place and can come back.

    Args:
        variants: Loaded models by name; all take the same images.
        plan: Which variant answers whom.
        config: Thresholds of the decision.
        clock: For the times in events.
        new_id: Makes a fresh prediction id.
        sink: Receives an event for each row; None makes no events.
        shelf: Where other versions are found.
    """

    def __init__(
        self,
        variants: dict[str, Variant],
        plan: TrafficPlan,
        config: ServeConfig,
        clock: Clock,
        new_id: Callable[[], str],
        sink: EventSink | None = None,
        shelf: Shelf | None = None,
    ) -> None:
        self._variants = variants
        self._plan = plan
        self._config = config
        self._clock = clock
        self._new_id = new_id
        self._sink = sink
        self.shelf: Shelf = shelf or EmptyShelf()
        self._planned = {name: variants[name].spec.version for name in plan.names}
        self._versions = {variant.spec.version: variant for variant in variants.values()}
        self.spec = variants[plan.names[0]].spec

    @property
    def queued_rows(self) -> int:
        """Rows that wait, over all versions."""
        return sum(variant.batcher.queued_rows for variant in self._versions.values())

    @property
    def wait_s(self) -> float:
        """Seconds before even an urgent request could be done, at the version with least to do."""
        return min((v.batcher.wait_s() for v in self._versions.values()), default=0.0)

    @property
    def versions(self) -> tuple[str, ...]:
        """The versions that are loaded, lowest first."""
        return tuple(sorted(self._versions, key=int))

    @property
    def planned_versions(self) -> frozenset[str]:
        """The versions that the traffic plan needs."""
        return frozenset(self._planned.values())

    @property
    def ready(self) -> bool:
        """Whether every variant of the plan is loaded."""
        return all(name in self._variants for name in self._plan.names)

    def find(self, version: str = "") -> Variant:
        """A loaded version by its number; empty for the one that answers by default.

        Raises:
            ProtocolError: 404, it is not loaded; 503, the default one is not.
        """
        if not version:
            variant = self._variants.get(self._plan.names[0])
            if variant is None:
                raise not_loaded(self.spec)
            return variant
        if version not in self._versions:
            loaded = ", ".join(self.versions) or "none"
            raise ProtocolError(
                404,
                f"Version {version[:40]!r} of {self.spec.model!r} is not loaded; loaded: {loaded}.",
            )
        return self._versions[version]

    def add(self, variant: Variant) -> None:
        """Take in a loaded version, under the plan's name for it if the plan has one."""
        version = variant.spec.version
        for name, planned in self._planned.items():
            if planned == version:
                variant = Variant(name, variant.spec, variant.batcher)
                self._variants[name] = variant
        self._versions[version] = variant

    async def remove(self, version: str) -> None:
        """Let go of a version: what was accepted is still answered, then its memory is freed."""
        variant = self.drop(version)
        if variant is not None:
            await variant.batcher.drain()

    def drop(self, version: str) -> Variant | None:
        """Take a version out of what answers; None when it was not there."""
        self._variants = {
            name: kept for name, kept in self._variants.items() if kept.spec.version != version
        }
        return self._versions.pop(version, None)

    def statistics(self) -> list[dict[str, Any]]:
        """`model_stats` of all loaded versions, lowest first."""
        return [
            self._versions[version].batcher.statistics.to_json(self.spec.model, version)
            for version in self.versions
        ]

    def variant_for(self, unit: str, prediction_id: str, forced: str) -> Variant:
        """The variant that answers a request.

        Raises:
            ProtocolError: 404, the client asks for a variant that is not there.
        """
        if not forced:
            variant = self._variants.get(self._plan.assign(unit or prediction_id))
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
        """Probabilities of an image batch, and its events.

        Args:
            images: uint8 [N, H, W, C].
            unit: Who the request is for; empty when nobody is named.
            forced: Name of the variant to use; empty leaves the choice to the plan.
            timeout_s: Seconds until nobody waits any more.
            version: Number of the version that must answer; empty leaves the choice to the plan.
            priority: 1 (most urgent) to `PRIORITY_LEVELS`.
            gone: Says, once asked, whether nobody waits any more.
        """
        prediction_id = self._new_id()
        planned = not version
        variant = self.variant_for(unit, prediction_id, forced) if planned else self.find(version)
        clock, statistics = self._clock, variant.batcher.statistics
        start = clock.monotonic()
        try:
            probabilities = await variant.batcher.submit(images, timeout_s, priority, gone)
        except BaseException:
            statistics.finished(False, int((clock.monotonic() - start) * 1e9), 0.0)
            raise
        statistics.finished(True, int((clock.monotonic() - start) * 1e9), clock.now())
        prediction = Prediction(
            prediction_id=prediction_id, variant=variant, probabilities=probabilities
        )
        if self._sink is not None:
            self._emit(self._sink, prediction, unit, bool(forced) or not planned, start)
        return prediction

    async def close(self) -> None:
        """Finish what runs and stop the engines' threads."""
        for variant in self._versions.values():
            await variant.batcher.close()

    def _emit(
        self, sink: EventSink, prediction: Prediction, unit: str, forced: bool, start: float
    ) -> None:
        latency_ms = (self._clock.monotonic() - start) * 1000
        now = iso_utc(self._clock.now())
        for row, values in enumerate(prediction.probabilities):
            index = int(values.argmax())
            confidence = float(values[index])
            sink(
                PredictionEvent(
                    prediction_id=prediction.prediction_id,
                    row=row,
                    time=now,
                    model=prediction.variant.spec.model,
                    version=prediction.variant.spec.version,
                    variant=prediction.variant.name,
                    unit=unit,
                    forced=forced,
                    class_index=index,
                    confidence=confidence,
                    decision=decide(confidence, self._config),
                    latency_ms=latency_ms,
                )
            )


def not_loaded(spec: ModelSpec) -> ProtocolError:
    """The answer while the model that should answer is unloaded."""
    return ProtocolError(
        503, f"Model {spec.model!r} is unloaded; load it with /v2/repository/models/.../load.", 1
    )
