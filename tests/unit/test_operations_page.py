"""docs/operations.md names only what there is: commands, flags, files, messages, prices."""

import ast
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import ray
import yaml
from ray.scripts import scripts
from ray.serve import scripts as serve_scripts

from rayloop.cli import main
from rayloop.config import Config
from rayloop.presets import parse_config
from tests.pages import blocks, logical_lines, quoted, table_rows

ROOT = Path(__file__).parents[2]
RAY = Path(ray.__file__).parent
PAGE = (ROOT / "docs" / "operations.md").read_text()
TYPED = [line for block in blocks(PAGE, "sh") for line in logical_lines(block)]
QUOTED = quoted(PAGE)
CLUSTER = yaml.safe_load((ROOT / "cluster.yaml").read_text())
POOLS = CLUSTER["available_node_types"]
JOB = re.compile(r"python (?:/opt/rayloop/)?jobs/(\w+)\.py ([^'|&#)]+)")
WORD = "[^'|&#)\n]"


def of(program: str, line: str) -> list[list[str]]:
    """The words behind a program, wherever in a line it is called."""
    found = re.findall(rf"(?<![\w./-])(?:\.venv/bin/)?{program} ([a-z]{WORD}*)", line)
    return [shlex.split(words.replace('"', "")) for words in found]


def test_commands_of_rayloop_parse():
    parser = main._parser()
    seen = set()
    for line in TYPED:
        for words in of("rayloop", line):
            chosen, rest = parser.parse_known_args(words)
            seen.add(chosen.command)
            if chosen.command == "submit":
                assert (ROOT / "jobs" / f"{chosen.job}.py").exists()
                parse_config("", [chosen.preset, *rest], section=section(chosen.job))
            else:
                assert rest == [], line
    assert {"up", "down", "submit", "stop", "status", "deploy", "traffic"} <= seen


def test_commands_of_rayloop_in_the_text_exist():
    parser = main._parser()
    known = next(action for action in parser._actions if action.dest == "command").choices
    for text in QUOTED:
        if text.startswith("rayloop "):
            words = shlex.split(text)
            assert words[1] in known, text
            if len(words) > 2:
                parser.parse_known_args(words[1:])


def section(job: str) -> str:
    return {"simulate": "simulate", "tune": "tune"}.get(job, "")


def test_jobs_take_their_words():
    found = [match for line in TYPED for match in JOB.findall(line)]
    assert len(found) >= 3
    for job, words in found:
        assert (ROOT / "jobs" / f"{job}.py").exists()
        parse_config("", shlex.split(words), section=section(job))


@pytest.mark.parametrize(
    ("program", "commands"), [("ray", scripts.cli), ("serve", serve_scripts.cli)]
)
def test_commands_of_ray_take_their_flags(program, commands):
    found = [words for line in TYPED for words in of(program, line)
             if words[0] in commands.commands]  # fmt: skip
    assert len(found) >= 3
    for words in found:
        command, rest = commands.commands[words[0]], words[1:]
        while hasattr(command, "commands"):
            command, rest = command.commands[rest[0]], rest[1:]
        flags = {flag for option in command.params for flag in option.opts + option.secondary_opts}
        for word in rest:
            if word == "--":
                break
            assert not word.startswith("-") or word.split("=")[0] in flags, (words, word)
    for text in QUOTED:
        if text.split(" ")[0] == program and len(text.split()) > 1:
            assert text.split()[1] in commands.commands, text


def test_flags_in_the_text_exist():
    code = "".join(path.read_text() for path in (ROOT / "platform").rglob("*.py"))
    rays = (RAY / "scripts" / "scripts.py").read_text() + (
        RAY / "dashboard" / "modules" / "job" / "cli.py").read_text()  # fmt: skip
    ours = [text for text in QUOTED if not text.startswith("aws ")]
    flags = {flag for text in ours for flag in re.findall(r"(?<!\S)--[\w.-]+", text)}
    assert flags
    for flag in flags:
        name, *field = flag.removeprefix("--").split(".")
        if field or name == "run-id":
            assert_is_setting(".".join([name, *field]).replace("-", "_"))
        else:
            generator = (ROOT / "deploy" / "kuberay" / "generate.py").read_text()
            assert f'"{flag}"' in code + rays + generator, flag


def assert_is_setting(setting: str) -> None:
    """Or the `no` of one that is true or false."""
    part: object = Config()
    for name in setting.split("."):
        found = name if hasattr(part, name) else name.removeprefix("no_")
        assert hasattr(part, found), setting
        part = getattr(part, found)


def test_files_exist():
    text = "\n".join([*TYPED, PAGE])
    pattern = (
        r"(?<![\w~/.:-])((?:docs|tests|deploy|platform|benchmarks|jobs|serve_apps)/[\w./-]*\w)"
    )
    found = set(re.findall(pattern, text)) - {"jobs/NAME.py"}
    assert len(found) > 15
    missing = [name for name in sorted(found) if not (ROOT / name).exists()]
    assert missing == []
    for name in re.findall(
        r"(?<![\w/-])(requirements[\w-]*\.lock|cluster\.yaml|\.rayignore)", text
    ):
        assert (ROOT / name).exists()
    made = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make (?:-C \S+ )?([a-z.][\w./-]*)", "\n".join([*TYPED, *QUOTED])):
        assert f"\n{target}:" in made, target


def test_variables_are_read_somewhere():
    folders = ("platform", "deploy", "serve_apps")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.*")]
    kinds = (".py", ".env", ".sh", ".yaml")
    text = "".join(path.read_text() for path in files if path.suffix in kinds)
    named = set(re.findall(r"\b((?:RAYLOOP|RAY|AWS|MLFLOW)_[A-Z_0-9a-z]*[A-Za-z])\b", PAGE))
    assert len(named) > 10
    assert [name for name in sorted(named) if name not in text] == []


# --- the messages


@cache
def strings(*folders: Path) -> str:
    """Every text in the source, pieces that Python joins joined, `\0` for what is filled in."""
    found = []
    for folder in folders:
        for path in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = (part.value if isinstance(part, ast.Constant) else "\0"
                             for part in node.values)  # fmt: skip
                    found.append("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return "\n".join(found)


def failures() -> list[list[str]]:
    text = PAGE.partition("## Failures")[2].partition("## Sizing")[0]
    return table_rows(text)


def test_every_failure_has_a_cause_and_a_remedy():
    assert len(failures()) > 35
    for row in failures():
        assert len(row) == 3 and all(row), row


def test_the_words_of_the_failures_are_those_of_the_code():
    ours = strings(ROOT / "platform")
    rays = strings(RAY / "autoscaler" / "_private", RAY / "_private" / "authentication")
    checked = 0
    for seen, *_ in failures():
        if seen.endswith("(AWS)"):
            continue
        source = rays if seen.endswith("(Ray)") else ours
        for message in re.findall(r"`([^`]+)`", seen):
            if message.split()[0] in ("rayloop", "serve", "ray"):
                continue  # a command, looked at above
            for piece in re.split(r"\.\.\.|\d+(?= s)", message):
                words = piece.strip(" ():,;=")
                assert not words or words in source, (message, words)
                checked += bool(words)
    assert checked > 50


def test_a_message_that_nobody_writes_is_noticed():
    assert "The cluster at \0 " in strings(ROOT / "platform")
    assert "the cluster is at" not in strings(ROOT / "platform")


# --- the figures


def test_prices_are_for_the_machines_of_cluster_yaml_and_add_up():
    text = PAGE.partition("## What it costs")[2]
    rows = table_rows(text)
    price = {row[0]: float(row[1]) for row in rows if re.fullmatch(r"\w+\.\w+", row[0])}
    of_pool = {name: price[pool["node_config"]["InstanceType"]] for name, pool in POOLS.items()}
    assert set(price) == {pool["node_config"]["InstanceType"] for pool in POOLS.values()}
    states = {row[0]: row[1:] for row in rows if re.fullmatch(r"\d \+ \d \+ \d", row[1])}
    for machines, total in states.values():
        head, cpu, gpu = map(int, machines.split(" + "))
        assert head == 1
        assert CLUSTER["max_workers"] >= cpu + gpu
        sum_ = of_pool["head"] + cpu * of_pool["cpu_worker"] + gpu * of_pool["gpu_worker"]
        assert float(total) == pytest.approx(sum_)
    assert states["idle"][0] == f"1 + {POOLS['cpu_worker']['min_workers']} + 0"
    assert f"--price-per-worker-hour {of_pool['cpu_worker'] / 8:.4f}" in PAGE


def test_measured_figures_are_those_of_their_files():
    for what, figure, source in table_rows(PAGE.partition("## Sizing")[2].partition("`--train")[0]):
        for number in re.findall(r"[\d,.]+ ± [\d,.]+", figure):
            if source.startswith("benchmarks/"):
                assert number in (ROOT / source).read_text(), what
