"""The README's commands are run, or, where they take minutes, held to what they stand for."""

import re
import subprocess

import pytest

from tests.e2e.conftest import ROOT, environment
from tests.pages import blocks

README = (ROOT / "README.md").read_text()
BLOCKS = blocks(README, "bash")


def commands(block: str) -> list[str]:
    lines = (line.split("  #")[0].strip() for line in block.splitlines())
    return [line for line in lines if line]


def test_first_block_is_the_two_make_targets():
    assert commands(BLOCKS[0]) == ["make demo", "make serve"]
    for target, script in (("demo", "jobs/pipeline.py laptop"), ("serve", "jobs/serve.py laptop")):
        shown = subprocess.run(
            ["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert script in shown.stdout


def test_stage_by_stage_block_runs_as_it_stands(tmp_path):
    """The commands of the second block, one after the other, in a home of their own."""
    if not (ROOT / ".venv" / "bin" / "python").exists():
        pytest.fail("the README's commands need .venv; run the tests with 'make test'")
    for command in commands(BLOCKS[1]):
        done = subprocess.run(
            command,
            shell=True,
            cwd=ROOT,
            env=environment(tmp_path),
            capture_output=True,
            text=True,
            timeout=540,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    assert "champion" in done.stdout


def test_every_link_and_file_named_exists():
    for target in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (ROOT / target).exists(), target
