"""The scaffold in a real sandbox, led by a scripted model over real tokens."""

import asyncio
import json

import pytest
from agent_helpers import READ, WIDE, Script, answers, chat, make_task, rollout

from klong_jax.agent.agent import run_agent
from klong_jax.agent.prompts import SYSTEM
from klong_jax.agent.reading import Reading
from klong_jax.core.clock import VirtualClock, WallClock
from klong_jax.core.errors import UserError
from klong_jax.core.task import Budget
from klong_jax.core.trajectory import Status, Trajectory
from klong_jax.llm.base import Completion, ContextLengthExceeded, ModelUnavailable, Prompt
from klong_jax.splitting.policy import ContextPolicy, split
from sandbox.client import SandboxClient


def bash(command: str) -> tuple[str, dict[str, object]]:
    return "bash", {"command": command}


def test_a_plain_rollout(service: str) -> None:
    model = Script(
        *READ,
        bash("cat data.txt; echo oops >&2"),
        ("write_file", {"path": "d/x.txt", "content": "hi\n"}),
        ("read_file", {"path": "d/x.txt"}),
        bash("exit 3"),
        bash("echo 'ok 1'; echo 'next 2;a;b'"),
        bash("echo all done"),
    )
    result = rollout(service, make_task(), model)
    trajectory = result.trajectory
    assert trajectory.status is Status.DONE
    assert answers(result) == [
        "1 One\na",
        "2 Two\nb",
        "hello\noops",
        "wrote d/x.txt",
        "hi\n",
        "(exit code 3)",
        "ok 1\nnext 2;a;b",
        "all done",
        "ended",
    ]
    assert trajectory.failures == {"tool_error": 1}
    assert result.progress == ((7, 0.25), (8, 1.0))
    assert result.evidence["read_sections"] == "1\n2\n"
    assert result.evidence["blacklist.txt"] == "https://bad\n"
    logged = [json.loads(line) for line in result.evidence["commands.log"].splitlines()]
    assert [call["name"] for call in logged[:3]] == ["read_paper", "read_paper", "bash"]
    assert model.prompts[0].messages[0].content == SYSTEM
    assert model.forgotten == ["s"]
    assert Trajectory.from_json(json.loads(json.dumps(trajectory.to_json()))) == trajectory


def test_tokens_are_those_sampled_and_every_prompt_is_a_view_of_the_stream(service: str) -> None:
    model = Script(*READ, "thinking aloud  ", bash("echo hi"))
    result = rollout(service, make_task(), model)
    turns = result.trajectory.turns
    stream: list[int] = []
    for prompt, turn in zip(model.prompts, turns, strict=True):
        stream += turn.suffix_ids
        assert list(prompt.token_ids) == stream
        stream += turn.output_ids
        assert turn.spans == ((0, 3),)
        assert len(turn.logprobs) == len(turn.output_ids)
    # Pinned: all that was said up to the last section, without the prompt of the turn after it.
    pinned = result.trajectory.spans[0].prefix_len
    assert [p.prefix_len for p in model.prompts[2:]] == [pinned] * 3
    assert pinned == len(model.prompts[2].token_ids) - len(chat().prompt_ids)
    assert result.trajectory.pinned_messages == 6
    text = chat().tokenizer.decode(stream)
    assert "thinking aloud  <|im_end|>\n<|im_start|>user\nAnswer with one tool call" in text


def test_work_and_the_end_wait_for_the_reading(service: str) -> None:
    model = Script(READ[0], bash("ls"), ("end_task", {}), READ[1])
    result = rollout(service, make_task(), model)
    refusal = "First read the paper with read_paper: section 2 unread."
    assert answers(result)[1:3] == [refusal, refusal]
    assert result.trajectory.failures == {"refused_before_reading": 1, "refused_end": 1}
    assert result.trajectory.status is Status.DONE


def test_the_service_keeps_the_gates_that_the_scaffold_does_not(
    service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Reading, "complete", True)
    model = Script(READ[0], bash("ls"), ("end_task", {}), READ[1], bash("ls"))
    result = rollout(service, make_task(), model)
    said = answers(result)
    assert said[1] == said[2] and said[1].startswith("first take the reading")
    assert said[3:] == ["2 Two\nb", "data.txt", "ended"]
    assert result.trajectory.failures == {"refused_end": 1, "tool_error": 1}
    assert result.trajectory.status is Status.DONE


def test_the_end_waits_for_the_finish_check(service: str) -> None:
    task = make_task(finish_check='[ -e x ] || { echo "x is missing"; exit 1; }')
    model = Script(*READ, ("end_task", {}), bash("touch x"))
    result = rollout(service, task, model)
    assert answers(result)[2] == "not finished: x is missing"
    assert result.trajectory.failures == {"refused_end": 1}
    assert result.trajectory.status is Status.DONE


@pytest.mark.parametrize(
    ("said", "failure", "answer"),
    [
        ("just words", "no_tool_call", "one tool call"),
        ("<tool_call>\n{bad}\n</tool_call>", "malformed_tool_call", "not valid JSON"),
        (("fly", {}), "unknown_tool", "no tool 'fly'"),
        (("bash", {}), "bad_arguments", "bash takes command"),
        (("bash", {"command": 3}), "bad_arguments", "must be a string"),
        (("read_paper", {"section": 9}), "bad_arguments", "sections 1 to 2"),
        (("read_file", {"path": "none"}), "tool_error", "none"),
        (("read_file", {"path": "../../etc/passwd"}), "tool_error", ""),
        (("write_file", {"path": "\ud800", "content": ""}), "malformed_tool_call", "surrogate"),
    ],
)
def test_slips_are_answered_counted_and_charged(
    service: str, said: object, failure: str, answer: str
) -> None:
    if isinstance(said, tuple) and "\ud800" in str(said[1].get("path", "")):
        body = {"name": said[0], "arguments": said[1]}
        said = f"<tool_call>\n{json.dumps(body)}\n</tool_call>"
    clock = VirtualClock(0.0, 1.0)
    result = rollout(service, make_task(), Script(*READ, said), clock=clock)  # type: ignore[arg-type]
    assert result.trajectory.failures == {failure: 1}
    assert answer in answers(result)[2]
    assert len(answers(result)[2].split()) <= 25
    assert result.trajectory.status is Status.DONE
    assert result.trajectory.active_s == 4.0
    assert [turn.tool_s for turn in result.trajectory.turns] == [1.0] * 4


def test_all_calls_of_a_turn_are_run_in_order(service: str) -> None:
    calls = [("bash", {"command": f"echo {n} >>log"}) for n in range(3)]
    raw = "\n".join(
        "<tool_call>\n" + json.dumps({"name": name, "arguments": arguments}) + "\n</tool_call>"
        for name, arguments in [*calls, bash("cat log")]
    )
    model = Script(*READ, raw)
    result = rollout(service, make_task(), model)
    assert answers(result)[2:] == ["", "", "", "0\n1\n2", "ended"]


def test_more_calls_than_there_is_room_for_are_not_run(service: str) -> None:
    policy = ContextPolicy(limit=2200, overlap=100, reserve=1400)
    one = (
        '<tool_call>\n{"name": "bash", "arguments": {"command": "seq 200; echo >>n"}}\n</tool_call>'
    )
    model = Script(*READ, "\n".join([one] * 20), bash("wc -l <n"))
    result = rollout(service, make_task(), model, policy=policy)
    run = int(answers(result)[-2])
    assert 1 < run < 16
    assert answers(result)[-3].startswith(f"Only the first {run} calls")
    turns, spans = result.trajectory.turns, result.trajectory.spans
    assert split(turns, spans[0].prefix_len, policy) == spans
    assert result.trajectory.failures["observation_truncated"] == run


def test_repetition_is_counted(service: str) -> None:
    result = rollout(service, make_task(), Script(*READ, *[bash("true")] * 4))
    assert result.trajectory.failures == {"repeated_call": 2}


def test_long_answers_are_cut_in_the_middle(service: str) -> None:
    policy = ContextPolicy(limit=900, overlap=100, reserve=150)
    model = Script(*READ, bash("seq 5000"), bash("echo short"))
    result = rollout(service, make_task(), model, policy=policy)
    shown = answers(result)[2]
    assert shown.startswith("1\n2\n")
    assert shown.endswith("\n4999\n5000")
    assert "characters left out]" in shown
    spans, turns = result.trajectory.spans, result.trajectory.turns
    assert max(len(t.suffix_ids) for t in turns) <= policy.longest_suffix(spans[0].prefix_len)
    assert result.trajectory.failures["observation_truncated"] == 1
    assert split(turns, spans[0].prefix_len, policy) == spans


def test_a_command_that_hangs_is_a_slip(service: str) -> None:
    budget = Budget(1e6, tool_timeout_s=0.3)
    result = rollout(service, make_task(), Script(*READ, bash("echo a; sleep 60")), budget=budget)
    assert answers(result)[2] == "a\ntimed out after 0.3 s"
    assert result.trajectory.failures == {"tool_timeout": 1}


def test_the_virtual_clock_cuts_the_last_output_to_what_is_affordable(service: str) -> None:
    def run() -> Trajectory:
        model = Script(*READ, *[bash(f"echo {n}") for n in range(50)])
        clock = VirtualClock(token_s=0.1, tool_s=1.0)
        return rollout(service, make_task(), model, budget=Budget(30.0), clock=clock).trajectory

    first, again = run(), run()
    assert first.status is Status.TIMEOUT
    assert first.turns[-1].finish_reason == "length"
    assert 29.9 <= first.active_s <= 30.0 + 1e-9
    assert first.failures["output_cut"] == 1
    assert first.to_json() == again.to_json()
    assert split(first.turns, first.spans[0].prefix_len, WIDE) == first.spans


def test_an_output_cut_by_the_reserve_is_closed_and_told(service: str) -> None:
    policy = ContextPolicy(limit=2048, overlap=100, reserve=60)
    result = rollout(service, make_task(), Script(*READ, "so " * 300), policy=policy)
    turns = result.trajectory.turns
    cut = next(n for n, turn in enumerate(turns) if turn.finish_reason == "length")
    assert len(turns[cut].output_ids) == 60
    assert turns[cut + 1].suffix_ids[: len(chat().cut_ids)] == chat().cut_ids
    assert "was cut" in answers(result)[2]
    assert result.trajectory.failures == {"output_cut": 1}


def test_the_turns_run_out(service: str) -> None:
    budget = Budget(1e6, max_turns=2)
    result = rollout(service, make_task(), Script(*READ), budget=budget)
    assert result.trajectory.status is Status.TIMEOUT
    trajectory = result.trajectory
    # The last section was read, but no turn saw it: nothing beyond the stream is pinned.
    assert trajectory.windows()[0].tokens.size == trajectory.stream_len
    assert trajectory.pinned_messages == 2


def test_a_wall_clock_ends_a_tool_and_then_the_rollout(service: str) -> None:
    budget = Budget(1.0, tool_timeout_s=60.0)
    result = rollout(
        service, make_task(), Script(*READ, bash("sleep 60")), budget=budget, clock=WallClock()
    )
    assert result.trajectory.status is Status.TIMEOUT
    assert result.trajectory.failures == {"tool_timeout": 1}


class Refusing(Script):
    """Refuses contexts beyond a length, as a server with a smaller context does."""

    longest = 0

    async def complete(
        self, prompt: Prompt, *, max_tokens: int, deadline_s: float | None
    ) -> Completion:
        if len(prompt.token_ids) > self.longest:
            raise ContextLengthExceeded("too long")
        return await super().complete(prompt, max_tokens=max_tokens, deadline_s=deadline_s)


def test_a_refused_context_opens_a_window_with_less_history(service: str) -> None:
    model = Refusing(*READ, *[bash(f"echo {n} {'word ' * 40}") for n in range(8)])
    model.longest = 900
    result = rollout(service, make_task(), model)
    trajectory = result.trajectory
    assert trajectory.status is Status.DONE
    assert trajectory.failures["context_length_error"] > 0
    assert len(trajectory.spans) == 1 + trajectory.failures["context_window_opened"]
    trained = [int(window.trained_mask.sum()) for window in trajectory.windows()]
    assert sum(trained) == sum(len(turn.output_ids) for turn in trajectory.turns)


def test_a_context_refused_to_the_end_is_infrastructure(service: str) -> None:
    model = Refusing(*READ)
    model.longest = 10
    result = rollout(service, make_task(), model)
    assert result.trajectory.status is Status.INFRA_FAILED
    assert result.trajectory.failures == {"context_length_error": 1}
    assert (result.trajectory.turns, result.trajectory.spans) == ((), ())
    assert result.trajectory.windows() == ()


def test_a_model_that_is_gone_is_infrastructure(service: str) -> None:
    class Gone(Script):
        async def complete(
            self, prompt: Prompt, *, max_tokens: int, deadline_s: float | None
        ) -> Completion:
            if not self.spoken:
                raise ModelUnavailable("nobody there")
            return await super().complete(prompt, max_tokens=max_tokens, deadline_s=deadline_s)

    result = rollout(service, make_task(), Gone(*READ))
    trajectory = result.trajectory
    assert trajectory.status is Status.INFRA_FAILED
    assert (trajectory.failures, result.trouble) == ({"model_error": 1}, "nobody there")
    assert len(trajectory.turns) == 2
    assert split(trajectory.turns, trajectory.spans[0].prefix_len, WIDE) == trajectory.spans


def test_a_sandbox_that_dies_is_infrastructure(service: str) -> None:
    async def run() -> Trajectory:
        async with SandboxClient(service) as client:
            box = await client.create()

            class Killer(Script):
                async def complete(
                    self, prompt: Prompt, *, max_tokens: int, deadline_s: float | None
                ) -> Completion:
                    if len(self.prompts) == 2:
                        await box.close()
                    return await super().complete(
                        prompt, max_tokens=max_tokens, deadline_s=deadline_s
                    )

            result = await run_agent(
                make_task(),
                Killer(*READ, bash("ls")),
                box,
                chat(),
                WIDE,
                Budget(1e6),
                VirtualClock(0.01, 1.0),
                trajectory_id="t.0",
                session="s",
            )
            return result.trajectory

    trajectory = asyncio.run(run())
    assert trajectory.status is Status.INFRA_FAILED
    assert trajectory.failures == {"sandbox_error": 1}
    assert len(trajectory.turns) == 3


def test_a_paper_that_cannot_be_pinned_names_the_task(service: str) -> None:
    task = make_task(sections=["word " * 500, "b"])
    policy = ContextPolicy(limit=400, overlap=50, reserve=100)
    with pytest.raises(UserError, match=r"task t: .*context_limit"):
        rollout(service, task, Script(), policy=policy)
