#!/usr/bin/env bash
# Two hosts on one machine: network namespaces mae-a (10.77.0.1) and mae-b (10.77.0.2), joined by a cable (veth).
#     tests/hosts.sh up|down       as root
#     tests/hosts.sh cut|mend      the cable, at mae-b's end
set -euo pipefail
case $1 in
up)
    "$0" down
    for host in a b; do
        ip netns add mae-$host
        ip -n mae-$host link set lo up
    done
    ip link add mae-va netns mae-a type veth peer name mae-vb netns mae-b
    ip -n mae-a addr add 10.77.0.1/24 dev mae-va
    ip -n mae-b addr add 10.77.0.2/24 dev mae-vb
    ip -n mae-a link set mae-va up
    ip -n mae-b link set mae-vb up
    ;;
down)
    for host in a b; do ip netns del mae-$host 2>/dev/null || true; done
    ;;
cut) ip -n mae-b link set mae-vb down ;;
mend) ip -n mae-b link set mae-vb up ;;
esac
