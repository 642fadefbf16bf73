"""Nested tensors -> a copy in CPU memory, bytes with their digest, a manifest that seals itself."""

import copy
import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from rayloop.errors import Corrupt
from rayloop.storage import refuse_short

State = dict[str, Any]


def snapshot(value: Any, into: Any = None) -> Any:
    """A copy in CPU memory of nested dicts, lists and tuples of tensors and plain values.

    Each tensor is copied once, also from a GPU; nothing in the copy changes when training goes on.

    Args:
        value: What to copy.
        into: An earlier copy that nobody needs any more. Its memory is used again where a tensor
            has the same place and layout, which is some five times faster than fresh memory.
    """
    if isinstance(value, torch.Tensor):
        if isinstance(into, torch.Tensor) and _layout(into) == _layout(value):
            return into.copy_(value.detach())
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        before = into if isinstance(into, dict) else {}
        copied = copy.copy(value)  # keeps what torch attaches to a state dict
        for key in copied:
            copied[key] = snapshot(value[key], before.get(key))
        return copied
    if type(value) in (list, tuple):
        earlier = into if type(into) is type(value) else ()
        pairs = itertools.zip_longest(value, earlier[: len(value)])
        return type(value)(snapshot(each, old) for each, old in pairs)
    return copy.deepcopy(value)


def _layout(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype


def state_bytes(state: State) -> int:
    """Bytes of all tensors in a nested state, which is nearly all that its file takes."""
    return sum(tensor.nbytes for tensor in _tensors(state))


def write_state(path: Path, state: State) -> str:
    """Write a state for `torch.load(weights_only=True)`; gives the SHA-256 of the file.

    The bytes are digested on their way, so there is no second copy of them in memory.

    Raises:
        OSError: The file cannot be written.
    """
    file = _DigestedFile(path)
    try:
        torch.save(state, file)  # type: ignore[arg-type]
    finally:
        sha256 = file.close()
    return sha256


def manifest_bytes(manifest: dict[str, Any]) -> bytes:
    """The text of a manifest with one field more, `manifest_sha256`, over all the others."""
    digest = hashlib.sha256(_json_bytes(manifest)).hexdigest()
    return _json_bytes({**manifest, "manifest_sha256": digest})


def verified_manifest(content: bytes, where: str) -> dict[str, Any]:
    """The manifest, if its bytes are exactly those that were written.

    Args:
        content: The file's bytes.
        where: What to call the checkpoint in an error.

    Raises:
        Corrupt: It is not JSON, lacks a field, or has been changed.
    """
    try:
        manifest = json.loads(content, parse_constant=_refuse_constant)
    except ValueError as error:
        raise Corrupt(f"{where} has a manifest.json that is not JSON ({error}).") from None
    fields = manifest if isinstance(manifest, dict) else {}
    lacking = [key for key in ("manifest_sha256", "sha256", "step") if key not in fields]
    if lacking:
        raise Corrupt(f"{where} has a manifest.json without {', '.join(lacking)}.")
    bare = {key: value for key, value in fields.items() if key != "manifest_sha256"}
    if manifest_bytes(bare) != content:
        raise Corrupt(f"{where} has a manifest.json that does not match its own digest.")
    return fields


class _DigestedFile:
    """What `torch.save` writes into: passes bytes on to a file and into a digest.

    After an error it takes bytes without keeping them, since the error would come out of torch as
    one about positions in an archive, and raises it at the end.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._digest = hashlib.sha256()
        self._size = 0
        self._error: OSError | None = None

    def write(self, content: memoryview) -> int:
        self._size += content.nbytes
        if self._error is None:
            try:
                self._file.write(content)
                self._digest.update(content)
            except OSError as error:
                self._error = error
        return content.nbytes

    def flush(self) -> None:
        """Part of what torch expects of a file; the end flushes."""

    def close(self) -> str:
        """Give the digest of all that was written."""
        with self._file as file:
            if self._error is not None:
                raise self._error
            file.flush()
            refuse_short(file, self._size)
        return self._digest.hexdigest()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors(each)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def _json_bytes(value: object) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"
