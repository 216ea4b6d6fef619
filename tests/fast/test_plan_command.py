"""`tokenmill plan` from the command line: three parts of every speed, price with date and source, errors."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fast.cli_tools import Runner, make_home, make_runner
from tests.fast.test_traffic import AZURE
from tokenmill.cli import plan_calibrate
from tokenmill.cli.machine import Machine
from tokenmill.cli.plan_points import POINTS, PointSource, measure_points
from tokenmill.cli.plan_target import architecture_shape
from tokenmill.costs import kv_bytes, load_machine
from tokenmill.costs.shape import streamed_params
from tokenmill.engine import bench as engine_bench
from tokenmill.kernels.probe import MachineLimits, read_hardware
from tokenmill.models.store.library import Library

H100 = ("--hardware", "H100-SXM-80GB")
LIMITS = MachineLimits(
    isa="numpy", num_threads=1, int8_tops=0.1, bf16_tops=0.05, read_gb_s={1: 20.0, 10: 8.0, 100: 9.0}
)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    return make_runner(monkeypatch, capsys, make_home(tmp_path))


def test_an_estimate_has_bound_estimate_interval_and_price(run: Runner) -> None:
    done = run(
        "plan", "estimate", "Llama-3.1-8B", *H100, "--batch", "8", "--context", "344", "--json"
    ).document
    speed = done["decode"]["tokens_per_s"]
    assert speed["low"] < speed["estimate"] < speed["high"] and speed["estimate"] < speed["bound"]
    # Published: 8 / 7.32 ms.
    assert speed["low"] < 1093 < speed["high"]
    assert done["decode"]["binds"] == "weights" and done["prefill"]["binds"] == "compute"
    assert done["price"]["date"] == "2026-05" and done["price"]["source"].startswith("https://")
    assert done["decode"]["joules_per_token"]["source"] == "estimated"
    assert done["decode"]["joules_per_token"]["low"] < 0.4548 < done["decode"]["joules_per_token"]["high"]
    assert done["memory"]["fits"]
    text = run("plan", "estimate", "Llama-3.1-8B", *H100).out
    assert "2026-05" in text and "estimated from" in text and "80 % interval" in text


def test_the_form_can_be_switched(run: Runner) -> None:
    words = ("plan", "estimate", "Llama-3.1-8B", *H100, "--batch", "128", "--json")
    added, longer = (
        run(*words, "--form", form).document["decode"]["tokens_per_s"]["estimate"] for form in ("sum", "max")
    )
    assert added < longer


def test_a_model_that_does_not_fit_is_said(run: Runner) -> None:
    done = run("plan", "estimate", "Llama-3-70B", *H100)
    assert done.code == 0 and "does not fit" in done.err
    refused = run("plan", "tiers", "Llama-3-70B", *H100)
    assert refused.code == 2 and "not even 1 sequences" in refused.err


def test_a_model_of_the_store_and_one_that_is_not_there(run: Runner) -> None:
    done = run("plan", "estimate", "tiny", *H100, "--weights", "w8a8", "--json").document
    assert done["model"]["name"] == "tiny" and done["bits"] == 8.05
    given = ("--params", "7e9", "--layers", "32", "--width", "4096", "--kv-heads", "8")
    done = run("plan", "estimate", "mine", *given, *H100, "--json").document
    assert done["model"]["num_heads"] == 32 and done["model"]["num_kv_heads"] == 8
    unknown = run("plan", "estimate", "nothing", *H100)
    assert unknown.code == 3 and "Llama-3.1-8B" in unknown.error_line
    assert run("plan", "estimate", "mine", "--params", "7e9", *H100).code == 2
    unnamed = run("plan", "estimate", *given, *H100, "--json").document
    assert unnamed["model"]["name"] == "a model of 7.00 G parameters"
    assert "no model is named" in run("plan", "estimate", *H100).error_line


def test_no_end_of_an_interval_is_faster_than_the_bound(run: Runner) -> None:
    speed = run("plan", "estimate", "Llama-3.1-8B", *H100, "--batch", "8", "--json").document["decode"]
    assert speed["tokens_per_s"]["high"] <= speed["tokens_per_s"]["bound"]


def test_the_shape_of_a_model_is_that_of_its_architecture(run: Runner, tmp_path: Path) -> None:
    architecture = Library(tmp_path / "home").find("tiny").architecture
    shape = architecture_shape("tiny", architecture)
    macs = architecture.block_macs_per_token + architecture.head_macs_per_token
    # The rest are norms.
    assert macs <= streamed_params(shape, 1) <= 1.2 * macs
    assert kv_bytes(shape, 1) == architecture.kv_bytes_per_token()


@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        ((), 2, "plan what?"),
        (("estimate", "Llama-3-8B", "--hardware", "abacus"), 3, "no hardware"),
        (("estimate", "Llama-3-8B", "--hardware", "A100"), 3, "could be"),
        (("estimate", "Llama-3-8B", "--hardware", "Groq"), 2, "SRAM"),
        (("estimate", "Llama-3-8B"), 3, "not calibrated"),
        (("estimate", "Llama-3-8B", *H100, "--weights", "int0"), 2, "no format of weights"),
        (("estimate", "Llama-3-8B", *H100, "--utilisation", "40"), 2, "no share"),
        (("estimate", "Llama-3-8B", *H100, "--utilisation", "0"), 2, "never works"),
        (("estimate", "Llama-3-8B", *H100, "--kv-bits", "0"), 2, "no number of bits"),
        (("compare", "Llama-3-8B", *H100, "--api", "acme/none"), 3, "no price is known for acme/none"),
        (
            ("compare", "Llama-3-8B", "--hardware", "RTX 4090", "--api", "groq/llama-3.1-8b-instant"),
            2,
            "--hour-usd",
        ),
        (("readiness", "nowhere.csv", *H100), 3, "no file"),
    ],
)
def test_errors_are_one_line(run: Runner, words: tuple[str, ...], code: int, why: str) -> None:
    done = run("plan", *words)
    assert done.code == code and why in done.error_line


def test_compare_shows_both_prices_and_the_volume(run: Runner) -> None:
    words = ("--devices", "2", "--weights", "fp8", "--batch", "256", "--api", "groq/llama-3.3-70b-versatile")
    done = run("plan", "compare", "Llama-3.3-70B", *H100, *words, "--json").document
    first = done["outcomes"][0]
    assert 0 < first["break_even_utilisation"] < 1 and first["break_even_output_tokens_per_month"] > 1e9
    assert done["api_price"]["date"] == "2025-08-12" and done["hour_price"]["date"] == "2026-05"
    cheaper = [each["break_even_utilisation"] for each in done["outcomes"]]
    assert cheaper[1] > cheaper[0] and cheaper[3] == pytest.approx(10 * cheaper[0])
    text = run("plan", "compare", "Llama-3.3-70B", *H100, *words).out
    assert "2025-08-12" in text and "aimultiple" in text


def test_your_own_price_is_shown_as_yours(run: Runner) -> None:
    done = run(
        "plan", "estimate", "Llama-3-8B", "--hardware", "RTX 4090", "--hour-usd", "0.4", "--json"
    ).document
    assert (
        done["price"]["kind"] == "yours" and done["price"]["source"] == "--hour-usd" and done["price"]["date"]
    )


def test_tiers_trade_speed_for_cost(run: Runner) -> None:
    done = run(
        "plan", "tiers", "Llama-3.1-8B", *H100, "--context", "350", "--batches", "8,256", "--json"
    ).document
    small, standard = done["tiers"]
    assert 3 < small["speed"] < 5 and 6 < small["cost"] < 11
    assert (standard["speed"], standard["cost"]) == (1, 1)
    assert small["user_speed"]["low"] < small["user_tokens_per_s"] < small["user_speed"]["high"]


def test_readiness_of_a_trace(run: Runner, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(AZURE)
    done = run("plan", "readiness", str(tmp_path / "t.csv"), *H100, "--json").document
    by_name = {(each["model"], each["weights"]): each for each in done["models"]}
    assert not by_name["Llama-3-70B", "bf16"]["fits"]
    eight = by_name["Llama-3.1-8B", "bf16"]
    assert eight["fits"] and eight["systems_at_peak"] == 1 and eight["requests_per_s"]["estimate"] > 1
    assert any("calibration" in line for line in done["missing"])
    assert any("quality" in line for line in done["missing"])
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps({"messages": [{"role": "user", "content": "hello"}]}) + "\n")
    text = run("plan", "readiness", str(log), *H100, "--model", "tiny").out
    assert "token counts" in text and "arrival times" in text and "answers:" in text
    config = Library(tmp_path / "home").find("tiny").path / "config.json"
    assert run("plan", "readiness", str(log), *H100, "--model", str(config)).code == 0


def test_products_of_8_bit_activations_run_in_8_bits(run: Runner) -> None:
    bounds = {
        weights: run(
            "plan", "estimate", "Llama-3-8B", *H100, "--batch", "4096", "--weights", weights, "--json"
        ).document["prefill"]["tokens_per_s"]["bound"]
        for weights in ("bf16", "q8_0", "fp8", "w8a8", "w4a8")
    }
    assert bounds["bf16"] == bounds["q8_0"]
    assert bounds["fp8"] == bounds["w8a8"] == bounds["w4a8"] > 1.9 * bounds["bf16"]


@pytest.fixture
def quick_bench(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[Any]]:
    """A machine that is measured at once, and a benchmark whose times follow a known law."""
    asked: list[Any] = []

    def fake(model: Any, config: Any, limits: Any, **_: Any) -> Iterator[Any]:
        [batch] = config.batches
        asked.append((batch, config.prompt))
        rows = engine_bench.BenchRow(
            phase="prefill",
            weights=config.weights[0],
            batch=batch,
            step_batch=batch,
            prompt=config.prompt,
            output=config.output,
            tokens_per_s=1000.0,
            spread=(1.0, 1.0),
            of_limit=0.5,
            limit="compute",
            limit_tokens_per_s=1.0,
            ttft_ms=1.0,
            tpot_p50_ms=None,
            tpot_p99_ms=None,
            peak_rss_mb=None,
            num_runs=1,
        )
        yield rows
        seconds = 1e-3 + 1e-4 * batch + 1e-7 * batch * config.prompt
        yield engine_bench.BenchRow(**{**rows.__dict__, "phase": "decode", "tokens_per_s": batch / seconds})

    monkeypatch.setattr("tokenmill.cli.plan_points.bench", fake)
    machine = Machine(limits=LIMITS, hardware=read_hardware(), busy=0.0)
    monkeypatch.setattr(plan_calibrate, "measure", lambda out, **_: machine)
    return lambda: asked


def test_calibrate_saves_what_later_plans_use(
    run: Runner, quick_bench: Callable[[], list[Any]], tmp_path: Path
) -> None:
    done = run("plan", "calibrate", "tiny", "--json")
    assert done.code == 0
    saved = done.document["calibration"]
    assert saved["decode"]["median_error"] < 0.3 and len(done.document["points"]) >= 3
    assert load_machine().decode.num_points == len(done.document["points"])
    later = run("plan", "estimate", "tiny", "--json").document
    assert later["hardware"].startswith("this machine") and later["bits"] == 8.05
    assert later["price"] is None and later["decode"]["usd_per_1m"] is None
    assert "calibrated with w8a8" in run("plan", "estimate", "tiny", "--weights", "bf16").error_line
    (tmp_path / "t.csv").write_text(AZURE)
    ready = run(
        "plan", "readiness", str(tmp_path / "t.csv"), "--hardware", "this", "--model", "tiny", "--json"
    )
    assert [each["weights"] for each in ready.document["models"]] == ["w8a8"]
    (Path(done.document["path"])).write_text("{}")
    damaged = run("plan", "estimate", "tiny")
    assert damaged.code == 5 and "damaged" in damaged.error_line


def test_points_stop_with_the_budget_and_not_before_three(
    run: Runner, quick_bench: Callable[[], list[Any]], tmp_path: Path
) -> None:
    source = PointSource(model=Library(tmp_path / "home").find("tiny"), weights="w8a8", limits=LIMITS)
    few = [(1, 8), (2, 8), (1, 16), (4, 16)]
    assert len(list(measure_points(source, few, budget_s=0.0))) == 3
    assert len(list(measure_points(source, few, budget_s=60.0))) == 4
    assert list(measure_points(source, [(1, 10**6)], budget_s=60.0)) == []
    assert len(POINTS) >= 6
    assert [read.bytes_per_s for read in source.rates.reads] == [20e9, 9e9, 9e9]
