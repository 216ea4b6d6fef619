"""The default model's directory, as transformers sees it: it opens unchanged and means the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from tokenmill.models.store.directory import ModelDirectory
from tokenmill.models.torch_twin import TorchDecoder

TEXTS = {
    "prose": (
        "The mill stood where the two streams met, and for most of the year the water was high enough to "
        "turn both wheels. In dry summers the miller ground by night, when the fields upstream drew nothing, "
        "and slept through the heat of the day. People said that he knew the price of a sack of flour "
        "before the merchants did, because he could hear it in the water. When the railway came, flour "
        "from the plains arrived cheaper than he could grind it, and he sold one of the two stones."
    ),
    "spaces": "a b  c   d\n\n  e\tf ",
    "digits": "In 1867, 3.14159 kg cost $2,500.00 (about 1e-6 of 2**31-1).",
    "code": "def f(x: int) -> str:\n    return f'{x:>8}'  # naïve\n",
    "scripts": "Zażółć gęślą jaźń, Ελληνικά, русский, 日本語, العربية, हिन्दी",
    "emoji": "👩‍👩‍👧‍👦 flies to 🇨🇭 ❤️",
    "empty": "",
    "one space": " ",
}
CHAT = "<|im_start|>user\nWhat is 12 * 12?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def reference_tokenizer(model_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(model_dir)


def test_logits_equal_transformers(model_dir: Path) -> None:
    directory = ModelDirectory.open(model_dir)
    reference, report = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    twin = TorchDecoder.load(directory.architecture, directory.weights())
    tokens_BT = torch.tensor([directory.tokenizer().encode(TEXTS["prose"])[:128]])
    assert tokens_BT.shape[1] > 90
    with torch.inference_mode():
        logits_BTV = twin(tokens_BT)
        assert float((logits_BTV - reference(tokens_BT).logits).abs().max()) < 1e-4
    # Both read the same files, so their agreement does not show that the files are right; this does.
    # With every space as token 0 the same text has a perplexity of 135,000.
    perplexity = float(cross_entropy(logits_BTV[0, :-1], tokens_BT[0, 1:]).exp())
    assert perplexity == pytest.approx(49.46, rel=0.01)


@pytest.mark.parametrize("name", TEXTS)
def test_tokens_equal_transformers(model_dir: Path, reference_tokenizer: Any, name: str) -> None:
    tokenizer = ModelDirectory.open(model_dir).tokenizer()
    ids = tokenizer.encode(TEXTS[name])
    assert ids == reference_tokenizer.encode(TEXTS[name], add_special_tokens=False)
    assert tokenizer.decode(ids) == reference_tokenizer.decode(ids) == TEXTS[name]
    # The known damage of a naive conversion: every space becomes token 0.
    assert 0 not in ids


def test_chat_tokens_equal_transformers(model_dir: Path, reference_tokenizer: Any) -> None:
    directory = ModelDirectory.open(model_dir)
    ids = directory.tokenizer().encode(CHAT, allow_special=True)
    assert ids == reference_tokenizer.encode(CHAT)
    assert ids.count(reference_tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1
    assert reference_tokenizer.eos_token_id in directory.architecture.eos_token_ids
    assert reference_tokenizer.eos_token_id != reference_tokenizer.unk_token_id
