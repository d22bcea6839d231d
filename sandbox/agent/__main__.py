"""`python3 -ISB __main__.py SOCKET_DIR LIFETIME ORPHAN [PORT]`: serves until the sandbox is over.

LIFETIME is the seconds until the agent ends by itself, whether or not a service is there to tell
it; ORPHAN the seconds that it outlives the loss of the service; PORT where commands find the
relay to the egress proxy, in a sandbox that has one.
"""

from __future__ import annotations

import sys

# Python would find the package by itself if it were given the directory, and take longer.
sys.path.insert(0, __file__.rpartition("/")[0])

from sandbox.agent.server import Server

if __name__ == "__main__":
    Server(
        sys.argv[1],
        lifetime_s=float(sys.argv[2]),
        orphan_s=float(sys.argv[3]),
        relay_port=int(sys.argv[4]) if len(sys.argv) > 4 else None,
    ).run()
