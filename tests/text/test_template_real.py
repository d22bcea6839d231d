"""Chat templates over tokenizers that real models use: Mistral's, from its own package."""

import pytest
from chat_templates import MISTRAL, QWEN3
from hypothesis import given, settings
from hypothesis import strategies as st
from real_tokenizers import bpe, sentencepiece

from klong_jax.core.message import Message
from klong_jax.text.chat import Chat
from klong_jax.text.dialect import Dialect
from klong_jax.text.template import ChatTemplate
from klong_jax.text.template_chat import TemplateChat

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
