#!/usr/bin/env bash
# Run a study on one Cloud TPU VM. Checked with `bash -n`; not tested on a real account.
#
#   ZONE=us-central1-a TYPE=v5litepod-1 launch/tpu-vm.sh launch/studies/paper-dmc.toml
#
# Call it in the root of a clone, with gcloud logged in. If the connection breaks, the runs save
# themselves, and the same command resumes them. A TPU VM costs money until it is deleted; the last line
# that is printed is the command that deletes it.
set -euo pipefail

study=${1:?name a study file, such as launch/studies/tiny.toml}
name=${NAME:-dynajax}
zone=${ZONE:?a zone, such as us-central1-a}
type=${TYPE:-v5litepod-1}
version=${VERSION:-v2-alpha-tpuv5-lite} # the system image that goes with the type
folder=runs/$(basename "$study" .toml)

tpu() { gcloud compute tpus tpu-vm "$@" --zone="$zone"; }

tpu describe "$name" >/dev/null 2>&1 ||
  tpu create "$name" --accelerator-type="$type" --version="$version"
mkdir -p "$folder"
tar -cz --exclude=.venv --exclude='runs/*' . | tpu ssh "$name" --command='mkdir -p dynajax && tar -xz -C dynajax'
# Do not overwrite the VM's files, which are newer than those copied from it last time.
tar -cz "$folder" | tpu ssh "$name" --command='tar -xz --skip-old-files -C dynajax'

# dynajax needs Python 3.11 or 3.12, and python3 may be older in the image.
tpu ssh "$name" --command='cd dynajax && (command -v python3.11 || sudo apt-get install -y python3.11-venv) &&
  python3.11 -m venv .venv && .venv/bin/pip install -q -e ".[tpu]"'

status=0
tpu ssh "$name" --command="cd dynajax && .venv/bin/python launch/sweep.py '$study'" || status=$?
tpu ssh "$name" --command="tar -cz -C dynajax '$folder'" | tar -xz
echo "status $status; results are in $folder. When done:"
echo "gcloud compute tpus tpu-vm delete $name --zone=$zone"
exit "$status"
