"""What only reads is told apart from what works, and in doubt it is work."""

import pytest

from klong_jax.core.message import Message, ToolCall
from klong_jax.splitting.reading import command_reads, only_reads


@pytest.mark.parametrize(
    "command",
    [
        "cat a.txt",
        "cd /repo && ls -la src | head -20",
        "sed -n '10,20p' a.py b.py",
        "sed -n 5p a.py",
        "grep -rn 'a|b; rm' src 2>/dev/null | wc -l",
        "find . -name '*.py' -not -path './x'",
        "ls\n\ncat README.md\n",
        "open setup.py",
        "tail -n 5 log 2>&1",
    ],
)
def test_commands_that_only_read(command: str) -> None:
    assert command_reads(command)


@pytest.mark.parametrize(
    "command",
    [
        "",
        "python run.py",
        "cat a > b",
        "cat a >> b",
        "cat a >/dev/nullified",
        "cat <<EOF\nhello\nEOF",
        "cat $(rm a)",
        "cat `rm a`",
        "cat a; rm a",
        "cat a#b; rm a",
        "cat a & rm a",
        "cat a | tee b",
        "ls\nrm a",
        "sed -i s/a/b/ f",
        "sed -n 's/a/b/w out' f",
        "sed -n 1p -i f",
        "sed 1p f",
        "find . -delete",
        "find . -exec rm {} ;",
        "cat 'unclosed",
        "FOO=1 cat a",
    ],
)
def test_commands_that_may_do_more(command: str) -> None:
    assert not command_reads(command)


def said(content: str = "", **calls: dict[str, str]) -> Message:
    return Message(
        "assistant",
        content,
        tool_calls=tuple(ToolCall(name, arguments) for name, arguments in calls.items()),
    )


def test_calls_are_told_by_name_and_by_command() -> None:
    assert only_reads(said(read_file={"path": "a"}))
    assert only_reads(said(str_replace_editor={"command": "view"}))
    assert only_reads(said(execute_bash={"command": "ls"}, find_file={"file_name": "a"}))
    assert not only_reads(said(str_replace_editor={"command": "create"}))
    assert not only_reads(said(execute_bash={"command": "make"}))
    assert not only_reads(said(bash={}))
    assert not only_reads(said(read_file={"path": "a"}, write_file={"path": "a"}))
    assert not only_reads(said(think={"thought": "hm"}))


def test_fenced_commands_count_where_no_tool_is_called() -> None:
    assert only_reads(said("Let me look.\n```bash\nls -F\n```\n"))
    assert only_reads(said("```\nopen setup.py\n```"))
    assert not only_reads(said("```bash\nls\n```\nthen\n```bash\nmake\n```"))
    assert not only_reads(said("ls"))
    assert not only_reads(said("```bash\nls\n```", bash={"command": "make"}))
