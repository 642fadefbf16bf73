"""Turn the raw figures of the scenarios into one result file and its picture.

python benchmarks/serving/report.py --out /tmp/rayloop-serving-results
"""

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import HERE, mean_and_spread

Rounds = dict[str, list[dict[str, Any]]]
SCENARIOS = ("overhead", "goodput", "rows32", "overload", "soak")
OURS = "rayloop"


def best(rounds: Rounds, prefix: str, key: str, lower: bool = False) -> float:
    """The best configuration's mean of a peer, over its rounds.

    Args:
        rounds: Rounds by server.
        prefix: Name of the peer; its configurations are called PREFIX and PREFIX-...
        key: Which figure.
        lower: Whether a lower figure is better.
    """
    means = [
        statistics.fmean(one[key] for one in rows)
        for name, rows in rounds.items()
        if rows and name.split("-")[0] == prefix
    ]
    if not means:
        return math.nan
    return min(means) if lower else max(means)


def verdict(found: float, limit: float, at_least: bool) -> str:
    """`reached` or `missed`, or that it was not measured."""
    if math.isnan(found):
        return "none to measure"
    return "reached" if (found >= limit if at_least else found <= limit) else "missed"


def goals(data: dict[str, Rounds]) -> list[str]:
    """The table of what must be reached, with what was."""
    rows: list[tuple[str, str, float, float, bool]] = []
    if "overhead" in data:
        one = data["overhead"]
        ours = best(one, OURS, "cpu_ms", lower=True)
        rows.append(("CPU-ms a request, no-op", "<= 0.45", ours, 0.45, False))
        for peer in ("litserve", "bentoml", "mlserver"):
            other = best(one, peer, "cpu_ms", lower=True)
            rows.append((f"the same, {peer} / rayloop", "> 1", other / ours, 1.0, True))
        other = best(one, "ray", "cpu_ms", lower=True)
        rows.append(("the same, Ray Serve as it comes / rayloop", ">= 15", other / ours, 15, True))
    if "goodput" in data:
        one = data["goodput"]
        ours = best(one, OURS, "goodput")
        for peer, factor in (
            ("litserve", 1.5),
            ("bentoml", 2),
            ("mlserver", 1.2),
            ("fastapi", 0.6),
        ):
            ratio = ours / (best(one, peer, "goodput") or math.nan)
            rows.append((f"goodput, rayloop / {peer}", f">= {factor}", ratio, factor, True))
    if "rows32" in data:
        share = best(data["rows32"], OURS, "share")
        rows.append(("images/s at 32 rows / bare engine", ">= 0.9", share, 0.9, True))
    if OURS in data.get("overload", {}):
        rows += overload_goals(data["overload"])
    for one in data.get("soak", {}).get(OURS, []):
        memory, files = one["memory_mb_growth"], one["open_files_growth"]
        rows.append(("soak: memory, last quarter / second", "<= 1.05", memory, 1.05, False))
        rows.append(("soak: open files, the same", "<= 1.05", files, 1.05, False))
    lines = ["| what | goal | found | |", "| --- | --- | --- | --- |"]
    for what, goal, found, limit, at_least in rows:
        lines.append(f"| {what} | {goal} | {found:.3g} | {verdict(found, limit, at_least)} |")
    return lines


def overload_goals(rounds: Rounds) -> list[tuple[str, str, float, float, bool]]:
    """The overload rows, of rayloop, worst round."""
    ours = rounds[OURS]

    def growth(one: dict[str, Any]) -> float:
        samples = [memory for _, memory in one["memory_mb"]]
        return samples[-1] / samples[0] if samples[0] else math.nan

    return [
        ("overload: goodput / peak", ">= 0.9", min(o["goodput_share"] for o in ours), 0.9, True),
        ("overload: refusal p99, ms", "<= 50", max(o["refusal_p99_ms"] for o in ours), 50, False),
        ("overload: answers after the deadline", "0", max(o["late"] for o in ours), 0, False),
        ("overload: memory after / before", "<= 1.1", max(map(growth, ours)), 1.1, False),
        ("overload: normal after, s", "<= 5", max(o["recovery_s"] for o in ours), 5, False),
    ]


def table(
    rounds: Rounds, columns: Sequence[tuple[str, Callable[[dict[str, Any]], float]]]
) -> list[str]:
    """One row for each server: mean and standard deviation over its rounds."""
    lines = [
        "| server | n | " + " | ".join(title for title, _ in columns) + " |",
        "| --- " * (len(columns) + 2) + "|",
    ]
    for name, rows in rounds.items():
        cells = [mean_and_spread([float(read(row)) for row in rows]) for _, read in columns]
        lines.append(f"| {name} | {len(rows)} | " + " | ".join(cells) + " |")
    return lines


def at_best(key: str) -> Callable[[dict[str, Any]], float]:
    """A figure of the highest rate that held."""
    return lambda row: row["at"][key] if row["at"] else math.nan


def column(key: str) -> Callable[[dict[str, Any]], float]:
    """A figure of a round."""
    return lambda row: row[key]


COLUMNS = {
    "overhead": [
        ("server CPU-ms", column("cpu_ms")), ("requests/s", column("requests_per_s")),
        ("p50 ms", column("p50_ms")), ("p99 ms", column("p99_ms")),
        ("memory MB", column("memory_mb")), ("client CPU-ms", column("client_cpu_ms")),
        ("start s", column("start_s")),
    ],
    "goodput": [
        ("goodput/s at p99 <= limit", column("goodput")), ("p50 ms there", at_best("p50_ms")),
        ("p99 ms there", at_best("p99_ms")), ("server CPU-ms there", at_best("cpu_ms")),
        ("closed loop, 16, /s", column("capacity")),
    ],
    "rows32": [
        ("images/s", column("images_per_s")), ("share of the bare engine", column("share")),
        ("bare engine images/s", lambda row: row["bare"]["images_per_s"]),
        ("server CPU-ms a request", column("cpu_ms")), ("p99 ms", column("p99_ms")),
    ],
    "overload": [
        ("peak/s", column("peak")), ("goodput/s", column("goodput")),
        ("share of peak", column("goodput_share")),
        ("refusal p50 ms", column("refusal_p50_ms")), ("refusal p99 ms", column("refusal_p99_ms")),
        ("late answers", column("late")), ("late since sent", column("late_from_sent")),
        ("answer p99 ms", column("answer_p99_ms")), ("normal after s", column("recovery_s")),
        ("memory MB before", lambda row: row["memory_mb"][0][1]),
        ("memory MB at the end", lambda row: row["memory_mb"][-1][1]),
    ],
    "soak": [
        ("rate/s", column("rate")), ("requests", column("requests")), ("failed", column("failed")),
        ("p99 ms", column("p99_ms")), ("memory growth", column("memory_mb_growth")),
        ("open files growth", column("open_files_growth")),
        ("memory MB at the end", lambda row: row["readings"][-1]["memory_mb"]),
        ("open files at the end", lambda row: row["readings"][-1]["open_files"]),
    ],
}  # fmt: skip


def section(scenario: str, document: dict[str, Any], source: str) -> list[str]:
    """One scenario's part of the result file."""
    said = source.partition('"""')[2].partition('"""')[0]
    lines = ["", f"## {scenario}", "", said.splitlines()[0], ""]
    lines += table(document["result"], COLUMNS[scenario])
    lines += ["", f"Arguments: `{json.dumps(shown(document['arguments']))}`.", ""]
    if scenario == "overload":
        lines += [
            f"- {name}: statuses during the flood {rows[-1]['statuses']} (-1 broken, -2 no answer "
            "in time, -3 no connection free)"
            for name, rows in document["result"].items()
        ]
    if scenario == "overhead":
        lines += [
            f"- {name}: " + ", ".join(f"{n} {v:.3f}" for n, v in by_process(rows).items())
            for name, rows in document["result"].items()
        ]
    return lines


def shown(arguments: dict[str, str]) -> dict[str, str]:
    """Arguments without paths, which differ from machine to machine."""
    return {key: value for key, value in arguments.items() if key not in ("peers", "model", "out")}


def by_process(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Mean CPU milliseconds a request by process name, largest first."""
    names = {name for row in rows for name in row["cpu_ms_by_process"]}
    means = {
        name: statistics.fmean(row["cpu_ms_by_process"].get(name, 0.0) for row in rows)
        for name in names
    }
    return dict(sorted(means.items(), key=lambda item: -item[1])[:8])


def picture(data: dict[str, Rounds], target: Path) -> None:
    """Bars of the three ratios."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [
        (scenario, key, title)
        for scenario, key, title in (
            ("overhead", "cpu_ms", "server CPU-ms a request, no-op (log)"),
            ("goodput", "goodput", "goodput/s at p99 <= 50 ms"),
            ("overload", "goodput_share", "goodput at 3 x capacity / peak"),
        )
        if scenario in data
    ]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 3.2), squeeze=False)
    for axis, (scenario, key, title) in zip(axes[0], panels, strict=True):
        names = list(data[scenario])
        values = [[float(row[key]) for row in data[scenario][name]] for name in names]
        spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
        colours = ["tab:orange" if name.startswith(OURS) else "tab:gray" for name in names]
        axis.barh(names, [statistics.fmean(v) for v in values], xerr=spread, color=colours)
        axis.set_title(title, fontsize=10)
        axis.invert_yaxis()
        if key == "cpu_ms":
            axis.set_xscale("log")
    figure.tight_layout()
    figure.savefig(target, dpi=110)


def versions() -> list[str]:
    """What is pinned for each peer."""
    lines = []
    for lock in sorted((HERE / "locks").glob("*.txt")):
        wanted = ("bentoml", "fastapi", "litserve", "mlserver", "onnxruntime", "uvicorn", "uvloop")
        pins = [line for line in lock.read_text().splitlines() if line.split("==")[0] in wanted]
        lines.append(f"- {lock.stem}: {', '.join(pins)}")
    return lines


def write(out: Path, target: Path, note: str) -> None:
    """Write the result file and the picture beside it."""
    found = {
        name: json.loads((out / f"{name}.json").read_text())
        for name in SCENARIOS
        if (out / f"{name}.json").exists()
    }
    data = {name: document["result"] for name, document in found.items()}
    first = next(iter(found.values()))
    machine = first["machine"]
    image = target.with_suffix(".png")
    picture(data, image)
    lines = [
        "# Serving side by side", "",
        f"{machine['cores']} cores of {machine['cpu']}, Linux {machine['kernel']}, Python "
        f"{machine['python']}, commit {machine['commit']}, begun {machine['utc']}, load average at "
        f"the end of the first scenario {machine['load_average'][0]:.1f}. Client and server share "
        "the cores; rounds alternate forwards and backwards. Mean ± standard deviation over n "
        "rounds. `python benchmarks/serving/all.py` makes this file.",
        *(["", f"**{note}**"] if note else []),
        "", f"![ratios]({image.name})", "", *goals(data), "",
        "Of a peer with several configurations the best counts; overload is the worst round.",
    ]  # fmt: skip
    for name, document in found.items():
        lines += section(name, document, (HERE / f"{name}.py").read_text())
    how = {name: text for document in found.values() for name, text in document["how"].items()}
    lines += [
        "",
        "## Configurations",
        "",
        *[f"- **{name}**: {text}." for name, text in how.items()],
    ]
    lines += ["", "Versions (whole lists in locks/):", "", *versions()]
    target.write_text("\n".join(lines) + "\n")


def main() -> None:
    """Read the flags and write."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument(
        "--out", type=Path, default=Path(tempfile.gettempdir()) / "rayloop-serving-results"
    )
    flags.add_argument("--target", type=Path, default=HERE / "RESULTS_cpu_2026-11-21.md")
    flags.add_argument("--note", default="", help="what a reader must know about this run")
    arguments = flags.parse_args()
    write(arguments.out, arguments.target, arguments.note)


if __name__ == "__main__":
    main()
