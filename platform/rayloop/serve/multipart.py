"""Turn a multipart/form-data body into the bytes of its field `file`."""

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from rayloop.serve.protocol.error import ProtocolError

FIELD = b"file"


def file_field(content_type: str, body: bytes) -> bytes:
    """The content of the one field called `file`.

    Args:
        content_type: The request's Content-Type with its boundary.
        body: The whole body.

    Raises:
        ProtocolError: 400, the form is broken or has not exactly one such field.
    """
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if not boundary:
        raise ProtocolError(400, "The multipart Content-Type has no boundary.")
    reader = _FormReader()
    try:
        parser = MultipartParser(boundary, reader.callbacks())
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise ProtocolError(400, f"The multipart form is broken: {error}.") from error
    files = [content for name, content in reader.parts if name == FIELD]
    if len(files) != 1 or not reader.ended:
        raise ProtocolError(
            400, f"The form must be whole and have one field named 'file'; it has {len(files)}."
        )
    return files[0]


class _FormReader:
    """Collects the parts of a form from the parser's callbacks."""

    def __init__(self) -> None:
        self.parts: list[tuple[bytes, bytes]] = []
        self.ended = False
        self._field = self._value = self._name = b""
        self._data: list[bytes] = []

    def callbacks(self) -> dict[str, object]:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_part_data": self._part_data,
            "on_part_end": self._part_end,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        self._field = self._value = self._name = b""
        self._data = []

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._field.lower() == b"content-disposition":
            _, options = parse_options_header(self._value)
            self._name = options.get(b"name", b"")
        self._field = self._value = b""

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        self._data.append(data[start:end])

    def _part_end(self) -> None:
        self.parts.append((self._name, b"".join(self._data)))

    def _end(self) -> None:
        self.ended = True
