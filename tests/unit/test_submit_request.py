"""What a submitted job is told: paths the cluster sees, no secrets, one name for one request."""

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from rayloop.config import Config
from rayloop.errors import RequestError
from rayloop.submit.address import cluster_address, use_token
from rayloop.submit.arrival import refuse_to_start, refuse_versions, run_shipped_code
from rayloop.submit.request import READ, WRITTEN, Submission, compose, job_script

ROOT = Path(__file__).parents[2]
VERSIONS = {"python": "3.11.7", "ray": "2.60.0", "torch": "2.15.0"}


def composed(
    *words: str, script: str = "jobs/train.py", here: bool = True, folder: Path = ROOT, **env: str
) -> Submission:
    return compose(
        script, words, environment=env, folder=folder, is_here=here,
        package_digest="abc", versions=VERSIONS,
    )  # fmt: skip


def test_paths_become_absolute_where_the_cluster_is_this_machine(tmp_path: Path) -> None:
    (tmp_path / "my photos").mkdir()
    for words in (["--data.path", "my photos"], ["--data.path=my photos"]):
        made = composed("laptop", *words, folder=tmp_path)
        assert str(tmp_path / "my photos") in " ".join(shlex.split(made.entrypoint))
        assert made.env_vars["RAYLOOP_HOME"] == str(tmp_path / ".rayloop")
    home = composed("laptop", folder=tmp_path, RAYLOOP_HOME="mine").env_vars["RAYLOOP_HOME"]
    assert home == str(tmp_path / "mine")


def test_a_report_does_not_go_away_with_the_jobs_working_folder(tmp_path: Path) -> None:
    made = composed("smoke", script="jobs/pipeline.py", folder=tmp_path)
    assert made.entrypoint.endswith(f"--pipeline.report {tmp_path}/report.html")
    made = composed(
        "smoke", "--pipeline.report", "r.html", script="jobs/pipeline.py", folder=tmp_path
    )
    assert made.entrypoint.endswith(f"--pipeline.report {tmp_path}/r.html")


@pytest.mark.parametrize(
    ("words", "env", "told"),
    [
        (["--data.path", "photos"], {}, "--data.path photos is a path of this machine"),
        (["--data-path=./photos"], {}, "is a path of this machine"),
        (["--batch.input", "a/b"], {}, "--batch.input a/b is a path of this machine"),
        ([], {"RAYLOOP_HOME": "mine"}, "RAYLOOP_HOME=mine is a folder of this machine"),
        (["--simulate.calibration", "m.json"], {}, "--simulate.calibration m.json is a path"),
    ],
)
def test_a_path_of_this_machine_is_refused_for_a_cluster(
    words: list[str], env: dict[str, str], told: str
) -> None:
    if words == ["--data-path=./photos"]:
        words = ["--data.path=./photos"]
    with pytest.raises(RequestError) as caught:
        composed("cluster", *words, here=False, **env)
    assert told in str(caught.value)
    assert "s3://" in str(caught.value)


@pytest.mark.parametrize(
    "words",
    [
        ["--data.path", "s3://bucket/photos"],
        ["--data.path", "/mnt/shared/photos"],
        ["--batch.input", "dataset:digits/train"],
        ["--batch.input", "test"],
    ],
)
def test_what_the_cluster_can_see_is_passed_on_as_it_is(words: list[str]) -> None:
    made = composed("cluster", *words, here=False)
    assert shlex.split(made.entrypoint)[3:] == words
    assert "RAYLOOP_HOME" not in made.env_vars  # the nodes' own


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("sqlite:///mlflow.db", "sqlite:///{folder}/mlflow.db"),
        ("sqlite:////data/mlflow.db", "sqlite:////data/mlflow.db"),
        ("file:mlruns", "file:{folder}/mlruns"),
        ("mlruns", "{folder}/mlruns"),
        ("http://mlflow:5000", "http://mlflow:5000"),
        ("postgresql://db/mlflow", "postgresql://db/mlflow"),
    ],
)
def test_an_mlflow_database_is_absolute_here_and_refused_elsewhere(
    given: str, sent: str, tmp_path: Path
) -> None:
    sent = sent.format(folder=tmp_path)
    flag = "--registry.tracking_uri"
    made = composed("laptop", flag, given, folder=tmp_path, MLFLOW_TRACKING_URI=given)
    assert shlex.split(made.entrypoint)[-1] == sent
    assert made.env_vars["MLFLOW_TRACKING_URI"] == sent
    if given.startswith(("http:", "postgresql:")):
        assert composed("cluster", flag, given, here=False).entrypoint.endswith(given)
        return
    for words, env in (([flag, given], {}), ([], {"MLFLOW_TRACKING_URI": given})):
        with pytest.raises(RequestError, match="is a file of this machine") as caught:
            composed("cluster", *words, here=False, **env)
        assert given in str(caught.value)


def test_a_jobs_own_paths_have_a_short_form_too(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text("{}")
    words = ["laptop", "--calibration", "mine.json"]
    made = composed(*words, script="jobs/simulate.py", folder=tmp_path)
    assert made.entrypoint.endswith(f"--calibration {tmp_path}/mine.json")
    with pytest.raises(RequestError, match="is a path of this machine"):
        composed(*words, script="jobs/simulate.py", folder=tmp_path, here=False)


def test_a_missing_folder_is_told_before_anything_is_submitted(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=f"there is no {tmp_path}/photo on this machine"):
        composed("laptop", "--data.path", "photo", folder=tmp_path)


@pytest.mark.parametrize(
    ("words", "env"),
    [
        (["--registry.tracking_uri", "http://me:hush-hush@mlflow"], {}),
        (["--registry.tracking_uri=http://me:hush-hush@mlflow"], {}),
        ([], {"MLFLOW_TRACKING_URI": "http://me:hush-hush@mlflow"}),
        ([], {"MLFLOW_TRACKING_URI": "https://hush-hush@mlflow/"}),
        ([], {"RAYLOOP_HOME": "s3://KEY:hush-hush@bucket/x"}),
        ([], {"RAYLOOP_HOME": "s3://KEY:a/hush@hush@bucket/x"}),
        (["--registry.tracking_uri", "postgresql://me:hush@db/mlflow?sslmode=require"], {}),
        (["--registry.tracking_uri=postgresql://db/mlflow?user=me&password=hush"], {}),
        (["--run-id", "x-hush-hush"], {"AWS_SECRET_ACCESS_KEY": "hush-hush"}),
    ],
)
def test_a_secret_is_refused_without_being_told(words: list[str], env: dict[str, str]) -> None:
    with pytest.raises(RequestError) as caught:
        composed("cluster", *words, here=False, **env)
    assert "hush" not in str(caught.value)
    assert "environment" in str(caught.value)


def test_addresses_go_along_and_credentials_stay() -> None:
    made = composed(
        "cluster",
        here=False,
        AWS_ENDPOINT_URL="http://minio:9000",
        AWS_SECRET_ACCESS_KEY="hush-hush",
        AWS_ACCESS_KEY_ID="KEY",
        RAY_AUTH_TOKEN="token-token",
        RAYLOOP_HOME="s3://bucket/x",
    )
    assert made.env_vars["AWS_ENDPOINT_URL"] == "http://minio:9000"
    assert made.env_vars["RAYLOOP_HOME"] == "s3://bucket/x"
    assert "hush" not in json.dumps(dataclasses.asdict(made))
    assert "KEY" not in json.dumps(made.env_vars).replace("s3://", "")


def test_equal_requests_have_one_name_and_others_another() -> None:
    one = composed("laptop", "--train.seed", "1")
    assert composed("laptop", "--train.seed", "1") == one
    assert composed("laptop", "--train.seed", "2").key != one.key
    assert composed("laptop", "--train.seed", "1", RAYLOOP_HOME="/other").key != one.key
    assert one.name(1) == one.key and one.name(2) == f"{one.key}-2"
    assert one.key.startswith("train-laptop-")


def test_words_with_blanks_and_quotes_arrive_as_they_were() -> None:
    word = "train.learning_rate=log(0.01, 1) if train.optimizer == 'sgd'"
    made = composed("smoke", "--tune.space", word, script="jobs/tune.py")
    assert shlex.split(made.entrypoint) == [
        "python", "jobs/tune.py", "smoke", "--tune.space", word
    ]  # fmt: skip


def test_a_job_is_found_by_its_name_or_path_and_else_the_others_are_told() -> None:
    for told in ("train", "jobs/train.py", "train.py", "select"):
        assert (ROOT / job_script(ROOT, told)).exists()
    with pytest.raises(RequestError, match=r"no jobs/trian.py; the jobs here are .*train"):
        job_script(ROOT, "trian")


def test_every_setting_that_is_a_path_is_known() -> None:
    found = {
        f"{section.name}.{name}"
        for section in dataclasses.fields(Config)
        if dataclasses.is_dataclass(section.type)
        for name in get_type_hints(section.type)
        if name in ("path", "input", "report", "folder", "file", "output", "calibration")
    }
    names = {"batch.output", "select.output"}  # names under the home
    assert found - names == {*READ, *WRITTEN}


@pytest.mark.parametrize(
    ("mine", "cluster", "told"),
    [
        ({"ray": "2.60.0"}, {"ray": "2.59.1"}, "runs ray 2.59.1, and the job was submitted with"),
        ({"python": "3.12.1"}, {"python": "3.11.9"}, "runs python 3.11, .* with python 3.12"),
        ({"torch": "2.15.0"}, {"torch": "2.14.0+cu128"}, "torch 2.14.0"),
    ],
)
def test_other_versions_are_refused(
    mine: dict[str, str], cluster: dict[str, str], told: str
) -> None:
    with pytest.raises(RequestError, match=told):
        refuse_versions(mine, cluster)


def test_builds_and_patches_of_a_version_are_the_same() -> None:
    refuse_versions(
        {"python": "3.11.7", "torch": "2.15.0+cpu"}, {"python": "3.11.9", "torch": "2.15.0+cu130"}
    )
    refuse_versions({"torch": "2.15.0"}, {})


def test_a_submitted_job_without_a_home_of_its_own_is_refused() -> None:
    submitted = {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}
    for home in ("", "mine"):
        with pytest.raises(RequestError, match=r"RAYLOOP_HOME is .* in this submitted job"):
            refuse_to_start({**submitted, "RAYLOOP_HOME": home})
    refuse_to_start({**submitted, "RAYLOOP_HOME": "/shared/home"})
    refuse_to_start({**submitted, "RAYLOOP_HOME": "s3://bucket"})
    refuse_to_start({})
    with pytest.raises(RequestError, match="runs torch"):
        refuse_to_start({**submitted, "RAYLOOP_SUBMITTED_WITH": '{"torch": "1.0"}'})


def test_a_job_starts_over_with_the_package_it_was_shipped_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr("os.execve", lambda *args: calls.append(args))
    submitted = {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}", "PYTHONPATH": "/before"}
    run_shipped_code(submitted, tmp_path)  # ships none
    (tmp_path / "platform" / "rayloop").mkdir(parents=True)
    (tmp_path / "platform" / "rayloop" / "__init__.py").touch()
    run_shipped_code({}, tmp_path)  # started by hand
    run_shipped_code(submitted, ROOT)  # is the one that runs
    assert calls == []
    run_shipped_code(submitted, tmp_path)
    (_, words, changed), *_ = calls
    assert changed["PYTHONPATH"] == f"{tmp_path}/platform:/before"
    assert words[0].endswith("python")


@pytest.mark.parametrize(
    ("given", "env", "local", "meant"),
    [
        ("", {}, "", "http://127.0.0.1:8265"),
        ("", {}, "http://127.0.0.1:9", "http://127.0.0.1:9"),
        ("", {"RAY_ADDRESS": "http://a:1"}, "http://127.0.0.1:9", "http://a:1"),
        ("https://b/", {"RAY_ADDRESS": "http://a:1"}, "", "https://b"),
    ],
)
def test_the_address_said_nearest_counts(
    given: str, env: dict[str, str], local: str, meant: str
) -> None:
    assert cluster_address(given, env, local) == meant


@pytest.mark.parametrize("address", ["ray://head:10001", "head:6379", "auto", "127.0.0.1:8265"])
def test_an_address_of_another_kind_is_refused(address: str) -> None:
    with pytest.raises(RequestError, match=rf"RAY_ADDRESS={address} is no address to submit to"):
        cluster_address("", {"RAY_ADDRESS": address})


def test_a_token_is_sent_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    none: dict[str, str] = {}
    use_token(tmp_path / "missing", none)
    assert none == {}
    (tmp_path / "token").write_text("t")
    for local in (
        {"RAY_AUTH_TOKEN": "of another cluster"},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/of/another/cluster"},
        {"RAY_AUTH_MODE": "disabled"},
    ):
        use_token(tmp_path / "token", local)
        assert local == {
            "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"), "RAY_AUTH_MODE": "token"
        }  # fmt: skip
    off = {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "x"}
    use_token(None, off)
    assert off["RAY_AUTH_MODE"] == "disabled"
