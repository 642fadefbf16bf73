"""What remembers predictions, as the service sees it."""

from collections.abc import Sequence
from typing import Any, Protocol

from rayloop.serve.events.event import PredictionEvent


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
