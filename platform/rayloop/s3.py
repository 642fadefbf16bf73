"""An `s3://` address -> a file system whose waits are short and whose errors are sentences.

Address, region and keys come by the variables that all S3 tools read: AWS_ENDPOINT_URL (or
AWS_ENDPOINT_URL_S3), AWS_REGION, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN and
AWS_CA_BUNDLE. Without keys there, pyarrow looks for a profile and for the role of the machine.

pyarrow knows no put that is refused where there is an object already, which S3 has had since 2024
(`If-None-Match: *`), so `put_if_absent` signs and sends that one request by itself.
"""

import hashlib
import hmac
import http.client
import os
import re
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from urllib.parse import quote, urlsplit

from pyarrow import fs as pafs

from rayloop.clock import SYSTEM_CLOCK, Clock
from rayloop.credentials import without_credentials
from rayloop.errors import ConfigError, StorageRefused, StorageUnreachable
from rayloop.logs import stage_logger

log = stage_logger("storage")

SCHEME = "s3://"
CONNECT_TIMEOUT_S = 3.0
SILENCE_TIMEOUT_S = 5.0
"""Longest time without a byte, either way."""
ATTEMPTS = 3
"""Tries of a request whose connection fails; all of them together stay below 30 s."""
RETRY_S = 0.2
ALGORITHM = "AWS4-HMAC-SHA256"

NO_BUCKET = "NO_SUCH_BUCKET"
NETWORK = {
    "NETWORK_CONNECTION", "REQUEST_TIMEOUT", "SERVICE_UNAVAILABLE", "SLOW_DOWN", "THROTTLING",
    "INTERNAL_FAILURE",
}  # fmt: skip
"""Errors, in pyarrow's words, that may be over a moment later."""
UNKNOWN_KEY = {"INVALID_ACCESS_KEY_ID", "INVALID_CLIENT_TOKEN_ID", "UNRECOGNIZED_CLIENT"}
SAID = re.compile(r"AWS Error (\w+)(?: \([^)]*\))? during (\w+) operation: (.*)", re.DOTALL)
RIGHTS = "s3:ListBucket, s3:GetObject, s3:PutObject and s3:DeleteObject"


@dataclass(frozen=True, slots=True)
class S3Settings:
    """What the environment says of the server.

    Attributes:
        endpoint: Its base URL; empty is Amazon's.
        region: Empty where nothing is said.
        key: Access key id; empty leaves it to pyarrow to find one.
        secret: Secret of the key.
        token: Of a session; empty for a key that lasts.
        authorities: File with the certificates to trust; empty trusts the system's.
    """

    endpoint: str
    region: str
    key: str
    secret: str = field(repr=False)
    token: str = field(repr=False)
    authorities: str

    @property
    def told(self) -> str:
        """The server, for a message."""
        return self.endpoint or f"Amazon S3{f' in {self.region}' if self.region else ''}"


def settings_of_environment() -> S3Settings:
    """The settings that the variables give now.

    Raises:
        ConfigError: The endpoint is no URL.
    """

    def first(*names: str) -> str:
        return next((os.environ[name] for name in names if os.environ.get(name)), "")

    endpoint = first("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL").rstrip("/")
    if endpoint and not re.fullmatch(r"https?://[^/]+", endpoint):
        raise ConfigError(
            f"AWS_ENDPOINT_URL={endpoint} is not the URL of an S3 server; it is written as in "
            "AWS_ENDPOINT_URL=http://127.0.0.1:9000"
        )
    region = first("AWS_REGION", "AWS_DEFAULT_REGION")
    return S3Settings(
        endpoint=endpoint,
        region=region or ("us-east-1" if endpoint else ""),
        key=first("AWS_ACCESS_KEY_ID"),
        secret=first("AWS_SECRET_ACCESS_KEY"),
        token=first("AWS_SESSION_TOKEN"),
        authorities=first("AWS_CA_BUNDLE"),
    )


def open_s3(root: str) -> tuple[pafs.FileSystem, str]:
    """The file system of an `s3://BUCKET/PREFIX` and the path in it; the bucket was listed once.

    Raises:
        ConfigError: The address is not of that form.
        StorageRefused: There is no such bucket, or the keys do not open it.
        StorageUnreachable: The server does not answer.
    """
    base = root.removeprefix(SCHEME).rstrip("/")
    if not re.fullmatch(r"[^/?@:#]+(/[^?#]*)?", base):
        raise ConfigError(
            f"{without_credentials(root)} is not an S3 address; it is written "
            "s3://BUCKET/PREFIX. Server, region and keys come by AWS_ENDPOINT_URL, AWS_REGION, "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
        )
    return _opened(base, settings_of_environment()), base


@cache
def _opened(base: str, settings: S3Settings) -> pafs.FileSystem:
    bucket = base.partition("/")[0]
    settings = _with_region(settings, bucket)
    with explained(base, settings):
        files = pafs.S3FileSystem(
            region=settings.region,
            endpoint_override=settings.endpoint or None,
            connect_timeout=CONNECT_TIMEOUT_S,
            request_timeout=SILENCE_TIMEOUT_S,
            retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
            allow_delayed_open=True,  # what is small goes in one request instead of three
            tls_ca_file_path=settings.authorities or None,
        )
        try:
            files.get_file_info(pafs.FileSelector(base))
        except FileNotFoundError:  # of the prefix, which is made by the first file, or the bucket
            if _is_missing(files, bucket):
                raise _sentence(base, settings, NO_BUCKET, "ListObjectsV2", "") from None
    return files


@cache
def _with_region(settings: S3Settings, bucket: str) -> S3Settings:
    if settings.region:
        return settings
    with explained(bucket, settings):
        return replace(settings, region=pafs.resolve_s3_region(bucket))


def _is_missing(files: pafs.FileSystem, bucket: str) -> bool:
    try:
        return bool(files.get_file_info(bucket).type == pafs.FileType.NotFound)
    except OSError:  # it may be listed, as was seen, and not be asked for
        return False


@contextmanager
def explained(path: str, settings: S3Settings | None = None) -> Iterator[None]:
    """Turn what pyarrow says of a server's refusal, or silence, into a sentence with the remedy.

    Args:
        path: What is worked on, BUCKET/KEY.
        settings: Those of the file system; None for the environment's.

    Raises:
        StorageRefused: The server does not do it.
        StorageUnreachable: The server does not answer.
    """
    try:
        yield
    except OSError as error:
        said = SAID.search(str(error))
        if said is None:
            raise
        raise _sentence(path, settings or settings_of_environment(), *said.groups()) from None


def _sentence(
    path: str, settings: S3Settings, code: str, operation: str, reason: str
) -> StorageRefused | StorageUnreachable:
    reason = re.sub(r" \(Request ID: \w*\)", "", reason).rsplit("Details: ", 1)[-1].rstrip(". ")
    address, bucket = f"{SCHEME}{path}", path.partition("/")[0]
    key = f"AWS_ACCESS_KEY_ID={settings.key}" if settings.key else "what pyarrow found for a key"
    where = f"The S3 server at {settings.told}"
    if code in NETWORK:
        return StorageUnreachable(
            f"{where} does not answer for {address} ({reason}). Start it or "
            "correct AWS_ENDPOINT_URL, and run the same command again."
        )
    if code == NO_BUCKET:
        return StorageRefused(
            f"There is no bucket {bucket!r} at {settings.told}, and rayloop makes none. Create it "
            "there, or correct the address, AWS_ENDPOINT_URL or AWS_REGION."
        )
    if code in UNKNOWN_KEY:
        return StorageRefused(
            f"{where} does not know the key of {key} ({reason}). Set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY to a key of that server."
        )
    if code == "SIGNATURE_DOES_NOT_MATCH":
        return StorageRefused(
            f"{where} refuses the signature made with {key}: AWS_SECRET_ACCESS_KEY is not its "
            "secret. Set both to a key of that server."
        )
    if code == "ACCESS_DENIED":
        return StorageRefused(
            f"{where} denies {operation} on {address} to {key}. Allow its user {RIGHTS} on bucket "
            f"{bucket!r}, or use the key of a user who may."
        )
    return StorageRefused(
        f"{where} refuses {operation} on {address}: {code}, {reason}. Look at AWS_REGION, "
        "AWS_ENDPOINT_URL and the key."
    )


def put_if_absent(path: str, content: bytes, clock: Clock = SYSTEM_CLOCK) -> bool | None:
    """Put an object unless there is one, in one step at the server: of several writers one does.

    Args:
        path: BUCKET/KEY.
        content: Its bytes, some megabytes at most.
        clock: Dates the signature.

    Returns:
        Whether this call made it; None where that cannot be asked, since the keys are not in the
        environment or the server is too old. Then nothing was put.

    Raises:
        StorageRefused: The server does not do it.
        StorageUnreachable: The server does not answer; then it may or may not have put it.
    """
    settings = _with_region(settings_of_environment(), path.partition("/")[0])
    if not (settings.key and settings.secret):
        return None
    status, reason = 0, ""
    for attempt in range(ATTEMPTS):
        status, reason = _put(path, content, settings, clock)
        if status not in (409, 500, 503):  # another writer is at it, or the server is busy
            break
        time.sleep(RETRY_S * 2**attempt)
    if status in (200, 412):
        return status == 200
    if status == 501:
        return None
    code = {403: "ACCESS_DENIED", 500: "INTERNAL_FAILURE", 503: "SLOW_DOWN"}.get(status, "PUT")
    raise _sentence(path, settings, code, "PutObject", reason)


def _put(path: str, content: bytes, settings: S3Settings, clock: Clock) -> tuple[int, str]:
    """Send one request; status and reason of the answer."""
    url = urlsplit(settings.endpoint or f"https://s3.{settings.region}.amazonaws.com")
    target = "/" + quote(path, safe="/~")
    headers = signed_headers(url.netloc, target, content, settings, clock.now())
    connection: http.client.HTTPConnection
    if url.scheme == "https":
        trusted = ssl.create_default_context(cafile=settings.authorities or None)
        connection = http.client.HTTPSConnection(
            url.netloc, timeout=SILENCE_TIMEOUT_S, context=trusted
        )
    else:
        connection = http.client.HTTPConnection(url.netloc, timeout=SILENCE_TIMEOUT_S)
    try:
        connection.request("PUT", target, content, headers)
        answer = connection.getresponse()
        answer.read()
        return answer.status, f"{answer.status} {answer.reason}"
    except (OSError, http.client.HTTPException) as error:
        raise _sentence(path, settings, "NETWORK_CONNECTION", "PutObject", str(error)) from None
    finally:
        connection.close()


def signed_headers(
    host: str, target: str, content: bytes, settings: S3Settings, now_s: float
) -> dict[str, str]:
    """The headers of a PUT that is refused where there is an object, signed.

    Amazon's Signature Version 4 ("Authenticating Requests", API reference of S3, 2006-03-01).

    Args:
        host: As in the URL.
        target: The path, quoted.
        content: What will be put.
        settings: Key and region.
        now_s: Seconds since the epoch; servers take 15 minutes of difference.
    """
    date = datetime.fromtimestamp(now_s, UTC).strftime("%Y%m%dT%H%M%SZ")
    digest = hashlib.sha256(content).hexdigest()
    headers = {
        "host": host, "if-none-match": "*", "x-amz-content-sha256": digest, "x-amz-date": date
    }  # fmt: skip
    if settings.token:
        headers["x-amz-security-token"] = settings.token
    names = ";".join(sorted(headers))
    lines = "".join(f"{name}:{headers[name]}\n" for name in sorted(headers))
    request = f"PUT\n{target}\n\n{lines}\n{names}\n{digest}"
    scope = f"{date[:8]}/{settings.region}/s3/aws4_request"
    text = f"{ALGORITHM}\n{date}\n{scope}\n{hashlib.sha256(request.encode()).hexdigest()}"
    key = f"AWS4{settings.secret}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.digest(key, text.encode(), "sha256").hex()
    credential = f"Credential={settings.key}/{scope}"
    authorization = f"{ALGORITHM} {credential}, SignedHeaders={names}, Signature={signature}"
    return {**headers, "authorization": authorization}
