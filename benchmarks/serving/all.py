"""The whole side-by-side: the peers' environments, every scenario, the result file.

python benchmarks/serving/all.py            about two hours on two quiet cores
python benchmarks/serving/all.py --quick    about 20 minutes, for a look
"""

import argparse
import datetime
import subprocess
import sys
import tempfile
from pathlib import Path

from common import DEFAULT_PEERS, HERE

QUICK = {
    "overhead": ["--repeats", "2", "--seconds", "4"],
    "goodput": ["--repeats", "1", "--seconds", "5", "--steps", "5"],
    "rows32": ["--repeats", "2", "--seconds", "3"],
    "overload": ["--repeats", "1", "--servers", "rayloop", "--seconds", "20"],
    "soak": ["--seconds", "60"],
}


def main() -> None:
    """Run each part as a process of its own; the first that fails ends it."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--quick", action="store_true", help="few and short rounds")
    flags.add_argument("--peers", type=Path, default=DEFAULT_PEERS)
    flags.add_argument(
        "--out", type=Path, default=Path(tempfile.gettempdir()) / "rayloop-serving-results"
    )
    today = datetime.date.today().isoformat()
    flags.add_argument("--target", type=Path, default=HERE / f"RESULTS_cpu_{today}.md")
    arguments = flags.parse_args()
    run("peers", ["--folder", str(arguments.peers)])
    for scenario, quick in QUICK.items():
        options = ["--peers", str(arguments.peers), "--out", str(arguments.out)]
        run(scenario, options + (quick if arguments.quick else []))
    run("report", ["--out", str(arguments.out), "--target", str(arguments.target)])


def run(script: str, options: list[str]) -> None:
    """Run one of the scripts here."""
    print(f"== {script} {' '.join(options)}", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, str(HERE / f"{script}.py"), *options], check=True)


if __name__ == "__main__":
    main()
