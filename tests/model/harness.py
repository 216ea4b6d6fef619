"""EleutherAI's lm-evaluation-harness on local items, offline: its own task definitions, its own metrics.

The definitions are the YAML files of the installed package; only where their items come from is replaced. The
model is ours, seen through the protocols of `core`.
"""

import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tokenmill.core import Generator, SamplingParams, Scorer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import datasets
    import lm_eval
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks._yaml_loader import load_yaml

__all__ = ["Harness", "Item", "Model", "harness_items", "run_harness", "write_lines"]

_TASKS = Path(lm_eval.__file__).parent / "tasks"


class Model(Generator, Scorer, Protocol):
    """Both ways to ask."""


class Item(NamedTuple):
    """What the harness asked about one item and what it made of the answer."""

    prompt: str
    continuations: tuple[str, ...]
    metrics: dict[str, float]


class Harness(LM):  # type: ignore[misc]
    """A model of ours for the harness."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self._model = model

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        pairs = [request.args for request in requests]
        # The harness leaves it to the model to move white space over the border.
        pairs = [
            (before.rstrip(), before[len(before.rstrip()) :] + after) if before.strip() else (before, after)
            for before, after in pairs
        ]
        scores = self._model.score([before for before, _ in pairs], [after for _, after in pairs])
        return [(score.total, False) for score in scores]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise NotImplementedError

    def generate_until(self, requests: list[Instance]) -> list[str]:
        prompts = [request.args[0] for request in requests]
        params = [
            SamplingParams(max_tokens=256, temperature=0.0, stop=tuple(request.args[1]["until"]))
            for request in requests
        ]
        return [completion.text for completion in self._model.generate(prompts, params)]


def harness_items(
    definition: str,
    docs: Mapping[str, Sequence[Mapping[str, Any]]],
    model: Model,
    changes: Mapping[str, Any] | None = None,
    num_shots: int | None = None,
) -> list[Item]:
    """Run a definition of the package (a path under `lm_eval/tasks`) on these documents by split."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run_harness(definition, docs, model, changes or {}, num_shots)


def run_harness(
    definition: str,
    docs: Mapping[str, Sequence[Mapping[str, Any]]],
    model: Model,
    changes: Mapping[str, Any],
    num_shots: int | None,
) -> list[Item]:
    config = load_yaml(_TASKS / definition)
    splits = {name: datasets.Dataset.from_list([dict(doc) for doc in each]) for name, each in docs.items()}
    config |= {"custom_dataset": lambda **_: splits, **changes}
    config["num_fewshot"] = num_shots or 0
    for name in ("training_split", "validation_split", "test_split", "fewshot_split"):
        if config.get(name) not in splits:
            config[name] = None
    datasets.disable_progress_bars()
    logging.disable(logging.WARNING)
    try:
        task = ConfigurableTask(config=config)
        task.set_fewshot_seed(seed=0)
        results = evaluate(Harness(model), {"tasks": {config["task"]: task}, "groups": {}}, bootstrap_iters=0)
    finally:
        logging.disable(logging.NOTSET)
    assert results is not None
    (samples,) = results["samples"].values()
    return _items(samples)


def _items(samples: Sequence[Mapping[str, Any]]) -> list[Item]:
    """One an item, in the order of the documents; filters give metrics of their own names."""
    items: dict[int, Item] = {}
    for sample in samples:
        arguments = list(sample["arguments"])
        chooses = all(isinstance(each[1], str) for each in arguments)
        prompts = {each[0] for each in arguments}
        assert len(prompts) == 1, "the choices of an item have one prompt"
        item = items.setdefault(
            sample["doc_id"],
            Item(prompts.pop(), tuple(each[1] for each in arguments) if chooses else (), {}),
        )
        prefix = "" if sample["filter"] == "none" else f"{sample['filter']} "
        item.metrics.update({f"{prefix}{name}": float(sample[name]) for name in sample["metrics"]})
    return [items[number] for number in sorted(items)]


def write_lines(path: Path, docs: Sequence[Mapping[str, Any]]) -> Path:
    """A JSON lines file."""
    path.write_text("".join(json.dumps(doc) + "\n" for doc in docs), encoding="utf-8")
    return path
