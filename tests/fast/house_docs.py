"""The rules of the house for text: words, links, and lists that must agree with the tree. Pure functions."""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePosixPath

from tests.fast.house_rules import Fault

# Written in two parts, so that this file does not contain them.
FORBIDDEN = ("TO" + "DO", "FIX" + "ME", "X" + "XX", "/wo" + "rk/", "/ro" + "ot/", "/ho" + "me/", "/op" + "t/")

_FENCE = re.compile(r"^```.*?^```[^\n]*$", flags=re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+\s+(.+?)\s*$", flags=re.MULTILINE)


def word_faults(path: str, text: str) -> list[Fault]:
    """Notes to self and paths of one machine."""
    faults = []
    for number, line in enumerate(text.splitlines(), start=1):
        for word in FORBIDDEN:
            pattern = rf"\b{word}\b" if word.isalpha() else re.escape(word)
            if re.search(pattern, line):
                faults.append(Fault(rule="words", where=path, message=f"line {number} has {word}"))
    return faults


def anchors(markdown: str) -> set[str]:
    """The anchors of a page's headings, as the usual hosts make them."""
    titles = _HEADING.findall(_FENCE.sub("", markdown))
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def link_faults(path: str, markdown: str, read: Callable[[str], str | None]) -> list[Fault]:
    """Relative links whose file or heading does not exist; `read` gives None for a missing file."""
    faults = []
    for link in _LINK.findall(_FENCE.sub("", markdown)):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        goal = resolve(path, target) if target else path
        text = read(goal)
        if text is None:
            faults.append(Fault(rule="links", where=path, message=f"{link}: no such file"))
        elif anchor and anchor not in anchors(text):
            faults.append(Fault(rule="links", where=path, message=f"{link}: no such heading"))
    return faults


def resolve(path: str, target: str) -> str:
    """`target` as written in `path`, relative to the top of the tree."""
    parts: list[str] = []
    for part in (PurePosixPath(path).parent / target).parts:
        if part == ".." and parts:
            parts.pop()
        else:
            parts.append(part)
    return "/".join(parts)


def section(markdown: str, title: str) -> str:
    """The text under a heading, up to the next heading; empty if there is none."""
    match = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#+ |\Z)", markdown, re.MULTILINE | re.DOTALL)
    return match[1] if match else ""


def listed_codes(markdown: str) -> dict[str, int]:
    """Error name to exit code, from rows `| 2 | `UsageError` | ... |`."""
    rows = re.findall(r"^\|\s*(\d+)\s*\|\s*`(\w+)`\s*\|", markdown, flags=re.MULTILINE)
    return {name: int(code) for code, name in rows}


def first_cells(markdown: str) -> list[str]:
    """The code in the first cell of each table row: `| `numpy` | ... |`."""
    return re.findall(r"^\|\s*`([^`]+)`\s*\|", markdown, flags=re.MULTILINE)


def tree_paths(block: str) -> list[str]:
    """Paths of an annotated tree: two spaces a level, the path, two or more spaces, the note."""
    paths: list[str] = []
    parents: list[str] = []
    for line in block.splitlines():
        match = re.match(r"^((?:  )*)(\S+)(?:\s{2,}|$)", line)
        if not match:
            continue
        depth = len(match[1]) // 2
        parents = [*parents[:depth], match[2].rstrip("/")]
        paths.append("/".join(parents))
    return paths


def list_faults(rule: str, where: str, listed: Iterable[str], real: Iterable[str]) -> list[Fault]:
    """Names that are only in the page, or only in the code."""
    extra, missing = set(listed) - set(real), set(real) - set(listed)
    faults = [Fault(rule=rule, where=where, message=f"lists {name}, which does not exist") for name in extra]
    faults += [Fault(rule=rule, where=where, message=f"does not list {name}") for name in missing]
    return sorted(faults, key=str)


def code_faults(where: str, listed: Mapping[str, int], real: Mapping[str, int]) -> list[Fault]:
    """Exit codes that the page and the code give differently."""
    pairs = [f"{name} = {code}" for name, code in listed.items()]
    return list_faults("exit-codes", where, pairs, [f"{name} = {code}" for name, code in real.items()])


def make_targets(makefile: str) -> set[str]:
    """Targets that a person may call: those with a `##` note."""
    return set(re.findall(r"^([a-z][\w-]*):[^\n]*##", makefile, flags=re.MULTILINE))


def named_targets(markdown: str) -> set[str]:
    """Targets that a page tells its reader to call, in code of any kind."""
    plain = _FENCE.sub("", markdown)
    code = _FENCE.findall(markdown) + re.findall(r"`([^`\n]+)`", plain)
    code += re.findall(r"^    (make .*)$", plain, flags=re.MULTILINE)
    return {target for text in code for target in re.findall(r"\bmake ([a-z][\w-]*)", text)}
