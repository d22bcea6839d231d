#!/bin/sh
# Brings up what the tests need beside Python: bubblewrap, a Docker daemon with the sandbox image,
# the engine of sandboxes' egress, and Redis. For Debian, as root, with or without systemd; running
# it again does no harm.
set -eu

here=$(dirname "$(readlink -f "$0")")
say() { echo "services: $*" >&2; }

missing=
command -v bwrap >/dev/null || missing="$missing bubblewrap"
command -v debootstrap >/dev/null || missing="$missing debootstrap"
command -v dockerd >/dev/null || missing="$missing docker.io"
command -v mkfs.ext4 >/dev/null || missing="$missing e2fsprogs"
command -v redis-server >/dev/null || missing="$missing redis-server"
if [ -n "$missing" ]; then
    say "installing$missing"
    apt-get update >/tmp/klong-apt.log 2>&1
    # shellcheck disable=SC2086
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $missing \
        >>/tmp/klong-apt.log 2>&1 || { tail -n 20 /tmp/klong-apt.log >&2; exit 1; }
fi

# Beside the rest: it waits for the network.
"${PYTHON:-python3}" -I "$here/../sandbox/egress/install.py" >/tmp/klong-egress.log 2>&1 &
egress=$!

# Quotas of sandboxes are file systems in files.
[ -e /dev/loop-control ] || modprobe loop 2>/dev/null || mknod /dev/loop-control c 10 237 || true

# wait_for SECONDS COMMAND...: until the command succeeds.
wait_for() {
    left=$(($1 * 10)); shift
    until "$@" >/dev/null 2>&1; do
        left=$((left - 1))
        [ "$left" -gt 0 ] || return 1
        sleep 0.1
    done
}

start_dockerd() {
    # setsid: the daemon outlives this script and its terminal.
    setsid dockerd "$@" >/tmp/klong-dockerd.log 2>&1 </dev/null &
    daemon=$!
    left=300
    until docker info >/dev/null 2>&1; do
        left=$((left - 1))
        # Gone already: the arguments do not suit this machine.
        kill -0 "$daemon" 2>/dev/null && [ "$left" -gt 0 ] || { kill "$daemon" 2>/dev/null; return 1; }
        sleep 0.1
    done
}

if docker info >/dev/null 2>&1; then
    say "dockerd answers already"
else
    # A container or small kernel may lack netfilter or overlayfs; sandboxes need neither.
    start_dockerd ||
        start_dockerd --iptables=false --bridge=none ||
        start_dockerd --iptables=false --bridge=none --storage-driver=vfs ||
        { say "dockerd does not start:"; tail -n 20 /tmp/klong-dockerd.log >&2; exit 1; }
    say "dockerd started"
fi

if redis-cli ping >/dev/null 2>&1; then
    say "redis answers already"
else
    redis-server --daemonize yes --save '' --appendonly no --dir /tmp \
        --logfile /tmp/klong-redis.log >/dev/null
    wait_for 10 redis-cli ping || { say "redis-server does not start:"; tail /tmp/klong-redis.log >&2; exit 1; }
    say "redis started"
fi

"$here/../launch/sandbox_image.sh"
wait "$egress" || { say "the egress engine:"; tail -n 20 /tmp/klong-egress.log >&2; exit 1; }
say "ready"
