"""What every reader shares: the recording, records of a file with their places, field checks."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TextIO

from klong_jax.core.errors import UserError
from klong_jax.core.jsonio import read_json
from klong_jax.core.message import Message
from klong_jax.text.formats.stream import JsonText

# A JSON list is many records when its items hold a conversation under one of these keys, and one
# record (of messages or events) otherwise.
_CONVERSATION_KEYS = {"messages", "traj", "conversations", "history", "trajectory", "steps"}
_TYPE_NAMES = {
    dict: "an object",
    list: "a list",
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "a boolean",
    type(None): "null",
}


@dataclass(frozen=True)
class Recording:
    """A conversation somebody recorded.

    Attributes:
        source: File and position it was read from.
        recording_id: Name of the recording; the source's own where it has one.
        messages: The conversation.
        pinned_messages: Messages at the front that every window keeps; None where the data does
            not say.
        untrained: Places of messages that are shown but not trained, ascending, such as those that
            repeat an earlier recording.
        meta: What else the source says: score, task_id, exit status and the like.
    """

    source: str
    recording_id: str
    messages: tuple[Message, ...]
    pinned_messages: int | None = None
    untrained: tuple[int, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.messages:
            raise UserError(f"{self.source}: holds no messages; remove the record.")
        if not all(0 <= place < len(self.messages) for place in self.untrained):
            raise ValueError(f"{self.source}: marks messages {self.untrained} that are not there")
        pinned = self.pinned_messages
        if pinned is not None and not 0 <= pinned <= len(self.messages):
            raise UserError(
                f"{self.source}: field pinned_messages must lie between 0 and the "
                f"{len(self.messages)} messages, not {pinned}; mend the record."
            )


class Record(NamedTuple):
    """One record of a file: where it stands, a default name for it, and its JSON."""

    place: str
    name: str
    value: Any


@dataclass(frozen=True)
class Format:
    """One trajectory format.

    Attributes:
        name: How it is called.
        matches: Whether a record looks like this format.
        read: Reads a record; raises UserError naming place and field.
    """

    name: str
    matches: Callable[[Any], bool]
    read: Callable[[Record], Recording]


def reject(place: str, problem: str) -> NoReturn:
    """Raises the error of a record that cannot be read."""
    raise UserError(f"{place}: {problem}; mend the record, or skip bad records.")


def kind_of(value: Any) -> str:
    """The JSON type of a value, in words."""
    return _TYPE_NAMES.get(type(value), type(value).__name__)


def need(value: Any, key: str, kinds: type | tuple[type, ...], place: str) -> Any:
    """The field of an object, checked.

    Args:
        value: The object.
        key: The field.
        kinds: The Python types it may have.
        place: Where the object stands, for messages.

    Raises:
        UserError: The field is missing or of another type.
    """
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    if not isinstance(value, dict):
        reject(place, f"must be an object, not {kind_of(value)}")
    if key not in value:
        reject(place, f"has no field {key!r}")
    if not isinstance(value[key], kinds):
        wanted = " or ".join(_TYPE_NAMES[kind] for kind in kinds)
        reject(place, f"field {key!r} must be {wanted}, not {kind_of(value[key])}")
    return value[key]


def objects(value: Any, key: str, place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (place, object) for a field that lists objects."""
    for index, item in enumerate(need(value, key, list, place)):
        where = f"{place}: {key}[{index}]"
        if not isinstance(item, dict):
            reject(where, f"must be an object, not {kind_of(item)}")
        yield where, item


def records(path: Path, on_bad: Callable[[UserError], None]) -> Iterator[Record]:
    """Yields the records of a JSON or JSONL file, told apart by content.

    Of a JSONL file or of one large list, one record at a time is in memory.

    Args:
        path: The file.
        on_bad: Called for a JSONL line that is not JSON; raises it, or reports it and returns.

    Raises:
        UserError: The file is missing, or is neither JSON nor JSONL.
    """
    with _opened(path) as handle:
        text = JsonText(handle)
        if text.peek() == "[":
            yield from _listed(path, text, on_bad)
            return
    if _is_jsonl(path):
        yield from _lines(path, on_bad)
    else:
        yield Record(str(path), path.stem, read_json(path))


def _listed(path: Path, text: JsonText, on_bad: Callable[[UserError], None]) -> Iterator[Record]:
    """The records of a file that begins with a list: the list's items, the list, or its lines."""
    first: list[Any] = []
    try:
        many = False
        for index, value in enumerate(text.items()):
            if many:
                yield _item(path, index, value)
                continue
            first.append(value)
            if many := _is_conversation(value):
                yield from (_item(path, number, value) for number, value in enumerate(first))
                first.clear()
        if many:
            text.end()
            return
        lines = bool(text.peek())
    except json.JSONDecodeError as error:
        lines = not many and _is_jsonl(path)
        if not lines:
            raise UserError(
                f"{path}:{text.place(error)}: not valid JSON ({error.msg}); mend or remove it."
            ) from None
    if lines:
        yield from _lines(path, on_bad)
    else:
        yield Record(str(path), path.stem, first)


def _item(path: Path, index: int, value: Any) -> Record:
    return Record(f"{path}[{index}]", f"{path.stem}-{index}", value)


def _is_conversation(item: Any) -> bool:
    return isinstance(item, dict) and not _CONVERSATION_KEYS.isdisjoint(item)


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    try:
        with path.open(encoding="utf-8") as handle:
            yield handle
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; convert the file.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name a file.") from None


def _is_jsonl(path: Path) -> bool:
    """Whether some line is an object of its own, as only JSONL (or one-line JSON) has it."""
    with _opened(path) as handle:
        for line in handle:
            if not line.startswith(("{", "[")):
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError:
                continue
            # One line holding a list is a document, unless other lines follow.
            return isinstance(value, dict) or any(rest.strip() for rest in handle)
    return False


def _lines(path: Path, on_bad: Callable[[UserError], None]) -> Iterator[Record]:
    with path.open(encoding="utf-8") as handle:
        for number, line in enumerate(handle, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                on_bad(
                    UserError(
                        f"{path}:{number}: not valid JSON ({error.msg}); mend or remove the line."
                    )
                )
                continue
            yield Record(f"{path}:{number}", f"{path.stem}-{number}", value)
