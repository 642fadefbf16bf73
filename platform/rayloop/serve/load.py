"""Turn a release into a loaded, proven and warmed service."""

from dataclasses import replace
from typing import TYPE_CHECKING

from rayloop.clock import SYSTEM_CLOCK
from rayloop.config import RegistryConfig, ServeConfig
from rayloop.errors import Corrupt
from rayloop.logs import stage_logger
from rayloop.registry.release import RECORD_FILE, ReleaseRecord, load_release, release_folder
from rayloop.registry.store import open_registry
from rayloop.serve.assemble import GOLDEN_TOLERANCE, make_service, make_variant, prove
from rayloop.serve.engine import Engine, OnnxEngine, warm_up_sizes
from rayloop.serve.protocol.spec import ModelSpec
from rayloop.serve.service import EventSink, ModelService, Variant
from rayloop.storage import Storage

if TYPE_CHECKING:
    from rayloop.serve.torch_engine import TorchEngine

log = stage_logger("serve")

TORCH_TOLERANCE = 0.5
"""The golden answers are those of the quantized model. Full precision moves a probability near a
class boundary by some tenths; wrong weights or wrong preprocessing move some row's by nearly 1."""


def load_service(
    storage: Storage,
    model: str,
    version: str,
    config: ServeConfig,
    sink: EventSink | None = None,
    deployment: str = "",
) -> ModelService:
    """Load one version as the champion; to be called on the event loop that will use it.

    Args:
        storage: Holds the releases.
        model: Name in the registry.
        version: Exact version, an integer as text.
        config: Threads, batch and queue sizes.
        sink: Receives prediction events.
        deployment: Names what all replicas of one deployment remember together; empty for a
            replica that is alone.

    Raises:
        DataMissing: There is no such release.
        Corrupt: The artifact is damaged, or its golden answers are not reproduced here.
    """
    shelf = RegistryShelf(storage, model, config, deployment)
    engine, spec = load_engine(storage, model, version, config)
    service = make_service(engine, spec, config, sink, shelf)
    wanted = shelf.remembered()
    if wanted is not None:
        for other in wanted:
            if other != version:
                service.add(shelf.load(other))
        if version not in wanted:
            service.drop(version)
    return service


def load_engine(
    storage: Storage, model: str, version: str, config: ServeConfig
) -> tuple[Engine, ModelSpec]:
    """A version's engine, proven and warm, and what clients are told about it.

    Raises:
        DataMissing: There is no such release.
        Corrupt: The artifact is damaged, or its golden answers are not reproduced here.
    """
    release = load_release(storage, model, version)
    folder = release.folder
    engine: OnnxEngine | TorchEngine
    if config.engine == "torch":
        engine, tolerance = _torch_engine(storage, release, config), TORCH_TOLERANCE
    else:
        model_file = storage.read(f"{folder}/{release.artifact}")
        engine, tolerance = OnnxEngine(model_file, config.cpus_per_replica), GOLDEN_TOLERANCE
    if engine.shape != tuple(release.shape):
        raise Corrupt(
            f"{storage.path(folder)}: the model takes images of {engine.shape}, its release record "
            f"says {tuple(release.shape)}; register it again."
        )
    difference = prove(
        engine, storage.read(f"{folder}/{release.golden['file']}"), folder, tolerance
    )
    engine.warm(warm_up_sizes(config.max_batch_rows))
    log.info("%s version %s is ready (golden difference %.2g)", model, version, difference)
    return engine, replace(spec_of(release), engine=config.engine)


def _torch_engine(storage: Storage, release: ReleaseRecord, config: ServeConfig) -> "TorchEngine":
    """The release's model on torch, from the weights of its run, which must still be there."""
    from rayloop.serve.torch_engine import TorchEngine  # noqa: PLC0415  takes seconds to import
    from rayloop.train.result import load_model, load_result  # noqa: PLC0415

    result = load_result(storage, release.run_id)
    if result.checkpoint_digest != release.checkpoint_digest:
        raise Corrupt(
            f"Run {release.run_id} has been trained further since {release.model}:"
            f"{release.version} was registered; register it again, or use --serve.engine onnx."
        )
    return TorchEngine(
        load_model(storage, result),
        precision=config.precision,
        use_gpu=config.use_gpu,
        compiled=config.compile,
        num_threads=config.cpus_per_replica,
        max_batch_rows=config.max_batch_rows,
    )


def notes_folder(deployment: str) -> str:
    """Where the replicas of one deployment remember things together; nobody needs it after them."""
    return f"serving/{deployment}"


class RegistryShelf:
    """The versions of one model in the registry.

    Args:
        storage: Holds the releases.
        model: Name in the registry.
        config: Threads, batch and queue sizes.
        deployment: Names what its replicas remember together; empty remembers nothing.
    """

    def __init__(
        self, storage: Storage, model: str, config: ServeConfig, deployment: str = ""
    ) -> None:
        self._storage = storage
        self._model = model
        self._config = config
        self._note = f"{notes_folder(deployment)}/{model}.json" if deployment else ""

    def published(self) -> list[str]:
        """The versions whose release record is in place, lowest first."""
        names = self._storage.names(f"models/{self._model}")
        return sorted(
            (
                name
                for name in names
                if name.isdigit()
                and self._storage.exists(f"{release_folder(self._model, name)}/{RECORD_FILE}")
            ),
            key=int,
        )

    def load(self, version: str) -> Variant:
        """A version, loaded, proven and warm.

        Raises:
            DataMissing: There is no such release.
            Corrupt: It is damaged, or its golden answers are not reproduced here.
        """
        engine, spec = load_engine(self._storage, self._model, version, self._config)
        return make_variant(f"version-{version}", engine, spec, self._config)

    def remember(self, versions: tuple[str, ...]) -> None:
        """Note which versions are loaded, for replicas that start later."""
        if self._note:
            self._storage.write_json(self._note, {"versions": list(versions)})

    def remembered(self) -> list[str] | None:
        """The versions to load at the start; None when nothing was changed."""
        if not self._note or not self._storage.exists(self._note):
            return None
        found: list[str] = self._storage.read_json(self._note)["versions"]
        return found


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
