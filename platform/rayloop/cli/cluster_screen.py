"""What a cluster's head told -> the upper part of `rayloop status`."""

from typing import Any, Literal

import rich
from rich.markup import escape
from rich.table import Table

Document = dict[str, Any]

MINUTE_S, HOUR_S, DAY_S = 60, 3600, 86_400


def show(seen: Document) -> None:
    """Print what `rayloop.submit.overview.overview` found."""
    ray = seen["ray"]
    used = ", ".join(
        f"{row['used']:g} of {row['total']:g} {row['name']}" for row in seen["resources"]
    )
    pending = seen["pending_nodes"]
    coming = f", {pending} more on their way" if pending else ""
    rich.print(f"Ray {ray['ray']}  {ray['address']}  {len(seen['nodes'])} nodes{coming}")
    rich.print(f"in use: {used}")
    _table("nodes", [_shown_node(node) for node in seen["nodes"]])
    _table("jobs", [_shown_job(job) for job in seen["jobs"]])
    _table("serving", seen["apps"])
    if seen["failures"]:
        _table("failures of the last day", [_shown_failure(one) for one in seen["failures"]])
    else:
        rich.print("no failures in the last day")
    rich.print()


def duration(seconds: float) -> str:
    """Seconds as people say them: `40 s`, `12 min`, `3.5 h`, `2.1 d`."""
    if seconds < 2 * MINUTE_S:
        return f"{seconds:.0f} s"
    if seconds < 2 * HOUR_S:
        return f"{seconds / MINUTE_S:.0f} min"
    if seconds < 2 * DAY_S:
        return f"{seconds / HOUR_S:.1f} h"
    return f"{seconds / DAY_S:.1f} d"


def _shown_node(node: Document) -> Document:
    return {
        "node": node["node"], "ip": node["ip"], "kind": node["kind"], "market": node["market"],
        "CPU": f"{node['CPU']:g}", "GPU": f"{node['GPU']:g}", "memory GiB": node["memory_gib"],
        "up": duration(node["up_s"]),
    }  # fmt: skip


def _shown_job(job: Document) -> Document:
    return {"name": job["name"], "status": job["status"], "for": duration(job["seconds"])}


def _shown_failure(one: Document) -> Document:
    ago = "now" if one["seconds_ago"] is None else f"{duration(one['seconds_ago'])} ago"
    return {"when": ago, "what": one["what"], "name": one["name"], "message": one["message"]}


def _table(title: str, rows: list[Document]) -> None:
    if not rows:
        return
    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0)
    )
    names = [name for name in rows[0] if any(row[name] not in ("", None) for row in rows)]
    for name in names:
        is_number = isinstance(rows[0][name], (int, float))
        side: Literal["left", "right"] = "right" if is_number else "left"
        table.add_column(name, justify=side, no_wrap=name != "message")
    for row in rows:
        table.add_row(*(escape(str(row[name])) for name in names))
    rich.print(table)
