#!/usr/bin/env bash
# A SLURM of one node on this machine, for the tests marked slurm. As root, on Debian or Ubuntu:
#   .ci/one-node-slurm.sh start    installs slurm-wlm and munge where they are missing, starts munged, slurmctld and slurmd
#   .ci/one-node-slurm.sh stop     ends slurmd and slurmctld by the ids they wrote
# Without accounting, as on some clusters: what a job did is only known from the queue and from what it wrote.
set -euo pipefail
run=/run/one-node-slurm

configure() {
  local host memory
  host=$(hostname -s)
  memory=$(awk '/MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo)
  # KillWait: our processes leave SIGTERM to submitit, so what ends a cancelled job is SIGKILL; 30 s is the default.
  cat >/etc/slurm/slurm.conf <<CONF
ClusterName=onenode
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
ReturnToService=2
SchedulerType=sched/builtin
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
KillWait=1
StateSaveLocation=/var/spool/slurmctld
SlurmdSpoolDir=/var/spool/slurmd
SlurmctldPidFile=$run/slurmctld.pid
SlurmdPidFile=$run/slurmd.pid
SlurmctldLogFile=/var/log/slurm/slurmctld.log
SlurmdLogFile=/var/log/slurm/slurmd.log
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=$memory State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
CONF
  if [ ! -s /etc/munge/munge.key ]; then
    dd if=/dev/urandom of=/etc/munge/munge.key bs=1 count=1024 status=none
    chmod 400 /etc/munge/munge.key
  fi
  chown munge: /etc/munge/munge.key /run/munge
}

is_alive() { [ -s "$run/$1.pid" ] && kill -0 "$(cat "$run/$1.pid")" 2>/dev/null; }

start() {
  if ! is_alive slurmctld && [ -s /etc/slurm/slurm.conf ] && ! grep -q '^ClusterName=onenode$' /etc/slurm/slurm.conf; then
    echo "/etc/slurm/slurm.conf is another cluster's; it is left as it is, and its SLURM is used" >&2
    sinfo
    return
  fi
  if ! command -v slurmctld >/dev/null || ! command -v munged >/dev/null; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq slurm-wlm munge >/dev/null
  fi
  mkdir -p "$run" /etc/slurm /var/spool/slurmctld /var/spool/slurmd /var/log/slurm /run/munge
  if ! is_alive slurmctld; then configure; fi
  if ! munge -n >/dev/null 2>&1; then runuser -u munge -- "$(command -v munged)" --pid-file=/run/munge/munged.pid; fi
  if ! is_alive slurmctld; then slurmctld; fi
  if ! is_alive slurmd; then slurmd; fi
  for _ in $(seq 30); do
    if sinfo -h -o %T 2>/dev/null | grep -qE 'idle|mix|alloc'; then
      sinfo
      return
    fi
    sleep 1
  done
  tail -n 20 /var/log/slurm/*.log >&2
  return 1
}

stop() {
  for daemon in slurmd slurmctld; do
    if is_alive "$daemon"; then kill "$(cat "$run/$daemon.pid")"; fi
  done
}

case "${1:-}" in
  start | stop) "$1" ;;
  *)
    echo "usage: $0 start|stop" >&2
    exit 2
    ;;
esac
