"""The benchmark's plan, its table, and one case run as the benchmark runs it."""

import math

from benchmarks import language, solvers, vision
from benchmarks._case import in_process
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
