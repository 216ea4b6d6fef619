"""Hostile folders of several files of weights, and links that leave a folder."""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from scripts.scorecard.hostile_files import Content, Expected, HostileCase, Link
from scripts.scorecard.hostile_safetensors import folder_case, sound_folder, weights_parts, with_header

__all__ = ["hostile_shards"]

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def hostile_shards() -> list[HostileCase]:
    """About 90 cases."""
    return [*_shards(), *_links()]


def _shards() -> Iterator[HostileCase]:
    """Sharded checkpoints: an index that climbs, and shards that are missing, double or another's."""
    first, second, index = _sharded()
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    sharded: dict[str, Content | None] = {_WEIGHTS: None, names[0]: first, names[1]: second}
    fields = r"model\.safetensors|weight_map|model-0|shard|tensor"

    def case(name: str, files: Mapping[str, Content | None], expected: Expected = "refused") -> HostileCase:
        return folder_case("shards", name, {**sharded, **files}, fields, expected)

    def mapped(shard: object) -> bytes:
        wrong = copy.deepcopy(index)
        wrong["weight_map"]["model.norm.weight"] = shard
        return json.dumps(wrong).encode()

    yield case("as it is", {_INDEX: json.dumps(index).encode()}, "loads")
    paths: list[object] = [
        "../secret.safetensors",
        "/etc/passwd",
        "..",
        "",
        ".",
        "./",
        "a/b.safetensors",
        "~/x",
    ]
    paths += ["..\\x.safetensors", "C:\\x.safetensors", "model-00003-of-00002.safetensors", "config.json"]
    paths += ["hf://other/model/model.safetensors", "https://example.com/x.safetensors", "file:///etc/passwd"]
    paths += [
        "model-00001-of-00002.safetensors\0",
        "con.safetensors",
        "-rf.safetensors",
        "pytorch_model.bin",
        "x" * 5000,
    ]
    paths += [None, 1, [], {}, ["model-00001-of-00002.safetensors"], True]
    outside = {"outside/secret.safetensors": second, "in/secret.safetensors": second}
    for path in paths:
        changed = {**sharded, _INDEX: mapped(path)}
        yield folder_case("shards", f"mapped to {str(path)[:40]!r}", changed, fields, others=outside)
    yield case("mapped to the other", {_INDEX: mapped(names[0])})
    sound = json.dumps(index).encode()
    yield case("without the first", {_INDEX: sound, names[0]: None})
    yield case("without the second", {_INDEX: sound, names[1]: None})
    yield case("without an index", {})
    yield case("the first twice", {_INDEX: sound, names[1]: first})
    yield case("an empty shard", {_INDEX: sound, names[1]: b""})
    yield case("a shard cut short", {_INDEX: sound, names[1]: second[:-1]})
    yield case("a shard of another model", {_INDEX: sound, names[1]: with_header(text=b"{}", data=b"")})
    yield case("a shard that is a link to the other", {_INDEX: sound, names[1]: Link(names[0])})
    yield case("a shard that is a link outside", {_INDEX: sound, names[1]: Link("../../outside/secret")})
    yield case("a shard that has all", {_INDEX: sound, names[1]: sound_folder()[_WEIGHTS]})
    yield from (case(name, {_INDEX: text}) for name, text in _indices(index))
    both = {_WEIGHTS: sound_folder()[_WEIGHTS], _INDEX: mapped("../secret.safetensors")}
    yield folder_case("shards", "whole, with an index that climbs", both, fields, "either")


def _indices(index: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Indices that are none."""
    values: list[Any] = [
        None,
        1,
        "x",
        [],
        {},
        {"weight_map": None},
        {"weight_map": []},
        {"weight_map": {}},
        {"weight_map": "x"},
    ]
    yield from ((f"an index of {str(value)[:30]}", json.dumps(value).encode()) for value in values)
    texts = json.dumps(index)
    yield "an index cut short", texts[: len(texts) // 2].encode()
    yield "an index of another encoding", texts.encode("utf-16")
    yield "an index nested without end", b'{"weight_map": ' * 50_000
    yield (
        "an index that has a key twice",
        texts.replace('{"model.embed', '{"model.norm.weight": "../x", "model.embed').encode(),
    )
    extra = copy.deepcopy(dict(index))
    extra["weight_map"]["evil"] = "model-00001-of-00002.safetensors"
    yield "an index with one tensor more", json.dumps(extra).encode()
    lacking = copy.deepcopy(dict(index))
    del lacking["weight_map"]["model.norm.weight"]
    yield "an index with one tensor less", json.dumps(lacking).encode()
    many = {**index["weight_map"], **{f"t{at}": f"model-{at:05}-of-99999.safetensors" for at in range(9000)}}
    yield "an index of 9,000 shards", json.dumps({"weight_map": many}).encode()


@cache
def _sharded() -> tuple[bytes, bytes, dict[str, Any]]:
    """The sound weights as two shards, and their index."""
    header, data = weights_parts()
    names = [name for name in header if name != "__metadata__"]
    half = len(names) // 2
    shards = [_shard(header, data, names[:half]), _shard(header, data, names[half:])]
    files = [f"model-0000{at + 1}-of-00002.safetensors" for at in range(2)]
    weight_map = {name: files[at >= half] for at, name in enumerate(names)}
    return shards[0], shards[1], {"metadata": {"total_size": len(data)}, "weight_map": weight_map}


def _shard(header: Mapping[str, Any], data: bytes, names: Sequence[str]) -> bytes:
    out: dict[str, Any] = {}
    stored = b""
    for name in names:
        first, last = header[name]["data_offsets"]
        out[name] = {**header[name], "data_offsets": [len(stored), len(stored) + last - first]}
        stored += data[first:last]
    return with_header(text=json.dumps(out).encode(), data=stored)


def _links() -> Iterator[HostileCase]:
    """Symbolic links: those of a hub's cache are followed, those that leave the folder are not."""
    sound = sound_folder()
    secret = {"outside/secret": b"{}", "outside/weights": sound[_WEIGHTS], "outside/folder/x": b""}
    for name in (_WEIGHTS, "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        for target in (
            "/etc/passwd",
            "../../outside/weights",
            "/proc/self/environ",
            "/dev/zero",
            name,
            "nowhere",
        ):
            is_gone = target in ("/dev/zero", name, "nowhere") and "_" in name  # no file: left out
            case = folder_case("link", f"{name} to {target}", {name: Link(target)}, "", others=secret)
            expected: Expected = "either" if is_gone else "refused"
            exit_code = 3 if name == "config.json" and target in ("/dev/zero", name, "nowhere") else 4
            yield HostileCase(**{**vars(case), "expected": expected, "exit_code": exit_code})
    moved = {f"in/hub/blobs/{at:064x}": content for at, content in enumerate(sound.values())}
    links = {f"in/hub/snapshots/abc/{name}": Link(f"../../blobs/{at:064x}") for at, name in enumerate(sound)}
    hub = HostileCase(
        family="link",
        name="a hub's cache",
        files={**moved, **links},
        target="in/hub/snapshots/abc",
        expected="loads",
    )
    yield hub
    inside: dict[str, Content] = {"real.json": sound["config.json"], "config.json": Link("real.json")}
    yield folder_case("link", "within the folder", inside, "", "loads")
