"""Turn a broken promise of the protocol into an HTTP status and one sentence for the client."""

import json

from rayloop.errors import RequestError


class ProtocolError(RequestError):
    """A request that cannot be answered, with the status that says whose fault it is.

    Args:
        status: HTTP status, 400 to 599.
        message: What is wrong with its value and what to send instead.
        retry_after_s: Seconds after which another try makes sense; 0 leaves the header out.
    """

    def __init__(self, status: int, message: str, retry_after_s: int = 0) -> None:
        super().__init__(status, message, retry_after_s)
        self.status = status
        self.message = message
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message

    def body(self) -> bytes:
        """The JSON body every error has."""
        return json.dumps({"error": self.message}).encode()
