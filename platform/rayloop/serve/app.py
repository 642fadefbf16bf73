"""Turn a registered version into a Ray Serve application whose replicas answer HTTP directly."""

from collections.abc import Callable
from functools import partial
from typing import Any

from ray import serve
from ray.serve import Application

from rayloop import logs
from rayloop.config import RegistryConfig, ServeConfig
from rayloop.serve.http import InferenceApp
from rayloop.serve.options import deployment_options
from rayloop.serve.service import ModelService
from rayloop.storage import Storage

Loader = Callable[[ServeConfig], ModelService]


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

    def __serve_build_asgi_app__(self) -> Any:
        """The ASGI application; Serve's name for the hook it calls after the constructor."""
        return InferenceApp(self._service, self._config)


def application(config: ServeConfig, load: Loader) -> Application:
    """The application that serves what a loader loads, the same in every replica.

    Raises:
        ConfigError: Settings contradict each other.
    """
    options = deployment_options(config)
    ingress = serve.ingress()(Classifier)
    deployment = serve.deployment(**options, logging_config={"enable_access_log": False})(ingress)
    return deployment.bind(config, load)


def build_app(
    config: ServeConfig,
    registry: RegistryConfig,
    home: str,
    model: str = "",
    version: str = "@champion",
) -> Application:
    """The application that serves one registered version.

    Args:
        config: How to serve.
        registry: Where aliases are looked up.
        home: Root of the storage, reachable from every node.
        model: Name in the registry; empty means `registry.model`.
        version: `@alias` or `:number`; it is resolved now, once for all replicas.

    Raises:
        DataMissing: There is no such model, alias or version.
        ConfigError: Settings contradict each other.
    """
    from rayloop.serve.load import load_service, resolve_version  # noqa: PLC0415

    storage, name = Storage(home), model or registry.model
    resolved = resolve_version(storage, registry, name, version)
    return application(config, partial(load_service, storage, name, resolved))
