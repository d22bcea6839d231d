"""The process that serves inside a sandbox, as its first: standard library only, Python 3.9.

    service  <- Unix socket, dialled from inside ->  agent (PID 1)
                                                       supervisor -> command and all it starts
                                                       supervisor -> shell of a session ...

The agent never runs anything itself. A supervisor is a forked copy of it that is the subreaper of
what it starts: however a process daemonises, the kernel hands it back to its supervisor, so that
"no children left" proves that a command is over with everything it started.
"""
