"""Answer HTTP requests before Serve's own handling of each, which costs more than a small model.

Serve puts the middlewares it is told of by `MIDDLEWARES` around the HTTP server of each replica.
The one here sends requests straight to the replica's application. What Serve would have done for
them beside that is done elsewhere: `rayloop.serve.ongoing` counts them, and the application itself
bounds its queues, keeps deadlines and notices that a client left. Health checks, and all requests
to a replica that is another application's, take Serve's own way. docs/decisions/0006 has the
measurements.
"""

from functools import partial
from typing import Any

from ray.serve._private.common import RequestMetadata, RequestProtocol
from starlette.middleware import Middleware

from rayloop.logs import stage_logger
from rayloop.serve import ongoing
from rayloop.serve.body import Receive
from rayloop.serve.call import Scope
from rayloop.serve.reply import Send

log = stage_logger("serve")

MIDDLEWARES = "rayloop.serve.lane.middlewares"
"""For RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH."""

SERVES_OWN = "/-/"
"""Where Serve answers health checks and questions about routes."""

_here: list[Any] = []


def open_lane(app: Any) -> None:
    """Make an ASGI application the one that the lane of this process leads to."""
    _here[:] = [app]


def middlewares() -> list[Middleware]:
    """What Serve puts around each HTTP server it starts; it calls this in every such process."""
    return [Middleware(Lane)]


def _seen(protocol: str) -> RequestMetadata:
    """As much as Serve must know of a request to count it."""
    return RequestMetadata(
        request_id="",
        internal_request_id="",
        is_direct_ingress=True,
        _request_protocol=RequestProtocol(protocol),
    )


class Lane:
    """An ASGI application in front of Serve's.

    Args:
        serve: Serve's own application for a replica, or for a proxy.
    """

    def __init__(self, serve: Any) -> None:
        self._serve = serve
        replica = getattr(getattr(serve, "_app", None), "__self__", None)
        metrics: Any = getattr(replica, "_metrics_manager", None)
        self._prefix = (getattr(replica, "_route_prefix", None) or "/").rstrip("/")
        self._is_open = hasattr(metrics, "_change_num_ongoing_requests")
        if self._is_open:
            for requests, protocol in ((ongoing.HTTP, "HTTP"), (ongoing.GRPC, "gRPC")):
                requests.report_to(partial(metrics._change_num_ongoing_requests, _seen(protocol)))
        elif _here:
            log.warning(
                "This version of Ray Serve keeps its count of requests elsewhere, so requests take "
                "Serve's own way, at about twice the CPU time each; use the version in the lock."
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request here if it is one for the application, or hand it to Serve."""
        if not (self._is_open and _here and scope["type"] == "http" and self._is_inside(scope)):
            await self._serve(scope, receive, send)
            return
        ongoing.HTTP.change(1)
        try:
            await _here[0](scope, receive, send)
        finally:
            ongoing.HTTP.change(-1)

    def _is_inside(self, scope: Any) -> bool:
        root: str = scope.get("root_path", "")
        path = scope["path"][len(root) :]
        if not self._prefix:
            return not path.startswith(SERVES_OWN)
        if not path.startswith(f"{self._prefix}/"):
            return False
        scope["root_path"] = root + self._prefix
        return True
