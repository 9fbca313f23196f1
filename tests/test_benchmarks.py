"""The benchmark's plan, its table, and one case run as the benchmark runs it."""

import math

import jax

import deq_jax as deq
from benchmarks import (
    _scaling_model,
    _scaling_program,
    _scaling_tables,
    language,
    scaling,
    solvers,
    vision,
)
from benchmarks._case import in_process
from benchmarks._peers import Case
from deq_jax.training import parallel


def test_plan_leaves_out_what_optimistix_does_not_have():
    cases = solvers.plan(solvers.parse([]))
    for library in ("optimistix", "deq_jax-last"):
        assert {case.method for case in cases if case.library == library} == {"picard"}
    problems, threads, directions = 3, 2, 2
    rows = 3 * len(("deq_jax", "torchdeq", "jaxopt")) + 2
    assert len(cases) == len(set(cases)) == problems * threads * directions * rows


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


def test_vision_sizes_are_those_of_the_presets():
    from benchmarks._vision_case import MODELS
    from experiments.image_classification.presets import PRESETS

    for name, preset in (("cifar10_tiny", "cifar10_tiny"), ("cifar10_large", "cifar10_large_jr")):
        ours, config = MODELS[name], PRESETS[preset]
        for field in ("channels", "head", "final", "expansion", "classes"):
            assert getattr(ours, field) == getattr(config.model, field)
        assert (ours.forward, ours.backward) == (config.solver.max_steps, config.backward.max_steps)


def test_vision_plan_puts_the_rival_beside_each_inference():
    cases = vision.plan(vision.parse(["--models", "cifar10_tiny"]))
    assert len(cases) == len(set(cases)) == 14
    assert {case.task for case in cases if case.model == vision.RIVAL} == {"infer"}
    on_gpu = vision.plan(vision.parse(["--device", "gpu"]))
    assert {case.form for case in on_gpu} >= {"compiled"} and on_gpu[0].batch == 64


def test_vision_failures_stay_in_the_table():
    good = {"model": "cifar10_tiny", "library": "deq_jax", "form": "1 device", "task": "train"}
    good |= {"batch": 16, "ms": 80.0, "peak_mb": 2.0}
    peer = good | {"library": "torchdeq", "form": "NCHW", "ms": 100.0}
    bad = {key: peer[key] for key in ("model", "library", "task", "batch")}
    bad |= {"form": "channels_last", "error": "out of memory"}
    text = vision.tables([good, bad, peer])
    assert "| train | cifar10_tiny | deq_jax | 1 device | 80.0 | 5.0 | 2 | 0.80 |" in text
    assert "failed: out of memory" in text


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


def test_language_failures_stay_in_the_table():
    good = {"size": "small", "batch": 8, "library": "deq_jax", "form": "1 device", "task": "train"}
    good |= {"ms": 80.0, "tokens_s": 6400.0, "peak_mb": 2.0, "evaluations": 12.0, "products": 12.0}
    peer = good | {"library": "torchdeq", "form": "eager", "ms": 100.0}
    bad = {key: peer[key] for key in ("size", "batch", "library", "task")}
    bad |= {"form": "eager, 1 thread", "error": "out of memory"}
    text = language.tables({"peers": [good, bad, peer]})
    assert "| train | deq_jax | 1 device | 80.0 | 6,400 | 2 | 0.80 |" in text
    assert "failed: out of memory" in text and "evaluations 12 + 12 in training" in text


def test_a_language_case_is_measured_in_its_own_process():
    """At the smallest size, by the path of a real run."""
    case = {"size": "toy", "network": "deq", "library": "deq_jax", "form": "1 device"}
    case |= {"task": "train", "depth": 4, "history": 4, "batch": 2, "threads": 1}
    row = in_process(language.RUNNER, {"case": case, "repeats": 3})
    assert "error" not in row, row
    assert row["ms"] > 0 and (row["evaluations"], row["products"]) == (4.0, 4.0)


def test_scaling_counts_solver_steps_on_the_most_devices_only():
    cases = scaling.plan(scaling.parse([]))
    assert len(cases) == len(set(cases)) == 12
    assert {case.devices for case in cases if case.trained is not None} == {8}
    assert {case.examples for case in cases if case.model == "digits"} == {12}  # 8 x 12: the preset


def test_collectives_are_read_from_a_compiled_program():
    """Sizes and places that are known: a matrix's gradient, and one bool a test of a loop."""
    mesh, side, steps = parallel.make_mesh(), 16, 5
    x = jax.device_put(jax.numpy.ones((mesh.size, side)), parallel.batch_sharding(mesh))
    solver = deq.Picard(tol=1e-30, max_steps=steps)

    def read(fixed_point):
        def loss(w, x):
            def f(w, z, x):
                return jax.numpy.tanh(z @ w + x)

            return fixed_point(f, w, jax.numpy.zeros_like(x), x, solver=solver).value.sum()

        w = jax.numpy.zeros((side, side))
        program = jax.jit(jax.grad(loss)).lower(w, x).compile()
        return _scaling_program.collectives(program.as_text())

    ours = read(parallel.sharded_fixed_point(mesh))
    (gradient,) = [c for c in ours if c.bytes == 4 * side**2]
    assert (gradient.kind, gradient.place) == ("all-reduce", "once")
    assert {c.place for c in ours} == {"once"}

    found = _scaling_program.summary(read(deq.fixed_point), steps, steps)
    assert (found["in_loops"], found["loop_bytes"]) == (2, 2)
    assert found["executed"] - found["once"] == 2 * (steps + 1)
    assert found["once_bytes"] == sum(c.bytes for c in ours) == 4 * side**2
    assert _scaling_program.shape_bytes("(f32[2,3]{1,0}, /*index=1*/pred[], bf16[4]{0})") == 33


def test_scaling_model_by_hand():
    """256 GPUs are 32 nodes of 8; 256 TPU chips a torus of 4 x 8 x 8."""
    nothing = _scaling_model.gpu_seconds(0, 256)
    assert math.isclose(nothing, 6.8e-6 + 2 * (7 * 0.6e-6 + 5 * 5.0e-6))
    large = _scaling_model.gpu_seconds(4e8, 256)
    latency = 8.4e-6 + 2 * (7 * 4.0e-6 + 5 * 14.0e-6)
    assert math.isclose(large, latency + 2 * 255 / 256 * 4e8 / 400e9)
    assert _scaling_model.torus(256) == (4, 8, 8)
    assert math.isclose(_scaling_model.tpu_seconds(0, 256), 20e-6)
    assert math.isclose(_scaling_model.tpu_seconds(2.7e8, 256), 20e-6 + 2 * 255 / 256 * 1e-3)
    assert _scaling_model.gpu_seconds(1, 1) == _scaling_model.tpu_seconds(1, 1) == 0


def test_scaling_measures_a_case_and_puts_it_beside_failures():
    """The made map on two devices, by the path of a real run."""
    case = scaling.Case("uneven", devices=2, examples=4, threads=1, trained=0)
    rows = scaling.measured(case, 3)
    assert [row.get("form", row.get("error")) for row in rows] == ["shard_map", "plain jit"]
    assert all(row["ms"] > 0 and row["cpu_ms"] > 0 for row in rows)
    (ordered, shuffled) = _scaling_tables.loops(rows)
    assert ordered["forward"][0] < ordered["forward"][1] == ordered["plain"]["forward"]
    assert ordered["work"] < shuffled["work"] <= 1
    ours, plain = _scaling_tables.programs(rows)
    assert (ours["in_loops"], plain["in_loops"]) == (0, 2)
    assert plain["executed"] - ours["executed"] == ordered["tests"]
    text = _scaling_tables.times([*rows, {**vars(case), "error": "out of memory"}])
    assert "| uneven | 2 | 8 | failed: out of memory |" in text and "| plain jit |" in text


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
    ((body, test),) = _scaling_program.loops(text)
    assert (body.fusions, body.copies, body.calls, body.conditionals) == (2, 2, 1, 1)
    assert body.total == 5 and body.loops == 0 and max(body.written) == 4 * 32
    assert body.written.count(4 * 32) == 1  # the one in place is not
    assert test.total == 1
    whole = _scaling_program.kernels(text)
    assert (whole.total, whole.loops) == (body.total + test.total + 1, 1)
