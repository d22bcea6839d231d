#!/bin/sh
# Makes the slim image, the docker backend's default, from Debian packages without an image registry.
#
#   debootstrap.sh [--force]
#
# Needs root (debootstrap) only when the tarball is not cached yet, or by force. Variables:
#   KLONG_IMAGE   name of the image            (klong/base:bookworm)
#   KLONG_CACHE   where the tarball is kept    (~/.cache/klong)
#   KLONG_MIRROR  Debian mirror                (the host's own, else http://deb.debian.org/debian)
set -eu

here=$(dirname "$(readlink -f "$0")")
image=${KLONG_IMAGE:-klong/base:bookworm}
cache=${KLONG_CACHE:-$HOME/.cache/klong}
tarball=$cache/sandbox-python-bookworm.tar
force=${1:-}

say() { echo "sandbox_image: $*" >&2; }
refuse() { say "$*"; exit 1; }

label() { docker image inspect --format "{{index .Config.Labels \"klong.$1\"}}" "$image" 2>/dev/null; }

if [ "$force" != --force ] && [ "$(label image)" = slim ] && [ -n "$(label recipe)" ] &&
    docker run --rm --network none "$image" python3 -c 'import ctypes, json' >/dev/null 2>&1; then
    say "$image is there already"
    exit 0
fi

if [ "$force" = --force ] || [ ! -s "$tarball" ]; then
    command -v debootstrap >/dev/null || refuse "debootstrap is not installed; apt install debootstrap."
    [ "$(id -u)" = 0 ] || refuse "debootstrap needs root; run this as root, or let a registry give Debian."
    mirror=${KLONG_MIRROR:-$(sed -n 's/^deb \(\[[^]]*\] \)\?\(http[^ ]*\) bookworm main.*/\2/p; s/^URIs: *\(http[^ ]*\).*/\1/p' \
        /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null | grep -v security | head -n 1)}
    mkdir -p "$cache"
    work=$(mktemp -d)
    trap 'rm -rf "$work" "$tarball.part"' EXIT
    # A signal ends the script by its exit, so that nothing is left.
    trap 'exit 130' INT TERM
    say "bootstrapping Debian bookworm from ${mirror:=http://deb.debian.org/debian}"
    packages=$(sed 's/#.*//' "$here/debian.txt" | xargs | tr ' ' ,)
    debootstrap --variant=minbase --include="$packages" \
        bookworm "$work/root" "$mirror" >"$work/log" 2>&1 || {
        tail -n 20 "$work/log" >&2
        ! grep -q 'No space left on device' "$work/log" || refuse "the disk is full."
        refuse "debootstrap fails: $(tail -n 1 "$work/log")"
    }
    sh "$here/finish.sh" "$work/root"
    rm -rf "$work/root/dev"
    mkdir "$work/root/dev"
    tar --numeric-owner --sort=name -C "$work/root" -cf "$tarball.part" . || refuse "the disk is full."
    mv "$tarball.part" "$tarball"
fi

docker import --change 'ENV LANG=C.UTF-8' --change 'LABEL klong.image=slim klong.recipe=debootstrap' \
    "$tarball" "$image" >/dev/null || refuse "the Docker daemon does not take the image."
say "$image is ready ($(du -h "$tarball" | cut -f1))"
