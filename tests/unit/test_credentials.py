"""Names and passwords in addresses are found, also where they are not written as they should be."""

import pytest

from rayloop.credentials import place_of_credentials, without_credentials


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:hush@mlflow:5000/x", "http://mlflow:5000/x"),
        ("https://hush@mlflow", "https://mlflow"),
        ("s3://KEY:hu/sh+/hush@bucket/p", "s3://bucket/p"),
        ("s3://KEY:hush@hush@bucket", "s3://bucket"),
        ("s3://KEY:0/hush@bucket", None),  # read as a port, and the rest as a path
        ("uri=postgresql://me:hush@db/x?sslmode=require", "uri=postgresql://db/x?sslmode=require"),
        ("postgresql://db/x?user=me&password=hush", "postgresql://db/x?user=me&password=..."),
        ("http://h/?x_token=hush#top", "http://h/?x_token=...#top"),
    ],
)
def test_credentials_are_found_and_left_out(text: str, shown: str | None) -> None:
    if shown is None:
        assert without_credentials(text) == text
        return
    assert place_of_credentials(text) and "hush" not in place_of_credentials(text)
    assert without_credentials(text) == shown
    assert not place_of_credentials(shown.replace("...", ""))


@pytest.mark.parametrize(
    "text",
    ["http://mlflow:5000/a@b", "s3://bucket/mail@home/x", "s3://b/x y@z", "me@home", "--a=b@c",
     "http://[::1]:5000/", "--train.epochs", ""],
)  # fmt: skip
def test_an_at_sign_elsewhere_is_none(text: str) -> None:
    assert place_of_credentials(text) == ""
    assert without_credentials(text) == text
