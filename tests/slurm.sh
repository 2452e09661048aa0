#!/usr/bin/env bash
# A SLURM cluster of this machine alone, with two CPUs and a partition whose jobs preempt the others, in a folder of its
# own; as root, from Debian's packages slurmctld, slurmd, slurm-client and munge.
#     tests/slurm.sh start DIR     then: export SLURM_CONF=DIR/slurm.conf
#     tests/slurm.sh stop DIR
set -euo pipefail
dir=$2
if [ "$1" = stop ]; then
    for name in slurmctld slurmd munged; do
        [ -f "$dir/$name.pid" ] && kill "$(cat "$dir/$name.pid")" 2>/dev/null || true
    done
    exit 0
fi

mkdir -p "$dir/munge" "$dir/ctld" "$dir/spool"
chmod 755 "$dir"
chmod 711 "$dir/munge"
head -c 1024 /dev/urandom > "$dir/munge.key"
chmod 400 "$dir/munge.key"
/usr/sbin/munged --force --key-file="$dir/munge.key" --socket="$dir/munge/socket" --pid-file="$dir/munged.pid" \
    --log-file="$dir/munged.log" --seed-file="$dir/munged.seed"

host=$(hostname -s)
cat > "$dir/slurm.conf" <<CONF
ClusterName=mae
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=26817
SlurmdPort=26818
SlurmUser=root
# cred_expire also says how long a job that was requeued waits
AuthInfo=socket=$dir/munge/socket,cred_expire=5
StateSaveLocation=$dir/ctld
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
MpiDefault=none
SwitchType=switch/none
NodeName=$host NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
CONF
echo "CgroupAutomount=no" > "$dir/cgroup.conf"
export SLURM_CONF=$dir/slurm.conf
/usr/sbin/slurmctld
/usr/sbin/slurmd
for _ in $(seq 60); do
    if sinfo -h -o %T 2>/dev/null | grep -q idle; then exit 0; fi
    sleep 0.5
done
tail -20 "$dir/slurmctld.log" "$dir/slurmd.log" >&2
exit 1
