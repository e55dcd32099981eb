"""Is the prompt, to the byte, the one that Hugging Face transformers renders?"""

import json
import os
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import jinja2
import pytest
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import models

from dynamo.llm import chat_template
from dynamo.llm.chat_template import ChatTemplate
from dynamo.runtime.errors import InvalidArgument

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs the hub

TEMPLATES = {
    path.stem: path.read_text(encoding="utf-8")
    for path in sorted((Path(__file__).parent / "data" / "chat_templates").glob("*.jinja"))
}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Météo & <b>more</b> for 'a' \"city\"",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "東京"},
                "days": {"type": "array", "items": {"type": "integer"}},
                "area": {"type": "object"},
                "any": {},
            },
            "required": ["city"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def call(name: str, arguments: Any, call_id: str = "abcdefgh1") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


SYSTEM = {"role": "system", "content": "  Be brief.\n"}
RESULT = {"role": "tool", "content": '{"t": 21}', "tool_call_id": "abcdefgh1", "name": "get_weather"}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [user("Hello <b>&'\" 世界 {{ 7*7 }} {% x %}")],
    "system": [SYSTEM, user(" Hi\n"), assistant(" Hello! "), user("Bye")],
    "last is assistant": [user("Count"), assistant("one, two,")],
    "no alternation": [user("a"), user("b")],
    "two systems": [SYSTEM, user("a"), {"role": "system", "content": "more"}, assistant("b")],
    "thinking": [
        user("q"),
        assistant("<think>\nhm\n</think>\n\nanswer"),
        user("r"),
        assistant("x", reasoning_content="y"),
    ],
    "tool": [
        SYSTEM,
        user("w?"),
        assistant("", tool_calls=[call("get_weather", {"city": "Zürich", "n": [1, None]})]),
        RESULT,
    ],
    "two tools": [
        user("w?"),
        assistant("", tool_calls=[call("get_weather", {"city": "東京"}), call("clock", {}, "short")]),
        RESULT,
        {**RESULT, "content": "12:00"},
        assistant("done"),
        user("thanks"),
    ],
    "arguments as text": [user("w?"), assistant("", tool_calls=[call("get_weather", '{"city": "x"}')]), RESULT],
    "parts": [
        {"role": "system", "content": [{"type": "text", "text": "S"}]},
        user([{"type": "text", "text": "What "}, {"type": "image", "image": "x"}, {"type": "text", "text": "is it?"}]),
    ],
    "stop": [SYSTEM, user("long " * 20), assistant("a\nb"), user("STOP"), assistant("never")],
    "no content": [user("a"), {"role": "assistant", "content": None}, user("b")],
    "odd role": [{"role": "narrator", "content": "Once"}],
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"tools": [WEATHER, CLOCK]},
    {"tools": []},
    {"add_generation_prompt": False},
    {"enable_thinking": False, "add_vision_id": True, "date_string": "26 Jul 2024"},
    {"bos_token": "<other>", "documents": [{"title": "T", "text": "a < b"}]},
    {"continue_final_message": True, "add_generation_prompt": False},
]


@cache
def reference_tokenizer() -> Any:
    transformers = pytest.importorskip("transformers")  # comes with vLLM; the project itself does not need it
    vocabulary = {token: i for i, token in enumerate(["<unk>", *TOKENS.values()])}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=HfTokenizer(models.WordLevel(vocabulary, "<unk>")), **TOKENS
    )


def reference(source: str, messages: list[dict[str, Any]], options: dict[str, Any]) -> str | None:
    """What transformers renders; None if it raises."""
    try:
        text: str = reference_tokenizer().apply_chat_template(
            messages, chat_template=source, tokenize=False, **{"add_generation_prompt": True, **options}
        )
    except (jinja2.TemplateError, TypeError, ValueError, AttributeError, KeyError, OverflowError):
        return None
    return text


def ours(source: str, messages: list[dict[str, Any]], options: dict[str, Any]) -> str | None:
    try:
        return ChatTemplate({"default": ("test", source)}, TOKENS).render_as_is(messages, **options)
    except InvalidArgument:
        return None


def test_there_are_templates_of_many_kinds() -> None:
    assert len(TEMPLATES) >= 12


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_is_that_of_transformers(name: str) -> None:
    rendered = 0
    for (case, messages), options in product(CONVERSATIONS.items(), OPTIONS):
        before = json.dumps(messages)
        expected = reference(TEMPLATES[name], messages, options)
        assert ours(TEMPLATES[name], messages, options) == expected, (case, options)
        assert json.dumps(messages) == before
        rendered += expected is not None
    assert rendered >= 10


@pytest.mark.parametrize(
    "source",
    [
        "{{ strftime_now('%d %B %Y') }}",
        "{{ messages | tojson }} {{ messages | tojson(indent=2) }} {{ messages | tojson(ensure_ascii=true) }}",
        "{{ '<a>' | tojson }} {{ 'é' | tojson }} {{ {'z': 1, 'a': 2} | tojson }}",
        "  {% if true %}\n x\n  {% endif %}\n y \n",
        "{{ messages.__class__ }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% set x = namespace(a=1) %}{% set x.a = 2 %}{{ x.a }}{{ undefined_thing }}{{ undefined_thing.more }}",
        "{{ lipsum is defined }} {{ cycler is defined }} {{ none }} {{ 1.0 }} {{ 10 // 3 }} {{ 2 ** 0.5 }}",
        "{{ messages[0].content[:3] }}{{ messages[-1]['role'] }}{{ messages[5] }}",
        "{% include 'x' %}",
        "{% for i in range(3) %}{{ i }}{% if i == 1 %}{% break %}{% endif %}{% endfor %}",
        "{{ tools is none }} {{ documents is none }} {{ add_generation_prompt }} {{ pad_token is defined }}",
        "{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}{% endgeneration %}",
        "{{ messages | length }}{{- '\\n\\t' -}} \r\n x",
        "{{ range(200000) | length }}",
        "{{ 'a' * 10 }}{{ ['x', 'y'] | join(', ') }}{{ {'a': 1}.items() | list }}",
    ],
)
def test_environment_is_that_of_transformers(source: str) -> None:
    for messages in (CONVERSATIONS["one"], CONVERSATIONS["tool"]):
        assert ours(source, messages, {}) == reference(source, messages, {})


def test_refusal_of_the_template_reaches_the_caller_with_its_line() -> None:
    template = ChatTemplate({"default": ("chat_template.jinja", TEMPLATES["strict_alternation"])}, TOKENS)
    with pytest.raises(InvalidArgument) as caught:
        template.render(CONVERSATIONS["no alternation"])
    assert caught.value.message.startswith("Roles must alternate user/assistant")
    assert "chat_template.jinja, line 11" in caught.value.message
    assert caught.value.param == "messages"


def test_failure_of_the_template_names_file_and_line() -> None:
    template = ChatTemplate({"default": ("custom.jinja", "a\n\n{{ messages[0].content + 1 }}")}, {})
    with pytest.raises(InvalidArgument, match=r"custom.jinja failed on these messages at line 3: TypeError"):
        template.render([user("x")])


def test_bad_syntax_names_file_and_line() -> None:
    with pytest.raises(InvalidArgument, match=r"custom.jinja is not valid Jinja, line 2"):
        ChatTemplate({"default": ("custom.jinja", "a\n{% if %}")}, {})


def test_template_that_never_ends_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "RENDER_LIMIT_S", 0.2)
    source = "{% for a in range(9999) %}{% for b in range(9999) %}x{% endfor %}{% endfor %}"
    with pytest.raises(InvalidArgument, match="took more than"):
        ChatTemplate({"default": ("t", source)}, {}).render([user("x")])


@pytest.mark.parametrize(
    "arguments",
    [
        {"messages": []},
        {"messages": [user("x")], "chat_template": "{{ 1 }}"},
        {"messages": [user("x")], "continue_final_message": True},
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        ChatTemplate({"default": ("t", "x")}, {}).render(**arguments)


@pytest.mark.parametrize(
    ("name", "wants"),
    [(name, "openai" if name in ("content_parts", "macro_parts") else "string") for name in TEMPLATES],
)
def test_format_of_content_is_told_from_the_template(name: str, wants: str) -> None:
    assert ChatTemplate({"default": ("t", TEMPLATES[name])}, {}).wants() == wants


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{% for c in m['content'] | selectattr('type') %}{% endfor %}{% endfor %}",
        "{% set rest = messages[1:] %}{% for m in rest %}{% for c in m.content %}{% endfor %}{% endfor %}",
        "{% for m in messages %}{% set body = m.content %}{% for c in body %}{% endfor %}{% endfor %}",
        "{% set first = messages[0] %}{% for c in first.content[1:] %}{% endfor %}",
        "{% macro show(it) %}{% for c in it %}{% endfor %}{% endmacro %}{{ show(it=messages[0].content) }}",
        "{% for content in content %}{% endfor %}",
    ],
)
def test_loop_over_content_by_any_name_means_parts(source: str) -> None:
    assert ChatTemplate({"default": ("t", source)}, {}).wants() == "openai"


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{% for t in m.tool_calls %}{{ t.content }}{% endfor %}{% endfor %}",
        "{% for a, b in messages[0].items() %}{{ b }}{% endfor %}",
        "{% macro show(it) %}{% for c in it %}{% endfor %}{% endmacro %}{{ show(tools) }}",
        "{{ 1 }}",
    ],
)
def test_no_loop_over_content_means_a_string(source: str) -> None:
    assert ChatTemplate({"default": ("t", source)}, {}).wants() == "string"


SHOW = "{% for m in messages %}{{ m | tojson }}\n{% endfor %}"
SHOW_PARTS = SHOW + "{% for m in messages %}{% for c in m.content %}{% endfor %}{% endfor %}"


def shaped(messages: list[dict[str, Any]], source: str = SHOW) -> list[dict[str, Any]]:
    text = ChatTemplate({"default": ("t", source)}, {}).render(messages)
    return [json.loads(line) for line in text.splitlines()]


def test_text_parts_become_one_string_for_a_template_that_wants_a_string() -> None:
    parts = [
        {"type": "text", "text": "a"},
        {"type": "input_text", "text": "b"},
        "c",
        {"type": "refusal", "refusal": "d"},
    ]
    assert shaped([user(parts)]) == [user("a\nb\nc\nd")]


def test_string_becomes_a_part_for_a_template_that_wants_parts() -> None:
    image = {"type": "image_url", "image_url": {"url": "x"}}
    part = {"type": "text", "text": "a"}
    assert shaped([user("a")], SHOW_PARTS) == [user([part])]
    assert shaped([user([part, image])], SHOW_PARTS) == [user([part, image])]


def test_picture_is_refused_by_a_template_that_wants_a_string() -> None:
    with pytest.raises(InvalidArgument, match=r"messages\[1\].content\[0\] is of type 'image_url'") as caught:
        shaped([user("a"), user([{"type": "image_url", "image_url": {"url": "x"}}])])
    assert caught.value.param == "messages[1].content"


def test_missing_content_is_empty() -> None:
    assert shaped([{"role": "assistant"}]) == [assistant("")]
    assert shaped([{"role": "assistant", "content": None}], SHOW_PARTS) == [assistant([])]


def test_text_of_a_tool_is_always_a_string() -> None:
    message = {"role": "tool", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    assert shaped([message], SHOW_PARTS) == shaped([message]) == [{"role": "tool", "content": "a\nb"}]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [('{"a": 1}', {"a": 1}), ({"a": 1}, {"a": 1}), ("", {}), (None, {}), ("[1]", {}), ("{broken", {})],
)
def test_arguments_of_tool_calls_become_an_object(arguments: Any, expected: dict[str, Any]) -> None:
    (message,) = shaped([assistant("", tool_calls=[call("f", arguments)])])
    assert message["tool_calls"][0]["function"]["arguments"] == expected


def test_empty_list_of_tool_calls_is_dropped() -> None:
    assert shaped([assistant("x", tool_calls=[])]) == [assistant("x")]


def test_malformed_tool_call_is_refused_by_name() -> None:
    with pytest.raises(InvalidArgument, match=r"messages\[0\].tool_calls\[0\].function"):
        shaped([assistant("x", tool_calls=[{"id": "1"}])])


def test_reasoning_has_both_names() -> None:
    (message,) = shaped([assistant("x", reasoning="r")])
    assert message["reasoning"] == message["reasoning_content"] == "r"


def test_developer_becomes_system_where_the_template_does_not_know_it() -> None:
    messages = [user("a"), {"role": "developer", "content": "d", "tools": []}, SYSTEM]
    assert shaped(messages) == [{"role": "system", "content": "d\n\n  Be brief.\n"}, user("a")]
    assert [m["role"] for m in shaped(messages, SHOW + "{# 'developer' #}")] == ["user", "developer", "system"]


def test_messages_of_the_caller_are_not_changed() -> None:
    messages = CONVERSATIONS["arguments as text"]
    before = json.dumps(messages)
    shaped(messages)
    assert json.dumps(messages) == before


def write_config(directory: Path, **config: Any) -> None:
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def rendered(directory: Path, tools: list[dict[str, Any]] | None = None, custom: Path | None = None) -> str:
    template = ChatTemplate.load(directory, custom)
    assert template is not None
    return template.render([user("x")], tools)


def test_template_of_the_config_sees_tokens_written_either_way(tmp_path: Path) -> None:
    write_config(
        tmp_path, chat_template="{{ bos_token }}|{{ eos_token }}", bos_token={"content": "<b>"}, eos_token="<e>"
    )
    assert rendered(tmp_path) == "<b>|<e>"


def test_tokens_may_stand_in_the_special_tokens_map(tmp_path: Path) -> None:
    write_config(tmp_path, chat_template="{{ bos_token }}|{{ pad_token }}")
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "<b>", "pad_token": {"content": "<p>"}}')
    assert rendered(tmp_path) == "<b>|<p>"


def test_named_templates_of_the_config(tmp_path: Path) -> None:
    write_config(
        tmp_path,
        chat_template=[
            {"name": "default", "template": "plain"},
            {"name": "tool_use", "template": "with tools"},
            {"name": "rag", "template": "rag"},
        ],
    )
    assert rendered(tmp_path) == "plain"
    assert rendered(tmp_path, [WEATHER]) == "with tools"
    template = ChatTemplate.load(tmp_path)
    assert template is not None
    assert template.names == ["default", "tool_use", "rag"]


def test_files_win_over_the_config_and_bring_their_own_names(tmp_path: Path) -> None:
    write_config(tmp_path, chat_template="of the config")
    (tmp_path / "chat_template.jinja").write_text("of the file")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("file for tools")
    assert rendered(tmp_path) == "of the file"
    assert rendered(tmp_path, [WEATHER]) == "file for tools"


def test_custom_file_wins_over_everything(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("of the file")
    custom = tmp_path / "mine.jinja"
    custom.write_text("mine {{ tools | length if tools else 0 }}")
    assert rendered(tmp_path, [WEATHER], custom) == "mine 1"


def test_template_of_an_older_processor_is_found(tmp_path: Path) -> None:
    (tmp_path / "chat_template.json").write_text('{"chat_template": "older"}')
    assert rendered(tmp_path) == "older"


def test_directory_without_a_template_has_none(tmp_path: Path) -> None:
    assert ChatTemplate.load(tmp_path) is None


def test_only_named_templates_and_no_default_is_an_error_when_asked(tmp_path: Path) -> None:
    write_config(tmp_path, chat_template=[{"name": "rag", "template": "x"}])
    with pytest.raises(InvalidArgument, match=r"\['rag'\] but none named default"):
        rendered(tmp_path)


@pytest.mark.parametrize("value", [[{"nome": "x"}], 7, [1]])
def test_template_of_the_wrong_shape_names_the_file(tmp_path: Path, value: Any) -> None:
    write_config(tmp_path, chat_template=value)
    with pytest.raises(InvalidArgument, match=r"chat_template in tokenizer_config\.json"):
        ChatTemplate.load(tmp_path)


def test_missing_custom_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"nowhere\.jinja"):
        ChatTemplate.load(tmp_path, tmp_path / "nowhere.jinja")
