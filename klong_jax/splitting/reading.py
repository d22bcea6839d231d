"""Which assistant messages only read, told from the calls and commands they hold.

The list is conservative: what is not known to leave everything as it was counts as work. An
assistant message reads if it takes at least one action and each of its actions is one of

- a call of a tool whose name says that it reads (`TOOLS`), such as read_file or find_file;
- a call of an editor (`EDITORS`) with command=view;
- a call of a shell (`SHELLS`) whose command only reads; or
- where the message calls no tools, fenced blocks of commands that only read.

A shell command only reads if each simple command in it is one of `COMMANDS`, `sed -n` that prints
lines by number, or `find` without an action; and nothing is written to a file or substituted.
"""

import re
import shlex

from klong_jax.core.message import Message, ToolCall

TOOLS = frozenset({
    "cat", "find_file", "glob", "goto", "grep", "list_dir", "list_directory", "list_files", "ls",
    "open", "open_file", "read", "read_file", "read_paper", "scroll_down", "scroll_up",
    "search_dir", "search_file", "view", "view_file",
})  # fmt: skip
EDITORS = frozenset({"edit_file", "str_replace_based_edit_tool", "str_replace_editor"})
SHELLS = frozenset({
    "bash", "execute_bash", "execute_command", "run", "run_command", "shell", "terminal",
})  # fmt: skip
COMMANDS = frozenset({
    "cat", "cd", "file", "find_file", "goto", "grep", "head", "less", "ls", "more", "nl", "open",
    "pwd", "scroll_down", "scroll_up", "search_dir", "search_file", "stat", "tail", "wc",
})  # fmt: skip

_FENCED = re.compile(r"```[\w-]*\n(.*?)```", re.DOTALL)
# Redirections that keep nothing; they are taken away before any other is refused.
_HARMLESS = re.compile(r"\d?>\s*/dev/null(?![\w./-])|2>&1")
_SEPARATORS = frozenset({"&&", "||", "|", ";"})
_PRINTED_LINES = re.compile(r"[\d,$ ]+p")
_FIND_ACTIONS = ("-delete", "-exec", "-fls", "-fprint", "-ok")


def only_reads(message: Message) -> bool:
    """Whether an assistant message takes actions and all of them only read."""
    if message.tool_calls:
        return all(map(_call_reads, message.tool_calls))
    blocks = _FENCED.findall(message.content)
    return bool(blocks) and all(map(command_reads, blocks))


def command_reads(command: str) -> bool:
    """Whether a shell command, of one line or several, is known to only read."""
    lines = [line for line in _HARMLESS.sub("", command).splitlines() if line.strip()]
    return bool(lines) and all(map(_line_reads, lines))


def _call_reads(call: ToolCall) -> bool:
    command = call.arguments.get("command")
    if call.name in EDITORS:
        return command == "view"
    if call.name in SHELLS:
        return isinstance(command, str) and command_reads(command)
    return call.name in TOOLS


def _line_reads(line: str) -> bool:
    if "$(" in line or "`" in line:
        return False
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    try:
        words = list(lexer)
    except ValueError:  # a quotation that goes on in the next line
        return False
    simple: list[list[str]] = [[]]
    for word in words:
        if word in _SEPARATORS:
            simple.append([])
        else:
            simple[-1].append(word)
    return all(map(_simple_reads, simple))


def _simple_reads(words: list[str]) -> bool:
    if not words or any(set(word) <= set("();<>|&") for word in words):
        return False
    name, *rest = words
    if name == "sed":
        match rest:
            case ["-n", script, *files]:
                flags = any(word.startswith("-") for word in files)
                return bool(_PRINTED_LINES.fullmatch(script)) and not flags
            case _:
                return False
    if name == "find":
        return not any(word.startswith(_FIND_ACTIONS) for word in rest)
    return name in COMMANDS
