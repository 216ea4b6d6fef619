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
from tokenmill.kernels import F32Array, choose_isa
from tokenmill.models.directory import ModelDirectory

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
    yield "| model | torch twin | bf16 | w8a8 | w4a8 |"
    yield "|---|---:|---:|---:|---:|"
    for name in tqdm(ZOO, disable=None, file=sys.stderr):
        cells = _measured(name)
        others = " | ".join(f"{each.relative:.3f}, {each.kl:.4f}, {each.agreement:.0%}" for each in cells[1:])
        yield f"| {name} | {cells[0].worst:.0e} | {others} |"


def _measured(name: str) -> list[Distance]:
    """The torch twin, then bf16, w8a8 and w4a8."""
    model = make_model(name)
    with tempfile.TemporaryDirectory() as folder:
        directory = ModelDirectory.open(save_model(model, Path(folder)))
        wanted_TV = _reference(model)
        distances = [measure(twin_logits(directory, _TOKENS), wanted_TV)]
        for weights in ("bf16", "w8a8"):
            distances.append(measure(native_logits(directory, weights, _TOKENS), wanted_TV))
    put_on_grid(model)
    with tempfile.TemporaryDirectory() as folder:
        directory = ModelDirectory.open(save_model(model, Path(folder), torch.float32))
        distances.append(measure(native_logits(directory, "w4a8", _TOKENS), _reference(model)))
    return distances


def _reference(model: transformers.PreTrainedModel) -> F32Array:
    with torch.inference_mode():
        logits_TV: F32Array = model(torch.tensor([_TOKENS])).logits[0].numpy()
    return logits_TV


if __name__ == "__main__":
    sys.exit(main())
