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
from deq_jax.diagnosis import diagnose, measures
from deq_jax.training import UsageError, fields, weights
from deq_jax.training.parallel import make_mesh
from experiments.common import diagnose as command
from experiments.common import run as common_run
from experiments.image_classification import main as image_main
from experiments.image_classification import presets as image_presets
from experiments.image_classification import task as image_task
from experiments.toy_regression import config as toy_config
from experiments.toy_regression import main as toy_main
from experiments.toy_regression import task as toy_task

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
    found = diagnose(affine_map, w, jnp.zeros_like(x), x, key=KEY, solvers=PLAIN)
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


def test_traces_are_those_of_the_solvers_and_a_notebook_shows_tables():
    problem = testing.affine()
    mine = {"damped": deq.Picard(damping=0.5, max_steps=12), "mine": deq.Broyden(max_steps=8)}
    found = look(problem, solvers=mine)
    for name, solver in mine.items():
        operands = problem.params, problem.z0, problem.x
        stats = deq.fixed_point(problem.f, *operands, solver=solver).stats
        np.testing.assert_allclose(found.trace[name], stats.trace, rtol=1e-6)
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

    solvers, jacobian, penalty, advice = found._repr_markdown_().split("\n\n")
    for table in (solvers, jacobian):
        header, rule, *rows = [line.split("|")[1:-1] for line in table.splitlines()]
        assert all(re.fullmatch(" :?-+:? ", cell) for cell in rule)
        assert rows and all(len(row) == len(header) == len(rule) for row in rows)
    assert "alignment" in solvers and "spectral radius" in jacobian
    assert penalty.startswith("penalty ")
    assert all(line.startswith("- ") for line in advice.splitlines())


# --- advice ----------------------------------------------------------------------------------


def overflow(params, z, x):
    return jnp.exp(params * (z + 100)) + x


def constant(params, z, x):
    return 0 * z + x


RUNAWAY = "not use the answers of .*Broyden.*no fixed point is near"


@pytest.mark.parametrize(
    ("problem", "settings", "wanted"),
    [
        (testing.affine(radius=0.5), {}, ["All is well: every sample .* at most 0.50"]),
        (
            testing.affine(radius=0.95),
            {},
            ["needs about 135 steps to 0.001 at .* 0.95", "Broyden solves what plain"],
        ),
        (
            testing.affine(radius=1.3),
            {},
            ["diverges: .* 1.30. Lower .* a factor of 1.3 or more, or train", "Broyden solves"],
        ),
        (testing.rotation(), {}, ["does not settle: .* 1.00", "Anderson .* 4 steps"]),
        (
            testing.logistic(rate=3.3),
            {},
            ["diverges: .* 1.30", "Anderson solves", "depends on the start: .* reaches another"],
        ),
        (testing.logistic(rate=2.8), {}, ["All is well", "depends on the start: .* another"]),
        (
            testing.nonnormal(),
            {},
            ["All is well", "norm is 10 where the spectral radius is 0.00: .*init.orthogonal"],
        ),
        (
            testing.no_fixed_point(),
            {},
            ["No solver reaches .* may be no fixed point", "diverges: .* 2.00"],
        ),
        (
            testing.growth(),
            {},
            ["No solver reaches .* may be no fixed point", "diverges"],
        ),
        (
            testing.translation(),
            {},
            ["No solver reaches .* may be no fixed point", "does not settle: .* 1.00"],
        ),
        (
            testing.hyperbola(),
            {},
            [RUNAWAY, "No solver reaches .* may be no fixed point"],
        ),
        (
            testing.affine(radius=0.9),
            {"solvers": {"Picard": deq.Picard(tol=1e-6, max_steps=40)}},
            ["No solver .* Picard still falls: .*; about 1[23][0-9] steps would do"],
        ),
        (
            testing.affine(dtype=jnp.bfloat16),
            {"solvers": {"Picard": deq.Picard(tol=1e-4)}},
            ["stalls at .*e-03 .Picard.*precise to .*e-03 only.*in float32"],
        ),
        (
            testing.affine(),
            {"solvers": {"Picard": deq.Picard(tol=1e-9, max_steps=60)}},
            ["stalls.*Picard.*in float64"],
        ),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_advice_on_problems_with_known_answers(problem, settings, wanted):
    advice = look(problem, **settings).advice
    assert len(advice) == len(wanted), advice
    for sentence, pattern in zip(advice, wanted, strict=True):
        assert re.search(pattern, sentence), advice


class Leap(deq.Picard):
    """Goes so far away that any relative residual is small; `Broyden` did so once."""

    def step(self, z, fz, state):
        return jax.tree.map(lambda a: 50 * a, fz), state


@pytest.mark.parametrize(
    "problem", [testing.translation(), testing.prenorm()], ids=lambda p: p.name
)
def test_a_runaway_is_found_although_its_solver_reports_convergence(problem):
    """The tolerance is so large that the bound on the size, 100 first norms, does not help."""
    found = look(problem, solvers={"Picard": deq.Picard(), "Leap": Leap(tol=0.05)})
    operands = problem.params, problem.z0, problem.x
    assert deq.fixed_point(problem.f, *operands, solver=Leap(tol=0.05)).stats.converged.all()
    assert found.runaway["Leap"].all() and not found.converged["Leap"].any()
    assert not found.runaway["Picard"].any()
    assert "answers of Leap" in found.advice[0] and "no fixed point is near" in found.advice[0]
    assert not any("use it" in sentence or "would do" in sentence for sentence in found.advice)
    assert any(re.search("does not settle: .* 1.00", sentence) for sentence in found.advice)


def test_a_large_true_solution_is_no_runaway():
    """z = 0.99 z + x: the solution is 100 times as long as f(z0)."""
    x = jax.random.normal(KEY, (4, 8))
    f = lambda params, z, x: params * z + x  # noqa: E731
    solvers = {"Anderson": deq.Anderson(tol=1e-5)}
    found = diagnose(f, 0.99, 0 * x, x, key=KEY, solvers=solvers, iters=10)
    np.testing.assert_allclose(found.value, 100 * x, rtol=2e-3)
    assert found.converged["Anderson"].all() and not found.runaway["Anderson"].any()


def centred(w, z, x):
    """Statistics of the batch."""
    return np.tanh((z - z.mean(axis=0, keepdims=True)) @ w + x)


def neighbour(w, z, x):
    """One sample reads another."""
    moved = np.tanh(z @ w + x)
    moved[0] += 0.1 * z[-1]
    return moved


def transposed(w, z, x):
    """A matrix that is one sample, taken for a batch of rows."""
    return np.tanh(w[: len(z), : len(z)] @ z + x)


def lonely(w, z, x):
    return np.tanh(z @ w + x)


@pytest.mark.parametrize("batch", [2, 5, 8])
def test_samples_that_depend_on_each_other_are_found(batch):
    rng = np.random.default_rng(0)
    w, x, z = rng.normal(size=(8, 8)), rng.normal(size=(batch, 8)), jnp.ones((batch, 8))
    alone = [False] * (batch - 1)
    for f, wanted in (
        (centred, [True] * batch),
        (transposed, [True] * batch),
        (neighbour, [True, *alone]),
        (lonely, [False, *alone]),
    ):
        f = lambda w, z, x, f=f: f(w, np.asarray(z), x)  # noqa: E731
        assert measures._dependent(f, w, z, x, rng).tolist() == wanted


def test_advice_on_samples_that_depend_on_each_other():
    w = deq.init.orthogonal(0.5)(KEY, (6, 6))
    x = jax.random.normal(KEY, (5, 6))

    @jax.jit
    def mixed(every, z, x):
        whole = z.mean(axis=0, keepdims=True)
        return jnp.tanh((z - every * whole) @ w + x).at[0].add(0.1 * (1 - every) * z[-1])

    settings = {"key": KEY, "solvers": PLAIN, "iters": 10}
    found = diagnose(mixed, 1.0, 0 * x, x, **settings)
    assert found.dependent.all() and found.advice[0].startswith("The samples depend on each other")
    assert "If z0 has no batch axis, pass batched=False" in found.advice[0]
    found = diagnose(mixed, 0.0, 0 * x, x, **settings)
    assert found.dependent.tolist() == [True] + [False] * 4
    assert found.advice[0].startswith("1 of 5 samples: The samples depend")


def test_a_state_without_a_batch_axis():
    """f(W, x, z) = tanh(W z + x) of one vector, and a batch of numbers."""
    w = deq.init.orthogonal(0.9)(KEY, (16, 16))
    x = jax.random.normal(KEY, (16,))

    @jax.jit
    def f(w, z, x):
        return jnp.tanh(w @ z + x)

    with pytest.raises(ValueError, match=r"got a state float32\[16\].*pass batched=False"):
        diagnose(f, w, 0 * x, x, key=KEY)
    settings = {"key": KEY, "solvers": PLAIN, "iters": 10}
    found = diagnose(f, w, 0 * x, x, batched=False, **settings)
    assert found.converged["Picard"].tolist() == [True]
    assert found.advice[0].startswith("All is well")
    numbers = jnp.linspace(0.1, 0.9, 4)
    halved = jax.jit(lambda p, z, x: 0.5 * z + x)
    found = diagnose(halved, None, 0 * numbers, numbers, batched=True, **settings)
    assert found.converged["Picard"].all() and not found.dependent.any()


def test_alignment_is_the_cosine_between_fixed_points():
    """z = a tanh(z) + x with a = 2 has one stable solution of each sign in every element."""
    x = jnp.zeros((6, 40))
    start = jnp.ones_like(x)
    f = lambda params, z, x: 2 * jnp.tanh(z) + x  # noqa: E731
    found = diagnose(f, None, start, x, key=KEY, solvers=PLAIN, iters=10)
    root = 1.9150080481545375  # 2 tanh(root) = root
    np.testing.assert_allclose(found.value, root, rtol=1e-2)
    # Zero is a fixed point too, so the smallest cosine is that with zero.
    np.testing.assert_array_equal(found.alignment["Picard"], 0)
    assert "depends on the start: " in found.advice[-1] and "Picard reaches" in found.advice[-1]
    once = {"Picard": deq.Picard(max_steps=1)}
    found = diagnose(f, None, 0.1 * x + 1e-3, x, key=KEY, solvers=once, iters=10)
    assert np.isnan(found.alignment["Picard"]).all()
    assert re.search(r"\| Picard \|  *1 \|  *0% \|  *- \|", str(found))
    unique = testing.affine(radius=0.5)
    found = look(unique, solvers={"Picard": deq.Picard(tol=1e-5, max_steps=60)})
    np.testing.assert_allclose(found.alignment["Picard"], 1, atol=1e-5)


def test_steps_foretold_are_those_taken():
    problem = testing.affine(radius=0.9)
    solvers = {"Picard": deq.Picard(max_steps=20), "Broyden": deq.Broyden()}
    advice = look(problem, solvers=solvers).advice[0]
    assert advice.startswith("Plain iteration needs about ")
    need = int(advice.split("about ")[1].split()[0])
    operands = problem.params, problem.z0, problem.x
    sol = deq.fixed_point(problem.f, *operands, solver=PLAIN["Picard"])
    assert need == pytest.approx(np.median(sol.stats.num_steps), rel=0.3)


def test_advice_is_followed():
    """Orthogonal weights, or the factor named, make plain iteration converge."""
    x = jax.random.normal(KEY, (4, 32))
    w = deq.init.gaussian(1.2)(KEY, (32, 32))
    found = diagnose(affine_map, w, jnp.zeros_like(x), x, key=KEY, solvers=PLAIN)
    (said,) = [s for s in found.advice if "Plain iteration diverges" in s]
    assert "start from orthogonal weights (deq.init.orthogonal)" in said
    factor = float(said.split(" by a factor of ")[1].split()[0])
    for better in (w / (1.1 * factor), deq.init.orthogonal(0.9)(KEY, (32, 32))):
        after = diagnose(affine_map, better, jnp.zeros_like(x), x, key=KEY, solvers=PLAIN)
        assert after.converged["Picard"].all()
        assert "All is well" in after.advice[0]


def test_a_start_without_image_and_a_state_that_is_not_read():
    x = jnp.ones((4, 8))
    settings = {"key": KEY, "solvers": PLAIN}
    found = diagnose(overflow, jnp.ones(()), jnp.zeros_like(x), x, **settings)
    assert found.advice == (
        "f(z0) is not finite, and no solver can start: look for an overflow in f, or choose "
        "another z0.",
    )
    assert re.search(r"\| spectral radius \|  *- \|", str(found))
    spoiled = x.at[0].set(jnp.nan)
    found = diagnose(affine_map, jnp.eye(8) / 2, jnp.zeros_like(x), spoiled, **settings)
    assert found.advice[0].startswith("1 of 4 samples: f(z0) is not finite")
    assert found.advice[0].endswith("not finite in x.")
    assert "| Picard |            10 |    75% |" in str(found)
    found = diagnose(constant, None, jnp.zeros_like(x), x, **settings)
    assert found.advice[0].startswith("f does not depend on z")
    assert found.steps["Picard"].max() == 2


def test_bad_calls_raise():
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

    layer = deq.linen.DEQ(Cell(), solver=PLAIN["Picard"])
    x = jax.random.normal(KEY, (4, 8))
    z0 = jnp.zeros_like(x)
    sol = layer.apply(layer.init(KEY, z0, x, train=False, max_steps=0), z0, x, train=False)
    equation = sol.equation
    found = diagnose(equation.f, equation.params, z0, equation.x, key=KEY, solvers=PLAIN)
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
    monkeypatch.setattr(common_run, "make_mesh", lambda: mesh)


def asked(config):
    return dataclasses.replace(config, diagnose=True)


def keep(config, task, mesh):
    """Weights where the training of this model leaves its own, and all that is there then."""
    params, extra, source = command.load(config, task, mesh)
    assert source == f"at its initial weights (no checkpoint in {config.workdir})"
    weights.save(config.workdir, jax.tree.map(lambda a: a + 0.01, params), extra, {})
    return params


def without_a_look(monkeypatch):
    """Which models are diagnosed, without their diagnosis."""
    monkeypatch.setattr(command, "solve", lambda *_: None)
    monkeypatch.setattr(command, "report", lambda *_: "")


@pytest.mark.slow
def test_toy_regression_is_diagnosed_before_and_after_training(
    tmp_path, capsys, two_devices, monkeypatch
):
    preset = toy_config.PRESETS["paper"]
    data = dataclasses.replace(preset.data, train_pairs=64, test_pairs=40)
    config = shrunk(preset, tmp_path / "run", data=data, gammas=(2.0, 4.0))
    assert toy_main.run(asked(config)) == {}
    before = capsys.readouterr().out
    assert before.startswith("# gamma_2, at its initial weights") and before.count("# ") == 1
    assert "16 examples" in before and "| Broyden" in before and "| spectral radius" in before
    assert not (tmp_path / "run").exists()
    folder, mesh = tmp_path / "run" / "gamma_2", common_run.make_mesh()
    part = dataclasses.replace(config, workdir=str(folder))
    initial = keep(part, toy_task.build_task(part, mesh), mesh)
    without_a_look(monkeypatch)
    files = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert toy_main.run(asked(config)) == {}
    after = capsys.readouterr().out
    assert after.startswith(f"# gamma_2, weights of {folder}") and after.count("# ") == 1
    assert sorted(tmp_path.rglob("*")) == files
    assert not fields.differences(fields.to_dict(config), asked(config))
    wider = dataclasses.replace(config, model=dataclasses.replace(config.model, hidden=7))
    with pytest.raises(UsageError, match=r"are of another model: .* is \(.*50.*\) there and"):
        toy_main.run(asked(wider))
    again = dataclasses.replace(config, workdir=str(tmp_path / "new"), init_from=str(folder))
    found = [command.load(c, toy_task.build_task(c, mesh), mesh) for c in (part, again)]
    assert found[1][2] == f"weights of {folder}" == found[0][2]
    jax.tree.map(np.testing.assert_array_equal, found[0][:2], found[1][:2])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b + 0.01), found[0][0], initial)
    with pytest.raises(UsageError, match="no checkpoint in "):
        toy_main.run(asked(dataclasses.replace(again, init_from=str(tmp_path))))


@pytest.mark.slow
def test_an_image_model_is_diagnosed_without_and_with_a_checkpoint(
    tmp_path, capsys, two_devices, monkeypatch
):
    preset = image_presets.PRESETS["digits"]
    model = dataclasses.replace(
        preset.model, channels=(4,), groups=2, expansion=1, head=(2,), final=8
    )
    solver = dataclasses.replace(preset.solver, name="picard")
    config = shrunk(preset, tmp_path / "run", model=model, solver=solver)
    with monkeypatch.context() as patch:
        without_a_look(patch)
        assert image_main.run(asked(config)) == {}
    assert capsys.readouterr().out.startswith("# no_jr, at its initial weights")
    mesh, folder = common_run.make_mesh(), tmp_path / "run" / "jr"
    part = dataclasses.replace(config, workdir=str(folder))
    keep(part, image_task.build_task(part, mesh), mesh)
    image_main.run(asked(config))
    shown = capsys.readouterr().out
    assert shown.startswith(f"# jr, weights of {folder}\n") and "| spectral radius" in shown


@pytest.mark.slow
def test_a_model_without_equilibrium_is_refused(tmp_path, two_devices, monkeypatch):
    preset = image_presets.PRESETS["cifar10_resnet18"]
    config = shrunk(preset, tmp_path / "run", data=image_presets.PRESETS["digits"].data)
    monkeypatch.setattr(command, "load", lambda *_: (None, None, ""))  # compiles for long
    with pytest.raises(UsageError, match="--diagnose for a model without an equilibrium"):
        image_main.run(asked(config))
