"""Makes the logs of examples/ from public data: `python -m scripts.make_examples DATA`.

DATA holds `snips/` (github.com/snipsco/nlu-benchmark, CC0 1.0) and `banking77/` (github.com/PolyAI-LDN/
task-specific-datasets, CC BY 4.0). The same data gives the same files: rows are in the order of a hash of
their ids, as calls of a day would be mixed. Gold answers stand in for those of an incumbent.
"""

import csv
import gzip
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

EXAMPLES: Final = Path(__file__).parents[1] / "examples"

SLOTS_PROMPT: Final = (
    "Turn the user's request into one line of JSON with its intent (AddToPlaylist, BookRestaurant, "
    "GetWeather, PlayMusic, RateBook, SearchCreativeWork or SearchScreeningEvent) and its slots, whose "
    "values are copied from the request."
)
BANKING_PROMPT: Final = (
    "You sort the questions of a bank's customers. Answer with the name of the question's intent, nothing "
    "else."
)


def main(data: Path) -> None:
    """Write both logs."""
    write_log(EXAMPLES / "slots" / "log.jsonl.gz", slots(data / "snips"))
    write_log(EXAMPLES / "banking77" / "log.jsonl.gz", banking(data / "banking77"))


def slots(folder: Path) -> Iterator[Mapping[str, Any]]:
    """Every utterance of SNIPS with its intent and slots."""
    for path in sorted(folder.glob("*_*.json.gz")):
        part, intent = path.name.split(".")[0].removesuffix("_full").split("_")
        with gzip.open(path, "rt", encoding="utf-8") as file:
            utterances = json.load(file)[intent]
        for number, utterance in enumerate(utterances, start=1):
            text = " ".join("".join(each["text"] for each in utterance["data"]).split())
            answer = canonical({"intent": intent, "slots": slot_values(utterance["data"])})
            yield call(f"{part}-{intent}-{number}", SLOTS_PROMPT, text, answer, "CC0-1.0")


def slot_values(parts: Iterable[Mapping[str, str]]) -> dict[str, str | list[str]]:
    """The value of each slot; several are a list."""
    found: dict[str, list[str]] = {}
    for part in parts:
        value = " ".join(part["text"].split())
        if "entity" in part and value:
            found.setdefault(part["entity"], []).append(value)
    return {name: values[0] if len(values) == 1 else values for name, values in found.items()}


def banking(folder: Path) -> Iterator[Mapping[str, Any]]:
    """Every question of Banking77 with its label."""
    for part, name in (("train", "train.csv.gz"), ("test", "test.csv")):
        path = folder / name
        data = gzip.decompress(path.read_bytes()) if name.endswith(".gz") else path.read_bytes()
        for number, row in enumerate(csv.DictReader(data.decode().splitlines(keepends=True)), start=1):
            text = " ".join(row["text"].split())
            yield call(f"{part}-{number}", BANKING_PROMPT, text, row["category"], "CC-BY-4.0")


def call(id: str, system: str, text: str, answer: str, terms: str) -> Mapping[str, Any]:
    """A call as a log of chat completions has it."""
    said = (("system", system), ("user", text), ("assistant", answer))
    messages = [{"role": role, "content": content} for role, content in said]
    return {"id": id, "messages": messages, "terms": terms}


def canonical(value: Any) -> str:
    """Compact JSON with sorted keys."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def write_log(path: Path, calls: Iterable[Mapping[str, Any]]) -> None:
    """Write the calls in the order of a hash of their ids."""
    ordered = sorted(calls, key=lambda each: hashlib.sha256(str(each["id"]).encode()).digest())
    text = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in ordered)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    print(f"{path}: {len(ordered)} calls, {path.stat().st_size} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m scripts.make_examples DATA")
    main(Path(sys.argv[1]))
