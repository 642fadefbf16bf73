"""Raw images to a served INT8 model: data, training, quantization, registry, serving, report.

    python jobs/pipeline.py laptop
    python jobs/pipeline.py smoke --serve.http_port 0
    ray job submit --working-dir . -- python jobs/pipeline.py cluster

Prints a table, writes report.html, and ends with one JSON line.
"""

from typing import Any

from rich.console import Console
from rich.table import Table

from rayloop import haproxy
from rayloop.cluster import connect
from rayloop.jobs_entry import run_job
from rayloop.presets import parse_config
from rayloop.storage import Storage, home
from rayloop.tracking import Tracker


def main() -> dict[str, Any]:
    """Parse the command line, run every stage, show the table, and give the last line."""
    config = parse_config(__doc__)
    storage = Storage(home())
    tracker = Tracker(storage, config.registry.tracking_uri)
    with haproxy.ingress(config.serve) as extra, connect(config.cluster, extra):
        from rayloop.pipeline.run import run_pipeline  # noqa: PLC0415  imports Ray, after connect

        summary = run_pipeline(config, storage, tracker)
    show(summary)
    return summary


def show(summary: dict[str, Any]) -> None:
    """Print the summary's figures as a table for people."""
    table = Table(title=f"{summary['model']} version {summary['version']} ({summary['alias']})")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in summary.items():
        if isinstance(value, (int, float)):
            table.add_row(name, f"{value:,.4f}" if isinstance(value, float) else f"{value:,}")
    Console().print(table)


if __name__ == "__main__":
    run_job(main)
