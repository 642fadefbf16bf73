# Sourced by cluster.yaml before `ray start` on every node: the environment, and the folders it names.
set -e
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
set -a
. "$root/deploy/ray.env"
set +a
# A job's `python` is that of .venv; serve_apps and deploy are imported from the root.
export PATH="$root/.venv/bin:$PATH" PYTHONPATH="$root"

# Connections of HAProxy and workers hold files open, and the usual 1024 are soon gone; where the
# machine allows fewer than these, as many as it does.
ulimit -n 65536 2>/dev/null || ulimit -n "$(ulimit -Hn)"

front=$(dirname "$RAY_SERVE_HAPROXY_BINARY_PATH")
sudo install -d -m 700 -o "$(id -un)" "$front"
python "$root/deploy/front.py" "$front"

# Spilled objects go to the machine's own NVMe where it has one (GPU machines), else to the disk.
SPILL=/var/tmp/ray-spill
if mountpoint -q /opt/dlami/nvme; then SPILL=/opt/dlami/nvme/ray-spill; fi
sudo install -d -m 700 -o "$(id -un)" "$SPILL"
export SPILL
