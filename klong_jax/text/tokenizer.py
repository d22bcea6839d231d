"""Tokenizers behind one small protocol: a HF `tokenizer.json` or a sentencepiece `.model`."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import sentencepiece
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HfTokenizers

from klong_jax.core.errors import UserError
from klong_jax.core.jsonio import content_hash, write_text

CHAT_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
)
PAD_TOKEN = "<|pad|>"

# Digits stand alone, a name and its "=" or "=$" are one piece, and the separators of shell and
# prose stand apart from the words; everything else, JSON's punctuation included, may merge. So a
# copied number is always the same tokens, a name points at its value from the token before it, and
# the boilerplate of a tool call costs few tokens.
_PIECES = r'\d|[A-Za-z_]+=\$?|(?:[^\d;=%$\n ]| (?=["{]))+|[;=%$\n]+| ?[^\d;=%$\n ]+| +'


class Tokenizer(Protocol):
    """Text to token ids and back."""

    @property
    def vocab_size(self) -> int:
        """Ids are below this."""
        ...

    @property
    def content_hash(self) -> str:
        """Identifies the vocabulary; checkpoints refuse another one."""
        ...

    @property
    def specials(self) -> frozenset[str]:
        """The texts of the special tokens that it has."""
        ...

    def encode(self, text: str, *, specials: bool) -> list[int]:
        """Token ids of `text`; special tokens are recognised only if `specials`."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text, special tokens included."""
        ...


class HuggingFaceTokenizer:
    """A `tokenizer.json` of the tokenizers library."""

    def __init__(self, inner: HfTokenizers) -> None:
        self._inner = inner
        self._hash = content_hash(inner.to_str().encode())

    @property
    def vocab_size(self) -> int:
        """Ids are below this."""
        return int(self._inner.get_vocab_size())

    @property
    def content_hash(self) -> str:
        """Identifies the vocabulary."""
        return self._hash

    @property
    def specials(self) -> frozenset[str]:
        """The texts of the added tokens that are flagged as special."""
        added = self._inner.get_added_tokens_decoder().values()
        return frozenset(token.content for token in added if token.special)

    def encode(self, text: str, *, specials: bool) -> list[int]:
        """Token ids; outside the template a special token's text is ordinary text."""
        self._inner.encode_special_tokens = not specials
        return list(self._inner.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text, special tokens included."""
        return str(self._inner.decode(list(ids), skip_special_tokens=False))

    def save(self, path: Path) -> None:
        """Writes `tokenizer.json`, which transformers reads as a fast tokenizer."""
        write_text(path, self._inner.to_str(pretty=True))


class SentencePieceTokenizer:
    """A sentencepiece `.model`; chat tokens it lacks are spelled out in its own pieces.

    A text is encoded as the continuation of another, without the space that sentencepiece puts
    before the first word, so that texts encoded one by one decode to what they are together.
    """

    def __init__(self, path: Path) -> None:
        self._inner = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self._hash = content_hash(path.read_bytes())
        size = self._inner.vocab_size()
        self._controls: dict[str, int] = {
            self._inner.id_to_piece(i): i for i in range(size) if self._inner.is_control(i)
        }
        self._spellings = {i: piece for piece, i in self._controls.items()}
        # What a line's end is encoded as shows what is put before the first word.
        self._line_end: list[int] = list(self._inner.encode("\n"))

    @property
    def vocab_size(self) -> int:
        """Ids are below this."""
        return int(self._inner.vocab_size())

    @property
    def content_hash(self) -> str:
        """Identifies the vocabulary."""
        return self._hash

    @property
    def specials(self) -> frozenset[str]:
        """The texts of the control symbols."""
        return frozenset(self._controls)

    def encode(self, text: str, *, specials: bool) -> list[int]:
        """Token ids; sentencepiece itself decides on its user-defined symbols."""
        if not specials or not self._controls:
            return self._continue(text)
        ids: list[int] = []
        names = sorted(self._controls, key=len, reverse=True)
        for part in re.split(f"({'|'.join(map(re.escape, names))})", text):
            control = self._controls.get(part)
            ids += self._continue(part) if control is None else [control]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text, control symbols included."""
        text, run = "", list[int]()
        for token in ids:
            if token in self._spellings:
                text += self._text(run) + self._spellings[token]
                run = []
            else:
                run.append(token)
        return text + self._text(run)

    def _continue(self, text: str) -> list[int]:
        ids = list(self._inner.encode("\n" + text)) if text else []
        length = len(self._line_end)
        # Vocabularies that fold line ends into spaces show nothing to cut away.
        return ids[length:] if ids[:length] == self._line_end else list(self._inner.encode(text))

    def _text(self, ids: list[int]) -> str:
        return str(self._inner.decode([*self._line_end, *ids])).removeprefix("\n") if ids else ""


def load_tokenizer(path: Path) -> Tokenizer:
    """Reads a tokenizer from a file, or from a model directory that holds one.

    Raises:
        UserError: Nothing readable is there.
    """
    if path.is_dir():
        found = [path / name for name in ("tokenizer.json", "tokenizer.model")]
        path = next((file for file in found if file.exists()), found[0])
    if not path.exists():
        raise UserError(f"{path}: no such tokenizer; give a tokenizer.json or a .model file.")
    if path.suffix == ".model":
        return SentencePieceTokenizer(path)
    try:
        return HuggingFaceTokenizer(HfTokenizers.from_str(path.read_text(encoding="utf-8")))
    except Exception as error:  # the Rust library raises bare Exception on a bad file
        raise UserError(f"{path}: not a tokenizer.json ({error}); check the file.") from None


def bundled_tokenizer() -> Tokenizer:
    """The small byte-level BPE that counts tokens where no model's own tokenizer is given."""
    return load_tokenizer(Path(__file__).parent / "bundled" / "tokenizer.json")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> HuggingFaceTokenizer:
    """Trains a byte-level BPE on texts, the chat tokens included; the same texts give the same.

    Args:
        texts: The corpus.
        vocab_size: Largest vocabulary.
    """
    inner = HfTokenizers(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD_TOKEN, *CHAT_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return HuggingFaceTokenizer(inner)
