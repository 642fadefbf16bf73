"""Turn an image batch into a prediction: choose the variant, run its engine, note what happened."""

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayloop.clock import Clock
from rayloop.config import ServeConfig
from rayloop.logs import stage_logger
from rayloop.serve.batcher import DEFAULT_PRIORITY, DeadlinePassed, still_there
from rayloop.serve.counts import VariantCounts, failure_reason_name
from rayloop.serve.events.event import Verdict
from rayloop.serve.events.memory import Memory
from rayloop.serve.execution import EngineFailed
from rayloop.serve.protocol.error import ProtocolError
from rayloop.serve.protocol.spec import ModelSpec
from rayloop.serve.shadow.shadow import Copy, Shadow
from rayloop.serve.shelf import EmptyShelf, Shelf
from rayloop.serve.traffic.plan import TrafficPlan
from rayloop.serve.traffic.second_opinion import SecondOpinion, Settled
from rayloop.serve.variant import Prediction, Variant
from rayloop.serve.visit import Visit

log = stage_logger("serve")

LONGEST_UNIT = 256
"""Characters of the name that a request is for."""

FAREWELL_S = 10.0
"""Longest time in which engines may end what they do."""

ACCEPTED: tuple[Verdict, ...] = ("accept",)


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

    def limit(self, config: ServeConfig) -> None:
        """Go on with other limits, also in versions that are loaded later."""
        self.shelf.limit(config)
        for variant in self._loaded.values():
            variant.batcher.limit(config.max_batch_wait_ms / 1000, config.max_queued_rows)

    @property
    def queued_rows(self) -> int:
        """Rows that wait, over all versions."""
        return sum(variant.batcher.queued_rows for variant in self._loaded.values())

    @property
    def wait_s(self) -> float:
        """Seconds before even an urgent request could be done, where least has to be done."""
        answering = {v.version for v in self.plan.variants if v.share > 0}
        live = [v for version, v in self._loaded.items() if version in answering]
        return min((variant.batcher.wait_s() for variant in live), default=0.0)

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
            answering = next(planned for planned in self.plan.variants if planned.share > 0)
            variant = self._variants.get(answering.name)
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
            await self.let_go(variant)

    async def let_go(self, variant: Variant) -> None:
        """Let a version that was taken out end: what waits in it is answered first."""
        await variant.batcher.drain()
        self.shelf.release(variant.spec.version)

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
        if len(unit) > LONGEST_UNIT:
            raise ProtocolError(
                400, f"The unit has {len(unit)} characters; name it with at most {LONGEST_UNIT}."
            )
        prediction_id, plan, opinion = self._new_id(), self.plan, self.second_opinion
        variant = self.find(version) if version else self.variant_for(unit, prediction_id, forced)
        visit = Visit(variant, plan.number, unit, bool(forced or version), self._clock.monotonic())
        try:
            first = await variant.batcher.submit(images, timeout_s, priority, gone, visit.times)
            doubtful = opinion.doubtful(first)
            if doubtful:
                left_s = timeout_s - (self._clock.monotonic() - visit.start)
                larger = None if version else self._loaded.get(plan.low_confidence.fallback)
                queue = larger.batcher if larger else None
                settled = await opinion.settle(
                    queue, images, first, doubtful, left_s / 2, priority, gone
                )
            else:
                settled = Settled(first, ACCEPTED * len(first))
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
        try:
            shadows = [asyncio.to_thread(shadow.close) for shadow in self.shadows.values()]
            engines = [variant.batcher.close() for variant in self._loaded.values()]
            async with asyncio.timeout(FAREWELL_S):  # an engine that hangs must not cost events
                await asyncio.gather(*engines, *shadows)
        except TimeoutError:
            log.error("an engine did not end within %g s", FAREWELL_S)
        finally:
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
        visit: Visit,
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
                if shadow.version != variant.spec.version:
                    shadow.offer(copy)
        if self.memory is not None:
            self.memory.put(
                visit.event(
                    prediction.prediction_id, now, latency_ms, 200, images,
                    prediction.probabilities, prediction.decisions, prediction.versions,
                )
            )  # fmt: skip

    def _failed(
        self,
        visit: Visit,
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


def not_loaded(spec: ModelSpec) -> ProtocolError:
    """The answer while the model that should answer is unloaded."""
    return ProtocolError(
        503, f"Model {spec.model!r} is unloaded; load it with /v2/repository/models/.../load.", 1
    )
