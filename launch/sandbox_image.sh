#!/bin/sh
# Makes the slim image, the docker backend's default, without an image registry; see there.
exec sh "$(dirname "$(readlink -f "$0")")/../sandbox/images/slim/debootstrap.sh" "$@"
