"""Turn who a request is for into the variant that answers it, the same one everywhere, every time.

The rule is short enough for any language. With `salt` and `unit` as UTF-8:

    bucket = (first 4 bytes of SHA-256(salt, a zero byte, unit), big-endian) * 1,000,000 >> 32

and the variant is the first in the plan's layout whose end is above the bucket. The product stays
below 2^53, so that a language with nothing but doubles gets it right as well. Test vectors are in
docs/traffic-vectors.json.
"""

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rayloop.errors import ConfigError, Corrupt
from rayloop.serve.traffic.layout import BUCKETS, Layout, in_buckets, laid_out, relaid

VARIANT_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,59}")
VERSION_NUMBER = re.compile(r"[1-9][0-9]{0,17}")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedVariant:
    """A name in the split, the version behind it, and the share of the units it answers."""

    name: str
    version: str

    share: float
    """0..1; 0 keeps the variant loaded, for requests that force it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LowConfidence:
    """What happens to a row whose highest probability is too low."""

    below: float = 0.7
    """Confidence (0..1) below which a row is not simply accepted; 0 accepts all."""

    fallback: str = ""
    """Version that such a row is asked of; empty marks the row for review."""

    max_share: float = 0.1
    """Largest share (0..1) of all rows that may fall back; beyond it they are marked for review, so
    that drift cannot overload the larger model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrafficPlan:
    """Which versions answer, for which share of the units, and which only watch."""

    model: str
    """Name in the registry."""

    number: int
    """1 for a model's first plan; each change counts on."""

    variants: tuple[PlannedVariant, ...]
    """The split; the first one answers what nobody else is asked for."""

    layout: Layout
    """Which buckets belong to whom."""

    salt: str = "rayloop"
    """Makes the assignments of two experiments independent; a ramp keeps it."""

    shadows: tuple[str, ...] = ()
    """Versions that get a copy of each request and answer nobody."""

    low_confidence: LowConfidence = field(default_factory=LowConfidence)
    """What happens to doubtful rows."""

    by: str = ""
    """Who made the change."""

    why: str = ""
    """What the change was: the command, or the reason given with it."""

    time: str = ""
    """When, ISO 8601 in UTC."""

    def __post_init__(self) -> None:
        _check_variants(self.variants)
        _check_others(self)
        wanted = in_buckets({variant.name: variant.share for variant in self.variants})
        if laid_out_shares(self.layout) != {name: part for name, part in wanted.items() if part}:
            raise ConfigError(
                f"Traffic plan {self.number}: its layout {self.layout} does not fit its shares."
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The variants' names in order."""
        return tuple(variant.name for variant in self.variants)

    @property
    def live_versions(self) -> tuple[str, ...]:
        """The versions that may answer a request: those of the split, and the fallback."""
        fallback = (self.low_confidence.fallback,) if self.low_confidence.fallback else ()
        return tuple(dict.fromkeys((*(v.version for v in self.variants), *fallback)))

    @property
    def versions(self) -> tuple[str, ...]:
        """All versions the plan names."""
        return tuple(dict.fromkeys((*self.live_versions, *self.shadows)))

    def variant(self, name: str) -> PlannedVariant | None:
        """The variant of that name; None when there is none."""
        return next((variant for variant in self.variants if variant.name == name), None)

    def assign(self, unit: str) -> str:
        """The name of the variant for a unit.

        Args:
            unit: Who the request is for, e.g. a user id; a request id when nobody is named.
        """
        if len(self.layout) == 1:
            return self.layout[0][1]
        bucket = bucket_of(self.salt, unit)
        return next(name for end, name in self.layout if bucket < end)

    def told(self) -> str:
        """The split in one line."""
        return ", ".join(f"{v.name} (version {v.version}) {v.share:.4g}" for v in self.variants)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain values, ready for JSON."""
        return asdict(self)


def bucket_of(salt: str, unit: str) -> int:
    """The bucket (0 to `BUCKETS` - 1) of a unit, as the module describes it."""
    hashed = hashlib.sha256(f"{salt}\0{unit}".encode(errors="surrogatepass")).digest()
    return int.from_bytes(hashed[:4], "big") * BUCKETS >> 32


def plan_of(
    model: str, variants: tuple[PlannedVariant, ...], base: TrafficPlan | None = None, **others: Any
) -> TrafficPlan:
    """A plan for a split, which moves as few units as it can if it has a base.

    Args:
        model: Name in the registry.
        variants: The split.
        base: The plan it follows, whose salt and other settings it keeps.
        others: Fields of the plan that are set anew.

    Raises:
        ConfigError: The plan is impossible.
    """
    _check_variants(variants)
    wanted = in_buckets({variant.name: variant.share for variant in variants})
    number = others.pop("number", base.number + 1 if base else 1)
    if base is None:
        return TrafficPlan(
            model=model, number=number, variants=variants, layout=laid_out(wanted), **others
        )
    kept = {name: getattr(base, name) for name in ("salt", "shadows", "low_confidence")}
    layout = (
        relaid(base.layout, wanted)
        if others.get("salt", base.salt) == base.salt
        else laid_out(wanted)
    )
    return TrafficPlan(
        model=model, number=number, variants=variants, layout=layout, **(kept | others)
    )


def single(model: str, name: str, version: str, **others: Any) -> TrafficPlan:
    """The plan in which one version answers everything."""
    return plan_of(model, (PlannedVariant(name=name, version=version, share=1.0),), **others)


def plan_from_json(document: Mapping[str, Any], where: str) -> TrafficPlan:
    """A plan from what `to_json` made of it.

    Args:
        document: Plain values.
        where: Named in the error.

    Raises:
        Corrupt: It is no plan.
    """
    try:
        fields = dict(document)
        fields["variants"] = tuple(PlannedVariant(**v) for v in fields["variants"])
        fields["layout"] = tuple((int(end), str(name)) for end, name in fields["layout"])
        fields["shadows"] = tuple(fields["shadows"])
        fields["low_confidence"] = LowConfidence(**fields["low_confidence"])
        return TrafficPlan(**fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Corrupt(
            f"{where} is no traffic plan ({error}); the next change of the traffic replaces it."
        ) from None


def laid_out_shares(layout: Layout) -> dict[str, int]:
    """Buckets of each variant in a layout."""
    found: dict[str, int] = {}
    start = 0
    for end, name in layout:
        found[name] = found.get(name, 0) + end - start
        start = end
    return found


def _check_variants(variants: tuple[PlannedVariant, ...]) -> None:
    names = [variant.name for variant in variants]
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"Traffic variants {names} must be one or more different names.")
    for variant in variants:
        if not VARIANT_NAME.fullmatch(variant.name):
            raise ConfigError(
                f"Traffic variant {variant.name[:70]!r} must be letters, digits, '_', '.' and '-'."
            )
        _check_version(variant.version)
        share = variant.share
        if not 0.0 <= share <= 1.0 or 0.0 < share < 1 / BUCKETS:
            raise ConfigError(
                f"Traffic share {variant.name}={share} must be 0, or from {1 / BUCKETS} to 1."
            )
    total = math.fsum(variant.share for variant in variants)
    if not math.isclose(total, 1.0, abs_tol=1e-9):
        raise ConfigError(_remedy(variants, total))


def _remedy(variants: tuple[PlannedVariant, ...], total: float) -> str:
    """What is wrong with a sum, and shares that would be right."""
    given = " ".join(f"{variant.name}={variant.share:g}" for variant in variants)
    first = variants[0].share + 1.0 - total
    if 0.0 <= first <= 1.0:
        right = [first, *(variant.share for variant in variants[1:])]
    else:
        right = [variant.share / total for variant in variants]
    better = " ".join(
        f"{variant.name}={share:.6g}" for variant, share in zip(variants, right, strict=True)
    )
    return f"Traffic shares {given} sum to {total:g}, not 1; use e.g. {better}."


def _check_others(plan: TrafficPlan) -> None:
    low = plan.low_confidence
    for version in (*plan.shadows, *((low.fallback,) if low.fallback else ())):
        _check_version(version)
    if len(set(plan.shadows)) != len(plan.shadows):
        raise ConfigError(f"Shadow versions {list(plan.shadows)} must be different ones.")
    for name in ("below", "max_share"):
        value = getattr(low, name)
        if not 0.0 <= value <= 1.0:
            raise ConfigError(f"low_confidence.{name}={value} must be from 0 to 1.")
    answering = [v.name for v in plan.variants if v.version == low.fallback]
    if answering:
        raise ConfigError(
            f"Version {low.fallback} cannot be the fallback: it answers as {answering[0]!r}, so "
            "it would fall back to itself. Name a version outside the split, or leave the "
            "fallback out with --no-fallback."
        )


def _check_version(version: str) -> None:
    if not VERSION_NUMBER.fullmatch(version):
        raise ConfigError(f"Version {version[:40]!r} must be a whole number above 0.")
