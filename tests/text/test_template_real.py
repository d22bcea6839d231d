"""Chat templates over tokenizers that real models use: Mistral's, from its own package."""

import base64
import json
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
from chat_templates import MISTRAL, QWEN3
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HfTokenizers

from klong_jax.core.message import Message
from klong_jax.text.chat import Chat
from klong_jax.text.dialect import Dialect
from klong_jax.text.template import ChatTemplate
from klong_jax.text.template_chat import TemplateChat
from klong_jax.text.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer

RANKS = 12_000  # of 131,072: enough to be real, few enough to be built in a second
MARKS = ("<s>", "</s>", "[INST]", "[/INST]", "<|im_start|>", "<|im_end|>")


def carried(name: str) -> Path:
    """A file of the mistral-common package, which is not imported."""
    package = find_spec("mistral_common")
    assert package and package.submodule_search_locations, "the dev extra has mistral-common"
    return Path(package.submodule_search_locations[0]) / "data" / name


@cache
def sentencepiece() -> Tokenizer:
    return SentencePieceTokenizer(carried("mistral_instruct_tokenizer_240323.model.v3"))


@cache
def bpe() -> Tokenizer:
    """The most frequent tokens of Mistral's byte-level BPE."""
    tekken = json.loads(carried("tekken_240718.json").read_text())
    ranks = {base64.b64decode(row["token_bytes"]): row["rank"] for row in tekken["vocab"][:RANKS]}
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def spell(token: bytes) -> str:
        return "".join(alphabet[byte] for byte in token)

    alphabet = byte_letters()
    vocab = {spell(token): rank for token, rank in ranks.items()}
    merges = [
        (spell(token[:cut]), spell(token[cut:]))
        for token in ranks
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    inner = HfTokenizers(models.BPE(vocab, merges))
    split = pre_tokenizers.Split(Regex(tekken["config"]["pattern"]), "isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence([split, spelled])
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(MARKS))
    return HuggingFaceTokenizer(inner)


def byte_letters() -> list[str]:
    """How a byte-level BPE spells each byte: itself where it prints, else a letter from 256 on."""
    prints = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in prints else chr(next(others)) for byte in range(256)]


TOKENIZERS = {"sentencepiece": sentencepiece, "bpe": bpe}
TEMPLATES = {"mistral": MISTRAL, "qwen3": QWEN3}
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}

tokenizers = pytest.mark.parametrize("kind", TOKENIZERS)
pieces = st.sampled_from(
    ["a", " ", "\n", "wörld", "日本", "</s>", "[INST]", "<|im_end|>", "def f():"]
)
texts = st.lists(pieces, max_size=8).map("".join)


@tokenizers
@settings(max_examples=50, deadline=None)
@given(parts=st.lists(texts, max_size=4))
def test_texts_encoded_one_by_one_decode_to_the_whole(kind: str, parts: list[str]) -> None:
    tokenizer = TOKENIZERS[kind]()
    for specials in (True, False):
        ids = [i for part in parts for i in tokenizer.encode(part, specials=specials)]
        assert tokenizer.decode(ids) == "".join(parts)
    for mark in ("</s>", "[INST]"):
        assert len(tokenizer.encode(mark, specials=True)) == 1
        assert len(tokenizer.encode(mark, specials=False)) > 1


@pytest.mark.parametrize("template", TEMPLATES)
@tokenizers
@settings(max_examples=15, deadline=None)
@given(said=st.lists(texts, min_size=2, max_size=6))
def test_a_growing_conversation_extends_its_tokens(
    kind: str, template: str, said: list[str]
) -> None:
    tokenizer = TOKENIZERS[kind]()
    chat = TemplateChat(tokenizer, ChatTemplate(TEMPLATES[template], template, VARIABLES))
    messages = [
        Message("assistant" if number % 2 else "user", text) for number, text in enumerate(said)
    ]
    longer = stream(chat, messages)
    for number in range(2, len(messages) + 1):
        shorter = stream(chat, messages[:number])
        assert shorter == longer[: len(shorter)]
    text = tokenizer.decode(longer)
    if template == "mistral":
        turns = [f"[INST] {a}[/INST] {b}</s>" for a, b in zip(said[::2], said[1::2], strict=False)]
        assert text == "<s>" + "".join(turns)
        end = tokenizer.encode("</s>", specials=True)[0]
        assert longer.count(end) == len(turns)
    else:
        assert text.count("<|im_start|>assistant\n<think>\n\n</think>\n\n") == len(said) // 2


def stream(chat: Dialect, messages: list[Message]) -> list[int]:
    turns, _ = chat.turns(messages, 0)
    return [token for turn in turns for token in (*turn.suffix_ids, *turn.output_ids)]


@tokenizers
def test_the_built_in_dialect_reads_well_in_them_too(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    messages = [Message("user", "Say hi"), Message("assistant", "hi there")]
    assert tokenizer.decode(stream(Chat(tokenizer), messages)) == (
        "<|im_start|>user\nSay hi<|im_end|>\n<|im_start|>assistant\nhi there<|im_end|>"
    )
