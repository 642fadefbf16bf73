"""The missing files of a batch prediction -> Ray Data over a pool of engines -> files in place."""

import pickle
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.exceptions import RayActorError
from ray.util.annotations import RayDeprecationWarning
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from rayloop import logs
from rayloop.clock import SYSTEM_CLOCK, Clock
from rayloop.cluster import SPARE_CPUS
from rayloop.config import ServeConfig
from rayloop.data.contract import RowContract
from rayloop.errors import RayloopError, WorkError
from rayloop.logs import stage_logger
from rayloop.serve.load import load_engine
from rayloop.serve.offline.answers import answer_chunks, write_answers
from rayloop.serve.offline.plan import BatchWork, ResultFile, choose_workers
from rayloop.serve.offline.result import FileReport, images_per_second
from rayloop.storage import Storage

log = stage_logger("batch")

LINE_INTERVAL_S = 5.0
"""Time between two lines of progress where there is no terminal."""

FILES_AHEAD = 2
"""Files an engine has been given: the one it works on, and the next so that it need not wait."""

MAX_RETRIES = 3
"""Times a file is tried again after its engine's process died, e.g. for lack of memory."""


class Predictor:
    """One engine in a process of its own: files to write -> reports of them.

    An error that rayloop raises on purpose is handed back as a value: as an exception it would
    reach the user inside Ray's own and with a traceback.

    Args:
        storage: Holds the release and the result.
        contract: The shape the model takes, and its labels.
        version: Model and version.
        serve: How the engine is loaded.
        batch_rows: Rows in one call of the engine.
    """

    def __init__(
        self,
        storage: Storage,
        contract: RowContract,
        version: tuple[str, str],
        serve: ServeConfig,
        batch_rows: int,
    ) -> None:
        logs.configure("WARNING")
        self._storage, self._contract, self._batch_rows = storage, contract, batch_rows
        self._failure: RayloopError | None = None
        try:
            self._engine, _ = load_engine(storage, *version, serve)
        except RayloopError as error:
            self._failure = error

    def __call__(self, files: pa.Table) -> pa.Table:
        """Write the files of one block."""
        found = [self._answer(pickle.loads(file)) for file in files["file"].to_pylist()]
        return pa.table({"report": [pickle.dumps(report) for report in found]})

    def _answer(self, file: ResultFile) -> FileReport | RayloopError:
        if self._failure is not None:
            return self._failure
        try:
            return self._write(file)
        except RayloopError as error:
            return error

    def _write(self, file: ResultFile, clock: Clock = SYSTEM_CLOCK) -> FileReport:
        began_at = clock.now()
        chunks = file.piece.read(self._contract, self._batch_rows)
        table = answer_chunks(self._engine, chunks, self._contract.class_names)
        counts = write_answers(self._storage, file.path, table)
        return FileReport(index=file.index, counts=counts, began_at=began_at, ended_at=clock.now())


def predict_files(work: BatchWork) -> list[FileReport]:
    """Write every missing file on the connected cluster, and show how far it is.

    Args:
        work: As `rayloop.serve.offline.plan.open_work` gave it.

    Returns:
        A report of each file, in the order in which they were written.

    Raises:
        DoesNotFit: The cluster has too few CPUs for the engines.
        RayloopError: What an engine met: damaged data, a full disk, a model that does not
            reproduce its golden answers here. Files that are in place stay.
        WorkError: An engine's process died again and again.
    """
    cpus = ray.cluster_resources().get("CPU", 0.0)  # type: ignore[no-untyped-call]
    num_workers = choose_workers(work, cpus, SPARE_CPUS)
    reports: list[FileReport] = []
    with _shown(work, num_workers) as show:
        try:
            for report in _reports(work, num_workers):
                if isinstance(report, RayloopError):
                    raise report
                reports.append(report)
                show(reports)
        except RayActorError as error:
            if error.actor_init_failed:
                raise
            raise WorkError(
                f"An engine of batch prediction died {MAX_RETRIES + 1} times, most likely for "
                f"lack of memory ({str(error).splitlines()[0]}). Lower --batch.batch_rows, "
                "--batch.rows_per_file or --batch.num_workers, and run the same command again."
            ) from error
    return reports


def _reports(work: BatchWork, num_workers: int) -> Iterator[FileReport | RayloopError]:
    """Run the pipeline: a block a file, an actor an engine."""
    missing = work.missing()
    release = work.release
    files = ray.data.from_items(
        [{"file": pickle.dumps(file)} for file in missing], override_num_blocks=len(missing)
    )
    files.context.enable_progress_bars = False
    files.context.execution_no_progress_timeout_s = -1  # a slow model may take hours for a file
    with warnings.catch_warnings():
        # Only so can retries be bounded, until Ray 2.64 takes it away: a file that kills its
        # reader would be tried for ever.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        written = files.map_batches(
            Predictor,
            fn_constructor_args=(
                work.storage,
                work.contract,
                (release.model, release.version),
                work.serve,
                work.batch_rows,
            ),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                size=num_workers, max_tasks_in_flight_per_actor=FILES_AHEAD
            ),
            num_cpus=1,
            num_gpus=1 if work.serve.use_gpu else None,
            max_task_retries=MAX_RETRIES,
        )
    blocks: Iterable[Any] = written.iter_batches(
        batch_size=None, batch_format="pyarrow", prefetch_batches=0
    )
    for block in blocks:
        yield from map(pickle.loads, block["report"].to_pylist())


@contextmanager
def _shown(work: BatchWork, num_workers: int) -> Iterator[Any]:
    """Lend a function that shows what is done: a bar on a terminal, plain lines elsewhere."""
    missing = sum(file.rows for file in work.missing())
    before = work.source.rows - missing
    log.info(
        "%s version %s over %s: %d of %d rows to do with %d engines",
        work.release.model, work.release.version, work.source.where, missing, work.source.rows,
        num_workers,
    )  # fmt: skip
    if sys.stderr.isatty():
        columns = (BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f} rows"))
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
            task = bar.add_task("", total=work.source.rows, completed=before)
            yield lambda reports: bar.update(task, completed=before + _rows(reports))
    else:
        yield _Lines(before, work.source.rows)


class _Lines:
    """A line of progress every `LINE_INTERVAL_S`, and at the end."""

    def __init__(self, before: int, rows: int, clock: Clock = SYSTEM_CLOCK) -> None:
        self._before, self._all_rows, self._clock = before, rows, clock
        self._next_at = clock.monotonic() + LINE_INTERVAL_S

    def __call__(self, reports: list[FileReport]) -> None:
        done = self._before + _rows(reports)
        if self._clock.monotonic() < self._next_at and done < self._all_rows:
            return
        self._next_at = self._clock.monotonic() + LINE_INTERVAL_S
        errors = sum(report.counts.errors for report in reports)
        log.info(
            "%d of %d rows, %.0f images/s, %d without an answer",
            done, self._all_rows, images_per_second(reports) or 0.0, errors,
        )  # fmt: skip


def _rows(reports: list[FileReport]) -> int:
    return sum(report.counts.rows for report in reports)
