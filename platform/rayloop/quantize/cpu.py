"""The machine's instruction set -> whether INT8 weights need one bit of headroom.

Without VNNI an x86 processor multiplies uint8 by int8 with `vpmaddubsw`, which adds two products
into 16 bits and saturates. Weights of 7 bits cannot reach that, so a model made on or for such a
machine uses them; the choice is recorded, and another machine can tell whether it suits.
"""

import platform
from collections.abc import Sequence
from pathlib import Path

VNNI_FLAGS = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})
RECORDED_FLAGS = VNNI_FLAGS | {
    "avx2",
    "avx512f",
    "avx512bw",
    "amx_tile",
    "asimddp",
    "i8mm",
}
X86_MACHINES = ("x86_64", "amd64", "i686", "i386")


def flags_of(cpuinfo: str) -> tuple[str, ...]:
    """Flags that decide INT8 arithmetic, out of the text of /proc/cpuinfo.

    Args:
        cpuinfo: The file's text; x86 calls the line `flags`, ARM `Features`.

    Returns:
        The flags among `RECORDED_FLAGS`, sorted.
    """
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip().lower() in ("flags", "features"):
            return tuple(sorted(RECORDED_FLAGS & set(value.split())))
    return ()


def cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, ...]:
    """This machine's architecture followed by its INT8 flags, e.g. `("x86_64", "avx2")`.

    Where the system has no /proc/cpuinfo only the architecture is known.
    """
    text = cpuinfo.read_text(errors="replace") if cpuinfo.is_file() else ""
    return (platform.machine().lower(), *flags_of(text))


def needs_reduced_range(features: Sequence[str]) -> bool:
    """Whether 8-bit weights can saturate: an x86 processor without VNNI.

    Args:
        features: As `cpu_features` returns them.
    """
    return features[0] in X86_MACHINES and VNNI_FLAGS.isdisjoint(features)


def mismatch_warning(reduce_range: bool, features: Sequence[str]) -> str:
    """What is unfortunate about running a model here, or an empty string.

    Args:
        reduce_range: Whether the model has 7-bit weights.
        features: This machine's, as `cpu_features` returns them.
    """
    here = " ".join(features)
    if needs_reduced_range(features) and not reduce_range:
        return (
            f"the INT8 model has 8-bit weights and this machine ({here}) has no VNNI: sums can "
            "saturate and answers can differ from those that passed the gate. Quantize on this "
            "machine: python jobs/quantize.py PRESET"
        )
    if reduce_range and not needs_reduced_range(features):
        return (
            f"the INT8 model has 7-bit weights, made for machines without VNNI, and this machine "
            f"({here}) does not need them: answers are right, and quantizing here may gain "
            "accuracy. To do so: python jobs/quantize.py PRESET"
        )
    return ""
