"""A real S3 server for tests: a process of its own on a free port of 127.0.0.1, with permissions.

    .venv-s3/bin/python tests/s3_server.py      (what `s3_server` starts; it ends with its stdin)

It is moto's, out of an environment of its own, which `make .venv-s3/ready` sets up. Signatures and
permissions are checked at every request. It keeps all in memory.
"""

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PYTHON = ROOT / ".venv-s3" / "bin" / "python"
BUCKET, REGION = "rayloop-tests", "eu-central-1"
READ = ["s3:GetObject", "s3:ListBucket"]
USERS = {"owner": ["s3:*"], "reader": READ, "stranger": ["s3:ListAllMyBuckets"]}
"""Who there is, and what they may do in every bucket."""


@dataclass(frozen=True, slots=True)
class S3Server:
    """A server that runs.

    Attributes:
        endpoint: Its base URL.
        keys: Key id and secret of each of `USERS`.
        pid: Its process.
    """

    endpoint: str
    keys: dict[str, tuple[str, str]]
    pid: int

    def environment(self, user: str = "owner") -> dict[str, str]:
        """The variables by which a process finds the server, and is that user there."""
        key, secret = self.keys[user]
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": REGION,
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_EC2_METADATA_DISABLED": "true",
        }


def set_up() -> None:
    """Make the environment that `PYTHON` is of, where it is not there yet."""
    subprocess.run(["make", "-s", ".venv-s3/ready"], cwd=ROOT, check=True, stdout=sys.stderr)


@contextlib.contextmanager
def s3_server(log: Path) -> Iterator[S3Server]:
    """Run a server with the empty bucket `BUCKET`, and stop exactly it.

    Args:
        log: Where its requests and errors go.
    """
    set_up()
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [PYTHON, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
        )
    assert process.stdin
    assert process.stdout
    try:
        line = process.stdout.readline()
        assert line, log.read_text()
        said = json.loads(line)
        keys = {name: (key, secret) for name, (key, secret) in said["keys"].items()}
        yield S3Server(f"http://127.0.0.1:{said['port']}", keys, process.pid)
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def _serve() -> None:
    """Be the server, until the process that started it is gone."""
    from moto import settings
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.iam.models import iam_backends
    from moto.moto_server.werkzeug_app import (
        DomainDispatcherApplication,
        create_backend_app,
    )
    from moto.s3.models import s3_backends
    from werkzeug.serving import make_server

    settings.INITIAL_NO_AUTH_ACTION_COUNT = 0
    iam, keys = iam_backends[DEFAULT_ACCOUNT_ID]["aws"], {}
    for name, actions in USERS.items():
        iam.create_user("us-east-1", name)
        rule = {"Effect": "Allow", "Action": actions, "Resource": "*"}
        policy = {"Version": "2012-10-17", "Statement": [rule]}
        iam.put_user_policy(name, "all", json.dumps(policy))
        key = iam.create_access_key(name)
        keys[name] = (key.access_key_id, key.secret_access_key)
    s3_backends[DEFAULT_ACCOUNT_ID]["aws"].create_bucket(BUCKET, REGION)

    app, one_at_a_time = DomainDispatcherApplication(create_backend_app), threading.Lock()

    def ordered(environ: dict[str, Any], start_response: Any) -> Any:
        """A look and a put are one step, as in S3 itself."""
        if environ["REQUEST_METHOD"] == "PUT" and "HTTP_IF_NONE_MATCH" in environ:
            with one_at_a_time:
                return app(environ, start_response)
        return app(environ, start_response)

    server = make_server("127.0.0.1", 0, ordered, threaded=True)
    print(json.dumps({"port": server.port, "keys": keys}), flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    _serve()
