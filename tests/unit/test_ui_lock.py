"""MLflow's server and our client must agree on the database, so their locks agree on MLflow."""

from pathlib import Path

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


def test_the_ui_lock_pins_everything_and_names_no_host() -> None:
    assert all(version[:1].isdigit() for version in pins("requirements-ui.lock").values())
    text = (ROOT / "requirements-ui.lock").read_text()
    assert "://" not in text
    assert "--index-url" not in text


def test_neither_git_nor_ray_carries_the_uis_environment() -> None:
    for name in (".gitignore", ".rayignore"):
        assert ".venv-ui/" in (ROOT / name).read_text().splitlines()
