"""The live context over a template in which a text takes other tokens than it takes alone."""

from agent_helpers import chat
from hypothesis import given, settings
from hypothesis import strategies as st

from klong_jax.agent.context import Context
from klong_jax.core.message import Message
from klong_jax.llm.base import Completion
from klong_jax.splitting.policy import ContextPolicy, split
from klong_jax.text.template import ChatTemplate
from klong_jax.text.template_chat import TemplateChat

QUOTING = """
{%- for m in messages %}
    {{- '<|im_start|>' ~ m.role ~ '\\n' }}
    {{- (m.content|tojson if m.role == 'tool' else m.content) ~ '<|im_end|>\\n' }}
{%- endfor %}
{{- '<|im_start|>assistant\\n' if add_generation_prompt }}
"""
pieces = st.sampled_from(["word ", '"\n', "<|im_end|>", "\\"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.builds(str.__mul__, pieces, st.integers(0, 300)), min_size=1, max_size=6))
def test_no_text_overflows_its_turn(results: list[str]) -> None:
    policy = ContextPolicy(limit=240, overlap=60, reserve=40)
    dialect = TemplateChat(chat().tokenizer, ChatTemplate(QUOTING, "quoting.jinja"))
    opening = (Message("system", "be"), Message("user", "do"))
    context = Context(dialect, policy, "s", opening, "task t")
    for result in results:
        prompt = context.open()
        assert len(prompt.token_ids) + policy.reserve <= policy.limit
        context.close(Completion(Message("assistant", "x"), (20, 21)), 0.0)
        shown = context.observe([Message("tool", result)], [4096])
        assert (context.messages[-1].content != result) == bool(shown)
    context.open()
    taken = tuple(context.turns)
    assert split(taken, context.spans[0].prefix_len, policy) == context.spans
