"""What is shipped with a job: the code, as the ignore files say, and never too much of it."""

from pathlib import Path

import pytest

from rayloop.errors import RequestError
from rayloop.submit.package import collect, staged

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name, text in {
        ".gitignore": "*.bin\n/build/\n!keep.bin\n",
        ".rayignore": "docs/\n",
        "jobs/train.py": "print()",
        "jobs/__pycache__/train.pyc": "x",
        "jobs/.gitignore": "local.py\n",
        "jobs/local.py": "secret",
        "platform/rayloop/__init__.py": "",
        "platform/rayloop/data/order.py": "order",
        "docs/page.md": "text",
        "build/lib.py": "x",
        "weights.bin": "x" * 100,
        "keep.bin": "kept",
        ".venv/lib/torch.so": "x" * 1000,
        ".git/objects/00": "x",
        ".env": "PASSWORD=x",
        "jobs/server.pem": "x",
        "home/datasets/rows": "x" * 1000,
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def names(package) -> list[str]:
    return [name for name, _ in package.files]


def test_the_ignore_files_decide_each_for_its_own_folder(checkout: Path) -> None:
    package = collect(checkout, home=checkout / "home")
    assert names(package) == [
        "jobs/train.py",
        "keep.bin",
        "platform/rayloop/__init__.py",
        "platform/rayloop/data/order.py",
    ]
    assert package.num_bytes == len("print()") + len("kept") + len("order")


def test_data_beside_the_code_is_named_where_it_makes_the_package_too_large(checkout: Path) -> None:
    with pytest.raises(RequestError) as caught:
        collect(checkout, limit_bytes=500)
    assert "largest files are home/datasets/rows (0.0 MiB), jobs/train.py" in str(caught.value)
    assert ".rayignore" in str(caught.value)


def test_countless_files_are_refused_before_they_are_all_looked_at(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayloop.submit.package.MOST_FILES", 20)
    for number in range(30):
        (checkout / "home" / f"{number}.png").write_text("x")
    with pytest.raises(RequestError, match=r"more than 20 files .* most are under home\."):
        collect(checkout)


def test_equal_code_has_an_equal_digest_and_a_changed_line_another(checkout: Path) -> None:
    before = collect(checkout).digest()
    (checkout / ".venv" / "new").write_text("x")
    (checkout / "train.log").write_text("what the job itself prints is in its package")
    assert collect(checkout).digest() == before
    (checkout / "jobs" / "train.py").write_text("print(1)")
    assert collect(checkout).digest() != before


def test_the_copy_has_the_code_as_a_module_apart_from_the_working_folder(checkout: Path) -> None:
    with staged(collect(checkout)) as (working, code):
        assert (code / "data" / "order.py").read_text() == "order"
        assert code.name == "rayloop"
        assert (working / "jobs" / "train.py").is_file()
        assert not (working / "platform").exists()
    assert not working.exists()


def test_a_folder_that_is_no_checkout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no checkout of rayloop"):
        collect(tmp_path)


def test_a_link_to_a_folder_is_not_followed(checkout: Path) -> None:
    (checkout / "everything").symlink_to("/")
    assert "everything" not in "".join(names(collect(checkout)))


def test_this_repository_is_far_below_the_limit() -> None:
    package = collect(ROOT, home=ROOT / ".rayloop")
    assert package.num_bytes < 8 * 2**20
    assert "jobs/train.py" in names(package)
    assert not [name for name in names(package) if name.startswith(("tests/", "benchmarks/"))]


def test_nothing_of_this_repositorys_code_is_taken_for_a_secret() -> None:
    shipped = names(collect(ROOT, home=None))
    for folder in ("platform/rayloop", "jobs", "serve_apps"):
        code = (
            path.relative_to(ROOT).as_posix()
            for path in (ROOT / folder).rglob("*.py")
            if path.is_file()
        )
        assert set(code) <= set(shipped)
