"""Hostile files of a Hugging Face folder beside the weights: configuration, tokenizer, template, strangers.

Each case is a sound folder but for one file. The same every time.
"""

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from scripts.scorecard.hostile_files import Content, Expected, Fifo, Hole, HostileCase
from scripts.scorecard.hostile_safetensors import folder_case, sound_folder

__all__ = ["any_of", "file_case", "hostile_folders"]

_SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "intermediate_size", "max_position_embeddings"),
)
_REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_Json = dict[str, Any]


def hostile_folders() -> list[HostileCase]:
    """More than 200 cases."""
    cases = [
        *_sound(),
        *_configs(),
        *_features(),
        *_experts(),
        *_texts(),
        *_generation(),
        *_tokenizer_configs(),
    ]
    return [*cases, *_templates(), *_strangers()]


def _config(
    name: str, change: _Json, field: str, expected: Expected = "refused", *, without: str = ""
) -> HostileCase:
    config = {**json.loads(sound_folder()["config.json"]), **change}
    config.pop(without, None)
    return file_case("config", name, "config.json", json.dumps(config).encode(), field, expected)


def _ids(name: str, change: _Json, field: str) -> HostileCase:
    """The end tokens of the configuration, which `generation_config.json` would replace."""
    case = _config(name, change, field)
    files = {path: content for path, content in case.files.items() if "generation_config" not in path}
    return replace(case, files=files)


def file_case(
    family: str,
    name: str,
    file: str,
    content: Content | None,
    field: str = "",
    expected: Expected = "refused",
    exit_code: int = 4,
) -> HostileCase:
    """The sound folder with one file of other content."""
    return folder_case(
        f"folder {family}", name, {file: content}, field or file, expected, exit_code=exit_code
    )


def _sound() -> Iterator[HostileCase]:
    yield _config("fields that nobody knows", {"x": [1, {"y": None}], "torch_dtype": "float64"}, "", "loads")
    yield _config("an id list", {"eos_token_id": [2, 0]}, "", "loads")
    for name in ("tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        yield file_case("sound", f"without {name}", name, None, "", "loads")
    for name in ("README.md", "model.py", "tokenmill.json", ".git/config"):
        yield file_case("sound", f"with {name}", name, b"{", "", "loads")


def _configs() -> Iterator[HostileCase]:
    """Every number of the configuration as what no number is, and as numbers that no model has."""
    wrong: tuple[Any, ...] = ("64", [64], {"a": 64}, True, -1, 0, 2.5, math.nan, math.inf, -math.inf)
    wrong += (1e308, 2**31, 2**63, 2**64, 10**300, "9" * 4000)
    for field in _SIZES:
        for value in wrong:
            yield _config(f"{field} is {str(value)[:20]!r}", {field: value}, field)
    for field in _REQUIRED:
        yield _config(f"{field} is null", {field: None}, field)
        yield _config(f"{field} is missing", {}, field, without=field)
    for field, values in (
        ("rms_norm_eps", (0, -1e-5, 1, "x", math.nan)),
        ("rope_theta", (0, -1, 1e300, "x", math.inf)),
    ):
        for value in values:
            yield _config(f"{field} is {value!r}", {field: value}, field)
    for field in ("bos_token_id", "eos_token_id"):
        for value in any_of(-1, 263, 2**63, 1.0, "2", True, {}, [[2]], [2, None, "x"], [0] * 65, [263]):
            yield _ids(f"{field} is {str(value)[:20]!r}", {field: value}, field)
    others: dict[str, tuple[int, ...]] = {"hidden_size": (128,), "num_hidden_layers": (1, 3, 1024)}
    others |= {"num_attention_heads": (3, 8, 1), "num_key_value_heads": (1, 3, 4), "head_dim": (14, 15, 32)}
    others |= {"vocab_size": (262, 264, 1 << 21), "intermediate_size": (64, 1 << 18)}
    for field, numbers in others.items():
        for number in numbers:
            yield _config(
                f"{field} is {number}, the tensors say another", {field: number}, f"{field}|tensor|tokenizer"
            )
    largest = {
        "num_hidden_layers": 1024,
        "hidden_size": 1 << 16,
        "vocab_size": 1 << 21,
        "intermediate_size": 1 << 18,
    }
    yield _config("the largest of all", largest, "tensor|head_dim")


def _features() -> Iterator[HostileCase]:
    """Features that change what is computed: each is known, or refused by its name."""
    changes: list[_Json] = [
        {"model_type": value} for value in any_of(None, 1, [], "", "x" * 10_000, "LLAMA", "../evil", "gpt2")
    ]
    changes += [{"hidden_act": value} for value in any_of(1, [], "nobody", "__import__('os')", {"a": 1})]
    changes += [{"tie_word_embeddings": value} for value in any_of(0, 1, "true", [], {})]
    changes += [
        {field: value} for field in ("attention_bias", "mlp_bias") for value in (True, "yes", 1.5, [1])
    ]
    changes += [{"quantization_config": value} for value in any_of({}, {"quant_method": "gptq"}, "x", [1])]
    changes += [{"sliding_window": value} for value in any_of(0, -1, 128, "x", [1])]
    changes += [
        {"rope_scaling": value}
        for value in any_of("x", [1], {"rope_type": "dynamic"}, {"rope_type": 1}, {"type": []})
    ]
    rope: list[_Json] = [{"rope_type": "linear"}, {"rope_type": "yarn", "factor": 2.0}]
    for value in (0, -1, math.nan, math.inf, "2", [2], 1e300, True):
        rope.append({"rope_type": "linear", "factor": value})
        rope.append({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": value})
    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "low_freq_factor": 4.0,
    }
    rope += [{**llama3, "high_freq_factor": value} for value in any_of(4.0, 1.0, math.nan, None, "x")]
    changes += [{"rope_scaling": value} for value in rope]
    changes += [{"partial_rotary_factor": value} for value in (0.5, "1", [1])]
    changes += [
        {"rope_interleaved": True},
        {"clip_qkv": 8},
        {"n_shared_experts": 2},
        {"num_local_experts": 8},
    ]
    for change in changes:
        ((field, value),) = change.items()
        fields = f"{field}|rope_type|factor|original|freq|tensor|attention_bias"
        yield _config(f"{field} is {str(value)[:140]!r}", change, fields)


def _experts() -> Iterator[HostileCase]:
    """Mixtures of experts, the largest of which have millions of tensors on paper."""
    for family in ("mixtral", "qwen3_moe", "olmoe"):
        count = "num_local_experts" if family == "mixtral" else "num_experts"
        base = {"model_type": family}
        yield _config(f"a {family} without experts", base, "tensor|expert|head_dim|rope|attention_bias")
        huge = {**base, count: 1024, "num_experts_per_tok": 2, "num_hidden_layers": 1024}
        yield _config(
            f"a {family} of a million experts", huge, "tensor|expert|layers|head_dim|attention_bias"
        )
        for value in (0, -1, 2**31, "8", math.nan, [8]):
            yield _config(f"a {family} of {value!r} experts", {**base, count: value}, count)
            yield _config(
                f"a {family} that takes {value!r}",
                {**base, count: 8, "num_experts_per_tok": value},
                "num_experts_per_tok",
            )
        yield _config(
            f"a {family} that takes more than it has",
            {**base, count: 2, "num_experts_per_tok": 3},
            "num_experts_per_tok",
        )
    for value in any_of("x", [1.5], {"a": 1}, [None], 7):
        change = {"model_type": "qwen3_moe", "mlp_only_layers": value}
        yield _config(f"mlp_only_layers is {value!r}", change, "mlp_only_layers")


def _texts() -> Iterator[HostileCase]:
    """Files that are no JSON object, or one of a size that none has."""
    texts: dict[str, Content] = {
        "nothing": b"",
        "no JSON": b"nobody",
        "a list": b"[]",
        "null": b"null",
        "an open object": b'{"model_type": "llama"',
        "no UTF-8": b'{"model_type": "\xff"}',
        "100,000 lists": b'{"a":' + b"[" * 100_000,
        "a megabyte of lists": b'{"a": [' + b"[]," * 340_000 + b"0]}",
        "a number of 5,000 digits": b'{"vocab_size": ' + b"9" * 5000 + b"}",
        "two megabytes": b'{"a": "' + b"x" * (2 << 20) + b'"}',
        "a hole of a terabyte": Hole(1 << 40),
        "a pickle": b"\x80\x04\x95\x10\x00\x00\x00",
        "a script": b"#!/bin/sh\ntouch canary\n",
    }
    for file in ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"):
        for name, content in texts.items():
            is_hole = isinstance(content, Hole)
            is_odd = name == "a megabyte of lists" and "_" in file
            expected: Expected = "either" if is_odd else "refused"
            field, exit_code = ("MB are needed", 5) if is_hole else (file, 4)
            yield file_case("text", f"{file}: {name}", file, content, field, expected, exit_code)
        yield file_case("text", f"{file}: a hole of 100 MB", file, Hole(100 << 20))
    yield file_case("text", "config.json is a pipe", "config.json", Fifo(), "config.json", exit_code=3)
    yield file_case("text", "without config.json", "config.json", None, exit_code=3)
    yield file_case("text", "without tokenizer.json", "tokenizer.json", None)
    yield file_case("text", "tokenizer.json is a pipe", "tokenizer.json", Fifo())
    yield file_case("text", "without model.safetensors", "model.safetensors", None)
    yield file_case("text", "model.safetensors is a pipe", "model.safetensors", Fifo())


def _generation() -> Iterator[HostileCase]:
    for value in any_of(-1, 263, 2**63, "2", 2.0, True, {}, [263], [[2]], list(range(65))):
        text = json.dumps({"eos_token_id": value}).encode()
        yield file_case(
            "generation", f"eos {str(value)[:30]!r}", "generation_config.json", text, "eos_token_id"
        )
    for key in ("temperature", "max_length", "num_beams", "bad_words_ids"):
        text = json.dumps({key: [1e999, "x", None]}).encode()
        yield file_case("generation", f"odd {key}", "generation_config.json", text, "", "loads")


def _tokenizer_configs() -> Iterator[HostileCase]:
    """`tokenizer_config.json`: template and tokens of other types than text."""
    own: _Json = json.loads(sound_folder()["tokenizer_config.json"])

    def case(name: str, change: _Json, expected: Expected = "refused") -> HostileCase:
        changes = {
            "tokenizer_config.json": json.dumps({**own, **change}).encode(),
            "chat_template.jinja": None,
        }
        return folder_case("folder tokenizer config", name, changes, "chat_template", expected)

    templates: tuple[Any, ...] = (1, True, {}, {"default": "x"}, 1.5)
    for value in templates:
        yield case(f"chat_template is {value!r}", {"chat_template": value})
    lists: tuple[Any, ...] = (
        [],
        [1],
        [{}],
        [{"name": "rag", "template": "x"}],
        [{"name": [], "template": "x"}],
    )
    for each in lists:
        yield case(f"chat_template is {each!r}", {"chat_template": each}, "either")
    for each in ([{"name": "default", "template": 1}], [{"name": "default", "template": ["x"]}]):
        yield case(f"chat_template is {each!r}", {"chat_template": each})
    sound = own["chat_template"] if isinstance(own.get("chat_template"), str) else "x"
    default = {"name": "default", "template": sound}
    bomb = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    for source in ("{% if %}", bomb, "{{ cycler.__init__.__globals__ }}", 1, None, ["x"], "x" * 300_000):
        use = {"name": "tool_use", "template": source}
        is_text = source is None or (isinstance(source, str) and len(source) < 1 << 18)
        expected: Expected = "loads" if is_text else "refused"  # rendered once there are tools
        for each in ([default, use], [use, default]):
            where = "before" if each[0] is use else "after"
            yield case(f"tool_use is {str(source)[:20]!r}, {where}", {"chat_template": each}, expected)
    for source in ("{% if %}", "{% if tools %}x", "{{ tools.__class__.__mro__[9] }}"):
        yield case(f"default is {source!r}", {"chat_template": [{"name": "default", "template": source}]})
    yield case("chat_template of 300,000 characters", {"chat_template": "x" * 300_000})
    for token in any_of(1, [], {"content": 1}, {"content": None}, {"a": "b"}, "x" * 100_000, True):
        yield case(f"bos_token is {str(token)[:20]!r}", {"bos_token": token}, "either")
    for name in ("tokenizer_class", "processor_class"):
        yield case(f"{name} of its own", {name: "EvilTokenizer"}, "either")


def any_of(*values: Any) -> tuple[Any, ...]:
    """Values of any types."""
    return values


def _templates() -> Iterator[HostileCase]:
    """Templates as files: the hundred of the templates' own corpus are apart."""
    texts: dict[str, bytes] = {
        "no UTF-8": b"\xff\xfe",
        "300,000 characters": b"x" * 300_000,
        "a syntax error": b"{% if %}",
        "a way to Python": b"{{ ().__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__ }}",
        "an include": b"{% include '/etc/passwd' %}",
        "an import": b"{% import 'os' as os %}",
    }
    for name, text in texts.items():
        yield file_case("template", name, "chat_template.jinja", text)
    yield file_case("template", "empty", "chat_template.jinja", b"", "", "loads")
    yield file_case("template", "zero bytes", "chat_template.jinja", b"a\0b", "", "either")
    yield file_case("template", "a hole of 10 MB", "chat_template.jinja", Hole(10 << 20))
    bomb = b"{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
    yield file_case("template", "a doubling", "chat_template.jinja", bomb, exit_code=7)


def _strangers() -> Iterator[HostileCase]:
    """Folders of other formats, and files where folders are."""
    for name in (
        "pytorch_model.bin",
        "model.pt",
        "model.pkl",
        "model.ckpt",
        "tf_model.h5",
        "flax_model.msgpack",
        "model.onnx",
    ):
        changes: dict[str, Content | None] = {"model.safetensors": None, name: b"\x80\x04N."}
        yield folder_case("folder stranger", f"weights in {name}", changes, "model.safetensors")
    nested = {f"in/folder/{name}": content for name, content in sound_folder().items()}
    yield HostileCase(
        family="folder stranger",
        name="a folder of a folder",
        files=nested,
        target="in",
        field="config.json",
        exit_code=3,
    )
    one = copy.copy(dict(sound_folder()))
    del one["config.json"]
    files: dict[str, Content] = {f"in/folder/{name}": content for name, content in one.items()}
    files["in/folder/config.json/x"] = b"{}"
    yield HostileCase(
        family="folder stranger",
        name="config.json is a folder",
        files=files,
        target="in/folder",
        field="config.json",
        exit_code=3,
    )
