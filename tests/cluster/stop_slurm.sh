#!/bin/bash
# stop_slurm.sh DIR: ends the daemons that `start_slurm.sh DIR` has started.
for file in "$1"/run/slurmd-*.pid "$1"/run/slurmctld.pid "$1"/run/munged.pid; do
  if [ -s "$file" ]; then kill "$(cat "$file")"; fi
done
