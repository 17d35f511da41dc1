#!/usr/bin/env bash
# One Ray node of cluster.sbatch: `node.sh head|policy|ppm|sandbox|learner`. Offers what Slurm gave this
# task as the custom resource of its kind, and runs until it is told to end; then it drains first.
set -euo pipefail
kind=$1
gpus=${SLURM_GPUS_ON_NODE:-0}
cpus=${SLURM_CPUS_PER_TASK:-$(nproc)}

# Nodes that Slurm puts on one machine, of this job or another, have ports of their own: each holds a
# place by a lock, which goes when it ends.
for ((place = 0; place < 8; place++)); do
    lock="${RSTAR_LOCKS:-/tmp}/rstar-node-$place.lock"
    [ -e "$lock" ] || (umask 022 && : >>"$lock") 2>/dev/null || true
    exec 9<"$lock"
    flock --nonblock 9 && break
done
if ((place == 8)); then
    echo "node.sh: eight Ray nodes run on $(hostname) already" >&2
    exit 2
fi
common=(
    --block
    --disable-usage-stats
    --metrics-export-port=$((${RSTAR_METRICS_PORT:-8090} + place))
    --dashboard-agent-listen-port=$((52365 + place))
    --runtime-env-agent-port=$((52465 + place)) # of a free one others hear late, and give up on slow machines
    --min-worker-port=$((10002 + 1200 * place))
    --max-worker-port=$((11201 + 1200 * place))
    --temp-dir="${TMPDIR:-/tmp}/ray-$SLURM_JOB_ID"
)
ulimit -n 65536 2>/dev/null || ulimit -n "$(ulimit -Hn)"

# A node that joins the head. Ray gives it 30 s to start; one that a busy machine did not start in time,
# or that died, is started again, three times at most.
join() {
    local node='' status tries told=''
    trap 'told=yes; kill -TERM ${node:+"$node"} 2>/dev/null || true' TERM
    for ((tries = 0; tries < 3; tries++)); do
        ray start --address="$RSTAR_HEAD" --num-cpus="$cpus" "$@" "${common[@]}" &
        node=$!
        [ -z "$told" ] || kill -TERM "$node"
        status=0
        wait "$node" || status=$?
        while kill -0 "$node" 2>/dev/null; do # a signal ends `wait` early
            status=0
            wait "$node" || status=$?
        done
        [ -n "$told" ] || [ "$status" = 0 ] && break
        echo "node.sh: the $kind node ended with status $status"
    done
    exit "$status"
}

case $kind in
head)
    # It goes last. What is left on it then is an actor of Ray Train's own, which would be waited for.
    export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=5
    exec ray start --head --port="${RSTAR_HEAD##*:}" --dashboard-host=127.0.0.1 \
        --num-cpus=0 --num-gpus=0 --resources='{"head": 1}' "${common[@]}"
    ;;
policy | ppm | learner)
    if [ "$gpus" -lt 1 ]; then
        echo "node.sh: $kind needs GPUs, Slurm gave this task none" >&2
        exit 2
    fi
    join --num-gpus="$gpus" --resources="{\"$kind\": $gpus}"
    ;;
sandbox)
    join --num-gpus=0 --resources="{\"sandbox\": $cpus}"
    ;;
*)
    echo "node.sh: unknown kind '$kind'; one of head, policy, ppm, sandbox, learner" >&2
    exit 2
    ;;
esac
