"""What was said of a cluster, on the command line or in the environment -> its URL and its token.

Ray reads where its token is when it is first imported, so this module does not import it.
"""

from collections.abc import Mapping, MutableMapping
from pathlib import Path

from rayloop.errors import RequestError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
TOKEN_FILE = "~/.ray/auth_token"


def cluster_address(given: str, environment: Mapping[str, str], local: str = "") -> str:
    """The URL of the cluster meant.

    Args:
        given: On the command line; may be empty.
        environment: Of this process.
        local: Of the Ray that `rayloop up` started; may be empty.

    Raises:
        RequestError: The address is not that of a head's HTTP interface.
    """
    found = {"--address": given, **{name: environment.get(name, "") for name in ADDRESSES}}
    where, address = next(((w, a) for w, a in found.items() if a), ("", local or DEFAULT_ADDRESS))
    if not address.startswith(("http://", "https://")):
        raise RequestError(
            f"{where}={address} is no address to submit to; give the URL of the head's dashboard, "
            f"such as {DEFAULT_ADDRESS}, with --address or in RAY_API_SERVER_ADDRESS (`ray "
            "dashboard cluster.yaml` opens a tunnel to it)."
        )
    return address.rstrip("/")


def use_token(local_token: Path | None, environment: MutableMapping[str, str]) -> None:
    """Let Ray's clients send a token where there is one; set before Ray is imported.

    Args:
        local_token: The file `rayloop up` keeps, where the cluster meant is its own.
        environment: Of this process; changed.
    """
    if local_token is not None and local_token.is_file():
        # What a shell says of tokens is of another cluster.
        environment.pop("RAY_AUTH_TOKEN", None)
        environment["RAY_AUTH_TOKEN_PATH"] = str(local_token)
        environment["RAY_AUTH_MODE"] = "token"
    if environment.get("RAY_AUTH_MODE"):
        return
    known = "RAY_AUTH_TOKEN" in environment or "RAY_AUTH_TOKEN_PATH" in environment
    if known or Path(TOKEN_FILE).expanduser().is_file():
        environment["RAY_AUTH_MODE"] = "token"
