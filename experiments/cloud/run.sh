#!/usr/bin/env bash
# One command of mmphi on a cloud machine: on all of its GPUs by torchrun, with a store that outlives it.
#
# The database lies on the machine's own disk, where SQLite is safe, and is copied to the bucket every minute and at the
# end; artifacts and checkpoints lie in the bucket. A machine that takes over from a preempted one takes the database
# from there, finds the unfinished run in it, and goes on from its newest complete checkpoint.
set -euo pipefail
bucket="${MMPHI_BUCKET:-/mmphi}"
work="${MMPHI_WORK:-$HOME/mmphi-store}"
python="${MMPHI_PYTHON:-.venv/bin/python}"
mkdir -p "$bucket/artifacts" "$work"
if [ ! -f "$work/mlflow.db" ] && [ -f "$bucket/mlflow.db" ]; then cp "$bucket/mlflow.db" "$work/mlflow.db"; fi
export MLFLOW_TRACKING_URI="sqlite:///$work/mlflow.db" MLFLOW_DISABLE_TELEMETRY=true
export MMPHI_LEASE_S="${MMPHI_LEASE_S:-90}"
mkdir -p "$work/mlruns"
ln -sfn "$bucket/artifacts" "$work/mlruns/mmphi"  # Not the locks, which a bucket cannot hold.

keep() {  # A copy that is whole or not there.
  "$python" - "$work/mlflow.db" "$bucket" <<'PY' || true
import os, shutil, sqlite3, sys
source, bucket = sys.argv[1:]
if os.path.exists(source):
    whole = source + ".copy"
    with sqlite3.connect(source) as live, sqlite3.connect(whole) as copy:
        live.backup(copy)
    shutil.copyfile(whole, os.path.join(bucket, ".mlflow.db"))
    os.replace(os.path.join(bucket, ".mlflow.db"), os.path.join(bucket, "mlflow.db"))
PY
}
while sleep "${MMPHI_KEEP_S:-60}"; do keep; done &
keeper=$!
trap 'kill $keeper 2>/dev/null; keep' EXIT

processes="${MMPHI_PROCESSES:-${SKYPILOT_NUM_GPUS_PER_NODE:-1}}"
nodes="${SKYPILOT_NUM_NODES:-1}"
if [ "${MMPHI_ALONE:-}" = 1 ] || { [ "$processes" -le 1 ] && [ "$nodes" -le 1 ]; }; then
  "$python" -m mmphi "$@"
else
  head="$(echo "${SKYPILOT_NODE_IPS:-127.0.0.1}" | head -n 1)"
  "$python" -m torch.distributed.run --nnodes "$nodes" --node-rank "${SKYPILOT_NODE_RANK:-0}" \
    --nproc-per-node "$processes" --master-addr "$head" --master-port "${MMPHI_PORT:-29513}" -m mmphi "$@"
fi
