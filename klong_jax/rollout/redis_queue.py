"""The rollout queue on a Redis server: for workers on many hosts.

Every operation is one Lua script, which Redis runs as one transaction. What survives a crash of the
server is the server's setting: run it with `appendonly yes` for a queue that outlives it.

Keys, all under `{klong:NAMESPACE}` so that a cluster keeps them on one node:

    seq          counter of requests
    all, group:G lists of request ids in put order
    ready        sorted set of "SEQ ID" by minus priority; equal scores sort by the padded SEQ
    leased       sorted set of request ids by the end of the lease
    request:ID   hash: body, group, rank, member, state, attempt, resume_ref, failures, reason,
                 worker, and once finished: result_attempt, trajectory, judgement
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import redis

from klong_jax.core.errors import UserError
from klong_jax.core.rollout import Judgement, RolloutRequest
from klong_jax.core.trajectory import Trajectory
from klong_jax.rollout.queue import RolloutResult, State, check_finish, given_up

# KEYS[1] is the prefix. `back` and `failed` act on a leased request.
_PRELUDE = """
local prefix = KEYS[1]
local function key(id) return prefix .. ':request:' .. id end
local function field(id, name) return redis.call('HGET', key(id), name) end
local function holds(id, attempt)
  return field(id, 'state') == 'leased' and field(id, 'attempt') == attempt
end
local function back(id)
  redis.call('ZREM', prefix .. ':leased', id)
  redis.call('HSET', key(id), 'state', 'queued', 'worker', '')
  redis.call('ZADD', prefix .. ':ready', field(id, 'rank'), field(id, 'member'))
end
local function failed(id, reason, max_attempts)
  redis.call('HSET', key(id), 'reason', reason)
  if redis.call('HINCRBY', key(id), 'failures', 1) < tonumber(max_attempts) then
    redis.call('HINCRBY', key(id), 'attempt', 1)
    back(id)
  else
    redis.call('ZREM', prefix .. ':leased', id)
    redis.call('HSET', key(id), 'state', 'failed', 'worker', '')
  end
end
"""

_PUT = """
local new = 0
for i = 1, #ARGV, 6 do
  local id, group, rank, attempt, resume_ref, body = unpack(ARGV, i, i + 5)
  if redis.call('EXISTS', key(id)) == 0 then
    local member = string.format('%016d ', redis.call('INCR', prefix .. ':seq')) .. id
    redis.call('HSET', key(id), 'body', body, 'group', group, 'rank', rank, 'member', member,
      'state', 'queued', 'attempt', attempt, 'resume_ref', resume_ref, 'failures', 0,
      'reason', '', 'worker', '')
    redis.call('RPUSH', prefix .. ':all', id)
    redis.call('RPUSH', prefix .. ':group:' .. group, id)
    redis.call('ZADD', prefix .. ':ready', rank, member)
    new = new + 1
  end
end
return new
"""

_LEASE = """
local worker, now, till, limit, max_attempts, reason = unpack(ARGV)
for _, id in ipairs(redis.call('ZRANGEBYSCORE', prefix .. ':leased', '-inf', now)) do
  failed(id, reason .. field(id, 'worker'), max_attempts)
end
local leased = {}
local ready = redis.call('ZRANGEBYSCORE', prefix .. ':ready', '-inf', '+inf', 'LIMIT', 0, limit)
for _, member in ipairs(ready) do
  local id = string.sub(member, 18)
  redis.call('ZREM', prefix .. ':ready', member)
  redis.call('ZADD', prefix .. ':leased', till, id)
  redis.call('HSET', key(id), 'state', 'leased', 'worker', worker)
  table.insert(leased, redis.call('HMGET', key(id), 'body', 'attempt', 'resume_ref'))
end
return leased
"""

_RENEW = """
local worker, id, attempt, till = unpack(ARGV)
if not holds(id, attempt) or field(id, 'worker') ~= worker then return 0 end
redis.call('ZADD', prefix .. ':leased', till, id)
return 1
"""

_FINISH = """
local id, attempt, trajectory, judgement = unpack(ARGV)
local state = field(id, 'state')
if not state or tonumber(attempt) > tonumber(field(id, 'attempt')) then return -1 end
if state == 'finished' or state == 'failed' then
  return field(id, 'result_attempt') == attempt and 1 or 0
end
redis.call('ZREM', prefix .. ':leased', id)
redis.call('ZREM', prefix .. ':ready', field(id, 'member'))
redis.call('HSET', key(id), 'state', 'finished', 'worker', '', 'result_attempt', attempt,
  'trajectory', trajectory, 'judgement', judgement)
return 1
"""

_RELEASE = """
local id, attempt, resume_ref = unpack(ARGV)
if not holds(id, attempt) then return 0 end
redis.call('HSET', key(id), 'resume_ref', resume_ref)
back(id)
return 1
"""

_FAIL = """
local id, attempt, reason, max_attempts = unpack(ARGV)
if not holds(id, attempt) then return 0 end
failed(id, reason, max_attempts)
return 1
"""

_RESULTS = """
local found = {}
for _, group in ipairs(ARGV) do
  for _, id in ipairs(redis.call('LRANGE', prefix .. ':group:' .. group, 0, -1)) do
    local state = field(id, 'state')
    if state == 'finished' or state == 'failed' then
      table.insert(found, redis.call('HMGET', key(id), 'member', 'body', 'attempt', 'resume_ref',
        'reason', 'result_attempt', 'trajectory', 'judgement'))
    end
  end
end
return found
"""

_COUNTS = """
local counts = {}
for _, list in ipairs(ARGV) do
  for _, id in ipairs(redis.call('LRANGE', prefix .. list, 0, -1)) do
    local state = field(id, 'state')
    counts[state] = (counts[state] or 0) + 1
  end
end
local pairs_ = {}
for state, count in pairs(counts) do table.insert(pairs_, {state, count}) end
return pairs_
"""

_RECOVER = """
local live, count = {}, 0
for _, worker in ipairs(ARGV) do live[worker] = true end
for _, id in ipairs(redis.call('ZRANGE', prefix .. ':leased', 0, -1)) do
  if not live[field(id, 'worker')] then
    redis.call('HINCRBY', key(id), 'attempt', 1)
    back(id)
    count = count + 1
  end
end
return count
"""


class RedisQueue:
    """A `RolloutQueue` on a Redis server.

    Args:
        url: `redis://[user:password@]host:port/db`, or rediss:// or unix://.
        namespace: Tells the queues on one server apart.
        max_attempts: Infrastructure failures after which a request is given up.

    Raises:
        UserError: No usable Redis server answers there.
    """

    def __init__(self, url: str, namespace: str, max_attempts: int = 3) -> None:
        self.namespace = namespace
        self.max_attempts = max_attempts
        # Messages and logs show the server without the password.
        parts = urlsplit(url)
        self._shown = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        self._prefix = f"{{klong:{namespace}}}"
        try:
            self._redis = redis.Redis.from_url(url, decode_responses=True, socket_timeout=60)
        except ValueError as error:
            raise UserError(f"{self._shown}: is not a Redis URL ({error}).") from None
        with self._errors():
            self._redis.ping()
        # Registered once: later calls send the script's hash instead of its text.
        self._scripts = {
            source: self._redis.register_script(_PRELUDE + source)
            for source in (
                *(_PUT, _LEASE, _RENEW, _FINISH, _RELEASE, _FAIL),
                *(_RESULTS, _COUNTS, _RECOVER),
            )
        }

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (redis.ConnectionError, redis.TimeoutError) as error:
            raise UserError(
                f"{self._shown}: no Redis server answers; start one or correct the URL."
            ) from error
        except redis.OutOfMemoryError as error:
            raise UserError(f"{self._shown}: Redis is out of memory; raise maxmemory.") from error

    def _run(self, source: str, *arguments: str | int | float) -> Any:
        # A call whose answer was lost is sent again by the client: attempts fence the repetition.
        with self._errors():
            return self._scripts[source](keys=[self._prefix], args=arguments)

    def put(self, requests: Sequence[RolloutRequest]) -> int:
        """Adds the requests whose ids are new."""
        arguments: list[str | int] = []
        for r in requests:
            arguments += [r.request_id, r.group_id, -r.priority, r.attempt, r.resume_ref, _dump(r)]
        return int(self._run(_PUT, *arguments))

    def lease(
        self, worker: str, now_s: float, lease_s: float, limit: int = 1
    ) -> list[RolloutRequest]:
        """Gives up to `limit` requests to a worker."""
        rows = self._run(
            *(_LEASE, worker, now_s, now_s + lease_s, limit, self.max_attempts),
            "the lease ran out, held by worker ",
        )
        return [_request(*row) for row in rows]

    def renew(
        self, worker: str, request_id: str, attempt: int, now_s: float, lease_s: float
    ) -> bool:
        """Extends a lease."""
        return bool(self._run(_RENEW, worker, request_id, attempt, now_s + lease_s))

    def finish(self, trajectory: Trajectory, request: RolloutRequest, judgement: Judgement) -> bool:
        """Stores a result if it is the request's first."""
        check_finish(trajectory, request, judgement)
        answer = self._run(
            *(_FINISH, request.request_id, request.attempt, _dump(trajectory), _dump(judgement))
        )
        if answer < 0:
            raise ValueError(f"{request.trajectory_id} was never leased from {self._shown}")
        return bool(answer)

    def release(self, request: RolloutRequest) -> bool:
        """Gives a request back, attempt unchanged."""
        return bool(self._run(_RELEASE, request.request_id, request.attempt, request.resume_ref))

    def fail(self, request: RolloutRequest, reason: str) -> bool:
        """Reports that the infrastructure failed."""
        return bool(
            self._run(_FAIL, request.request_id, request.attempt, reason, self.max_attempts)
        )

    def results(self, group_ids: Collection[str]) -> list[RolloutResult]:
        """The results so far of these groups, in put order."""
        # The member begins with the padded sequence number.
        rows = sorted(self._run(_RESULTS, *set(group_ids)), key=lambda row: str(row[0]))
        return [_result(*row[1:]) for row in rows]

    def counts(self, group_ids: Collection[str] | None = None) -> Mapping[State, int]:
        """How many requests stand in each state."""
        lists = [":all"] if group_ids is None else [f":group:{group}" for group in set(group_ids)]
        rows = self._run(_COUNTS, *lists)
        return dict.fromkeys(State, 0) | {State(state): int(count) for state, count in rows}

    def recover(self, live_workers: Collection[str]) -> int:
        """Takes back the leases of all other workers."""
        return int(self._run(_RECOVER, *live_workers))

    def close(self) -> None:
        """Lets go of the connection."""
        self._redis.close()


def _dump(noun: RolloutRequest | Trajectory | Judgement) -> str:
    # ASCII: a tool may have said half a surrogate pair, which UTF-8 cannot hold.
    return json.dumps(noun.to_json())


def _request(body: str, attempt: str, resume_ref: str) -> RolloutRequest:
    fields: dict[str, Any] = json.loads(body)
    return RolloutRequest(**{**fields, "attempt": int(attempt), "resume_ref": resume_ref})


def _result(
    body: str,
    attempt: str,
    resume_ref: str,
    reason: str,
    result_attempt: str | None,
    trajectory: str | None,
    judgement: str | None,
) -> RolloutResult:
    if result_attempt is None or trajectory is None or judgement is None:
        return given_up(_request(body, attempt, resume_ref), reason)
    return RolloutResult(
        _request(body, result_attempt, resume_ref),
        Trajectory.from_json(json.loads(trajectory)),
        Judgement.from_json(json.loads(judgement)),
    )
