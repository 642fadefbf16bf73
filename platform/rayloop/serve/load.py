"""Turn a release into a loaded, proven and warmed service."""

from rayloop.clock import SYSTEM_CLOCK
from rayloop.config import RegistryConfig, ServeConfig
from rayloop.errors import Corrupt
from rayloop.logs import stage_logger
from rayloop.registry.release import ReleaseRecord, load_release
from rayloop.registry.store import open_registry
from rayloop.serve.assemble import make_service, prove
from rayloop.serve.engine import OnnxEngine, warm_up_sizes
from rayloop.serve.protocol.spec import ModelSpec
from rayloop.serve.service import EventSink, ModelService
from rayloop.storage import Storage

log = stage_logger("serve")


def load_service(
    storage: Storage, model: str, version: str, config: ServeConfig, sink: EventSink | None = None
) -> ModelService:
    """Load one version as the champion; to be called on the event loop that will use it.

    Args:
        storage: Holds the release.
        model: Name in the registry.
        version: Exact version, an integer as text.
        config: Threads, batch and queue sizes.
        sink: Receives prediction events.

    Raises:
        DataMissing: There is no such release.
        Corrupt: The artifact is damaged, or its golden answers are not reproduced here.
    """
    release = load_release(storage, model, version)
    folder = release.folder
    engine = OnnxEngine(storage.read(f"{folder}/{release.artifact}"), config.cpus_per_replica)
    if engine.shape != tuple(release.shape):
        raise Corrupt(
            f"{storage.path(folder)}: the model takes images of {engine.shape}, its release record "
            f"says {tuple(release.shape)}; register it again."
        )
    difference = prove(engine, storage.read(f"{folder}/{release.golden['file']}"), folder)
    engine.warm(warm_up_sizes(config.max_batch_rows))
    log.info("%s version %s is ready (golden difference %.2g)", model, version, difference)
    return make_service(engine, spec_of(release), config, sink)


def spec_of(release: ReleaseRecord) -> ModelSpec:
    """What clients are told about a release."""
    height, width, channels = release.shape
    return ModelSpec(
        model=release.model,
        version=release.version,
        shape=(height, width, channels),
        class_names=tuple(release.class_names),
    )


def resolve_version(storage: Storage, registry: RegistryConfig, model: str, version: str) -> str:
    """The exact version behind `@alias` or `:number`.

    Raises:
        DataMissing: There is none.
    """
    return open_registry(storage, registry, SYSTEM_CLOCK).resolve(model, version)
