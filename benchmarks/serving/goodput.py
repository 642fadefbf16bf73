"""Highest rate of single images a server answers with p99 <= 50 ms under Poisson arrivals.

    python benchmarks/serving/goodput.py
    python benchmarks/serving/goodput.py --repeats 3 --seconds 10

Open loop: latency counts from the intended arrival, so a server that stalls cannot hide it. The
rate is found by bisection below the capacity of a closed loop; a rate holds when p99 over all
requests is in time, one without a 200 counting as endless.
"""

import argparse
from typing import Any

from common import check_answers, demo_model, figures, keep, order, parser, prepare, say
from load import closed, open_loop, poisson
from servers import Model, Running, serving

SERVERS = ("rayloop", "rayloop-2", "fastapi", "fastapi-pool", "litserve", "bentoml", "mlserver")


def highest_rate(running: Running, arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Bisect the rate.

    Args:
        running: The server.
        arguments: Limit, steps and length of a round.
        seed: Of the first arrival process.
    """
    closed(running, 16, 1.0)
    capacity = closed(running, 16, arguments.seconds / 2).requests_per_s
    low, high, best, tried = 0.0, 1.1 * capacity, None, []
    for step in range(arguments.steps):
        rate = (low + high) / 2 if step else 0.6 * capacity
        schedule = poisson(rate, arguments.seconds, seed * 100 + step)
        one = open_loop(running, schedule, timeout_s=5.0)
        p99_ms = one.percentile_ms(99)
        tried.append({"rate": rate, "p99_ms": p99_ms})
        if p99_ms <= arguments.limit_ms:
            low, best = rate, figures(one)
        else:
            high = rate
    in_time = best["requests_per_s"] if best else 0.0
    return {"capacity": capacity, "goodput": in_time, "at": best, "tried": tried}


def measure(arguments: argparse.Namespace, model: Model) -> dict[str, list[dict[str, Any]]]:
    """Rates by server."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.servers}
    for repeat in range(arguments.repeats):
        for name in order(arguments.servers, repeat):
            with serving(name, model, arguments.peers, arguments.settings) as running:
                check_answers(running, 1)
                result = highest_rate(running, arguments, repeat)
            found[name].append(result)
            say(f"{name}: {result['goodput']:.0f}/s (closed loop {result['capacity']:.0f}/s)")
    return found


def main() -> None:
    """Measure and keep."""
    flags = parser(__doc__, SERVERS, seconds=8.0)
    flags.add_argument("--limit-ms", type=float, default=50.0)
    flags.add_argument("--steps", type=int, default=6, help="steps of the bisection")
    arguments = flags.parse_args()
    prepare()
    keep(arguments.out, "goodput", arguments, measure(arguments, demo_model(arguments.model)))


if __name__ == "__main__":
    main()
