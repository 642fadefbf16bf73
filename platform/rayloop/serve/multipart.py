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
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": reader.begin,
                "on_header_field": reader.header_field,
                "on_header_value": reader.header_value,
                "on_header_end": reader.header_end,
                "on_part_data": reader.part_data,
                "on_part_end": reader.part_end,
                "on_end": reader.end,
            },
        )
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

    def begin(self) -> None:
        """Forget the last part."""
        self._field = self._value = self._name = b""
        self._data = []

    def header_field(self, data: bytes, start: int, end: int) -> None:
        """Take a piece of a header's name."""
        self._field += data[start:end]

    def header_value(self, data: bytes, start: int, end: int) -> None:
        """Take a piece of a header's value."""
        self._value += data[start:end]

    def header_end(self) -> None:
        """Read the field's name from its disposition."""
        if self._field.lower() == b"content-disposition":
            _, options = parse_options_header(self._value)
            self._name = options.get(b"name", b"")
        self._field = self._value = b""

    def part_data(self, data: bytes, start: int, end: int) -> None:
        """Take a piece of the content."""
        self._data.append(data[start:end])

    def part_end(self) -> None:
        """Keep the part."""
        self.parts.append((self._name, b"".join(self._data)))

    def end(self) -> None:
        """Note that the closing boundary was there."""
        self.ended = True
