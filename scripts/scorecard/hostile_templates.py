"""Hostile chat templates, made by hand: 50 that try to get out, 50 that try to take everything.

Each reaches us through one of the four doors of a template: GGUF metadata, `tokenizer_config.json` (its only
template, or the one for tools), `chat_template.jinja`. An escape tries to read or to touch a canary file; it
may render to harmless text, or fail with one error. A bomb must fail with one error, which names the file,
within a bound of time. No file may be left behind. `check_unguarded` is the control: the same template in
plain Jinja2, without sandbox or limits but those that keep this machine alive.
"""

import json
import resource
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal, NamedTuple

from scripts.scorecard.hostile_template_texts import BOMBS, ESCAPES
from tokenmill.core import Message, ModelFormatError, ResourceError, ToolCall
from tokenmill.models.chat.template import ChatTemplate
from tokenmill.models.formats.gguf import GgufFile
from tokenmill.models.store.directory import ModelDirectory

__all__ = ["Case", "cases", "check", "check_unguarded"]

Kind = Literal["escape", "bomb"]
Door = Literal["gguf", "tokenizer_config", "jinja", "tool_use"]

_DOORS: Final[tuple[Door, ...]] = ("gguf", "tokenizer_config", "jinja", "tool_use")
_SECRET: Final = "canary-7f3a"
_MAX_SECONDS: Final = 10.0
"""Of wall time on a busy machine, with the start of the process; of processor time it has a fraction."""

_CONTROL_SECONDS: Final = 2.0
_CONTROL_BYTES: Final = 1 << 30
_MESSAGES: Final = (
    Message(role="user", content="aaaaaaaa"),
    Message(
        role="assistant",
        content=None,
        tool_calls=(ToolCall(id="1", name="f", arguments='{"a": {"b": [1, "x"]}}'),),
    ),
    Message(role="tool", content="1000000000", name="f", tool_call_id="1"),
    Message(role="user", content="Hello"),
)
_TOOLS: Final = ({"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}},)


class Case(NamedTuple):
    """One template. `@CANARY@` and `@TOUCHED@` in it stand for files that it must not read, or make."""

    name: str
    template: str
    kind: Kind
    door: Door


def cases() -> Iterator[Case]:
    """All of them, the same every time."""
    for kind, templates in (("escape", ESCAPES), ("bomb", BOMBS)):
        for index, (name, template) in enumerate(templates.items()):
            yield Case(name, template, "escape" if kind == "escape" else "bomb", _DOORS[index % len(_DOORS)])


def check(case: Case) -> str | None:
    """Put the template where models have theirs, and render it: what went wrong, or None."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = _with_canary(case.template, folder)
        template = _through_door(case.door, source, folder)
        before = set(folder.iterdir())
        started = time.monotonic()
        try:
            text = template.render(_MESSAGES, tools=_TOOLS)
        except (ModelFormatError, ResourceError) as error:
            text, problem = "", _error_problem(str(error), template.chosen(_TOOLS).origin)
        except Exception as error:
            return f"raises {type(error).__name__}: {error}"[:300]
        else:
            problem = "" if case.kind == "escape" else "it was rendered"
        seconds = time.monotonic() - started
        made = sorted(path.name for path in set(folder.iterdir()) - before)
        if _SECRET in text or made:
            problem = f"it reached the canary {made}"
        if seconds > _MAX_SECONDS:
            problem = f"it took {seconds:.1f} s"
        return problem or None


def check_unguarded(case: Case) -> str | None:
    """The same without our guards, in a process that this machine survives: what went wrong, or None."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        request = json.dumps({"source": _with_canary(case.template, folder)})
        try:
            done = subprocess.run(
                [sys.executable, "-c", _CONTROL],
                input=request,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_CONTROL_SECONDS,
                preexec_fn=_keep_machine_alive,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"still running after {_CONTROL_SECONDS} s"
        if _SECRET in done.stdout or (folder / "touched").exists():
            return "it reached the canary"
        return f"exit code {done.returncode}" if done.returncode else None


_CONTROL: Final = """
import json, sys, jinja2
source = json.load(sys.stdin)["source"]
environment = jinja2.Environment()
environment.globals["raise_exception"] = lambda message: 1 / 0
call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": {"b": [1, "x"]}}}}
messages = [
    {"role": "user", "content": "aaaaaaaa"},
    {"role": "assistant", "content": None, "tool_calls": [call]},
    {"role": "tool", "content": "1000000000", "name": "f", "tool_call_id": "1"},
    {"role": "user", "content": "Hello"},
]
try:
    sys.stdout.write(environment.from_string(source).render(messages=messages, tools=[{}], bos_token=""))
except (jinja2.TemplateError, TypeError, ValueError, AttributeError, KeyError, IndexError, ImportError):
    pass
"""


def _keep_machine_alive() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_CONTROL_BYTES, _CONTROL_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))


def _with_canary(template: str, folder: Path) -> str:
    """The template with the places of a canary to read and of one to touch."""
    (folder / "canary").write_text(_SECRET)
    return template.replace("@CANARY@", str(folder / "canary")).replace("@TOUCHED@", str(folder / "touched"))


def _through_door(door: Door, source: str, folder: Path) -> ChatTemplate:
    """The template as the code that opens models finds it."""
    if door == "gguf":
        path = folder / "model.gguf"
        key, value = b"tokenizer.chat_template", source.encode()
        entry = struct.pack("<Q", len(key)) + key + struct.pack("<IQ", 8, len(value)) + value
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + entry + bytes(64))
        with GgufFile.open(path) as file:
            found = file.metadata["tokenizer.chat_template"]
            assert isinstance(found, str)
            return ChatTemplate(found, origin=f"{path}: tokenizer.chat_template")
    if door == "jinja":
        (folder / "chat_template.jinja").write_text(source, encoding="utf-8")
    else:
        two = [{"name": "default", "template": "x"}, {"name": "tool_use", "template": source}]
        config = {"chat_template": two if door == "tool_use" else source}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps(_CONFIG))
    template = ModelDirectory.open(folder).chat_template()
    assert template is not None
    return template


_CONFIG: Final = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


def _error_problem(message: str, origin: str) -> str:
    if not message.startswith(origin):
        return f"the error does not name the file: {message[:200]}"
    return "the error has several lines" if "\n" in message else ""
