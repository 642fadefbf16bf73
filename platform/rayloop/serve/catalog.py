"""Turn questions about the server and its model into documents, the same for REST and gRPC."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from rayloop import __version__
from rayloop.config import ServeConfig
from rayloop.serve.exposition import exposition
from rayloop.serve.protocol.error import ProtocolError
from rayloop.serve.protocol.spec import config_document, model_document, server_document
from rayloop.serve.repository import Repository
from rayloop.serve.service import ModelService, not_loaded
from rayloop.serve.statistics import merged
from rayloop.serve.variant import Variant

Document = dict[str, Any]
Gather = Callable[[], Awaitable[list[list[Document]]]]
"""The `model_stats` of every replica."""

Snapshots = Callable[[], Awaitable[list[Document]]]
"""`rayloop.serve.snapshot.snapshot` of every replica that can be reached."""


async def no_snapshots() -> list[Document]:
    """Those of a server without replicas, in tests."""
    return []


class Catalog:
    """What is served, in the words of the protocol.

    Args:
        service: Answers requests.
        config: How it does.
        repository: Loads and unloads; None for a server that was given its model.
        gather: Statistics of all replicas; None where this one is alone.
        snapshots: State of all replicas.
    """

    def __init__(
        self,
        service: ModelService,
        config: ServeConfig,
        repository: Repository | None = None,
        gather: Gather | None = None,
        snapshots: Snapshots = no_snapshots,
    ) -> None:
        self.service = service
        self.config = config
        self.repository = repository or Repository(service, control=config.model_control)
        self._gather = gather
        self.snapshots = snapshots

    def server(self) -> Document:
        """Name, version and extensions of the server."""
        return server_document(__version__)

    def find(self, model: str, version: str = "") -> Variant:
        """The loaded version that a request is about.

        Args:
            model: Name as sent.
            version: Number as sent; empty for the one that answers by default.

        Raises:
            ProtocolError: 404 unknown model or version; 503 the model is unloaded.
        """
        self.check_name(model)
        return self.service.find(version)

    def check_name(self, model: str) -> None:
        """Refuse a model that is not served here.

        Raises:
            ProtocolError: 404.
        """
        own = self.service.spec.model
        if model != own:
            raise ProtocolError(
                404, f"Request for unknown model: {model[:100]!r} is not here; {own!r} is served."
            )

    def ready(self) -> bool:
        """Whether requests that name no version are answered."""
        return self.service.ready

    def model_ready(self, model: str, version: str) -> Document:
        """That a version answers.

        Raises:
            ProtocolError: 404 or 503, it does not.
        """
        self.find(model, version)
        if not version and not self.ready():
            raise not_loaded(self.service.spec)
        return {"ready": True}

    def model(self, model: str, version: str) -> Document:
        """A version's inputs and outputs."""
        return model_document(self.find(model, version).spec, self.service.versions)

    def model_config(self, model: str, version: str) -> Document:
        """How a version is served."""
        spec = self.find(model, version).spec
        return config_document(spec, self.service.versions, self.config)

    async def metrics(self) -> bytes:
        """Every replica's counts, in the text format of Prometheus."""
        return await asyncio.to_thread(exposition, await self.snapshots())

    async def learn(self, body: bytes) -> Document:
        """Take the truth about a prediction.

        Raises:
            ProtocolError: 501 nothing is remembered here; else as `Memory.learn`.
        """
        if self.service.memory is None:
            raise ProtocolError(501, "No predictions are remembered here (events.enabled is off).")
        return await self.service.memory.learn(body, self.service.spec.class_names)

    async def statistics(self, model: str, version: str) -> Document:
        """Counts and times since the versions were loaded, over all replicas.

        Args:
            model: Name; empty for every model.
            version: Number; empty for every version.
        """
        if model:
            self.check_name(model)
        if version:
            self.service.find(version)
        if self._gather is None:
            entries = self.service.statistics()
        else:
            entries = merged(await self._gather())
        return {
            "model_stats": [
                entry for entry in entries if not version or entry["version"] == version
            ]
        }
