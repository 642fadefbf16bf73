"""Turn the parameters of a request, REST's or gRPC's, into what they ask of this server."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from rayloop.serve.batcher import DEFAULT_PRIORITY, PRIORITY_LEVELS
from rayloop.serve.protocol.error import ProtocolError

Scalars = Mapping[str, object]

LONGEST_TIMEOUT_US = 3_600_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """What a request asks of the queue, and on whose behalf."""

    priority: int = DEFAULT_PRIORITY
    """1 (most urgent) to `PRIORITY_LEVELS`."""

    timeout_s: float | None = None
    """Seconds from its arrival after which the answer is not wanted; None says nothing."""

    binary_output: bool = False
    """Outputs go back as raw bytes unless one says otherwise."""

    unit: str = ""
    """Who the request is for; empty when nobody is named."""

    variant: str = ""
    """Variant that has to answer; empty leaves the choice to the traffic plan."""

    final_flag: bool = False
    """The client of a stream wants `triton_final_response` in each answer."""


NOTHING_ASKED = Schedule()


def read_schedule(parameters: Scalars) -> Schedule:
    """Understand a request's parameters; names this server does not know are left alone.

    Raises:
        ProtocolError: 400, a known name has a wrong value, or asks for what is not offered.
    """
    if not parameters:
        return NOTHING_ASKED
    for name, value in parameters.items():
        if not isinstance(value, str | bool | int | float):
            _malformed(f"Parameter {name[:60]!r} must be a string, a number or a boolean.")
    _refuse_sequences(parameters)
    if "shared_memory_region" in parameters:
        _malformed("Shared memory is not offered; send the tensor in the request.")
    timeout_us = whole(parameters, "timeout", 0, LONGEST_TIMEOUT_US)
    return Schedule(
        priority=whole(parameters, "priority", 0, PRIORITY_LEVELS) or DEFAULT_PRIORITY,
        timeout_s=timeout_us / 1e6 if timeout_us else None,
        binary_output=flag(parameters, "binary_data_output"),
        unit=_text(parameters, "rayloop_unit"),
        variant=_text(parameters, "rayloop_variant"),
        final_flag=flag(parameters, "triton_enable_empty_final_response"),
    )


def flag(parameters: Scalars, name: str, default: bool = False) -> bool:
    """A parameter that is true or false.

    Raises:
        ProtocolError: 400, it is something else.
    """
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        _malformed(f"`{name}` must be true or false.")
    return value


def whole(parameters: Scalars, name: str, least: int, most: int) -> int:
    """A parameter that is a whole number in a range; `least` when it is missing.

    Raises:
        ProtocolError: 400, it is something else.
    """
    value = parameters.get(name, least)
    if type(value) is not int or not least <= value <= most:
        _malformed(f"`{name}` must be a whole number from {least} to {most}, not {value!r:.40}.")
    return value


def _text(parameters: Scalars, name: str) -> str:
    value = parameters.get(name, "")
    if not isinstance(value, str):
        _malformed(f"`{name}` must be a string.")
    return value


def _refuse_sequences(parameters: Scalars) -> None:
    started = parameters.get("sequence_start") or parameters.get("sequence_end")
    if parameters.get("sequence_id") not in (None, 0, "") or started:
        _malformed(
            "Sequences are not offered: each request stands alone. Leave out `sequence_id`, "
            "`sequence_start` and `sequence_end`."
        )


def _malformed(message: str) -> NoReturn:
    raise ProtocolError(400, message)
