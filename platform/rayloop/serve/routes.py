"""Turn a method and a path into what the client wants, or into 404 and 405."""

from enum import Enum, auto

from rayloop.serve.protocol.error import ProtocolError
from rayloop.serve.protocol.spec import ModelSpec


class Route(Enum):
    """What a request can ask for."""

    SERVER = auto()
    LIVE = auto()
    READY = auto()
    MODEL = auto()
    MODEL_READY = auto()
    INFER = auto()
    PREDICT = auto()


FIXED = {
    "/v2": Route.SERVER,
    "/v2/health/live": Route.LIVE,
    "/v2/health/ready": Route.READY,
    "/predict": Route.PREDICT,
}
OF_A_MODEL = {"": Route.MODEL, "ready": Route.MODEL_READY, "infer": Route.INFER}
POSTED = {Route.INFER, Route.PREDICT}


def find_route(method: str, path: str, spec: ModelSpec) -> Route:
    """What a request asks for.

    Args:
        method: HTTP method in capitals.
        path: Decoded path without the query.
        spec: The model that is served.

    Raises:
        ProtocolError: 404 unknown path, model or version; 405 wrong method.
    """
    route = FIXED.get(path) or _model_route(path, spec)
    allowed = ("POST",) if route in POSTED else ("GET", "HEAD")
    if method not in allowed:
        raise ProtocolError(405, f"{path} takes {' or '.join(allowed)}, not {method}.")
    return route


def _model_route(path: str, spec: ModelSpec) -> Route:
    parts = path.split("/")
    if parts[:3] != ["", "v2", "models"] or len(parts) < 4:
        raise ProtocolError(404, f"There is nothing at {path[:200]!r}; see GET /v2.")
    model, rest = parts[3], parts[4:]
    if model != spec.model:
        raise ProtocolError(404, f"Model {model[:100]!r} is unknown; {spec.model!r} is served.")
    if rest[:1] == ["versions"] and len(rest) > 1:
        version, rest = rest[1], rest[2:]
        if version != spec.version:
            raise ProtocolError(
                404,
                f"Version {version[:40]!r} of {model!r} is not served; {spec.version!r} is.",
            )
    action = rest[0] if rest else ""
    if len(rest) > 1 or action not in OF_A_MODEL or (rest and not action):
        raise ProtocolError(404, f"There is nothing at {path[:200]!r}; see GET /v2.")
    return OF_A_MODEL[action]
