"""The verdicts as JUnit XML, for whatever runs tests: a suite a candidate, a case a slice and gate."""

from collections.abc import Iterator
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from tokenmill.optimize.documents import verdict_of
from tokenmill.optimize.run import Outcome
from tokenmill.optimize.verdict import Judged

__all__ = ["junit_text"]


def junit_text(outcome: Outcome) -> str:
    """The document. The first suite is the run itself: it fails unless there is a winner."""
    root = Element("testsuites", name="tokenmill optimize")
    _suite(root, "run", [("decision", verdict_of(outcome), outcome.choice.why)])
    for name, judged in outcome.judged.items():
        _suite(root, name, list(_cases(judged)))
    indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + tostring(root, encoding="unicode") + "\n"


def _cases(judged: Judged) -> Iterator[tuple[str, str, str]]:
    yield "quality", judged.overall.outcome, judged.overall.words
    for each in judged.slices:
        yield f"slice {each.slice}", each.verdict.outcome, each.verdict.words
    for gate in judged.gates:
        yield gate.name, gate.outcome, gate.words


def _suite(root: Element, name: str, cases: list[tuple[str, str, str]]) -> None:
    failed = sum(outcome == "fail" for _, outcome, _ in cases)
    skipped = sum(outcome == "undecided" for _, outcome, _ in cases)
    numbers = {"tests": str(len(cases)), "failures": str(failed), "skipped": str(skipped), "errors": "0"}
    suite = SubElement(root, "testsuite", {"name": _plain(name), **numbers})
    for title, outcome, words in cases:
        case = SubElement(suite, "testcase", classname=_plain(name), name=_plain(title))
        if outcome == "fail":
            SubElement(case, "failure", message=_plain(words))
        elif outcome == "undecided":
            SubElement(case, "skipped", message=_plain(words))


def _plain(text: str) -> str:
    """Without characters that XML cannot hold."""
    return "".join(char if char.isprintable() else " " for char in text)
