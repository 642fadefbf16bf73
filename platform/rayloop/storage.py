"""Atomic put, get and list of files over one root: a local folder or an `s3://` prefix.

Readers never see half a write, nor does a power cut leave one. On a local folder a file or a whole
folder is written beside its place, synced and renamed. On an object store a put is atomic by
itself, and a folder counts as visible once its marker file, always written last, exists: see
`rayloop.remote`.
"""

import ctypes
import errno
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedWriter
from pathlib import Path
from typing import Any

from pyarrow import fs as pafs

from rayloop import remote
from rayloop.errors import ConfigError, Corrupt, DataMissing, StorageFull, StorageRefused

NOT_OURS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST)
"""Reasons why a folder cannot be made or written that are of the folder, and not of the disk."""


def home() -> str:
    """Where everything rayloop writes lives: RAYLOOP_HOME, else `.rayloop` in the current folder.

    Always an absolute path or an URI, since Ray workers run in other folders.

    Raises:
        ConfigError: It is neither.
    """
    root = os.environ.get("RAYLOOP_HOME", "") or ".rayloop"
    if re.match(r"\w+:/(?!/)", root):
        raise ConfigError(
            f"RAYLOOP_HOME={root} is no folder, and as an address it lacks a slash; it is written "
            "s3://BUCKET/PREFIX."
        )
    return str(Path(root).resolve()) if is_local(root) else root


def is_local(root: str) -> bool:
    """Whether a root is a folder of this machine, or of what is mounted on it."""
    return "://" not in root


def refuse_short(stream: BufferedWriter, num_bytes: int) -> None:
    """Raise "no space left" where a disk took fewer bytes than it was given and kept silent."""
    size = os.fstat(stream.fileno()).st_size
    if size != num_bytes:
        raise OSError(errno.ENOSPC, f"only {size:,} of {num_bytes:,} bytes were written")


class Storage:
    """Files under one root, addressed by relative POSIX paths.

    Args:
        root: An absolute folder or an URI pyarrow understands (`s3://bucket/prefix`).

    Raises:
        ConfigError: The root is not written as an address, or of a kind that is not known.
        StorageRefused: It has no such bucket, or the keys in the environment do not open it. Any
            method may raise this too, where it is not allowed.
        StorageUnreachable: Its server does not answer, now or in any method.
    """

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/")
        self.is_local = is_local(root)
        if self.is_local:
            self._fs, self._base = pafs.LocalFileSystem(), self.root
        else:
            self._fs, self._base = remote.open_files(root)

    def __repr__(self) -> str:
        return f"Storage({self.root!r})"

    def __reduce__(self) -> tuple[type["Storage"], tuple[str]]:
        return Storage, (self.root,)

    def path(self, *parts: str) -> str:
        """The full path or URI of a relative path."""
        return "/".join([self.root, *parts])

    def local_path(self, *parts: str) -> Path | None:
        """The file as a local path, to memory-map or to hand to a library; None when remote."""
        return Path(self.path(*parts)) if self.is_local else None

    def for_library(self, folder: str) -> tuple[pafs.FileSystem | None, str]:
        """A folder for a library that writes by itself: the path, and where, None for locally."""
        return None if self.is_local else self._fs, self._full(folder)

    def exists(self, path: str) -> bool:
        """Whether a file or folder is there."""
        full = self._full(path)
        with remote.explained(full):
            return bool(self._fs.get_file_info(full).type != pafs.FileType.NotFound)

    def names(self, folder: str) -> list[str]:
        """Sorted names directly under a folder; empty when the folder is missing.

        Names that start with a dot are staging leftovers and are not listed.
        """
        full = self._full(folder)
        try:
            with remote.explained(full):
                infos = self._fs.get_file_info(pafs.FileSelector(full, allow_not_found=True))
        except FileNotFoundError:  # it was made or removed between two calls inside pyarrow
            return []
        found = (os.path.basename(info.path) for info in infos)
        return sorted(name for name in found if not name.startswith("."))

    def read(self, path: str) -> bytes:
        """The bytes of a file.

        Raises:
            DataMissing: There is no such file.
        """
        try:
            if not self.is_local:
                return remote.read(self._fs, self._full(path))
            with self._fs.open_input_stream(self._full(path), compression=None) as stream:
                return bytes(stream.read())
        except FileNotFoundError:
            raise DataMissing(f"There is no file {self.path(path)}.") from None

    def write(self, path: str, content: bytes) -> None:
        """Put a file in one step: readers see the old content or the new, never a part.

        Raises:
            StorageFull: The local disk has no room; the old content is still there.
        """
        if not self.is_local:
            remote.write(self._fs, self._full(path), content)
            return
        target = Path(self._full(path))
        with _full_is_told(target, len(content)), _hidden_beside(target) as staged:
            _fill(staged, content)
            staged.replace(target)
            _sync(target.parent)

    def create(self, path: str, content: bytes) -> bool:
        """Put a file in one step unless there is one; of several writers one alone succeeds.

        That holds for all processes that share a local folder, and on S3 where the keys are in the
        environment and the server knows conditional puts. Elsewhere it is a look and then a put: of
        two writers at the same moment the last one wins, and both are told that they made it.

        Returns:
            Whether this call made the file; if not, the one that is there is as it was.

        Raises:
            StorageFull: The local disk has no room.
        """
        if self.exists(path):
            return False
        if not self.is_local:
            return remote.create(self._fs, self.root, self._full(path), content)
        target = Path(self._full(path))
        with _full_is_told(target, len(content)), _hidden_beside(target) as staged:
            _fill(staged, content)
            try:
                os.link(staged, target)
            except FileExistsError:
                return False
            _sync(target.parent)
        return True

    def read_json(self, path: str) -> dict[str, Any]:
        """A file that holds one JSON object.

        Raises:
            DataMissing: There is no such file.
            Corrupt: The file is not a JSON object.
        """
        try:
            value = json.loads(self.read(path))
        except ValueError as error:
            raise Corrupt(
                f"{self.path(path)} is not valid JSON ({error}); it was damaged outside rayloop. "
                "Remove its folder and run the job that writes it again."
            ) from None
        if not isinstance(value, dict):
            raise Corrupt(f"{self.path(path)} holds {type(value).__name__}, not a JSON object.")
        return value

    def write_json(self, path: str, value: object) -> None:
        """Put one JSON object, keys sorted so that equal values give equal bytes."""
        text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False)
        self.write(path, text.encode() + b"\n")

    def remove(self, path: str) -> None:
        """Remove a file, or a folder and all it holds; nothing happens when it is missing.

        On an object store the marker goes first, so that a folder is gone or whole throughout.
        """
        if not self.is_local:
            remote.remove(self._fs, self._full(path))
            return
        kind = self._fs.get_file_info(self._full(path)).type
        if kind == pafs.FileType.Directory:
            self._fs.delete_dir(self._full(path))
        elif kind != pafs.FileType.NotFound:
            self._fs.delete_file(self._full(path))

    @contextmanager
    def staging(self, folder: str, num_bytes: int = 0) -> Iterator[Path]:
        """Lend an empty local folder that becomes `folder` in one step when the block ends well.

        It lies beside its place, so that gigabytes are written once; all of it is on the disk
        before it gets its name. A folder that is there already is replaced, on Linux without a
        moment in which there is none. When the block raises, nothing has changed.
        Remotely the files are copied in name order with the marker last, which a reader looks for;
        where the folder is replaced, the old marker goes first.

        Args:
            folder: Where it will be, relative to the root.
            num_bytes: About how much will be written, for the message when that is too much.

        Raises:
            StorageFull: The local disk has no room; what was there before is still there.
        """
        if self.is_local:
            target = Path(self._full(folder))
            with _full_is_told(target, num_bytes), _hidden_beside(target) as hidden:
                hidden.mkdir()
                yield hidden
                _sync_tree(hidden)
                _put_in_place(hidden, target)
            return
        with tempfile.TemporaryDirectory(prefix="rayloop-staged-") as name:
            with _full_is_told(Path(name), num_bytes, larger="TMPDIR"):
                yield Path(name)
            remote.upload(self._fs, Path(name), self._full(folder))

    def publish(self, staged: Path, folder: str) -> None:
        """Make a copy of a local folder visible as `folder` in one step, as `staging` does.

        Raises:
            StorageFull: The local disk has no room; what was there before is still there.
        """
        if not self.is_local:
            remote.upload(self._fs, staged, self._full(folder))
            return
        paths = sorted(staged.rglob("*"))
        num_bytes = sum(path.stat().st_size for path in paths if path.is_file())
        with self.staging(folder, num_bytes) as hidden:
            for path in paths:
                copy = hidden / path.relative_to(staged)
                if path.is_dir():
                    copy.mkdir()
                else:
                    shutil.copyfile(path, copy)

    def _full(self, path: str) -> str:
        return f"{self._base}/{path}" if path else self._base


@contextmanager
def refusal_is_told(folder: Path) -> Iterator[None]:
    """Turn the reason why a folder cannot be made or written into a StorageRefused.

    Args:
        folder: It, or the nearest that is there.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in NOT_OURS:
            raise
        raise StorageRefused(
            f"{folder} cannot be written ({error.strerror}). What rayloop writes lies under "
            "RAYLOOP_HOME; set it to a folder that is yours to write, on a cluster to one that "
            "every node has, or to s3://BUCKET/PREFIX, and run the same command again."
        ) from None


@contextmanager
def _full_is_told(target: Path, num_bytes: int, larger: str = "RAYLOOP_HOME") -> Iterator[None]:
    """Turn "no space left" into a StorageFull that says where and how much is needed.

    Args:
        target: What is written.
        num_bytes: How much it will be; 0 for not known.
        larger: The variable that moves it to another disk.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        there = next(folder for folder in target.parents if folder.is_dir())
        disk = next(folder for folder in (there, *there.parents) if folder.is_mount())
        space = os.statvfs(there)
        free_bytes = space.f_bavail * space.f_frsize
        need = f"It needs {num_bytes:,} bytes; the" if num_bytes else "The"
        is_other = 0 < num_bytes <= free_bytes
        other = " (so a quota or its inodes are used up)" if is_other else ""
        raise StorageFull(
            f"Writing {target} failed: {error.strerror}. {need} filesystem at {disk} has "
            f"{free_bytes:,} bytes free{other}. Nothing that was there before has changed. Free "
            f"some space there, or set {larger} to a folder on a larger disk, and run the same "
            "command again."
        ) from error


@contextmanager
def _hidden_beside(target: Path) -> Iterator[Path]:
    """A free hidden name in the target's folder; what still has it at the end is removed."""
    hidden = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    with refusal_is_told(target.parent):
        _make_folder(target.parent)
        if not os.access(target.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    try:
        yield hidden
    finally:
        if hidden.is_dir():
            shutil.rmtree(hidden)
        else:
            hidden.unlink(missing_ok=True)


def _fill(staged: Path, content: bytes) -> None:
    """Write a file and wait until all of it is on the disk."""
    with staged.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
        refuse_short(stream, len(content))


def _make_folder(folder: Path) -> None:
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        _sync(path.parent)


def _sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network filesystems cannot sync a folder and need not.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(handle)


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _put_in_place(hidden: Path, target: Path) -> None:
    """Give the hidden folder its name; the one that had it, if any, becomes the hidden one."""
    if not target.exists():
        hidden.rename(target)
    elif not _exchange(hidden, target):
        retired = hidden.with_name(f"{hidden.name}.old")
        target.rename(retired)
        hidden.rename(target)
        retired.rename(hidden)
    _sync(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Let two names change places in one step; False where the system or filesystem cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)
