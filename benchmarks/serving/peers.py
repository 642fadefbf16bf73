"""Make one environment for each peer from its lock file, outside the repository.

    python benchmarks/serving/peers.py
    python benchmarks/serving/peers.py --folder /tmp/rayloop-peers --only litserve

Ray Serve as it comes and rayloop itself use the project's own environment. MLServer needs an older
FastAPI than the rest, which is why each peer has its own. To move a peer to another version, change
its lock file.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from common import DEFAULT_PEERS, HERE

PEERS = tuple(sorted(path.stem for path in (HERE / "locks").glob("*.txt")))


def make(peer: str, folder: Path) -> None:
    """Make the environment of one peer, unless it is there with this lock."""
    lock, place = HERE / "locks" / f"{peer}.txt", folder / peer
    made_from = place / "made-from.txt"
    if made_from.exists() and made_from.read_text() == lock.read_text():
        return
    shutil.rmtree(place, ignore_errors=True)
    python = place / "bin" / "python"
    uv = Path(sys.executable).parent / "uv"
    if uv.exists():
        subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, place], check=True)
        installer = [uv, "pip", "install", "--quiet", "--python", python]
    else:
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
        installer = [python, "-m", "pip", "install", "--quiet"]
    subprocess.run([*installer, "--requirement", lock], check=True)
    made_from.write_text(lock.read_text())
    print(f"{peer}: {place}", file=sys.stderr)


def main() -> None:
    """Make them all, or those named."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--folder", type=Path, default=DEFAULT_PEERS)
    flags.add_argument("--only", nargs="+", choices=PEERS, default=list(PEERS))
    arguments = flags.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for peer in arguments.only:
        make(peer, arguments.folder)


if __name__ == "__main__":
    main()
