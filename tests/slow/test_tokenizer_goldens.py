"""Vocabularies of real models: llama.cpp's golden token ids, which the models' own tokenizers have made.

They lie in the source package of llama-cpp-python, which is fetched once into a cache folder, or in the
folder that TOKENMILL_TEST_VOCABS names (the package's `vendor/llama.cpp/models`). Nothing of it is kept here.
"""

import os
import subprocess
import sys
import tarfile
import unicodedata
from collections.abc import Mapping
from pathlib import Path

import pytest
import tokenizers

from scripts.scorecard import s24
from scripts.scorecard.vocabularies import KINDS
from tests.fast.tokenizer_texts import many_scripts
from tokenmill.core import ModelFormatError
from tokenmill.models.formats.gguf import GgufFile
from tokenmill.models.text.tokenizer import Tokenizer

PACKAGE = "llama-cpp-python==0.3.36"
FOLDER = "vendor/llama.cpp/models/"
SEPARATOR = "\n__ggml_vocab_test__\n"
GOLDENS = (
    *("command-r", "deepseek-coder", "deepseek-llm", "falcon", "gemma-4", "gpt-2", "llama-bpe", "llama-spm"),
    *("mpt", "phi-3", "qwen2", "refact", "starcoder"),
)
NFC = ("command-r", "mpt", "qwen2")
# Falcon's vocabulary has no token for these, and no token for what is unknown: its tokenizer drops them.
LACKING = {"falcon": dict.fromkeys(map(ord, "\x03\x04\x05\x0b\x11\x13\x14\x15\x16\x17\x19\x1c\x1d\x1e"))}
SPACE_SIGN = ("gemma-4", "llama-spm", "phi-3")
PREFIXES = {
    "command-r": 5,
    "deepseek-coder": 32013,
    "deepseek-llm": 100000,
    "gemma-4": 2,
    "llama-bpe": 128000,
    "llama-spm": 1,
    "phi-3": 1,
}
REFUSED = {
    "aquila": "tokenizer.ggml.pre is missing",
    "gpt-neox": "tokenizer.ggml.pre is missing",
    "bert-bge": "tokenizer.ggml.model is 'bert'",
    "qwen35": "tokenizer.ggml.pre is 'qwen35'",
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the vocabularies."""
    given = os.environ.get("TOKENMILL_TEST_VOCABS")
    if given:
        return Path(given)
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokenmill" / "tests"
    cache = root / PACKAGE.replace("==", "-")
    if not cache.is_dir():
        _fetch(cache, tmp_path_factory.mktemp("package"))
    return cache


def _fetch(cache: Path, scratch: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["--no-binary", ":all:", "--dest", str(scratch), PACKAGE]
    # pip builds the package's metadata after the download; that may fail, the archive is there all the same.
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = list(scratch.glob("*.tar.gz"))
    if not archives:
        pytest.skip(f"{PACKAGE} cannot be fetched: {done.stderr.strip()[-200:]}")
    unpacked = scratch / "models"
    unpacked.mkdir()
    with tarfile.open(archives[0]) as archive:
        for member in archive:
            name = Path(member.name).name
            if member.isfile() and FOLDER + name in member.name and name.startswith("ggml-vocab-"):
                content = archive.extractfile(member)
                assert content is not None
                (unpacked / name).write_bytes(content.read())
    cache.parent.mkdir(parents=True, exist_ok=True)
    unpacked.rename(cache)


@pytest.fixture(scope="module")
def vocabularies(folder: Path) -> dict[str, Tokenizer]:
    """Opened once: that takes most of the time."""
    return s24.real_vocabularies(folder)


def comes_back_as(name: str, text: str) -> str:
    normal = unicodedata.normalize("NFC", text) if name in NFC else text.translate(LACKING.get(name, {}))
    return normal.replace("▁", " ") if name in SPACE_SIGN else normal


@pytest.mark.parametrize("name", GOLDENS)
def test_goldens(folder: Path, vocabularies: Mapping[str, Tokenizer], tmp_path: Path, name: str) -> None:
    tokenizer = vocabularies[name]
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_json())
    rebuilt, library = Tokenizer.from_file(path), tokenizers.Tokenizer.from_file(str(path))
    inputs = (folder / f"ggml-vocab-{name}.gguf.inp").read_bytes().decode().split(SEPARATOR)
    lines = (folder / f"ggml-vocab-{name}.gguf.out").read_text().splitlines()
    texts = inputs[: len(lines)]
    assert len(texts) >= 46 and "".join(inputs[len(lines) :]) == ""
    for text, line in zip(texts, lines, strict=True):
        expected = [int(each) for each in line.split()]
        assert tokenizer.encode(text) == rebuilt.encode(text) == expected
        assert library.encode(text, add_special_tokens=False).ids == expected
    prefix = (PREFIXES[name],) if name in PREFIXES else ()
    assert tokenizer.prompt_prefix == rebuilt.prompt_prefix == prefix
    for text in many_scripts(1000):
        if name == "phi-3" and "</s>" in text:
            continue  # no control token there, but one that takes the white space behind it along
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == comes_back_as(name, text)
        assert not any(map(tokenizer.is_special, ids))
        after = b"".join(map(tokenizer.token_bytes, tokenizer.encode_after(text))).decode()
        assert after == comes_back_as(name, text)


@pytest.mark.parametrize("name", ["baichuan", "nomic-bert-moe"])
def test_vocabularies_without_goldens(vocabularies: Mapping[str, Tokenizer], name: str) -> None:
    """SentencePiece's BPE with byte tokens; Unigram with NFKC and none, so some characters are unknown."""
    tokenizer = vocabularies[name]
    for text in ("Hello, world", "Größe und Öl", "二つの 製粉所"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("name", REFUSED)
def test_refused(folder: Path, name: str) -> None:
    with (
        GgufFile.open(folder / f"ggml-vocab-{name}.gguf") as gguf,
        pytest.raises(ModelFormatError, match=REFUSED[name]),
    ):
        Tokenizer.from_gguf(gguf)


def test_control_tokens_of_real_vocabularies(
    vocabularies: Mapping[str, Tokenizer], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENMILL_TEST_VOCABS", str(folder))
    monkeypatch.setattr(s24, "real_vocabularies", lambda folder: vocabularies)
    line = s24.run(cases=1000, seed=3, guard=True)
    assert line.violations == 0 and line.figures["vocabularies"] == len(KINDS) + len(vocabularies)
