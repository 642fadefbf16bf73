"""Find Fashion-MNIST's four files wherever they are, verify their content, and read them.

Looked for in this order: RAYLOOP_HOME/downloads, Debian's package `dataset-fashion-mnist` as
installed, torchvision's download, the same Debian package fetched and unpacked without root.
Digests are over the unpacked content, since Debian's files are compressed anew.
"""

import gzip
import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rayloop.errors import Corrupt, DataMissing
from rayloop.logs import stage_logger

log = stage_logger("data")

CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
CONTENT_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
DOWNLOAD_TIMEOUT_S = 60

Split = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]


def load(downloads: Path) -> dict[str, Split]:
    """Images (N, 28, 28, 1) and labels (N,) of the splits `train` and `test`.

    Args:
        downloads: Folder where files are looked for first and kept when they are fetched.

    Raises:
        DataMissing: The files are nowhere and cannot be fetched.
        Corrupt: A file's content does not match its digest.
    """
    folder = find(downloads)
    return {
        split: (
            _read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")[..., None],
            _read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz").astype(np.int64),
        )
        for split, prefix in (("train", "train"), ("test", "t10k"))
    }


def find(downloads: Path) -> Path:
    """The folder that holds all four files, fetching them if need be."""
    target = downloads / "fashion-mnist"
    for folder in (target, DEBIAN_FOLDER):
        if _is_complete(folder):
            return folder
    for fetch, where in (
        (_fetch_with_torchvision, "torchvision's download"),
        (_fetch_debian_package, f"Debian's package {DEBIAN_PACKAGE}, unpacked without root"),
    ):
        log.info("looking for Fashion-MNIST: %s", where)
        with _staging(downloads) as staged:
            found = fetch(staged)
            if found is not None and _is_complete(found):
                target.mkdir(parents=True, exist_ok=True)
                for name in CONTENT_SHA256:
                    shutil.move(found / f"{name}.gz", target / f"{name}.gz")
                return target
    raise DataMissing(
        f"Fashion-MNIST is not in {target} nor in {DEBIAN_FOLDER}, and neither torchvision's "
        f"download nor 'apt-get download {DEBIAN_PACKAGE}' could be reached. Put the four "
        f"*-ubyte.gz files into {target}, or install the package: apt-get install {DEBIAN_PACKAGE}"
    )


def _is_complete(folder: Path) -> bool:
    return all((folder / f"{name}.gz").is_file() for name in CONTENT_SHA256)


@contextmanager
def _staging(downloads: Path) -> Iterator[Path]:
    downloads.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=downloads) as folder:
        yield Path(folder)


def _read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """Read one file of the IDX format: magic number, sizes as big-endian int32, then bytes."""
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise Corrupt(f"{path} cannot be unpacked ({error}); remove it and run again.") from None
    digest = hashlib.sha256(content).hexdigest()
    if digest != CONTENT_SHA256[path.name.removesuffix(".gz")]:
        raise Corrupt(
            f"{path} does not hold the published Fashion-MNIST (SHA-256 of its content is "
            f"{digest[:12]}...); remove it and run again."
        )
    num_dims = content[3]
    sizes = np.frombuffer(content, ">i4", num_dims, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * num_dims).reshape(sizes)


def _fetch_with_torchvision(staged: Path) -> Path | None:
    """Torchvision's download."""
    code = (
        "import sys; from torchvision.datasets import FashionMNIST; "
        "FashionMNIST(sys.argv[1], download=True)"
    )
    if not _succeeds([sys.executable, "-c", code, str(staged)], staged):
        return None
    return staged / "FashionMNIST" / "raw"


def _fetch_debian_package(staged: Path) -> Path | None:
    """The Debian package, fetched and unpacked without root."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        return None
    for folder in ("lists/partial", "archives/partial"):
        (staged / folder).mkdir(parents=True)
    private = [
        *("-o", f"Dir::State::Lists={staged / 'lists'}"),
        *("-o", f"Dir::Cache::Archives={staged / 'archives'}"),
        *("-o", "Dir::Cache::pkgcache="),
        *("-o", "Dir::Cache::srcpkgcache="),
        *("-o", "Debug::NoLocking=1"),
    ]
    fetched = _succeeds(["apt-get", *private, "-q", "update"], staged) and _succeeds(
        ["apt-get", *private, "-q", "download", DEBIAN_PACKAGE], staged
    )
    packages = sorted(staged.glob(f"{DEBIAN_PACKAGE}_*.deb"))
    if not fetched or not packages:
        return None
    if not _succeeds(["dpkg-deb", "-x", str(packages[0]), str(staged / "unpacked")], staged):
        return None
    return staged / "unpacked" / DEBIAN_FOLDER.relative_to("/")


def _succeeds(command: list[str], folder: Path) -> bool:
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        log.info("%s gave no answer within %d s", command[0], DOWNLOAD_TIMEOUT_S)
        return False
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        log.info("%s did not succeed: %s", Path(command[0]).name, reason)
    return done.returncode == 0
