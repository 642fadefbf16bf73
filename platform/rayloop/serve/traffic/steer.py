"""Turn what an operator wants into the next traffic plan, with the registry's aliases beside it.

The plan changes first and the aliases follow: a command that dies between the two can be given
again, and finishes what is left.
"""

import getpass
import socket
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rayloop.clock import Clock, iso_utc
from rayloop.errors import ConfigError, RequestError
from rayloop.logs import stage_logger
from rayloop.registry.release import ReleaseRecord, load_release
from rayloop.registry.store import CHALLENGER, CHAMPION, PREVIOUS, SHADOW, Registry
from rayloop.serve.traffic.plan import LowConfidence, PlannedVariant, TrafficPlan, plan_of
from rayloop.serve.traffic.store import PlanStore, StalePlan
from rayloop.storage import Storage

log = stage_logger("serve")


class Steering:
    """Changes of one model's traffic.

    Args:
        storage: Holds plans and releases.
        registry: Holds versions and aliases.
        model: Name in the registry.
        clock: Stamps the changes.
        by: Who makes them; empty means this user on this machine.
    """

    def __init__(
        self, storage: Storage, registry: Registry, model: str, clock: Clock, by: str = ""
    ) -> None:
        self._storage = storage
        self._registry = registry
        self._clock = clock
        self._by = by or whoami()
        self.plans = PlanStore(storage, model)
        self.model = model

    def current(self) -> TrafficPlan | None:
        """The plan in force; None before the first one. A damaged one is passed over."""
        return self.plans.newest_readable()[0]

    def split(
        self,
        shares: Mapping[str, float],
        *,
        shadows: tuple[str, ...] | None = None,
        low_confidence: LowConfidence | None = None,
        salt: str | None = None,
        base: int | None = None,
        why: str = "",
    ) -> TrafficPlan:
        """Divide the traffic anew.

        Args:
            shares: 0..1 by alias or version number; they sum to 1.
            shadows: Versions or aliases that watch; None keeps those there are.
            low_confidence: What happens to doubtful rows; None keeps what there is.
            salt: A new one assigns all units anew; None keeps it.
            base: Number of the plan this was decided on; None for the newest.
            why: Kept with the plan.

        Raises:
            ConfigError: The plan is impossible.
            DataMissing: A version or alias is unknown.
            Corrupt: A version's files are damaged.
            StalePlan: The traffic was changed since `base`.
        """
        current, newest = self.plans.newest_readable()
        self._check_base(newest, base)
        variants = tuple(
            PlannedVariant(name=self._name(ref), version=self.version(ref), share=share)
            for ref, share in shares.items()
        )
        others: dict[str, Any] = {}
        if shadows is not None:
            others["shadows"] = tuple(self.version(ref) for ref in shadows)
        if low_confidence is not None:
            fallback = low_confidence.fallback
            others["low_confidence"] = replace(
                low_confidence, fallback=self.version(fallback) if fallback else ""
            )
        if salt is not None:
            others["salt"] = salt
        told = why or "set " + " ".join(f"{ref}={share:g}" for ref, share in shares.items())
        plan = self._change(current, variants, told, number=newest + 1, **others)
        self._shadow_alias(plan)
        return plan

    def promote(self) -> TrafficPlan:
        """Give everything to the challenger, as the champion; the old one becomes `previous`.

        Raises:
            DataMissing: There is no challenger.
            Corrupt: Its files are damaged.
        """
        version = self._registry.resolve(self.model, f"@{CHALLENGER}")
        plan = self._all_to(version, "promote")
        self._registry.promote(self.model, version)
        return plan

    def rollback(self) -> TrafficPlan:
        """Give everything back to the previous champion.

        Raises:
            DataMissing: There is none.
            Corrupt: Its files are damaged.
        """
        version = self._registry.resolve(self.model, f"@{PREVIOUS}")
        plan = self._all_to(version, "rollback")
        self._registry.rollback(self.model)
        return plan

    def deploy(self, ref: str) -> TrafficPlan:
        """Give everything to one version, as the champion.

        Args:
            ref: `@alias`, `:number`, or a bare one of them.

        Raises:
            DataMissing: There is no such version.
            Corrupt: Its files are damaged.
        """
        version = self.version(ref)
        plan = self._all_to(version, f"deploy {ref}")
        self._registry.move_alias(self.model, CHAMPION, version)
        return plan

    def opening(self, ref: str) -> TrafficPlan:
        """The plan a server starts with: the one in force, with the versions its aliases have now.

        A model that was registered as champion since then takes the champion's place. With another
        reference than the champion's, everything goes to that version.

        Args:
            ref: `@alias` or `:number`.
        """
        current, newest = self.plans.newest_readable()
        if ref not in ("", CHAMPION, f"@{CHAMPION}") or current is None:
            try:
                return self._all_to(self.version(ref), f"serve {ref}".strip())
            except StalePlan:  # another server opened the same model at the same moment
                return self.plans.newest_readable()[0] or self._all_to(self.version(ref), "serve")
        aliases = self._registry.aliases(self.model)
        variants = tuple(
            replace(variant, version=aliases.get(variant.name, variant.version))
            for variant in current.variants
        )
        if variants == current.variants:
            return current
        others: dict[str, Any] = {"number": newest + 1}
        if current.low_confidence.fallback in {variant.version for variant in variants}:
            others["low_confidence"] = replace(current.low_confidence, fallback="")
        return self._change(current, variants, "aliases have moved", **others)

    def version(self, ref: str) -> str:
        """The version behind an alias or a number, with or without `@` or `:`.

        Raises:
            DataMissing: There is none.
        """
        plain = ref.removeprefix("@").removeprefix(":")
        marked = f":{plain}" if plain.isdigit() else f"@{plain or CHAMPION}"
        return self._registry.resolve(self.model, marked)

    def _name(self, ref: str) -> str:
        plain = ref.removeprefix("@").removeprefix(":")
        return f"version-{plain}" if plain.isdigit() else plain

    def _all_to(self, version: str, why: str) -> TrafficPlan:
        """Everything to one version; a damaged shadow or fallback does not stand in the way."""
        current, newest = self.plans.newest_readable()
        everything = (PlannedVariant(name=CHAMPION, version=version, share=1.0),)
        others: dict[str, Any] = {"number": newest + 1}
        if current is not None:
            kept = [s for s in current.shadows if s != version and self._is_whole(s)]
            others["shadows"] = tuple(kept)
            fallback = current.low_confidence.fallback
            if fallback and (fallback == version or not self._is_whole(fallback)):
                others["low_confidence"] = replace(current.low_confidence, fallback="")
        plan = self._change(current, everything, why, **others)
        self._shadow_alias(plan)
        return plan

    def _is_whole(self, version: str) -> bool:
        try:
            load_release(self._storage, self.model, version)
        except RequestError as error:
            log.warning("version %s is left out of the plan: %s", version, error)
            return False
        return True

    def _shadow_alias(self, plan: TrafficPlan) -> None:
        if plan.shadows:
            self._registry.move_alias(self.model, SHADOW, plan.shadows[0])
        else:
            self._registry.remove_alias(self.model, SHADOW)

    def _change(
        self,
        current: TrafficPlan | None,
        variants: tuple[PlannedVariant, ...],
        why: str,
        **others: Any,
    ) -> TrafficPlan:
        plan = plan_of(self.model, variants, current, **others, **self._signed(why))
        if current is not None and _same(plan, current):
            return current
        self._check(current, plan.versions)
        self.plans.put(plan)
        return plan

    def _signed(self, why: str) -> dict[str, str]:
        return {"by": self._by, "why": why, "time": iso_utc(self._clock.now())}

    def _check_base(self, newest: int, base: int | None) -> None:
        if base is not None and base != newest:
            raise StalePlan(
                f"This change was decided on plan {base}, and plan {newest} of {self.model!r} is "
                "in force. Look at it with rayloop traffic show, and decide again."
            )

    def _check(self, current: TrafficPlan | None, versions: tuple[str, ...]) -> None:
        """Every version must be whole, and take and give what the one in force does.

        Raises:
            DataMissing: A version's files are not there.
            Corrupt: They are damaged.
            ConfigError: It has another signature.
        """
        releases = [load_release(self._storage, self.model, version) for version in versions]
        first = releases[0]
        if current is not None:
            first = load_release_if_whole(self._storage, current) or first
        for release in releases:
            if signature(release) != signature(first):
                raise ConfigError(
                    f"Version {release.version} of {self.model!r} {_told(release)}, while version "
                    f"{first.version} {_told(first)}: clients of one cannot use the other. "
                    "Register it as another model with --registry.model."
                )


def load_release_if_whole(storage: Storage, plan: TrafficPlan) -> ReleaseRecord | None:
    """The release of a plan's first variant; None when it cannot be read any more."""
    try:
        return load_release(storage, plan.model, plan.variants[0].version)
    except RequestError:
        return None


def signature(release: ReleaseRecord) -> tuple[Any, ...]:
    """What clients rely on: the image's shape and the classes in order."""
    return tuple(release.shape), tuple(release.class_names)


def whoami() -> str:
    """USER@HOST of this process."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = "unknown"
    return f"{user}@{socket.gethostname()}"


def _told(release: ReleaseRecord) -> str:
    shape = "x".join(str(size) for size in release.shape)
    return f"takes images of {shape} and knows {len(release.class_names)} classes"


def _same(plan: TrafficPlan, current: TrafficPlan) -> bool:
    kept = {name: getattr(current, name) for name in ("number", "by", "why", "time")}
    return replace(plan, **kept) == current
