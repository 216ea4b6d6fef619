"""docs/performance.md: its marks, its figures of the limit, and what the generators make of made-up ones."""

import importlib

import pytest

from scripts import performance_page, performance_plot, profile_step, speculation, targets
from scripts.performance_page import fill, markdown_table, merge_rows, parse_table, section
from tests.fast.random_plan import make_batch, make_plan
from tokenmill.kernels import available_isas, create_executor
from tokenmill.kernels.executor import NativeExecutor
from tokenmill.kernels.plan import StepPlan
from tokenmill.kernels.probe import MachineLimits

PAGE = performance_page.PAGE.read_text(encoding="utf-8")
LIMITS = MachineLimits(
    isa="amx", num_threads=2, int8_tops=2.0, bf16_tops=1.0, read_gb_s={1: 100.0, 100: 10.0}
)
CASE = profile_step.Case(name="made-up", batch=2, prompt=8, decodes=True)


def part(name: str, median: float) -> profile_step.Part:
    return profile_step.Part(name=name, median=median, low=median, high=median)


def plan() -> StepPlan:
    return make_plan("i8c")


def test_a_part_is_replaced_between_its_marks_only() -> None:
    page = "a\n<!-- x:begin -->\nold\n<!-- x:end -->\nb <!-- y:begin --><!-- y:end -->\n"
    assert fill(page, "x", "new") == page.replace("old", "new")
    assert fill(fill(page, "x", "new"), "x", "old") == page
    assert section(page, "x") == "old"
    with pytest.raises(SystemExit):
        fill(page, "z", "new")
    with pytest.raises(SystemExit):
        section("<!-- x:begin -->", "x")


def test_rows_are_replaced_by_name_in_the_order_given() -> None:
    old = markdown_table(["a", "b"], [["1", "x"], ["2", "y"], ["gone", "z"]])
    assert parse_table(f"text\n\n{old}\n") == (["a", "b"], [["1", "x"], ["2", "y"], ["gone", "z"]])
    new = merge_rows(old, ["a", "b"], [["3", "w"], ["1", "v"]], order=["3", "1", "2"])
    assert parse_table(new)[1] == [["3", "w"], ["1", "v"], ["2", "y"]]
    assert parse_table(merge_rows(old, ["a", "c"], [["1", "v"]], order=["1", "2"]))[1] == [["1", "v"]]


def test_every_operation_has_a_part_and_the_costs_are_those_of_the_roofline() -> None:
    made = plan()
    names = profile_step.part_names(made)
    assert len(names) == len(made.ops)
    assert {"q, k, v", "attention", "output", "gate and up", "down", "head", "norms"} < set(names)
    costs = profile_step.part_costs(made, CASE, kv_bytes=256.0)
    linears = {name: costs[name] for name in ("q, k, v", "output", "gate and up", "down", "head")}
    shape = made.shape
    macs = sum(linear.num_out * linear.num_in for linear in made.linears)
    assert sum(cost.int8_ops for cost in linears.values()) == 2 * CASE.batch * macs
    assert sum(cost.far_bytes for cost in linears.values()) == sum(each.num_bytes for each in made.linears)
    assert costs["attention"].far_bytes == 256.0 * CASE.kv_tokens
    query = shape.num_heads * shape.head_dim
    assert costs["attention"].float_ops == 4 * query * CASE.seen * shape.num_layers


def test_a_table_gives_each_part_its_limit_and_the_step_the_longer_of_two() -> None:
    costs = {
        "down": profile_step.Cost(int8_ops=2e6, far_bytes=100e6),
        "attention": profile_step.Cost(float_ops=50e9),
        "norms": profile_step.Cost(near_bytes=1e6),
    }
    parts = [part("down", 0.02), part("attention", 0.1), part("norms", 1e-4), part("sampling", 1e-3)]
    text = profile_step.table([*parts, part("**step**", 0.125)], costs, LIMITS)
    assert "| down | 20,000 | 20,000-20,000 | 16.0% | 10,000 | bandwidth | 50% |" in text
    assert "| attention | 100,000 | 100,000-100,000 | 80.0% | 50,000 | compute | 50% |" in text
    assert "| norms | 100 | 100-100 | 0.1% | 10 | near cache | 10% |" in text
    assert "| sampling | 1,000 | 1,000-1,000 | 0.8% | - | - | - |" in text
    assert "| **step** | 125,000 | 125,000-125,000 | 100.0% | 50,001 | compute | 40% |" in text
    assert "2.0 int8 and 1.0 bf16 TOPS, 10 GB/s for 100 MB" in text


def test_what_the_profiler_wraps_is_there() -> None:
    for _, module, path in profile_step._PHASES:
        found = importlib.import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
        assert callable(found)


def test_a_phase_has_its_own_time_only() -> None:
    clocks = profile_step._Clocks()
    inner = clocks.timed("inner", lambda: sum(range(200_000)))
    clocks.timed("outer", lambda: [inner() for _ in range(5)])()
    assert clocks.seconds["inner"] > 10 * clocks.seconds["outer"] > 0


def test_the_plot_is_that_of_the_tables() -> None:
    names = list(profile_step.STEPS)
    assert performance_page.PLOT.read_text(encoding="utf-8") == performance_plot.plot(PAGE, names)
    table = profile_step.table(
        [part("down", 0.01), part("sampling", 0.01), part("**step**", 0.02)], {}, LIMITS
    )
    svg = performance_plot.plot(fill(PAGE, f"profile-{names[0]}", table), names)
    assert "<title>down: 10,000 µs</title>" in svg
    assert "<title>Python: 10,000 µs</title>" in svg, "phases of Python are one colour"


def test_the_page_has_rows_that_are_still_measured_and_every_kind_of_work() -> None:
    header, rows = parse_table(section(PAGE, "targets"))
    titles = [each.title for each in targets.targets("m", performance_page.PAGE)]
    assert header == list(targets.HEADER) and len(rows) >= 10
    assert [row[0] for row in rows] == [title for title in titles if title in {row[0] for row in rows}]
    assert [row[0] for row in parse_table(section(PAGE, "speculation"))[1]] == [
        w.title for w in speculation.WORKS
    ]


def test_a_target_is_held_to_its_bound() -> None:
    measured = targets.Measured(
        values=(90.0, 100.0, 120.0), unit="tok/s", limit="200", reached=(0.5, 0.4, 0.6)
    )

    def cells(bound: float, **named: bool) -> list[str]:
        target = targets.Target(name="t", title="T", measure=lambda: measured, bound=bound, **named)
        return targets.row_cells(target, measured)

    assert cells(100)[:7] == ["T", "100 tok/s", "90-120 (3)", "200", "50%", "at least 100 tok/s", "yes"]
    assert cells(101)[6] == "**no**"
    assert cells(99, most=True)[5:7] == ["at most 99 tok/s", "**no**"]
    assert cells(0.5, of_limit=True)[5:7] == ["at least 50% of the limit", "yes"]
    assert cells(0.51, of_limit=True)[6] == "**no**"


def test_speculation_is_judged_by_the_median_of_its_rounds() -> None:
    work = next(each for each in speculation.WORKS if each.name == "summary")

    def pair(guess_s: float) -> speculation.Pair:
        return speculation.Pair(
            num_tokens=100,
            plain_s=1.0,
            guess_s=guess_s,
            plain_total_s=2.0,
            guess_total_s=2.0,
            num_guessed=40,
            num_right=10,
        )

    cells = speculation.row_cells(work, [[pair(1.0)], [pair(1.25)], [pair(0.5)]])
    assert cells[1:6] == ["100", "109", "1.00", "0.80-2.00 (3 of 1 prompts)", "1.00"]
    assert cells[6:9] == ["30 of 120 (25%), 10% of all tokens", "at least 0.97", "yes"]
    assert speculation.row_cells(work, [[pair(1.04)]])[8] == "**no**"


def test_no_row_is_tuned_on_and_reported() -> None:
    rows = [f"row {number}" for number in range(100)]
    halves = [set(speculation.split(iter(rows), tune)) for tune in (True, False)]
    assert halves[0] | halves[1] == set(rows) and not halves[0] & halves[1]
    assert min(map(len, halves)) > 30


@pytest.mark.skipif("portable" not in available_isas(), reason="no native extension")
def test_operations_are_timed_only_when_asked() -> None:
    executor = create_executor(plan(), max_rows=4, max_out_rows=4, num_blocks=2, isa="portable")
    assert isinstance(executor, NativeExecutor)
    assert executor.operation_seconds() == ()
    executor.time_operations()
    assert executor.operation_seconds() == (0.0,) * len(executor.plan.ops)
    executor.run(make_batch([([1, 2], 0, [0])]), 0, 5)
    seconds = executor.operation_seconds()
    assert min(seconds[:5]) > 0.0 and not any(seconds[5:])
