"""Turn an application into a running server for as long as a context lasts."""

import contextlib
import logging
import os
import secrets
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import ray
from ray import serve
from ray.serve import Application

from rayloop.clock import SYSTEM_CLOCK
from rayloop.config import EventsConfig, RegistryConfig, ServeConfig
from rayloop.errors import DoesNotFit, RequestError, WorkError
from rayloop.logs import stage_logger
from rayloop.ports import free_port, port_is_free
from rayloop.serve.app import build_app
from rayloop.serve.grpc_server import ATTACH, hosted_by_serve
from rayloop.serve.load import notes_folder
from rayloop.serve.options import failure_reason
from rayloop.storage import Storage
from rayloop.tracking_client import configured_uri

log = stage_logger("serve")

APP_NAME = "rayloop"
METRICS_PORT = "RAY_SERVE_HAPROXY_METRICS_PORT"
READY_TIMEOUT_S = 60.0


class ServerUrl(str):
    """The base URL of the REST interface, with the address of the gRPC interface beside it."""

    __slots__ = ("grpc",)

    grpc: str
    """HOST:PORT; empty when gRPC is not served."""


@contextmanager
def serving(
    config: ServeConfig,
    registry: RegistryConfig,
    home: str,
    model: str = "",
    version: str = "@champion",
    events: EventsConfig | None = None,
) -> Iterator[ServerUrl]:
    """Serve one model while the context lasts, and stop Serve on leaving.

    Ray must be connected, with the environment of `rayloop.haproxy.ingress`.

    Args:
        config: How to serve; port 0 picks a free one.
        registry: Where aliases are looked up.
        home: Root of the storage.
        model: Name in the registry; empty means `registry.model`.
        version: As in `build_app`.
        events: What is remembered of predictions; None for the defaults.

    Yields:
        The base URL, e.g. `http://127.0.0.1:8000`, once it answers.

    Raises:
        RequestError: A port is in use, the version is missing, or the replicas do not fit.
        WorkError: The replicas failed to start.
    """
    registry = replace(registry, tracking_uri=configured_uri(registry.tracking_uri))
    port = choose_port(config)
    config = replace(config, grpc_port=choose_grpc_port(config, port))
    check_room(config)
    deployment, storage = secrets.token_hex(8), Storage(home)
    app = build_app(config, registry, home, model, version, deployment, events)
    try:
        with running(app, config.host, port, config.grpc_port) as url:
            note = {
                "url": url,
                "model": model or registry.model,
                "tracking_uri": registry.tracking_uri,
                "haproxy_metrics_port": int(os.environ.get(METRICS_PORT, "0")),
            }
            storage.write_json(f"{notes_folder(deployment)}/server.json", note)
            yield url
    finally:
        storage.remove(notes_folder(deployment))


@contextmanager
def running(app: Application, host: str, port: int, grpc_port: int = 0) -> Iterator[ServerUrl]:
    """Run an application on a free host and port while the context lasts.

    Args:
        app: Made with a configuration that has the same `host` and `grpc_port`.
        host: Address to bind to.
        port: HTTP port.
        grpc_port: gRPC port; 0 serves no gRPC.

    Yields:
        The base URL, once it answers.

    Raises:
        WorkError: The replicas failed to start.
    """
    log.info("starting Serve on %s:%d, gRPC on port %d", host, port, grpc_port)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        serve.start(
            http_options={"host": host, "port": port},
            grpc_options=grpc_options(grpc_port),
            logging_config=_quiet(),
        )
        try:
            serve.run(app, name=APP_NAME, route_prefix="/", logging_config=_quiet())
        except RuntimeError as error:
            raise WorkError(
                f"The model could not be served: {failure_reason(_report() or str(error))}"
            ) from error
        url = ServerUrl(base_url(host, port))
        url.grpc = grpc_address(host, grpc_port)
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
        return free_port(config.host)
    if not port_is_free(config.host, config.http_port):
        raise RequestError(
            f"serve.http_port={config.http_port} on {config.host} is in use or not allowed; stop "
            "the other server, or choose another with --serve.http_port (0 picks a free one)."
        )
    return config.http_port


def choose_grpc_port(config: ServeConfig, taken: int) -> int:
    """The gRPC port to serve on: the configured one when it is free, a free one for 0.

    Where `http_port` is 0 as well, a port in use is no error, so that servers started side by side
    need no second setting.

    Args:
        config: Names the host and the ports.
        taken: The HTTP port that was chosen.

    Raises:
        RequestError: The port is in use.
    """
    port = config.grpc_port
    if port and port != taken and port_is_free(config.host, port):
        return port
    if port and config.http_port:
        raise RequestError(
            f"serve.grpc_port={port} on {config.host} is in use or not allowed; stop the other "
            "server, or choose another with --serve.grpc_port (0 picks a free one)."
        )
    while (found := free_port(config.host)) == taken:
        continue
    return found


def grpc_options(grpc_port: int) -> dict[str, object] | None:
    """Serve's gRPC options; None where the replicas listen by themselves, or there is no gRPC."""
    if not grpc_port or not hosted_by_serve():
        return None
    return {"port": grpc_port, "grpc_servicer_functions": [ATTACH], "enable_reflection": False}


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
    return f"http://{_reached(host)}:{port}"


def grpc_address(host: str, port: int) -> str:
    """HOST:PORT under which the gRPC server is reached from its own machine; empty for port 0."""
    return f"{_reached(host)}:{port}" if port else ""


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


def _reached(host: str) -> str:
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    return f"[{reached}]" if ":" in reached else reached


def _report() -> str:
    application = serve.status().applications.get(APP_NAME)
    if application is None:
        return ""
    deployments = [status.message for status in application.deployments.values() if status.message]
    return "\n".join([application.message, *deployments])


def _quiet() -> dict[str, object]:
    return {"log_level": "WARNING", "enable_access_log": False}
