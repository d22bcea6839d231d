"""Training steps of several contenders, each in a process of its own."""
