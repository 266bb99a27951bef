#!/usr/bin/env bash
# Install Slurm and munge for tests/slurm, from Debian's packages. Exit status 1, and one line that
# says why, if this machine cannot have them.
set -u
if command -v slurmctld slurmd munged sbatch > /dev/null; then exit 0; fi
cannot() { echo "tests/slurm is not run: $1"; exit 1; }
[ "$(id -u)" = 0 ] || cannot "it needs root, to install and start Slurm"
command -v apt-get > /dev/null || cannot "no apt-get here; install slurmctld, slurmd and munged"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
export DEBIAN_FRONTEND=noninteractive
{ timeout 300 apt-get update && timeout 600 apt-get install -y --no-install-recommends slurm-wlm munge; } \
  > "$log" 2>&1 < /dev/null || cannot "slurm-wlm and munge cannot be installed ($(tail -n 1 "$log"))"
