"""`tokenmill show`: what a model is, what a token of it costs, and where it came from."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenmill.cli.arguments import (
    WEIGHTS,
    Subparsers,
    add_command,
    add_model_argument,
    byte_size,
    open_model,
)
from tokenmill.cli.output import Output, format_bytes, format_count, format_table

if TYPE_CHECKING:
    from tokenmill.models.architecture import Architecture
    from tokenmill.models.packing.fit import Fit
    from tokenmill.models.store.directory import ModelDirectory

__all__ = ["add_parser", "weight_bytes"]

_DESCRIPTION = """\
Architecture, costs, licence, lineage and hashes of a model. Bytes of a weight format are those of the
matrices that one generated token reads. FLOPs count two for a multiply-accumulate.

MODEL may be a config.json alone, without weights. --fit says which weight and KV formats run in so much
memory, and how long one sequence may then be; every byte counts, mapped files too.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add `show`."""
    parser = add_command(
        subparsers, "show", _show, summary="what a model is and what it costs", description=_DESCRIPTION
    )
    add_model_argument(parser)
    parser.add_argument(
        "--fit", type=byte_size, metavar="SIZE", help="what fits in so much memory, for example 3GB or 3GiB"
    )


def weight_bytes(model: "ModelDirectory") -> dict[str, int]:
    """Bytes of matrices that one generated token reads, by weight format, without padding."""
    return _weight_bytes(model.architecture, _grid_bytes(model))


def _weight_bytes(architecture: "Architecture", w4a8: int | None) -> dict[str, int]:
    head = (architecture.vocab_size, architecture.hidden_size)
    blocks = architecture.active_shapes()
    num_weights = sum(rows * columns for rows, columns in [*blocks, head])
    channel_scales = 4 * sum(rows for rows, _ in [*blocks, head])
    if w4a8 is None:  # 4 bits with a scale and a minimum of 16 bits for 32 weights; the head in 8 bits
        w4a8 = sum(rows * columns * 5 // 8 for rows, columns in blocks) + head[0] * (head[1] + 4)
    return dict(zip(WEIGHTS, (num_weights + channel_scales, w4a8, 2 * num_weights), strict=True))


def _grid_bytes(model: "ModelDirectory") -> int | None:
    """Bytes of the matrices in the quantised file that the directory keeps, if it keeps one."""
    from tokenmill.models.formats.gguf import GgufFile

    if model.manifest is None or not model.manifest.grid_file:
        return None
    with GgufFile.open(model.path / model.manifest.grid_file) as gguf:
        matrices = {name: each for name, each in gguf.tensors.items() if len(each.shape) == 2}
        if not model.architecture.tied_embeddings:
            del matrices["token_embd.weight"]
        return sum(each.num_bytes for each in matrices.values())


def _show(args: argparse.Namespace, out: Output) -> int:
    from tokenmill.models.hf_config import load_json_object, read_architecture
    from tokenmill.models.packing.fit import find_fits

    path = Path(args.model).expanduser()
    if path.suffix == ".json" and path.is_file():
        source = None
        architecture = read_architecture(load_json_object(path), str(path))
        fields = {
            "name": path.name,
            "path": str(path),
            **_costs(architecture, _weight_bytes(architecture, None)),
        }
        rows = [["path", fields["path"]], *_cost_rows(fields)]
    else:
        model = open_model(args.model)
        source = model.weights() if args.fit else None
        architecture, fields = model.architecture, _fields(model)
        rows = list(_rows(model, fields))
    out.text(format_table([], rows))
    if args.fit:
        fits = find_fits(architecture, args.fit, source=source)
        fields["fit"] = {"limit_bytes": args.fit, "formats": [_fit_fields(fit) for fit in fits]}
        out.text(f"\nin {format_bytes(args.fit)}, one sequence:")
        header = ["weights", "KV", "context", "bytes", "of weights", "embeddings", "KV", "step", "process"]
        out.table(header, [_fit_row(fit) for fit in fits])
    out.document(fields)
    return 0


def _fit_fields(fit: "Fit") -> dict[str, Any]:
    parts = {name: getattr(fit.footprint, name) for name in ("weights", "embeddings", "kv", "steps", "base")}
    return {
        "weights": fit.weights,
        "kv_dtype": fit.kv_dtype,
        "fits": fit.context > 0,
        "context": fit.context,
        "bytes": {**parts, "total": fit.footprint.total},
    }


def _fit_row(fit: "Fit") -> list[str]:
    parts = fit.footprint
    sizes = (parts.total, parts.weights, parts.embeddings, parts.kv, parts.steps, parts.base)
    context = str(fit.context) if fit.context else "too large"
    return [fit.weights, fit.kv_dtype, context, *map(format_bytes, sizes)]


def _fields(model: "ModelDirectory") -> dict[str, Any]:
    manifest = model.manifest
    return {
        "name": model.name,
        "path": str(model.path),
        "digest": model.digest,
        **_costs(model.architecture, weight_bytes(model)),
        "chat_template": model.chat_template() is not None,
        "bytes_on_disk": sum(file.stat().st_size for file in model.path.iterdir() if file.is_file()),
        "licences": list(manifest.licences) if manifest else [],
        "source": manifest.source if manifest else "",
        "quantisation": manifest.quantisation if manifest else "",
        "parent": manifest.parent if manifest else "",
        "recipe": dict(manifest.recipe) if manifest else {},
        "made_by": manifest.made_by if manifest else "",
        "files": _files(model),
    }


def _costs(architecture: "Architecture", weights: dict[str, int]) -> dict[str, Any]:
    """What follows from the architecture alone, and the bytes of each weight format."""
    full, flops = architecture.max_positions, 2 * architecture.macs_per_token
    experts = architecture.experts
    return {
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
            "num_experts": experts.num_experts if experts else 0,
            "num_active_experts": experts.num_active if experts else 0,
        },
        "num_params": architecture.num_params,
        "num_active_params": architecture.num_active_params,
        "context": full,
        "weight_bytes": weights,
        "kv_bytes_per_token": architecture.kv_bytes_per_token(),
        "flops_per_token": flops,
        "flops_per_token_at_full_context": flops + architecture.attention_flops(full),
    }


def _files(model: "ModelDirectory") -> dict[str, dict[str, Any]]:
    if model.manifest is None:
        return {}
    entries = model.manifest.files.items()
    return {name: {"sha256": entry.sha256, "num_bytes": entry.num_bytes} for name, entry in entries}


def _rows(model: "ModelDirectory", fields: dict[str, Any]) -> Iterator[list[str]]:
    """Name and value, line by line."""
    yield ["model", fields["name"]]
    yield ["path", fields["path"]]
    yield ["source", fields["source"] or "not stated"]
    yield ["licence", ", ".join(fields["licences"]) or "not stated"]
    yield from _cost_rows(fields)
    yield ["chat template", "yes" if fields["chat_template"] else "no"]
    yield ["on disk", format_bytes(fields["bytes_on_disk"])]
    yield ["quantisation", fields["quantisation"] or "none"]
    yield ["parent", fields["parent"] or "none"]
    for name, value in fields["recipe"].items():
        yield [f"recipe: {name}", value]
    yield ["made by", fields["made_by"] or "not stated"]
    yield ["digest", fields["digest"]]
    for name, entry in fields["files"].items():
        yield [f"sha256 {name}", entry["sha256"]]


def _cost_rows(fields: dict[str, Any]) -> Iterator[list[str]]:
    """The lines about `_costs`."""
    shape = fields["architecture"]
    experts = ""
    if shape["num_experts"]:
        experts = f", {shape['num_experts']} experts of which a token takes {shape['num_active_experts']}"
    yield [
        "architecture",
        f"{shape['family']}, {shape['num_layers']} layers of width {shape['hidden_size']} "
        f"(inner {shape['intermediate_size']}), {shape['num_heads']} query and {shape['num_kv_heads']} "
        f"KV heads of {shape['head_dim']}, vocabulary {shape['vocab_size']}{experts}",
    ]
    counts = [
        f"{format_count(fields[name])} ({fields[name]})" for name in ("num_params", "num_active_params")
    ]
    yield ["parameters", f"{counts[0]}, active {counts[1]}"]
    yield ["context", f"{fields['context']} tokens"]
    sizes = ", ".join(f"{name} {format_bytes(size)}" for name, size in fields["weight_bytes"].items())
    yield ["weights read per token", sizes]
    yield ["KV cache per token", f"{fields['kv_bytes_per_token']} B"]
    full = format_count(fields["flops_per_token_at_full_context"])
    yield ["FLOPs per token", f"{format_count(fields['flops_per_token'])}, at full context {full}"]
