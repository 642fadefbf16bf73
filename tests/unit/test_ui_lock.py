"""The locks beside ours: pinned, without hosts, and MLflow's server of our client's version."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def pins(name: str) -> dict[str, str]:
    """Package and version of every line; one that pins nothing gets an empty version."""
    lines = (line.split(";")[0].strip() for line in (ROOT / name).read_text().splitlines())
    parts = (line.partition("==") for line in lines if line and not line.startswith("#"))
    return {package: version for package, _, version in parts}


def test_the_ui_has_the_mlflow_that_writes_the_database() -> None:
    ours, theirs = pins("requirements.lock"), pins("requirements-ui.lock")
    remedy = "bring them together with: make lock-ui"
    assert theirs["mlflow"] == theirs["mlflow-skinny"] == ours["mlflow-skinny"], remedy


@pytest.mark.parametrize("name", ["requirements-ui.lock", "requirements-s3.lock"])
def test_a_lock_pins_everything_and_names_no_host(name: str) -> None:
    assert all(version[:1].isdigit() for version in pins(name).values())
    text = (ROOT / name).read_text()
    assert "://" not in text
    assert "--index-url" not in text


@pytest.mark.parametrize("folder", [".venv-ui/", ".venv-s3/"])
def test_neither_git_nor_ray_carries_the_environment(folder: str) -> None:
    for name in (".gitignore", ".rayignore"):
        assert folder in (ROOT / name).read_text().splitlines()
