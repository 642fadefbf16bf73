"""Ask a server for predictions until told to stop, and say how each request ended.

    python tests/e2e/load.py URL STOP_FILE [CONNECTIONS]

Prints one JSON line: how many answers of which version, and every request that failed.
"""

import collections
import http.client
import json
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

from tests.releases import MODEL, images

TIMEOUT_S = 20.0
PAUSE_S = 0.01


def main() -> None:
    """Run the connections until the file appears."""
    url, stop = urlsplit(sys.argv[1]), Path(sys.argv[2])
    connections = int(sys.argv[3]) if len(sys.argv) > 3 else 4
    versions: collections.Counter[str] = collections.Counter()
    failed: list[str] = []
    began = time.monotonic()
    threads = [
        threading.Thread(target=ask, args=(url.hostname, url.port, stop, began, versions, failed))
        for _ in range(connections)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    result = {"versions": dict(versions), "failed": failed, "seconds": time.monotonic() - began}
    print(json.dumps(result), flush=True)


def ask(
    host: str,
    port: int,
    stop: Path,
    began: float,
    versions: collections.Counter[str],
    failed: list[str],
) -> None:
    """One connection after another, each kept while it holds."""
    body = json.dumps(
        {"inputs": [{"name": "image", "datatype": "UINT8", "shape": [1, 12, 10, 1],
                     "data": images(1).ravel().tolist()}]}
    )  # fmt: skip
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
    while not stop.exists():
        try:
            connection.request("POST", f"/v2/models/{MODEL}/infer", body)
            answer = connection.getresponse()
            text = answer.read()
            if answer.status == 200:
                versions[answer.headers["x-rayloop-version"]] += 1
            else:
                failed.append(
                    f"after {time.monotonic() - began:.2f} s: {answer.status} {text[:200]!r}"
                )
        except (OSError, http.client.HTTPException) as error:
            failed.append(f"after {time.monotonic() - began:.2f} s: {error!r}")
            connection.close()
            connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
        time.sleep(PAUSE_S)


if __name__ == "__main__":
    main()
