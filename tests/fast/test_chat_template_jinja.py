"""What Jinja2 offers and real templates use, rendered in the worker: equal to Jinja2 in this process."""

from collections.abc import Iterator
from datetime import datetime

import pytest

from tests.fast.chat_tools import CHATS, jinja2_text, plain_context
from tokenmill.core import UsageError
from tokenmill.models.chat import process as template_process
from tokenmill.models.chat.process import TemplateProcess
from tokenmill.models.chat.template import ChatTemplate

TEMPLATES = {
    "macro": "{% macro turn(m, n=1) %}[{{ m.role }}{{ n }}:{{ m.content }}]{% endmacro %}"
    "{% for m in messages %}{{ turn(m) }}{{ turn(m, n=loop.index) }}{% endfor %}",
    "macro that calls": "{% macro box(t) %}<{{ t }}>{{ caller() }}</{{ t }}>{% endmacro %}"
    "{% for m in messages %}{% call box(m.role) %}{{ m.content }}{% endcall %}{% endfor %}",
    "macro that calls itself": "{% macro show(v) %}{% if v is mapping %}{% for k, e in v | dictsort %}"
    "{{ k }}:"
    "{{ show(e) }};{% endfor %}{% elif v is sequence and v is not string %}{{ v | join('+') }}{% else %}"
    "{{ v }}"
    "{% endif %}{% endmacro %}{% for t in tools or [] %}{{ show(t) }}{% endfor %}",
    "namespace": "{% set ns = namespace(last=-1, seen=[]) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% set ns.seen = ns.seen + [m.content | length] %}{% endif %}{% endfor %}"
    "{{ ns.last }} {{ ns.seen }}",
    "loop": "{% for m in messages %}{{ '^' if loop.first }}{{ loop.index }}/{{ loop.length }}"
    "{{ loop.revindex0 }}"
    "{{ loop.previtem.role if loop.previtem is defined }}{{ loop.nextitem is defined }}{{ '$' if loop.last }}"
    "{% else %}none{% endfor %}{% for m in messages if m.role != 'system' %}{{ loop.cycle('a', 'b') }}"
    "{% endfor %}",
    "break and continue": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
    "{{ m.role }}"
    "{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}",
    "slices": "{% for m in messages[1:] %}{{ m.role }}{% endfor %}{{ messages[-1].role }}"
    "{{ messages[::-1] | length }}"
    "{{ messages[0].content[:4] }}{{ messages[0].content[-2:] }}{{ messages[0]['content'][::-1] }}",
    "JSON": "{{ tools | tojson }}{{ tools | tojson(indent=4) }}{{ messages[-1] | tojson(indent=2) }}"
    "{{ {'b': [1, 2.5, none, true], 'a': '<&>\\'\"'} | tojson(sort_keys=true, separators=(',', ':')) }}",
    "string methods": "{% for m in messages if m.content %}{{ m.content.strip() }}"
    "|{{ m.content.split('\\n')[0] }}|"
    "{{ m.content.startswith('a') }}{{ m.content.endswith('.') }}|{{ m.role.title() }}|{{ m.role.upper() }}|"
    "{{ m.content.replace('e', 'E') }}|{{ m.content.lstrip('Be') }}{{ m.content.rstrip() }}"
    "|{{ m.role.find('s') }}|"
    "{{ m.role.capitalize() }}|{{ '%s-%02d' % (m.role, 3) }}|{{ '{}:{r}'.format(1, r=m.role) }}|"
    "{{ m.content.split('</think>')[-1].lstrip('\\n') }}{{ ', '.join(m.role) }}\n{% endfor %}",
    "items": "{% for t in tools or [] %}{% for k, v in t.function.parameters.properties.items() %}{{ k }}="
    "{{ v.get('type', '?') }}{{ v.enum | default([]) | join(',') }};{% endfor %}{{ t.keys() | list }}"
    "{{ t.function.values() | list | length }}{% endfor %}",
    "tests": "{% for v in [1, 1.5, 'a', none, true, [1], {'a': 1}, nothing, 0, ''] %}{{ v is defined }}"
    "{{ v is none }}{{ v is string }}{{ v is mapping }}{{ v is iterable }}{{ v is number }}"
    "{{ v is sequence }}"
    "{{ v is boolean }}{{ v is true }}{{ v is undefined }}{{ (v is integer) if v is defined }};{% endfor %}"
    "{{ 3 is odd }}{{ 'a' is in 'abc' }}{{ 'x' not in ['y'] }}{{ 4 is divisibleby 2 }}{{ 1 is eq 1 }}",
    "filters": "{{ messages | map(attribute='role') | list }}"
    "{{ messages | selectattr('role', 'equalto', 'user')"
    " | map(attribute='content') | join('|') }}"
    "{{ messages | rejectattr('tool_calls', 'defined') | list | length }}"
    "{{ [3, 1, 2] | sort | first }}{{ [1, 2] | sum }}{{ 'a b' | title }}{{ 'x' | upper }}{{ '3' | int + 1 }}"
    "{{ 3.7 | round | int }}{{ messages | groupby('role') | map('first') | list }}"
    "{{ ['a', 'a'] | unique | list }}"
    "{{ 'a\\nb' | indent(2) }}{{ ' x ' | trim }}{{ -3 | abs }}{{ nothing | default('d') }}"
    "{{ '' | default('e', true) }}"
    "{{ [1, 2, 3] | batch(2) | list }}{{ {'a': 1} | items | list }}"
    "{{ 'a,b' | replace(',', ';') | wordcount }}",
    "white space": "  {% if true %}\n   a  \n  {%- if true -%}  \n b {% endif +%}\n  {% endif %}"
    "\n{# note #}\n"
    "  {%+ if true %}x{% endif %}\n{{ 'c' -}}\n\n {{- 'd' }}\n{% raw %}{{ raw }}{% endraw %}\n\n",
    "block set and filter": "{% set text %}a {{ messages[0].role }}\n{% endset %}{{ text | length }}"
    "{{ text }}"
    "{% filter upper %}{{ text }}{% endfilter %}{% with a = 1, b = 2 %}{{ a + b }}{% endwith %}"
    "{% set a, b = 1, 2 %}"
    "{{ a }}{{ b }}",
    "expressions": "{{ 7 // 2 }}{{ 7 % 3 }}{{ 2 ** 8 }}{{ 1 if false }}{{ 'a' ~ 1 ~ none }}"
    "{{ not true or 1 == 1.0 }}"
    "{{ [1] + [2] }}{{ (1, 2) }}{{ {'a': {'b': 'c'}}.a.b }}{{ 'ab' * 2 }}{{ 1 < 2 < 3 }}"
    "{{ range(1, 9, 3) | list }}"
    "{{ dict(a=1, b='x') }}{{ true and none }}{{ 10 / 4 }}{{ '\\u00e9\\t\\x41' }}",
    "generation": "{% for m in messages %}{{ m.role }}{% generation %}{{ m.content }}{% set a = 1 %}"
    "{% endgeneration %}"
    "{{ a is defined }}{% endfor %}",
    "variables": "{{ enable_thinking is defined and enable_thinking }}{{ add_generation_prompt }}"
    "{{ bos_token }}"
    "{{ documents is defined }}{{ '/no_think' if enable_thinking is defined and not enable_thinking }}",
    "calls": "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.id }}{{ c.function.name }}"
    "{{ c.function.arguments | tojson }}{{ c.function.arguments.town }}{% endfor %}{% if m.role == 'tool' %}"
    "{{ m.name }}{{ m.tool_call_id }}{{ m.content }}{% endif %}{{ 'tool_calls' in m }}{{ m.nothing }}"
    "{% endfor %}",
    "joiner and cycler": "{% set sep = joiner('; ') %}{% set c = cycler('x', 'y') %}"
    "{% for m in messages %}{{ sep() }}"
    "{{ m.role }}{{ c.next() }}{% endfor %}",
}


@pytest.fixture(scope="module")
def shared() -> Iterator[TemplateProcess]:
    """One process for all templates of this module; in use each has its own."""
    yield TemplateProcess()


@pytest.fixture(autouse=True)
def one_process(shared: TemplateProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenmill.models.chat.template.TemplateProcess", lambda: shared)


@pytest.mark.parametrize("name", TEMPLATES)
def test_equal_to_jinja2(name: str) -> None:
    template = ChatTemplate(TEMPLATES[name], bos_token="<s>")
    prompts = set()
    for chat in CHATS.values():
        context = plain_context(chat, no_content="")
        context |= {"add_generation_prompt": True, "bos_token": "<s>", "eos_token": ""}
        prompt = template.render(chat.messages, tools=chat.tools, variables=chat.variables)
        assert prompt == jinja2_text(TEMPLATES[name], context)
        prompts.add(prompt)
    assert all(len(prompt) > 0 for prompt in prompts) or name in ("items", "macro that calls itself")


def test_today() -> None:
    before = datetime.now().strftime("%d %b %Y")
    rendered = ChatTemplate("{{ strftime_now('%d %b %Y') }}").render(CHATS["one"].messages)
    assert rendered in (before, datetime.now().strftime("%d %b %Y"))


def test_refusal() -> None:
    template = ChatTemplate("{{ raise_exception('only ' ~ messages[0].role) }}", origin="my file")
    with pytest.raises(UsageError, match=r"my file: refuses these messages \(only user\)"):
        template.render(CHATS["one"].messages)


def test_a_refusal_cannot_write_to_the_terminal() -> None:
    template = ChatTemplate("{{ raise_exception('a\\x1b[2Jb\\nc') }}")
    with pytest.raises(UsageError, match=r"\(a\?\[2Jb\)$"):
        template.render(CHATS["one"].messages)


def test_budget_grows_with_the_conversation() -> None:
    assert template_process._SECONDS_PER_CHAR * (1 << 20) > template_process._MAX_SECONDS
    source = "{% for m in messages %}" + "{% for _ in range(40) %}x{% endfor %}" + "{% endfor %}"
    many = [CHATS["one"].messages[0]] * 10_000
    assert len(ChatTemplate(source).render(many)) == 400_000
