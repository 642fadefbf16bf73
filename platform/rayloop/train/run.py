"""TrainConfig and a dataset version -> TorchTrainer -> TrainResult on disk and in the tracker."""

import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import ray
import ray.data
import ray.train
import ray.train.torch
from ray.data import DataContext, ExecutionOptions

from rayloop.clock import SYSTEM_CLOCK, Clock
from rayloop.cluster import check_room
from rayloop.config import Config, digest_of, to_dict
from rayloop.data.feed import choose_feed, stream_dataset
from rayloop.data.order import SampleOrder
from rayloop.data.versions import DatasetVersion, open_version, read_split
from rayloop.errors import ConfigError, RayloopError, RequestError, WorkError
from rayloop.logs import stage_logger
from rayloop.models.classifier import count_parameters, summary
from rayloop.models.zoo import build_classifier
from rayloop.storage import Storage
from rayloop.tracking import Tracker
from rayloop.train.checkpoint import checkpoints_folder, newest_good
from rayloop.train.curves import draw_curves
from rayloop.train.floor import linear_floor
from rayloop.train.progress import Follower, ProgressBoard
from rayloop.train.result import TrainResult, load_result, save_result
from rayloop.train.worker import WorkerTask, manifest_about, train_worker

log = stage_logger("train")

SECTIONS_THAT_DECIDE = ("data", "model", "train")


def train(
    config: Config, storage: Storage, tracker: Tracker, clock: Clock = SYSTEM_CLOCK
) -> TrainResult:
    """Train, or go on training, the run named in the configuration.

    Args:
        config: All settings; an empty `run_id` gets a new name.
        storage: The root.
        tracker: Where parameters and metrics are tracked, on the driver only.
        clock: For names and accounts.

    Raises:
        RequestError: The data is missing, the cluster is too small, or the run id belongs to other
            settings.
        WorkError: Training failed more often than `max_failures`.
    """
    started = clock.monotonic()
    dataset = open_version(storage, config.data.dataset_name, config.data.version)
    check_room(config.train.num_workers, config.train.cpus_per_worker, config.train.use_gpu)
    config = replace(config, run_id=config.run_id or new_run_id(config, clock))
    _refuse_useless(config, dataset)
    model = build_classifier(
        config.model, dataset.shape, len(dataset.class_names), dataset.pixel_mean,
        dataset.pixel_std, config.train.seed,
    )  # fmt: skip
    log.info("%s", summary(model, config.model.name))
    _claim_run(config, dataset, storage)
    done = _finished(config, storage)
    if done is not None:
        log.info("run %s is finished already; nothing was trained", config.run_id)
        return done
    mlflow_run_id = tracker.start_run(
        config.run_id, params=to_dict(config), tags={"dataset_digest": dataset.digest}
    )
    fit_seconds, outcome = _fit(config, storage, dataset, tracker, mlflow_run_id, clock)
    train_rows, test_rows = (read_split(storage, dataset, name) for name in ("train", "test"))
    floor = linear_floor(config.train, dataset, train_rows, test_rows)
    log.info("linear floor: %s", "left out" if floor is None else f"accuracy {floor:.4f}")
    result = TrainResult(
        run_id=config.run_id,
        checkpoint=_last_checkpoint(storage, config.run_id),
        model_name=config.model.name,
        num_parameters=count_parameters(model),
        dataset_name=dataset.name,
        dataset_version=dataset.version,
        dataset_digest=dataset.digest,
        class_names=dataset.class_names,
        shape=dataset.shape,
        pixel_mean=dataset.pixel_mean,
        pixel_std=dataset.pixel_std,
        val_accuracy=outcome["history"][-1]["val_accuracy"],
        floor_accuracy=floor,
        goodput=round(outcome["ledger_s"].get("step", 0.0) / fit_seconds, 4),
        feed=choose_feed(config.data, dataset),
        num_workers=config.train.num_workers,
        seconds=round(clock.monotonic() - started, 3),
        config=to_dict(config),
        config_digest=run_digest(config),
        mlflow_run_id=mlflow_run_id,
        **outcome,
    )
    _publish(result, storage, tracker)
    return result


def new_run_id(config: Config, clock: Clock) -> str:
    """A name nobody has: model, dataset, seconds and a little chance."""
    stamp = f"{int(clock.now()):x}"
    return f"{config.model.name}-{config.data.dataset_name}-{stamp}-{uuid.uuid4().hex[:4]}"


def run_digest(config: Config) -> str:
    """Digest of the sections that decide a run's outcome."""
    sections = {name: to_dict(getattr(config, name)) for name in SECTIONS_THAT_DECIDE}
    return digest_of(sections)


def _refuse_useless(config: Config, dataset: DatasetVersion) -> None:
    rows = dataset.splits["train"]
    if rows < config.train.global_batch_size:
        raise RequestError(
            f"train.global_batch_size={config.train.global_batch_size} is more than the {rows} "
            f"training rows of {dataset.name}:{dataset.version}; lower it."
        )


def _claim_run(config: Config, dataset: DatasetVersion, storage: Storage) -> None:
    """Write the run's settings, or refuse a run id that belongs to other settings or data."""
    path = f"runs/{config.run_id}/config.json"
    mine = {**to_dict(config), "dataset_digest": dataset.digest}
    if not storage.exists(path):
        storage.write_json(path, mine)
        return
    theirs = storage.read_json(path)
    names = (*SECTIONS_THAT_DECIDE, "dataset_digest")
    differences = [
        line for name in names for line in _differences(name, theirs.get(name), mine[name])
    ]
    if differences:
        raise ConfigError(
            f"Run {config.run_id!r} exists with other settings: {'; '.join(differences[:5])}. "
            "Use the same settings to continue it, or another --run-id."
        )


def _differences(name: str, theirs: Any, mine: Any) -> list[str]:
    if isinstance(theirs, dict) and isinstance(mine, dict):
        keys = sorted({*theirs, *mine})
        return [
            d for key in keys for d in _differences(f"{name}.{key}", theirs.get(key), mine.get(key))
        ]
    return [] if theirs == mine else [f"{name} was {theirs}, now {mine}"]


def _finished(config: Config, storage: Storage) -> TrainResult | None:
    has_result = storage.exists(f"runs/{config.run_id}/result.json")
    return load_result(storage, config.run_id) if has_result else None


def _fit(
    config: Config,
    storage: Storage,
    dataset: DatasetVersion,
    tracker: Tracker,
    mlflow_run_id: str,
    clock: Clock,
) -> tuple[float, dict[str, Any]]:
    """Run the TorchTrainer; gives the seconds it took and rank 0's summary."""
    settings = config.train
    checkpoint = newest_good(storage, config.run_id)
    first_step = checkpoint.step if checkpoint else 0
    if checkpoint:
        log.info("run %s goes on at step %d", config.run_id, first_step)
    order = SampleOrder(dataset.splits["train"], settings.global_batch_size, settings.seed)
    num_steps = order.num_steps(settings.epochs)
    feed = choose_feed(config.data, dataset)
    names = ["val", "test"] + (["train"] if feed == "resident" else [])
    splits = {name: ray.put(read_split(storage, dataset, name)) for name in names}
    board = ray.remote(num_cpus=0)(ProgressBoard).remote()
    task = WorkerTask(
        config=config,
        storage=storage,
        dataset=dataset,
        splits=splits,
        board=board,
        about=manifest_about(run_digest(config), dataset),
    )
    DataContext.get_current().enable_progress_bars = False
    trainer = ray.train.torch.TorchTrainer(
        cast(Any, train_worker),
        train_loop_config={"task": task},
        scaling_config=ray.train.ScalingConfig(
            num_workers=settings.num_workers,
            use_gpu=settings.use_gpu,
            resources_per_worker={
                "CPU": settings.cpus_per_worker, **({"GPU": 1} if settings.use_gpu else {})
            },
        ),
        run_config=ray.train.RunConfig(
            name=f"{config.run_id}-{uuid.uuid4().hex[:6]}",
            storage_path=storage.path("runs", config.run_id, "ray"),
            failure_config=ray.train.FailureConfig(max_failures=settings.max_failures),
        ),
        datasets=_stream(config, storage, dataset, order, num_steps) if feed == "stream" else None,
        dataset_config=ray.train.DataConfig(
            execution_options=ExecutionOptions(preserve_order=True)
        ),
    )  # fmt: skip

    def track(record: dict[str, float]) -> None:
        tracker.log_metrics(mlflow_run_id, record, step=int(record["step"]))

    before = clock.monotonic()
    with Follower(board, num_steps, first_step, track):
        outcome = _run_trainer(trainer)
    return clock.monotonic() - before, outcome


def _stream(
    config: Config, storage: Storage, dataset: DatasetVersion, order: SampleOrder, num_steps: int
) -> dict[str, ray.data.Dataset | Callable[[], ray.data.Dataset]]:
    """A factory: Ray calls it at every start of the workers, so each start resumes by itself."""

    def make() -> ray.data.Dataset:
        checkpoint = newest_good(storage, config.run_id)
        first_step = checkpoint.step if checkpoint else 0
        return stream_dataset(
            config.data, storage, dataset, order, config.train.num_workers, first_step, num_steps
        )

    return {"train": make}


def _run_trainer(trainer: ray.train.torch.TorchTrainer) -> dict[str, Any]:
    try:
        result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        cause = _root_cause(error)
        if isinstance(cause, RayloopError):
            raise cause from None
        raise WorkError(
            f"Training failed: {cause or error}. The checkpoints are kept; run again with the same "
            "--run-id to go on."
        ) from error
    outcome: dict[str, Any] = cast(Any, result).return_value
    return outcome


def _root_cause(error: BaseException) -> BaseException | None:
    """The workers' own error, if Ray kept it."""
    failures = getattr(error, "worker_failures", None) or {}
    for failure in failures.values():
        while getattr(failure, "cause", None) is not None and failure.cause is not failure:
            failure = failure.cause  # noqa: PLW2901
        return failure  # type: ignore[no-any-return]
    return None


def _last_checkpoint(storage: Storage, run_id: str) -> str:
    folder = checkpoints_folder(run_id)
    return f"{folder}/{storage.names(folder)[-1]}"


def _publish(result: TrainResult, storage: Storage, tracker: Tracker) -> None:
    folder = f"runs/{result.run_id}"
    title = (
        f"{result.run_id}: validation {result.val_accuracy:.4f}, test {result.test_accuracy:.4f}"
    )
    storage.write(f"{folder}/curves.png", draw_curves(result.history, title))
    storage.write_json(
        f"{folder}/ledger.json", {"seconds": result.ledger_s, "goodput": result.goodput}
    )
    final = {"test_accuracy": result.test_accuracy, "images_per_second": result.images_per_second,
             "data_wait_share": result.data_wait_share, "goodput": result.goodput}  # fmt: skip
    tracker.log_metrics(result.mlflow_run_id, final, step=result.steps)
    tracker.finish(result.mlflow_run_id)
    save_result(storage, result)
