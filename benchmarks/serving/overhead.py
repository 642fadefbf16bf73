"""Server CPU milliseconds for each request with an engine that does nothing, 16 connections.

    python benchmarks/serving/overhead.py
    python benchmarks/serving/overhead.py --servers rayloop litserve --repeats 3

Closed loop, single images, each server in its natural binary form. CPU time is user and system time
of the server's whole process tree, background included. This is the figure that a client on the
same cores disturbs least.
"""

import argparse

from common import figures, keep, noop_model, order, parser, prepare, say
from load import closed
from servers import serving

SERVERS = (
    "rayloop", "ray", "fastapi", "fastapi-pool", "litserve", "litserve-fast", "bentoml",
    "bentoml-batch", "mlserver", "mlserver-batch",
)  # fmt: skip


def measure(arguments: argparse.Namespace) -> dict[str, list[dict[str, object]]]:
    """Rounds by server."""
    rounds: dict[str, list[dict[str, object]]] = {name: [] for name in arguments.servers}
    for repeat in range(arguments.repeats):
        for name in order(arguments.servers, repeat):
            with serving(name, noop_model(), arguments.peers, arguments.settings) as running:
                closed(running, arguments.connections, 1.0)
                one = closed(running, arguments.connections, arguments.seconds)
            rounds[name].append({**figures(one), "start_s": running.start_s})
            say(f"{name}: {one.cpu_ms:.3f} CPU-ms, {one.requests_per_s:.0f}/s")
    return rounds


def main() -> None:
    """Measure and keep."""
    flags = parser(__doc__, SERVERS, seconds=6.0)
    flags.add_argument("--connections", type=int, default=16)
    arguments = flags.parse_args()
    prepare()
    keep(arguments.out, "overhead", arguments, measure(arguments))


if __name__ == "__main__":
    main()
