"""`python3 -ISB AGENT_DIR SOCKET_DIR LIFETIME ORPHAN`: serves until the sandbox is over.

LIFETIME is the seconds until the agent ends by itself, whether or not a service is there to tell
it; ORPHAN the seconds that it outlives the loss of the service.
"""

from __future__ import annotations

import sys

from sandbox.agent.server import Server

if __name__ == "__main__":
    Server(sys.argv[1], lifetime_s=float(sys.argv[2]), orphan_s=float(sys.argv[3])).run()
