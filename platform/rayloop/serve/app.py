"""Turn a registered version into a Ray Serve application whose replicas answer HTTP and gRPC."""

import asyncio
import contextlib
import gc
from collections.abc import Callable
from functools import partial
from typing import Any

from ray import serve
from ray.serve import Application

from rayloop import logs
from rayloop.clock import SYSTEM_CLOCK
from rayloop.config import EventsConfig, RegistryConfig, ServeConfig, digest_of
from rayloop.errors import ConfigError
from rayloop.serve.catalog import Catalog, Document
from rayloop.serve.events.recorder import Recorder
from rayloop.serve.grpc_app import GrpcApp
from rayloop.serve.grpc_server import hosted_by_serve, is_private, own_server, serve_here
from rayloop.serve.http import InferenceApp
from rayloop.serve.lane import open_lane
from rayloop.serve.limits import LIVE, with_limits
from rayloop.serve.options import deployment_options
from rayloop.serve.repository import Repository, nobody_else
from rayloop.serve.service import ModelService
from rayloop.serve.snapshot import snapshot
from rayloop.serve.traffic.follow import PlanFollower
from rayloop.storage import Storage

log = logs.stage_logger("serve")

Loader = Callable[[ServeConfig], ModelService]

FAREWELL_S = 5.0
"""Longest time in which calls under way at the end of a replica may finish."""

OTHERS_S = 2.0
"""Longest time a replica waits for what the others say of themselves."""

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
        self._replica = serve.get_replica_context().replica_id.unique_id
        snapshots = self._own_snapshots if alone else self._all_snapshots
        gather = None if alone else _gather_statistics
        self._catalog = Catalog(self._service, config, self._repository, gather, snapshots)
        memory = self._service.memory
        if isinstance(memory, Recorder) and not alone:
            memory.flush_others = _flush_others
        self._follower = PlanFollower(
            self._service, self._repository, config.plan_poll_s, SYSTEM_CLOCK
        )
        self._grpc_app: GrpcApp | None = None
        self._app: InferenceApp | None = None
        self._refused_limits = ""
        self._following = asyncio.get_running_loop().create_task(self._follower.run())
        hosted = hosted_by_serve()
        grpc_app = GrpcApp(self._catalog, config, local_only=hosted and is_private(config.host))
        self._grpc_app = grpc_app
        self._grpc_server: Any = None
        if hosted:
            serve_here(grpc_app)
        elif config.grpc_port:
            self._grpc_server = own_server(grpc_app, config)
            self._starting = asyncio.get_running_loop().create_task(self._grpc_server.start())
        keep_what_is_loaded()

    def __serve_build_asgi_app__(self) -> Any:
        """The ASGI application; Serve's name for the hook it calls after the constructor."""
        self._app = InferenceApp(self._service, self._catalog.config, self._catalog, self._farewell)
        open_lane(self._app)
        return self._app

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Go on with other limits; Serve calls it when `user_config` of the deployment changes.

        What cannot be is refused and told in the log and by `rayloop status`; an exception here
        would end the replica.
        """
        try:
            config = with_limits(self._config, user_config)
        except ConfigError as error:
            self._refused_limits = str(error)
            log.error("the limits stay as they are: %s", error)
            return
        self._refused_limits = ""
        self._catalog.config = config
        for limited in (self._service, self._grpc_app, self._app):
            if limited is not None:
                limited.limit(config)

    async def change_version(self, verb: str, version: str) -> None:
        """Load or unload a version in this replica; called by the one a client asked."""
        await self._repository.apply(verb, version)

    async def own_statistics(self) -> list[Document]:
        """Statistics of this replica; called by the one a client asked."""
        return self._service.statistics()

    async def own_snapshot(self) -> Document:
        """State of this replica; called by the one a client asked."""
        own = snapshot(self._service, self._follower, self._replica)
        limits = {name: getattr(self._catalog.config, name) for name in LIVE}
        return own | {"limits": limits, "refused_limits": self._refused_limits}

    async def flush_events(self, prediction_id: str) -> None:
        """Write a prediction's event, if it waits here; called by the replica a client asked."""
        if isinstance(self._service.memory, Recorder):
            await asyncio.to_thread(self._service.memory.flush_own, prediction_id)

    async def _own_snapshots(self) -> list[Document]:
        return [await self.own_snapshot()]

    async def _all_snapshots(self) -> list[Document]:
        with contextlib.suppress(Exception):  # this replica can always tell of itself
            asked = _replicas().broadcast("own_snapshot")
            found = await asked.results_async(timeout_s=OTHERS_S, return_exceptions=True)
            others = {one["replica"]: one for one in found if isinstance(one, dict)}
            return list((others | {self._replica: await self.own_snapshot()}).values())
        return await self._own_snapshots()

    async def _farewell(self) -> None:
        self._following.cancel()
        if self._grpc_server is not None:
            await self._grpc_server.stop(FAREWELL_S)


def keep_what_is_loaded() -> None:
    """Spare the garbage collector what libraries and models hold.

    A full collection over a replica's heap stops it for tens of milliseconds.
    """
    gc.collect()
    gc.freeze()


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
    events: EventsConfig | None = None,
) -> Application:
    """The application that serves a registered model as its newest traffic plan says.

    Args:
        config: How to serve.
        registry: Where aliases are looked up.
        home: Root of the storage, reachable from every node.
        model: Name in the registry; empty means `registry.model`.
        version: The champion leaves the plan in force as it is, but for aliases that have moved;
            another `@alias` or `:number` is given all traffic.
        deployment: Names what its replicas remember together; empty for a name that an update of
            the same application keeps.
        events: What is remembered of predictions; None for the defaults.

    Raises:
        DataMissing: There is no such model, alias or version.
        ConfigError: Settings contradict each other.
    """
    from rayloop.serve.load import load_service, steering  # noqa: PLC0415

    storage, name = Storage(home), model or registry.model
    steering(storage, registry, name).opening(version)
    remembered = deployment or digest_of([home, name])[:16]
    return application(
        config,
        partial(
            load_service, storage, name, events=events or EventsConfig(), deployment=remembered
        ),
    )


def _replicas() -> Any:
    """A handle to all replicas of the deployment this code runs in."""
    here = serve.get_replica_context()
    return serve.get_deployment_handle(here.deployment, here.app_name)


async def _tell_replicas(verb: str, version: str) -> None:
    await _replicas().broadcast("change_version", verb, version).results_async()


async def _flush_others(prediction_id: str) -> None:
    with contextlib.suppress(Exception):  # then the prediction stays unknown for a moment
        asked = _replicas().broadcast("flush_events", prediction_id)
        await asked.results_async(timeout_s=OTHERS_S, return_exceptions=True)


async def _gather_statistics() -> list[list[Document]]:
    found: list[list[Document]] = await _replicas().broadcast("own_statistics").results_async()
    return found
