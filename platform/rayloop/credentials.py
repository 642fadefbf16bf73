"""Text with addresses in it -> whether, and where, it holds a name or a password; or without them.

A password is found also where it is not written as a URL wants it, with `/` or `@` in it: half of
all AWS secrets have a slash.
"""

import re

_USER = r"(?:[^/@\s:]*:(?!\d+(?:/|$))\S*|[^/@\s]*)@"
"""What stands before a host: `name@`, or `name:password@` with anything in the password. Digits
after the colon are a port, and the `@` is in the path."""

IN_FRONT = re.compile(rf"(?P<scheme>\w+)://{_USER}(?P<host>[^/\s]*)")
BEHIND = re.compile(
    r"(?P<name>[?&][\w.-]*(?:password|passwd|secret|token|access_?key)[\w.-]*=)[^&#\s]+",
    re.IGNORECASE,
)


def place_of_credentials(text: str) -> str:
    """The address that holds credentials, as it may be shown; empty where there is none."""
    front, behind = IN_FRONT.search(text), BEHIND.search(text)
    if front:
        return f"{front['scheme']}://...@{front['host']}"
    return f"{behind['name'][1:]}..." if behind else ""


def without_credentials(text: str) -> str:
    """Text with an address, without the name and password that may be in it."""
    shown = re.sub(rf"(?<=://){_USER}", "", text)
    return BEHIND.sub(lambda found: f"{found['name']}...", shown)
