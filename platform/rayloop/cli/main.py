"""The `rayloop` command: parse, call, print.

rayloop up | down                       a local Ray with the right environment
rayloop submit JOB PRESET [...]         run a job on it, or on a cluster; rayloop stop NAME
rayloop status                          nodes, jobs, what serves and how it does, what failed
rayloop models                          versions, aliases, gates
rayloop deploy MODEL[@alias|:version]   give it all traffic; serve until Ctrl-C if none does
rayloop traffic show | set | history    which version answers whom: set champion=0.9 challenger=0.1
rayloop promote | rollback [MODEL]      challenger -> champion, or previous -> champion
rayloop events show | delete | prune    what is remembered of predictions
rayloop runs [show RUN | compare A B]   what was trained, newest first; --sweep RUN: its trials
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from rayloop import cluster, logs
from rayloop.cli import events, local, runs, status, submit, traffic
from rayloop.cli.running import servers
from rayloop.clock import SYSTEM_CLOCK
from rayloop.config import RegistryConfig
from rayloop.errors import RayloopError
from rayloop.presets import load_preset
from rayloop.registry.store import Registry, open_registry
from rayloop.storage import Storage, home


def main(args: Sequence[str] | None = None) -> None:
    """Run one command; ends the process as a job does: 0, 1 or 2, and no traceback for users."""
    logs.configure()
    parser = _parser()
    chosen, rest = parser.parse_known_args(args)
    if rest and chosen.command != "submit":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        result = _COMMANDS[chosen.command](chosen, rest)
    except RayloopError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        raise SystemExit(130) from None
    if result is not None:
        _show(result, as_json=chosen.json)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rayloop", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in ("up", "down", "models"):
        commands.add_parser(name)
    deploy = commands.add_parser(
        "deploy", help="give a version all traffic; serve until Ctrl-C if no server runs"
    )
    deploy.add_argument("model", help="MODEL, MODEL@alias or MODEL:version")
    deploy.add_argument("--url", default="", help="of the server; default: those of this root")
    for room in (submit, traffic, events, runs, status):
        room.add_commands(commands)
    for sub in commands.choices.values():
        sub.add_argument("--json", action="store_true", default=argparse.SUPPRESS)
    return parser


def _registry() -> Registry:
    return open_registry(Storage(home()), RegistryConfig(), SYSTEM_CLOCK)


def _models(_: argparse.Namespace, __: list[str]) -> list[dict[str, Any]]:
    registry = _registry()
    return [asdict(version) for name in registry.models() for version in registry.versions(name)]


def _deploy(chosen: argparse.Namespace, _: list[str]) -> list[dict[str, Any]] | None:
    model, reference = split_reference(chosen.model)
    found = [s for s in servers(Storage(home()), chosen.url) if s.model == model]
    if found:
        return traffic.followed(traffic.steering(model, found).deploy(reference), found)
    _serve(model, reference, chosen.model)
    return None


def _serve(model: str, reference: str, told: str) -> None:
    from rayloop import haproxy  # noqa: PLC0415  only this command serves

    config = replace(load_preset("laptop"))
    with haproxy.ingress(config.serve) as extra, cluster.connect(config.cluster, extra):
        import signal  # noqa: PLC0415

        from rayloop.serve.run import serving  # noqa: PLC0415  imports Ray, after connect

        with serving(config.serve, config.registry, home(), model, reference, config.events) as url:
            print(f"{url} serves {told}; Ctrl-C stops it.", flush=True)
            signal.sigwait({signal.SIGINT, signal.SIGTERM})


def split_reference(text: str) -> tuple[str, str]:
    """`m@alias`, `m:3` or `m` as the model's name and what the registry resolves."""
    for mark in "@:":
        name, found, rest = text.partition(mark)
        if found:
            return name, mark + rest
    return text, "@champion"


def _show(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows))
        return
    if not rows:
        print("no models yet; make one with: python jobs/pipeline.py laptop")
        return
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console().print(table)


_COMMANDS = {
    "up": local.run_up,
    "down": local.run_down,
    "status": status.run_status,
    "models": _models,
    "traffic": traffic.run_traffic,
    "promote": traffic.run_promote,
    "rollback": traffic.run_rollback,
    "events": events.run_events,
    "runs": runs.run_runs,
    "deploy": _deploy,
    "submit": submit.run_submit,
    "stop": submit.run_stop,
}
