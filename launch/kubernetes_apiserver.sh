#!/bin/sh
# Puts a real kube-apiserver and etcd into a cache, for the tests marked `kubernetes`.
#
#   launch/kubernetes_apiserver.sh [--force]
#
# Debian 12 has no binary of an API server, but the source of Kubernetes 1.20 and Go 1.19, which
# compiles it. Everything is fetched from Debian and checked by its keys, nothing is installed,
# and root is not needed; dpkg-dev, the Debian keyring and 6 GB of disk are. It takes some minutes.
# Variables:
#   KLONG_CACHE   where the binaries are kept, in kubernetes/bin    (~/.cache/klong)
#   KLONG_MIRROR  Debian mirror                                     (http://deb.debian.org/debian)
set -eu

cache=${KLONG_CACHE:-$HOME/.cache/klong}/kubernetes
mirror=${KLONG_MIRROR:-http://deb.debian.org/debian}
keys=/usr/share/keyrings/debian-archive-keyring.gpg
bin=$cache/bin work=$cache/work

say() { echo "kubernetes_apiserver: $*" >&2; }
fail() { say "$*"; exit 1; }

if [ "${1:-}" != --force ] && [ -x "$bin/kube-apiserver" ] && [ -x "$bin/etcd" ]; then
    say "$("$bin/kube-apiserver" --version) is in $bin already"
    exit 0
fi
command -v dpkg-source >/dev/null || fail "install dpkg-dev first: it unpacks Debian's sources"
[ -s "$keys" ] || fail "install debian-archive-keyring first: downloads are checked by its keys"

began=$(date +%s)
rm -rf "$work"
mkdir -p "$bin" "$work/apt/lists/partial" "$work/apt/archives/partial" "$work/root"
cd "$work"

# A package list of its own: the host's may lack Debian 12, or the sources.
for kind in deb deb-src; do
    echo "$kind [signed-by=$keys] $mirror bookworm main"
done >apt/sources.list
apt() {
    apt-get -qq -o Dir::Etc::SourceList="$work/apt/sources.list" -o Dir::Etc::SourceParts=- \
        -o Dir::State::Lists="$work/apt/lists" -o Dir::Cache="$work/apt" \
        -o APT::Sandbox::User="$(id -un)" "$@"
}
say "fetching etcd, Go and the source of Kubernetes"
apt update
apt download etcd-server golang-1.19-go golang-1.19-src
apt source kubernetes >unpacked.log
for package in *.deb; do
    dpkg-deb -x "$package" root
done

GOROOT=$work/root/usr/lib/go-1.19
GOPATH=$work/go
GOCACHE=$work/gocache
PATH=$GOROOT/bin:$PATH
export GOROOT GOPATH GOCACHE PATH GO111MODULE=off GOFLAGS='' GOPROXY=off CGO_ENABLED=0
mkdir -p go/src/k8s.io
ln -s "$(echo "$work"/kubernetes-*)" go/src/k8s.io/kubernetes
cd go/src/k8s.io/kubernetes

# The one generated file that the source lacks: what /openapi/v2 answers.
say "generating the OpenAPI definitions"
go build -o "$work/openapi-gen" ./vendor/k8s.io/kube-openapi/cmd/openapi-gen
packages=$(grep -Rl --include='*.go' --exclude='*_test.go' '+k8s:openapi-gen=' pkg vendor/k8s.io |
    grep -v -e /code-generator/ -e /sample-apiserver/ -e /testdata/ -e /kube-openapi/ |
    xargs -n 1 dirname | sort -u | sed 's|^|k8s.io/kubernetes/|' | paste -sd, -)
"$work/openapi-gen" --go-header-file hack/boilerplate/boilerplate.generatego.txt \
    --input-dirs "$packages" --output-package k8s.io/kubernetes/pkg/generated/openapi \
    --output-file-base zz_generated.openapi --report-filename "$work/violations" \
    --output-base "$GOPATH/src"

say "compiling kube-apiserver"
# Without these the server calls itself v0.0.0, which clients refuse.
flags=
for package in k8s.io/kubernetes/vendor/k8s.io/client-go/pkg/version \
    k8s.io/kubernetes/vendor/k8s.io/component-base/version; do
    flags="$flags -X $package.gitVersion=v1.20.2 -X $package.gitMajor=1 -X $package.gitMinor=20"
done
go build -ldflags "-s -w $flags" -o "$work/kube-apiserver" ./cmd/kube-apiserver

cd "$cache"
cp "$work/root/usr/bin/etcd" bin/etcd
mv "$work/kube-apiserver" bin/kube-apiserver
chmod -R u+w "$work"
rm -rf "$work"
say "$(bin/kube-apiserver --version) and etcd are in $bin after $(($(date +%s) - began)) s"
