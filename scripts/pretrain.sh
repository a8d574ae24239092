#!/bin/sh
# Pretrain on one node, as the original's script of this name does: all its GPUs (or PROCESSES processes), one run.
#
#   scripts/pretrain.sh RECIPE DATA RUN [more flags of `mobilellm train`]
#   scripts/pretrain.sh recipes/paper/125M.toml data/tokens runs/125M
#
# Several nodes: NODES=4 NODE=0..3 MASTER=host:port on each. Started again with the same words it goes on where it stood.
set -eu
if [ $# -lt 3 ]; then
    echo "usage: [PROCESSES=n] [NODES=n NODE=i MASTER=host:port] $0 RECIPE DATA RUN [flags]" >&2
    exit 2
fi
recipe=$1 data=$2 run=$3
shift 3
if [ -z "${PROCESSES:-}" ]; then
    PROCESSES=$(nvidia-smi --list-gpus 2>/dev/null | wc -l)
    [ "$PROCESSES" -gt 0 ] || PROCESSES=1
fi
if [ "${NODES:-1}" -gt 1 ]; then
    set -- --rdzv-backend c10d --rdzv-endpoint "${MASTER:?host:port of node 0}" --rdzv-id "${JOB:-mobilellm}" \
        --node-rank "${NODE:?number of this node, from 0}" -- "$@"
else
    set -- --standalone -- "$@"
fi
options=
while [ "$1" != "--" ]; do
    options="$options $1"
    shift
done
shift
# shellcheck disable=SC2086  # the options hold no spaces
exec python -m torch.distributed.run --nnodes "${NODES:-1}" --nproc-per-node "$PROCESSES" --max-restarts "${RESTARTS:-3}" \
    $options -m mobilellm train "$recipe" --data.path "$data" --out "$run" --resume auto "$@"
