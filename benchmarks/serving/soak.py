"""Ten minutes at 70% of the capacity: whether memory and open files stay where they were.

    python benchmarks/serving/soak.py
    python benchmarks/serving/soak.py --seconds 60

Capacity is the rate of a closed loop with 32 connections. The load comes in pieces of 20 s, open
loop, Poisson; between two of them memory (proportional set size) and descriptors of the server's
whole process tree are read. Growth compares the last quarter of the readings with the second one,
after everything has warmed up.
"""

import argparse
import statistics
from typing import Any

from common import check_answers, demo_model, keep, parser, prepare, say
from load import closed, open_loop, poisson
from servers import Model, Running, serving

SERVERS = ("rayloop",)
SHARE, PIECE_S = 0.7, 20.0


def soak(running: Running, seconds: float) -> dict[str, Any]:
    """Readings, and what became of the requests."""
    closed(running, 32, 2.0)
    rate = SHARE * closed(running, 32, 4.0).requests_per_s
    readings, failed, sent, p99_ms = [], 0, 0, []
    for piece in range(max(8, round(seconds / PIECE_S))):
        one = open_loop(running, poisson(rate, min(PIECE_S, seconds / 8), piece))
        failed += int((~one.good).sum())
        sent += len(one.records)
        p99_ms.append(one.percentile_ms(99))
        usage = running.tree.usage()
        readings.append({"memory_mb": usage.memory_mb, "open_files": usage.open_files})
    return {
        "rate": rate, "requests": sent, "failed": failed, "p99_ms": statistics.median(p99_ms),
        **{f"{key}_growth": growth([r[key] for r in readings]) for key in readings[0]},
        "readings": readings,
    }  # fmt: skip


def growth(readings: list[float]) -> float:
    """The last quarter's mean over that of the second quarter."""
    quarter = len(readings) // 4
    return statistics.fmean(readings[-quarter:]) / statistics.fmean(readings[quarter : 2 * quarter])


def measure(arguments: argparse.Namespace, model: Model) -> dict[str, list[dict[str, Any]]]:
    """Results by server."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.servers}
    for _ in range(arguments.repeats):
        for name in arguments.servers:
            with serving(name, model, arguments.peers, arguments.settings) as running:
                check_answers(running, 1)
                result = soak(running, arguments.seconds)
            found[name].append(result)
            say(
                f"{name}: {result['requests']} requests at {result['rate']:.0f}/s, "
                f"{result['failed']} failed, memory x {result['memory_mb_growth']:.3f}, "
                f"open files x {result['open_files_growth']:.3f}"
            )
    return found


def main() -> None:
    """Measure and keep."""
    flags = parser(__doc__, SERVERS, seconds=600.0)
    flags.set_defaults(repeats=1)
    arguments = flags.parse_args()
    prepare()
    keep(arguments.out, "soak", arguments, measure(arguments, demo_model(arguments.model)))


if __name__ == "__main__":
    main()
