"""TrainConfig and a dataset version -> TorchTrainer -> TrainResult on disk and in the tracker."""

import uuid
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, cast

import ray
import ray.data
import ray.train
import ray.train.torch
from ray import PlacementGroupID
from ray.data import DataContext, ExecutionOptions
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.util.placement_group import PlacementGroup, remove_placement_group

from rayloop.clock import SYSTEM_CLOCK, Clock
from rayloop.cluster import check_room, cpus_of_nodes, divide_cpus, is_local
from rayloop.config import Config, to_dict
from rayloop.data.feed import choose_feed, stream_dataset
from rayloop.data.versions import DatasetVersion, open_version, read_split
from rayloop.errors import RayloopError, WorkError
from rayloop.logs import stage_logger
from rayloop.models.classifier import summary
from rayloop.storage import Storage
from rayloop.tracking import Tracker
from rayloop.train.checkpoint import newest_good
from rayloop.train.claim import claim_run, new_run_id, run_digest
from rayloop.train.curves import draw_curves, draw_ledger, ledger_lines
from rayloop.train.floor import linear_floor
from rayloop.train.journal import Journal
from rayloop.train.loop import Record
from rayloop.train.progress import Follower, ProgressBoard
from rayloop.train.result import TrainResult, facts_of, load_result, save_result
from rayloop.train.start import initial_model, manifest_about, refuse_useless, tracked
from rayloop.train.worker import WorkerTask, train_worker

log = stage_logger("train")

RESIZE_INTERVAL_S = 30.0
"""Seconds between two looks whether an elastic run may have more workers."""
PATIENCE = 3
"""Collectives give up after so many step timeouts, long after the watchdog has acted."""
NO_TIMEOUT_S = 7 * 24 * 3600
"""The patience of collectives where the watchdog is off."""


def train(
    config: Config,
    storage: Storage,
    tracker: Tracker | None,
    clock: Clock = SYSTEM_CLOCK,
    on_record: Callable[[Record], None] | None = None,
) -> TrainResult:
    """Train, or go on training, the run named in the configuration.

    Args:
        config: All settings; an empty `run_id` gets a new name.
        storage: The root.
        tracker: Where parameters and metrics are tracked, on the driver only. None is a trial of a
            sweep: its records go to `on_record` alone, the test split is not touched, and it does
            not become the newest run.
        clock: For names and accounts.
        on_record: Gets every new epoch's record, in a thread of its own.

    Raises:
        RequestError: The data is missing, the cluster is too small, or the run id belongs to other
            settings.
        WorkError: Training failed more often than `max_failures`.
    """
    started = clock.monotonic()
    dataset = open_version(storage, config.data.dataset_name, config.data.version)
    config = _fill_in(config, clock)
    model = initial_model(config, dataset)
    refuse_useless(config, dataset, model)
    log.info("%s", summary(model, config.model.name))
    claim_run(config, dataset, storage)
    done = _finished(config, storage)
    if done is not None:
        log.info("run %s is finished already; nothing was trained", config.run_id)
        return done
    mlflow_run_id = ""
    if tracker:
        data = tracked(dataset, storage)
        mlflow_run_id = tracker.start_run(config.run_id, params=to_dict(config), dataset=data)

    def on_each(record: Record) -> None:
        if tracker:
            tracker.log_metrics(mlflow_run_id, record, step=int(record["step"]))
        if on_record:
            on_record(record)

    with tracker.told_if_it_fails(mlflow_run_id) if tracker else nullcontext():
        outcome = _fit(config, storage, dataset, on_each, clock, is_trial=tracker is None)
    result = TrainResult(
        **facts_of(config, dataset, model, storage),
        **outcome,
        val_accuracy=outcome["history"][-1]["val_accuracy"],
        floor_accuracy=_floor(config, storage, dataset) if tracker else None,
        feed=choose_feed(config.data, dataset),
        seconds=round(clock.monotonic() - started, 3),
        mlflow_run_id=mlflow_run_id,
    )
    if tracker:
        _publish(result, storage, tracker)
    else:
        save_result(storage, result, newest=False)
    return result


def _floor(config: Config, storage: Storage, dataset: DatasetVersion) -> float | None:
    train_rows, test_rows = (read_split(storage, dataset, name) for name in ("train", "test"))
    floor = linear_floor(config.train, dataset, train_rows, test_rows)
    log.info("linear floor: %s", "left out" if floor is None else f"accuracy {floor:.4f}")
    return floor


def _finished(config: Config, storage: Storage) -> TrainResult | None:
    has_result = storage.exists(f"runs/{config.run_id}/result.json")
    return load_result(storage, config.run_id) if has_result else None


def _fill_in(config: Config, clock: Clock) -> Config:
    """The configuration with the run's name and the cores of each worker; refused if too large."""
    train = config.train
    cpus = check_room(train.min_workers or train.num_workers, train.cpus_per_worker, train.use_gpu)
    if train.min_workers and not train.cpus_per_worker:
        cpus = divide_cpus(cpus_of_nodes(), train.num_workers)
    return replace(
        config,
        run_id=config.run_id or new_run_id(config, clock),
        train=replace(train, cpus_per_worker=cpus),
    )


def _fit(
    config: Config,
    storage: Storage,
    dataset: DatasetVersion,
    on_record: Callable[[Record], None],
    clock: Clock,
    is_trial: bool,
) -> dict[str, Any]:
    """Run the TorchTrainer, keep the accounts, and give rank 0's summary."""
    began_at = clock.now()
    checkpoint = newest_good(storage, config.run_id)
    first_step = checkpoint.step if checkpoint else 0
    if checkpoint:
        log.info("run %s goes on at step %d", config.run_id, first_step)
    path = f"runs/{config.run_id}/ledger.json"
    journal = storage.read_json(path) if storage.exists(path) else None
    board = _board(journal, began_at)
    task = _task(config, storage, dataset, board, is_trial)

    def keep(news: dict[str, Any]) -> None:
        nonlocal journal
        journal = news
        storage.write_json(path, news)

    num_steps = task.order.num_steps(config.train.epochs)

    def tell(record: Record) -> None:
        try:
            on_record(record)
        except SystemExit:  # a sweep stops this trial
            _release_workers(board)
            raise

    with Follower(board, num_steps, first_step, tell, keep):
        outcome = _run_trainer(_trainer(task, num_steps))
    accounts = Journal.from_dict(journal or {})
    for line in ledger_lines(accounts):
        log.info("%s", line)
    causes = {cause: round(spent, 3) for cause, spent in accounts.causes().items()}
    picture = draw_ledger(causes, config.run_id)
    storage.write(f"runs/{config.run_id}/ledger.png", picture)
    return {
        **outcome,
        "ledger_s": causes,
        "goodput": round(accounts.goodput, 4),
        "interruptions": accounts.interruptions,
        "lost_steps": accounts.lost_steps,
    }


def _release_workers(board: Any) -> None:
    """Give back what the workers hold, which ends them.

    Train would do it once it sees that this process is gone, but asks the dashboard for that, which
    a local Ray does not have: the resources would never come back.
    """
    group_id = ray.get(board.placement_group.remote())
    if group_id:
        remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(group_id)))


def _board(journal: dict[str, Any] | None, began_at: float) -> Any:
    """The progress board on the driver's own node: a node that goes away must not take it along."""
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    actor = ray.remote(num_cpus=0, label_selector=here)(ProgressBoard)
    return actor.remote(journal, began_at)


def _task(
    config: Config, storage: Storage, dataset: DatasetVersion, board: Any, is_trial: bool
) -> WorkerTask:
    """What every worker gets; splits that fit go into the object store once."""
    is_resident = choose_feed(config.data, dataset) == "resident"
    names = ["val"] + ([] if is_trial else ["test"]) + (["train"] if is_resident else [])
    return WorkerTask(
        config=config,
        storage=storage,
        dataset=dataset,
        splits={name: ray.put(read_split(storage, dataset, name)) for name in names},
        board=board,
        about=manifest_about(run_digest(config), dataset),
    )


def _trainer(task: WorkerTask, num_steps: int) -> ray.train.torch.TorchTrainer:
    settings, storage, run_id = task.config.train, task.storage, task.config.run_id
    DataContext.get_current().enable_progress_bars = False
    elastic = 0 < settings.min_workers < settings.num_workers
    timeout_s = round(PATIENCE * settings.step_timeout_s) or NO_TIMEOUT_S
    is_streamed = "train" not in task.splits
    files, folder = storage.for_library(f"runs/{run_id}/ray")
    return Trainer(
        cast(Any, train_worker),
        train_loop_config={"task": task},
        torch_config=ray.train.torch.TorchConfig(timeout_s=timeout_s),
        scaling_config=cast(Any, ray.train.ScalingConfig)(
            num_workers=(settings.min_workers, settings.num_workers)
            if elastic
            else settings.num_workers,
            use_gpu=settings.use_gpu,
            resources_per_worker={
                "CPU": settings.cpus_per_worker, **({"GPU": 1} if settings.use_gpu else {})
            },
            elastic_resize_monitor_interval_s=RESIZE_INTERVAL_S,
        ),
        run_config=ray.train.RunConfig(
            name=f"{run_id}-{uuid.uuid4().hex[:6]}",
            storage_path=folder,
            storage_filesystem=files,
            failure_config=ray.train.FailureConfig(max_failures=settings.max_failures),
        ),
        datasets={"train": ray.data.range(1)} if is_streamed else None,
        dataset_config=OrderedStream(task, num_steps) if is_streamed else None,
    )  # fmt: skip


class Trainer(ray.train.torch.TorchTrainer):
    """Ray's trainer without the processes that a run has no use for.

    Each takes three CPU seconds to start. One serves datasets, also where none is streamed. The
    other cleans up after a controller that was lost, which it asks the dashboard about; a Ray that
    ends with its driver has neither need nor dashboard, and every run of it ended 10 s late.
    """

    def _create_default_callbacks(self) -> list[Any]:
        unused: tuple[type, ...] = () if self.datasets else (DatasetsCallback,)
        if is_local():
            unused = (*unused, PlacementGroupCleanerCallback)
        every = super()._create_default_callbacks()  # type: ignore[misc]  # has no types
        return [one for one in every if not isinstance(one, unused)]


class OrderedStream(ray.train.DataConfig):
    """Gives each worker its shard of the order's stream, from the newest checkpoint on.

    Ray asks at every start of the workers, and only then is their number known. The dataset Ray
    was given stands for the name alone.

    Args:
        task: The run.
        num_steps: Steps of the whole run.
    """

    def __init__(self, task: WorkerTask, num_steps: int) -> None:
        super().__init__(execution_options=ExecutionOptions(preserve_order=True))
        self._task, self._num_steps = task, num_steps

    def configure(
        self, datasets: dict[str, Any], world_size: int, *args: Any, **kwargs: Any
    ) -> list[dict[str, ray.data.DataIterator]]:
        """Split the stream of the steps that are left over the workers there are."""
        task = self._task
        checkpoint = newest_good(task.storage, task.config.run_id)
        stream = stream_dataset(
            task.config.data, task.storage, task.dataset, task.order, world_size,
            checkpoint.step if checkpoint else 0, self._num_steps,
        )  # fmt: skip
        return super().configure(dict.fromkeys(datasets, stream), world_size, *args, **kwargs)


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
    if "error" in outcome:
        raise outcome["error"]
    return outcome


def _root_cause(error: BaseException) -> BaseException | None:
    """The workers' own error, if Ray kept it."""
    failures = getattr(error, "worker_failures", None) or {}
    for failure in failures.values():
        while getattr(failure, "cause", None) is not None and failure.cause is not failure:
            failure = failure.cause  # noqa: PLW2901
        return failure  # type: ignore[no-any-return]
    return None


def _publish(result: TrainResult, storage: Storage, tracker: Tracker) -> None:
    folder = f"runs/{result.run_id}"
    scores = f"validation {result.val_accuracy:.4f}, test {result.test_accuracy or 0:.4f}"
    storage.write(f"{folder}/curves.png", draw_curves(result.history, f"{result.run_id}: {scores}"))
    final = {"test_accuracy": result.test_accuracy, "images_per_second": result.images_per_second,
             "data_wait_share": result.data_wait_share, "goodput": result.goodput,
             "interruptions": result.interruptions, "lost_steps": result.lost_steps,
             **{f"ledger_{cause}_s": spent for cause, spent in result.ledger_s.items()},
            }  # fmt: skip
    if result.mfu is not None:
        final["mfu"] = result.mfu
    tracker.log_metrics(result.mlflow_run_id, final, step=result.steps)
    tracker.finish(result.mlflow_run_id)
    save_result(storage, result)
