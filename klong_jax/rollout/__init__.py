"""Rollout requests in, judged trajectories out, through a queue that outlives its workers."""

from pathlib import Path

from klong_jax.rollout.queue import RolloutQueue

_REDIS = ("redis://", "rediss://", "unix://")


def open_queue(url: str, namespace: str, max_attempts: int = 3) -> RolloutQueue:
    """Opens the queue that a URL names, creating it if it is not there.

    Args:
        url: `redis://host:port/db` (or rediss, unix) for many hosts; anything else is the path of
            an SQLite file, with or without `sqlite:///` before it.
        namespace: Tells the queues of several runs on one Redis server apart; an SQLite file holds
            one queue.
        max_attempts: Infrastructure failures after which a request is given up.

    Raises:
        UserError: There is no usable queue at the URL.
    """
    if url.startswith(_REDIS):
        # Imported on use: a run on one host needs no Redis client.
        from klong_jax.rollout.redis_queue import RedisQueue

        return RedisQueue(url, namespace, max_attempts)
    from klong_jax.rollout.sqlite_queue import SqliteQueue

    return SqliteQueue(Path(url.removeprefix("sqlite:///")), max_attempts)
