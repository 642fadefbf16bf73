"""Three times the capacity for 60 s, open loop: what is still answered in time, and what after.

    python benchmarks/serving/overload.py
    python benchmarks/serving/overload.py --servers rayloop --settings '{"max_queued_rows": 1024}'

Capacity is the rate of a closed loop with 32 connections; peak goodput the best of a few open-loop
rates around it. An answer counts as good when it is a 200 within the deadline, counted from the
intended arrival; rayloop gets the deadline as a header, the others know none. Recovery is the time
after the last overload arrival until every one-second window holds twice the usual p99 again.
"""

import argparse
from typing import Any

import numpy as np
from common import check_answers, demo_model, figures, keep, order, parser, prepare, say
from load import Round, closed, open_loop, poisson
from servers import Model, Running, serving

SERVERS = ("rayloop", "fastapi", "litserve", "bentoml", "mlserver")
AROUND = (0.7, 0.85, 1.0, 1.1)
NORMAL, AFTER_S, CONNECTIONS = 0.5, 10.0, 1024
REFUSED = (429, 503)


def goodput(one: Round, deadline_ms: float, seconds: float) -> float:
    """Answers a second that came within the deadline from the intended arrival."""
    return float((one.latencies_ms <= deadline_ms).sum()) / seconds


def overload(running: Running, arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Capacity, peak, usual p99, then the flood and what follows it."""
    deadline_ms, timeout_s = arguments.deadline_ms, max(5.0, 4 * arguments.deadline_ms / 1000)

    def send(schedule: np.ndarray) -> Round:
        return open_loop(
            running, schedule, connections=CONNECTIONS, timeout_s=timeout_s, deadline_ms=deadline_ms
        )

    closed(running, 32, 1.0)
    capacity = closed(running, 32, 4.0).requests_per_s
    trials = [send(poisson(share * capacity, 5.0, seed + i)) for i, share in enumerate(AROUND)]
    peak = max(goodput(one, deadline_ms, 5.0) for one in trials)
    usual = send(poisson(NORMAL * capacity, 5.0, seed + 10)).percentile_ms(99)
    flood_s = arguments.seconds
    flood = poisson(arguments.factor * capacity, flood_s, seed + 20)
    after = flood_s + poisson(NORMAL * capacity, AFTER_S, seed + 30)
    one = send(np.concatenate([flood, after]))
    return {
        "capacity": capacity, "peak": peak, "usual_p99_ms": usual,
        **describe(one, flood_s, deadline_ms, peak),
        "recovery_s": recovery_s(one, flood_s, usual),
        "round": figures(one), "memory_mb": one.memory_mb,
    }  # fmt: skip


def describe(one: Round, flood_s: float, deadline_ms: float, peak: float) -> dict[str, Any]:
    """What happened to the requests that arrived during the flood."""
    rows = one.records[one.records["intended"] < flood_s]
    from_intended_ms = (rows["done"] - rows["intended"]) * 1000
    from_sent_ms = (rows["done"] - rows["sent"]) * 1000
    answered, refused = rows["status"] == 200, np.isin(rows["status"], REFUSED)
    good = answered & (from_intended_ms <= deadline_ms)
    statuses, counts = np.unique(rows["status"], return_counts=True)
    return {
        "goodput": float(good.sum()) / flood_s,
        "goodput_share": float(good.sum()) / flood_s / peak,
        "statuses": {str(s): int(c) for s, c in zip(statuses, counts, strict=True)},
        "late": int((answered & (from_intended_ms > deadline_ms)).sum()),
        "late_from_sent": int((answered & (from_sent_ms > deadline_ms)).sum()),
        "refusal_p50_ms": _percentile(from_intended_ms[refused], 50),
        "refusal_p99_ms": _percentile(from_intended_ms[refused], 99),
        "refusal_p99_from_sent_ms": _percentile(from_sent_ms[refused], 99),
        "refusals_without_retry_after": int((refused & (rows["retry_after"] < 0)).sum()),
        "answer_p50_ms": _percentile(from_intended_ms[answered], 50),
        "answer_p99_ms": _percentile(from_intended_ms[answered], 99),
    }


def recovery_s(one: Round, flood_s: float, usual_p99_ms: float) -> float:
    """Seconds after the flood from which all windows are usual again; infinite if never."""
    rows = one.records[one.records["intended"] >= flood_s]
    good = rows["status"] == 200
    latency_ms = np.where(good, (rows["done"] - rows["intended"]) * 1000, np.inf)
    window = (rows["intended"] - flood_s).astype(int)
    back = 0.0
    for second in range(int(AFTER_S)):
        inside = latency_ms[window == second]
        if _percentile(inside, 99) > max(2 * usual_p99_ms, 20.0):
            back = second + 1.0
    return back if back < AFTER_S else float("inf")


def _percentile(values: np.ndarray, percent: float) -> float:
    return float(np.percentile(values, percent, method="higher")) if len(values) else float("nan")


def measure(arguments: argparse.Namespace, model: Model) -> dict[str, list[dict[str, Any]]]:
    """Results by server."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.servers}
    for repeat in range(arguments.repeats):
        for name in order(arguments.servers, repeat):
            with serving(name, model, arguments.peers, arguments.settings) as running:
                check_answers(running, 1)
                result = overload(running, arguments, 1000 * repeat)
            found[name].append(result)
            say(
                f"{name}: {result['goodput_share']:.0%} of peak {result['peak']:.0f}/s, refusals "
                f"p99 {result['refusal_p99_ms']:.0f} ms, late {result['late']}, back after "
                f"{result['recovery_s']} s"
            )
    return found


def main() -> None:
    """Measure and keep."""
    flags = parser(__doc__, SERVERS, seconds=60.0)
    flags.set_defaults(repeats=3)
    flags.add_argument("--deadline-ms", type=float, default=500.0)
    flags.add_argument("--factor", type=float, default=3.0, help="times the capacity")
    arguments = flags.parse_args()
    prepare()
    keep(arguments.out, "overload", arguments, measure(arguments, demo_model(arguments.model)))


if __name__ == "__main__":
    main()
