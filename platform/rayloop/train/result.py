"""What a training run leaves behind for the stages after it, as one record on disk."""

from dataclasses import asdict, dataclass, field
from typing import Any

from rayloop.config import Config, ModelConfig, to_dict
from rayloop.data.versions import DatasetVersion
from rayloop.errors import Corrupt, DataMissing
from rayloop.models.classifier import ImageClassifier, count_parameters
from rayloop.models.zoo import build_classifier
from rayloop.storage import Storage
from rayloop.train.checkpoint import checkpoint_paths, load_checkpoint
from rayloop.train.claim import run_digest


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """A finished run.

    Attributes:
        run_id: The run's name.
        checkpoint: Folder of the last checkpoint, relative to the storage root.
        checkpoint_digest: SHA-256 over parameters and buffers in name order.
        model_name: Name in the model zoo.
        num_parameters: Trained numbers.
        dataset_name: Dataset it was trained on.
        dataset_version: Its version.
        dataset_digest: Its digest.
        class_names: Labels in index order.
        shape: Height, width, channels of an image.
        pixel_mean: Normalisation the model carries.
        pixel_std: Normalisation the model carries.
        val_accuracy: Share of validation rows predicted right, fp32.
        test_accuracy: Share of test rows predicted right, fp32; None where a trial of a sweep has
            not been chosen, since the test split is for the chosen one alone.
        floor_accuracy: Test accuracy of the linear model; None when it was left out.
        steps: Optimizer steps of the whole run.
        images_per_second: Images trained on over the time spent in steps and waiting for data, in
            the last session of the run, all workers.
        data_wait_share: Share (0..1) of that time spent waiting for data, rank 0.
        mfu: Counted operations over what the device was measured to reach; None where undefined.
        goodput: Share (0..1) of all sessions' wall time spent in training steps that counted.
        step_ms: Percentiles of the step time.
        seconds: Wall time of the last session.
        precision: Arithmetic of the forward pass.
        feed: `resident` or `stream`.
        num_workers: Data-parallel workers at the end.
        resumed_at_step: Step at which the last session started.
        history: One record an epoch.
        ledger_s: Seconds by cause over all sessions; they add up to the wall time.
        config: All settings.
        config_digest: Digest of the settings that decide what is trained.
        mlflow_run_id: The run in the tracking database.
        test_accuracy_flip: Test accuracy with each image and its mirror image averaged; None where
            it was not asked for.
        mfu_datasheet: Counted operations over the datasheet's peak; None where there is none.
        interruptions: Starts of the workers after the first, over all sessions.
        lost_steps: Steps that were done again after an interruption.
        checkpoint_ms: Time that a checkpoint took from the training, the mean of the last
            session's on rank 0; 0 where there was none.
    """

    run_id: str
    checkpoint: str
    checkpoint_digest: str
    model_name: str
    num_parameters: int
    dataset_name: str
    dataset_version: str
    dataset_digest: str
    class_names: tuple[str, ...]
    shape: tuple[int, int, int]
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]
    val_accuracy: float
    test_accuracy: float | None
    floor_accuracy: float | None
    steps: int
    images_per_second: float
    data_wait_share: float
    mfu: float | None
    goodput: float
    step_ms: dict[str, float]
    seconds: float
    precision: str
    feed: str
    num_workers: int
    resumed_at_step: int
    history: list[dict[str, float]] = field(default_factory=list)
    ledger_s: dict[str, float] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    config_digest: str = ""
    mlflow_run_id: str = ""
    test_accuracy_flip: float | None = None
    mfu_datasheet: float | None = None
    interruptions: int = 0
    lost_steps: int = 0
    checkpoint_ms: float = 0.0

    def last_line(self) -> dict[str, Any]:
        """What the train job prints: everything but the long parts."""
        long = ("history", "config", "class_names")
        return {name: value for name, value in asdict(self).items() if name not in long}


def facts_of(
    config: Config, dataset: DatasetVersion, model: ImageClassifier, storage: Storage
) -> dict[str, Any]:
    """What a run's record says of its settings, its data and its newest checkpoint."""
    return {
        "run_id": config.run_id,
        "checkpoint": checkpoint_paths(storage, config.run_id)[-1],
        "model_name": config.model.name,
        "num_parameters": count_parameters(model),
        "dataset_name": dataset.name,
        "dataset_version": dataset.version,
        "dataset_digest": dataset.digest,
        "class_names": dataset.class_names,
        "shape": dataset.shape,
        "pixel_mean": dataset.pixel_mean,
        "pixel_std": dataset.pixel_std,
        "config": to_dict(config),
        "config_digest": run_digest(config),
    }


def save_result(storage: Storage, result: TrainResult, newest: bool = True) -> None:
    """Write `runs/RUN_ID/result.json`, and make the run the newest unless told not to."""
    storage.write_json(f"runs/{result.run_id}/result.json", asdict(result))
    if newest:
        storage.write_json("runs/latest.json", {"run_id": result.run_id})


def load_result(storage: Storage, run_id: str = "") -> TrainResult:
    """Read a finished run.

    Args:
        storage: The root.
        run_id: Which run; empty means the newest.

    Raises:
        DataMissing: There is no finished run of that name.
        Corrupt: The record is damaged.
    """
    if not run_id and storage.exists("runs/latest.json"):
        run_id = str(storage.read_json("runs/latest.json")["run_id"])
    path = f"runs/{run_id}/result.json"
    if not run_id or not storage.exists(path):
        what = f"run {run_id!r}" if run_id else "run"
        raise DataMissing(
            f"There is no finished {what} under {storage.path('runs')}. "
            "Train one: python jobs/train.py PRESET"
        )
    fields = storage.read_json(path)
    for name in ("class_names", "shape", "pixel_mean", "pixel_std"):
        fields[name] = tuple(fields.get(name, ()))
    try:
        return TrainResult(**fields)
    except TypeError as error:
        raise Corrupt(
            f"{storage.path(path)} is not a record this rayloop can read ({error}); train again."
        ) from None


def load_model(storage: Storage, result: TrainResult) -> ImageClassifier:
    """The trained model on the CPU in fp32 and evaluation mode, from its verified checkpoint.

    Raises:
        Corrupt: The checkpoint does not match its digest.
    """
    settings = dict(result.config["model"])
    settings["widths"] = tuple(settings["widths"])
    settings["pretrained"] = False
    model = build_classifier(
        ModelConfig(**settings),
        result.shape,
        len(result.class_names),
        result.pixel_mean,
        result.pixel_std,
        seed=0,
    )
    state = load_checkpoint(storage, result.checkpoint).state
    model.load_state_dict(state.get("average") or state["model"])
    return model.eval()
