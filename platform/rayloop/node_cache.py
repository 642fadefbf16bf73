"""A remote file and its digest -> a local copy to memory-map, one for all processes of a node.

Copies lie in the temp folder under the SHA-256 of their content, so one that is there is the right
one, whatever root it came from. They are bounded: the ones that were not asked for the longest go.
A process that has one mapped keeps it until it is done with it.
"""

import contextlib
import os
import shutil
import tempfile
import uuid
from pathlib import Path

from rayloop.storage import Storage

MOST_BYTES = 32 << 30
"""Size of all copies of a node together."""
MOST_SHARE = 0.5
"""Share (0..1) of the temp folder's free space that copies may take."""


def cache_folder() -> Path:
    """Where this user's copies lie on this node."""
    return Path(tempfile.gettempdir()) / f"rayloop-cache-{os.getuid()}"


def local_copy(storage: Storage, path: str, sha256: str, num_bytes: int) -> Path | None:
    """A local file with the content of a remote one; None where there is no room for it.

    What is fetched is not judged here: the caller compares the digest, and calls `drop` where it
    differs.

    Args:
        storage: The remote root.
        path: The file, relative to it.
        sha256: Of its content.
        num_bytes: Its size.

    Raises:
        DataMissing: There is no such file.
    """
    folder = cache_folder()
    target = folder / sha256
    with contextlib.suppress(FileNotFoundError):
        os.utime(target)
        return target
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.lstat().st_uid != os.getuid() or not _make_room(folder, num_bytes):
        return None
    staged = folder / f".{sha256}.{uuid.uuid4().hex[:8]}"
    content = storage.read(path)
    try:
        staged.write_bytes(content)
        staged.replace(target)
    except OSError:  # no room after all, or another process made room of this one
        return None
    finally:
        staged.unlink(missing_ok=True)
    return target


def drop(sha256: str) -> None:
    """Remove a copy that is not what its name says."""
    (cache_folder() / sha256).unlink(missing_ok=True)


def _make_room(folder: Path, num_bytes: int) -> bool:
    """Remove the copies that were not asked for the longest, until there is room if there can be.

    Half-fetched files of processes that were killed are removed like any other.
    """
    found = []
    for copy in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            about = copy.stat()
            found.append((about.st_mtime, about.st_size, copy))
    used_bytes = sum(size for _, size, _ in found)
    limit = min(MOST_BYTES, int((shutil.disk_usage(folder).free + used_bytes) * MOST_SHARE))
    if num_bytes > limit:
        return False
    for _, size, copy in sorted(found):
        if used_bytes + num_bytes <= limit:
            break
        copy.unlink(missing_ok=True)
        used_bytes -= size
    return True
