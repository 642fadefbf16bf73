"""Turn a registered version into a Ray Serve application whose replicas answer HTTP and gRPC."""

import asyncio
import secrets
from collections.abc import Callable
from functools import partial
from typing import Any

from ray import serve
from ray.serve import Application

from rayloop import logs
from rayloop.config import RegistryConfig, ServeConfig
from rayloop.serve.catalog import Catalog, Document
from rayloop.serve.grpc_app import GrpcApp
from rayloop.serve.grpc_server import hosted_by_serve, is_private, own_server, serve_here
from rayloop.serve.http import InferenceApp
from rayloop.serve.lane import open_lane
from rayloop.serve.options import deployment_options
from rayloop.serve.repository import Repository, nobody_else
from rayloop.serve.service import ModelService
from rayloop.storage import Storage

Loader = Callable[[ServeConfig], ModelService]

FAREWELL_S = 5.0
"""Longest time in which calls under way at the end of a replica may finish."""

QUIET = {"enable_access_log": False, "log_level": "WARNING"}
"""At INFO, Serve makes a log record of every request, even where it is thrown away."""


class Classifier:
    """One replica: it is ready once the model is loaded, proven and warm.

    Args:
        config: Limits and thresholds.
        load: Makes the service, in the replica.
    """

    def __init__(self, config: ServeConfig, load: Loader) -> None:
        logs.configure()
        self._config = config
        self._service = load(config)
        alone = config.max_replicas == 1
        self._repository = Repository(
            self._service,
            control=config.model_control,
            tell_others=nobody_else if alone else _tell_replicas,
        )
        self._catalog = Catalog(
            self._service, config, self._repository, None if alone else _gather_statistics
        )
        hosted = hosted_by_serve()
        grpc_app = GrpcApp(self._catalog, config, local_only=hosted and is_private(config.host))
        self._grpc_server: Any = None
        if hosted:
            serve_here(grpc_app)
        elif config.grpc_port:
            self._grpc_server = own_server(grpc_app, config)
            self._starting = asyncio.get_running_loop().create_task(self._grpc_server.start())

    def __serve_build_asgi_app__(self) -> Any:
        """The ASGI application; Serve's name for the hook it calls after the constructor."""
        app = InferenceApp(self._service, self._config, self._catalog, self._stop_grpc)
        open_lane(app)
        return app

    async def change_version(self, verb: str, version: str) -> None:
        """Load or unload a version in this replica; called by the one a client asked."""
        await self._repository.apply(verb, version)

    async def own_statistics(self) -> list[Document]:
        """Statistics of this replica; called by the one a client asked."""
        return self._service.statistics()

    async def _stop_grpc(self) -> None:
        if self._grpc_server is not None:
            await self._grpc_server.stop(FAREWELL_S)


def application(config: ServeConfig, load: Loader) -> Application:
    """The application that serves what a loader loads, the same in every replica.

    Raises:
        ConfigError: Settings contradict each other.
    """
    options = deployment_options(config)
    ingress = serve.ingress()(Classifier)
    deployment = serve.deployment(**options, logging_config=QUIET)(ingress)
    return deployment.bind(config, load)


def build_app(
    config: ServeConfig,
    registry: RegistryConfig,
    home: str,
    model: str = "",
    version: str = "@champion",
    deployment: str = "",
) -> Application:
    """The application that serves one registered version.

    Args:
        config: How to serve.
        registry: Where aliases are looked up.
        home: Root of the storage, reachable from every node.
        model: Name in the registry; empty means `registry.model`.
        version: `@alias` or `:number`; it is resolved now, once for all replicas.
        deployment: Names what its replicas remember together; made up when it is empty.

    Raises:
        DataMissing: There is no such model, alias or version.
        ConfigError: Settings contradict each other.
    """
    from rayloop.serve.load import load_service, resolve_version  # noqa: PLC0415

    storage, name = Storage(home), model or registry.model
    resolved = resolve_version(storage, registry, name, version)
    remembered = deployment or secrets.token_hex(8)
    return application(
        config, partial(load_service, storage, name, resolved, deployment=remembered)
    )


def _replicas() -> Any:
    """A handle to all replicas of the deployment this code runs in."""
    here = serve.get_replica_context()
    return serve.get_deployment_handle(here.deployment, here.app_name)


async def _tell_replicas(verb: str, version: str) -> None:
    await _replicas().broadcast("change_version", verb, version).results_async()


async def _gather_statistics() -> list[list[Document]]:
    found: list[list[Document]] = await _replicas().broadcast("own_statistics").results_async()
    return found
