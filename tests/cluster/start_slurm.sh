#!/bin/bash
# start_slurm.sh DIR NODES CPUS: a SLURM cluster on this machine, for tests.
#
# Starts munged, slurmctld and one slurmd for each of NODES nodes n1, n2, ... of CPUS CPUs.
# They listen on the loopback interface and on free ports, need neither systemd nor cgroups,
# and keep everything in DIR. The partition `urgent` preempts the jobs of `main`. Prints the
# value of SLURM_CONF. stop_slurm.sh DIR ends the daemons.
set -eu
mkdir -p "$1"
dir=$(cd "$1" && pwd)
nodes=$2 cpus=$3
host=$(hostname -s)
mkdir -p "$dir"/{key,run,log,state,spool}
chmod 755 "$dir" "$dir/key" "$dir/run"

free_port() {
  python3 -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# A daemon that kept the pipes of its caller would keep the caller waiting.
quietly() {
  "$@" < /dev/null >> "$dir/log/start.log" 2>&1
}

{
  cat << END
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(free_port)
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
# A requeued job waits until its old credential has expired, 120 s by default.
AuthInfo=socket=$dir/run/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd-%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd-%n.log
JobCompType=jobcomp/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
ReturnToService=2
KillWait=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
END
  for node in $(seq "$nodes"); do
    echo "NodeName=n$node NodeHostname=$host NodeAddr=127.0.0.1 Port=$(free_port) CPUs=$cpus"
  done
  echo "PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=30 State=UP"
  echo "PartitionName=urgent Nodes=ALL PriorityTier=10 State=UP"
} > "$dir/slurm.conf"
# Without this file slurmd 22.05 asks for a mounted /sys/fs/cgroup, and ends.
echo "CgroupPlugin=cgroup/v1" > "$dir/cgroup.conf"

[ -s "$dir/key/munge.key" ] || (umask 077 && head -c 1024 /dev/urandom > "$dir/key/munge.key")
quietly /usr/sbin/munged --force --num-threads=2 \
  --key-file="$dir/key/munge.key" --seed-file="$dir/key/seed" \
  --socket="$dir/run/munge.socket" --pid-file="$dir/run/munged.pid" \
  --log-file="$dir/log/munged.log"
export SLURM_CONF="$dir/slurm.conf"
quietly /usr/sbin/slurmctld -i
for node in $(seq "$nodes"); do
  mkdir -p "$dir/spool/n$node"
  quietly /usr/sbin/slurmd -N "n$node"
done
for _ in $(seq 100); do
  idle=$(sinfo --noheader --Node --partition=main --states=idle 2> /dev/null | wc -l)
  if [ "$idle" = "$nodes" ]; then
    echo "$SLURM_CONF"
    exit 0
  fi
  sleep 0.2
done
echo "no $nodes idle nodes after 20 s; see $dir/log" >&2
exit 1
