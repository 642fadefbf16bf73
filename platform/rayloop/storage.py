"""Atomic put, get and list of files over one root: a local folder or an `s3://` prefix.

Readers never see half a write. On a local folder a file is written beside its place, synced
and renamed; a whole folder is staged beside its place and renamed. On an object store a put is
atomic by itself, and a folder counts as visible once its marker file, always written last, exists.
"""

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from pyarrow import fs as pafs

from rayloop.errors import Corrupt, DataMissing


def home() -> str:
    """Where everything rayloop writes lives: RAYLOOP_HOME, else `.rayloop` in the current folder.

    Always an absolute path or an URI, since Ray workers run in other folders.
    """
    root = os.environ.get("RAYLOOP_HOME", "") or ".rayloop"
    return root if "://" in root else str(Path(root).resolve())


class Storage:
    """Files under one root, addressed by relative POSIX paths.

    Args:
        root: An absolute folder or an URI pyarrow understands (`s3://bucket/prefix`).
    """

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/")
        self.is_local = "://" not in self.root
        if self.is_local:
            self._fs, self._base = pafs.LocalFileSystem(), self.root
        else:
            self._fs, self._base = pafs.FileSystem.from_uri(self.root)

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

    def exists(self, path: str) -> bool:
        """Whether a file or folder is there."""
        return bool(self._fs.get_file_info(self._full(path)).type != pafs.FileType.NotFound)

    def names(self, folder: str) -> list[str]:
        """Sorted names directly under a folder; empty when the folder is missing.

        Names that start with a dot are staging leftovers and are not listed.
        """
        selector = pafs.FileSelector(self._full(folder), allow_not_found=True)
        found = (os.path.basename(info.path) for info in self._fs.get_file_info(selector))
        return sorted(name for name in found if not name.startswith("."))

    def read(self, path: str) -> bytes:
        """The bytes of a file.

        Raises:
            DataMissing: There is no such file.
        """
        try:
            with self._fs.open_input_stream(self._full(path)) as stream:
                return bytes(stream.read())
        except FileNotFoundError:
            raise DataMissing(f"There is no file {self.path(path)}.") from None

    def write(self, path: str, content: bytes) -> None:
        """Put a file in one step: readers see the old content or the new, never a part."""
        if not self.is_local:
            with self._fs.open_output_stream(self._full(path)) as stream:
                stream.write(content)
            return
        target = Path(self._full(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        try:
            with staged.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            staged.replace(target)
        finally:
            staged.unlink(missing_ok=True)

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

    def remove(self, folder: str) -> None:
        """Remove a folder and all it holds; nothing happens when it is missing."""
        if self.exists(folder):
            self._fs.delete_dir(self._full(folder))

    def publish(self, staged: Path, folder: str) -> None:
        """Make a local folder visible as `folder` in one step.

        A folder that is there already is replaced, and is gone for the moment between two renames.
        Remotely the files are copied in name order with `manifest.json` last, which is the marker
        a reader looks for.
        """
        if self.is_local:
            target = Path(self._full(folder))
            target.parent.mkdir(parents=True, exist_ok=True)
            hidden = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
            shutil.copytree(staged, hidden)
            if target.exists():
                retired = target.with_name(f".{target.name}.old-{uuid.uuid4().hex[:8]}")
                target.rename(retired)
                hidden.rename(target)
                shutil.rmtree(retired)
            else:
                hidden.rename(target)
            return
        files = sorted(
            (path for path in staged.rglob("*") if path.is_file()),
            key=lambda path: (path.name == "manifest.json", str(path)),
        )
        for path in files:
            self.write(f"{folder}/{path.relative_to(staged).as_posix()}", path.read_bytes())

    def _full(self, path: str) -> str:
        return f"{self._base}/{path}" if path else self._base
