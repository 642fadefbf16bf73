"""Where a replica finds the versions of its model, and the traffic plans to come."""

from dataclasses import dataclass
from typing import Protocol

from rayloop.config import ServeConfig
from rayloop.serve.protocol.error import ProtocolError
from rayloop.serve.shadow.shadow import Shadow
from rayloop.serve.traffic.plan import TrafficPlan
from rayloop.serve.variant import Variant


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

    def limit(self, config: ServeConfig) -> None:
        """Load with other limits from now on."""
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

    def remember(self, changes: ByHand) -> None:
        """Note what was loaded and unloaded by hand, for replicas that start later."""
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

    def limit(self, config: ServeConfig) -> None:
        """Nothing is loaded with them."""

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

    def remember(self, changes: ByHand) -> None:
        """Nothing to note."""
