"""Chat templates: the tokens of turns against what transformers makes of the whole conversation."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from chat_templates import GLM45, LLAMA31, MISTRAL_MOVING, QWEN3
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers import Tokenizer as HfTokenizers
from transformers import PreTrainedTokenizerFast

import klong_jax.text
from klong_jax.core.errors import UserError
from klong_jax.core.message import Message, ToolCall
from klong_jax.core.trajectory import Turn
from klong_jax.text.template import ChatTemplate, load_template
from klong_jax.text.template_chat import TemplateChat, Thinking
from klong_jax.text.tokenizer import HuggingFaceTokenizer

TEMPLATES = {"qwen3": QWEN3, "glm45": GLM45, "llama31": LLAMA31}
SPECIALS = [
    *("<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|eot_id|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "[gMASK]", "<sop>"),
    *("<|user|>", "<|assistant|>", "<|system|>", "<|observation|>"),
]
BOS = "<|begin_of_text|>"

names = pytest.mark.parametrize("name", TEMPLATES)


@cache
def hf_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The bundled BPE with the models' special tokens, as transformers holds it."""
    bundled = Path(klong_jax.text.__file__).parent / "bundled" / "tokenizer.json"
    inner = HfTokenizers.from_str(bundled.read_text())
    inner.add_special_tokens(SPECIALS)
    inner.add_tokens([AddedToken(text, special=False) for text in ("<think>", "</think>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, chat_template=TEMPLATES[name], bos_token=BOS
    )


@cache
def dialect(name: str, thinking: Thinking = "keep") -> TemplateChat:
    inner = HfTokenizers.from_str(hf_tokenizer(name).backend_tokenizer.to_str())
    template = ChatTemplate(TEMPLATES[name], f"{name}.jinja", {"bos_token": BOS})
    return TemplateChat(HuggingFaceTokenizer(inner), template, thinking)


def as_dicts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for message in messages:
        row: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.reasoning:
            row["reasoning_content"] = message.reasoning
        if message.tool_calls:
            row["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in message.tool_calls
            ]
        rows.append(row)
    return rows


def whole(name: str, messages: Sequence[Message], *, prompt: bool = False) -> str:
    """What transformers renders."""
    return hf_tokenizer(name).apply_chat_template(
        as_dicts(messages), tokenize=False, add_generation_prompt=prompt, date_string="26 Jul 2024"
    )


def assistants(messages: Sequence[Message]) -> list[int]:
    return [number for number, message in enumerate(messages) if message.role == "assistant"]


def terminator(name: str, messages: Sequence[Message], number: int) -> str:
    """The token that GLM samples to stop: it opens whatever comes next."""
    if name != "glm45":
        return ""
    if number + 1 < len(messages):
        return "<|observation|>" if messages[number + 1].role == "tool" else "<|user|>"
    return "<|observation|>" if messages[number].tool_calls else "<|user|>"


def ids_of(turns: Sequence[Turn]) -> list[int]:
    return [token for turn in turns for token in (*turn.suffix_ids, *turn.output_ids)]


PIECES = [*"ab \n<>|_é\ufdd0\ufdd1", "word", *SPECIALS, "<|im_<|im_end|>end|>", "<tool_call>"]
texts = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)
arguments = st.dictionaries(st.sampled_from(["path", "n"]), texts | st.integers(), max_size=2)


@st.composite
def conversations(draw: st.DrawFn, users: int = 3, least: int = 1) -> tuple[Message, ...]:
    """Tool loops of several users, texts that spell special tokens among them."""
    messages = [Message("system", draw(texts))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, users))):
        messages.append(Message("user", draw(texts)))
        for _ in range(draw(st.integers(0, 2)) if users > 1 else draw(st.integers(1, 3))):
            call = ToolCall("run", draw(arguments))
            messages.append(Message("assistant", draw(texts), draw(texts), (call,)))
            messages.append(Message("tool", draw(texts)))
        messages.append(Message("assistant", draw(texts), draw(texts)))
    return tuple(messages)


@names
@settings(max_examples=25, deadline=None)
@given(messages=conversations())
def test_under_strip_every_context_is_the_templates_own_and_the_mask_is_the_turn(
    name: str, messages: tuple[Message, ...]
) -> None:
    chat = dialect(name, "strip")
    pinned = assistants(messages)[0]
    turns, prefix_len = chat.turns(messages, pinned)
    pinned_ids = ids_of(turns)[:prefix_len]
    assert chat.tokenizer.decode(pinned_ids) == whole(name, messages[:pinned])
    stream: list[int] = []
    for number, turn in zip(assistants(messages), turns, strict=True):
        stream = [*(pinned_ids if turn.restart else stream), *turn.suffix_ids]
        asked = whole(name, messages[:number], prompt=True)
        assert chat.tokenizer.decode(stream) == asked
        answer = whole(name, messages[: number + 1]).removeprefix(asked)
        answer = answer if name == "glm45" else answer.rstrip()
        said = chat.tokenizer.decode(turn.output_ids)
        assert said == answer + terminator(name, messages, number)
        stream += turn.output_ids


@names
@settings(max_examples=25, deadline=None)
@given(messages=conversations())
def test_under_keep_a_growing_conversation_only_appends_what_the_agent_would(
    name: str, messages: tuple[Message, ...]
) -> None:
    chat = dialect(name)
    said = assistants(messages)
    online: list[int] = []
    for before, number in pairwise([-1, *said]):
        news = messages[before + 1 : number]
        online += chat.environment_ids(news, after_output=before >= 0)
        online += [*chat.prompt_ids, *chat.output_ids(messages[number])]
        turns, _ = chat.turns(messages[: number + 1], 0)
        assert ids_of(turns) == online
        assert not any(turn.restart for turn in turns)


@names
@settings(max_examples=25, deadline=None)
@given(messages=conversations(users=1))
def test_where_no_thinking_is_dropped_both_policies_give_the_whole_text(
    name: str, messages: tuple[Message, ...]
) -> None:
    messages = tuple(
        replace(message, reasoning="so") if message.role == "assistant" else message
        for message in messages
    )
    (kept, _), (stripped, _) = (
        dialect(name, thinking).turns(messages, 0) for thinking in ("keep", "strip")
    )
    assert kept == stripped
    text = dialect(name).tokenizer.decode(ids_of(kept))
    assert text == whole(name, messages).rstrip("\n") + terminator(
        name, messages, len(messages) - 1
    )


EXAMPLE = (
    Message("system", "Work in /tmp."),
    Message("user", "List the files.\n"),
    Message("assistant", "", "They want ls.", (ToolCall("run", {"cmd": "ls -la", "n": 2}),)),
    Message("tool", "a.py\nb.py\n\n"),
    Message("assistant", "Two files: a.py and b.py", "Easy."),
)


def whole_ids(name: str, messages: Sequence[Message], *, prompt: bool) -> list[int]:
    return hf_tokenizer(name).apply_chat_template(
        as_dicts(messages),
        tokenize=True,
        return_dict=False,
        add_generation_prompt=prompt,
        date_string="26 Jul 2024",
    )


@names
def test_the_tokens_are_those_of_apply_chat_template(name: str) -> None:
    turns, _ = dialect(name).turns(EXAMPLE, 2)
    assert list(turns[0].suffix_ids) == whole_ids(name, EXAMPLE[:2], prompt=True)
    if name == "llama31":
        # The whole encoded at once lets an answer's first word change the tokens of its prompt,
        # which a model that answers has been given already.
        assert ids_of(turns) != whole_ids(name, EXAMPLE, prompt=False)
        return
    reference = whole_ids(name, EXAMPLE, prompt=False)
    # Ours ends with the token that stops; ChatML's template goes on with a line's end.
    shared = len(ids_of(turns)) - (name == "glm45")
    assert ids_of(turns)[:shared] == reference[:shared]
    assert hf_tokenizer(name).decode(reference[shared:]) == ("\n" if name == "qwen3" else "")


@names
def test_the_mask_is_thinking_words_calls_and_the_end_of_the_turn(name: str) -> None:
    first, second = dialect(name).turns(EXAMPLE, 0)[0]
    said = [dialect(name).tokenizer.decode(turn.output_ids) for turn in (first, second)]
    assert (
        said
        == {
            "qwen3": [
                "<think>\nThey want ls.\n</think>\n\n"
                '<tool_call>\n{"name": "run", "arguments": {"cmd": "ls -la", "n": 2}}\n</tool_call>'
                "<|im_end|>",
                "<think>\nEasy.\n</think>\n\nTwo files: a.py and b.py<|im_end|>",
            ],
            "glm45": [
                "\n<think>They want ls.</think>\n<tool_call>run\n<arg_key>cmd</arg_key>\n"
                "<arg_value>ls -la</arg_value>\n<arg_key>n</arg_key>\n"
                "<arg_value>2</arg_value>\n</tool_call><|observation|>",
                "\n<think>Easy.</think>\nTwo files: a.py and b.py<|user|>",
            ],
            "llama31": [
                '{"name": "run", "parameters": {"cmd": "ls -la", "n": 2}}<|eot_id|>',
                "Two files: a.py and b.py<|eot_id|>",
            ],
        }[name]
    )
    # What the template does not show is trained by nobody, and said.
    assert dialect(name).left_out(EXAMPLE) == ((0, 1) if name == "llama31" else ())


@names
@pytest.mark.parametrize("pinned", range(6))
def test_the_pinned_prefix_is_what_the_pinned_messages_take(name: str, pinned: int) -> None:
    chat = dialect(name)
    turns, prefix_len = chat.turns(EXAMPLE, pinned)
    expected = whole(name, EXAMPLE[:pinned]) if pinned else ""
    if pinned and EXAMPLE[pinned - 1].role == "assistant":
        expected = expected.rstrip("\n") + terminator(name, EXAMPLE, pinned - 1)
    assert chat.tokenizer.decode(ids_of(turns)[:prefix_len]) == expected


def test_of_results_that_share_a_message_the_first_ones_can_be_pinned() -> None:
    calls = tuple(ToolCall("run", {"n": number}) for number in range(2))
    results = (Message("tool", "one"), Message("tool", "two"))
    messages = (
        *EXAMPLE[:2],
        Message("assistant", "", "so", calls),
        *results,
        Message("assistant", "Done."),
    )
    turns, prefix_len = dialect("qwen3").turns(messages, 4)
    kept = dialect("qwen3").tokenizer.decode(ids_of(turns)[:prefix_len])
    assert kept.endswith("<tool_response>\none\n</tool_response>")


@names
def test_a_text_that_spells_a_special_token_is_text(name: str) -> None:
    chat = dialect(name)
    tokens = {chat.tokenizer.encode(text, specials=True)[0] for text in chat.tokenizer.specials}
    spelled = " ".join(chat.tokenizer.specials)

    def specials(said: str) -> list[int]:
        messages = (
            Message("system", said),
            Message("user", said),
            Message("assistant", said, said, (ToolCall("run", {"cmd": said, "n": [said]}),)),
            Message("tool", said),
            Message("assistant", said, said),
        )
        return [token for token in ids_of(chat.turns(messages, 2)[0]) if token in tokens]

    assert specials(f"Doc {spelled}, and <|im_<|im_end|>end|> too.") == specials("Doc")


@names
def test_what_is_sampled_is_read_back(name: str) -> None:
    chat, said = dialect(name), EXAMPLE[2]
    if name == "llama31":
        with pytest.raises(UserError, match="syntax that klong does not read"):
            chat.parse(chat.output_ids(said))
        return
    parsed = chat.parse(chat.output_ids(said))
    assert parsed.problem == ""
    call = replace(said.tool_calls[0], call_id="call_0")
    assert parsed.message == replace(said, tool_calls=(call,))
    assert chat.parse(chat.output_ids(EXAMPLE[4])).message == EXAMPLE[4]


def test_what_an_agent_cannot_act_in_is_refused() -> None:
    dialect("qwen3").check_acting()
    for chat, complaint in (
        (dialect("qwen3", "strip"), "train it under tokenizer.thinking=keep"),
        (dialect("glm45"), "ends a turn with whatever token opens the next message"),
        (dialect("llama31"), "writes tool calls in a syntax that klong does not read"),
    ):
        with pytest.raises(UserError, match=complaint):
            chat.check_acting()


def test_a_malformed_glm_call_is_told_to_the_model() -> None:
    chat = dialect("glm45")
    sampled = "<think></think>\n<tool_call>run\n<arg_key>cmd</arg_key>\n<arg_value>ls</tool_call>"
    parsed = chat.parse(chat.tokenizer.encode(sampled, specials=True))
    assert not parsed.message.tool_calls
    assert "malformed" in parsed.problem


def test_ends_of_turns() -> None:
    qwen, llama, glm = (dialect(name) for name in ("qwen3", "llama31", "glm45"))
    assert qwen.tokenizer.decode([qwen.end_id]) == "<|im_end|>"
    assert llama.tokenizer.decode(llama.cut_ids) == "<|eot_id|>"
    with pytest.raises(UserError, match=r"glm45\.jinja: ends a turn with whatever"):
        _ = glm.end_id


@pytest.mark.parametrize("name", ["qwen3", "glm45"])
def test_a_dropped_thought_begins_a_new_window_and_is_the_reason(name: str) -> None:
    again = (Message("user", "And now?"), Message("assistant", "Nothing.", "Hm."))
    turns, _ = dialect(name, "strip").turns((*EXAMPLE, *again), 2)
    assert [turn.restart for turn in turns[:2]] == ["", ""]
    assert turns[2].restart == "the template drops thinking of earlier turns"


def moving(thinking: Thinking) -> TemplateChat:
    inner = HfTokenizers.from_str(hf_tokenizer("qwen3").backend_tokenizer.to_str())
    inner.add_special_tokens(["[INST]", "[/INST]", "</s>"])
    template = ChatTemplate(MISTRAL_MOVING, "moving.jinja", {"bos_token": BOS, "eos_token": "</s>"})
    return TemplateChat(HuggingFaceTokenizer(inner), template, thinking)


def test_a_template_that_breaks_extension_is_one_sentence() -> None:
    messages = (
        Message("system", "Be brief."),
        Message("user", "One?"),
        Message("assistant", "1"),
        Message("user", "Two?"),
        Message("assistant", "2"),
    )
    with pytest.raises(UserError) as refused:
        moving("keep").turns(messages, 0)
    assert str(refused.value) == (
        "turn 0: moving.jinja breaks the extension of tokens here, since the template writes "
        "earlier messages otherwise as the conversation goes on; set tokenizer.thinking=strip or "
        "tokenizer.template=chatml."
    )
    with pytest.raises(UserError, match=r"turn 1: moving\.jinja rewrites the pinned messages"):
        moving("strip").turns(messages, 2)
    turns, _ = moving("strip").turns(messages, 0)
    assert turns[1].restart == "the template writes earlier messages otherwise"
    assert moving("strip").tokenizer.decode(turns[1].suffix_ids) == (
        f"{BOS}[INST] One?[/INST] 1</s>[INST] Be brief.\n\nTwo?[/INST]"
    )


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("{% for m in messages %}", "not valid Jinja"),
        ("{{ raise_exception('no tools here') }}", r"refuses the conversation \(no tools here\)"),
        (
            "{{ messages|length }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
            "otherwise",
        ),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "no turn would end"),
        ("{% for m in messages %}{{ m.role }}<|im_end|>{% endfor %}", "does not show what"),
    ],
)
def test_a_template_of_no_use_is_one_sentence(source: str, complaint: str) -> None:
    chat = TemplateChat(dialect("qwen3").tokenizer, ChatTemplate(source, "x/chat_template.jinja"))
    with pytest.raises(UserError, match=complaint) as refused:
        chat.turns(EXAMPLE, 2)
    assert "x/chat_template.jinja" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_template_is_read_from_a_models_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no chat template"):
        load_template(tmp_path)
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None}
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**config, "chat_template": named}))
    template = load_template(tmp_path)
    assert (template.source, template.name) == ("D", str(path))
    assert template.variables == {"bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "chat_template.jinja").write_text("J")
    assert load_template(tmp_path).source == "J"
    assert load_template(tmp_path).variables == template.variables
