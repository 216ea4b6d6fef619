"""The house keeps its own rules: arrows, lengths, types, exports, words, links, lists."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fast import house_docs, house_rules
from tests.fast.house_rules import Allowance, Fault
from tokenmill.core import errors

ROOT = Path(__file__).parents[2]
ALLOW_FILE = Path(__file__).with_name("house_allow.toml")
OPTIONAL_LIBRARIES = ("torch", "transformers", "safetensors", "gguf", "ray")
TORCH_ROOMS = ("tokenmill.train", "tokenmill.compress", "tokenmill.optimize.trained")
"""The making side, and what drives it: the twin says how to get torch before anything of it is imported."""

SKIPPED_FOLDERS = {"build", "dist", "wheelhouse", "__pycache__"}
RULES = (
    "annotations",
    "config",
    "dependencies",
    "errors",
    "exit-codes",
    "exports",
    "file-length",
    "function-length",
    "function-p90",
    "global-state",
    "imports",
    "lazy-import",
    "links",
    "make-targets",
    "native-share",
    "optional-import",
    "rooms",
    "tree",
    "words",
)


def files(*patterns: str) -> dict[str, str]:
    """Path to text of the project's own files, without what is built or hidden."""
    paths = sorted({path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()})
    kept = [path.relative_to(ROOT) for path in paths]
    kept = [p for p in kept if not any(part in SKIPPED_FOLDERS or part == ".venv" for part in p.parts)]
    return {path.as_posix(): (ROOT / path).read_text(encoding="utf-8") for path in kept}


def module_name(path: str) -> str:
    """`tokenmill.core` for `src/tokenmill/core/__init__.py`."""
    return path.removeprefix("src/").removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def source_faults() -> Iterator[Fault]:
    """Faults of the Python and C++ code."""
    layers = house_rules.layer_table((ROOT / "docs/architecture.md").read_text(encoding="utf-8"))
    sources = files("src/**/*.py")
    for path, text in sources.items():
        ast.parse(text, filename=path)
        module = module_name(path)
        yield from house_rules.import_faults(module, text, layers)
        yield from house_rules.lazy_import_faults(module, text)
        needed = {"torch"} if module.startswith(TORCH_ROOMS) else set()
        optional = [library for library in OPTIONAL_LIBRARIES if library not in needed]
        yield from house_rules.optional_import_faults(module, text, optional)
        yield from house_rules.export_faults(module, text, path.endswith("__init__.py"))
        yield from house_rules.dataclass_faults(module, text)
        yield from house_rules.global_faults(module, text)
    yield from house_rules.error_faults({module_name(p): t for p, t in sources.items()}, "TokenmillError")
    for path, text in files("src/**/*.py", "tests/**/*.py", "scripts/**/*.py", "benchmarks/**/*.py").items():
        yield from house_rules.length_faults(module_name(path), text)
        yield from house_rules.annotation_faults(module_name(path), text)
    lengths = [lines for text in sources.values() for _, lines in house_rules.function_lengths(text)]
    yield from house_rules.p90_faults("src", lengths)
    native = files("csrc/**/*.cpp", "csrc/**/*.h")
    for path, text in native.items():
        yield from house_rules.file_length_faults(path, text)
    yield from house_rules.native_share_faults(num_lines(native), num_lines(sources))


def text_faults() -> Iterator[Fault]:
    """Faults of words and links."""
    code = ("src/**/*.py", "csrc/**/*", "tests/**/*.py", "scripts/**/*", "benchmarks/**/*")
    everything = files("*", ".ci/*", *code, "docs/**/*.md")
    for path, text in everything.items():
        yield from house_docs.word_faults(path, text)
    for path, text in files("*.md", "docs/**/*.md").items():
        yield from house_docs.link_faults(path, text, read_text)


def list_faults() -> Iterator[Fault]:
    """Lists in the pages that differ from the tree."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    layers = house_rules.layer_table((ROOT / "docs/architecture.md").read_text(encoding="utf-8"))
    rooms = {path.split("/")[2] for path in files("src/tokenmill/*/**/*.py")}
    yield from house_docs.list_faults("rooms", "docs/architecture.md", rooms & set(layers), rooms)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [requirement.split(">=")[0] for requirement in project["dependencies"]]
    table = house_docs.section(readme, "Dependencies")
    yield from house_docs.list_faults("dependencies", "README.md", house_docs.first_cells(table), needed)
    codes = house_docs.listed_codes(house_docs.section(readme, "Exit codes"))
    yield from house_docs.code_faults("README.md", codes, exit_codes())
    shown = house_docs.tree_paths(house_docs.section(readme, "The tree").split("```")[1].partition("\n")[2])
    missing = [path for path in shown if not (ROOT / path).exists()]
    yield from house_docs.list_faults("tree", "README.md", missing, [])
    targets = house_docs.make_targets((ROOT / "Makefile").read_text(encoding="utf-8"))
    for path, text in files("*.md", "docs/*.md").items():
        named = house_docs.named_targets(text)
        yield from house_docs.list_faults("make-targets", path, named - targets, [])


def exit_codes() -> dict[str, int]:
    """Every class of the error tree with its exit code."""
    classes = [getattr(errors, name) for name in errors.__all__]
    return {cls.__name__: cls.exit_code for cls in classes}


def num_lines(texts: dict[str, str]) -> int:
    """Lines of code and comments together; blank lines do not count."""
    return sum(bool(line.strip()) for text in texts.values() for line in text.splitlines())


def read_text(path: str) -> str | None:
    """A file's text; empty for a folder, None if there is nothing."""
    full = ROOT / path
    if full.is_dir():
        return ""
    return full.read_text(encoding="utf-8", errors="replace") if full.is_file() else None


def allowances() -> list[Allowance]:
    """The entries of the allow-list; an unknown key is an error."""
    entries: list[dict[str, Any]] = tomllib.loads(ALLOW_FILE.read_text(encoding="utf-8")).get("allow", [])
    return [Allowance(**entry) for entry in entries]


@pytest.fixture(scope="module")
def faults() -> list[Fault]:
    return [*source_faults(), *text_faults(), *list_faults()]


@pytest.mark.parametrize("rule", RULES)
def test_rule(rule: str, faults: list[Fault]) -> None:
    allowed = allowances()
    broken = [f for f in faults if f.rule == rule and not any(entry.covers(f) for entry in allowed)]
    assert not broken, f"{len(broken)} faults\n" + "\n".join(map(str, broken))


def test_every_fault_belongs_to_a_tested_rule(faults: list[Fault]) -> None:
    assert {fault.rule for fault in faults} <= set(RULES)


def test_every_exception_has_a_reason_and_is_needed(faults: list[Fault]) -> None:
    for entry in allowances():
        assert len(entry.reason) > 20, f"{entry.where}: say why"
        assert any(entry.covers(fault) for fault in faults), (
            f"{entry.rule} {entry.where}: covers nothing; remove it"
        )


def test_the_tree_was_read() -> None:
    assert "tokenmill.core.errors" in {module_name(path) for path in files("src/**/*.py")}
    assert house_rules.layer_table((ROOT / "docs/architecture.md").read_text(encoding="utf-8"))["cli"] == 7
