"""A point's settings -> one trained run, and what it says of each validation row."""

import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import cross_entropy

from rayloop.config import Config
from rayloop.data.versions import DatasetVersion, Split
from rayloop.errors import Corrupt, Diverged
from rayloop.models.classifier import ImageClassifier
from rayloop.storage import Storage
from rayloop.train.alone import train_alone
from rayloop.train.claim import run_digest
from rayloop.train.loop import Record
from rayloop.train.result import TrainResult, load_model, load_result


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Run:
    """What one run of a point came to.

    Attributes:
        run_id: Its name.
        val_error: Share (0..1) of validation rows predicted wrong after the last epoch.
        val_loss: Mean cross-entropy on the validation split, after the last epoch.
        images_per_second: Of the training, in the session that ended it; 0 where that session had
            no step left to do.
        steps: Optimizer steps.
        wrong: Which validation rows the model gets wrong, shape (N,).
        losses: Cross-entropy of each validation row, shape (N,).
        diverged: Why there is no model; empty where there is one.
    """

    run_id: str
    val_error: float = float("nan")
    val_loss: float = float("nan")
    images_per_second: float = 0.0
    steps: int = 0
    wrong: npt.NDArray[np.bool_]
    losses: npt.NDArray[np.float32]
    diverged: str = ""


def train_point(
    config: Config,
    storage: Storage,
    dataset: DatasetVersion,
    splits: dict[str, Split],
    on_record: Callable[[Record], None] = lambda _: None,
) -> Run:
    """Train one run alone, or go on with it, and score the validation rows one by one.

    A run that diverges is a result too: it is recorded, and not trained again.

    Args:
        config: All settings, `run_id` filled in.
        storage: The root.
        dataset: The dataset version.
        splits: `train` and `val` rows.
        on_record: Gets every epoch's record.

    Raises:
        RequestError: The settings cannot train on this data, or the run id belongs to others.
    """
    try:
        result = train_alone(config, storage, dataset, splits, on_record)
    except Diverged as error:
        note = {"message": str(error), "config_digest": run_digest(config)}
        storage.write_json(_diverged_path(config.run_id), note)
        return _without_model(config.run_id, str(error))
    device = torch.device("cuda" if config.train.use_gpu else "cpu")
    model = load_model(storage, result).to(device)
    wrong, losses = score_rows(model, splits["val"], config.train.eval_batch_size, device)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, wrong=wrong, losses=losses)
    storage.write(_rows_path(config.run_id), buffer.getvalue())
    return _run_of(result, wrong, losses)


def load_point(config: Config, storage: Storage) -> Run | None:
    """A run that is over, as `train_point` gave it; None where there is something left to do.

    Raises:
        Corrupt: A record of it is damaged.
    """
    run_id, digest = config.run_id, run_digest(config)
    if storage.exists(_diverged_path(run_id)):
        note = storage.read_json(_diverged_path(run_id))
        return _without_model(run_id, note["message"]) if note["config_digest"] == digest else None
    done = (storage.exists(path) for path in (f"runs/{run_id}/result.json", _rows_path(run_id)))
    if not all(done):
        return None
    result = load_result(storage, run_id)
    if result.config_digest != digest:
        return None  # train_alone says what is different
    try:
        with np.load(io.BytesIO(storage.read(_rows_path(run_id)))) as rows:
            return _run_of(result, rows["wrong"], rows["losses"])
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise Corrupt(
            f"{storage.path(_rows_path(run_id))} cannot be read ({error}); remove it and run the "
            "same command again."
        ) from None


@torch.no_grad()
def score_rows(
    model: ImageClassifier, split: Split, batch_size: int, device: torch.device
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float32]]:
    """Whether each row of a split is predicted wrong, and its cross-entropy.

    Args:
        model: In evaluation mode, on the device.
        split: The rows.
        batch_size: Rows at once.
        device: Where the model is.
    """
    wrong: list[Any] = []
    losses: list[Any] = []
    for start in range(0, len(split), batch_size):
        part = slice(start, start + batch_size)
        images = torch.from_numpy(split.images[part].copy()).to(device)
        labels = torch.from_numpy(split.labels[part].copy()).to(device)
        logits = model(images).float()
        wrong.append((logits.argmax(dim=1) != labels).cpu().numpy())
        losses.append(cross_entropy(logits, labels, reduction="none").cpu().numpy())
    return np.concatenate(wrong), np.concatenate(losses)


def _run_of(
    result: TrainResult, wrong: npt.NDArray[np.bool_], losses: npt.NDArray[np.float32]
) -> Run:
    last = result.history[-1]
    return Run(
        run_id=result.run_id,
        val_error=1 - last["val_accuracy"],
        val_loss=last["val_loss"],
        images_per_second=result.images_per_second,
        steps=result.steps,
        wrong=wrong,
        losses=losses,
    )


def _without_model(run_id: str, why: str) -> Run:
    nothing = np.empty(0)
    return Run(
        run_id=run_id, diverged=why, wrong=nothing.astype(np.bool_), losses=nothing.astype("f4")
    )


def _rows_path(run_id: str) -> str:
    return f"runs/{run_id}/val_rows.npz"


def _diverged_path(run_id: str) -> str:
    return f"runs/{run_id}/diverged.json"
