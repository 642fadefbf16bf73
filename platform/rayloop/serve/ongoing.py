"""Tell the replica how many requests it has under way, for autoscaling and for its farewell.

Requests that Serve handles itself are counted by Serve. Those that are answered past it, over HTTP
in `rayloop.serve.lane` and over gRPC, are counted here, once the lane knows the replica.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Ongoing:
    """The requests under way in this process that Serve does not see."""

    def __init__(self) -> None:
        self.count = 0
        self._report: Callable[[int], None] | None = None

    def report_to(self, report: Callable[[int], None]) -> None:
        """Call this with every change, +1 or -1, from now on."""
        self._report = report

    @contextmanager
    def one(self) -> Iterator[None]:
        """Count a request for as long as it is under way."""
        self.change(1)
        try:
            yield
        finally:
            self.change(-1)

    def change(self, by: int) -> None:
        """A request came, or its answer is on the way."""
        self.count += by
        if self._report is not None:
            self._report(by)


HTTP, GRPC = Ongoing(), Ongoing()
"""Those of this process, which holds one replica at most."""
