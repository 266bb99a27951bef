#!/usr/bin/env bash
# Install Slurm and munge for tests/slurm, from Debian's packages. Exit status 1, and one line that
# says why, if the tests cannot be run on this machine.
set -u
cannot() { echo "tests/slurm is not run: $1"; exit 1; }
installed() { for name in slurmctld slurmd sbatch munged; do command -v "$name" > /dev/null || return 1; done; }

[ "$(id -u)" = 0 ] || cannot "it needs root, to start the daemons of Slurm"
if installed; then exit 0; fi
command -v apt-get > /dev/null || cannot "no apt-get here; install slurmctld, slurmd and munged"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
export DEBIAN_FRONTEND=noninteractive
{ timeout 300 apt-get update && timeout 600 apt-get install -y --no-install-recommends slurm-wlm munge; } \
  > "$log" 2>&1 < /dev/null || cannot "slurm-wlm and munge cannot be installed ($(tail -n 1 "$log"))"
installed || cannot "Debian's slurm-wlm and munge lack one of the daemons"
