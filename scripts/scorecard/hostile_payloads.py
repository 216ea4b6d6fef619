"""Models that carry code: pickles under every name, polyglots, modules wherever others would load them.

Each would create a canary file if anything of it ran. Folders that are sound beside their payload must load
all the same: foreign code is left where it is.
"""

import io
import json
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

from scripts.scorecard.gguf_cases import small_gguf
from scripts.scorecard.hostile_files import CANARY, Content, Expected, HostileCase
from scripts.scorecard.hostile_safetensors import folder_case, sound_folder

__all__ = ["hostile_payloads", "pickles"]

_TOUCH = f"touch {CANARY}"
_MODULE = f"open({CANARY!r}, 'w').close()\nclass Evil: pass\n".encode()
_CHECKPOINTS = ("pytorch_model.bin", "model.pt", "model.pkl", "model.ckpt", "consolidated.00.pth")
_COMPANIONS = ("training_args.bin", "optimizer.pt", "rng_state.pth", "scheduler.pt", "adapter_model.bin")
_MODULES = (
    "__init__.py",
    "conftest.py",
    "sitecustomize.py",
    "usercustomize.py",
    "setup.py",
    "numpy.py",
    "json.py",
)
_SLOTS = (
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoTokenizer",
    "AutoProcessor",
    "AutoImageProcessor",
)


def hostile_payloads() -> list[HostileCase]:
    """More than 50 cases."""
    return [*_pickle_cases(), *_zip_cases(), *_module_cases()]


def pickles() -> dict[str, bytes]:
    """Streams that run a command when they are loaded, by how they do it."""
    command = _TOUCH.encode()
    code = f"open({CANARY!r}, 'w').close()".encode()
    short = bytes([len(command)]) + command
    return {
        "protocol 0": b"cos\nsystem\n(S'" + command + b"'\ntR.",
        "protocol 2": b"\x80\x02cos\nsystem\nU" + short + b"\x85R.",
        "protocol 4": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c" + short + b"\x85R.",
        "INST": b"(S'" + command + b"'\nios\nsystem\n.",
        "OBJ": b"(cos\nsystem\nS'" + command + b"'\no.",
        "exec": b"cbuiltins\nexec\n(S'" + code.replace(b"'", b'"') + b"'\ntR.",
        "eval": b"cbuiltins\neval\n(S'" + code.replace(b"'", b'"') + b"'\ntR.",
        "subprocess": b"csubprocess\ncheck_call\n((S'touch'\nS'" + CANARY.encode() + b"'\nltR.",
    }


def _weights_only(family: str, name: str, content: bytes) -> HostileCase:
    return folder_case(
        family, f"only {name}", {"model.safetensors": None, name: content}, r"model\.safetensors"
    )


def _pickle_cases() -> Iterator[HostileCase]:
    for how, stream in pickles().items():
        for file in ("model.safetensors", "config.json", "tokenizer.json"):
            exit_code = 4
            yield folder_case("payload pickle", f"{how} as {file}", {file: stream}, file, exit_code=exit_code)
        for target in ("in/hostile.gguf", "in/pytorch_model.bin"):
            yield _file("pickle", f"{how} as {target}", target, stream)
        yield _file("pickle", f"{how} before a GGUF", "in/hostile.gguf", stream + small_gguf())
    stream = pickles()["protocol 2"]
    for name in _CHECKPOINTS:
        yield _weights_only("payload pickle", name, stream)
    for name in (*_CHECKPOINTS, *_COMPANIONS):
        changes: Mapping[str, Content] = {name: stream}
        yield folder_case("payload pickle", f"{name} beside sound weights", changes, "", "loads")


def _zip_cases() -> Iterator[HostileCase]:
    """torch's own format is a ZIP with a pickle in it."""
    checkpoint = _zipped({"archive/data.pkl": pickles()["protocol 2"], "archive/version": b"3\n"})
    for target in ("in/hostile.gguf", "in/model.pt", "in/model.safetensors"):
        yield _file("polyglot", f"a torch checkpoint as {target}", target, checkpoint)
    sound = sound_folder()["model.safetensors"]
    both = {"a ZIP": checkpoint, "a torch checkpoint behind the weights": sound + checkpoint}
    for name, content in both.items():
        yield folder_case(
            "payload polyglot", f"{name}, safetensors", {"model.safetensors": content}, "header|file"
        )
    yield _file("polyglot", "a torch checkpoint behind a GGUF", "in/hostile.gguf", small_gguf() + checkpoint)
    array = (
        b"\x93NUMPY\x01\x00\x36\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,)}\n"
        + pickles()["protocol 2"]
    )
    yield _weights_only("payload polyglot", "model.npy", array)
    yield _file("polyglot", "an array of objects", "in/hostile.gguf", array)


def _module_cases() -> Iterator[HostileCase]:
    """`auto_map` and its kin, in every slot, in every file; and modules that shadow others."""
    modules: dict[str, Content] = {
        f"{name}_evil.py": _MODULE for name in ("configuration", "modeling", "tokenization")
    }
    config, tokens = (json.loads(sound_folder()[name]) for name in ("config.json", "tokenizer_config.json"))

    def case(name: str, file: str, value: dict[str, Any], expected: Expected = "loads") -> HostileCase:
        return folder_case("payload code", name, {**modules, file: json.dumps(value).encode()}, "", expected)

    for slot in _SLOTS:
        for where in ("modeling_evil.Evil", "evil/other--modeling_evil.Evil", "../modeling_evil.Evil"):
            remote = {"auto_map": {slot: where}, "trust_remote_code": True}
            yield case(f"{slot} in config.json is {where}", "config.json", {**config, **remote})
    pair = {"auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"]}}
    yield case("AutoTokenizer in tokenizer_config.json", "tokenizer_config.json", {**tokens, **pair})
    yield case(
        "a tokenizer class", "tokenizer_config.json", {**tokens, "tokenizer_class": "tokenization_evil.Evil"}
    )
    yield case("architectures", "config.json", {**config, "architectures": ["modeling_evil.Evil"]})
    pipelines = {"custom_pipelines": {"x": {"impl": "modeling_evil.Evil", "pt": ["AutoModel"]}}}
    yield case("a pipeline", "config.json", {**config, **pipelines})
    yield case("a generation of its own", "generation_config.json", {"custom_generate": "modeling_evil"})
    yield case(
        "a processor", "preprocessor_config.json", {"auto_map": {"AutoProcessor": "modeling_evil.Evil"}}
    )
    for name in _MODULES:
        beside: dict[str, Content] = {name: _MODULE, "evil.pth": b"import modeling_evil\n"}
        yield folder_case("payload code", f"a module {name}", beside, "", "loads", others={name: _MODULE})


def _file(family: str, name: str, target: str, content: bytes) -> HostileCase:
    return HostileCase(
        family=f"payload {family}",
        name=name,
        files={target: content},
        target=target,
        field="magic|file|empty",
    )


def _zipped(members: Mapping[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return out.getvalue()
