"""Runs, their settings, curves and data -> MLflow.

Only drivers write here, one process a run. Nothing is written to the current folder. A call costs
5 to 10 ms of CPU whatever it writes, so metrics that belong together go in one call.
"""

import json
import math
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rayloop.clock import SYSTEM_CLOCK, Clock
from rayloop.code_version import code_version
from rayloop.errors import DataMissing
from rayloop.locks import exclusive
from rayloop.storage import Storage
from rayloop.tracking_client import EXPERIMENT, artifacts_of, open_client, refuse_silence

RUN_TAG = "rayloop.run_id"
PARENT_TAG = "rayloop.parent"
IS_PARENT_TAG = "rayloop.is_parent"
VERSION_TAG = "rayloop.version"
DATASET_TAG = "dataset"
DIGEST_TAG = "dataset_digest"
COMMIT_TAG = "mlflow.source.git.commit"
CHANGED_TAG = "mlflow.source.git.dirty"
EARLIER_CODE_TAG = "rayloop.earlier_code"
"""Commits of a run's earlier sessions, oldest first, where the code changed between two of them."""
LONGEST_PARAMETER = 500
SHOWN_DIGEST = 12
"""Digits of a dataset's digest on MLflow's pages, which take 36 at most; the tag has all of it."""
PARAMETERS_PER_CALL = 100
MOST_RUNS = 50_000
"""MLflow gives at most so many at a time."""


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as `section.field` and text."""
    flat: dict[str, str] = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = str(value)[:LONGEST_PARAMETER]
    return flat


@dataclass(frozen=True, slots=True)
class TrackedDataset:
    """The data of a run, as MLflow shows it.

    Attributes:
        name: The dataset's name.
        version: Its version.
        digest: SHA-256 over what it says.
        source: Where it lies: a path or URI.
    """

    name: str
    version: str
    digest: str
    source: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackedRun:
    """A run as the tracking database has it.

    Attributes:
        run_id: rayloop's name of it.
        mlflow_run_id: MLflow's.
        parent: rayloop's run id of the parent; empty where there is none.
        status: `RUNNING` (also where its process was killed), `FINISHED`, `FAILED` or `KILLED`.
        started: When its first session began, in seconds since the epoch.
        seconds: Wall time from then to its end, or to now while it runs; breaks count.
        params: Settings as `section.field` and text.
        metrics: The value at the latest step, by name.
        steps: That step, by name.
        tags: All of them, MLflow's own included.
    """

    run_id: str
    mlflow_run_id: str
    parent: str
    status: str
    started: float
    seconds: float
    params: dict[str, str]
    metrics: dict[str, float]
    steps: dict[str, int]
    tags: dict[str, str]


class Tracker:
    """Runs in the tracking database; for drivers, never for Ray workers.

    One process writes a run at a time; its threads may share a tracker.

    Args:
        storage: The root.
        tracking_uri: `registry.tracking_uri`; empty means MLFLOW_TRACKING_URI, and else
            `mlflow.db` under the root.
        clock: Stamps runs and metrics.

    Raises:
        ConfigError: As `tracking_uri_of`.
        StorageUnreachable: The server does not answer.
    """

    def __init__(
        self, storage: Storage, tracking_uri: str = "", clock: Clock = SYSTEM_CLOCK
    ) -> None:
        refuse_silence(storage, tracking_uri)
        self._storage = storage
        self._clock = clock
        self._configured = tracking_uri
        self._writing = threading.Lock()
        self._steps: dict[str, dict[str, int]] = {}
        """The latest step of each metric, by MLflow's run id, of the runs that are written."""
        self._parents: dict[str, str] = {}

    @cached_property
    def _client(self) -> Any:
        return open_client(self._storage, self._configured)

    @cached_property
    def _experiment(self) -> str:
        return str(self._client.get_experiment_by_name(EXPERIMENT).experiment_id)

    def start_run(
        self,
        name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str] | None = None,
        parent: str = "",
        dataset: TrackedDataset | None = None,
    ) -> str:
        """Begin a run, or go on with the one of the same name.

        The code's version is recorded too. Where a run goes on with other code, the commit is the
        newest session's, and those before it stay in `EARLIER_CODE_TAG`.

        Args:
            name: rayloop's run id; a resumed run is the same MLflow run.
            params: Settings, nested or flat; those already recorded are kept as they are.
            tags: Further tags.
            parent: rayloop's run id of the run that this one is a part of.
            dataset: What it is trained on.

        Returns:
            MLflow's run id.

        Raises:
            DataMissing: There is no run of the parent's name.
        """
        wanted = dict(tags or {})
        if parent:
            wanted |= {PARENT_TAG: parent, "mlflow.parentRunId": self._parent(parent)}
        if dataset:
            wanted |= {
                DATASET_TAG: f"{dataset.name}:{dataset.version}", DIGEST_TAG: dataset.digest
            }  # fmt: skip
        with self._writing, exclusive(self._storage, "tracking"):
            found = self._search(_has(RUN_TAG, name), limit=1)
            run = found[0] if found else self._create(name, wanted)
            run_id = str(run.info.run_id)
            if found:
                self._client.update_run(run_id, status="RUNNING")
                self._steps[run_id] = _steps_of(run)
                wanted |= _code_tags(run.data.tags)
            else:
                self._steps[run_id] = {}
            self._complete(run, flatten(params), wanted)
            if dataset:
                self._client.log_inputs(run_id, datasets=[_dataset_input(dataset)])
        return run_id

    def _create(self, name: str, tags: Mapping[str, str]) -> Any:
        source = {"mlflow.source.name": Path(sys.argv[0]).name, "mlflow.source.type": "LOCAL"}
        return self._client.create_run(
            self._experiment,
            start_time=self._now_ms(),
            run_name=name,
            tags={RUN_TAG: name, **source, **_code_tags({}), **tags},
        )

    def _complete(self, run: Any, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        """Write the settings that are not there yet, and the tags that are not there so."""
        from mlflow.entities import Param, RunTag  # noqa: PLC0415

        fresh = [Param(key, value) for key, value in params.items() if key not in run.data.params]
        changed = [RunTag(*tag) for tag in tags.items() if run.data.tags.get(tag[0]) != tag[1]]
        for at in range(0, max(len(fresh), bool(changed)), PARAMETERS_PER_CALL):
            part = fresh[at : at + PARAMETERS_PER_CALL]
            self._client.log_batch(run.info.run_id, params=part, tags=() if at else changed)

    def log_metrics(self, run_id: str, metrics: Mapping[str, Any], step: int = 0) -> None:
        """Record the finite numbers among `metrics` at a step; anything else is left out.

        No step is written twice: a metric that has a value at this step or a later one keeps it,
        so a run that goes on from an earlier checkpoint does not draw its curve again.

        Args:
            run_id: MLflow's, from `start_run`.
            metrics: Values by name.
            step: Training step they belong to.
        """
        from mlflow.entities import Metric  # noqa: PLC0415

        with self._writing:
            if run_id not in self._steps:
                self._steps[run_id] = _steps_of(self._client.get_run(run_id))
            steps = self._steps[run_id]
            now_ms = self._now_ms()
            records = [
                Metric(name, float(value), now_ms, step)
                for name, value in metrics.items()
                if isinstance(value, int | float) and math.isfinite(value)
                if name not in steps or steps[name] < step
            ]
            if records:
                self._client.log_batch(run_id, metrics=records)
                steps.update((record.key, step) for record in records)

    def log_picture(self, run_id: str, name: str, png: bytes) -> None:
        """Put a picture beside the run; a later one of the same name replaces it.

        Args:
            run_id: MLflow's, from `start_run`.
            name: A file name, e.g. `curves.png`; folders are allowed.
            png: Its bytes.
        """
        home = artifacts_of(self._storage)
        place = str(self._client.get_run(run_id).info.artifact_uri)
        if place.startswith(f"{home}/"):
            self._storage.write(f"mlartifacts{place.removeprefix(home)}/{name}", png)
            return
        if place.startswith("s3://"):  # MLflow's client would need a package of Amazon's for it
            Storage(place).write(name, png)
            return
        with tempfile.TemporaryDirectory(prefix="rayloop-picture-") as folder:
            file = Path(folder) / Path(name).name
            file.write_bytes(png)
            inside = Path(name).parent.as_posix()
            self._client.log_artifact(run_id, str(file), None if inside == "." else inside)

    def tag(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags of a run; empty values are left out.

        Args:
            run_id: MLflow's, from `start_run`.
            tags: Texts by name.
        """
        from mlflow.entities import RunTag  # noqa: PLC0415

        found = [RunTag(name, value) for name, value in tags.items() if value]
        self._client.log_batch(run_id, tags=found)

    def finish(self, run_id: str, status: str = "FINISHED") -> None:
        """End a run.

        Args:
            run_id: MLflow's, from `start_run`.
            status: `FINISHED`, `FAILED` or `KILLED`.
        """
        self._client.set_terminated(run_id, status=status, end_time=self._now_ms())
        with self._writing:
            self._steps.pop(run_id, None)

    @contextmanager
    def told_if_it_fails(self, run_id: str) -> Iterator[None]:
        """End a run as `FAILED`, or `KILLED` by a signal, where the block does not end well."""
        try:
            yield
        except BaseException as error:
            self.finish(run_id, "FAILED" if isinstance(error, Exception) else "KILLED")
            raise

    def find(self, name: str) -> str | None:
        """MLflow's run id of the run with rayloop's run id `name`; None where there is none."""
        found = self._search(_has(RUN_TAG, name), limit=1)
        return str(found[0].info.run_id) if found else None

    def read(self, name: str) -> TrackedRun | None:
        """The run with rayloop's run id `name`; None where there is none."""
        found = self._search(_has(RUN_TAG, name), limit=1)
        return _tracked(found[0], self._now_ms()) if found else None

    def runs(
        self, parent: str | None = "", limit: int = 100, sort: str = "", ascending: bool = False
    ) -> list[TrackedRun]:
        """Runs as the database has them, newest first; about 4 ms each.

        Args:
            parent: Only the children of this run; empty for runs without a parent, None for all.
            limit: At most so many, up to `MOST_RUNS`.
            sort: Name of a metric to sort by, the largest first and runs without it last.
            ascending: With `sort`, the smallest first.
        """
        if parent is None:
            which = ""
        else:
            which = _has(PARENT_TAG, parent) if parent else f"tags.`{PARENT_TAG}` IS NULL"
        order = (
            [f"metrics.`{sort}` {'ASC' if ascending else 'DESC'}"]
            if sort and "`" not in sort
            else []
        )
        found = self._search(which, limit, [*order, "attributes.start_time DESC"])
        now_ms = self._now_ms()
        return [_tracked(run, now_ms) for run in found]

    def _parent(self, name: str) -> str:
        if name not in self._parents:
            found = self.find(name)
            if found is None:
                raise DataMissing(
                    f"There is no run {name!r} in the tracking database to be the parent of "
                    "another; start it first, as in tracker.start_run(parent, settings)."
                )
            self.tag(found, {IS_PARENT_TAG: "true"})
            self._parents[name] = found
        return self._parents[name]

    def _search(self, which: str, limit: int, order: Sequence[str] = ()) -> Sequence[Any]:
        found: Sequence[Any] = self._client.search_runs(
            [self._experiment], filter_string=which, max_results=limit, order_by=list(order)
        )
        return found

    def _now_ms(self) -> int:
        return int(self._clock.now() * 1000)


def _has(tag: str, value: str) -> str:
    """The query for runs with a tag; a run id has no quotes, so text that has some names none."""
    return f"tags.`{tag}` = '{value.replace(chr(39), '?')}'"


def _steps_of(run: Any) -> dict[str, int]:
    return {metric.key: int(metric.step) for metric in run.data.to_proto().metrics}


def _code_tags(recorded: Mapping[str, str]) -> dict[str, str]:
    """Tags for the code that runs now, beside those of a run's earlier session if it had one."""
    code = code_version()
    tags = {VERSION_TAG: code.version}
    if not code.commit:
        return tags
    tags |= {COMMIT_TAG: code.commit, CHANGED_TAG: str(code.has_changes).lower()}
    before = commit_of(recorded)
    if before not in ("", commit_of(tags)):
        tags[EARLIER_CODE_TAG] = f"{recorded.get(EARLIER_CODE_TAG, '')} {before}".strip()
    return tags


def commit_of(tags: Mapping[str, str]) -> str:
    """The commit among a run's tags, with `-dirty` if the checkout had changes; may be empty."""
    mark = "-dirty" if tags.get(CHANGED_TAG) == "true" else ""
    return f"{tags[COMMIT_TAG]}{mark}" if COMMIT_TAG in tags else ""


def _dataset_input(dataset: TrackedDataset) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag  # noqa: PLC0415

    scheme, found, _ = dataset.source.partition("://")
    about = Dataset(
        name=dataset.name,
        digest=dataset.digest[:SHOWN_DIGEST],
        source_type=scheme if found else "local",
        source=json.dumps({"uri": dataset.source}),
        profile=json.dumps({"version": dataset.version, "digest": dataset.digest}),
    )
    return DatasetInput(about, tags=[InputTag("mlflow.data.context", "training")])


def _tracked(run: Any, now_ms: int) -> TrackedRun:
    tags = dict(run.data.tags)
    runs_on = run.info.status == "RUNNING" or run.info.end_time is None
    ended_ms = now_ms if runs_on else run.info.end_time
    return TrackedRun(
        run_id=tags.get(RUN_TAG, run.info.run_name),
        mlflow_run_id=run.info.run_id,
        parent=tags.get(PARENT_TAG, ""),
        status=run.info.status,
        started=run.info.start_time / 1000,
        seconds=max(0, ended_ms - run.info.start_time) / 1000,
        params=dict(run.data.params),
        metrics=dict(run.data.metrics),
        steps=_steps_of(run),
        tags=tags,
    )
