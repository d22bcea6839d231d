"""Sandboxes as pods of a Kubernetes cluster, reached through its API server alone.

    service --HTTPS, one pods/exec stream a pod--> API server --> kubelet --> bridge --> agent

The service needs no path to the nodes and no directory of theirs: commands, their output and files
all go over the stream to the agent, the pod's first process.
"""
