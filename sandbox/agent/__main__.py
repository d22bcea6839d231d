"""`python3 -ISB __main__.py SOCKET_DIR LIFETIME ORPHAN [FILTERS]`: serves until all is over.

SOCKET_DIR is empty where a bridge will come. LIFETIME is the seconds until the agent ends by
itself, whether or not a service is there to tell it; ORPHAN the seconds that it outlives the loss
of the service. FILTERS is a directory of system-call filters, one a machine, where nothing outside
sees to one.
"""

from __future__ import annotations

import os
import sys

# Python would find the package by itself if it were given the directory, and take longer.
sys.path.insert(0, __file__.rpartition("/")[0])

from sandbox.agent import processes
from sandbox.agent.server import Server

if __name__ == "__main__":
    for filters in sys.argv[4:]:
        with open(f"{filters}/{os.uname().machine}", "rb") as file:
            processes.restrict(file.read())
    Server(sys.argv[1], lifetime_s=float(sys.argv[2]), orphan_s=float(sys.argv[3])).run()
