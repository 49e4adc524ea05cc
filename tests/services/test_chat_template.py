"""A chat becomes the prompt that Transformers would make of it, and a template cannot do harm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
import pytest
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from common.errors import InvalidRequest, ModelFolderError
from common.model_folder import read_model_folder
from services.chat_template import ChatTemplate
from services.request import Message
from services.text import Tokenizer


def message(content: str, role: str = "user") -> Message:
    return Message(role=role, content=content)


def render(source: str, *messages: Message, **special_tokens: str) -> str:
    return ChatTemplate(source, special_tokens).render(messages or (message("hello"),))


CHATS = [
    [message("Hi")],
    [message("You are a pirate.", "system"), message("Hi")],
    [message("Hi"), message("Hello! <|im_end|>", "assistant"), message("  2 + 2?\n\n\x00 {{ 7 * 7 }} 😀")],
    [message("", "tool")],
]


def test_the_prompt_is_the_one_that_transformers_makes(default_model: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(default_model)
    template = ChatTemplate.of(read_model_folder(default_model))
    tokenizer = Tokenizer(default_model / "tokenizer.json")

    for chat in CHATS:
        messages = [{"role": each.role, "content": each.content} for each in chat]
        prompt = template.render(chat)
        assert prompt == theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert tokenizer.encode(prompt, add_special_tokens=False) == ids


# What templates of well-known models make use of.
TEMPLATES = [
    "{{ bos_token }}{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
    "{% for m in messages %}\n    {%- if m.role == 'user' %}\n{{ m['content'] | trim }}\n {% endif %}\n{% endfor %}",
    "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ '<é>' | tojson }}",
    "{% set ns = namespace(seen=0) %}{% for m in messages %}{% set ns.seen = ns.seen + 1 %}{% endfor %}{{ ns.seen }}",
    "{% macro say(m) %}[{{ m.content }}]{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{% if tools is none and documents is none %}{{ strftime_now('%Y') }}{% endif %}",
    "{% if not enable_thinking is defined %}{{ messages[::-1][0].content }}{% endif %}{{ 'a-b'.split('-') }}",
    "{{ dict(a=1) }}{% if add_generation_prompt %}<|assistant|>{% endif %}",
]


@pytest.mark.parametrize("source", TEMPLATES)
def test_what_templates_make_use_of_means_the_same_as_in_transformers(source: str) -> None:
    chat = [message("  hello <b>"), message("oh", "assistant"), message("é 😀")]
    messages = [{"role": each.role, "content": each.content} for each in chat]
    theirs: Any = render_jinja_template([messages], chat_template=source, add_generation_prompt=True, bos_token="<s>")

    assert render(source, *chat, bos_token="<s>") == theirs[0][0]


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate: ' + messages[0].content) }}",
        "{{ messages[7].content.secret }}",
        "{{ 1 / 0 }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% include '/etc/passwd' %}",
        "{% for i in range(10000000) %}{% endfor %}",
    ],
)
def test_a_template_that_fails_is_the_callers_mistake_and_tells_nothing(source: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        render(source, message("my secret"))

    assert str(caught.value) == (
        "chat: the model's chat template does not accept these messages; check their roles and order"
    )


def test_a_prompt_has_a_greatest_size() -> None:
    source = "{% for i in range(1000) %}{{ messages[0].content }}{% endfor %}"

    assert ChatTemplate(source, {}, max_characters=1000).render([message("a")]) == "a" * 1000
    with pytest.raises(InvalidRequest, match="chat: the prompt would exceed 1000 characters"):
        ChatTemplate(source, {}, max_characters=1000).render([message("ab")])


def test_messages_are_text_and_never_templates() -> None:
    assert render("{{ messages[0].content }}", message("{{ 7 * 7 }}{% raw %}")) == "{{ 7 * 7 }}{% raw %}"


def test_a_chat_of_no_messages_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="at least one message"):
        ChatTemplate("x", {}).render([])


def test_a_template_that_is_no_jinja_is_refused_with_its_folder(tmp_path: Path, default_model: Path) -> None:
    for file in default_model.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.jinja").write_text("{% for %}")

    with pytest.raises(ModelFolderError, match=r"chat template is not valid Jinja .*pagewire pull smollm2"):
        ChatTemplate.of(read_model_folder(tmp_path))
    with pytest.raises(jinja2.TemplateError):
        ChatTemplate("{% for %}", {})
