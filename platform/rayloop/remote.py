"""Files and whole folders on an object store, which can neither rename nor lock.

A put replaces an object in one step, so a file is always whole. A folder is a common prefix, and it
is there once its marker is: the file that is put last and removed first. So an upload that is cut
off leaves nothing that counts, and the next one to the same place clears it away.

Where a folder is replaced there is a time without one. That is for the better: the folders that are
ever replaced (a checkpoint that did not match its digest, a run that is quantized again) are judged
by digests that their marker holds, so a reader that began with the old marker and meets new files
says that they do not match, and is never given a mix.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache
from pathlib import Path

import pyarrow as pa
from pyarrow import fs as pafs

from rayloop import s3
from rayloop.credentials import without_credentials
from rayloop.errors import ConfigError
from rayloop.logs import stage_logger

log = stage_logger("storage")

MARKERS = ("manifest.json", "release.json", "result.json")
"""Names of the files that are the last of their folder, in the folder itself."""


def open_files(root: str) -> tuple[pafs.FileSystem, str]:
    """The file system of an address and the path in it.

    Raises:
        ConfigError: It is not written as an address, or of a kind that is not known.
        StorageRefused: There is no such bucket, or the keys do not open it.
        StorageUnreachable: The server does not answer.
    """
    if root.startswith(s3.SCHEME):
        return s3.open_s3(root)
    try:
        return pafs.FileSystem.from_uri(root)  # type: ignore[no-any-return]
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ConfigError(
            f"{without_credentials(root)} cannot be read or written "
            f"({without_credentials(str(error))}). Give a folder, or s3://BUCKET/PREFIX."
        ) from None


def explained(path: str) -> AbstractContextManager[None]:
    """What makes sentences of a server's errors; those of the local disk pass through it."""
    return nullcontext() if path.startswith("/") else s3.explained(path)


def read(files: pafs.FileSystem, path: str) -> bytes:
    """The bytes of a file, all of the same put.

    pyarrow asks for the size and then for so many bytes. Where a longer file is put in between, it
    would lose its end; where the file goes, pyarrow does not find room for the server's answer. So
    the file's tag is compared afterwards, and only what did not change meanwhile is believed.

    Raises:
        FileNotFoundError: There is none.
    """
    with explained(path):
        while True:
            content, failure = b"", None
            with files.open_input_file(path) as stream:
                before = stream.metadata()
                try:
                    content = bytes(stream.read())
                except OSError as error:
                    failure = error
            with files.open_input_file(path) as stream:
                is_same = stream.metadata() == before
            if is_same and failure:
                raise failure
            if is_same:
                return content


def write(files: pafs.FileSystem, path: str, content: bytes | pa.Buffer) -> None:
    """Put a file in one step.

    There is one `write`, and no `close` after it failed: a stream that is closed half-way would put
    what it has so far.
    """
    with explained(path):
        stream = files.open_output_stream(path, compression=None)
        stream.write(content)
        stream.close()


def create(files: pafs.FileSystem, root: str, path: str, content: bytes) -> bool:
    """Put a file that was not there a moment ago; of several writers one, as far as can be had."""
    made = s3.put_if_absent(path, content) if root.startswith(s3.SCHEME) else None
    if made is not None:
        return made
    _warn_once(root)
    write(files, path, content)
    return True


@cache
def _warn_once(root: str) -> None:
    log.warning(
        "%s is written without conditional puts, since its keys are not in the environment or the "
        "server has none: two traffic changes or labels at the same moment may both be taken",
        root,
    )


def remove(files: pafs.FileSystem, path: str) -> None:
    """Remove a file, or a folder, its marker first; nothing happens when it is missing."""
    with explained(path):
        kind = files.get_file_info(path).type
        if kind == pafs.FileType.File:
            _delete(files, [path])
        elif kind == pafs.FileType.Directory:
            _delete(files, sorted(_files_in(files, path) & _markers_of(path)))
            files.delete_dir(path)


def upload(files: pafs.FileSystem, staged: Path, folder: str) -> None:
    """Put all files of a local folder, the marker last; what else the remote folder had goes."""
    names = sorted(
        (path.relative_to(staged).as_posix() for path in staged.rglob("*") if path.is_file()),
        key=lambda name: (name in MARKERS, name),
    )
    with explained(folder):
        old = _files_in(files, folder, recursive=True)
        markers = _markers_of(folder)
        _delete(files, sorted(old & markers))
        _delete(files, sorted(old - markers - {f"{folder}/{name}" for name in names}))
    for name in names:
        path = staged / name
        content = pa.memory_map(str(path)).read_buffer() if path.stat().st_size else b""
        write(files, f"{folder}/{name}", content)


def _files_in(files: pafs.FileSystem, folder: str, recursive: bool = False) -> set[str]:
    selector = pafs.FileSelector(folder, allow_not_found=True, recursive=recursive)
    return {i.path for i in files.get_file_info(selector) if i.type == pafs.FileType.File}


def _markers_of(folder: str) -> set[str]:
    return {f"{folder}/{name}" for name in MARKERS}


def _delete(files: pafs.FileSystem, paths: Iterable[str]) -> None:
    """Remove files; those that another process has removed meanwhile are as they should be."""
    for path in paths:
        with suppress(FileNotFoundError):
            files.delete_file(path)
