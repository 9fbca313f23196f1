"""The benchmark's plan, its table, and one case run as the benchmark runs it."""

import math

from benchmarks import solvers
from benchmarks._peers import Case


def test_plan_leaves_out_what_optimistix_does_not_have():
    cases = solvers.plan(solvers.parse([]))
    assert {case.method for case in cases if case.library == "optimistix"} == {"picard"}
    assert len(cases) == len(set(cases)) == 80


def test_a_case_is_measured_in_its_own_process():
    row = solvers.run(Case("deq_jax", "anderson", "dense", "forward", threads=1), repeats=3)
    assert "error" not in row, row
    assert row["ms"] > 0 and row["evaluation_ms"] > 0
    # 6 images, 6 residuals and a few states of [32, 1024] float32 are under 3 MB.
    assert row["peak_mb"] < 20
    assert math.isfinite(row["check"][0])


def test_failures_stay_in_the_table():
    good = {"library": "deq_jax", "method": "picard", "problem": "dense", "threads": 1}
    good |= {"direction": "forward", "ms": 12.34, "ratio": 1.0, "peak_mb": 2.0}
    bad = good | {"library": "jaxopt", "error": "out of memory"}
    del bad["ms"], bad["ratio"], bad["peak_mb"]
    text = solvers.tables([good, bad])
    assert "| deq_jax | picard | 12.3 | - | 1.00 | - | 2 | - |" in text
    assert "jaxopt picard forward failed: out of memory" in text
