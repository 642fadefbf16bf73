"""Turn a release into a loaded, proven and warmed service."""

import secrets
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, TypeVar

from rayloop.clock import SYSTEM_CLOCK
from rayloop.config import EventsConfig, RegistryConfig, ServeConfig, to_dict
from rayloop.errors import Corrupt, DataMissing
from rayloop.logs import stage_logger
from rayloop.registry.release import (
    RECORD_FILE,
    ReleaseRecord,
    load_release,
    read_record,
    release_folder,
)
from rayloop.registry.store import open_registry
from rayloop.serve.assemble import GOLDEN_TOLERANCE, make_variant, prediction_ids, prove
from rayloop.serve.engine import Engine, OnnxEngine, warm_up_sizes
from rayloop.serve.events.embedding import Embedder
from rayloop.serve.events.recorder import Recorder
from rayloop.serve.protocol.spec import ModelSpec
from rayloop.serve.service import ModelService
from rayloop.serve.shadow.pair_log import PairLog
from rayloop.serve.shadow.process import ShadowProcess
from rayloop.serve.shadow.shadow import Shadow
from rayloop.serve.shelf import ByHand
from rayloop.serve.traffic.plan import TrafficPlan
from rayloop.serve.traffic.steer import Steering
from rayloop.serve.traffic.store import PlanStore
from rayloop.serve.variant import Variant
from rayloop.storage import Storage

if TYPE_CHECKING:
    from rayloop.serve.torch_engine import TorchEngine

log = stage_logger("serve")

Loaded = TypeVar("Loaded")

SHADOW_BYTES = 67_108_864
"""Images that may wait for a shadow, in bytes."""

SHADOW_ENGINE = "rayloop.serve.load:shadow_engine"

TORCH_TOLERANCE = 0.5
"""The golden answers are those of the quantized model. Full precision moves a probability near a
class boundary by some tenths; wrong weights or wrong preprocessing move some row's by nearly 1."""


def load_service(
    storage: Storage,
    model: str,
    config: ServeConfig,
    events: EventsConfig | None = None,
    deployment: str = "",
) -> ModelService:
    """What the newest traffic plan needs, loaded; to be called on the event loop that will use it.

    A plan that cannot be put in force, since a file of it was damaged since, is passed over for the
    one before it: a replica that starts again must not be worse off than one that runs on.

    Args:
        storage: Holds plans and releases.
        model: Name in the registry.
        config: Threads, batch and queue sizes.
        events: What is remembered of predictions; None for nothing.
        deployment: Names what all replicas of one deployment remember together; empty for a
            replica that is alone.

    Raises:
        DataMissing: There is no plan, or no release of it.
        Corrupt: The artifacts of every plan are damaged, or their golden answers are not
            reproduced here.
    """
    shelf = shelf_of(storage, model, config, deployment)
    by_hand = shelf.remembered() or ByHand(plan=0)
    plan, loaded = newest_that_loads(PlanStore(storage, model), shelf.load)
    wanted = {*plan.live_versions, *by_hand.loaded} - set(loaded)
    loaded |= whatever_loads(sorted(wanted, key=int), shelf.load)
    memory = None
    writer = secrets.token_hex(8)
    if events is not None and events.enabled:
        memory = Recorder(storage, events, writer, SYSTEM_CLOCK, shelf.embedder)
        shelf.keeper = lambda: PairLog(storage, writer, SYSTEM_CLOCK)
    service = ModelService(
        loaded.values(), plan, config, SYSTEM_CLOCK, prediction_ids(writer), memory, shelf
    )
    for version in by_hand.unloaded if by_hand.plan == plan.number else ():
        service.drop(version)
    service.shadows.update(whatever_loads(list(plan.shadows), shelf.shadow))
    return service


def shelf_of(storage: Storage, model: str, config: ServeConfig, deployment: str) -> "RegistryShelf":
    """Where versions come from: into this process, or into deployments of their own."""
    if config.placement == "dedicated":
        from rayloop.serve.dedicated import DedicatedShelf  # noqa: PLC0415  imports Ray

        return DedicatedShelf(storage, model, config, deployment)
    return RegistryShelf(storage, model, config, deployment)


def newest_that_loads(
    plans: PlanStore, load: Callable[[str], Variant]
) -> tuple[TrafficPlan, dict[str, Variant]]:
    """The newest plan whose answering versions can all be loaded, and these versions.

    A fallback and variants without a share are not among them: without those requests are still
    answered.

    Raises:
        RayloopError: No plan can; the newest one's reason.
    """
    reason: Exception = DataMissing(
        f"There is no traffic plan for {plans.model!r}; set one: rayloop traffic set champion=1"
    )
    numbers = plans.numbers()
    for number in reversed(numbers):
        try:
            plan = plans.read(number)
            needed = dict.fromkeys(v.version for v in plan.variants if v.share > 0)
            return plan, {version: load(version) for version in needed}
        except Exception as error:  # whatever is wrong with this plan, an older one may serve
            log.error("traffic plan %d of %s stays out: %s", number, plans.model, error)
            reason = error if number == numbers[-1] else reason
    raise reason


def whatever_loads(versions: list[str], load: Callable[[str], Loaded]) -> dict[str, Loaded]:
    """Those of some versions that can be loaded; the others are told in the log."""
    found = {}
    for version in versions:
        try:
            found[version] = load(version)
        except Exception as error:  # a version that is a help must not keep the rest from serving
            log.error("version %s stays out: %s", version, error)
    return found


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
        self._plans = PlanStore(storage, model)
        self.keeper: Callable[[], PairLog] | None = None
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

    def limit(self, config: ServeConfig) -> None:
        """Load with other limits from now on."""
        self._config = config

    def release(self, version: str) -> None:
        """Nothing: the version was in this process alone."""

    def shadow(self, version: str) -> Shadow:
        """A version that gets copies of requests, in a process of its own."""
        spec = spec_of(read_record(self._storage, self._model, version))
        arguments = [self._storage.root, self._model, version, to_dict(self._config)]
        return Shadow(
            version,
            lambda: ShadowProcess(SHADOW_ENGINE, arguments),
            SYSTEM_CLOCK,
            max_batch_rows=self._config.max_batch_rows,
            max_pending_rows=min(self._config.max_queued_rows, SHADOW_BYTES // spec.row_bytes + 1),
            keeper=self.keeper() if self.keeper else None,
        )

    def embedder(self, version: str) -> Embedder:
        """What computes embeddings for a version."""
        release = load_release(self._storage, self._model, version)
        return Embedder(self._storage.read(f"{release.folder}/{release.artifact}"))

    def newer_plan(self, number: int) -> TrafficPlan | None:
        """The newest traffic plan after a number; None while there is none."""
        return self._plans.after(number)

    def remember(self, changes: ByHand) -> None:
        """Note what was loaded and unloaded by hand, for replicas that start later."""
        if self._note:
            self._storage.write_json(self._note, asdict(changes))

    def remembered(self) -> ByHand | None:
        """What was noted; None when nothing was changed by hand."""
        if not self._note or not self._storage.exists(self._note):
            return None
        found = self._storage.read_json(self._note)
        return ByHand(
            plan=found["plan"], loaded=tuple(found["loaded"]), unloaded=tuple(found["unloaded"])
        )


def shadow_engine(root: str, model: str, version: str, settings: dict[str, Any]) -> Engine:
    """A version's engine in a shadow's process, from arguments that JSON can hold."""
    return load_engine(Storage(root), model, version, ServeConfig(**settings))[0]


def spec_of(release: ReleaseRecord) -> ModelSpec:
    """What clients are told about a release."""
    height, width, channels = release.shape
    return ModelSpec(
        model=release.model,
        version=release.version,
        shape=(height, width, channels),
        class_names=tuple(release.class_names),
    )


def steering(storage: Storage, registry: RegistryConfig, model: str) -> Steering:
    """What changes a model's traffic."""
    opened = open_registry(storage, registry, SYSTEM_CLOCK)
    return Steering(storage, opened, model or registry.model, SYSTEM_CLOCK)
