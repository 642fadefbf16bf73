"""Give each version a deployment of its own, for models too large to share a process.

An ingress replica then holds no engine. It asks a version's deployment once for each batch, from
the thread in which its own engine would run. The first replica that needs a version deploys it, and
the version is taken away some time after no plan needs it.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray import serve
from ray.serve.schema import ApplicationStatus

from rayloop import logs
from rayloop.config import ServeConfig
from rayloop.errors import Corrupt, DoesNotFit, WorkError
from rayloop.registry.release import read_record
from rayloop.serve.assemble import make_variant
from rayloop.serve.engine import Engine
from rayloop.serve.load import RegistryShelf, load_engine, notes_folder, spec_of
from rayloop.serve.options import failure_reason
from rayloop.serve.variant import Variant
from rayloop.storage import Storage

Images = NDArray[np.uint8]
Probabilities = NDArray[np.float32]

LOOK_S = 0.1
CLAIM_S = 60.0
"""A replica that says it deploys a version, of which nothing is seen for so long, is gone."""

FAREWELL_S = 30.0
"""Time in which a replica that is slower than this one may still need a version that went."""

QUIET = {"enable_access_log": False, "log_level": "WARNING"}


class EngineHost:
    """One replica of a version's deployment.

    Args:
        root: Of the storage.
        model: Name in the registry.
        version: Its number.
        config: Threads and batch sizes.
    """

    def __init__(self, root: str, model: str, version: str, config: ServeConfig) -> None:
        logs.configure()
        self._engine: Engine = load_engine(Storage(root), model, version, config)[0]

    def predict(self, images: Images) -> Probabilities:
        """Probabilities [N, K] of images [N, H, W, C]."""
        return self._engine.predict(images)


class RemoteEngine:
    """The engine of a version that runs elsewhere.

    Args:
        handle: Of its deployment.
        loop: Where the handle is used.
        timeout_s: Longest time one batch may take.
    """

    def __init__(self, handle: Any, loop: asyncio.AbstractEventLoop, timeout_s: float) -> None:
        self._handle, self._loop, self._timeout_s = handle, loop, timeout_s

    def predict(self, images: Images) -> Probabilities:
        """Probabilities [N, K] of images [N, H, W, C]; called in a thread that is not the loop's.

        Raises:
            WorkError: The deployment does not answer in time.
        """
        asked = asyncio.run_coroutine_threadsafe(self._ask(images), self._loop)
        try:
            return asked.result(self._timeout_s)
        except TimeoutError:
            asked.cancel()
            raise WorkError(f"its deployment gave no answer in {self._timeout_s:g} s") from None

    def warm(self, batch_sizes: Sequence[int]) -> None:
        """The deployment has warmed itself."""

    async def _ask(self, images: Images) -> Probabilities:
        answer: Probabilities = await self._handle.predict.remote(images)
        return answer


class DedicatedShelf(RegistryShelf):
    """Versions of one model, each in a deployment of its own.

    Args:
        storage: Holds the releases.
        model: Name in the registry.
        config: Threads, batch and queue sizes.
        deployment: Names what the ingress replicas remember together.
    """

    def __init__(self, storage: Storage, model: str, config: ServeConfig, deployment: str) -> None:
        super().__init__(storage, model, config, deployment)
        self._deployment = deployment
        self._loop = asyncio.get_running_loop()

    def load(self, version: str) -> Variant:
        """A version, once its deployment is up.

        Raises:
            DataMissing: There is no such release.
            DoesNotFit: The cluster has no CPUs left for it.
            Corrupt: It cannot start, since it is damaged or computes something else here.
        """
        spec = spec_of(read_record(self._storage, self._model, version))
        name = self._app_name(version)
        claimed_at = time.monotonic()
        while (status := _status(name)) != ApplicationStatus.RUNNING:
            absent = status in (None, ApplicationStatus.DEPLOY_FAILED)
            if absent and self._storage.create(self._claim(version), b"{}\n"):
                self._deploy(name, version)
            elif absent and time.monotonic() - claimed_at > CLAIM_S:
                self._storage.remove(self._claim(version))  # whoever made it is gone
                claimed_at = time.monotonic()
            time.sleep(LOOK_S)
        handle = serve.get_app_handle(name)
        engine = RemoteEngine(handle, self._loop, self._config.default_timeout_ms / 1000)
        return make_variant(f"version-{version}", engine, spec, self._config)

    def release(self, version: str) -> None:
        """Take a version's deployment away, some time from now, unless it is needed again then."""
        timer = threading.Timer(FAREWELL_S, self._take_away, (version,))
        timer.daemon = True
        timer.start()

    def _app_name(self, version: str) -> str:
        return f"{self._model}-{version}-{self._deployment}"

    def _claim(self, version: str) -> str:
        """A file that the replica which deploys a version makes; nobody else does then."""
        return f"{notes_folder(self._deployment)}/deploying-{version}.json"

    def _deploy(self, name: str, version: str) -> None:
        config = self._config
        free = ray.available_resources().get("CPU", 0.0)  # type: ignore[no-untyped-call]
        wanted = config.cpus_per_replica * config.max_replicas
        if wanted > free:
            self._storage.remove(self._claim(version))
            raise DoesNotFit(
                f"Version {version} needs {wanted} CPUs for a deployment of its "
                f"own (serve.placement=dedicated); {free:g} are free. Offer more with "
                "--cluster.num_cpus, or use --serve.placement colocated."
            )
        options: dict[str, Any] = {
            "name": "engine",
            "num_replicas": config.max_replicas,
            "ray_actor_options": {"num_cpus": config.cpus_per_replica}
            | ({"num_gpus": 1} if config.use_gpu else {}),
            "max_ongoing_requests": 4,
            "max_constructor_retry_count": 2,
            "health_check_period_s": 5,
        }
        host = serve.deployment(**options, logging_config=QUIET)(EngineHost)
        app = host.bind(self._storage.root, self._model, version, config)
        try:
            serve.run(app, name=name, route_prefix=None, logging_config=QUIET)
        except RuntimeError as error:
            report = _report(name) or str(error)
            serve.delete(name)
            raise Corrupt(failure_reason(report)) from error
        finally:
            self._storage.remove(self._claim(version))

    def _take_away(self, version: str) -> None:
        plan, by_hand = self._plans.newest(), self.remembered()
        needed = {*(plan.live_versions if plan else ()), *(by_hand.loaded if by_hand else ())}
        if version not in needed:
            with contextlib.suppress(Exception):  # another replica did it, or Serve ends
                serve.delete(self._app_name(version), _blocking=False)


def _status(name: str) -> ApplicationStatus | None:
    app = serve.status().applications.get(name)
    return None if app is None else app.status


def _report(name: str) -> str:
    """What Serve says of an application that does not start."""
    app = serve.status().applications.get(name)
    if app is None:
        return ""
    return "\n".join([app.message, *(one.message for one in app.deployments.values())])
