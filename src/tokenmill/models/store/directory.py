"""One model on disk: the Hugging Face layout plus `tokenmill.json`.

    config.json  model.safetensors  tokenizer.json      what transformers and vLLM open, unchanged
    model.safetensors.index.json  model-0000i-of-0000n.safetensors    the weights instead, in shards
    tokenizer_config.json  chat_template.jinja  generation_config.json
    model.gguf                                          the quantised original, for its exact grid
    tokenmill.json                                      hashes, lineage, licences, declared costs

Opening reads the small files only; weights, tokenizer and template are opened when asked for. A folder
without a manifest opens too, but cannot be verified.
"""

import hashlib
import json
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final

from tokenmill.core.errors import ModelFormatError, NotFoundError, StorageError
from tokenmill.models.architecture import Architecture
from tokenmill.models.chat.template import MAX_TEMPLATE_CHARS, ChatTemplate
from tokenmill.models.files import disk_errors, hash_file
from tokenmill.models.formats.checkpoint import INDEX_NAME, WEIGHTS_NAME, Checkpoint, is_shard_name
from tokenmill.models.formats.convert import GgufWeights
from tokenmill.models.formats.gguf import GgufFile
from tokenmill.models.hf_config import load_json_object, read_architecture
from tokenmill.models.store.manifest import MANIFEST_NAME, Manifest
from tokenmill.models.text.tokenizer import Tokenizer
from tokenmill.models.weights import CheckpointWeights, WeightSource

__all__ = ["LAYOUT", "ModelDirectory", "is_layout_name", "layout_files"]

LAYOUT: Final = (
    "config.json",
    WEIGHTS_NAME,
    INDEX_NAME,
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "model.gguf",
)
"""Every file that is ever read from a model directory, besides shards and the manifest."""


class ModelDirectory:
    """An opened model directory."""

    def __init__(self, path: Path, architecture: Architecture, manifest: Manifest | None) -> None:
        self.path = path
        self.architecture = architecture
        self.manifest = manifest

    @classmethod
    def open(cls, path: Path) -> "ModelDirectory":
        """Read configuration and manifest.

        Raises NotFoundError if `path` is no model directory, ModelFormatError if its files are not usable.
        """
        if not (path / "config.json").is_file():
            raise NotFoundError(f"{path} is no model directory (it has no config.json)")
        source = str(path / "config.json")
        config = load_json_object(path / "config.json")
        if (path / "generation_config.json").is_file():
            config = _with_generation_ids(config, load_json_object(path / "generation_config.json"))
        architecture = read_architecture(config, source)
        has_manifest = (path / MANIFEST_NAME).is_file()
        return cls(path, architecture, Manifest.read(path) if has_manifest else None)

    @property
    def name(self) -> str:
        """The folder's name, which is the model's name in the store."""
        return self.path.name

    @cached_property
    def digest(self) -> str:
        """The model's identity, from the manifest; without one, from hashing every file (slow)."""
        if self.manifest is not None:
            return self.manifest.digest
        lines = (f"{name} {hash_file(self.path / name)}\n" for name in sorted(layout_files(self.path)))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def weights(self) -> WeightSource:
        """Open the weights and check that they are the architecture's, tensor by tensor (shapes only).

        Raises ModelFormatError naming the tensor that is missing, extra or of another shape.
        """
        checkpoint = Checkpoint.open(self.path)
        found = {name: checkpoint.shape(name) for name in checkpoint.names()}
        expected = self.architecture.stored_shapes()
        for name in sorted(set(found) ^ set(expected)):
            problem = "is missing" if name in expected else "does not belong to the architecture"
            raise ModelFormatError(f"{checkpoint.path}: tensor {name} {problem}")
        for name, shape in expected.items():
            if found[name] != shape:
                raise ModelFormatError(f"{checkpoint.path}: tensor {name} is {found[name]}, expected {shape}")
        has_grid = self.manifest is not None and self.manifest.grid_file
        return CheckpointWeights(checkpoint, self.architecture, self._open_grids if has_grid else None)

    def tokenizer(self) -> Tokenizer:
        """Read the tokenizer. Raises ModelFormatError if it has more tokens than the model has embeddings."""
        tokenizer = Tokenizer.from_file(self.path / "tokenizer.json")
        if tokenizer.vocab_size > self.architecture.vocab_size:
            raise ModelFormatError(
                f"{self.path / 'tokenizer.json'}: {tokenizer.vocab_size} tokens, the model has "
                f"{self.architecture.vocab_size} embeddings",
                hint="tokenizer and weights belong to different models",
            )
        return tokenizer

    def chat_template(self) -> ChatTemplate | None:
        """The chat template, each time the same; None if the model has none (a base model)."""
        return self._chat_template

    @cached_property
    def _chat_template(self) -> ChatTemplate | None:
        path = self.path / "tokenizer_config.json"
        config = load_json_object(path) if path.is_file() else {}
        tokens = _special_tokens(config, path)
        sources, origin = self._template_sources(config)

        def template(name: str, for_tools: ChatTemplate | None = None) -> ChatTemplate | None:
            if name not in sources:
                return None
            what = f"{origin} {name!r}" if len(sources) > 1 else origin
            return ChatTemplate(sources[name], for_tools=for_tools, origin=what, **tokens)

        return template("default", for_tools=template("tool_use"))

    def verify(self, progress: Callable[[str, int, int], None] = lambda *_: None) -> None:
        """Compare every file with the manifest's SHA-256; `progress` gets (file, bytes done, bytes).

        Raises StorageError naming the first file that is missing, different, or read but not listed, and
        NotFoundError if there is no manifest to compare with.
        """
        if self.manifest is None:
            raise NotFoundError(f"{self.path} has no {MANIFEST_NAME}, so nothing to verify against")
        hint = "get the model again: tokenmill pull"
        for name, entry in self.manifest.files.items():
            path = self.path / name
            if not path.is_file() or path.stat().st_size != entry.num_bytes:
                raise StorageError(f"{path} is missing or not {entry.num_bytes} bytes long", hint=hint)
            report = partial(_report, progress, name, entry.num_bytes)
            if hash_file(path, report) != entry.sha256:
                raise StorageError(f"{path} does not match its SHA-256 in {MANIFEST_NAME}", hint=hint)
        for name in layout_files(self.path):
            if name not in self.manifest.files:
                raise StorageError(f"{self.path / name} is not listed in {MANIFEST_NAME}", hint=hint)

    def _open_grids(self) -> WeightSource:
        """The quantised original, of which the manifest says that the weights are a rounding."""
        assert self.manifest is not None
        return GgufWeights(GgufFile.open(self.path / self.manifest.grid_file), self.architecture)

    def _template_sources(self, config: dict[str, Any]) -> tuple[dict[str, str], str]:
        """Templates by name, and where they are from: a file for one, else `tokenizer_config.json`."""
        path = self.path / "chat_template.jinja"
        if path.is_file():
            with disk_errors(path), path.open("rb") as file:
                data = file.read(4 * MAX_TEMPLATE_CHARS + 1)
            try:
                return {"default": data.decode("utf-8")}, str(path)
            except UnicodeDecodeError as error:
                raise ModelFormatError(f"{path}: not UTF-8") from error
        origin = f"{self.path / 'tokenizer_config.json'}: chat_template"
        value = config.get("chat_template")
        given = value if isinstance(value, list) else [{"name": "default", "template": value}]
        sources = {}
        for each in given:
            if isinstance(each, dict) and each.get("name") in ("default", "tool_use"):
                sources[each["name"]] = each.get("template")
        if any(not isinstance(source, str | None) for source in sources.values()):
            raise ModelFormatError(f"{origin} is no text")
        return {name: source for name, source in sources.items() if source is not None}, origin


def is_layout_name(name: str) -> bool:
    """Whether a file of this name is ever read from a model directory."""
    return name in LAYOUT or is_shard_name(name)


def layout_files(folder: Path) -> list[str]:
    """Names of the files in `folder` that belong to a model: those of `LAYOUT` in its order, then shards.

    Raises StorageError if the folder cannot be read.
    """
    with disk_errors(folder):
        shards = sorted(path.name for path in folder.iterdir() if is_shard_name(path.name))
    return [name for name in (*LAYOUT, *shards) if (folder / name).is_file()]


def _report(progress: Callable[[str, int, int], None], name: str, num_bytes: int, done: int) -> None:
    progress(name, done, num_bytes)


def _with_generation_ids(config: dict[str, Any], generation: dict[str, Any]) -> dict[str, Any]:
    """The configuration with `generation_config.json`'s end tokens first: that file is about generating."""
    eos = generation.get("eos_token_id")
    return config if eos is None else {**config, "eos_token_id": eos}


def _special_tokens(config: dict[str, Any], path: Path) -> dict[str, str]:
    """The control tokens that have a name, such as `bos_token`, which a template may write."""
    tokens = {name: _token_text(value) for name, value in config.items() if name.endswith("_token")}
    try:
        json.dumps(tokens, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ModelFormatError(f"{path}: a token has half of a surrogate pair") from error
    return {name: text for name, text in tokens.items() if text}


def _token_text(value: object) -> str:
    """A token in `tokenizer_config.json`: text, an object with `content`, or null."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else ""
