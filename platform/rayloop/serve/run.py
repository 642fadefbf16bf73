"""Turn an application into a running server for as long as a context lasts."""

import contextlib
import logging
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray import serve
from ray.serve import Application

from rayloop.clock import SYSTEM_CLOCK
from rayloop.config import RegistryConfig, ServeConfig
from rayloop.errors import DoesNotFit, RequestError, WorkError
from rayloop.haproxy import port_is_free
from rayloop.logs import stage_logger
from rayloop.serve.app import build_app
from rayloop.serve.options import failure_reason

log = stage_logger("serve")

APP_NAME = "rayloop"
READY_TIMEOUT_S = 60.0


@contextmanager
def serving(
    config: ServeConfig,
    registry: RegistryConfig,
    home: str,
    model: str = "",
    version: str = "@champion",
) -> Iterator[str]:
    """Serve one version while the context lasts, and stop Serve on leaving.

    Ray must be connected, with the environment of `rayloop.haproxy.ingress`.

    Args:
        config: How to serve; `http_port` 0 picks a free port.
        registry: Where aliases are looked up.
        home: Root of the storage.
        model: Name in the registry; empty means `registry.model`.
        version: `@alias` or `:number`.

    Yields:
        The base URL, e.g. `http://127.0.0.1:8000`, once it answers.

    Raises:
        RequestError: The port is in use, the version is missing, or the replicas do not fit.
        WorkError: The replicas failed to start.
    """
    port = choose_port(config)
    check_room(config)
    app = build_app(config, registry, home, model, version)
    with running(app, config.host, port) as url:
        yield url


@contextmanager
def running(app: Application, host: str, port: int) -> Iterator[str]:
    """Run an application on a free host and port while the context lasts.

    Yields:
        The base URL, once it answers.

    Raises:
        WorkError: The replicas failed to start.
    """
    log.info("starting Serve on %s:%d", host, port)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        serve.start(http_options={"host": host, "port": port}, logging_config=_quiet())
        try:
            serve.run(app, name=APP_NAME, route_prefix="/", logging_config=_quiet())
        except RuntimeError as error:
            raise WorkError(
                f"The model could not be served: {failure_reason(_report() or str(error))}"
            ) from error
        url = base_url(host, port)
        wait_until_ready(url, READY_TIMEOUT_S)
        yield url
    finally:
        # Ray prints that the controller ended its own shutdown; stdout belongs to results.
        with contextlib.redirect_stdout(sys.stderr):
            serve.shutdown()  # type: ignore[no-untyped-call]


def choose_port(config: ServeConfig) -> int:
    """The HTTP port to serve on: the configured one when it is free, a free one for 0.

    Raises:
        RequestError: The port is in use.
    """
    if config.http_port == 0:
        with socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET) as probe:
            probe.bind((config.host, 0))
            return int(probe.getsockname()[1])
    if not port_is_free(config.host, config.http_port):
        raise RequestError(
            f"serve.http_port={config.http_port} on {config.host} is in use or not allowed; stop "
            "the other server, or choose another with --serve.http_port (0 picks a free one)."
        )
    return config.http_port


def check_room(config: ServeConfig) -> None:
    """Refuse replicas the connected cluster can never schedule; Serve would wait for ever.

    Raises:
        DoesNotFit: The sums and what to change.
    """
    total = float(ray.cluster_resources().get("CPU", 0.0))  # type: ignore[no-untyped-call]
    wanted = max(1, config.min_replicas) * config.cpus_per_replica
    if wanted > total:
        raise DoesNotFit(
            f"serve.min_replicas={config.min_replicas} x serve.cpus_per_replica="
            f"{config.cpus_per_replica} needs {wanted} CPUs; the cluster has {total:g}. Lower one "
            "of them, or offer more with --cluster.num_cpus."
        )


def base_url(host: str, port: int) -> str:
    """The URL under which a server bound to host and port is reached from its own machine."""
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    return f"http://[{reached}]:{port}" if ":" in reached else f"http://{reached}:{port}"


def wait_until_ready(url: str, timeout_s: float) -> None:
    """Wait until `/v2/health/ready` answers 200.

    Raises:
        WorkError: It does not within the time.
    """
    deadline = SYSTEM_CLOCK.monotonic() + timeout_s
    last = "no answer"
    while SYSTEM_CLOCK.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/v2/health/ready", timeout=5):
                return
        except urllib.error.HTTPError as error:
            last = f"status {error.code}"
            error.close()
        except OSError as error:
            last = str(error)
        time.sleep(0.05)
    raise WorkError(f"{url} was not ready within {timeout_s:.0f} s ({last}); see Serve's logs.")


def _report() -> str:
    application = serve.status().applications.get(APP_NAME)
    if application is None:
        return ""
    deployments = [status.message for status in application.deployments.values() if status.message]
    return "\n".join([application.message, *deployments])


def _quiet() -> dict[str, object]:
    return {"log_level": "WARNING", "enable_access_log": False}
