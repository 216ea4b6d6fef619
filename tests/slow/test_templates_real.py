"""Templates that real models have: what transformers renders, and what we do. And all the hostile ones.

The real ones come from the source package of llama-cpp-python, which holds over a hundred. It is not part of
the project: the test takes it from TOKENMILL_TEST_SDIST or gets it with pip.
"""

import ast
import hashlib
import itertools
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from scripts.scorecard.hostile_templates import Case, cases, check, check_unguarded
from scripts.scorecard.user_fields import Chat
from tests.fast.chat_tools import CHATS, plain_context
from tokenmill.core import ModelFormatError, UsageError
from tokenmill.models.chat.template import ChatTemplate

NAME, VERSION = "llama-cpp-python", "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
FOLDER = Path(__file__).parents[2] / "build" / "sdist"
NUM_TEMPLATES = 110
BOS, EOS = "<s>", "</s>"
FAILED = "None"
NO_TOOLS: tuple[list[object] | None, ...] = (None, [])


@pytest.fixture(scope="module")
def templates() -> dict[str, str]:
    """Name to text."""
    found = dict(templates_in(source_package()))
    assert len(found) == NUM_TEMPLATES
    return found


def source_package() -> Path:
    """The pinned package; tests that need it are skipped where it cannot be got."""
    given = os.environ.get("TOKENMILL_TEST_SDIST", "")
    path = Path(given) if given else FOLDER / f"{NAME.replace('-', '_')}-{VERSION}.tar.gz"
    if not path.is_file():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=:all:"]
        command += [f"--dest={FOLDER}", f"{NAME}=={VERSION}"]
        if subprocess.run(command, check=False, timeout=600).returncode:
            pytest.skip(f"no {path.name}, and pip cannot get it")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == SHA256
    return path


def templates_in(package: Path) -> Iterator[tuple[str, str]]:
    """Files of their own, and the literals in a test and in a module."""
    with tarfile.open(package) as archive:
        for member in archive:
            name = member.name.rpartition("/")[2]
            is_code = name in ("test-chat-template.cpp", "llama_chat_format.py")
            if not member.isfile() or not (is_code or member.name.endswith(".jinja")):
                continue
            file = archive.extractfile(member)
            assert file is not None
            text = file.read().decode()
            if "/models/templates/" in member.name:
                yield name, text
            elif is_code:
                literal = r'(?:template_str\s*=?\s*\*/ *(?:U8C\()?|^\w+_CHAT_TEMPLATE = )("(?:[^"\\]|\\.)*")'
                for index, match in enumerate(re.finditer(literal, text, re.MULTILINE)):
                    yield f"{name} {index}", ast.literal_eval(match[1])


def references(source: str, chat: Chat) -> list[str]:
    """What transformers renders of the shapes that a caller could give, the usual one first."""
    prompts = []
    for no_content, text_arguments, no_tools in itertools.product((None, ""), (False, True), NO_TOOLS):
        context = plain_context(chat, text_arguments=text_arguments, no_content=no_content)
        messages, tools = context.pop("messages"), context.pop("tools") or no_tools
        options = {"add_generation_prompt": True, "bos_token": BOS, "eos_token": EOS, **context}
        try:
            rendered, _ = render_jinja_template([messages], tools=tools, chat_template=source, **options)
        except Exception:  # whatever a template does with values that it was not written for
            prompts.append(FAILED)
        else:
            prompts.append(str(rendered[0]))
    return prompts


def is_clean(prompt: str) -> bool:
    """False if a template printed a value as such instead of text: it was written for other values."""
    return not re.search(r"\bNone\b|^null\b|\{'town'", prompt, re.MULTILINE)


def test_equal_to_transformers(templates: dict[str, str]) -> None:
    """Where a template takes the usual shape, its prompt is that; else that of a shape that it takes."""
    differ, num_equal, num_refused = [], 0, 0
    for name, source in templates.items():
        template = ChatTemplate(source, bos_token=BOS, eos_token=EOS, origin=name)
        for label, chat in CHATS.items():
            usual, *others = references(source, chat)
            possible = [usual] if is_clean(usual) else [each for each in others if is_clean(each)] or [usual]
            try:
                prompt = template.render(chat.messages, tools=chat.tools, variables=chat.variables)
            except (ModelFormatError, UsageError) as error:
                assert str(error).startswith(name)
                num_refused += 1
                differ += [(name, label, str(error))] if possible != [FAILED] else []
                continue
            num_equal += prompt in possible
            differ += [(name, label, prompt)] if prompt not in possible else []
    print(f"{num_equal} equal, {num_refused} refused by both, {len(differ)} differ")
    assert not differ
    assert num_equal > 900


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case.name)
def test_hostile_templates_are_held(case: Case) -> None:
    assert check(case) is None


def test_plain_jinja2_holds_few_of_them() -> None:
    outcomes = [(case.kind, check_unguarded(case)) for case in cases()]
    assert sum(kind == "escape" and outcome == "it reached the canary" for kind, outcome in outcomes) > 30
    assert all(outcome for kind, outcome in outcomes if kind == "bomb")
