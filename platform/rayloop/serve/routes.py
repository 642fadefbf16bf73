"""Turn a method and a path into what the client wants, or into 404 and 405."""

from dataclasses import dataclass
from enum import Enum, auto

from rayloop.serve.protocol.error import ProtocolError


class Action(Enum):
    """What a request can ask for."""

    SERVER = auto()
    LIVE = auto()
    READY = auto()
    OPENAPI = auto()
    MODEL = auto()
    MODEL_READY = auto()
    MODEL_CONFIG = auto()
    STATISTICS = auto()
    INFER = auto()
    PREDICT = auto()
    INDEX = auto()
    LOAD = auto()
    UNLOAD = auto()
    FEEDBACK = auto()
    METRICS = auto()
    STATUS = auto()


@dataclass(frozen=True, slots=True)
class Route:
    """An action with the model and version in its path."""

    action: Action
    model: str = ""
    version: str = ""
    """Empty when the path names none."""


FIXED = {
    "/v2": Route(Action.SERVER),
    "/v2/health/live": Route(Action.LIVE),
    "/v2/health/ready": Route(Action.READY),
    "/v2/models/stats": Route(Action.STATISTICS),
    "/v2/repository/index": Route(Action.INDEX),
    "/predict": Route(Action.PREDICT),
    "/openapi.json": Route(Action.OPENAPI),
    "/feedback": Route(Action.FEEDBACK),
    "/metrics": Route(Action.METRICS),
    "/rayloop/status": Route(Action.STATUS),
}
OF_A_MODEL = {
    "": Action.MODEL,
    "ready": Action.MODEL_READY,
    "config": Action.MODEL_CONFIG,
    "stats": Action.STATISTICS,
    "infer": Action.INFER,
}
OF_THE_REPOSITORY = {"load": Action.LOAD, "unload": Action.UNLOAD}
NOT_OFFERED = ("systemsharedmemory", "cudasharedmemory", "trace", "logging")
POSTED = {
    Action.INFER, Action.PREDICT, Action.INDEX, Action.LOAD, Action.UNLOAD, Action.FEEDBACK
}  # fmt: skip


def find_route(method: str, path: str) -> Route:
    """What a request asks for.

    Args:
        method: HTTP method in capitals.
        path: Decoded path without the query.

    Raises:
        ProtocolError: 404 unknown path; 405 wrong method; 501 an extension that is not offered.
    """
    route = FIXED.get(path) or _deeper_route(path)
    allowed = ("POST",) if route.action in POSTED else ("GET", "HEAD")
    if method not in allowed:
        raise ProtocolError(405, f"{path} takes {' or '.join(allowed)}, not {method}.")
    return route


def _deeper_route(path: str) -> Route:
    parts = path.split("/")[1:]
    if parts[:1] == ["v2"] and len(parts) > 1:
        if parts[1] == "models":
            found = _model_route(parts[2:])
        elif parts[1:3] == ["repository", "models"] and len(parts) == 5 and parts[3]:
            action = OF_THE_REPOSITORY.get(parts[4])
            found = Route(action, parts[3]) if action else None
        else:
            found = None
        if found is not None:
            return found
        if parts[1] in NOT_OFFERED or parts[-2:] == ["trace", "setting"]:
            raise ProtocolError(501, f"Extension {parts[1]!r} is not offered; see GET /v2.")
    raise ProtocolError(404, f"There is nothing at {path[:200]!r}; see GET /v2.")


def _model_route(parts: list[str]) -> Route | None:
    """The route for `MODEL[/versions/VERSION][/ACTION]`; None when it is no such path."""
    if not parts or not parts[0]:
        return None
    model, version, rest = parts[0], "", parts[1:]
    if rest[:1] == ["versions"]:
        if len(rest) < 2 or not rest[1]:
            return None
        version, rest = rest[1], rest[2:]
    if len(rest) > 1 or rest == [""]:
        return None
    action = OF_A_MODEL.get(rest[0] if rest else "")
    return None if action is None else Route(action, model, version)
