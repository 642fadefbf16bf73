"""A cluster's address -> its Jobs API, with time limits, and with errors that say what to do.

Ray's own client waits as long as the network does, and speaks in tracebacks.
"""

import logging
import os
from typing import Any, cast
from urllib.parse import quote

import requests
from ray.dashboard.modules.job.pydantic_models import JobDetails
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from rayloop.errors import RequestError, Unreachable, WorkError
from rayloop.submit.address import ADDRESSES, DEFAULT_ADDRESS, TOKEN_FILE
from rayloop.submit.job import Job
from rayloop.submit.package import Package, staged
from rayloop.submit.request import Submission

CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 60.0
LOOK_TIMEOUT_S = 10.0
"""The longest wait for an answer that costs the cluster nothing."""

CHATTY = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
ATTEMPTS = 3
"""Times a request is made where the connection breaks; submitting twice is not possible."""


class Cluster:
    """A Ray cluster, through the HTTP interface of its head.

    Args:
        address: Its URL.

    Raises:
        RequestError: Nothing answers there, or the token is refused.
    """

    def __init__(self, address: str) -> None:
        for name in CHATTY:
            logging.getLogger(name).setLevel(logging.WARNING)
        self.address = address
        self._jobs = _patient_client(address)
        about = self.get("/api/v0/cluster_metadata").get("data") or {}
        if not {"pythonVersion", "rayVersion"} <= about.keys():
            raise _no_head(address, "/api/v0/cluster_metadata", f"{about}")
        self._versions = {"python": about["pythonVersion"], "ray": about["rayVersion"]}

    def get(self, path: str) -> dict[str, Any]:
        """One page as JSON.

        Raises:
            RequestError: Nothing answers, the token is refused, or the page is not there.
        """
        response = _asked(self._jobs, "GET", path, timeout=(CONNECT_TIMEOUT_S, LOOK_TIMEOUT_S))
        if response.status_code != requests.codes.ok:
            told = f"with status {response.status_code}: {response.text[:200]!r}"
            raise _no_head(self.address, path, told)
        try:
            return cast(dict[str, Any], response.json())
        except ValueError:
            raise _no_head(self.address, path, repr(response.text[:200])) from None

    def versions(self) -> dict[str, str]:
        """Of the head's Python and Ray; every other node must have the same to join."""
        return self._versions

    def nodes(self) -> list[dict[str, Any]]:
        """Every node the cluster has known, as its dashboard lists them."""
        return cast(list[dict[str, Any]], self.get("/nodes?view=summary")["data"]["summary"])

    def jobs(self) -> list[Job]:
        """All submitted jobs, oldest first."""
        listed: list[JobDetails] = _told(self.address, self._jobs.list_jobs)
        jobs = (_job(one) for one in listed if one.submission_id)
        return sorted(jobs, key=lambda job: job.began or 0.0)

    def find(self, name: str) -> Job | None:
        """One submitted job, or None."""
        response = _asked(self._jobs, "GET", f"/api/jobs/{quote(name, safe='')}")
        if response.status_code == requests.codes.not_found:
            return None
        if response.status_code != requests.codes.ok:
            raise WorkError(f"{self.address} does not tell of job {name}: {response.text[:300]}")
        return _job(JobDetails(**response.json()))

    def submit(self, submission: Submission, name: str, package: Package) -> bool:
        """Ship the package and start the job, unless one of that name is there already.

        A connection that breaks does no harm: the cluster keeps one job of a name, so the second
        try finds the first.

        Returns:
            Whether this call started it.
        """
        with staged(package) as (working, code):
            environment = {
                "working_dir": str(working),
                "py_modules": [str(code)],
                "env_vars": submission.env_vars,
            }
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    self._jobs.submit_job(
                        entrypoint=submission.entrypoint,
                        submission_id=name,
                        runtime_env=environment,
                        metadata={"rayloop": submission.key},
                    )
                    return True
                except requests.RequestException as error:
                    if attempt == ATTEMPTS:
                        raise _unreachable(self.address, error) from None
                except AuthenticationError as error:
                    raise _refused_token(self.address, error) from None
                except RuntimeError as error:
                    if "already exists" not in str(error):
                        raise WorkError(_not_taken(self.address, str(error))) from None
                    return attempt > 1
        return False

    def stop(self, name: str) -> bool:
        """Ask a job to end, as SIGTERM does; False where it has ended already."""
        return bool(_told(self.address, self._jobs.stop_job, name))

    def log_stream(self, name: str) -> Any:
        """An asynchronous iterator over the text a job prints, from its beginning."""
        return self._jobs.tail_job_logs(name)


def _job(told: JobDetails) -> Job:
    return Job(
        name=told.submission_id or "",
        status=told.status.value,
        message=told.message or "",
        exit_code=told.driver_exit_code,
        command=told.entrypoint,
        began=told.start_time / 1000 if told.start_time else None,
        ended=told.end_time / 1000 if told.end_time else None,
    )


def _patient_client(address: str) -> JobSubmissionClient:
    """Ray's client, whose every request has a time limit."""

    class Patient(JobSubmissionClient):
        def _do_request(self, method: str, endpoint: str, **kwargs: Any) -> requests.Response:
            kwargs.setdefault("timeout", (CONNECT_TIMEOUT_S, ANSWER_TIMEOUT_S))
            return super()._do_request(method, endpoint, **kwargs)

        def _check_connection_and_version(self, *_: Any, **__: Any) -> None:
            """Nothing: the first question of `Cluster` does it, in our words."""

    kept = {name: os.environ.pop(name) for name in ADDRESSES if name in os.environ}
    try:
        # Which lets the environment overrule its argument, and reads the token.
        return cast(JobSubmissionClient, _told(address, Patient, address))
    finally:
        os.environ.update(kept)


def _asked(client: JobSubmissionClient, method: str, path: str, **options: Any) -> Any:
    return _told(client.get_address(), client._do_request, method, path, **options)


def _told(address: str, call: Any, *args: Any, **options: Any) -> Any:
    """The call's result, or its error in our words."""
    try:
        return call(*args, **options)
    except AuthenticationError as error:
        raise _refused_token(address, error) from None
    except requests.exceptions.InvalidURL:
        raise RequestError(
            f"{address} is no URL of a head's dashboard; it is written as in "
            f"{DEFAULT_ADDRESS}, with --address or in RAY_API_SERVER_ADDRESS."
        ) from None
    except (requests.RequestException, ConnectionError) as error:
        raise _unreachable(address, error) from None
    except RuntimeError as error:
        raise WorkError(f"{address} answers: {str(error)[-500:]}") from None


def _no_head(address: str, path: str, told: str) -> RequestError:
    return RequestError(
        f"{address}{path} answers {told}. Is this the dashboard of a Ray 2.60 cluster?"
    )


def _refused_token(address: str, error: Exception) -> RequestError:
    is_missing = "Missing" in str(error) or "required" in str(error)
    problem = "wants a token, and none was sent" if is_missing else "refuses the token it was sent"
    source = os.environ.get("RAY_AUTH_TOKEN_PATH", "") or TOKEN_FILE
    source = "RAY_AUTH_TOKEN" if os.environ.get("RAY_AUTH_TOKEN") else source
    if "cannot be opened" in str(error):
        return RequestError(
            f"The cluster's token is to be in {source}, as RAY_AUTH_TOKEN_PATH says, and that file "
            "is missing, empty or not yours to read. Put the token there (ray get-auth-token on "
            "the cluster's head shows it; for a Ray of rayloop up unset the variable)."
        )
    return RequestError(
        f"The cluster at {address} {problem}. Tokens are looked for in RAY_AUTH_TOKEN, in the file "
        f"that RAY_AUTH_TOKEN_PATH names and in {TOKEN_FILE}"
        + ("" if is_missing else f"; this one came from {source}, is wrong or has been replaced")
        + ". Copy the cluster's token there (ray get-auth-token on its head shows it)."
    )


def _not_taken(address: str, reason: str) -> str:
    if "No available agent" in reason:
        return (
            f"{address} did not take the job: the head's agent does not run, mostly since another "
            "Ray on that machine has its port. Start the head with another "
            "--dashboard-agent-listen-port (rayloop up takes a free one); dashboard_agent.log "
            "there says more."
        )
    return f"{address} did not take the job: {reason[-500:]}"


def _unreachable(address: str, error: Exception) -> Unreachable:
    reason = "no answer in time" if isinstance(error, requests.Timeout) else "nothing answers"
    return Unreachable(
        f"There is no Ray at {address} ({reason}). Start one here with `rayloop up`; for a cluster "
        "open the tunnel with `ray dashboard cluster.yaml`, or name its address with --address or "
        "in RAY_API_SERVER_ADDRESS."
    )
