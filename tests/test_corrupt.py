"""Records that cannot be read: named, or told once, counted and left out of exact batches."""

import numpy as np
import pytest

from deq_jax.data import pipeline, sources
from deq_jax.data.pipeline import CorruptRecord


class Holey:
    """Numbers, some of which cannot be read."""

    def __init__(self, count, bad, name="holey"):
        self.count, self.bad, self.name = count, set(bad), name

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.bad:
            raise OSError(f"number {index} is damaged")
        return {"x": np.float32(index)}


def jitter(record, rng):
    return {"x": record["x"] + np.float32(rng.uniform(0, 0.5))}


def take(iterator, count):
    batches = [next(iterator) for _ in range(count)]
    return {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}


def equal(first, second):
    assert set(first) == set(second)
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])


def test_what_is_whole_is_the_same_under_both():
    numbers = [{"x": np.float32(i)} for i in range(10)]
    stop = take(pipeline.train_iterator(numbers, batch_size=4, seed=1, augment=jitter), 5)
    skip, holey = (
        take(
            pipeline.train_iterator(
                source, batch_size=4, seed=1, augment=jitter, on_corrupt="skip"
            ),
            5,
        )
        for source in (numbers, Holey(10, {2, 7}))
    )
    assert not skip["corrupt"].any() and holey["corrupt"].sum() == 4
    np.testing.assert_array_equal(stop["x"], skip["x"])
    own = holey["corrupt"] == 0
    np.testing.assert_array_equal(stop["x"][own], holey["x"][own])
    assert set(np.floor(stop["x"][~own])) == {2, 7}


def test_skip_resumes_and_is_shared_by_processes():
    def make(batch_size=4, shard=(0, 1), transform=None):
        return pipeline.train_iterator(
            Holey(10, {0, 3, 4}),
            batch_size=batch_size,
            seed=2,
            augment=jitter,
            transform=transform,
            shard=shard,
            on_corrupt="skip",
        )

    straight, resumed = make(), make()
    batches = [next(straight) for _ in range(9)]
    resumed.set_state({"batches": 5})
    for batch in batches[5:]:
        equal(batch, next(resumed))
    parts = [make(batch_size=2, shard=(p, 2)) for p in range(2)]
    for batch in batches:
        two = [next(part) for part in parts]
        for name, array in batch.items():
            np.testing.assert_array_equal(array, np.concatenate([t[name] for t in two]))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("bad", [{0}, {0, 1, 2, 3}, {4, 5, 6, 7}, {9}, set(range(9)), set()])
def test_skip_evaluates_every_readable_example_once(count, bad):
    """Also where the first record, a whole batch, or all records of a process are damaged."""
    source, seen, damaged, lengths = Holey(10, bad), [], 0, set()
    for p in range(count):
        batches = list(
            pipeline.eval_batches(
                source, batch_size=4, shard=(p, count), threads=p, on_corrupt="skip"
            )
        )
        lengths.add(len(batches))
        for batch in batches:
            assert {name: array.shape for name, array in batch.items()} == dict.fromkeys(
                ("x", "mask", "corrupt"), (4,)
            )
            assert not (batch["mask"] * batch["corrupt"]).any()
            assert not bad & set(batch["x"].astype(int)), "padding is a valid input"
            seen += batch["x"][batch["mask"] > 0].tolist()
            damaged += batch["corrupt"].sum()
    assert sorted(seen) == sorted(set(range(10)) - bad)
    assert damaged == len(bad) and len(lengths) == 1


def test_nothing_left_to_read_stops_also_under_skip():
    it = pipeline.train_iterator(Holey(5, range(5)), batch_size=2, seed=0, on_corrupt="skip")
    with pytest.raises(
        CorruptRecord, match=r"32 records in a row of holey .* record \d .*damaged\); repair"
    ):
        next(it)
    for shard in ((0, 1), (2, 3)):
        passes = pipeline.eval_batches(
            Holey(5, range(5)), batch_size=2, shard=shard, on_corrupt="skip"
        )
        with pytest.raises(CorruptRecord, match=r"none of the 5 records of holey can be read"):
            next(passes)


def test_an_augmentation_or_a_transform_that_fails_is_the_record_s(capsys):
    def picky(record, rng=None):
        if record["x"] == 3:
            raise KeyError("image")
        return record

    numbers = [{"x": np.float32(i)} for i in range(6)]
    for change in ({"augment": picky}, {"transform": picky}):
        it = pipeline.train_iterator(numbers, batch_size=6, seed=0, **change)
        with pytest.raises(
            CorruptRecord, match=r"record 3 of the source \(list\) .*\(KeyError: 'image'\)"
        ):
            next(it)
        it = pipeline.train_iterator(numbers, batch_size=6, seed=0, on_corrupt="skip", **change)
        assert next(it)["corrupt"].sum() == 1
    assert capsys.readouterr().err.count("record 3 of the source (list)") == 2, "by two iterators"


def test_a_source_keeps_which_of_its_records_were_reported(capsys):
    """Many passes over a set report a record once; another set of the same name reports its own."""
    for bad in ({3}, {3, 5}):
        source = sources.Fields(Holey(6, bad, "train"), {"x": "x"})
        for threads in (0, 2):
            list(pipeline.eval_batches(source, batch_size=3, threads=threads, on_corrupt="skip"))
        it = pipeline.train_iterator(source, batch_size=6, seed=0, on_corrupt="skip")
        assert next(it)["corrupt"].sum() == len(bad)
        it.close()
        assert source.reported == bad
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" cannot")[0] for line in lines] == [
        f"record {i} of train" for i in (3, 3, 5)
    ]


@pytest.mark.parametrize("on_corrupt", ["stop", "skip"])
def test_faults_of_the_machine_or_the_program_are_not_the_record_s(on_corrupt):
    class Exhausted(Holey):
        def __getitem__(self, index):
            raise self.bad.copy().pop()

    for kind in (MemoryError, KeyboardInterrupt):
        passes = pipeline.eval_batches(Exhausted(3, {kind}), batch_size=3, on_corrupt=on_corrupt)
        with pytest.raises(kind):
            next(passes)
    sizes = [{"x": np.zeros(2)}, {"x": np.zeros(3)}]
    it = pipeline.train_iterator(sizes, batch_size=2, seed=0, on_corrupt=on_corrupt)
    with pytest.raises(ValueError, match="wanted one shape") as caught:
        next(it)
    assert not isinstance(caught.value, CorruptRecord)
    with pytest.raises(ValueError, match='got on_corrupt=\'drop\'; wanted "stop" or "skip"'):
        pipeline.train_iterator(sizes, batch_size=2, seed=0, on_corrupt="drop")


class Grouped(Holey):
    """Reads many at once, and says how often it was read one by one."""

    alone = 0
    fault = None

    def __getitem__(self, index):
        self.alone += 1
        return super().__getitem__(index)

    def __getitems__(self, indices):
        if self.fault is not None:
            raise self.fault
        return [Holey.__getitem__(self, i) for i in indices]


def test_many_are_read_at_once_and_one_by_one_only_after_an_error():
    def batches(source, on_corrupt="skip"):
        it = pipeline.train_iterator(source, batch_size=5, seed=0, on_corrupt=on_corrupt)
        found = take(it, 4)
        it.close()
        return found

    whole = Grouped(10, ())
    equal(batches(whole), batches(Holey(10, ())))
    assert whole.alone == 0
    holey = Grouped(10, {3, 6})
    equal(batches(holey), batches(Holey(10, {3, 6})))
    assert holey.alone > 0
    # No record is to blame: the error itself, but who wants to go on goes on.
    broken = Grouped(10, ())
    broken.fault = ZeroDivisionError("a mistake")
    with pytest.raises(ZeroDivisionError, match="a mistake"):
        batches(broken, "stop")
    equal(batches(broken), batches(whole))
