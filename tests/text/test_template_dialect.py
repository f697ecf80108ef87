"""The templates' language against transformers' own rendering of it."""

# ruff: noqa: E501 - a line break in a template would be text of it

from __future__ import annotations

import datetime
from collections.abc import Iterator
from typing import Any

import jinja2
import jinja2.sandbox
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from mer.errors import TemplateError
from mer.text.renderer import Renderer, TemplateInput

MESSAGES = [
    {"role": "system", "content": "  Be brief.\n"},
    {"role": "user", "content": 'a/b/c "q" <b> é 🌍\r\nx'},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."},
    {"role": "tool", "content": '{"a": [1, 2.5, null]}'},
]
VARIABLES: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}
CONSTRUCTS = [
    # tags
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}",
    "{%- generation -%} {% set inner = 1 %}{{ messages[0].role }} {%- endgeneration -%}{{ inner is defined }}",
    "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% elif loop.last %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "{% for m in messages %}{{ loop.index }}{{ loop.first }}{{ loop.length }}{{ loop.revindex0 }}{{ loop.previtem.role if loop.previtem is defined }}{{ loop.nextitem.role if not loop.last }}{% endfor %}",
    "{% for m in messages if m.role != 'user' %}{{ loop.index }}{{ m.role }}{% else %}none{% endfor %}",
    "{% for a in [[1, [2]], [3]] recursive %}{{ loop(a) if a is iterable and a is not string else a }}{% endfor %}",
    "{% for k, v in {'b': 1, 'a': 2}.items() %}{{ k }}={{ v }};{% endfor %}",
    "{% macro field(name, value=1) %}{{ name }}{{ value }}{{ varargs }}{{ kwargs }}{{ caller() if caller }}{% endmacro %}{{ field('a') }}{{ field('b', 2, 3, z=4) }}{% call field('c') %}inside{% endcall %}",
    "{% set text %}  a\n  b{% endset %}[{{ text }}]",
    "{% set ns = namespace(n=0, last=none) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% set ns.last = m %}{% endfor %}{{ ns.n }}{{ ns.last.role }}",
    "{% filter upper %}a{{ messages[0].role }}{% endfilter %}{% with a = 1, b = 2 %}{{ a + b }}{% endwith %}",
    "{% raw %}{{ not }}{% endraw %}{# a comment #}{% if true %}  \n  kept{% endif %}",
    "{% for m in messages %}\r\n{{ m.role }}\r\n{% endfor %}\r\nend",
    "   {% if true %}\n   a\n   {%- endif %}\n{%+ if true %} b{% endif +%}\nc",
    # strings
    "{{ messages[1].content.rsplit('/', 1) }}{{ messages[1].content.split('/', 1) }}{{ ' a  b '.split() }}",
    "{{ 'a:b:c'.partition(':') }}{{ 'a:b:c'.rpartition(':') }}{{ 'abab'.removeprefix('ab') }}{{ 'abab'.removesuffix('ab') }}",
    "{{ '%s|%5.2f|%03d|%r|%%' % ('x', 2.5, 7, 'y') }}{{ '%s' % messages[0].role }}{{ '%(a)s' % {'a': 1} }}",
    "{{ '{} {0!r:>5} {a}'.format('x', a=2) if false else '{0!r:>5} {a}'.format('x', a=2) }}{{ '%s-%s' | format(1, 2) }}",
    "[{{ messages[0].content.strip() }}][{{ 'xxaxx'.strip('x') }}][{{ 'xxaxx'.lstrip('x') }}][{{ 'xxaxx'.rstrip('x') }}]",
    "{{ 'a\n\nb\r\nc'.splitlines() }}{{ 'a\nb'.splitlines(true) }}{{ 'aXbX'.replace('X', '-', 1) }}{{ 'aXbX' | replace('X', '-', 1) }}",
    "{{ 'ab'.startswith('a') }}{{ 'ab'.startswith(('b', 'a')) }}{{ 'ab'.endswith('b') }}{{ 'abc'.startswith('c', 2) }}",
    "{{ 'hello wORLD'.title() }}{{ 'hello wORLD'.capitalize() }}{{ 'aB'.upper() }}{{ 'aB'.lower() }}{{ 'aB'.swapcase() }}{{ 'ß'.casefold() }}",
    "{{ 'abcabc'.find('c') }}{{ 'abc'.find('z') }}{{ 'abcabc'.rfind('c') }}{{ 'abc'.index('b') }}{{ 'aaa'.count('a') }}",
    "{{ 'a'.center(5, '*') }}{{ 'a'.ljust(3, '.') }}|{{ 'a'.rjust(3) }}|{{ '7'.zfill(3) }}|{{ 'a\tb'.expandtabs(4) }}",
    "{{ '12'.isdigit() }}{{ 'ab'.isalpha() }}{{ 'a1'.isalnum() }}{{ ' '.isspace() }}{{ 'A'.isupper() }}{{ 'a'.islower() }}{{ '1'.isnumeric() }}{{ '1'.isdecimal() }}",
    "{{ ', '.join(['a', 'b']) }}{{ ['a', 'b'] | join('-') }}{{ 'abc' | join(',') }}{{ messages | join('|', attribute='role') }}",
    "{{ 'abc'.translate({97: 'x'}) }}{{ 'é'.encode('utf-8') }}{{ 'a' 'b' }}{{ 'a' ~ 1 ~ none ~ true }}{{ 'ab' * 2 }}{{ 'b' in 'abc' }}",
    # slices, arithmetic, tests
    "{{ 'abcdef'[::-1] }}{{ 'abcdef'[4:1:-2] }}{{ messages[::-1][0].role }}{{ messages[1:][-1].role }}{{ [1, 2, 3][-2:] }}{{ (1, 2)[0] }}",
    "{{ 7 // 2 }}{{ -7 // 2 }}{{ 7 % 3 }}{{ -7 % 3 }}{{ 7 / 2 }}{{ 2 ** 10 }}{{ 2 ** 100 }}{{ 1.0 }}{{ 1e20 }}{{ 10 | string + 'x' }}{{ 1 < 2 < 3 }}",
    "{{ messages is iterable }}{{ messages[0] is mapping }}{{ 'a' is string }}{{ messages is sequence }}{{ 1 is number }}{{ 1 is integer }}{{ 1.0 is float }}{{ true is boolean }}{{ none is none }}{{ x is undefined }}{{ x is defined }}",
    "{{ 3 is odd }}{{ 4 is even }}{{ 4 is divisibleby 2 }}{{ 'a' is in ['a'] }}{{ 1 is eq 1 }}{{ 1 is sameas true }}{{ 'A' is upper }}{{ raise_exception is callable }}{{ true is true }}{{ 2 is gt 1 }}{{ 'upper' is filter }}{{ 'odd' is test }}",
    "{{ true and false or not false }}{{ 1 if false }}{{ none or 'x' }}{{ '' or none }}{{ (x or 'y') }}{{ (x.y is defined) if x is defined }}{{ true }}{{ True }}{{ None }}{{ none }}{{ False }}",
    # filters
    "{{ messages[0].nothing | default('none', boolean=true) }}{{ '' | default('a', true) }}{{ '' | d('a') }}{{ nothing | default }}{{ none | default('n', boolean=false) }}",
    "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ {'b': 1, 'a': 'é<'} | tojson(ensure_ascii=true, sort_keys=true, separators=(',', ':')) }}{{ none | tojson }}{{ 1.5 | tojson(ensure_ascii=False) }}",
    "{{ messages[0].content | trim }}|{{ 'xax' | trim('x') }}|{{ '\x1c a\u2003' | trim }}|{{ 1 | trim }}|{{ none | trim }}",
    "{{ messages | map(attribute='role') | list }}{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='role') | first }}{{ messages | rejectattr('role', 'in', ['user', 'tool']) | list | length }}{{ [0, 1, 2] | select('odd') | list }}{{ [0, 1] | reject | list }}{{ ['a', 'b'] | map('upper') | join }}",
    "{{ [3, 1, 2] | sort }}{{ [3, 1, 2] | sort(reverse=true) | first }}{{ messages | sort(attribute='role') | map(attribute='role') | list | last }}{{ ['b', 'A', 'b'] | unique | list }}{{ {'b': 1, 'a': 2} | dictsort }}{{ {'b': 1, 'a': 2} | dictsort(by='value', reverse=true) }}",
    "{{ messages | groupby('role') | map('first') | list }}{{ [1, 2, 3, 4] | batch(3, 0) | list }}{{ [1, 2, 3] | slice(2) | list }}{{ [1, 2] | sum }}{{ [1, 2] | max }}{{ [1, 2] | min }}{{ [1, 2] | reverse | list }}{{ 'abc' | reverse }}",
    "{{ 'a\nb' | indent(2) }}{{ 'a\nb' | indent(2, true) }}{{ 'a\n\nb' | indent(width=1, first=true, blank=true) }}{{ 'hello' | capitalize }}{{ 'hello you' | title }}{{ 'a b c' | wordcount }}{{ 'abcdef ghij' | truncate(6, true, '') }}{{ 'aa bb' | wordwrap(2) }}",
    "{{ '<a>' | escape }}{{ '<a>' | e ~ '<b>' }}{{ '<a>' | safe }}{{ '<b>x</b>' | striptags }}{{ 'a b' | urlencode }}{{ 3.7 | int }}{{ '3' | int + 1 }}{{ 'x' | int(5) }}{{ '1.5' | float }}{{ -1 | abs }}{{ 2.567 | round(1) }}{{ 5 | string | length }}{{ [1] | pprint }}{{ 1024 | filesizeformat }}{{ {'a': 1} | items | list }}{{ 'a' | attr('x') is defined }}{{ {'class': 'x'} | xmlattr }}",
    # dictionaries, lists, functions
    "{{ messages[0].get('role') }}{{ messages[0].get('x', 'y') }}{{ messages[0].items() | list }}{{ messages[0].keys() | list }}{{ messages[0].values() | list }}{{ messages[0]['role'] }}{{ 'role' in messages[0] }}{{ {'a': 1}.copy() }}{{ dict(a=1, **{'b': 2}) }}{{ dict([('a', 1)]) }}{{ dict.fromkeys(['a'], 1) }}",
    "{{ [1, 2] + [3] }}{{ [1, 2, 1].count(1) }}{{ [1, 2].index(2) }}{{ range(3) | list }}{{ range(5, 0, -2) | list }}{{ range(3) | length }}{{ [1] * 3 }}{{ [[1, 2], [3]] | sum(start=[]) }}{{ (1, 2) }}",
    "{{ strftime_now is defined }}{{ messages | length }}{{ messages | count }}{{ tools is none }}{{ documents is none }}{{ bos_token }}{{ eos_token }}{{ add_generation_prompt }}{{ nothing }}{{ cycler('a', 'b').next() }}{% set j = joiner(',') %}{{ j() }}{{ j() }}",
    "{% set content = messages[2].content %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}{{ content }}",
    "{{ messages[0].role.__class__ is defined }}{{ 'a'.nothing is defined }}{{ messages[0].nothing.nothing if false }}{{ '\\t\\x41\\u00e9\\\\' }}",
    "{%- set a, b = 'x', 'y' %}{{ a }}{{ b }}{% set ns = namespace() %}{% set ns.tool = {'a': [1]} %}{{ ns.tool.a[0] }}{{ ns.nothing is defined }}",
]
# What changes lists and dictionaries, which transformers refuses and other engines of model files allow.
CHANGING = [
    "{% set a = [] %}{% for m in messages %}{% set _ = a.append(m.role) %}{% endfor %}{{ a | join(',') }}{{ a.pop() }}{{ a.pop(0) }}{{ a }}",
    "{{ messages[0].update({'a': 1}) }}{{ messages[0].pop('role') }}{{ messages[0].pop('x', 'none') }}{{ messages | length }}{{ messages.append({'role': 'x'}) }}{{ messages | map(attribute='role') | list }}",
    "{% set d = {} %}{% set _ = d.update(b=1) %}{% set _ = d.setdefault('c', []).append(2) %}{{ d }}{{ d.items() | list }}{{ d.popitem() }}{{ d.clear() }}{{ d }}",
    "{% set a = [3, 1, 2] %}{{ a.sort() }}{{ a.reverse() }}{{ a.insert(1, 9) }}{{ a.remove(3) }}{{ a.extend([4]) }}{{ a }}",
    "{% macro f(x=[]) %}{{ x.append(1) }}{{ x }}{% endmacro %}{{ f() }}{{ f() }}",
]
REFUSED = [
    "{% set ns = namespace(_x=1) %}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{{ nothing.nothing }}",
    "{{ nothing + 'a' }}",
    "{{ ['a'] + 'a' }}",
    "{% break %}",
    "{{ 'a' | nothing }}",
    "{% generation %}",
    "{{ ''.format.__self__.x }}",
    "{{ range(1000000) | length }}",
    "{{ x | from }}",
]


# Beginnings of the families' templates: what ends the prompt hangs on variables that may not be defined.
OPEN_THINKING = {
    "qwen": "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- else %}{{- '<think>\\n' }}{%- endif %}{%- endif %}",
    "glm": "{{- '<|user|>' ~ messages[1].content }}{{- '/nothink' if (enable_thinking is defined and not enable_thinking) else '' }}{{- '<|assistant|>' }}{{- '</think>' if (enable_thinking is defined and not enable_thinking) else '<think>' }}",
    "deepseek": "{% if not thinking is defined %}{% set thinking = false %}{% endif %}{{ '<think>' if thinking else '</think>' }}{{ thinking }}",
    "nemotron": "{%- set enable_thinking = enable_thinking if enable_thinking is defined else True %}{{ '<think>\\n' if enable_thinking else '<think></think>' }}",
    "gpt-oss": "{%- if reasoning_effort is not defined %}{%- set reasoning_effort = 'medium' %}{%- endif %}{{- '<|start|>system<|message|>Reasoning: ' + reasoning_effort + '\\n\\n# Valid channels: analysis, commentary, final.<|end|><|start|>assistant' }}",
    "gemma": "{{- '<|turn>model\\n' }}{%- if not enable_thinking | default(false) -%}{{- '<|channel>thought\\n<channel|>' -}}{%- endif -%}",
    "budget": "{{ thinking_budget if thinking_budget is defined else 'none' }}{{ thinking_budget is number }}{{ preserve_thinking | default(true) }}",
}
GIVEN: list[dict[str, Any]] = [
    {},
    *({"enable_thinking": value} for value in (True, False)),
    *({"thinking": value} for value in (True, False)),
    *({"reasoning_effort": value} for value in ("low", "high")),
    {"thinking_budget": 1024, "preserve_thinking": False, "enable_thinking": False},
]


def oracle(template: str, **variables: Any) -> str:
    messages: list[Any] = [dict(m) for m in MESSAGES]
    rendered: Any = render_jinja_template([messages], chat_template=template, **VARIABLES, **variables)
    return str(rendered[0][0])


class Rendering:
    """Renders the messages with one template after the other, in one process."""

    def __init__(self) -> None:
        self.renderer = Renderer("", "some.gguf")

    def __call__(self, template: str, **variables: Any) -> str:
        self.renderer._source = template
        contents = [[message["content"] for message in MESSAGES]]
        roles = [message["role"] for message in MESSAGES]
        (text,) = self.renderer.render(
            TemplateInput(roles, contents, VARIABLES | variables, datetime.datetime(2026, 7, 4, 15, 6, 7))
        )
        return text


@pytest.fixture(scope="module")
def render() -> Iterator[Rendering]:
    rendering = Rendering()
    yield rendering
    rendering.renderer.close()


@pytest.mark.parametrize("template", CONSTRUCTS)
def test_a_construct_is_rendered_as_by_transformers(render: Rendering, template: str) -> None:
    assert render(template) == oracle(template)


@pytest.mark.parametrize("family", OPEN_THINKING)
def test_variables_reach_a_template_and_are_undefined_otherwise(render: Rendering, family: str) -> None:
    template = OPEN_THINKING[family]
    texts = [render(template, **variables) for variables in GIVEN]
    assert texts == [oracle(template, **variables) for variables in GIVEN]
    assert len(set(texts)) > 1


@pytest.mark.parametrize("template", CHANGING)
def test_what_a_template_changes_is_changed_in_its_rendering_alone(render: Rendering, template: str) -> None:
    environment = jinja2.sandbox.SandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    expected = environment.from_string(template).render(messages=[dict(m) for m in MESSAGES])
    assert render(template) == render(template) == expected
    with pytest.raises(jinja2.exceptions.SecurityError):
        oracle(template)


@pytest.mark.parametrize("template", REFUSED)
def test_what_transformers_refuses_is_refused(render: Rendering, template: str) -> None:
    with pytest.raises((jinja2.TemplateError, TypeError, OverflowError, SyntaxError)):
        oracle(template)
    with pytest.raises(TemplateError):
        render(template)


def test_the_time_is_that_of_the_chat(render: Rendering) -> None:
    assert render("{{ strftime_now('%d %B %Y, %H:%M:%S') }}") == "04 July 2026, 15:06:07"


def test_json_is_read_as_deepseeks_templates_ask(render: Rendering) -> None:
    assert render("{% set got = messages[3].content | from_json %}{{ got.a[1] }}{{ got.a[2] is none }}") == "2.5True"
