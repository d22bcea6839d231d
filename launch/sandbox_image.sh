#!/bin/sh
# Builds the default image of the docker backend from Debian packages, without an image registry.
#
#   launch/sandbox_image.sh [--force]
#
# The image has a whole python3: what serves inside a sandbox needs its json and ctypes.
# Needs root (debootstrap) only when the tarball is not cached yet. Variables:
#   KLONG_IMAGE   name of the image            (klong/base:bookworm)
#   KLONG_CACHE   where the tarball is kept    (~/.cache/klong)
#   KLONG_MIRROR  Debian mirror                (the host's own, else http://deb.debian.org/debian)
set -eu

image=${KLONG_IMAGE:-klong/base:bookworm}
cache=${KLONG_CACHE:-$HOME/.cache/klong}
tarball=$cache/sandbox-python-bookworm.tar
force=${1:-}

say() { echo "sandbox_image: $*" >&2; }

if [ "$force" != --force ] &&
    docker run --rm --network none "$image" python3 -c 'import ctypes, json' >/dev/null 2>&1; then
    say "$image is there already"
    exit 0
fi

if [ "$force" = --force ] || [ ! -s "$tarball" ]; then
    command -v debootstrap >/dev/null || { say "install debootstrap first"; exit 1; }
    mirror=${KLONG_MIRROR:-$(sed -n 's/^deb \(\[[^]]*\] \)\?\(http[^ ]*\) bookworm main.*/\2/p; s/^URIs: *\(http[^ ]*\).*/\1/p' \
        /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null | grep -v security | head -n 1)}
    mkdir -p "$cache"
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    say "bootstrapping Debian bookworm from ${mirror:=http://deb.debian.org/debian}"
    debootstrap --variant=minbase --include=python3,ca-certificates \
        bookworm "$work/root" "$mirror" >"$work/log" 2>&1 || { tail -n 20 "$work/log" >&2; exit 1; }
    # Package caches and documents are half of the size and nobody reads them in a sandbox.
    rm -rf "$work/root/var/cache/apt" "$work/root/var/lib/apt/lists" "$work/root/usr/share/doc" \
        "$work/root/usr/share/man" "$work/root/usr/share/locale" "$work/root/dev"
    mkdir "$work/root/dev"
    # The user and the directories that the backend gives to commands.
    echo 'agent:x:1000:1000::/home/agent:/bin/sh' >>"$work/root/etc/passwd"
    echo 'agent:x:1000:' >>"$work/root/etc/group"
    mkdir -p "$work/root/workspace" "$work/root/home/agent"
    chown 1000:1000 "$work/root/workspace" "$work/root/home/agent"
    tar --numeric-owner --sort=name -C "$work/root" -cf "$tarball.part" .
    mv "$tarball.part" "$tarball"
fi

docker import --change 'ENV LANG=C.UTF-8' "$tarball" "$image" >/dev/null
say "$image is ready ($(du -h "$tarball" | cut -f1))"
