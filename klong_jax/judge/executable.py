"""The judge of executable leaves: a leaf holds when its check succeeds in a fresh sandbox."""

import io
import posixpath
import tarfile
from collections.abc import Mapping, Sequence

from klong_jax.core.jsonio import content_hash
from klong_jax.core.rollout import Judgement, Verdict
from klong_jax.core.rubric import RubricNode
from klong_jax.core.task import Task
from klong_jax.core.trajectory import Trajectory
from klong_jax.judge.script import COMMAND, EVIDENCE, GradingScript, reads_evidence
from sandbox.client import SandboxClient, SandboxError, SandboxSpec

JUDGE_ID = "executable/1"


class JudgeFailure(Exception):
    """The judge could not do its work; one sentence."""


class ExecutableJudge:
    """Grades artifacts by running their rubric's checks.

    All leaves of an artifact are graded by one command in one sandbox (see
    `klong_jax.judge.script`). A leaf that ends that command or outlives it is graded again alone,
    and the others go on without it.
    """

    def __init__(
        self, client: SandboxClient, *, leaf_timeout_s: float = 30.0, cached_leaves: int = 100_000
    ) -> None:
        """Describes the judge.

        Args:
            client: Where sandboxes come from.
            leaf_timeout_s: Wall-clock seconds after which a leaf has failed.
            cached_leaves: Grades remembered; the oldest go first.
        """
        self._client = client
        self._leaf_timeout_s = leaf_timeout_s
        self._cached_leaves = cached_leaves
        self._cache: dict[tuple[str, str, str], float] = {}

    async def judge(
        self, task: Task, trajectory: Trajectory, artifact: bytes, evidence: Mapping[str, str]
    ) -> Judgement:
        """Grades one artifact; trouble of the judge's own gives a FAILED judgement, never a zero.

        Args:
            task: The task; its rubric is applied.
            trajectory: The attempt that left the artifact.
            artifact: The workspace left behind, as `Sandbox.download_tree` gives it.
            evidence: Files of `.judge/` by name, see `collect_evidence`.
        """
        artifact_hash = content_hash(artifact)
        grades: dict[str, float] = {}
        score, status, reason = None, Verdict.FAILED, ""
        try:
            grades = await self._grades(task, artifact, artifact_hash, evidence)
            score, status = task.rubric.grade(lambda leaf: grades[leaf.path]), Verdict.VALID
        except JudgeFailure as error:
            reason = str(error)
        except SandboxError as error:
            # Whoever asked tells by the word that it was infrastructure, and tries again.
            reason = f"sandbox: {error}"
        return Judgement(
            trajectory_id=trajectory.trajectory_id,
            artifact_hash=artifact_hash,
            rubric_hash=task.rubric.content_hash,
            judge_id=JUDGE_ID,
            leaf_grades=grades,
            score=score,
            status=status,
            reason=reason,
        )

    async def _grades(
        self, task: Task, artifact: bytes, artifact_hash: str, evidence: Mapping[str, str]
    ) -> dict[str, float]:
        evidence_hash = content_hash(dict(evidence))
        keys = {
            leaf.path: (artifact_hash, leaf.content_hash, evidence_hash)
            for leaf in task.rubric.leaves()
        }
        pending = [leaf for leaf in task.rubric.leaves() if keys[leaf.path] not in self._cache]
        for leaf in pending:
            if not leaf.check.strip():
                raise JudgeFailure(
                    f"{task.task_id}: leaf {leaf.path or 'root'} ({leaf.node_id}) has no check; "
                    "add a command or choose a judge that reads."
                )
        known = {path: self._cache[key] for path, key in keys.items() if key in self._cache}
        pending.sort(key=reads_evidence, reverse=True)
        tree, batch_size = _without_evidence(artifact), len(pending)
        while pending:
            batch = pending[:batch_size]
            passed = await self._run(task, batch, tree, evidence)
            if not passed and len(batch) == 1:
                passed = [False]
            for leaf, good in zip(batch, passed, strict=False):
                known[leaf.path] = self._remember(keys[leaf.path], float(good))
            pending = pending[len(passed) :]
            batch_size = len(pending) if len(passed) == len(batch) else 1
        return {path: known[path] for path in keys}

    async def _run(
        self, task: Task, leaves: Sequence[RubricNode], tree: bytes, evidence: Mapping[str, str]
    ) -> list[bool]:
        """Grades leaves in a fresh sandbox, up to the first that does not report."""
        script = GradingScript.of(leaves)
        files = {f"{EVIDENCE}/{name}": text for name, text in evidence.items()}
        spec = SandboxSpec(image=task.image, labels={"judges": task.task_id})
        async with await self._client.create(spec) as box:
            await box.upload_tree(tree)
            await box.upload_tree({**files, **script.files()})
            outcome = await box.exec(COMMAND, timeout_s=self._leaf_timeout_s)
        passed = script.results(outcome.stdout)
        if passed is None:
            raise JudgeFailure(
                f"{task.task_id}: the checks did not start in the sandbox "
                f"(exit code {outcome.exit_code}, {outcome.stderr.strip()[:200]!r})."
            )
        return passed

    def _remember(self, key: tuple[str, str, str], grade: float) -> float:
        self._cache[key] = grade
        while len(self._cache) > self._cached_leaves:
            del self._cache[next(iter(self._cache))]
        return grade


def _without_evidence(artifact: bytes) -> bytes:
    """The artifact without what the agent put where the host's evidence goes."""
    if EVIDENCE.encode() not in artifact:
        return artifact
    kept = io.BytesIO()
    try:
        with (
            tarfile.open(fileobj=io.BytesIO(artifact)) as old,
            tarfile.open(fileobj=kept, mode="w", format=tarfile.GNU_FORMAT) as new,
        ):
            for member in old:
                if posixpath.normpath(member.name).split("/")[0] != EVIDENCE:
                    new.addfile(member, old.extractfile(member) if member.isreg() else None)
    except tarfile.TarError as error:
        raise JudgeFailure(f"the artifact is not a tar ({error}).") from None
    return kept.getvalue()
