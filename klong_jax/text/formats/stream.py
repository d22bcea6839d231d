"""A JSON list read item by item: a file of any size takes the memory of its largest item."""

import json
from collections.abc import Iterator
from typing import Any, TextIO

_DECODER = json.JSONDecoder()
_SPACE = " \t\n\r"
_CHUNK = 1 << 20  # characters
# Of a text that only ends too early, a decoder complains this close to its end, or of a string that
# is not closed.
_NEAR, _OPEN = 16, "Unterminated string"


class JsonText:
    """A text that is read as far as it is needed, and forgotten as far as it was used."""

    def __init__(self, handle: TextIO, chunk: int = _CHUNK) -> None:
        """Begins at the front of what is open.

        Args:
            handle: The text.
            chunk: Characters that are read at least at a time.
        """
        self._handle, self._chunk = handle, chunk
        self._text = ""
        self._at = self._lines = self._column = 0

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            rest = self._text[self._at : self._at + 1]
            if rest and rest not in _SPACE:
                return rest
            if rest:
                self._at += 1
            elif not self._more():
                return ""

    def items(self) -> Iterator[Any]:
        """The items of the list that begins here.

        Raises:
            JSONDecodeError: It is not valid JSON; see `place`.
        """
        self._take("[")
        if self.peek() != "]":
            yield self._value()
            while self.peek() == ",":
                self._take(",")
                yield self._value()
        self._take("]")

    def end(self) -> None:
        """Makes sure that nothing follows.

        Raises:
            JSONDecodeError: Something does.
        """
        if self.peek():
            raise json.JSONDecodeError("Extra data", self._text, self._at)

    def place(self, error: json.JSONDecodeError) -> str:
        """LINE:COLUMN of an error in the whole text."""
        column = error.colno + (self._column if error.lineno == 1 else 0)
        return f"{self._lines + error.lineno}:{column}"

    def _take(self, character: str) -> None:
        if self.peek() != character:
            raise json.JSONDecodeError(f"Expecting {character!r}", self._text, self._at)
        self._at += 1

    def _value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                early = error.msg.startswith(_OPEN) or error.pos + _NEAR >= len(self._text)
                if not (early and self._more()):
                    raise
            else:
                # A number near the end may go on, as 1 does in 1e+5.
                if end + _NEAR <= len(self._text) or not self._more():
                    self._at = end
                    return value

    def _more(self) -> bool:
        """Reads on, at least as much as is kept, so that an item is not tried too often."""
        used, kept = self._text[: self._at], self._text[self._at :]
        read = self._handle.read(max(self._chunk, len(kept)))
        if read:
            lines = used.count("\n")
            self._column = len(used) - used.rfind("\n") - 1 + (0 if lines else self._column)
            self._lines += lines
            self._text, self._at = kept + read, 0
        return bool(read)
