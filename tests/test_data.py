"""Data: order and augmentation follow from (seed, epoch, index), evaluation counts all once."""

import json

import numpy as np
import pytest

from deq_jax.data import images, pipeline, synthetic
from deq_jax.errors import UsageError

NUMBERS = [{"x": np.float32(i)} for i in range(10)]


def jitter(record, rng):
    return {"x": record["x"] + np.float32(rng.uniform(0, 0.5))}


def take(iterator, count):
    return np.concatenate([next(iterator)["x"] for _ in range(count)])


def test_epochs_are_permutations_of_their_own():
    order = take(pipeline.train_iterator(NUMBERS, batch_size=5, seed=0), 6).reshape(3, 10)
    for epoch in order:
        assert sorted(epoch) == list(range(10))
    assert not np.array_equal(order[0], order[1])
    assert not np.array_equal(order[1], order[2])


def test_batches_run_over_the_end_of_an_epoch():
    order = take(pipeline.train_iterator(NUMBERS, batch_size=4, seed=0), 5)
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))


def test_same_seed_same_batches_other_seed_others():
    def run(seed):
        return take(pipeline.train_iterator(NUMBERS, batch_size=4, seed=seed, augment=jitter), 6)

    np.testing.assert_array_equal(run(3), run(3))
    assert not np.array_equal(run(3), run(4))


def test_augmentation_differs_between_epochs():
    drawn = take(pipeline.train_iterator(NUMBERS, batch_size=10, seed=0, augment=jitter), 2)
    first, second = sorted(drawn[:10] % 1), sorted(drawn[10:] % 1)
    assert not np.allclose(first, second)


def test_state_goes_through_json_and_continues():
    straight = pipeline.train_iterator(NUMBERS, batch_size=3, seed=0, augment=jitter)
    wanted = take(straight, 9)
    first = pipeline.train_iterator(NUMBERS, batch_size=3, seed=0, augment=jitter)
    begun = take(first, 4)
    state = json.loads(json.dumps(first.get_state()))
    second = pipeline.train_iterator(NUMBERS, batch_size=3, seed=0, augment=jitter)
    second.set_state(state)
    np.testing.assert_array_equal(np.concatenate([begun, take(second, 5)]), wanted)


def test_training_batches_have_a_mask_of_ones():
    batch = next(pipeline.train_iterator(NUMBERS, batch_size=4, seed=0))
    assert batch["mask"].dtype == np.float32 and batch["mask"].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("batch_size", [1, 3, 5, 10, 16])
def test_evaluation_counts_every_example_once(batch_size):
    batches = list(pipeline.eval_batches(NUMBERS, batch_size=batch_size))
    assert {len(b["x"]) for b in batches} == {len(b["mask"]) for b in batches} == {batch_size}
    seen = np.concatenate([b["x"][b["mask"] > 0] for b in batches])
    np.testing.assert_array_equal(seen, np.arange(10))


@pytest.mark.parametrize("bad", [{"batch_size": 0}, {"batch_size": 4, "source": []}])
def test_pipeline_refuses(bad):
    source = bad.pop("source", NUMBERS)
    with pytest.raises(ValueError, match="wanted"):
        pipeline.train_iterator(source, seed=0, **bad)
    with pytest.raises(ValueError, match="wanted"):
        next(pipeline.eval_batches(source, **bad))


def test_digits_are_split_once_and_whole():
    train, test = images.digits("train"), images.digits("test")
    assert (len(train), len(test)) == (1437, 360)
    assert train.images.shape == (1437, 8, 8, 1) and train.images.dtype == np.uint8
    assert train.images.max() == 16 and set(test.labels) == set(range(10))
    assert np.bincount(test.labels).min() >= 25
    for split in ("validation", "train[", "train[90]", "test[360:]", "train[:-2000]"):
        with pytest.raises(UsageError, match="digits: got split=.*wanted"):
            images.digits(split)


def test_a_part_of_a_split_of_digits_is_of_that_split():
    """train[:90%] gave the test images."""
    train = images.digits("train").images
    for split, wanted in {
        "train[:90%]": train[:1293],
        "train[90%:]": train[1293:],
        "train[100:-7]": train[100:-7],
        "train[-10%:]": train[-144:],
        "train[:]": train,
    }.items():
        np.testing.assert_array_equal(images.digits(split).images, wanted)


def test_standardize_brings_mean_0_and_variance_1():
    train = images.digits("train")
    transform = images.Standardize.of(train)
    done = np.stack([transform(train[i])["image"] for i in range(len(train))])
    assert done.dtype == np.float32 and done.shape == train.images.shape
    assert abs(done.mean()) < 1e-4 and abs(done.std() - 1) < 1e-4
    with pytest.raises(ValueError, match="std"):
        images.Standardize((0.0,), (0.0,))


def test_random_shift_moves_by_at_most_its_pixels():
    image = np.arange(64, dtype=np.float32).reshape(8, 8, 1)
    record = {"image": image, "label": np.int32(0)}
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(200):
        moved = images.RandomShift(1)(record, rng)["image"]
        centre = int(moved[4, 4, 0])
        seen.add(centre)
        down, right = divmod(centre, 8)
        np.testing.assert_array_equal(
            moved[1:-1, 1:-1], image[down - 3 : down + 3, right - 3 : right + 3]
        )
    assert len(seen) == 9
    with pytest.raises(ValueError, match="pixels=-1"):
        images.RandomShift(-1)


def test_in_memory_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="wanted"):
        images.InMemory(np.zeros((3, 8, 8, 1)), np.zeros(2))


def test_regression_pairs():
    pairs = synthetic.regression(4000, seed=0)
    assert pairs.x.dtype == pairs.y.dtype == np.float32
    noise = pairs.y - synthetic.curve(pairs.x.astype(np.float64))
    assert abs(noise.mean()) < 0.005 and abs(noise.std() - 0.05) < 0.005
    assert abs(pairs.x.min() + 2) < 0.01 and abs(pairs.x.max() - 2) < 0.01
    np.testing.assert_array_equal(pairs.y, synthetic.regression(4000, seed=0).y)
    assert synthetic.curve(np.float64(1.0)) == pytest.approx(-5.5 + 2 * np.sin(1.0))
    with pytest.raises(ValueError, match="count=0"):
        synthetic.regression(0, seed=0)
