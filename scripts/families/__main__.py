"""`python -m scripts.families`: every family with every runner, for the table of docs/families.md."""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm import tqdm

from scripts.families.runners import Distance, measure, native_logits, twin_logits
from scripts.families.zoo import ZOO, make_model, put_on_grid, save_model
from tests.fast.export_tools import write_tokenizer
from tokenmill.core import UsageError
from tokenmill.kernels import F32Array, choose_isa
from tokenmill.models.formats.convert import GgufWeights, gguf_architecture
from tokenmill.models.formats.gguf import GgufFile
from tokenmill.models.store.directory import ModelDirectory
from tokenmill.models.store.export import export_gguf
from tokenmill.models.torch_twin import TorchDecoder

_DOCUMENT = Path("docs/families.md")
_BEGIN, _END = "<!-- matrix: begin -->", "<!-- matrix: end -->"
_TOKENS = [int(token) for token in np.random.default_rng(3).integers(0, 160, 150)]


def main() -> int:
    """Print the table, or with `--write` put it into the document."""
    parser = argparse.ArgumentParser(prog="python -m scripts.families", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"replace the table in {_DOCUMENT}")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    table = "\n".join(_table())
    if not args.write:
        print(table)
        return 0
    text = _DOCUMENT.read_text()
    before, _, rest = text.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    _DOCUMENT.write_text(f"{before}{_BEGIN}\n{table}\n{_END}{after}")
    return 0


def _table() -> Iterator[str]:
    yield (
        f"{date.today()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"kernels {choose_isa()}; {len(_TOKENS)} random tokens, one run."
    )
    yield ""
    yield "| model | torch twin | through GGUF | bf16 | w8a8 | w4a8 |"
    yield "|---|---:|---:|---:|---:|---:|"
    for name in tqdm(ZOO, disable=None, file=sys.stderr):
        yield f"| {name} | {' | '.join(_cells(name))} |"


def _cells(name: str) -> Iterator[str]:
    """The torch twin, from the folder and through GGUF, then bf16, w8a8 and w4a8."""
    model = make_model(name)
    wanted_TV = _reference(model)
    with tempfile.TemporaryDirectory() as folder:
        directory = ModelDirectory.open(save_model(model, Path(folder)))
        yield f"{measure(twin_logits(directory, _TOKENS), wanted_TV).worst:.0e}"
        yield _through_gguf(directory, wanted_TV)
        for weights in ("bf16", "w8a8"):
            yield _cell(measure(native_logits(directory, weights, _TOKENS), wanted_TV))
    put_on_grid(model)
    with tempfile.TemporaryDirectory() as folder:
        directory = ModelDirectory.open(save_model(model, Path(folder), torch.float32))
        yield _cell(measure(native_logits(directory, "w4a8", _TOKENS), _reference(model)))


def _cell(distance: Distance) -> str:
    return f"{distance.median:.3f}, {distance.kl:.4f}, {distance.agreement:.0%}"


def _through_gguf(directory: ModelDirectory, wanted_TV: F32Array) -> str:
    """The torch twin of the model exported to GGUF and read again."""
    write_tokenizer(directory.path, directory.architecture.vocab_size)
    try:
        exported = export_gguf(directory, directory.path / "export.gguf", "bf16")
    except UsageError:
        return "not sayable"
    with GgufFile.open(exported.path) as gguf:
        architecture = gguf_architecture(gguf)
        twin = TorchDecoder.load(architecture, GgufWeights(gguf, architecture))
        with torch.inference_mode():
            logits_TV: F32Array = twin(torch.tensor([_TOKENS]))[0].numpy()
    return f"{measure(logits_TV, wanted_TV).worst:.0e}"


def _reference(model: transformers.PreTrainedModel) -> F32Array:
    with torch.inference_mode():
        logits_TV: F32Array = model(torch.tensor([_TOKENS])).logits[0].numpy()
    return logits_TV


if __name__ == "__main__":
    sys.exit(main())
