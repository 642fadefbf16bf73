"""Which code runs: read from a checkout, and silent where there is none."""

import subprocess
from pathlib import Path

import pytest

from rayloop import __version__, code_version
from rayloop.code_version import CodeVersion, read_code_version


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(
        ["git", *who, *words], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package committed in a checkout of its own."""
    folder = tmp_path / "checkout" / "platform" / "package"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    git(tmp_path / "checkout", "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "-m", "first")
    return folder


def test_a_checkout_gives_its_commit_and_whether_anything_is_not_in_it(package: Path) -> None:
    commit = git(package, "rev-parse", "HEAD")
    assert read_code_version(package) == CodeVersion(version=__version__, commit=commit)
    (package / "new.py").write_text("")
    assert read_code_version(package).has_changes
    git(package, "add", ".")
    git(package, "commit", "--quiet", "-m", "second")
    assert read_code_version(package).commit != commit
    assert not read_code_version(package).has_changes
    (package.parents[1] / "jobs.py").write_text("")
    assert read_code_version(package).has_changes


def test_a_hook_of_another_checkout_does_not_lead_astray(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = git(package, "rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    assert read_code_version(package).commit == commit


def test_a_package_installed_inside_somebody_elses_checkout_has_no_commit(package: Path) -> None:
    installed = package / ".venv" / "site-packages" / "package"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    assert read_code_version(installed) == CodeVersion(version=__version__)


def test_no_checkout_no_commit_and_no_git(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = CodeVersion(version=__version__)
    assert read_code_version(tmp_path) == nothing
    (tmp_path / "__init__.py").write_text("")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "__init__.py")
    assert read_code_version(tmp_path) == nothing
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read_code_version(package) == nothing


def test_git_is_asked_once_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(code_version, "_git", lambda folder, *words: asked.append(words[0]) or "")
    code_version.code_version.cache_clear()
    try:
        assert code_version.code_version() == code_version.code_version()
    finally:
        code_version.code_version.cache_clear()
    assert asked == ["ls-files"]


def test_a_shipped_package_has_the_commit_that_was_sent_along(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rayloop.code_version._git", lambda *_: "")
    for told, commit, has_changes in (("", "", False), ("abc", "abc", False),
                                      ("abc+changes", "abc", True)):  # fmt: skip
        monkeypatch.setenv("RAYLOOP_COMMIT", told)
        code_version.code_version.cache_clear()
        found = code_version.code_version()
        assert (found.commit, found.has_changes) == (commit, has_changes)
    code_version.code_version.cache_clear()
