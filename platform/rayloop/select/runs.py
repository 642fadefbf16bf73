"""The select section -> the finished runs to compare, all of one dataset version."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from rayloop.config import Config
from rayloop.data.versions import DatasetVersion, open_version
from rayloop.errors import ConfigError, Corrupt, DataMissing, RequestError
from rayloop.storage import Storage
from rayloop.train.result import TrainResult, load_result

TRAIN_HINT = "Train one: python jobs/train.py PRESET"


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundRuns:
    """What there is to choose from.

    Attributes:
        dataset: The version all runs were trained on.
        runs: The finished runs, by name.
        left_out: Why a run that was in question is not among them, by its name.
    """

    dataset: DatasetVersion
    runs: tuple[TrainResult, ...]
    left_out: dict[str, str]


def find_runs(storage: Storage, config: Config) -> FoundRuns:
    """The finished runs that the select section names, or all of the dataset version in question.

    Args:
        storage: The root everything lives under.
        config: The select section names runs or a sweep; with neither, the data section says which
            dataset version counts, and no version is the newest one.

    Raises:
        ConfigError: `run_id` is set, which no single run has here.
        DataMissing: A run, the sweep or the dataset is not there, or no run is finished.
        RequestError: The runs were trained on different data.
    """
    if config.run_id:
        raise ConfigError(
            f"run_id={config.run_id!r} says nothing here, where many runs are compared; name them "
            f"with --runs {config.run_id} ..., or leave it out."
        )
    if config.select.runs or config.select.sweep:
        names = config.select.runs or _trials(storage, config.select.sweep)
        runs = [_load(storage, name) for name in sorted(set(names))]
        _refuse_mixture(runs)
        dataset = open_version(storage, runs[0].dataset_name, runs[0].dataset_version)
        return FoundRuns(dataset=dataset, runs=tuple(runs), left_out={})
    dataset = open_version(storage, config.data.dataset_name, config.data.version)
    return _all_of(storage, dataset)


def _finished(storage: Storage) -> list[str]:
    names = storage.names("runs")
    return [name for name in names if storage.exists(f"runs/{name}/result.json")]


def _load(storage: Storage, name: str) -> TrainResult:
    if storage.exists(f"runs/{name}/result.json"):
        return load_result(storage, name)
    begun = storage.exists(f"runs/{name}/config.json")
    what = f"Run {name!r} is not finished" if begun else f"There is no run {name!r}"
    how = f"To finish it: python jobs/train.py PRESET --run-id {name}" if begun else TRAIN_HINT
    hint = _nearest(name, _finished(storage), "finished runs")
    raise DataMissing(f"{what} under {storage.path('runs')}{hint} {how}")


def _trials(storage: Storage, sweep: str) -> list[str]:
    """Names of a sweep's trials that left a model."""
    if not storage.exists(f"runs/{sweep}/sweep.json"):
        names = storage.names("runs")
        sweeps = [name for name in names if storage.exists(f"runs/{name}/sweep.json")]
        raise DataMissing(
            f"There is no sweep {sweep!r} under {storage.path('runs')}"
            f"{_nearest(sweep, sweeps, 'sweeps')} Run one: python jobs/tune.py PRESET"
        )
    found = [name for name in _finished(storage) if _is_trial(name, sweep)]
    if not found:
        raise DataMissing(
            f"Sweep {sweep!r} under {storage.path('runs')} has no finished trial yet. Let it go "
            f"on: python jobs/tune.py PRESET --run-id {sweep}"
        )
    return found


def _is_trial(name: str, sweep: str) -> bool:
    return name.startswith(f"{sweep}-") and name[len(sweep) + 1 :].isdigit()


def _all_of(storage: Storage, dataset: DatasetVersion) -> FoundRuns:
    runs, left_out = [], {}
    for name in _finished(storage):
        try:
            run = load_result(storage, name)
        except Corrupt as error:
            left_out[name] = str(error)
            continue
        if run.dataset_digest == dataset.digest:
            runs.append(run)
    if not runs:
        elsewhere = len(_finished(storage))
        others = f" ({elsewhere} are there, on other data)" if elsewhere else ""
        raise DataMissing(
            f"There is no finished run on {dataset.name}:{dataset.version} under "
            f"{storage.path('runs')}{others}. {TRAIN_HINT}"
        )
    return FoundRuns(dataset=dataset, runs=tuple(runs), left_out=left_out)


def _refuse_mixture(runs: Sequence[TrainResult]) -> None:
    first = runs[0]
    for other in runs[1:]:
        if other.dataset_digest != first.dataset_digest:
            raise RequestError(
                f"Run {first.run_id!r} was trained on {_data_of(first)} and run {other.run_id!r} "
                f"on {_data_of(other)}; their accuracies are over different rows and cannot be "
                "compared. Name runs of one dataset version with --runs."
            )


def _data_of(run: TrainResult) -> str:
    return f"{run.dataset_name}:{run.dataset_version} (digest {run.dataset_digest[:12]})"


def _nearest(name: str, known: Sequence[str], what: str) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; the {what} are {', '.join(known[:8])}." if known else f"; there are no {what}."
