"""The settings of the chat dialect, through `klong split` and the settings of `klong sft`."""

import json
import shutil
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

import klong_jax.text
from klong_jax.core.errors import UserError
from klong_jax.pipelines.compose import config_dir, validate
from klong_jax.pipelines.config.training import TokenizerSection
from klong_jax.pipelines.dialect import load_dialect, make_dialect, save_dialect
from klong_jax.pipelines.split import run
from klong_jax.text.chat import Chat
from klong_jax.text.template_chat import TemplateChat
from klong_jax.text.tokenizer import bundled_tokenizer

BUNDLED = Path(klong_jax.text.__file__).parent / "bundled" / "tokenizer.json"

# Drops thinking once the user speaks again, and never shows what is said beside a call.
TEMPLATE = """
{%- set last = namespace(user=0) %}
{%- for m in messages if m.role == 'user' %}{% set last.user = loop.index0 %}{% endfor %}
{%- set seen = namespace(users=-1) %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{% set seen.users = seen.users + 1 %}{% endif %}
    {{- '<|im_start|>' ~ m.role ~ '\\n' }}
    {{- '<think>' ~ m.reasoning_content ~ '</think>' if m.reasoning_content
        and seen.users == last.user }}
    {{- m.tool_calls[0].function|tojson if m.tool_calls else m.content }}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{{- '<|im_start|>assistant\\n' if add_generation_prompt }}
"""


def said(role: str, content: str, **more: object) -> dict[str, object]:
    return {"role": role, "content": content, **more}


CALL = {"id": "c", "type": "function", "function": {"name": "ls", "arguments": "{}"}}
MESSAGES = [
    said("user", "One?"),
    said("assistant", "Let me look.", tool_calls=[CALL]),
    said("tool", "a.py", tool_call_id="c"),
    said("assistant", "1", reasoning_content="easy"),
    said("user", "Two?"),
    said("assistant", "2"),
]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(BUNDLED, folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return folder


def section(path: Path | None = None, **settings: str) -> TokenizerSection:
    given = {"path": path, "template": "own", "thinking": "keep", **settings}
    return TokenizerSection.model_validate(given)


def test_the_settings_choose_the_dialect(model: Path) -> None:
    tokenizer = bundled_tokenizer()
    assert isinstance(make_dialect(section(model, template="chatml"), tokenizer), Chat)
    for path in (model, model / "tokenizer.json"):
        own = make_dialect(section(path, thinking="strip"), tokenizer)
        assert isinstance(own, TemplateChat)
        assert own.thinking == "strip"
    # A policy's own folder comes before what the settings name.
    assert isinstance(make_dialect(section(), tokenizer, model), TemplateChat)
    with pytest.raises(UserError, match=r"tokenizer\.template=own: .* set tokenizer\.path"):
        make_dialect(section(), tokenizer)


def test_a_policy_remembers_the_dialect_it_has_learnt(model: Path, tmp_path: Path) -> None:
    tokenizer = bundled_tokenizer()
    save_dialect(tmp_path, Chat(tokenizer))
    assert isinstance(load_dialect(tmp_path, tokenizer), Chat)
    own = make_dialect(section(model, thinking="strip"), tokenizer)
    assert isinstance(own, TemplateChat)
    save_dialect(tmp_path, own)
    learnt = load_dialect(tmp_path, tokenizer)
    assert isinstance(learnt, TemplateChat)
    assert learnt.renderer.template == own.renderer.template
    assert learnt.thinking == "strip"
    again = make_dialect(section(), tokenizer, None, learnt)
    assert isinstance(again, TemplateChat)
    assert again.renderer.template == own.renderer.template
    with pytest.raises(UserError, match=r"has learnt that of .*model"):
        make_dialect(section(template="chatml"), tokenizer, None, learnt)


def test_the_plan_says_where_and_why_a_new_window_begins(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = tmp_path / "data.jsonl", tmp_path / "plan.json"
    data.write_text(json.dumps({"messages": MESSAGES}) + "\n")
    arguments = [f"data.path={data}", f"tokenizer.path={model}", f"output={output}"]

    def plan(*more: str) -> dict[str, object]:
        overrides = [*arguments, *more]
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            run(validate("split", compose("split", overrides), overrides))
        return dict(json.loads(output.read_text())["trajectories"][0])

    assert plan()["remarks"] == []
    left_out = "turn 0: the template leaves out some of what the assistant says"
    kept = plan("tokenizer.template=own")
    assert kept["remarks"] == [left_out]
    stripped = plan("tokenizer.template=own", "tokenizer.thinking=strip")
    restart = "turn 2: a new window begins, since the template drops thinking of earlier turns"
    assert stripped["remarks"] == [restart, left_out]
    assert isinstance(stripped["windows"], list)
    assert [window["first_trained_turn"] for window in stripped["windows"]] == [0, 2]
    assert restart in " ".join(capsys.readouterr().out.split())
