"""From rows to a student: folded prompts, rows as conversations, the whole chain, and the command."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.train.tiny_teacher import ANSWERS, TEXTS, make_teacher
from tokenmill.cli.distil import RECIPES, STUDENTS
from tokenmill.cli.main import main
from tokenmill.compress import (
    PRESETS,
    DistilConfig,
    MillConfig,
    StudentShape,
    answer_prompts,
    common_system_prompt,
    conversations_of,
    examples_of,
    folded_template,
    mill,
    prepare_teacher,
    prompt_of,
)
from tokenmill.core import Message, UsageError
from tokenmill.models.chat.template import ChatTemplate
from tokenmill.models.store.directory import ModelDirectory
from tokenmill.train import ConversationEncoder, Example, TrainConfig
from tokenmill.workload import Row

SYSTEM = 'Answer in JSON like {"who": "x", "at": 1} \\ "quoted" {{ and }} {% nothing %} — ünïcode\nline two'
SHAPE = StudentShape(num_layers=2, hidden_size=32, num_heads=2, num_kv_heads=1, intermediate_size=48)
QUICK = TrainConfig(learning_rate=3e-3, num_epochs=1, tokens_per_step=800, tokens_per_row=800)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENMILL_HOME", str(tmp_path / "home"))


@pytest.fixture
def model(tmp_path: Path) -> ModelDirectory:
    return make_teacher(tmp_path / "model")


def row(number: int, text: str, answer: str, system: str = SYSTEM) -> Row:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": text}]
    return Row(id=f"{number:016x}", number=number, request={"messages": messages}, answer=answer)


ROWS = [row(i, *pair) for i, pair in enumerate(zip(TEXTS, ANSWERS, strict=True))]


def said(template: ChatTemplate, system: str) -> str:
    return template.render([Message(role="system", content=system), Message(role="user", content="Hi")])


def test_only_the_system_prompt_that_was_learnt_is_left_out(model: ModelDirectory) -> None:
    before = model.chat_template()
    assert before is not None
    after = ChatTemplate(folded_template(model, SYSTEM))
    assert said(after, SYSTEM) == said(before, "") != said(before, SYSTEM)
    for other in (SYSTEM + " ", SYSTEM[:-1], "", "Hi"):
        assert said(after, other) == said(before, other)
    plain = [Message(role="user", content=SYSTEM)]
    assert after.render(plain) == before.render(plain)


def test_a_common_prompt_is_one_that_nearly_all_have() -> None:
    conversations = [each.messages for each in conversations_of(ROWS[:40])]
    assert common_system_prompt(conversations) == SYSTEM
    others = [[Message(role="user", content="hi")]] * 4
    assert common_system_prompt([*conversations, *others[:2]]) == SYSTEM
    assert common_system_prompt([*conversations, *others]) == ""
    assert common_system_prompt([[Message(role="system", content="short")]] * 9) == ""
    assert common_system_prompt([]) == ""


def test_rows_are_what_the_server_would_see() -> None:
    tools = [{"type": "function", "function": {"name": "play", "parameters": {"type": "object"}}}]
    called = Row(
        id="a", number=1, request={"messages": [{"role": "user", "content": "go"}], "tools": tools},
        answer='[{"arguments":{"who":"anna"},"name":"play"}]',
    )  # fmt: skip
    refused = Row(
        id="b", number=2, request={"messages": [{"role": "user", "content": "x"}], "n": -1}, answer="y"
    )
    right = Row(
        id="c", number=3, request={"messages": [{"role": "user", "content": "go"}]},
        answer="[1]", reference="[2]",
    )  # fmt: skip
    call, text = conversations_of([called, refused, right])
    (made,) = call.messages[-1].tool_calls or ()
    assert (made.name, json.loads(made.arguments)) == ("play", {"who": "anna"})
    assert len(call.tools) == 1
    assert text.messages[-1].content == "[2]"


def test_examples_that_no_model_can_read_are_left_out(model: ModelDirectory) -> None:
    rows = [row(0, "please play", "ok", "s"), row(1, "word " * 400, "ok", "s")]
    assert len(examples_of(model, conversations_of(rows))) == 1
    with pytest.raises(UsageError, match="can learn from none of the 1 conversations"):
        examples_of(model, conversations_of(rows[1:]))


def test_a_prepared_teacher_reads_less(model: ModelDirectory, tmp_path: Path) -> None:
    used = conversations_of(ROWS[:24])
    small = prepare_teacher(model, used, tmp_path / "small", vocabulary=300)
    whole = prepare_teacher(model, used, tmp_path / "whole", vocabulary=300, fold=False)
    assert small.architecture.vocab_size == 300
    lengths = [len(ConversationEncoder(each).prompt(used[0].messages[:-1])) for each in (small, whole)]
    assert lengths[0] < lengths[1] - 20
    example = examples_of(small, used[:1])[0]
    assert small.tokenizer().decode(example.tokens).endswith(ANSWERS[0])


def test_the_whole_chain_and_again_from_what_is_there(model: ModelDirectory, tmp_path: Path) -> None:
    used, held = conversations_of(ROWS[:60]), conversations_of(ROWS[60:70])
    config = MillConfig(student=SHAPE, vocabulary=300, teacher=QUICK, distil=DistilConfig(train=QUICK))
    work = tmp_path / "work"
    first = mill(model, used, config, tmp_path / "one", work=work, validation=held)
    lineage, steps = first.student.model, []
    for name in ("cut", "teacher", "trimmed"):
        parent = ModelDirectory.open(work / name)
        assert lineage.manifest is not None and lineage.manifest.parent == f"sha256:{parent.digest}"
        steps.append(lineage.manifest.recipe["step"])
        lineage = parent
    assert steps == ["distil", "student", "fine-tune"]
    assert lineage.manifest is not None and lineage.manifest.parent == f"sha256:{model.digest}"
    before = {path: path.stat().st_mtime_ns for path in work.glob("*/model.safetensors")}
    again = mill(model, used, config, tmp_path / "two", work=work, validation=held)
    assert {path: path.stat().st_mtime_ns for path in work.glob("*/model.safetensors")} == before
    assert again.student.model.manifest is not None and first.student.model.manifest is not None
    name = "model.safetensors"
    assert again.student.model.manifest.files[name] == first.student.model.manifest.files[name]
    with pytest.raises(UsageError, match="something else: rows was"):
        mill(model, used[1:], config, tmp_path / "three", work=work, validation=held)


def test_a_student_learns_from_its_teachers_answers(model: ModelDirectory, tmp_path: Path) -> None:
    rows = [row(i, *pair, "s") for i, pair in enumerate(zip(TEXTS[:60], ANSWERS[:60], strict=True))]
    used = conversations_of(rows)
    config = MillConfig(
        student=SHAPE,
        vocabulary=None,
        teacher=replace(QUICK, num_epochs=12),
        answers="teacher",
        distil=DistilConfig(train=QUICK),
    )
    work = tmp_path / "work"
    made = mill(model, used, config, tmp_path / "one", work=work)
    learnt = [Example(*each) for each in json.loads((work / "answers.json").read_text())]
    asked = examples_of(made.teacher, used)
    given = answer_prompts(made.teacher, [prompt_of(each) for each in asked], max_tokens=60).examples
    assert 30 < len(learnt) <= 60 and learnt == [Example(list(e.tokens), list(e.is_target)) for e in given]
    with pytest.raises(UsageError, match="answers is 'mine'"):
        replace(config, answers="mine")  # type: ignore[arg-type]


def write_log(path: Path, terms: str = "CC0-1.0") -> Path:
    lines = []
    for each in ROWS:
        answer = {"role": "assistant", "content": each.answer}
        lines.append(json.dumps({"messages": [*each.request["messages"], answer], "terms": terms}))
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return path


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: ModelDirectory
) -> None:
    monkeypatch.setitem(PRESETS, "mill-2M", SHAPE)
    log = write_log(tmp_path / "log.jsonl.gz")
    words = ["distil", str(model.path), str(log), "--output", str(tmp_path / "out"), "--student", "mill-2M"]
    words += ["--vocabulary", "300", "--epochs", "2", "--rows", "40", "--json"]
    assert main(words) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["path"] == str(tmp_path / "out")
    assert 0 < document["share_of_teacher"] < 1
    assert document["export"].keys() == {"bf16", "w8a8"}
    assert main(words) == 2  # nothing is written over


def test_denied_terms_train_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: ModelDirectory
) -> None:
    write_log(tmp_path / "log.jsonl.gz", terms="secret")
    config = tmp_path / "workload.yaml"
    config.write_text("log: log.jsonl.gz\nterms:\n  rules: {secret: deny}\n")
    assert main(["distil", str(model.path), str(config), "--output", str(tmp_path / "out")]) == 2
    shown = capsys.readouterr().err
    assert "their terms are denied" in shown and "no call to learn from" in shown


def test_names_known_without_imports_are_the_names() -> None:
    assert tuple(PRESETS) == STUDENTS
    assert RECIPES[0] == DistilConfig().recipe
