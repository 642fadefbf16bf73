"""A checkout -> the files a submitted job needs: no data, no environments, below a limit.

Ignore files decide as they do for `ray job submit`: `.gitignore` and `.rayignore`, each for its own
folder and those under it.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pathspec import GitIgnoreSpec

from rayloop.errors import RequestError

LIMIT_BYTES = 64 * 2**20
"""Each node of a cluster fetches the package through the head, which keeps it in its memory."""

MOST_FILES = 20_000
SHOWN_FILES = 5
CODE = "platform/rayloop"
"""The package's folder; it is shipped as a module, so that every worker imports it by name."""

ALWAYS_LEFT_OUT = (
    ".git", ".venv*", "venv", "__pycache__", ".rayloop", "*.egg-info", "*.pyc",
    # Likely secrets, which a cluster would keep and hand to every node.
    ".env*", "*.pem", "*.key", "id_rsa*", "id_ed25519*", "credentials*", ".netrc", ".pypirc",
)  # fmt: skip
DECIDING = (f"{CODE}/", "jobs/", "serve_apps/")
"""Where the code of a job is; other files, such as a log of its own, do not make another job."""

IGNORE_FILES = (".gitignore", ".rayignore")


@dataclass(frozen=True, slots=True)
class Package:
    """What is shipped.

    Attributes:
        root: The checkout.
        files: Paths relative to it, and their sizes in bytes, in name order.
    """

    root: Path
    files: tuple[tuple[str, int], ...]

    @property
    def num_bytes(self) -> int:
        """Size of all files, uncompressed."""
        return sum(size for _, size in self.files)

    def digest(self) -> str:
        """SHA-256 over names and contents of the code: equal for equal code on any machine."""
        total = hashlib.sha256()
        for name in (name for name, _ in self.files if name.startswith(DECIDING)):
            content = hashlib.sha256((self.root / name).read_bytes())
            total.update(f"{name}\0{content.hexdigest()}\n".encode())
        return total.hexdigest()


def collect(root: Path, home: Path | None = None, limit_bytes: int = LIMIT_BYTES) -> Package:
    """Find what to ship.

    Args:
        root: The checkout.
        home: RAYLOOP_HOME where it is a folder: its data stays here.
        limit_bytes: Most bytes a package may have.

    Raises:
        RequestError: It is no checkout of rayloop, or too large; the message names what is largest.
    """
    if not (root / CODE / "__init__.py").is_file():
        raise RequestError(
            f"{root} is no checkout of rayloop: it has no {CODE}. Run the command from the "
            "repository's root."
        )
    files: list[tuple[str, int]] = []
    for path in _walk(root, root, (), home.resolve() if home else None):
        files.append((path.relative_to(root).as_posix(), path.stat().st_size))
        if len(files) > MOST_FILES:
            raise RequestError(
                f"{root} holds more than {MOST_FILES:,} files that would be shipped with the job; "
                f"most are under {_fullest(files)}. Add that folder to .rayignore, or move it away."
            )
    package = Package(root, tuple(sorted(files)))
    if package.num_bytes > limit_bytes:
        largest = sorted(files, key=lambda file: -file[1])[:SHOWN_FILES]
        shown = ", ".join(f"{name} ({size / 2**20:.1f} MiB)" for name, size in largest)
        raise RequestError(
            f"The job's package would have {package.num_bytes / 2**20:.1f} MiB, and at most "
            f"{limit_bytes / 2**20:.0f} MiB are shipped to every node. The largest files are "
            f"{shown}. Data belongs into a dataset version under RAYLOOP_HOME; add what the job "
            "does not need to .rayignore."
        )
    return package


def _walk(
    folder: Path, root: Path, specs: tuple[tuple[Path, GitIgnoreSpec], ...], home: Path | None
) -> Iterator[Path]:
    lines = [
        line
        for name in IGNORE_FILES
        if (folder / name).is_file()
        for line in (folder / name).read_text().splitlines()
    ]
    if folder == root:
        lines = [*ALWAYS_LEFT_OUT, *lines]
    specs = (*specs, (folder, GitIgnoreSpec.from_lines(lines))) if lines else specs
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            path = Path(entry.path)
            is_folder = entry.is_dir(follow_symlinks=False)
            if _is_left_out(path, is_folder, specs) or (home and path.resolve() == home):
                continue
            if is_folder:
                yield from _walk(path, root, specs, home)
            elif entry.is_file() and entry.name not in IGNORE_FILES:
                yield path


def _is_left_out(
    path: Path, is_folder: bool, specs: tuple[tuple[Path, GitIgnoreSpec], ...]
) -> bool:
    for base, spec in specs:
        name = path.relative_to(base).as_posix() + ("/" if is_folder else "")
        if spec.match_file(name):
            return True
    return False


def _fullest(files: list[tuple[str, int]]) -> str:
    counts: dict[str, int] = {}
    for name, _ in files:
        folder = name.rpartition("/")[0] or "."
        counts[folder] = counts.get(folder, 0) + 1
    return max(counts, key=lambda folder: counts[folder])


@contextmanager
def staged(package: Package) -> Iterator[tuple[Path, Path]]:
    """Lend a copy of the package for as long as it is being shipped.

    Yields:
        The working folder, without the package's code, and the code's own folder `rayloop`.
    """
    with tempfile.TemporaryDirectory(prefix="rayloop-ship-") as name:
        working, code = Path(name) / "working", Path(name) / "code"
        for file, _ in package.files:
            target = code / "rayloop" / file.removeprefix(f"{CODE}/")
            if not file.startswith(f"{CODE}/"):
                target = working / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(package.root / file, target)
        yield working, code / "rayloop"
