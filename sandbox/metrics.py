"""What a service counts and times, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_CREATION_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_COMMAND_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1, 5, 10, 60, 600, 3600)


class Metrics:
    """The metrics of one service; several in a process do not mix."""

    def __init__(self, *, living: Callable[[], int], waiting: Callable[[], int]) -> None:
        """Makes them.

        Args:
            living: How many sandboxes callers have.
            waiting: How many wait for one.
        """
        self._registry = registry = CollectorRegistry()
        self.creations = Histogram(
            "klong_sandbox_creation_seconds",
            "Time to a sandbox that takes commands; source is pool (a hit) or new.",
            ["source"],
            buckets=_CREATION_S,
            registry=registry,
        )
        self.commands = Histogram(
            "klong_sandbox_command_seconds",
            "Time of commands, as the service sees it; kind is exec or run (in a session).",
            ["kind"],
            buckets=_COMMAND_S,
            registry=registry,
        )
        self.overheads = Histogram(
            "klong_sandbox_command_overhead_seconds",
            "What of that the command itself did not take.",
            ["kind"],
            buckets=_COMMAND_S,
            registry=registry,
        )
        self.snapshots = Histogram(
            "klong_sandbox_snapshot_seconds",
            "Time of snapshots by what is done: take, or restore (in a creation).",
            ["action"],
            buckets=_CREATION_S,
            registry=registry,
        )
        self.rejections = Counter(
            "klong_sandbox_rejections",
            "Requests that were answered with an error, by its kind.",
            ["kind"],
            registry=registry,
        )
        self.reaps = Counter(
            "klong_sandbox_reaps",
            "Sandboxes that nobody closed: expired, abandoned, idle in the pool for too long, or "
            "orphaned by a service that died.",
            ["reason"],
            registry=registry,
        )
        self.verdicts = Counter(
            "klong_sandbox_egress_verdicts",
            "Requests of sandboxes to the network, by verdict (allowed, refused) and reason.",
            ["verdict", "reason"],
            registry=registry,
        )
        self.adoptions = Counter(
            "klong_sandbox_adoptions",
            "Sandboxes of a service that died, taken over alive.",
            registry=registry,
        )
        gauge = Gauge("klong_sandbox_living", "Sandboxes that callers have.", registry=registry)
        gauge.set_function(living)
        gauge = Gauge("klong_sandbox_waiting", "Sandboxes in the warm pool.", registry=registry)
        gauge.set_function(waiting)

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self._registry)
