"""Find the servers that run on this root, and ask them what is so."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from rayloop.errors import RequestError
from rayloop.storage import Storage

Document = dict[str, Any]

NOTES, NOTE = "serving", "server.json"
"""`rayloop.serve.run.serving` leaves `serving/DEPLOYMENT/server.json` while it lasts."""

ASK_TIMEOUT_S = 10.0
REACH_TIMEOUT_S = 2.0
"""For an address that may be of a network this machine is not in."""
IN_FORCE_TIMEOUT_S = 30.0
LOOK_S = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """One that answered."""

    url: str
    model: str

    haproxy_metrics_port: int = 0
    """Port of HAProxy's own metrics on 127.0.0.1; 0 where HAProxy does not run, or is not told."""

    tracking_uri: str = ""
    """Of its registry; empty means the database under the root."""


def servers(storage: Storage, url: str = "") -> list[Server]:
    """Those that answer now.

    Args:
        storage: Their root.
        url: Ask this one instead of looking for notes.

    Raises:
        RequestError: The server of that URL does not answer.
    """
    if url:
        replicas = ask(url)
        return [Server(url=url, model=replicas[0]["model"])]
    found: dict[str, Server] = {}
    for name in storage.names(NOTES):
        path = f"{NOTES}/{name}/{NOTE}"
        if storage.exists(path):
            note = storage.read_json(path)
            try:
                model = ask(note["url"])[0]["model"]
            except RequestError:
                continue  # it was killed, and its note stayed
            uri = note.get("tracking_uri", "")
            port = note.get("haproxy_metrics_port", 0)
            found[note["url"]] = Server(
                url=note["url"], model=model, tracking_uri=uri, haproxy_metrics_port=port
            )
    return list(found.values())


def first_reached(urls: Sequence[str]) -> str:
    """One of the addresses of a server that answers soon, asked all at once; empty for none."""

    def reached(url: str) -> str:
        try:
            ask(url, REACH_TIMEOUT_S)
        except RequestError:
            return ""
        return url

    with ThreadPoolExecutor(max_workers=32) as pool:
        return next(filter(None, pool.map(reached, urls)), "")


def ask(url: str, timeout_s: float = ASK_TIMEOUT_S) -> list[Document]:
    """The snapshots of all replicas of a server.

    Raises:
        RequestError: It does not answer.
    """
    try:
        with urllib.request.urlopen(f"{url}/rayloop/status", timeout=timeout_s) as response:
            replicas: list[Document] = json.load(response)["replicas"]
    except (OSError, ValueError, KeyError) as error:
        raise RequestError(
            f"No rayloop server answers at {url} ({error}); start one: rayloop deploy MODEL, or "
            "name another with --url."
        ) from None
    if not replicas:
        raise RequestError(f"The server at {url} has no replica now; try again shortly.")
    return replicas


def wait_in_force(url: str, number: int, timeout_s: float = IN_FORCE_TIMEOUT_S) -> Document:
    """Wait until a plan is in force in every replica of a server.

    Args:
        url: The server.
        number: The plan's.
        timeout_s: Longest wait.

    Returns:
        `url`, `replicas` and `seconds` until the last one followed.

    Raises:
        RequestError: A replica refuses it, or it takes too long; the plan before stays in force
            there.
    """
    start = time.monotonic()
    while True:
        replicas = ask(url)
        seconds = time.monotonic() - start
        behind = [replica for replica in replicas if replica["plan"] < number]
        if not behind:
            return {"url": url, "replicas": len(replicas), "seconds": round(seconds, 2)}
        refusing = [replica for replica in behind if replica["refused_plan"] == number]
        if refusing or seconds > timeout_s:
            why = refusing[0]["refused_reason"] if refusing else f"not within {timeout_s:.0f} s"
            raise RequestError(
                f"Plan {number} is kept, and not in force in {len(behind)} of {len(replicas)} "
                f"replicas of {url}, which go on with plan {behind[0]['plan']}: {why} Set another "
                "plan with rayloop traffic set, or go back with rayloop rollback."
            )
        time.sleep(LOOK_S)
