"""Each rule of the house finds a bad sample and passes a good one."""

import pytest

from tests.fast import house_docs, house_rules
from tests.fast.house_rules import Allowance, Fault

LAYERS = {"core": 0, "kernels": 1, "costs": 1, "models": 2, "cli": 7}


def messages(faults: list[Fault]) -> list[str]:
    return [fault.message for fault in faults]


def test_layer_table_reads_the_rows() -> None:
    assert house_rules.layer_table(
        "| layer | x |\n|--:|--|\n| 0 | `core` | nouns |\n| 7 | `cli` | verbs |\n"
    ) == {
        "core": 0,
        "cli": 7,
    }


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("tokenmill.kernels.a", "import tokenmill.models.formats.gguf"),
        ("tokenmill.kernels.a", "from tokenmill.costs import prices"),
        ("tokenmill.kernels.a", "from tokenmill import costs"),
        ("tokenmill.kernels.a", "from . import b"),
        ("tokenmill.kernels.a", "from tokenmill.utils import b"),
        ("tokenmill.utils.a", "import os"),
        ("tokenmill", "from tokenmill.core import Request"),
        ("tokenmill.__main__", "from tokenmill.core import Request"),
        ("tokenmill.core.a", "def f():\n    from tokenmill.cli.main import main"),
        ("tokenmill.core.a", "if TYPE_CHECKING:\n    from tokenmill.models import Model"),
    ],
)
def test_bad_arrows_are_found(module: str, source: str) -> None:
    assert len(house_rules.import_faults(module, source, LAYERS)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "tokenmill.models.a",
            "import numpy\nfrom tokenmill.kernels.plan import Op\nimport tokenmill.models.b",
        ),
        ("tokenmill.cli.main", "from tokenmill import __version__\nfrom tokenmill.core import errors"),
        ("tokenmill.__main__", "from tokenmill.cli.main import main"),
        ("tokenmill.core.a", "import tokenmillstone"),
    ],
)
def test_good_arrows_pass(module: str, source: str) -> None:
    assert house_rules.import_faults(module, source, LAYERS) == []


def test_lazy_imports_are_found_outside_cli() -> None:
    source = "class A:\n    def f(self):\n        from tokenmill.core import Request\n"
    assert [f.where for f in house_rules.lazy_import_faults("tokenmill.models.a", source)] == [
        "tokenmill.models.a:A.f"
    ]
    assert house_rules.lazy_import_faults("tokenmill.cli.run", source) == []
    assert house_rules.lazy_import_faults("tokenmill.models.a", "def f():\n    import torch\n") == []


def test_optional_libraries_are_found_at_module_level() -> None:
    found = house_rules.optional_import_faults
    assert found("m", "import torch.nn as nn", ["torch"])
    assert found("m", "try:\n    import torch\nexcept ImportError:\n    torch = None", ["torch"])
    assert found("m", "import torch\ndef f():\n    import torch", ["torch"])
    assert not found("m", "def f():\n    import torch", ["torch"])
    assert not found("m", "if TYPE_CHECKING:\n    import torch", ["torch"])
    assert not found("m", "import numpy", ["torch"])


def test_long_functions_and_files_are_found() -> None:
    def function(num_lines: int) -> str:
        return "def f():\n" + "    x = 1\n" * (num_lines - 1)

    assert house_rules.function_lengths(function(7)) == [("f", 7)]
    assert house_rules.length_faults("m", function(60)) == []
    assert [(f.rule, f.value) for f in house_rules.length_faults("m", function(61))] == [
        ("function-length", 61)
    ]
    assert house_rules.file_length_faults("m", "x = 1\n" * 500) == []
    assert [f.rule for f in house_rules.length_faults("m", "x = 1\n" * 501)] == ["file-length"]


def test_p90_is_the_nearest_rank() -> None:
    assert house_rules.p90_faults("src", []) == []
    assert house_rules.p90_faults("src", [30] * 9 + [60]) == []
    assert house_rules.p90_faults("src", [10] * 8 + [31, 31])[0].value == 31


def test_native_share() -> None:
    assert house_rules.native_share_faults(25, 75) == []
    assert house_rules.native_share_faults(26, 74)[0].value == pytest.approx(0.26)


@pytest.mark.parametrize(
    ("source", "bare"),
    [
        ("def f(a: int): ...", "return"),
        ("def f(a) -> None: ...", "a"),
        ("async def f(*a, **k) -> None: ...", "a, k"),
        ("class A:\n    def f(self, *, b): ...", "b, return"),
        ("def f() -> None:\n    def g(): ...", "return"),
    ],
)
def test_missing_annotations_are_found(source: str, bare: str) -> None:
    assert messages(house_rules.annotation_faults("m", source)) == [f"no type for {bare}"]


def test_full_annotations_pass() -> None:
    source = "class A:\n    def f(self, a: int, /, *b: int, c: int = 1, **d: int) -> None: ..."
    assert house_rules.annotation_faults("m", source) == []


@pytest.mark.parametrize(
    ("source", "is_package"),
    [
        ("def f(): ...", False),
        ("__all__ = []\nX: int = 1", False),
        ("__all__ = []\nif True:\n    X = 1", False),
        ("__all__ = ['f']", False),
        ("__all__ = ['f', 'f']\ndef f(): ...", False),
        ("__all__ = []\nfrom tokenmill.core import Request", True),
    ],
)
def test_wrong_exports_are_found(source: str, is_package: bool) -> None:
    assert len(house_rules.export_faults("m", source, is_package)) == 1


@pytest.mark.parametrize(
    ("source", "is_package"),
    [
        ("__all__ = ['A', 'f']\nclass A: ...\ndef f(): ...\ndef _g(): ...\n_x = 1", False),
        ("import os\nfrom tokenmill.core import Request\n__all__ = []", False),
        ("from tokenmill.core import Request\n__all__ = ['Request']", True),
        ("__all__ = ['__version__']\n__version__ = '1'", True),
        ("__all__: list[str] = []\nimport os", False),
    ],
)
def test_right_exports_pass(source: str, is_package: bool) -> None:
    assert house_rules.export_faults("m", source, is_package) == []


def test_errors_outside_the_tree_are_found() -> None:
    tree = {"e": "class Root(Exception): ...\nclass Bad(Root): ..."}
    assert house_rules.error_faults(tree, "Root") == []
    other = tree | {"o": "class Odd(ValueError): ...\nclass Odder(Odd): ...\nclass _Own(Exception): ..."}
    assert [f.where for f in house_rules.error_faults(other, "Root")] == ["o:Odd", "o:Odder"]
    both = tree | {"o": "class Odd(e.Bad, ValueError): ...\nclass Plain: ..."}
    assert house_rules.error_faults(both, "Root") == []


def test_loose_configuration_is_found() -> None:
    good = "@dataclass(frozen=True, kw_only=True)\nclass AConfig:\n    x: int"
    assert house_rules.dataclass_faults("m", good) == []
    assert len(house_rules.dataclass_faults("m", good.replace("frozen=True, ", ""))) == 1
    assert len(house_rules.dataclass_faults("m", "@dataclass\nclass BParams:\n    x: int")) == 1


def test_global_state_is_found() -> None:
    assert house_rules.global_faults("m", "def f():\n    global x\n    x = 1")
    assert house_rules.global_faults("m", "def f():\n    x = 1") == []


def test_an_exception_covers_only_its_place_and_size() -> None:
    entry = Allowance(rule="file-length", where="m", reason="a table that is read as a whole", limit=510)
    assert entry.covers(Fault(rule="file-length", where="m", message="", value=510))
    assert not entry.covers(Fault(rule="file-length", where="m", message="", value=511))
    assert not entry.covers(Fault(rule="file-length", where="n", message="", value=1))


@pytest.mark.parametrize("word", house_docs.FORBIDDEN)
def test_forbidden_words_are_found(word: str) -> None:
    assert house_docs.word_faults("p", f"# {word} later\n") != []


def test_longer_words_are_not_forbidden() -> None:
    assert house_docs.word_faults("p", "mas" + "TO" + "DONs at home/work") == []


def test_dead_links_are_found() -> None:
    pages = {"README.md": "# Top\n", "docs/a.md": "## One, two\n"}
    text = "[x](docs/a.md#one-two) [y](https://example.org) [z](#top)\n```\n[no](gone.md)\n```\n# Top"
    assert house_docs.link_faults("README.md", text, pages.get) == []
    assert messages(house_docs.link_faults("README.md", "[x](docs/b.md)", pages.get)) == [
        "docs/b.md: no such file"
    ]
    assert len(house_docs.link_faults("README.md", "[x](docs/a.md#three)", pages.get)) == 1
    assert house_docs.link_faults("docs/a.md", "[x](../README.md#top)", pages.get) == []


def test_tables_are_read() -> None:
    page = "# A\n\n| 2 | `UsageError` | bad |\n\n## B\n\n| `numpy` | why |\n"
    assert house_docs.listed_codes(house_docs.section(page, "A")) == {"UsageError": 2}
    assert house_docs.first_cells(house_docs.section(page, "B")) == ["numpy"]
    assert house_docs.section(page, "C") == ""
    assert len(house_docs.code_faults("p", {"UsageError": 2}, {"UsageError": 3})) == 2


def test_tree_paths_join_their_parents() -> None:
    block = "src/  code\n  core/   nouns\n    a.py  one\n  cli/\ndocs/   pages\n"
    assert house_docs.tree_paths(block) == ["src", "src/core", "src/core/a.py", "src/cli", "docs"]


def test_list_faults_go_both_ways() -> None:
    assert messages(house_docs.list_faults("r", "p", ["a", "b"], ["b", "c"])) == [
        "does not list c",
        "lists a, which does not exist",
    ]


def test_make_targets_are_read() -> None:
    assert house_docs.make_targets("demo: x ## say\nhidden: y\n") == {"demo"}
    page = "`make` lists; type `make demo`, make haste\n```\nmake test\n```\n    make check\n"
    assert house_docs.named_targets(page) == {"demo", "test", "check"}
