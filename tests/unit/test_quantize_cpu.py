"""What the instruction set decides about INT8 weights."""

from pathlib import Path

import pytest

from rayloop.quantize.cpu import cpu_features, flags_of, mismatch_warning, needs_reduced_range

AVX2_ONLY = ("x86_64", "avx2")
WITH_VNNI = ("x86_64", "avx2", "avx512_vnni")


def test_flags_of_x86_and_arm_text() -> None:
    """Only flags that matter are kept, sorted; a text without flags gives none."""
    assert flags_of("model\t: x\nflags\t\t: fpu avx2 avx_vnni sse\n") == ("avx2", "avx_vnni")
    assert flags_of("Features\t: fp asimd asimddp\n") == ("asimddp",)
    assert flags_of("") == ()


def test_cpu_features_begin_with_the_architecture(tmp_path: Path) -> None:
    """Without the file only the architecture is known."""
    (tmp_path / "cpuinfo").write_text("flags : amx_int8\n")
    features = cpu_features(tmp_path / "cpuinfo")
    assert features[1:] == ("amx_int8",)
    assert cpu_features(tmp_path / "none") == features[:1]


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        (AVX2_ONLY, True),
        (WITH_VNNI, False),
        (("x86_64", "amx_int8"), False),
        (("x86_64",), True),
        (("aarch64",), False),
    ],
)
def test_only_x86_without_vnni_needs_the_headroom(
    features: tuple[str, ...], expected: bool
) -> None:
    """ARM has no saturating multiply-add of the kind."""
    assert needs_reduced_range(features) is expected


def test_mismatch_is_named_in_both_directions_and_only_then() -> None:
    """8-bit weights without VNNI are a danger; 7-bit weights with it are a lost chance."""
    assert "saturate" in mismatch_warning(False, AVX2_ONLY)
    assert "answers are right" in mismatch_warning(True, WITH_VNNI)
    assert mismatch_warning(True, AVX2_ONLY) == ""
    assert mismatch_warning(False, WITH_VNNI) == ""
