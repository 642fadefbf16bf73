"""The figures of simulator.py, and published runs, beside what the simulator says -> a result file.

    .venv/bin/python benchmarks/simulator_report.py
    .venv/bin/python benchmarks/simulator_report.py benchmarks/simulator_2core_2026-11-22.json

Writes the markdown file of the same name; where there are no figures yet, prints the published
part, which is computation alone.
"""

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rayloop.simulate.published import Run, published_runs

GOAL = 0.15
QUIET_SHARE = 0.1
OF_FAILURES = ("hours to a failure", "unexpected interruptions")
HERE = Path(__file__).parent


def main() -> None:
    """Read, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("figures", type=Path, nargs="?", default=newest())
    path: Path | None = parser.parse_args().figures
    if path is None:
        print("\n".join([*published_table(), *closing()]))
        return
    raw = json.loads(path.read_text())
    lines = [*introduction(raw), *measured_table(raw), *calibration_table(raw)]
    lines += [*published_table(), *closing()]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print(json.dumps({"written": str(path.with_suffix(".md")), **worst(raw)}))


def newest() -> Path | None:
    """The newest figures beside this script, if there are any."""
    found = (p for p in HERE.glob("simulator_*.json") if not p.stem.endswith("_calibration"))
    return max(found, key=lambda path: path.stem.rpartition("_")[2], default=None)


def introduction(raw: dict[str, Any]) -> list[str]:
    """What was done, where."""
    return [
        "# The simulator against measured and published runs",
        "",
        f"{raw['machine']}; commit {raw['commit']}; {raw['rounds']} rounds of training runs, "
        f"{raw['rounds_before']} rounds of calibration before them and one after each.",
        "",
        "`benchmarks/simulator.py` measures one worker alone, workers that compute at once and in "
        "step but exchange nothing, gloo, a checkpoint, a restart and what Ray itself takes, and "
        "predicts from these alone. The "
        "runs are `jobs/train.py laptop --train.global-batch-size 256 --train.cpus-per-worker 1` "
        "with 1, 2 and 4 workers, a seed a round, their order turned each round. The machine is "
        "shared: a figure counts where others used at most "
        f"{QUIET_SHARE:.0%} of it meanwhile, on both sides alike; all are in the JSON beside this.",
        "",
    ]


def quiet(runs: Sequence[dict[str, Any]], workers: int, key: str) -> list[float]:
    """A figure of the runs that count; of all where none does."""
    mine = [run for run in runs if run["workers"] == workers]
    return [r[key] for r in mine if r["others"] <= QUIET_SHARE] or [r[key] for r in mine]


def measured_table(raw: dict[str, Any]) -> Iterator[str]:
    """Predictions beside the runs."""
    yield from (
        "## Measured runs",
        "",
        "Images a second at the median step of each run, since a step that others interrupt says "
        "nothing of this machine; the calibration's steps are medians too.",
        "",
        "| workers | n (of) | mean | std | over all steps, mean | predicted before any run | error "
        "| predicted, all calibrations | error |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    )
    for workers in ("1", "2", "4"):
        values = quiet(raw["runs"], int(workers), "usual_images_per_second")
        mean = statistics.fmean(values)
        over_all = statistics.fmean(quiet(raw["runs"], int(workers), "images_per_second"))
        cells = [
            workers,
            f"{len(values)} ({sum(r['workers'] == int(workers) for r in raw['runs'])})",
            f"{mean:.0f}",
            f"{statistics.stdev(values):.0f}" if len(values) > 1 else "",
            f"{over_all:.0f}",
        ]
        for told in ("predicted_before", "predicted"):
            predicted = raw[told][workers]["rows_per_s"]
            cells += [f"{predicted:.0f}", f"**{predicted / mean - 1:+.1%}**"]
        yield f"| {' | '.join(cells)} |"
    yield from (
        "",
        "From the start of the job's session to its last step, seconds (start, steps, data, "
        "checkpoints; the start was measured in the run that was killed):",
        "",
        "| workers | mean | std | predicted | error |",
        "| --- | --- | --- | --- | --- |",
    )
    for workers in ("1", "2", "4"):
        values = quiet(raw["runs"], int(workers), "run_s")
        mean, predicted = statistics.fmean(values), raw["predicted"][workers]["run_s"]
        spread = f"{statistics.stdev(values):.1f}" if len(values) > 1 else ""
        yield (
            f"| {workers} | {mean:.1f} | {spread} | {predicted:.1f} | {predicted / mean - 1:+.1%} |"
        )
    yield ""


def calibration_table(raw: dict[str, Any]) -> Iterator[str]:
    """What the predictions start from."""
    told = raw["calibration"]
    measured = raw["measured"]
    contention = ", ".join(f"{count}: {factor:.2f}" for count, factor in told["contention"])
    sums = {
        name: statistics.median([v for v, share in figures if share <= QUIET_SHARE] or [0.0])
        for name, figures in measured["sums"].items()
    }
    yield from (
        "## Calibration",
        "",
        "| what | figure |",
        "| --- | --- |",
        f"| step of one worker alone | {told['fixed_s'] * 1e3:.1f} ms + {told['row_s'] * 1e6:.0f} "
        f"us a row ({told['least_rows']:.0f} to {told['largest_rows']:.0f} rows) |",
        f"| times longer with workers that compute at once and in step | {contention} |",
        f"| cores that Ray's own processes keep busy | {told['platform_cores']:.2f} |",
        f"| noise from step to step | {told['noise']:.1%} |",
        f"| bytes of a step's exchange | {told['exchange_bytes']:,.0f} |",
        f"| gloo between two | {told['node_latency_s'] * 1e6:.0f} us, "
        f"{told['node_bytes_per_s'] / 1e6:.0f} MB/s; among more workers than cores "
        f"{told['crowded_latency_s'] * 1e6:.0f} us |",
        "| all-reduces, median | "
        + ", ".join(
            f"{n.split()[0]} workers {int(n.split()[1]):,} bytes {s * 1e3:.2f} ms"
            for n, s in sums.items()
        )
        + " |",
        f"| checkpoint | {told['checkpoint_bytes']:,.0f} bytes, takes "
        f"{told['checkpoint_s'] * 1e3:.1f} ms from the training |",
        f"| start, restart after SIGKILL of a worker | {told['start_s']:.1f} s, "
        f"{told['restart_s']:.1f} s |",
        "",
    )


def published_table() -> Iterator[str]:
    """Predictions beside published runs."""
    yield from (
        "## Published runs",
        "",
        "From `rayloop.simulate.published`; a test holds these errors. Of each paper the smallest "
        "configuration sets the share of the peak that matrix products reach; the rows are "
        "predicted. What a paper leaves open is in the last column.",
        "",
        "| run | figure | published | predicted | error | calibrated on | assumed |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    )
    paper = ""
    for run in published_runs():
        if run.paper != paper:
            paper = run.paper
            yield f"| **{paper}** | | | | | | |"
        yield (
            f"| {run.run} ({run.where}) | {run.unit} | {run.published:g} | {run.predicted:.4g} "
            f"| {_error(run)} | {run.calibrated_on} | {run.assumed} |"
        )


def closing() -> list[str]:
    """What the published part says, and where its figures were read."""
    speeds = [run for run in published_runs() if run.unit not in OF_FAILURES]
    errors = [abs(run.error) for run in speeds]
    largest = max(speeds, key=lambda run: abs(run.error))
    return [
        "",
        f"Throughput: {len(speeds)} predictions, the largest error {max(errors):.1%} "
        f"({largest.run}; the paper names stragglers, which the model of a published run leaves "
        f"out), mean of the errors' sizes {statistics.fmean(errors):.1%}. Failures: proportional "
        "to the workers within one cluster, and **missed by a factor of six** from one cluster to "
        "another: a failure rate must be measured where the run is to be, or "
        "`--failures-per-worker-day` is a guess.",
        "",
        "Re-read: Narayanan et al. Tables 1 and 2, Jiang et al. Tables 1 and 2 with the schedule, "
        "Llama 3's Table 4 and its interruptions, Smith et al. section 2.4, BLOOM's model card, "
        "Kokolis et al.'s two times to failure, Goyal et al.'s abstract: in copies and summaries "
        "of the papers, not in the papers' own files. Goyal's 29 hours on 8 GPUs are NVIDIA's "
        "account of the work.",
    ]


def _error(run: Run) -> str:
    missed = "" if abs(run.error) <= GOAL else " missed"
    return f"{run.error:+.1%}{missed}"


def worst(raw: dict[str, Any]) -> dict[str, float]:
    """The largest relative errors, for the last line."""
    errors = {
        told: max(
            abs(
                raw[told][str(count)]["rows_per_s"]
                / statistics.fmean(quiet(raw["runs"], count, "usual_images_per_second"))
                - 1
            )
            for count in (1, 2, 4)
        )
        for told in ("predicted_before", "predicted")
    }
    return {name: round(value, 4) for name, value in errors.items()}


if __name__ == "__main__":
    main()
