"""`tokenmill show`: what a model is, what a token of it costs, and where it came from."""

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tokenmill.cli.arguments import WEIGHTS, Subparsers, add_command, add_model_argument, open_model
from tokenmill.cli.output import Output, format_bytes, format_count, format_table

if TYPE_CHECKING:
    from tokenmill.models.directory import ModelDirectory

__all__ = ["add_parser", "weight_bytes"]

_DESCRIPTION = """\
Architecture, costs, licence, lineage and hashes of a model. Bytes of a weight format are those of the
matrices that one generated token reads. FLOPs count two for a multiply-accumulate.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add `show`."""
    parser = add_command(
        subparsers, "show", _show, summary="what a model is and what it costs", description=_DESCRIPTION
    )
    add_model_argument(parser)


def weight_bytes(model: "ModelDirectory") -> dict[str, int]:
    """Bytes of matrices that one generated token reads, by weight format, without padding."""
    architecture = model.architecture
    head = (architecture.vocab_size, architecture.hidden_size)
    blocks = architecture.active_shapes()
    num_weights = sum(rows * columns for rows, columns in [*blocks, head])
    channel_scales = 4 * sum(rows for rows, _ in [*blocks, head])
    w4a8 = _grid_bytes(model)
    if w4a8 is None:  # 4 bits with a scale and a minimum of 16 bits for 32 weights; the head in 8 bits
        w4a8 = sum(rows * columns * 5 // 8 for rows, columns in blocks) + head[0] * (head[1] + 4)
    return dict(zip(WEIGHTS, (num_weights + channel_scales, w4a8, 2 * num_weights), strict=True))


def _grid_bytes(model: "ModelDirectory") -> int | None:
    """Bytes of the matrices in the quantised file that the directory keeps, if it keeps one."""
    from tokenmill.models.gguf import GgufFile

    if model.manifest is None or not model.manifest.grid_file:
        return None
    with GgufFile.open(model.path / model.manifest.grid_file) as gguf:
        matrices = {name: each for name, each in gguf.tensors.items() if len(each.shape) == 2}
        if not model.architecture.tied_embeddings:
            del matrices["token_embd.weight"]
        return sum(each.num_bytes for each in matrices.values())


def _show(args: argparse.Namespace, out: Output) -> int:
    model = open_model(args.model)
    fields = _fields(model)
    out.text(format_table([], list(_rows(model, fields))))
    out.document(fields)
    return 0


def _fields(model: "ModelDirectory") -> dict[str, Any]:
    architecture, manifest = model.architecture, model.manifest
    full = architecture.max_positions
    macs = 2 * architecture.macs_per_token
    return {
        "name": model.name,
        "path": str(model.path),
        "digest": model.digest,
        "architecture": {
            "family": architecture.family,
            "num_layers": architecture.num_layers,
            "hidden_size": architecture.hidden_size,
            "intermediate_size": architecture.intermediate_size,
            "num_heads": architecture.num_heads,
            "num_kv_heads": architecture.num_kv_heads,
            "head_dim": architecture.head_dim,
            "vocab_size": architecture.vocab_size,
            "tied_embeddings": architecture.tied_embeddings,
        },
        "num_params": architecture.num_params,
        "num_active_params": architecture.num_active_params,
        "context": full,
        "chat_template": model.chat_template() is not None,
        "bytes_on_disk": sum(file.stat().st_size for file in model.path.iterdir() if file.is_file()),
        "weight_bytes": weight_bytes(model),
        "kv_bytes_per_token": architecture.kv_bytes_per_token(),
        "flops_per_token": macs,
        "flops_per_token_at_full_context": macs + architecture.attention_flops(full),
        "licences": list(manifest.licences) if manifest else [],
        "source": manifest.source if manifest else "",
        "quantisation": manifest.quantisation if manifest else "",
        "parent": manifest.parent if manifest else "",
        "recipe": dict(manifest.recipe) if manifest else {},
        "made_by": manifest.made_by if manifest else "",
        "files": _files(model),
    }


def _files(model: "ModelDirectory") -> dict[str, dict[str, Any]]:
    if model.manifest is None:
        return {}
    entries = model.manifest.files.items()
    return {name: {"sha256": entry.sha256, "num_bytes": entry.num_bytes} for name, entry in entries}


def _rows(model: "ModelDirectory", fields: dict[str, Any]) -> Iterator[list[str]]:
    """Name and value, line by line."""
    shape = fields["architecture"]
    yield ["model", fields["name"]]
    yield ["path", fields["path"]]
    yield ["source", fields["source"] or "not stated"]
    yield ["licence", ", ".join(fields["licences"]) or "not stated"]
    yield [
        "architecture",
        f"{shape['family']}, {shape['num_layers']} layers of width {shape['hidden_size']} "
        f"(inner {shape['intermediate_size']}), {shape['num_heads']} query and {shape['num_kv_heads']} "
        f"KV heads of {shape['head_dim']}, vocabulary {shape['vocab_size']}",
    ]
    counts = format_count(fields["num_params"]), format_count(fields["num_active_params"])
    yield ["parameters", f"{counts[0]} ({fields['num_params']}), active {counts[1]}"]
    yield ["context", f"{fields['context']} tokens"]
    yield ["chat template", "yes" if fields["chat_template"] else "no"]
    yield ["on disk", format_bytes(fields["bytes_on_disk"])]
    sizes = ", ".join(f"{name} {format_bytes(size)}" for name, size in fields["weight_bytes"].items())
    yield ["weights read per token", sizes]
    yield ["KV cache per token", f"{fields['kv_bytes_per_token']} B"]
    full = format_count(fields["flops_per_token_at_full_context"])
    yield ["FLOPs per token", f"{format_count(fields['flops_per_token'])}, at full context {full}"]
    yield ["quantisation", fields["quantisation"] or "none"]
    yield ["parent", fields["parent"] or "none"]
    for name, value in fields["recipe"].items():
        yield [f"recipe: {name}", value]
    yield ["made by", fields["made_by"] or "not stated"]
    yield ["digest", fields["digest"]]
    for name, entry in fields["files"].items():
        yield [f"sha256 {name}", entry["sha256"]]
