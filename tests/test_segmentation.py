"""Segmentation: loss and measures against numpy, and the experiment from records to its picture."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax.training import EvalConfig
from experiments.segmentation import task
from experiments.segmentation.presets import PRESETS


@pytest.fixture
def pixels():
    """Scores, labels with some to ignore, the mask of a padded batch, and weights."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(3, 4, 5, 4)).astype(np.float32)
    labels = rng.integers(0, 4, size=(3, 4, 5)).astype(np.uint8)
    labels[rng.random(labels.shape) < 0.3] = 255
    labels[labels == 2] = 1  # class 2 never is the truth
    return scores, labels, np.asarray([1, 1, 0], np.float32), np.asarray([0.5, 2.0, 1.0, 3.0])


def test_loss_is_the_weighted_mean_over_labelled_pixels(pixels):
    scores, labels, mask, weights = pixels
    loss, sums = task.pixel_loss(scores, labels, mask, jnp.asarray(weights))
    total = weight = count = 0.0
    for b, i, j in np.ndindex(labels.shape):
        y = labels[b, i, j]
        if mask[b] and y != 255:
            row = scores[b, i, j].astype(np.float64)
            total += weights[y] * (np.log(np.exp(row).sum()) - row[y])
            weight, count = weight + weights[y], count + 1
    np.testing.assert_allclose(loss, total / weight, rtol=1e-5)
    assert sums["count"] == sums["confusion"].sum() == count


def test_padding_changes_nothing_whatever_it_holds(pixels):
    scores, labels, mask, weights = pixels
    scores[2] = np.inf
    padded = task.pixel_loss(scores, labels, mask, jnp.asarray(weights))
    alone = task.pixel_loss(scores[:2], labels[:2], mask[:2], jnp.asarray(weights))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), padded, alone)


def test_a_batch_without_a_label_costs_nothing(pixels):
    scores, labels, mask, weights = pixels
    nothing = np.full_like(labels, 255)

    def loss(scores):
        return task.pixel_loss(scores, nothing, mask, jnp.asarray(weights))[0]

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(scores))
    assert value == 0 and not gradient.any()


def test_confusion_matrix_and_iou_match_numpy(pixels):
    scores, labels, mask, weights = pixels
    _, sums = task.pixel_loss(scores, labels, mask, jnp.asarray(weights))
    guess = scores.argmax(-1)
    counted = (labels != 255) & (mask[:, None, None] > 0)
    expected = np.asarray(
        [[(counted & (labels == t) & (guess == p)).sum() for p in range(4)] for t in range(4)]
    )
    np.testing.assert_array_equal(sums["confusion"], expected)
    for c, value in enumerate(task.iou(expected.astype(np.float64))):
        hit = (counted & (labels == c) & (guess == c)).sum()
        assert value == hit / (counted & ((labels == c) | (guess == c))).sum()


def tiny(folder, **parts):
    """camvid_small, as small as a multiscale DEQ can be."""
    preset = PRESETS["camvid_small"]
    model = dataclasses.replace(
        preset.model, channels=(4, 4), groups=2, expansion=1, downsample=1, dropout=0.0
    )
    return dataclasses.replace(
        preset,
        workdir=str(folder),
        model=model,
        data=dataclasses.replace(preset.data, crop=(16, 32), eval_batch_size=2),
        train=dataclasses.replace(
            preset.train,
            steps=4,
            batch_size=2,
            warmup_steps=1,
            warmup_layers=1,
            log_every=1,
            eval_every=0,
            checkpoint_every=2,
        ),
        solver=dataclasses.replace(preset.solver, max_steps=3),
        backward=dataclasses.replace(preset.backward, max_steps=3),
        eval=EvalConfig(max_steps=3, budgets=(2,), spectral_batches=1, spectral_iters=5),
        jac=dataclasses.replace(preset.jac, budget_low=0, budget_high=0, gamma=1.0, prob=1.0),
        drawn=2,
        **parts,
    )
