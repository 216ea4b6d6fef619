"""Templates that try to get out, or to take everything: each wall alone holds them, and none is for show."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from scripts.scorecard.hostile_template_texts import ESCAPES
from scripts.scorecard.hostile_templates import Case, cases, check, check_unguarded
from tokenmill.core import Message, ModelFormatError, ResourceError
from tokenmill.models.chat import process as template_process
from tokenmill.models.chat import worker as template_worker
from tokenmill.models.chat.template import ChatTemplate

HELLO = [Message(role="user", content="Hello")]
CASES = list(cases())
SAMPLE = CASES[::12]


def test_there_are_enough() -> None:
    kinds = [case.kind for case in CASES]
    assert kinds.count("escape") >= 50 and kinds.count("bomb") >= 50
    assert len({case.template for case in CASES}) == len(CASES)
    assert {case.door for case in CASES} == {"gguf", "tokenizer_config", "jinja", "tool_use"}


@pytest.mark.parametrize("case", SAMPLE, ids=[case.name for case in SAMPLE])
def test_a_sample_is_held(case: Case) -> None:
    assert check(case) is None


@pytest.mark.parametrize("name", ["lipsum os", "doubling by +"])
def test_plain_jinja2_does_not_hold_them(name: str) -> None:
    (case,) = [case for case in CASES if case.name == name]
    assert check_unguarded(case)


# A worker in which some walls are down. What the template reaches for is a function of Python's.
BROKEN_WORKER = """
import sys, types
sys.path.insert(0, {folder!r})
import worker
down = {down!r}
if "sandbox" in down:
    worker.TemplateEnvironment.is_safe_attribute = lambda *_: True
    worker.TemplateEnvironment.is_safe_callable = lambda *_: True
if "audit" in down:
    worker._end_at_event = lambda *_: None
if "descriptors" in down:
    limits = worker.resource
    settings = {{name: getattr(limits, name) for name in dir(limits)}}
    settings["setrlimit"] = lambda kind, value: value == (0, 0) or limits.setrlimit(kind, value)
    worker.resource = types.SimpleNamespace(**settings)
worker.serve()
"""


def render_with_walls_down(
    down: Sequence[str], name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> bool:
    """True if the template reached its canary."""
    script = folder / "worker.py"
    script.write_text(
        BROKEN_WORKER.format(folder=str(Path(template_worker.__file__).parent), down=tuple(down))
    )
    monkeypatch.setattr(template_process, "_WORKER", script)
    (folder / "canary").write_text("secret")
    source = ESCAPES[name].replace("@CANARY@", str(folder / "canary"))
    source = source.replace("@TOUCHED@", str(folder / "touched"))
    try:
        text = ChatTemplate(source).render(HELLO)
    except (ModelFormatError, ResourceError):
        text = ""
    return text == "secret" or (folder / "touched").exists()


@pytest.mark.parametrize("name", ["cycler builtins", "lipsum os"])
@pytest.mark.parametrize("standing", ["sandbox", "audit", "descriptors", "none"])
def test_each_wall_alone_holds(
    name: str, standing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    down = [wall for wall in ("sandbox", "audit", "descriptors") if wall != standing]
    assert render_with_walls_down(down, name, tmp_path, monkeypatch) == (standing == "none")


def test_the_worker_sees_no_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "secret")
    monkeypatch.setitem(ESCAPES, "environment", "{{ lipsum.__globals__.os.environ['API_KEY'] }}")
    down = ("sandbox", "audit", "descriptors")
    assert not render_with_walls_down(down, "environment", tmp_path, monkeypatch)
    monkeypatch.setattr(template_process, "_KEPT_VARIABLES", ("API_KEY",))
    assert render_with_walls_down(down, "environment", tmp_path, monkeypatch)


DOUBLING = (
    "{% set n = namespace(x='a') %}{% for _ in range(26) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
    "{{ n.x|length }}"
)
COUNTING = "{% for a in range(2000) %}{% for b in range(2000) %}{% endfor %}{% endfor %}done"


def test_memory_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ResourceError, match="MemoryError"):
        ChatTemplate(DOUBLING).render(HELLO)
    monkeypatch.setattr(template_process, "_MEMORY_BYTES", 1 << 30)
    assert ChatTemplate(DOUBLING).render(HELLO) == str(1 << 26)


# `ulimit -v` before tokenmill is started: a hard limit, which no process may raise again.
LIMITED_WORKER = """
import resource, sys
sys.path.insert(0, {folder!r})
import worker
resource.setrlimit(resource.RLIMIT_AS, ({limit}, {limit}))
worker.serve()
"""


@pytest.mark.parametrize("limit", [80 << 20, 1 << 30, 1 << 40])
def test_a_limit_of_the_user_is_kept(limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(Path(template_worker.__file__).parent)
    script = tmp_path / "worker.py"
    script.write_text(LIMITED_WORKER.format(folder=folder, limit=limit))
    monkeypatch.setattr(template_process, "_WORKER", script)
    template = ChatTemplate("{{ messages[0].content }}")
    assert [template.render(HELLO) for _ in range(2)] == ["Hello", "Hello"]
    with pytest.raises(ResourceError, match="MemoryError"):
        ChatTemplate(DOUBLING).render(HELLO)
    monkeypatch.setattr(template_process, "_MEMORY_BYTES", 1 << 29)  # the lower of the two holds
    if limit == 80 << 20:
        with pytest.raises(ResourceError, match="MemoryError"):
            ChatTemplate(DOUBLING).render(HELLO)
    else:
        assert ChatTemplate(DOUBLING).render(HELLO) == str(1 << 26)


def test_processor_time_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_process, "_SECONDS", 0.02)
    with pytest.raises(ResourceError, match="processor time"):
        ChatTemplate(COUNTING).render(HELLO)
    monkeypatch.setattr(template_process, "_SECONDS", 60.0)
    assert ChatTemplate(COUNTING).render(HELLO) == "done"


def test_waiting_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "worker.py"
    script.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(template_process, "_WORKER", script)
    monkeypatch.setattr(template_process, "_WAIT_SECONDS", 0.3)
    with pytest.raises(ResourceError, match="no answer within"):
        ChatTemplate("x").render(HELLO)


def test_nothing_is_left_running(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_process, "_SECONDS", 0.05)
    template = ChatTemplate(COUNTING * 9)
    with pytest.raises(ResourceError):
        template.render(HELLO)
    assert template._process._child is None
    template = ChatTemplate("x")
    template.render(HELLO)
    child = template._process._child
    assert child is not None and child.poll() is None
    del template
    assert child.poll() is not None
