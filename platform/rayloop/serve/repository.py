"""Turn loads and unloads that clients ask for, and new traffic plans, into changes of a service.

A change by hand concerns every replica: one is asked, it does it and tells the others, and those
that start later read what is wanted from the storage. A traffic plan each replica finds by itself.
"""

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any

from rayloop.errors import RequestError
from rayloop.logs import stage_logger
from rayloop.serve.protocol.error import ProtocolError
from rayloop.serve.protocol.request import malformed
from rayloop.serve.service import ModelService
from rayloop.serve.shelf import ByHand
from rayloop.serve.traffic.plan import TrafficPlan
from rayloop.serve.variant import Variant

log = stage_logger("serve")

Document = dict[str, Any]
Change = Callable[[str, str], Awaitable[None]]
"""Do `load` or `unload` with a version in every other replica."""


async def nobody_else(verb: str, version: str) -> None:
    """The other replicas of a server that has one."""


class Repository:
    """The versions of one model: what could be loaded, what is, and how to change that.

    Args:
        service: Answers requests; changed by loads and unloads.
        control: Whether clients may load and unload.
        tell_others: Repeats a change in the other replicas.
    """

    def __init__(
        self,
        service: ModelService,
        *,
        control: bool = True,
        tell_others: Change = nobody_else,
    ) -> None:
        self._service = service
        self._shelf = service.shelf
        self._control = control
        self._tell_others = tell_others
        planned = set(service.plan.live_versions)
        self._loaded = set(service.versions) - planned
        self._unloaded = planned - set(service.versions)
        self._way_back: tuple[str, ...] = ()
        self._working: set[asyncio.Task[None]] = set()
        self._changing = asyncio.Lock()

    async def index(self, ready_only: bool) -> list[Document]:
        """Every version with its state, lowest first, as the repository extension lists them."""
        loaded = set(self._service.versions)
        published = await asyncio.to_thread(self._shelf.published)
        known = sorted({*published, *loaded, *self._unloaded}, key=int)
        return [
            self._entry(version, version in loaded)
            for version in known
            if version in loaded or not ready_only
        ]

    async def load(self, model: str, parameters: Mapping[str, object]) -> None:
        """Load a version beside the others; what is loaded already stays as it is.

        Without a version in the parameters, those that were unloaded come back; else the newest one
        is loaded.

        Raises:
            ProtocolError: 400, 403, 404 or 503.
        """
        self._check(model)
        await self._everywhere("load", await self._wanted(parameters))

    async def unload(self, model: str, parameters: Mapping[str, object]) -> None:
        """Unload the versions in the parameters; all of them when none is named.

        Raises:
            ProtocolError: 400, 403 or 404.
        """
        self._check(model)
        chosen = chosen_versions(parameters)
        for version in chosen:
            self._service.find(version)
        await self._everywhere("unload", chosen or list(self._service.versions))

    async def _everywhere(self, verb: str, versions: list[str]) -> None:
        for version in versions:
            await self.apply(verb, version)
            await asyncio.to_thread(self._shelf.remember, self._by_hand())
            await self._tell_others(verb, version)

    async def apply(self, verb: str, version: str) -> None:
        """Do one change here alone; a change that is done already is nothing.

        Args:
            verb: `load` or `unload`.
            version: Number in text.

        Raises:
            ProtocolError: 404 unknown version, 503 it cannot be loaded.
        """
        async with self._changing:
            if verb == "unload":
                if version in self._service.versions:
                    self._unloaded.add(version)
                self._loaded.discard(version)
                gone = self._service.drop(version)
            else:
                gone = None
                await self._take_in(version)
                self._unloaded.discard(version)
                if version not in self._service.plan.live_versions:
                    self._loaded.add(version)
        if gone is not None:
            await self._service.let_go(gone)

    async def follow(self, plan: TrafficPlan) -> None:
        """Put a traffic plan in force here: what it needs is loaded first, then it takes over.

        The versions that answered before stay loaded, so that the way back needs no load; what
        neither needs, and nobody loaded by hand, goes. Nothing of that is waited for.

        Raises:
            ProtocolError: A version cannot be loaded; nothing has changed.
        """
        service, before = self._service, self._service.plan
        taken_in: list[str] = []
        try:
            while missing := [v for v in plan.live_versions if v not in service.versions]:
                await self._take_in(missing[0])
                taken_in.append(missing[0])
        except Exception:
            for version in taken_in:
                self._let_go_later(version)
            raise
        service.follow(plan)
        self._unloaded.clear()
        if set(before.live_versions) - set(plan.live_versions):
            self._way_back = before.live_versions
        self._change_shadows(plan)
        kept = {*plan.live_versions, *self._way_back, *self._loaded}
        for version in set(service.versions) - kept:
            self._let_go_later(version)

    async def _take_in(self, version: str) -> None:
        """Load a version, unless it is there, or comes while this one is loaded."""
        if version not in self._service.versions:
            loaded = await self._load(version)
            if version not in self._service.versions:
                self._service.add(loaded)

    def _let_go_later(self, version: str) -> None:
        variant = self._service.drop(version)
        if variant is not None:
            self._in_background(self._service.let_go(variant))

    def _change_shadows(self, plan: TrafficPlan) -> None:
        shadows = self._service.shadows
        for version in set(shadows) - set(plan.shadows):
            self._in_background(asyncio.to_thread(shadows.pop(version).close))
        for version in plan.shadows:
            if version not in shadows:
                try:
                    shadows[version] = self._shelf.shadow(version)
                except Exception as error:  # who only watches must not bar who answers
                    log.error("shadow version %s cannot be started: %s", version, error)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._working.add(task)
        task.add_done_callback(self._working.discard)

    async def _load(self, version: str) -> Variant:
        try:
            return await asyncio.to_thread(self._shelf.load, version)
        except ProtocolError:
            raise
        except RequestError as error:
            raise ProtocolError(
                404, f"failed to load {self._service.spec.model!r}: {error}"
            ) from error

    def _by_hand(self) -> ByHand:
        return ByHand(
            plan=self._service.plan.number,
            loaded=tuple(sorted(self._loaded, key=int)),
            unloaded=tuple(sorted(self._unloaded, key=int)),
        )

    async def _wanted(self, parameters: Mapping[str, object]) -> list[str]:
        chosen = chosen_versions(parameters)
        if chosen or self._unloaded:
            return chosen or sorted(self._unloaded, key=int)
        published = await asyncio.to_thread(self._shelf.published)
        return [max(published, key=int)] if published else []

    def _check(self, model: str) -> None:
        if model != self._service.spec.model:
            raise ProtocolError(
                404,
                f"failed to load {model[:100]!r}: it is unknown; this server has "
                f"{self._service.spec.model!r}.",
            )
        if not self._control:
            raise ProtocolError(
                403, "Clients may not load or unload here (serve.model_control is off)."
            )

    def _entry(self, version: str, loaded: bool) -> Document:
        reason = "" if loaded else "unloaded" if version in self._unloaded else "not loaded"
        return {
            "name": self._service.spec.model,
            "version": version,
            "state": "READY" if loaded else "UNAVAILABLE",
            "reason": reason,
        }


def chosen_versions(parameters: Mapping[str, object]) -> list[str]:
    """The versions that parameters of a load or unload name; empty for none.

    They are named by `version`, or by a model configuration in `config` with
    `version_policy: {"specific": {"versions": [...]}}`. Files cannot be sent: a version is what the
    registry holds.

    Raises:
        ProtocolError: 400.
    """
    if any(name.startswith("file:") for name in parameters):
        malformed("Model files cannot be sent with a load; register a version and load that.")
    if "version" in parameters:
        version = str(parameters["version"])
        return [_number(version)]
    config = parameters.get("config")
    if config is None:
        return []
    policy: object = None
    with contextlib.suppress(ValueError, RecursionError, TypeError, AttributeError, LookupError):
        policy = json.loads(str(config)).get("version_policy", {}).get("specific", {})["versions"]
    if not isinstance(policy, list) or not policy or len(policy) > 100:
        malformed(
            "`config` must be a JSON string with version_policy.specific.versions, a list of "
            "numbers; other settings cannot be changed by a load."
        )
    return [_number(str(version)) for version in policy]


def _number(version: str) -> str:
    if not (version.isascii() and version.isdigit() and len(version) < 19):
        malformed(f"Version {version[:40]!r} must be a whole number.")
    return str(int(version))
