"""A diagnosis says what is known of a problem, and --diagnose what it says of a model."""

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deq_jax as deq
import deq_jax.linen
from deq_jax import testing
from deq_jax.diagnosis import Diagnosis, diagnose
from deq_jax.training import UsageError, fields, weights
from deq_jax.training.parallel import make_mesh
from experiments import diagnose as command
from experiments.image_classification import main as image_main
from experiments.image_classification import presets as image_presets
from experiments.image_classification import task as image_task
from experiments.toy_regression import config as toy_config
from experiments.toy_regression import main as toy_main

KEY = jax.random.key(0)
PLAIN = {"Picard": deq.Picard(max_steps=200)}


def look(problem, **settings):
    return diagnose(problem.f, problem.params, problem.z0, problem.x, key=KEY, **settings)


def affine_map(params, z, x):
    return z @ params + x


# --- numbers ---------------------------------------------------------------------------------


def test_norms_are_those_of_the_matrix():
    w = deq.init.gaussian(0.6)(KEY, (12, 12))
    x = jax.random.normal(KEY, (3, 12))
    found = diagnose(affine_map, w, jnp.zeros_like(x), x, key=KEY)
    matrix = np.asarray(w)
    np.testing.assert_allclose(found.operator_norm, np.linalg.norm(matrix, 2), rtol=1e-3)
    radius = np.abs(np.linalg.eigvals(matrix)).max()
    np.testing.assert_allclose(found.spectral_radius, radius, rtol=0.02)
    assert found.penalty == pytest.approx((matrix**2).sum() / 12, rel=0.3)


def test_norm_of_every_sample_behind_a_custom_vjp_and_behind_a_solve():
    @jax.custom_vjp
    def scaled(z, x):
        return jnp.tanh(z) * x

    scaled.defvjp(
        lambda z, x: (scaled(z, x), (z, x)),
        lambda saved, g: (g * saved[1] / jnp.cosh(saved[0]) ** 2, None),
    )

    def custom(params, z, x):
        return scaled(z, x) @ params

    def nested(params, z, x):  # inner = 0.5 inner + custom / 2
        inner = deq.fixed_point(
            lambda p, u, v: 0.5 * u + 0.5 * custom(p, *v), params, jnp.zeros_like(z), (z, x),
            solver=deq.Picard(tol=1e-6),
        )  # fmt: skip
        return inner.value

    w = deq.init.gaussian(0.8)(KEY, (4, 4))
    x = jnp.array([0.1, 0.5, 0.9])[:, None] * jnp.ones((1, 4))
    want = [np.linalg.norm(row[:, None] * np.asarray(w), 2) for row in np.asarray(x)]  # at z = 0
    for f, rtol in ((custom, 1e-4), (nested, 1e-2)):
        found = diagnose(f, w, jnp.zeros_like(x), x, key=KEY, solvers=PLAIN, iters=40)
        np.testing.assert_allclose(found.operator_norm, want, rtol=rtol)


def test_traces_are_those_of_the_solvers():
    problem = testing.affine()
    mine = {"damped": deq.Picard(damping=0.5, max_steps=12), "mine": deq.Broyden(max_steps=8)}
    found = look(problem, solvers=mine)
    for name, solver in mine.items():
        stats = deq.solve(
            solver, lambda z: problem.f(problem.params, z, problem.x), problem.z0
        ).stats
        np.testing.assert_array_equal(found.trace[name], stats.trace)
        np.testing.assert_array_equal(found.steps[name], stats.num_steps)
        np.testing.assert_array_equal(found.converged[name], stats.converged)
        for k in (1, 8):
            ends = np.minimum(stats.num_steps, k) - 1
            middle = np.median(np.asarray(stats.trace)[ends, np.arange(len(ends))])
            assert f" {middle:.1e} |" in str(found).split(f"| {name} ")[1].splitlines()[0]
    text = str(found)
    assert text.splitlines()[0].endswith("at step 1 |       2 |       4 |       8 |      12 |")
    assert "| damped |" in text and "| operator norm   |" in text
    assert all(f"- {sentence}\n" in text for sentence in found.advice)


# --- advice ----------------------------------------------------------------------------------


def overflow(params, z, x):
    return jnp.exp(params * (z + 100)) + x


def constant(params, z, x):
    return 0 * z + x


@pytest.mark.parametrize(
    ("problem", "settings", "wanted"),
    [
        (testing.affine(radius=0.5), {}, ["All is well: every sample .* at most 0.50"]),
        (
            testing.affine(radius=0.95),
            {},
            ["radius of 0.95 plain iteration needs about 135 steps", "Broyden solves what plain"],
        ),
        (
            testing.affine(radius=1.3),
            {},
            ["1.30: plain iteration diverges; lower .* by 1.3 or more, or train", "Broyden solves"],
        ),
        (testing.rotation(), {}, ["1.00: plain iteration does not settle", "Anderson .* 4 steps"]),
        (testing.logistic(rate=3.3), {}, ["1.30: plain iteration diverges", "Anderson solves"]),
        (
            testing.nonnormal(),
            {},
            ["All is well", "norm is 10 where the spectral radius is 0.00: .*init.orthogonal"],
        ),
        (
            testing.no_fixed_point(),
            {},
            ["No solver reaches .* may be no fixed point", "would-be .* is 2.00: .* diverges"],
        ),
        (
            testing.affine(radius=0.9),
            {"solvers": {"Picard": deq.Picard(tol=1e-6, max_steps=40)}},
            ["No solver .* Picard .* and falling: about 1[23][0-9] would do"],
        ),
        (
            testing.affine(dtype=jnp.bfloat16),
            {"tol": 1e-4},
            ["Picard.* stall.* at a residual of .*e-03 .*precise to .*e-03 only.*in float32"],
        ),
        (testing.affine(), {"tol": 1e-9, "max_steps": 60}, ["Picard.* stall.*in float64"]),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_advice_on_problems_with_known_answers(problem, settings, wanted):
    advice = look(problem, **settings).advice
    assert len(advice) == len(wanted), advice
    for sentence, pattern in zip(advice, wanted, strict=True):
        assert re.search(pattern, sentence), advice


def test_steps_foretold_are_those_taken():
    problem = testing.affine(radius=0.9)
    advice = look(problem, max_steps=20).advice[0]
    need = int(advice.split("about ")[1].split()[0])
    sol = deq.solve(PLAIN["Picard"], lambda z: problem.f(problem.params, z, problem.x), problem.z0)
    assert need == pytest.approx(np.median(sol.stats.num_steps), rel=0.3)


def test_advice_is_followed():
    """Orthogonal weights, or the factor named, make plain iteration converge."""
    x = jax.random.normal(KEY, (4, 32))
    w = deq.init.gaussian(1.2)(KEY, (32, 32))
    found = diagnose(affine_map, w, jnp.zeros_like(x), x, key=KEY, solvers=PLAIN)
    (said,) = [s for s in found.advice if "plain iteration diverges" in s]
    assert "start from orthogonal weights (deq.init.orthogonal)" in said
    factor = float(said.split(" by ")[1].split()[0])
    for better in (w / (1.1 * factor), deq.init.orthogonal(0.9)(KEY, (32, 32))):
        after = diagnose(affine_map, better, jnp.zeros_like(x), x, key=KEY, solvers=PLAIN)
        assert after.converged["Picard"].all()
        assert "All is well" in after.advice[0]


def test_a_start_without_image_and_a_state_that_is_not_read():
    x = jnp.ones((4, 8))
    settings = {"key": KEY, "solvers": PLAIN}
    found = diagnose(overflow, jnp.ones(()), jnp.zeros_like(x), x, **settings)
    assert found.advice == (
        "f(z0) is not finite, where no solver can begin: look for an overflow in f, or start from "
        "another z0.",
    )
    assert "nan" in str(found)
    spoiled = x.at[0].set(jnp.nan)
    found = diagnose(affine_map, jnp.eye(8) / 2, jnp.zeros_like(x), spoiled, **settings)
    assert "not finite in 1 of 4 samples" in found.advice[0] and "in x." in found.advice[0]
    assert "| Picard |            10 |    75% |" in str(found)
    found = diagnose(constant, None, jnp.zeros_like(x), x, **settings)
    assert found.advice[0].startswith("f does not depend on z")
    assert found.steps["Picard"].max() == 2


def test_bad_calls_are_refused_in_words():
    problem = testing.affine()
    with pytest.raises(ValueError, match="outside of jit"):
        jax.jit(lambda x: look(dataclasses.replace(problem, x=x)).penalty)(problem.x)
    with pytest.raises(ValueError, match="got no solver"):
        look(problem, solvers={})
    with pytest.raises(ValueError, match="got iters=0"):
        look(problem, iters=0)
    with pytest.raises(ValueError, match="f returned"):
        diagnose(lambda p, z, x: z[:1], None, problem.z0, None, key=KEY)


def test_a_linen_cell_through_its_equation():
    class Cell(nn.Module):
        @nn.compact
        def __call__(self, z, x):
            return jnp.tanh(nn.Dense(8, kernel_init=deq.init.orthogonal(0.8))(z) + x)

    layer = deq.linen.DEQ(Cell(), solver=deq.Anderson())
    x = jax.random.normal(KEY, (4, 8))
    z0 = jnp.zeros_like(x)
    sol = layer.apply(layer.init(KEY, z0, x, train=False), z0, x, train=False)
    found = diagnose(
        sol.equation.f, sol.equation.params, z0, sol.equation.x, key=KEY, max_steps=60
    )
    assert "All is well" in found.advice[0]
    assert (found.operator_norm <= 0.8 * (1 + 1e-5)).all()
    assert (found.spectral_radius <= found.operator_norm * 1.01).all()
    np.testing.assert_allclose(found.value, sol.value, atol=0.02)


# --- the command line ------------------------------------------------------------------------


def shrunk(preset, workdir, **parts):
    train = dataclasses.replace(
        preset.train, steps=2, warmup_steps=0, batch_size=32, log_every=1, checkpoint_every=2
    )
    evaluation = dataclasses.replace(preset.eval, budgets=(2,), spectral_batches=0)
    return dataclasses.replace(preset, workdir=str(workdir), train=train, eval=evaluation, **parts)


@pytest.fixture
def two_devices(monkeypatch):
    mesh = make_mesh(jax.devices()[:2])
    for module in (image_main, toy_main):
        monkeypatch.setattr(module, "make_mesh", lambda: mesh)


def asked(config):
    return dataclasses.replace(config, diagnose=True)


@pytest.mark.slow
def test_toy_regression_is_diagnosed_before_and_after_training(tmp_path, capsys, two_devices):
    preset = toy_config.PRESETS["paper"]
    data = dataclasses.replace(preset.data, train_pairs=64, test_pairs=40)
    config = shrunk(preset, tmp_path / "run", data=data, gammas=(2.0, 4.0))
    assert toy_main.run(asked(config)) == {}
    before = capsys.readouterr().out
    assert before.startswith("# gamma = 2, at its initial weights") and before.count("# ") == 1
    assert "16 examples" in before and "| Broyden" in before and "| spectral radius" in before
    assert not (tmp_path / "run").exists()
    toy_main.run(dataclasses.replace(config, gammas=(2.0,)))
    files = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert toy_main.run(asked(config)) == {}
    after = capsys.readouterr().out
    folder = tmp_path / "run" / "gamma_2"
    assert after.startswith(f"# gamma = 2, weights of {folder}") and after.count("# ") == 1
    assert sorted(tmp_path.rglob("*")) == files
    assert not fields.differences(fields.to_dict(config), asked(config))
    wider = dataclasses.replace(config, model=dataclasses.replace(config.model, hidden=7))
    with pytest.raises(UsageError, match=r"are of another model: .* is \(.*50.*\) there and"):
        toy_main.run(asked(wider))
    again = dataclasses.replace(config, workdir=str(tmp_path / "new"), init_from=str(folder))
    mesh = toy_main.make_mesh()
    part = dataclasses.replace(config, workdir=str(folder))
    found = [command.load(c, toy_main.ToyTask(c, mesh), mesh) for c in (part, again)]
    assert found[1][2] == f"weights of {folder}" == found[0][2]
    jax.tree.map(np.testing.assert_array_equal, found[0][:2], found[1][:2])
    with pytest.raises(UsageError, match="no checkpoint in "):
        toy_main.run(asked(dataclasses.replace(again, init_from=str(tmp_path))))


@pytest.mark.slow
def test_an_image_model_is_diagnosed_without_and_with_a_checkpoint(tmp_path, capsys, two_devices):
    preset = image_presets.PRESETS["digits"]
    model = dataclasses.replace(
        preset.model, channels=(4,), groups=2, expansion=1, head=(2,), final=8
    )
    config = shrunk(preset, tmp_path / "run", model=model)
    assert image_main.run(asked(config)) == {}
    assert capsys.readouterr().out.startswith("# no_jr, at its initial weights")
    task = image_task.ImageTask(config, image_main.make_mesh())
    weights.save(tmp_path / "run" / "jr", *jax.jit(task.init)(jax.random.key(7)), {})
    image_main.run(asked(config))
    assert capsys.readouterr().out.startswith(f"# jr, weights of {tmp_path / 'run' / 'jr'}\n")


@pytest.mark.slow
def test_a_model_without_equilibrium_is_refused(tmp_path, two_devices):
    preset = image_presets.PRESETS["cifar10_resnet18"]
    config = shrunk(preset, tmp_path / "run", data=image_presets.PRESETS["digits"].data)
    with pytest.raises(UsageError, match="--diagnose for a model without an equilibrium"):
        image_main.run(asked(config))
