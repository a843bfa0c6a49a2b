#!/bin/bash
# Train over two hosts. On the first, which the second can reach at ADDRESS:
#   examples/two_hosts.sh first ADDRESS pretrain --config town --output runs/town
# and on the second the same with "second". The folder of the run is on a shared disk.
#
# PROCESSES says how many run on each host (1), INTERFACE names the network interface
# that leads to the other.
set -e
which=$1 address=$2
shift 2

export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # addresses of killed processes are not kept
if [ -n "$INTERFACE" ]; then
    export GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE
fi
case $which in
    first) rendezvous=(--rdzv-conf=is_host=1 "--local-addr=$address") ;;
    second) rendezvous=(--rdzv-conf=is_host=0) ;;
    *) echo "error: say first or second, not $which" >&2 && exit 2 ;;
esac

exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes=2 --nproc-per-node="${PROCESSES:-1}" --max-restarts="${RESTARTS:-20}" \
    --rdzv-backend=c10d --rdzv-endpoint="$address:29500" --rdzv-id=two-hosts \
    "${rendezvous[@]}" -m -- llama2_lite.runtime.cli "$@"
