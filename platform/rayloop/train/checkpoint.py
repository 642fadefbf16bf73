"""Training state -> a checkpoint folder that is whole or not there, and back.

A checkpoint is `checkpoints/step-NNNNNNNN/` with `state.pt` and `manifest.json`, which records the
digest of the state's bytes and one of itself. It is written aside and made visible in one step. A
folder is believed only after both digests match; else the one before is used, and that is said.
"""

import hashlib
import io
import math
import re
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from rayloop.clock import SYSTEM_CLOCK, Clock
from rayloop.errors import ConfigError, Corrupt, DataMissing, RequestError, StorageFull
from rayloop.logs import stage_logger
from rayloop.storage import Storage
from rayloop.train.state_file import (
    State,
    manifest_bytes,
    snapshot,
    state_bytes,
    verified_manifest,
    write_state,
)

log = stage_logger("train")

FIRST_SAVE_AFTER_S = 5.0
"""When the first checkpoint is due, whose cost then decides how often the next ones are."""

MTBF_S = 3600.0
"""Assumed mean time between failures: a busy machine's, or a spot node's, on a bad day."""

MANIFEST = "manifest.json"
"""The marker of a checkpoint's folder: written last."""

MUST_MATCH = ("config_digest", "dataset_digest")
"""What a manifest and the run that goes on from it must agree on."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A verified checkpoint: where it is, its step, the state in it, and what its manifest says."""

    path: str
    step: int
    state: State
    manifest: dict[str, Any]


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
    """Write a checkpoint and remove those older than the `keep` newest up to it.

    A run has one writer at a time: what an earlier one left half written is removed too. Newer
    checkpoints, which a run that fell back behind them leaves, stay and do not count.

    Args:
        storage: The root.
        run_id: The run it belongs to.
        step: Steps done.
        state: Tensors and plain values, readable by `torch.load(weights_only=True)`.
        about: What the manifest says beside the digests: config and dataset digests, versions.
        keep: Checkpoints that stay, at least 1.

    Returns:
        The checkpoint's folder relative to the root.

    Raises:
        StorageFull: There is no room; the checkpoints before are kept.
    """
    path = f"{checkpoints_folder(run_id)}/{_name(step)}"
    try:
        with storage.staging(path, state_bytes(state)) as folder:
            sha256 = write_state(folder / "state.pt", state)
            manifest = {**about, "step": step, "sha256": sha256}
            (folder / MANIFEST).write_bytes(manifest_bytes(manifest))
    except StorageFull as error:
        before = checkpoint_paths(storage, run_id)
        kept = f"The last checkpoint, {storage.path(before[-1])}, is kept." if before else (
            "There is no earlier checkpoint.")  # fmt: skip
        raise StorageFull(f"{error} {kept}") from error
    _remove_old(storage, run_id, step, keep)
    return path


def checkpoints_folder(run_id: str) -> str:
    """Where a run's checkpoints live, relative to the root."""
    return f"runs/{run_id}/checkpoints"


def checkpoint_paths(storage: Storage, run_id: str) -> list[str]:
    """A run's checkpoints, oldest first and not verified; other names in the folder are none.

    Nor are those on an object store whose upload was cut off before the manifest.
    """
    paths = _paths(storage, run_id)
    if storage.is_local:
        return paths
    return [path for path in paths if storage.exists(f"{path}/{MANIFEST}")]


def _paths(storage: Storage, run_id: str) -> list[str]:
    folder = checkpoints_folder(run_id)
    steps = (_step_of(name) for name in storage.names(folder))
    return [f"{folder}/{_name(step)}" for step in sorted(s for s in steps if s is not None)]


def newest_good(storage: Storage, run_id: str) -> Checkpoint | None:
    """The newest checkpoint that is whole; None when the run has none at all.

    Raises:
        Corrupt: There are checkpoints and not one is whole; training from zero would hide that.
    """
    paths = checkpoint_paths(storage, run_id)
    for path in reversed(paths):
        try:
            return load_checkpoint(storage, path)
        except Corrupt as error:
            log.warning("%s Falling back to the checkpoint before.", error)
    if paths:
        raise Corrupt(
            f"None of the {len(paths)} checkpoints in {storage.path(checkpoints_folder(run_id))} "
            "is whole. Remove that folder to train this run anew, or use another --run-id."
        )
    return None


def load_checkpoint(storage: Storage, path: str) -> Checkpoint:
    """Read and verify one checkpoint.

    Raises:
        Corrupt: A file is missing, or does not match its digest, or does not hold what it should.
    """
    where = f"Checkpoint {storage.path(path)}"
    try:
        manifest = verified_manifest(storage.read(f"{path}/{MANIFEST}"), where)
        content = storage.read(f"{path}/state.pt")
    except DataMissing:
        raise Corrupt(f"{where} is not whole: a file is missing.") from None
    step, name = manifest["step"], path.rsplit("/", 1)[-1]
    if _step_of(name) != step:
        raise Corrupt(f"{where} was renamed: its manifest says step {step}.")
    if hashlib.sha256(content).hexdigest() != manifest["sha256"]:
        raise Corrupt(f"{where} does not match its digest: state.pt was damaged.")
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # the unpickler raises nearly every type there is
        lines = [line.strip() for line in str(error).splitlines() if "error" in line]
        reason = lines[0].split(". ")[0] if lines else type(error).__name__
        raise Corrupt(f"{where} holds a state.pt that torch cannot load: {reason}.") from error
    if not isinstance(state, dict):
        raise Corrupt(f"{where} holds {type(state).__name__} in state.pt, not a dict.")
    return Checkpoint(path, step, state, manifest)


def refuse_foreign_state(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Refuse weights that are not those of the model.

    Args:
        checkpoint: Its state has the weights under `model`.
        model: The bare model, without a wrapper for data parallelism.

    Raises:
        RequestError: Names or shapes differ; the message says which.
    """
    theirs, ours = checkpoint.state.get("model"), model.state_dict()
    if not isinstance(theirs, dict):
        raise RequestError(
            f"Checkpoint {checkpoint.path} has no weights under 'model'; it was not written by a "
            "training run. Use another --run-id."
        )
    differences = {
        "missing": [name for name in ours if name not in theirs],
        "unexpected": [name for name in theirs if name not in ours],
        "of another shape": [
            f"{name} {tuple(theirs[name].shape)} instead of {tuple(value.shape)}"
            for name, value in ours.items()
            if name in theirs and theirs[name].shape != value.shape
        ],
    }
    told = [f"{what}: {_first_few(names)}" for what, names in differences.items() if names]
    if told:
        raise RequestError(
            f"Checkpoint {checkpoint.path} is of another model; {'; '.join(told)}. Use the model "
            "settings it was trained with, or another --run-id."
        )


def refuse_other_manifest(checkpoint: Checkpoint, about: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of other settings or other data.

    Args:
        checkpoint: The one to go on from.
        about: What this run writes into its manifests.

    Raises:
        ConfigError: A digest differs; the message says which.
    """
    told = [
        f"{key} was {checkpoint.manifest.get(key)}, now {about.get(key)}"
        for key in MUST_MATCH
        if checkpoint.manifest.get(key) != about.get(key)
    ]
    if told:
        raise ConfigError(
            f"Checkpoint {checkpoint.path} belongs to other settings or data: {'; '.join(told)}. "
            "Use those it was trained with, or another --run-id."
        )


class CheckpointWriter:
    """Writes checkpoints in a thread, so that training waits for a copy in memory only.

    Use it as a context: the end waits until all is on the disk. An error of the thread is raised
    by the next `save` or `flush`, or by the end, once; it is logged instead where another error is
    leaving the context already.

    Args:
        write: Gets a step and a state, writes them, and gives the path. Runs in the thread; the
            state's memory is used again once it has returned.
        clock: Measures what `save` costs.

    Attributes:
        blocked_s: Sum of the seconds that training spent in `save`.
        cost_s: What the last finished checkpoint cost: seconds in `save` plus the thread's
            processor seconds, which training may have missed; None before the first.
    """

    def __init__(self, write: Callable[[int, State], str], clock: Clock = SYSTEM_CLOCK) -> None:
        self.blocked_s = 0.0
        self.cost_s: float | None = None
        self._write = write
        self._clock = clock
        self._pending: Future[str] | None = None
        self._copied: State | None = None
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.flush()
        except Exception as own:
            if kind is None:
                raise
            log.error("The last checkpoint was not written: %s", own)
        finally:
            self._pool.shutdown()

    def save(self, step: int, state: State) -> None:
        """Copy the state, after an earlier one is on the disk, and let the thread write it."""
        started = self._clock.monotonic()
        try:
            self.flush()
            self._copied = copied = snapshot(state, self._copied)
        finally:
            blocked_s = self._clock.monotonic() - started
            self.blocked_s += blocked_s
        self._pending = self._pool.submit(self._run, step, copied, blocked_s)

    def flush(self) -> None:
        """Wait until everything saved so far is on the disk."""
        if self._pending is not None:
            wait([self._pending])  # an interrupt here leaves it pending
            done, self._pending = self._pending, None
            done.result()

    def _run(self, step: int, state: State, blocked_s: float) -> str:
        started = time.thread_time()
        path = self._write(step, state)
        self.cost_s = blocked_s + time.thread_time() - started
        return path


def young_daly_interval_s(cost_s: float, mtbf_s: float) -> float:
    """Seconds between checkpoints that lose least: `sqrt(2 * cost * mean time between failures)`.

    The minimum of `cost / interval + interval / (2 * mtbf)`, the share spent on writing plus the
    share lost when a failure comes, on average, in the middle of an interval (J. W. Young, 1974;
    J. T. Daly, 2006, whose higher terms matter only where the cost is near the mtbf).
    """
    return math.sqrt(2 * cost_s * mtbf_s)


def interval_s(cost_s: float, cost_share: float = 0.005, mtbf_s: float = MTBF_S) -> float:
    """Seconds between checkpoints: the best for the failures, yet within the share of the time.

    Args:
        cost_s: Seconds that one checkpoint takes from training.
        cost_share: Most that checkpoints may cost, as a share (0..1) of the time.
        mtbf_s: Mean time between failures.
    """
    return max(cost_s / cost_share, young_daly_interval_s(cost_s, mtbf_s))


def is_due(
    since_save_s: float, cost_s: float | None, cost_share: float = 0.005, mtbf_s: float = MTBF_S
) -> bool:
    """Whether it is time for a checkpoint; `cost_s` is None while no cost was measured yet."""
    if cost_s is None:
        return since_save_s >= FIRST_SAVE_AFTER_S
    return since_save_s >= interval_s(cost_s, cost_share, mtbf_s)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _step_of(name: str) -> int | None:
    match = re.fullmatch(r"step-([0-9]{8,})", name)
    step = int(match[1]) if match else None
    return step if step is not None and _name(step) == name else None


def _first_few(names: list[str], count: int = 3) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def _remove_old(storage: Storage, run_id: str, step: int, keep: int) -> None:
    folder = checkpoints_folder(run_id)
    mine = f"{folder}/{_name(step)}"
    paths = checkpoint_paths(storage, run_id)
    kept = paths[: paths.index(mine) + 1][-keep:]
    all_paths = _paths(storage, run_id)
    for path in all_paths[: all_paths.index(mine)]:
        if path not in kept:
            storage.remove(path)
    local = storage.local_path(folder)
    for left in local.glob(".step-*") if local else ():
        shutil.rmtree(left)
