"""What was typed on one machine -> what runs on another: words, environment, and a name for it.

Everything a submitted job is told is kept by the cluster and shown on its pages, so nothing secret
may be in it: credentials are the nodes' own.
"""

import difflib
import hashlib
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rayloop.code_version import SHIPPED_COMMIT
from rayloop.credentials import place_of_credentials
from rayloop.errors import RequestError

SENT = (
    "MLFLOW_TRACKING_URI",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
)
"""Addresses that a job takes along; credentials never are."""

SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "MLFLOW_TRACKING_PASSWORD",
           "MLFLOW_TRACKING_TOKEN", "RAY_AUTH_TOKEN")  # fmt: skip
"""Variables whose value must not be among the words of a command line either."""

SHORTEST_SECRET = 6
READ = ("data.path", "batch.input", "simulate.calibration")
"""Settings that name a file or folder to read."""

WRITTEN = ("pipeline.report",)
"""Settings that name a file to write."""

DATABASE = "registry.tracking_uri"
"""The setting that names an MLflow server, or a database that may be a file."""

PATHS = {setting.partition(".")[2]: setting for setting in READ + WRITTEN}
"""A job's own settings are flags without its name too."""

DEFAULT_REPORT = "report.html"


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """One job as the cluster is given it.

    Attributes:
        entrypoint: The command line.
        env_vars: What it finds in its environment besides the nodes' own.
        key: Equal for equal requests: from the words, the environment and the package.
    """

    entrypoint: str
    env_vars: dict[str, str]
    key: str

    def name(self, attempt: int) -> str:
        """The cluster's name for the n-th time this is asked for, counted from 1."""
        return self.key if attempt == 1 else f"{self.key}-{attempt}"


def job_script(root: Path, job: str) -> str:
    """The script of a job, relative to the checkout.

    Raises:
        RequestError: There is none of that name.
    """
    name = job.removeprefix("jobs/").removesuffix(".py")
    if not (root / "jobs" / f"{name}.py").exists():  # jobs/select.py is a folder
        known = sorted(path.stem for path in (root / "jobs").glob("*.py"))
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else "Run it from the repository's root."
        raise RequestError(
            f"There is no jobs/{name}.py; the jobs here are {', '.join(known) or 'none'}. {hint}"
        )
    return f"jobs/{name}.py"


def compose(
    script: str,
    words: Sequence[str],
    *,
    environment: Mapping[str, str],
    folder: Path,
    is_here: bool,
    package_digest: str,
    versions: Mapping[str, str],
    commit: str = "",
) -> Submission:
    """Make the submission of a command.

    Args:
        script: The job, relative to the checkout.
        words: The preset and the flags.
        environment: Of this process.
        folder: The current folder, from which relative paths count.
        is_here: Whether the cluster's nodes are this machine and see its files.
        package_digest: Of the code that is shipped.
        versions: Of the libraries here, which the job compares with its own.
        commit: Of the checkout, with `+changes` behind it where it has any; may be empty.

    Raises:
        RequestError: A path that the cluster cannot see, or a secret.
    """
    refuse_secrets(words, environment)
    words = [*_with_paths(words, folder, is_here)]
    if script == "jobs/pipeline.py" and is_here and not _has(words, "pipeline.report"):
        words += ["--pipeline.report", str(folder / DEFAULT_REPORT)]
    env_vars = {name: environment[name] for name in SENT if environment.get(name)}
    home = home_of(environment, folder, is_here)
    if home:
        env_vars["RAYLOOP_HOME"] = home
    for name, value in env_vars.items():
        _refuse_credentials(name, value)
    uri = env_vars.get("MLFLOW_TRACKING_URI", "")
    if uri:
        env_vars["MLFLOW_TRACKING_URI"] = _database("MLFLOW_TRACKING_URI=", uri, folder, is_here)
    env_vars["RAYLOOP_SUBMITTED_WITH"] = json.dumps(dict(versions), sort_keys=True)
    if commit:
        env_vars[SHIPPED_COMMIT] = commit
    entrypoint = shlex.join(["python", script, *words])
    told = json.dumps([entrypoint, env_vars, package_digest], sort_keys=True)
    stem, preset = Path(script).stem, words[0] if words else ""
    key = f"{stem}-{preset}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"
    return Submission(entrypoint=entrypoint, env_vars=env_vars, key=key)


def home_of(environment: Mapping[str, str], folder: Path, is_here: bool) -> str:
    """RAYLOOP_HOME for the job; empty leaves it to the nodes' own.

    Raises:
        RequestError: It is a relative folder of this machine, which the cluster does not see.
    """
    home = environment.get("RAYLOOP_HOME", "")
    if "://" in home or (home and Path(home).is_absolute()):
        return home
    if is_here:
        return str((folder / (home or ".rayloop")).resolve())
    if home:
        raise RequestError(
            f"RAYLOOP_HOME={home} is a folder of this machine, and the cluster's nodes do not see "
            "it. Set it to s3://BUCKET/PREFIX or to an absolute folder that all nodes share."
        )
    return ""


def refuse_secrets(words: Sequence[str], environment: Mapping[str, str]) -> None:
    """Refuse a command line that would write a secret into the cluster's records.

    Raises:
        RequestError: The message names the place, not the secret.
    """
    secrets = {name: environment.get(name, "") for name in SECRETS}
    for word in words:
        for name, value in secrets.items():
            if len(value) >= SHORTEST_SECRET and value in word:
                raise RequestError(
                    f"The command line holds the value of {name}, and a cluster shows every job's "
                    "command line. Leave it out: the nodes must have it in their environment."
                )
        _refuse_credentials("The command line", word)


def _refuse_credentials(where: str, text: str) -> None:
    place = place_of_credentials(text)
    if place:
        raise RequestError(
            f"{where} holds an address with credentials in it ({place}), and a "
            "cluster shows what its jobs are given. Take them out; the nodes must have them in "
            "their environment (AWS_SECRET_ACCESS_KEY, MLFLOW_TRACKING_PASSWORD)."
        )


def _with_paths(words: Sequence[str], folder: Path, is_here: bool) -> list[str]:
    """The words with every path absolute."""
    done: list[str] = []
    for word in words:
        flag, mark, value = word.partition("=")
        if mark:
            done.append(f"{flag}={_absolute(_setting(flag), value, folder, is_here)}")
        elif done:
            done.append(_absolute(_setting(done[-1]), word, folder, is_here))
        else:
            done.append(word)
    return done


def _absolute(setting: str, value: str, folder: Path, is_here: bool) -> str:
    """The value of a setting, absolute where it is a path."""
    if setting == DATABASE:
        return _database(f"--{DATABASE} ", value, folder, is_here)
    if setting not in READ + WRITTEN:
        return value
    is_name = setting == "batch.input" and not _is_path(value, folder)
    if "://" in value or not value or is_name or (Path(value).is_absolute() and not is_here):
        return value
    if not is_here:
        raise RequestError(
            f"--{setting} {value} is a path of this machine, and the cluster's nodes do not see "
            "it. Copy it to s3:// or to a folder all nodes share, and give that address."
        )
    path = (folder / value).resolve()
    if setting in READ and not path.exists():
        raise RequestError(f"--{setting} {value}: there is no {path} on this machine.")
    return str(path)


def _database(told: str, uri: str, folder: Path, is_here: bool) -> str:
    """An MLflow address, absolute where it is a file: `sqlite:///FILE`, `file:FOLDER`, `FOLDER`."""
    scheme = next((one for one in ("sqlite:///", "file://", "file:") if uri.startswith(one)), "")
    is_server = not scheme and (":" in uri or uri == "databricks")
    if is_server or not uri:
        return uri
    if not is_here:
        raise RequestError(
            f"{told}{uri} is a file of this machine, and the cluster's nodes do not see it. Set it "
            "to an MLflow server, http://HOST:PORT."
        )
    return f"{scheme}{(folder / uri.removeprefix(scheme)).resolve()}"


def _is_path(value: str, folder: Path) -> bool:
    """Whether `--batch.input` means files and not `SPLIT` or `dataset:NAME/SPLIT`."""
    is_dataset = value.startswith("dataset:")
    return not is_dataset and (os.sep in value or (folder / value).exists())


def _has(words: Sequence[str], setting: str) -> bool:
    return any(_setting(word.partition("=")[0]) == setting for word in words)


def _setting(flag: str) -> str:
    """`--data.path` as `data.path`, as is its short form; empty for what is no flag."""
    name = flag[2:].replace("-", "_") if flag.startswith("--") else ""
    return PATHS.get(name, name)
