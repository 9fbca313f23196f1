"""The benchmarks' plans and tables, cases run as a benchmark runs them, and compiled programs."""

import dataclasses
import math

import jax

import deq_jax as deq
from benchmarks import language, programs, solvers, vision
from benchmarks._case import measured
from benchmarks._report import of_the_best_peer
from deq_jax.training import parallel


def test_plan_leaves_out_what_optimistix_does_not_have():
    cases = solvers.plan(solvers.parse([]))
    for library in ("optimistix", "deq_jax-last"):
        assert {case.method for case in cases if case.library == library} == {"picard"}
    problems, threads, directions = 3, 2, 2
    rows = 3 * len(("deq_jax", "torchdeq", "jaxopt")) + 2
    assert len(cases) == len(set(cases)) == problems * threads * directions * rows


def test_a_case_is_measured_in_its_own_process():
    case = solvers.Case("deq_jax", "anderson", "dense", "forward", threads=1)
    row = measured(solvers.MODULE, dataclasses.asdict(case), 3)
    assert "error" not in row, row
    assert row["ms"] > 0 and row["evaluation_ms"] > 0
    # 6 images, 6 residuals and a few states of [32, 1024] float32 are under 3 MB.
    assert row["peak_mb"] < 20
    assert math.isfinite(row["check"][0])


def test_a_failed_case_stays_in_the_table_and_is_no_peer():
    ours = {"library": "deq_jax", "task": "train", "ms": 80.0}
    peer, other = ours | {"library": "torchdeq", "ms": 100.0}, ours | {"task": "infer", "ms": 1.0}
    failed = {"library": "torchdeq", "task": "train", "error": "out of memory"}
    assert of_the_best_peer(ours, [ours, failed, other, peer]) == "0.80"
    assert of_the_best_peer(other, [ours, failed, other, peer]) == "-"
    solve = {"library": "deq_jax", "method": "picard", "problem": "dense", "threads": 1}
    rows = [solve | {"direction": "forward", "ms": 12.34, "ratio": 1.0, "peak_mb": 2.0}]
    rows.append(solve | {"direction": "backward", "error": "out of memory"})
    cells = solvers.tables(rows).splitlines()[-1].split()
    assert cells == "| deq_jax | picard | 12.3 | failed | 1.00 | failed | 2 | failed |".split()


def test_vision_plan_puts_the_rival_beside_each_inference():
    cases = vision.plan(vision.parse(["--models", "cifar10_tiny"]))
    assert len(cases) == len(set(cases)) == 14
    assert {case.task for case in cases if case.model == vision.RIVAL} == {"infer"}
    on_gpu = vision.plan(vision.parse(["--device", "gpu"]))
    assert {case.form for case in on_gpu} >= {"compiled"} and on_gpu[0].batch == 64


def test_language_plan_has_equal_evaluations_and_flat_histories():
    parts = language.plan(language.parse([]))
    peers, flat = parts["peers"], parts["flat"]
    assert (len(peers), len(flat)) == (len(set(peers)), len(set(flat))) == (24, 8)
    assert {case.depth for case in peers} == {language.DEPTH}
    assert {(case.network, case.depth) for case in flat} == {
        (network, depth) for network in ("deq", "explicit") for depth in (4, 8, 16, 32)
    }
    assert {case.history for case in flat} == {6}
    on_gpu = language.plan(language.parse(["--device", "gpu", "--parts", "peers"]))
    assert list(on_gpu) == ["peers"]
    assert {case.form for case in on_gpu["peers"]} == {"1 device", "eager", "compiled"}


def test_a_language_case_is_measured_in_its_own_process():
    """At the smallest size, by the path of a real run."""
    case = {"size": "toy", "network": "deq", "library": "deq_jax", "form": "1 device"}
    case |= {"task": "train", "depth": 4, "history": 4, "batch": 2, "threads": 1}
    row = measured(language.MODULE, case, 3)
    assert "error" not in row, row
    assert row["ms"] > 0 and (row["evaluations"], row["products"]) == (4.0, 4.0)


def test_collectives_are_read_from_a_compiled_program():
    """Sizes and places that are known: a matrix's gradient, and one bool a test of a loop."""
    mesh, side = parallel.make_mesh(), 16
    x = jax.device_put(jax.numpy.ones((mesh.size, side)), parallel.batch_sharding(mesh))
    solver = deq.Picard(tol=1e-30, max_steps=5)

    def read(fixed_point):
        def loss(w, x):
            def f(w, z, x):
                return jax.numpy.tanh(z @ w + x)

            return fixed_point(f, w, jax.numpy.zeros_like(x), x, solver=solver).value.sum()

        w = jax.numpy.zeros((side, side))
        program = jax.jit(jax.grad(loss)).lower(w, x).compile()
        return programs.collectives(program.as_text() or "")

    ours = read(parallel.sharded_fixed_point(mesh))
    (gradient,) = [c for c in ours if c.bytes == 4 * side**2]
    assert (gradient.kind, gradient.place) == ("all-reduce", "once")
    assert {c.place for c in ours} == {"once"}

    plain = read(deq.fixed_point)
    assert [c.bytes for c in plain if c.place in programs.LOOPS] == [1, 1]
    rest = sum(c.bytes for c in plain if c.place not in programs.LOOPS)
    assert rest == sum(c.bytes for c in ours) == 4 * side**2
    assert programs.shape_bytes("(f32[2,3]{1,0}, /*index=1*/pred[], bf16[4]{0})") == 33


def test_kernels_are_read_from_a_compiled_program():
    """One iteration: a fusion that writes in place, one that does not, a copy, a library call."""
    text = """HloModule jit_go

%in_place (p: f32[4,8], q: f32[8]) -> f32[4,8] {
  ROOT %u = f32[4,8]{1,0} dynamic-update-slice(%p, %q, %i)
}

%whole (p: f32[4,8]) -> (f32[4,8], f32[]) {
  ROOT %t = (f32[4,8]{1,0}, f32[]) tuple(%p, %z)
}

%branch (p: f32[8]) -> f32[8] {
  ROOT %c = f32[8]{0} copy(%p)
}

%body (s: (f32[4,8], f32[8])) -> (f32[4,8], f32[8]) {
  %g = f32[4,8]{1,0} get-tuple-element(%s), index=0
  %a = f32[4,8]{1,0} fusion(%g, %h), kind=kLoop, calls=%in_place
  %b = (f32[4,8]{1,0}, f32[]) fusion(%g), kind=kLoop, calls=%whole
  %d = f32[8]{0} conditional(%i, %h, %h), branch_computations={%branch, %branch}
  %e = (f32[2]{0}, u8[0]{0}) custom-call(%h), custom_call_target="__cublas$gemm"
  ROOT %r = (f32[4,8]{1,0}, f32[8]{0}) tuple(%a, %d)
}

%test (s: (f32[4,8], f32[8])) -> pred[] {
  ROOT %l = pred[] fusion(%s), kind=kLoop, calls=%whole
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %w = (f32[4,8]{1,0}, f32[8]{0}) while(%t), condition=%test, body=%body
  ROOT %o = f32[8]{0} copy(%y)
}
"""
    ((body, test),) = programs.loops(text)
    assert (body.fusions, body.copies, body.calls, body.conditionals) == (2, 2, 1, 1)
    assert body.total == 5 and body.loops == 0 and max(body.written) == 4 * 32
    assert body.written.count(4 * 32) == 1  # the one in place is not
    assert test.total == 1
    whole = programs.kernels(text)
    assert (whole.total, whole.loops) == (body.total + test.total + 1, 1)


def test_started_collectives_branches_and_traffic():
    """As a GPU's program starts them: operands first, the result last."""
    text = """HloModule jit_go

%small (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %s = ((f32[8]{0}), f32[8]{0}) all-reduce-start(%p), to_apply=%add
  ROOT %d = f32[8]{0} all-reduce-done(%s)
}

%large (p: f32[8]) -> f32[16] {
  %p = f32[8]{0} parameter(0)
  %q = pred[4]{0} constant({...})
  %s = ((f32[8]{0}, pred[4]{0}), (f32[16]{0}, pred[8]{0})) all-gather-start(%p, %q), dimensions={0}
  ROOT %d = f32[16]{0} all-gather-done(%s)
}

ENTRY %main (x: f32[8], i: s32[]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %i = s32[] parameter(1)
  %c = f32[8]{0} conditional(%i, %x, %x), branch_computations={%small, %large}
  ROOT %f = f32[2,8]{1,0} fusion(%c, %i), kind=kLoop, calls=%twice
}
"""
    small = programs.Collective("all-reduce", 32, "branch")
    large = programs.Collective("all-gather", 64 + 8, "branch")
    assert programs.collectives(text) == [small, large]
    assert programs.collectives(text, every_branch=False) == [large]
    reduce, gather, fusion = 32 + 32, 32 + 4 + 64 + 8, 64 + 32 + 4
    assert programs.traffic(text) == reduce + gather + fusion
