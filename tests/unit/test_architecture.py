"""The house stands as docs/architecture.md draws it."""

import ast
import dataclasses
import importlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "platform" / "rayloop"
STAGES = [
    "data", "models", "train", "tune", "quantize", "registry", "select", "serve", "pipeline",
    "simulate",
]  # fmt: skip
"""Rooms in the order of the pipeline; a room imports only those before it."""

PURE_BASE = {
    "config", "presets", "errors", "clock", "storage", "locks", "logs", "code_version", "tracking",
    "haproxy", "metrics", "drawing", "growth", "node_cache", "ports", "remote", "s3",
    "tracking_client", "credentials",
}  # fmt: skip
BASE = PURE_BASE | {"cluster", "jobs_entry", "cli", "submit"}
MAY_IMPORT_RAY = {
    "cluster",
    "data/sources",
    "data/prepare",
    "data/feed",
    "train/progress",
    "train/worker",
    "train/run",
    "tune/adapters",
    "tune/run",
    "tune/scaling_run",
    "tune/trainable",
    "quantize/run",
    "select/run",
    "serve/app",
    "serve/dedicated",
    "serve/lane",
    "serve/offline/run",
    "serve/run",
    "serve/options",
    "pipeline/run",
    "submit/client",
}
MUST_BE_PURE = PURE_BASE | {
    "data/order",
    "data/transforms",
    "data/versions",
    "models/norm",
    "models/zoo",
    "quantize/work",
    "registry/register",
    "select/choice",
    "select/final",
    "tune/front",
    "select/work",
    "serve/batcher",
    "serve/http",
    "simulate/table",
    "train/average",
    "train/checkpoint",
    "train/claim",
    "train/divergence",
    "train/floor",
    "train/journal",
    "train/loop",
    "train/state_file",
    "train/step",
    "train/sums",
    "train/watchdog",
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def test_platform_is_a_folder_and_not_a_package():
    assert not (ROOT / "platform" / "__init__.py").exists()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_stage_imports_only_stages_before_it(path):
    parts = name_of(path).split("/")
    own = parts[0]
    if own not in STAGES and own in BASE | {"__init__"}:
        allowed = set() if own != "cli" else set(STAGES)
    else:
        assert own in STAGES, f"{path} is in no known room"
        allowed = set(STAGES[: STAGES.index(own) + 1])
    used = {
        name.split(".")[1]
        for name in imports_of(path)
        if name.startswith("rayloop.") and name.split(".")[1] in STAGES
    }
    assert used <= allowed


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_the_named_modules_import_ray(path):
    uses_ray = any(name == "ray" or name.startswith("ray.") for name in imports_of(path))
    assert uses_ray <= (name_of(path) in MAY_IMPORT_RAY)


@pytest.fixture(scope="module", autouse=True)
def imports() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Processes that import while the other tests of this file run."""
    names = [name_of(path) for path in MODULES if path.stem != "__init__"]
    pure = [name for name in names if name not in MAY_IMPORT_RAY | (BASE - PURE_BASE)]
    assert set(pure) >= MUST_BE_PURE
    modules = [f"rayloop.{name.replace('/', '.')}" for name in pure]
    codes = {
        "pure modules": "import sys, importlib\n"
        "sys.modules['ray'] = None\n"
        f"[importlib.import_module(name) for name in {modules!r}]\n",
        "the standard library's": "import platform, uuid; platform.system(); import ray; "
        "print(platform.__file__)",
    }
    pipe = subprocess.PIPE
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, stdout=pipe, stderr=pipe, text=True
        )
        for name, code in codes.items()
    }
    yield processes
    for process in processes.values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize("folder", ["jobs", "serve_apps", "tests", "benchmarks"])
def test_no_file_shadows_an_importable_module(folder):
    imported = {"ray", "torch", "numpy", "train", "tune", "serve", "data"} - {
        "train",
        "tune",
        "serve",
    }
    for path in (ROOT / folder).rglob("*.py"):
        if path.stem in ("__init__", "conftest") or not path.is_file():
            continue
        assert path.stem not in sys.stdlib_module_names, path
        assert path.stem not in imported, path


def test_the_job_that_chooses_is_a_folder_and_shadows_nothing(tmp_path):
    """`python jobs/x.py` puts jobs/ first on the path, where a file select.py would be found."""
    assert (ROOT / "jobs" / "select.py" / "__main__.py").is_file()
    code = "import select, subprocess, asyncio; print(select.__spec__.origin, select.poll)"
    shutil.copytree(ROOT / "jobs", tmp_path / "jobs")
    (tmp_path / "jobs" / "other.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "jobs/other.py"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert str(tmp_path) not in done.stdout


def config_classes():
    config = importlib.import_module("rayloop.config")
    return [
        value
        for value in vars(config).values()
        if dataclasses.is_dataclass(value) and value.__module__ == "rayloop.config"
    ]


@pytest.mark.parametrize("cls", config_classes(), ids=lambda cls: cls.__name__)
def test_every_setting_is_frozen_and_documented(cls):
    assert cls.__dataclass_params__.frozen
    tree = ast.parse((PACKAGE / "config.py").read_text())
    body = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == cls.__name__).body
    for before, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(before, ast.AnnAssign):
            documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            assert documented, f"{cls.__name__}.{ast.unparse(before.target)} has no text under it"


def public_names(body, prefix=""):
    """Functions and classes a reader of the module may call, with those of public classes."""
    for node in body:
        is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        if (is_function or isinstance(node, ast.ClassDef)) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public_names(node.body, f"{node.name}.")


def test_every_public_function_of_the_package_is_documented():
    missing = [
        f"{name_of(path)}:{name}"
        for path in MODULES
        for name, node in public_names(ast.parse(path.read_text()).body)
        if not ast.get_docstring(node)
    ]
    assert missing == []


def test_lock_file_names_no_host_and_pins_everything():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith((" ", "#"))]
    assert all("==" in line for line in pins)
    assert not any("://" in line for line in lines)


def test_pure_modules_load_without_ray(imports):
    """Also through what they import: the trainer core must run where there is no Ray."""
    _, stderr = imports["pure modules"].communicate(timeout=300)
    assert imports["pure modules"].returncode == 0, stderr


def test_stdlib_platform_and_ray_import_from_the_repository_root(imports):
    stdout, stderr = imports["the standard library's"].communicate(timeout=300)
    assert imports["the standard library's"].returncode == 0, stderr
    assert str(ROOT) not in stdout.split("/lib/")[0] or ".venv" in stdout
