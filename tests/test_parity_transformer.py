"""The DEQ-Transformer against arrays recorded from the published PyTorch code.

Weights come in through `deq_jax.convert.transformer`, and so do recorded gradients: a gradient is
laid out as its weight is.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recorded import recorded

import deq_jax as deq
from deq_jax import linen
from deq_jax.convert.transformer import convert_state
from deq_jax.models.embeddings import AdaptiveEmbedding
from deq_jax.models.transformer import DEQTransformer
from deq_jax.models.transformer_cell import Injection, Memory, TransformerCell, positions

pytestmark = pytest.mark.slow

FORMS = ("post", "pre")
ROUNDING = 1e-12
SOLVED = 1e-8  # relative, of what depends on an equilibrium solved to 1e-10
C, T, M = 16, 12, 8
TIGHT = deq.Broyden(tol=1e-13, max_steps=80, stop="abs", memory=80)


def model(form, solver=TIGHT, adjoint=None, dropout=0.0, attention=0.0):
    return DEQTransformer(
        vocab=AdaptiveEmbedding(vocab=60, features=C, cutoffs=(20, 40), div_val=2),
        cell=TransformerCell(
            features=C, heads=2, hidden=40, pre_norm=form == "pre", dropout=dropout,
            attention_dropout=attention,
        ),
        memory=M,
        dropout=dropout,
        solver=solver,
        adjoint=adjoint,
    )  # fmt: skip


def weights(form, dtype=np.float64):
    params = convert_state(recorded(f"lm_tiny_{form}_weights")).params
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), params)


def gradients(arrays, prefix="grad/"):
    """Recorded gradients as ours: what is tied is one parameter, which gets the sum."""
    state = {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if name.startswith(prefix)
    }
    for i in (1, 2):
        state[f"word_emb.emb_projs.{i}.weight"] = state[
            f"word_emb.emb_projs.{i}.weight"
        ] + state.pop(f"crit.out_projs.{i}.weight")
    return convert_state(state, partial=True).params


def state(array, dtype=np.float64):
    """(N, C, T) to [N, T, C]."""
    return jnp.asarray(np.asarray(array, dtype).swapaxes(1, 2))


def streams(array, dtype=np.float64):
    """(T, N, ...) to [N, T, ...]."""
    return jnp.asarray(np.asarray(array, dtype).swapaxes(0, 1))


def remembered(arrays, z="mems_z", u="mems_u", dtype=np.float64):
    z, u = streams(arrays[z], dtype), streams(arrays[u], dtype)[..., C:]
    return Memory(z=z, u=u, filled=jnp.full(len(z), z.shape[1], jnp.int32))


def words(arrays, suffix=""):
    return tuple(jnp.asarray(arrays[f"{name}{suffix}"].T, jnp.int32) for name in ("data", "target"))


def close(ours, theirs, tolerance):
    """To a share of the largest element."""
    theirs = np.asarray(theirs)
    scale = max(np.abs(theirs).max(), 1e-300)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * scale)


def close_trees(ours, theirs, tolerance, floor=0.01):
    """Leaf by leaf, to a share of its largest element, or of `floor` times that of all leaves."""
    ours = {jax.tree_util.keystr(p): a for p, a in jax.tree_util.tree_leaves_with_path(ours)}
    theirs = jax.tree_util.tree_leaves_with_path(theirs)
    largest = max(np.abs(a).max() for _, a in theirs)
    assert sorted(ours) == sorted(jax.tree_util.keystr(path) for path, _ in theirs)
    for path, a in theirs:
        name = jax.tree_util.keystr(path)
        scale = max(np.abs(a).max(), floor * largest)
        np.testing.assert_allclose(ours[name], a, rtol=0, atol=tolerance * scale, err_msg=name)


@pytest.mark.parametrize("form", FORMS)
def test_the_converted_tree_is_that_of_the_model(form):
    net = model(form)
    text = jnp.zeros((1, T), jnp.int32)
    wanted = jax.eval_shape(
        lambda key: net.init(key, text, text, net.empty_memory(1), train=False), jax.random.key(0)
    )["params"]
    shapes = jax.tree.map(np.shape, convert_state(recorded(f"lm_tiny_{form}_weights")).params)
    assert shapes == jax.tree.map(lambda a: a.shape, wanted)


@pytest.mark.parametrize("form", FORMS)
def test_f_and_its_vector_jacobian_products(form, x64):
    arrays, cell = recorded(f"lm_tiny_{form}_layer"), model(form).cell
    params = weights(form)["equilibrium"]["f"]
    u = state(arrays["u"])
    memory = Memory(z=state(arrays["mems_z"]), u=u[:, :M, C:], filled=jnp.full(2, M, jnp.int32))
    places = positions(M + T, C, jnp.float64)
    close(places, state(arrays["pos_emb"]), ROUNDING)
    x = Injection(u=u[:, M:], memory=memory, positions=places)

    def f(split, z, mems, u, u_memory):
        merged = {"params": deq.weight_norm.merge(split)}
        operands = x.replace(u=u, memory=memory.replace(z=mems, u=u_memory))
        return cell.apply(merged, z, operands, method=linen.once)

    @jax.jit
    def run(v, *operands):
        image, vjp = jax.vjp(f, *operands)
        return image, vjp(v)

    image, cotangents = run(state(arrays["v"]), params, state(arrays["z"]), memory.z, x.u, memory.u)
    close(image, state(arrays["f"]), ROUNDING)
    d_params, d_z, d_mems, d_u, d_u_memory = cotangents
    close(d_z, state(arrays["vjp_z"]), ROUNDING)
    close(d_mems, state(arrays["vjp_mems"]), ROUNDING)
    d_u = jnp.concatenate([jnp.pad(d_u_memory, ((0, 0), (0, 0), (C, 0))), d_u], axis=1)
    close(d_u, state(arrays["vjp_u"]), ROUNDING)
    named = {n.removeprefix("vjp/"): a for n, a in arrays.items() if n.startswith("vjp/")}
    close_trees(d_params, convert_state(named, partial=True).params["equilibrium"]["f"], ROUNDING)
    merged = deq.weight_norm.merge(params)
    for theirs, ours in (("dec_attn.qkv", "qkv"), ("dec_attn.o", "o"), ("pos_ff.ff2", "ff2")):
        effective = arrays[f"effective/func.{theirs}_net.weight"]
        close(merged[ours]["kernel"], effective.reshape(effective.shape[:2]).T, ROUNDING)


@pytest.mark.parametrize("form", FORMS)
def test_three_segments_in_a_row(form, x64):
    arrays, net = recorded(f"lm_tiny_{form}_eval"), model(form)
    variables, memory = {"params": weights(form)}, model(form).empty_memory(2)
    memory = jax.tree.map(lambda a: a.astype(float) if a.dtype == np.float32 else a, memory)
    apply = jax.jit(lambda v, m, *text: net.apply(v, *text, m, train=False))
    for s in range(3):
        text = words(arrays, s)
        (nll, memory), solution = apply(variables, memory, *text)
        close(solution.value, state(arrays[f"zstar{s}"]), SOLVED)
        close(nll, streams(arrays[f"nll{s}"]), SOLVED)
        assert float(nll.mean()) == pytest.approx(float(arrays[f"loss{s}"]), rel=1e-9)
        held = remembered(arrays, f"mems_z{s}", f"mems_u{s}")
        kept = held.z.shape[1]
        assert kept == M and memory.filled.tolist() == [M, M]
        close(memory.z, held.z, SOLVED)
        close(memory.u, held.u, ROUNDING)
        rho = deq.spectral_radius(*solution.at, key=jax.random.key(0), iters=300)
        np.testing.assert_allclose(rho, arrays[f"rho_exact{s}"], rtol=5e-3)
        penalty = deq.frobenius_penalty(*solution.at, key=jax.random.key(1), probes=4000)
        assert float(penalty) == pytest.approx(float(arrays[f"jac_fro2_over_numel{s}"]), rel=0.02)
    if form == "post":
        z = state(arrays["zstar0"])
        log_probs = net.apply(variables, z, method=lambda m, z: m.vocab.log_probs(z))
        close(log_probs[0, :4], arrays["logprob0_first4"], SOLVED)


def penalised(net, params, text, memory, alpha=0.0, probe=None, **how):
    """Mean loss plus alpha times the penalty of one given probe."""
    (nll, left), solution = net.apply({"params": params}, *text, memory, train=False, **how)
    loss, penalty = nll.mean(), jnp.zeros(())
    if alpha:
        f, operands, z, x = solution.at
        z = jax.lax.stop_gradient(z)
        (row,) = jax.vjp(lambda z: f(operands, z, x), z)[1](probe)
        penalty = jnp.square(row).sum() / z.size
    return loss + alpha * penalty, (nll, penalty, left, solution)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("jac", [False, True])
def test_implicit_gradients(form, jac, x64):
    arrays = recorded(f"lm_tiny_{form}_train_ift{'_jac' if jac else ''}")
    net, memory = model(form), remembered(arrays)
    alpha = float(arrays["alpha"]) if jac else 0.0
    probe = state(arrays["v"]) if jac else None
    run = jax.jit(jax.grad(functools.partial(penalised, net), has_aux=True), static_argnums=3)
    grads, (nll, penalty, _, solution) = run(weights(form), words(arrays), memory, alpha, probe)
    close(solution.value, state(arrays["zstar"]), SOLVED)
    close(nll, streams(arrays["nll"]), SOLVED)
    if jac:
        assert float(penalty) == pytest.approx(arrays["jac_loss"].item(), rel=1e-8)
    close_trees(grads, gradients(arrays), SOLVED)


@pytest.mark.parametrize("form", FORMS)
def test_implicit_gradients_in_float32(form):
    arrays = recorded(f"lm_tiny_{form}_train_ift_jac")
    solver = deq.Broyden(tol=1e-8, max_steps=60, memory=60)
    net, memory = model(form, solver), remembered(arrays, dtype=np.float32)
    probe, alpha = state(arrays["v"], np.float32), float(arrays["alpha"])
    run = jax.jit(jax.grad(functools.partial(penalised, net), has_aux=True), static_argnums=3)
    params = weights(form, np.float32)
    grads, (nll, penalty, *_) = run(params, words(arrays), memory, alpha, probe)
    close(nll, streams(arrays["nll"], np.float32), 1e-5)
    assert float(penalty) == pytest.approx(arrays["jac_loss"].item(), rel=1e-4)
    close_trees(grads, gradients(arrays), 1e-4, floor=0.1)


@pytest.mark.parametrize("form", FORMS)
def test_the_warm_up_network(form, x64):
    arrays, first = recorded(f"lm_tiny_{form}_unrolled"), recorded(f"lm_tiny_{form}_eval")
    for layers, name in ((5, "eval_ts0"), (3, "eval_ts3")):
        net = model(form, adjoint=deq.Unroll(layers))
        run = jax.jit(functools.partial(net.apply, train=False, max_steps=0))
        (nll, left), _ = run({"params": weights(form)}, *words(first, 0), net.empty_memory(2))
        close(nll, streams(arrays[f"{name}/nll"]), ROUNDING)
        close(left.z, streams(arrays[f"{name}/mems_z"]), ROUNDING)
    part = {n.removeprefix("train/"): a for n, a in arrays.items() if n.startswith("train/")}
    net = model(form, adjoint=deq.Unroll(int(arrays["n_layer"])))
    run = jax.jit(jax.grad(functools.partial(penalised, net, max_steps=0), has_aux=True))
    grads, (nll, _, left, _) = run(weights(form), words(part), remembered(part))
    close(nll, streams(part["nll"]), ROUNDING)
    close(left.z, streams(part["new_mems_z"]), ROUNDING)
    close_trees(grads, gradients(arrays), 1e-11)


@pytest.mark.parametrize("form", FORMS)
def test_recorded_dropout_masks(form, x64):
    arrays, net = recorded(f"lm_tiny_{form}_dropout"), model(form)
    memory, (data, target) = remembered(arrays), words(arrays)
    cell = net.cell
    masks = {
        "attention": jnp.asarray(arrays["mask_attn"]),
        "attention_out": state(arrays["mask_attn_out"]),
        "hidden": jnp.asarray(arrays["mask_ff1"]),
        "out": jnp.asarray(arrays["mask_ff2"]),
    }

    def loss(params):
        part = {"params": params}
        embedded = net.apply(part, data, method=lambda m, w: m.vocab(w))
        embedded = embedded * arrays["mask_iodrop_in"]
        u = net.apply(part, embedded, method=lambda m, e: m.inject(e))
        places = positions(M + T, C, jnp.float64) * state(arrays["mask_pos"])
        x = Injection(u=u, memory=memory, positions=places)
        merged = deq.weight_norm.merge(params["equilibrium"]["f"])
        operands = cell.apply({"params": merged}, x, method="inject"), masks
        solution = deq.fixed_point(
            lambda p, z, x: cell.apply({"params": p}, z, *x),
            merged, jnp.zeros_like(embedded), operands, solver=TIGHT,
        )  # fmt: skip
        # The published mask drops whole positions.
        z = solution.value * state(arrays["mask_iodrop_out"])
        nll = net.apply(part, z, target, method=lambda m, z, t: m.vocab.nll(z, t))
        return nll.mean(), (solution.value, u)

    (value, (z, u)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(weights(form))
    assert float(value) == pytest.approx(float(arrays["loss"]), rel=1e-9)
    close(z, state(arrays["zstar"]), SOLVED)
    close(z[:, T - M :], streams(arrays["new_mems_z"]), SOLVED)
    close(u[:, T - M :], streams(arrays["new_mems_u"]), ROUNDING)
    close_trees(grads, gradients(arrays), SOLVED)


@pytest.mark.parametrize("form", FORMS)
def test_a_published_step_with_broyden_both_ways(form, x64):
    """At the published tolerances, which leave traces of the path in every result.

    Norms there are over the whole batch, so the number of steps is taken from the record.  The loss
    is that of f(z*), and the backward solve begins at zero, where ours begins one step later.
    """
    arrays, first = recorded(f"lm_tiny_{form}_reference_settings"), recorded(f"lm_tiny_{form}_eval")
    arrays = {n.removeprefix("f64/broyden/"): a for n, a in arrays.items() if "f64/broyden/" in n}
    data, target = words(first, 0)
    net, params, rows = model(form), weights(form), (2, -1)
    shape = (2, T, C)

    def f(params, flat, _):
        part = {"params": params}
        embedded = net.apply(part, data, method=lambda m, w: m.vocab(w))
        u = net.apply(part, embedded, method=lambda m, e: m.inject(e))
        places = positions(M + T, C, jnp.float64)
        x = Injection(u=u, memory=jax.tree.map(jnp.asarray, net.empty_memory(2)), positions=places)
        merged = deq.weight_norm.merge(params["equilibrium"]["f"])
        z = net.cell.apply({"params": merged}, flat.reshape(shape), x, method=linen.once)
        return z.reshape(rows)

    def loss(params, flat):
        z = flat.reshape(shape)
        return net.apply({"params": params}, z, target, method=lambda m, z, t: m.vocab.nll(z, t))

    def penalty(params, flat):
        (row,) = jax.vjp(lambda z: f(params, z, None), flat)[1](state(arrays["v"]).reshape(rows))
        return jnp.square(row).sum() / row.size

    def solver(name):
        steps = int(arrays[f"{name}/nstep"]) + 1
        return deq.Broyden(tol=1e-30, max_steps=steps, memory=steps, stop="abs")

    def run(params):
        start = jnp.zeros((2, T * C))
        solution = deq.solve(solver("fwd"), lambda z: f(params, z, None), start)
        image, vjp = jax.vjp(lambda p, z: f(p, z, None), params, solution.value)
        value, head = jax.value_and_grad(lambda *a: loss(*a).mean(), argnums=(0, 1))(params, image)
        back = deq.solve(solver("bwd"), lambda u: vjp(u)[1] + head[1], start)
        jac, extra = jax.value_and_grad(penalty)(params, solution.value)
        alpha = 0.7
        grads = jax.tree.map(lambda a, b, c: a + b + alpha * c, head[0], vjp(back.value)[0], extra)
        return value, jac, grads, solution, back

    value, jac, grads, solution, back = jax.jit(run)(params)
    for name, ours in (("fwd", solution), ("bwd", back)):
        # Ours begins with the residual of the start.
        traced = jnp.linalg.norm(ours.stats.trace, axis=1)[1:]
        np.testing.assert_allclose(
            traced, arrays[f"{name}/abs_trace"][: len(traced)], rtol=1e-5, err_msg=name
        )
    z = solution.value.reshape(shape)
    close(z, state(arrays["zstar"]), 1e-7)
    assert float(value) == pytest.approx(float(arrays["loss"]), rel=1e-8)
    assert float(jac) == pytest.approx(arrays["jac_loss"].item(), rel=1e-6)
    close_trees(grads, gradients(arrays), 1e-6)
