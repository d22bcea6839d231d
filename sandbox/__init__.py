"""Sandboxes over HTTP: a service that runs untrusted commands, and its client.

`sandbox.client` is what callers import, or `sandbox.sync` where there is no event loop.
`sandbox.service` runs the service, also inside another process. `sandbox.backends` holds the ways
to make a sandbox on a host.
"""
