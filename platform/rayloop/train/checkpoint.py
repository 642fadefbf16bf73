"""Training state -> a checkpoint folder that is whole or not there, and back.

A checkpoint is `checkpoints/step-NNNNNNNN/` with `state.pt` and `manifest.json`, which records the
digest of the state's bytes. It is written aside and made visible in one step. A folder is believed
only after its digest matches; else the one before is used, and that is said.
"""

import hashlib
import io
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rayloop.errors import Corrupt
from rayloop.logs import stage_logger
from rayloop.storage import Storage

log = stage_logger("train")

State = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A verified checkpoint: where it is, its step, and the state in it."""

    path: str
    step: int
    state: State


def checkpoint_digest(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of all parameters and buffers in name order."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        total.update(f"{name}:{values.dtype}:{tuple(values.shape)}:".encode())
        total.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def save_checkpoint(
    storage: Storage, run_id: str, step: int, state: State, about: dict[str, Any], keep: int
) -> str:
    """Write a checkpoint and remove those older than the `keep` newest.

    Args:
        storage: The root.
        run_id: The run it belongs to.
        step: Steps done.
        state: Tensors and plain values, readable by `torch.load(weights_only=True)`.
        about: What the manifest says beside the digest: config and dataset digests, versions.
        keep: Checkpoints that stay.

    Returns:
        The checkpoint's folder relative to the root.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    path = f"{checkpoints_folder(run_id)}/step-{step:08d}"
    with tempfile.TemporaryDirectory(prefix="rayloop-checkpoint-") as staged:
        (Path(staged) / "state.pt").write_bytes(content)
        manifest = {**about, "step": step, "sha256": hashlib.sha256(content).hexdigest()}
        Storage(staged).write_json("manifest.json", manifest)
        storage.publish(Path(staged), path)
    for name in storage.names(checkpoints_folder(run_id))[:-keep]:
        storage.remove(f"{checkpoints_folder(run_id)}/{name}")
    return path


def checkpoints_folder(run_id: str) -> str:
    """Where a run's checkpoints live, relative to the root."""
    return f"runs/{run_id}/checkpoints"


def newest_good(storage: Storage, run_id: str) -> Checkpoint | None:
    """The newest checkpoint that is whole; None when the run has none at all.

    Raises:
        Corrupt: There are checkpoints and not one is whole; training from zero would hide that.
    """
    names = storage.names(checkpoints_folder(run_id))
    for name in reversed(names):
        path = f"{checkpoints_folder(run_id)}/{name}"
        try:
            return load_checkpoint(storage, path)
        except Corrupt as error:
            log.warning("%s Falling back to the checkpoint before.", error)
    if names:
        raise Corrupt(
            f"None of the {len(names)} checkpoints in {storage.path(checkpoints_folder(run_id))} "
            "is whole. Remove that folder to train this run anew, or use another --run-id."
        )
    return None


def load_checkpoint(storage: Storage, path: str) -> Checkpoint:
    """Read and verify one checkpoint.

    Raises:
        Corrupt: Its manifest is missing, or its bytes do not match the digest.
    """
    if not storage.exists(f"{path}/manifest.json") or not storage.exists(f"{path}/state.pt"):
        raise Corrupt(f"Checkpoint {storage.path(path)} is not whole: a file is missing.")
    manifest = storage.read_json(f"{path}/manifest.json")
    content = storage.read(f"{path}/state.pt")
    if hashlib.sha256(content).hexdigest() != manifest.get("sha256"):
        raise Corrupt(f"Checkpoint {storage.path(path)} does not match its digest.")
    state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return Checkpoint(path, int(manifest["step"]), state)
