"""Who is judged first: the judgement that a training step waits for goes before the others."""

import asyncio
import heapq
import itertools
from collections.abc import Mapping

from klong_jax.core.rollout import Judgement
from klong_jax.core.task import Task
from klong_jax.core.trajectory import Trajectory
from klong_jax.judge.executable import ExecutableJudge


class JudgePool:
    """Bounds how many judgements run at once; who waits goes by priority, then by arrival."""

    def __init__(self, judge: ExecutableJudge, workers: int) -> None:
        """Describes the pool; it belongs to one event loop.

        Args:
            judge: Who judges.
            workers: Judgements that run at once.
        """
        if workers < 1:
            raise ValueError(f"a pool needs at least one worker, not {workers}")
        self._judge = judge
        self._free = workers
        self._arrivals = itertools.count()
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []

    async def judge(
        self,
        task: Task,
        trajectory: Trajectory,
        artifact: bytes,
        evidence: Mapping[str, str],
        priority: int = 0,
    ) -> Judgement:
        """Judges when its turn has come; a larger priority goes first."""
        await self._enter(priority)
        try:
            return await self._judge.judge(task, trajectory, artifact, evidence)
        finally:
            self._leave()

    async def _enter(self, priority: int) -> None:
        if self._free:
            self._free -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (-priority, next(self._arrivals), turn))
        try:
            await turn
        except asyncio.CancelledError:
            # Cancelled with the turn already given: pass it on.
            if turn.done() and not turn.cancelled():
                self._leave()
            raise

    def _leave(self) -> None:
        while self._waiting:
            _, _, turn = heapq.heappop(self._waiting)
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1
