"""A name under a root -> a lock that one process of the machine has at a time."""

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rayloop.errors import RequestError
from rayloop.storage import Storage, refusal_is_told


@contextmanager
def exclusive(storage: Storage, name: str, refused: str = "") -> Iterator[None]:
    """Hold a file lock under a local root, among all processes of this machine.

    A remote root has its locks in the temp folder: they hold among the processes of one machine,
    and between machines the tracking server orders the writers.

    Args:
        storage: The root.
        name: Of the lock.
        refused: What to say where another process has it; empty waits for it.

    Raises:
        RequestError: Another process has it, and `refused` says so.
        StorageRefused: The folder cannot be made or written.
    """
    folder = storage.local_path() or _stand_in(storage)
    with refusal_is_told(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / f".{name}.lock").open("w")
    with file as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (fcntl.LOCK_NB if refused else 0))
        except BlockingIOError:
            raise RequestError(refused) from None
        yield


def _stand_in(storage: Storage) -> Path:
    name = hashlib.sha256(storage.root.encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"rayloop-locks-{os.getuid()}" / name
