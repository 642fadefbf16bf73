"""The `rayloop` command: what it prints, and one sentence for what is wrong."""

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from rayloop.cli.main import main, split_reference
from rayloop.storage import Storage
from tests.releases import MODEL, register_all
from tests.unit.serve_snapshots import busy


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("template")
    register_all(root, 4, odd="4")
    return root


@pytest.fixture
def root(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(template, tmp_path / "home")
    monkeypatch.setenv("RAYLOOP_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def says(capsys: pytest.CaptureFixture[str]):
    def say(*words: str) -> list[dict]:
        main([*words, "--json"])
        return json.loads(capsys.readouterr().out)

    return say


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]):
    def fail(*words: str) -> str:
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        return printed.err

    return fail


@pytest.fixture
def server(root: Path) -> Iterator[str]:
    """A server that says what two replicas say, and its note under the root."""
    replicas = [dict(busy("one"), plan=3), dict(busy("two"), plan=3)]

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"replicas": replicas}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answers) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{http.server_port}"
        Storage(str(root)).write_json("serving/x/server.json", {"url": url, "model": MODEL})
        yield url
        http.shutdown()
        thread.join()


def test_a_split_is_set_shown_and_kept(root, says) -> None:
    rows = says("traffic", "set", "champion=0.9", "challenger=0.1", "--shadow", "3")
    assert [(r["variant"], r["version"], r["share"]) for r in rows] == [
        ("champion", "1", 0.9), ("challenger", "2", 0.1), ("shadow", "3", 0.0)
    ]  # fmt: skip
    assert says("traffic", "show") == rows
    says("traffic", "set", "champion=1", "--no-shadow", "--below", "0.5", "--fallback", "3",
         "--max-fallback-share", "0.2", "--why", "try the large one")  # fmt: skip
    assert says("traffic", "show")[1]["variant"] == "fallback below 0.5, at most 0.2 of rows"
    assert [row["version"] for row in says("promote")] == ["2", "3"]
    assert [row["version"] for row in says("rollback")] == ["1", "3"]
    history = says("traffic", "history")
    assert [row["plan"] for row in history] == [1, 2, 3, 4]
    assert history[1]["why"] == "try the large one"
    assert "@" in history[0]["by"]
    assert {row["version"]: row["aliases"] for row in says("models")}["1"] == ["champion"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["traffic", "set", "champion=0.9"], "sum to 0.9, not 1; use e.g. champion=1"),
        (["traffic", "set", "champion"], "'champion' must be NAME=SHARE"),
        (["traffic", "set", "champion=much"], "'champion=much' must be NAME=SHARE"),
        (["traffic", "set", "a=0.5", "a=0.5"], "'a' is named twice"),
        (["traffic", "set", "champion=0.5", "9=0.5"], "no version '9'"),
        (["traffic", "set", "champion=0.5", "best=0.5"], "no alias 'best'"),
        (["traffic", "set", "champion=0.5", "4=0.5"], "takes images of 6x6x3"),
        (["traffic", "set", "champion=1", "--fallback", "champion"], "fall back to itself"),
        (["traffic", "set", "champion=1", "--base", "7"], "decided on plan 7, and plan 0"),
        (["traffic", "set", "champion=1", "--below", "7"], "low_confidence.below=7"),
        (["traffic", "show"], "has no traffic plan yet"),
        (["traffic", "show", "--model", "nothing"], "'nothing' has no traffic plan yet"),
        (["rollback"], "no alias 'previous'"),
        (["promote", "nothing"], "no alias 'challenger'"),
        (["status", "--url", "http://127.0.0.1:9"], "No rayloop server answers at"),
        (["events", "show", "f" * 32], "There is no event of prediction"),
        (["events", "delete"], "Say what to delete"),
        (["events", "prune", "--keep-days", "0"], "--keep-days 0 must be at least 1"),
    ],
)
def test_what_is_wrong_is_told_in_one_sentence(root, fails, words, sentence) -> None:
    assert sentence in fails(*words)


def test_a_typo_is_told_by_the_parser(root, fails) -> None:
    assert "invalid choice: 'trafic'" in fails("trafic", "show")
    assert "unrecognized arguments: --shadows" in fails("traffic", "set", "a=1", "--shadows", "2")


def test_status_asks_the_servers_of_this_root_twice(server, says) -> None:
    (one,) = says("status", "--seconds", "0.1")["servers"]
    assert one["url"] == server
    assert (one["header"]["replicas"], one["header"]["plan"]) == (2, 3)
    assert one["variants"]


def test_status_for_people(server, root, capsys) -> None:
    main(["status", "--seconds", "0.1", "--url", server])
    printed = capsys.readouterr().out
    assert "plan 3" in printed
    assert "champion" in printed


def test_status_shows_the_cluster_before_it_asks_servers_that_may_not_be_reached(
    root, capsys, monkeypatch
) -> None:
    seen = {
        "ray": {"ray": "2.60.0", "address": "http://head:8265"}, "resources": [], "nodes": [],
        "pending_nodes": 0, "jobs": [], "apps": [{"app": "rayloop"}], "failures": [],
        "urls": ["http://127.0.0.1:9", "http://[::1]:9"],
    }  # fmt: skip
    monkeypatch.setattr("rayloop.cli.status.cluster_seen", lambda _: (seen, ""))
    main(["status"])
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.index("http://head:8265") < printed.index("do not answer here")
    assert "http://127.0.0.1:9, http://[::1]:9" in printed
    assert "start one" not in printed


def test_status_finds_the_server_behind_one_of_a_clusters_addresses(
    server, root, capsys, monkeypatch
) -> None:
    shutil.rmtree(root / "serving")  # its note is under another root
    seen = {"apps": [{"app": "rayloop"}], "urls": ["http://127.0.0.1:9", server]}
    monkeypatch.setattr("rayloop.cli.status.cluster_seen", lambda _: (seen, ""))
    main(["status", "--json", "--seconds", "0.1"])
    (one,) = json.loads(capsys.readouterr().out)["servers"]
    assert one["url"] == server


def test_a_change_waits_until_the_replicas_follow(server, root, says) -> None:
    rows = says("traffic", "set", "champion=1")
    assert rows[0]["in_force"].startswith("2 replicas, ")


def test_a_note_of_a_server_that_was_killed_is_passed_over(root, says) -> None:
    note = {"url": "http://127.0.0.1:9", "model": MODEL}
    Storage(str(root)).write_json("serving/gone/server.json", note)
    assert says("status")["servers"] == []
    assert "in_force" not in says("traffic", "set", "champion=1")[0]


def test_references_are_split_at_their_mark() -> None:
    assert split_reference("m@challenger") == ("m", "@challenger")
    assert split_reference("m:3") == ("m", ":3")
    assert split_reference("m") == ("m", "@champion")


def test_submit_of_a_job_that_is_not_there_names_those_that_are(fails) -> None:
    told = fails("submit", "trian", "smoke")
    assert "There is no jobs/trian.py" in told and "Did you mean 'train'?" in told
