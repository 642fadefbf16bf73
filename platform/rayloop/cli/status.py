"""`rayloop status`: nodes, resources, jobs, what serves and how it does, what failed."""

import argparse
import json
import os
import time
from collections.abc import Sequence
from typing import Any, Literal

import rich
from rich.markup import escape
from rich.table import Table

from rayloop.cli import cluster_screen
from rayloop.cli.running import ask, first_reached, servers
from rayloop.cli.submit import open_cluster
from rayloop.clock import SYSTEM_CLOCK
from rayloop.errors import RequestError
from rayloop.serve.status import status_tables
from rayloop.storage import Storage, home
from rayloop.submit.address import ADDRESSES

Document = dict[str, Any]


def add_commands(commands: Any) -> None:
    """Add it to the parser."""
    status = commands.add_parser(
        "status", help="nodes, jobs, what serves and how it does, what failed"
    )
    status.add_argument("--url", default="", help="of the server; default: those of this root")
    status.add_argument("--address", default="", help="URL of the head's dashboard")
    status.add_argument(
        "--seconds", type=float, default=2.0, help="time over which rates are measured"
    )


def run_status(chosen: argparse.Namespace, _: list[str]) -> None:
    """Print the screen, or all of it as one JSON object."""
    seen, told = (None, "") if chosen.url else cluster_seen(chosen)
    urls = seen["urls"] if seen and seen["apps"] else []
    if chosen.json:
        print(json.dumps({"cluster": seen, "servers": served(chosen, urls)}))
        return
    if seen:
        cluster_screen.show(seen)
    elif told:
        rich.print(told)
    show(served(chosen, urls), urls)


def cluster_seen(chosen: argparse.Namespace) -> tuple[Document | None, str]:
    """The cluster meant, or None and why there is none.

    Raises:
        RequestError: The one named with `--address` does not answer, or refuses the token.
    """
    from rayloop.submit.overview import overview  # noqa: PLC0415

    try:
        return overview(open_cluster(chosen.address), SYSTEM_CLOCK.now()), ""
    except RequestError as error:
        if chosen.address or any(os.environ.get(name) for name in ADDRESSES):
            raise
        return None, str(error)


def served(chosen: argparse.Namespace, urls: Sequence[str] = ()) -> list[Document]:
    """The tables of every server that runs on this root.

    Args:
        chosen: The command line.
        urls: Where a cluster serves; asked where no server has left a note under this root.

    Raises:
        RequestError: The server of `--url` does not answer.
    """
    storage = Storage(home())
    found = servers(storage, chosen.url)
    reached = "" if found else first_reached(urls)
    if reached:
        found = servers(storage, reached)
    before = [ask(server.url) for server in found]
    start = time.monotonic()
    if found:
        time.sleep(max(0.1, chosen.seconds))
    after = [ask(server.url) for server in found]
    seconds = time.monotonic() - start
    return [
        {"url": server.url, "haproxy_metrics_port": server.haproxy_metrics_port}
        | status_tables(first, last, seconds)
        for server, first, last in zip(found, before, after, strict=True)
    ]


def show(tables: list[Document], urls: Sequence[str] = ()) -> None:
    """Print them for people.

    Args:
        tables: As of `served`.
        urls: Where a cluster serves.
    """
    if not tables and urls:
        rich.print(
            f"the applications above do not answer here, at {', '.join(urls)}; ask from one of "
            "their machines, or through a tunnel: rayloop status --url http://127.0.0.1:8000"
        )
    elif not tables:
        rich.print("no server runs on this root; start one: make serve")
    for one in tables:
        header = one["header"]
        plans = "plan {plan}".format(**header)
        if not header["same_plan"]:
            plans += " (not in all replicas yet)"
        rich.print(
            f"{one['url']}  {header['model']}  {plans}  {header['ready']} of {header['replicas']} "
            f"replicas ready  {header['ongoing']} requests under way  events "
            f"{header['events_written']} written, {header['events_dropped']} dropped"
        )
        if one["haproxy_metrics_port"]:
            rich.print(f"  HAProxy's own metrics: 127.0.0.1:{one['haproxy_metrics_port']}/metrics")
        if header["refused_plan"]:
            rich.print(
                f"  plan {header['refused_plan']} is refused: {escape(header['refused_reason'])}"
            )
        if header["refused_limits"]:
            rich.print(f"  new limits are refused: {escape(header['refused_limits'])}")
        for rows in (one["variants"], one["shadows"]):
            if rows:
                _print(rows)


SHORT = {
    "planned_share": "share",
    "measured_share": "found",
    "requests_per_s": "req/s",
    "error_share": "errors",
    "p50_ms": "p50 ms",
    "p99_ms": "p99 ms",
    "review_share": "review",
    "fallback_share": "fallback",
    "compared_rows": "compared",
    "rows_per_s": "rows/s",
    "dropped_share": "dropped",
    "failed_rows": "failed",
    "largest_difference": "max diff",
}
"""Headings that leave room for figures on a narrow terminal."""


def _print(rows: list[Document]) -> None:
    table = Table(box=None, padding=(0, 1, 0, 0))
    for name, value in rows[0].items():
        side: Literal["left", "right"] = "left" if isinstance(value, str) else "right"
        table.add_column(SHORT.get(name, name), justify=side, no_wrap=True)
    for row in rows:
        table.add_row(*(_shown(value) for value in row.values()))
    rich.print(table)


def _shown(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
