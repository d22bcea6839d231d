"""`python3 -ISB __main__.py SOCKET_DIR LIFETIME ORPHAN [PORT] [FILTERS]`: serves to the end.

SOCKET_DIR is empty where a bridge will come. LIFETIME is the seconds until the agent ends by
itself, whether or not a service is there to tell it; ORPHAN the seconds that it outlives the loss
of the service. PORT is where commands find the relay to the egress proxy, in a sandbox that has
one; FILTERS a directory of system-call filters, one a machine, where nothing outside sees to one.
"""

from __future__ import annotations

import os
import sys

# Python would find the package by itself if it were given the directory, and take longer.
sys.path.insert(0, __file__.rpartition("/")[0])

from sandbox.agent import processes
from sandbox.agent.server import Server

if __name__ == "__main__":
    port = None
    for more in sys.argv[4:]:
        if more.isdigit():
            port = int(more)
        else:
            with open(f"{more}/{os.uname().machine}", "rb") as file:
                processes.restrict(file.read())
    Server(
        sys.argv[1],
        lifetime_s=float(sys.argv[2]),
        orphan_s=float(sys.argv[3]),
        relay_port=port,
    ).run()
