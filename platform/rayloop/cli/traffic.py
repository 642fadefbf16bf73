"""`rayloop traffic`, `promote`, `rollback` and `deploy`: which version answers whom."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rayloop.cli.running import Server, servers, wait_in_force
from rayloop.clock import SYSTEM_CLOCK
from rayloop.config import RegistryConfig
from rayloop.errors import RequestError
from rayloop.registry.store import open_registry
from rayloop.serve.traffic.plan import LowConfidence, TrafficPlan
from rayloop.serve.traffic.steer import Steering
from rayloop.serve.traffic.store import PlanStore
from rayloop.storage import Storage, home

Rows = list[dict[str, Any]]


def add_commands(commands: Any) -> None:
    """Add them to the parser."""
    traffic = commands.add_parser("traffic", help="which version answers whom")
    verbs = traffic.add_subparsers(dest="verb", required=True, metavar="show|set|history")
    verbs.add_parser("show", help="the plan in force")
    verbs.add_parser("history", help="every plan, who made it, when and why")
    setting = verbs.add_parser(
        "set", help="divide the traffic: champion=0.9 challenger=0.1, or versions: 3=0.5 4=0.5"
    )
    setting.add_argument("shares", nargs="+", metavar="NAME=SHARE", help="shares sum to 1")
    setting.add_argument(
        "--shadow", action="append", metavar="VERSION", help="gets a copy of each request"
    )
    setting.add_argument("--no-shadow", action="store_true", help="no version gets copies")
    setting.add_argument(
        "--below", type=float, metavar="CONFIDENCE", help="rows below it fall back or need review"
    )
    setting.add_argument("--fallback", metavar="VERSION", help="is asked again of doubtful rows")
    setting.add_argument("--no-fallback", action="store_true", help="doubtful rows need review")
    setting.add_argument(
        "--max-fallback-share", type=float, metavar="SHARE", help="of all rows, at most"
    )
    setting.add_argument("--salt", help="a new one assigns every unit anew")
    setting.add_argument(
        "--base", type=int, metavar="NUMBER", help="refuse if another plan is in force by now"
    )
    setting.add_argument("--why", default="", help="kept with the plan")
    for verb in verbs.choices.values():
        _add_common(verb)
    for name, text in (
        ("promote", "the challenger becomes champion and answers everything"),
        ("rollback", "the previous champion becomes champion again and answers everything"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("model", nargs="?", default=RegistryConfig().model)
        command.add_argument("--url", default="", help="of the server; default: those of this root")


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=RegistryConfig().model)
    parser.add_argument("--url", default="", help="of the server; default: those of this root")
    parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS)


def steering(model: str, found: Sequence[Server] = ()) -> Steering:
    """Changes of a model's traffic under the root of this environment.

    Args:
        model: Name in the registry.
        found: Servers that run; their registry is the one that counts.
    """
    storage = Storage(home())
    uri = next((server.tracking_uri for server in found if server.tracking_uri), "")
    registry = open_registry(storage, RegistryConfig(tracking_uri=uri), SYSTEM_CLOCK)
    return Steering(storage, registry, model, SYSTEM_CLOCK)


def run_traffic(chosen: argparse.Namespace, __: list[str]) -> Rows:
    """`rayloop traffic`."""
    if chosen.verb == "set":
        found = servers(Storage(home()), chosen.url)
        return followed(_set(steering(chosen.model, found), chosen), found)
    plans = PlanStore(Storage(home()), chosen.model)
    if chosen.verb == "history":
        return [_line(plan) for plan in plans.history()]
    plan, _ = plans.newest_readable()
    if plan is None:
        raise RequestError(
            f"{chosen.model!r} has no traffic plan yet; serve it (make serve), or set one: rayloop "
            "traffic set champion=1"
        )
    return table(plan)


def run_promote(chosen: argparse.Namespace, _: list[str]) -> Rows:
    """`rayloop promote`."""
    found = servers(Storage(home()), chosen.url)
    return followed(steering(chosen.model, found).promote(), found)


def run_rollback(chosen: argparse.Namespace, _: list[str]) -> Rows:
    """`rayloop rollback`."""
    found = servers(Storage(home()), chosen.url)
    return followed(steering(chosen.model, found).rollback(), found)


def followed(plan: TrafficPlan, found: Sequence[Server]) -> Rows:
    """The plan's table, once it is in force in every replica of some servers.

    Raises:
        RequestError: A replica does not follow.
    """
    rows = table(plan)
    for server in found:
        if server.model == plan.model:
            told = wait_in_force(server.url, plan.number)
            for row in rows:
                row |= {"in_force": f"{told['replicas']} replicas, {told['seconds']} s"}
    return rows


def table(plan: TrafficPlan) -> Rows:
    """A row for each version of a plan."""
    low = plan.low_confidence
    rows = [
        {"plan": plan.number, "variant": v.name, "version": v.version, "share": v.share}
        for v in plan.variants
    ]
    if low.fallback:
        what = f"fallback below {low.below:g}, at most {low.max_share:g} of rows"
        rows.append({"plan": plan.number, "variant": what, "version": low.fallback, "share": 0.0})
    rows += [
        {"plan": plan.number, "variant": "shadow", "version": version, "share": 0.0}
        for version in plan.shadows
    ]
    return rows


def shares_of(words: list[str]) -> dict[str, float]:
    """`champion=0.9 challenger=0.1` as numbers.

    Raises:
        RequestError: A word is no NAME=SHARE, or a name comes twice.
    """
    found: dict[str, float] = {}
    for word in words:
        name, equals, text = word.partition("=")
        try:
            share = float(text)
        except ValueError:
            share = -1.0
        if not equals or not name or share < 0:
            raise RequestError(f"{word!r} must be NAME=SHARE, e.g. champion=0.9 challenger=0.1.")
        if name in found:
            raise RequestError(f"{name!r} is named twice in {' '.join(words)}.")
        found[name] = share
    return found


def _set(steer: Steering, chosen: argparse.Namespace) -> TrafficPlan:
    shadows = () if chosen.no_shadow else tuple(chosen.shadow) if chosen.shadow else None
    current = steer.current()
    low = current.low_confidence if current else LowConfidence()
    changes = {
        "below": chosen.below,
        "max_share": chosen.max_fallback_share,
        "fallback": "" if chosen.no_fallback else chosen.fallback,
    }
    told = {name: value for name, value in changes.items() if value is not None}
    return steer.split(
        shares_of(chosen.shares),
        shadows=shadows,
        low_confidence=replace(low, **told) if told else None,
        salt=chosen.salt,
        base=current.number if told and current and chosen.base is None else chosen.base,
        why=chosen.why,
    )


def _line(plan: TrafficPlan) -> dict[str, Any]:
    return {
        "plan": plan.number,
        "time": plan.time,
        "by": plan.by,
        "why": plan.why,
        "split": plan.told(),
        "shadows": ", ".join(plan.shadows),
        "fallback": plan.low_confidence.fallback,
    }
