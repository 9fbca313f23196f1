"""Texts: vocabularies, the cache, streams and their position, refusals, the corpora."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from deq_jax.data import corpora, text
from deq_jax.data.sources import MissingData

TEXTS = {"train": b"b a b\n\nc a b\n", "valid": b"a c\n", "test": b"b\n"}
WIKITEXT2 = Path(__file__).resolve().parents[2] / "shared" / "data" / "text" / "wikitext-2"


def test_words_stand_in_order_of_frequency_behind_the_line_end():
    found = text.corpus(TEXTS)
    assert found.vocabulary.words == ("<eos>", "b", "a", "c")  # b 3, a 2, c 1
    assert found.splits["train"].tolist() == [1, 2, 1, 0, 0, 3, 2, 1, 0]
    assert found.splits["valid"].tolist() == [2, 3, 0]
    assert found.vocabulary.decode([1, 0]) == ["b", "<eos>"]
    # Equally frequent words: the one that appears first comes first.
    assert text.Vocabulary.of([["z", "y"], ["y", "z"]]).words == ("<eos>", "z", "y")


def test_unknown_words():
    vocabulary = text.Vocabulary.of([["a", "<unk>"]])
    assert vocabulary.encode([["a", "strange"]]).tolist() == [1, 2, 0]
    with pytest.raises(ValueError, match="got the word 'strange' in line 2; wanted words of the"):
        text.Vocabulary.of([["a"]]).encode([["a"], ["strange"]])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "train is empty; wanted text"),
        (b" \n\n", "train is empty; wanted text"),
        (b"one \xff two\n", r"train is not UTF-8 text \(byte 4 of 10\)"),
        ("zwölf".encode("utf-16"), "train is not UTF-8 text"),
        (b"one\ntw", "train ends within a line after 6 bytes: it is truncated"),
    ],
)
def test_damaged_texts_are_refused_in_words(content, message):
    with pytest.raises(ValueError, match=message):
        text.corpus(TEXTS | {"train": content})


def test_lines_end_at_newlines_only():
    assert text.lines_of("a\x0bb\u2028c\n d \n".encode(), "train") == ["a\x0bb\u2028c", " d "]


def test_the_cache_is_used_checked_and_mended(tmp_path):
    told = []
    fresh = text.corpus(TEXTS, tmp_path, told.append)
    (folder,) = tmp_path.iterdir()
    assert sorted(p.name for p in folder.iterdir()) == [
        "checksums.json", "test.npy", "train.npy", "valid.npy", "vocabulary.txt",
    ]  # fmt: skip
    again = text.corpus(TEXTS, tmp_path, told.append)
    assert isinstance(again.splits["train"], np.memmap) and told == []
    assert again.vocabulary == fresh.vocabulary
    for name in text.SPLITS:
        np.testing.assert_array_equal(again.splits[name], fresh.splits[name])
    # Another text has another place.
    text.corpus(TEXTS | {"test": b"c\n"}, tmp_path, told.append)
    assert len(list(tmp_path.iterdir())) == 2 and told == []

    def damage_number(folder):
        content = bytearray((folder / "train.npy").read_bytes())
        content[-3] ^= 1
        (folder / "train.npy").write_bytes(content)

    def cut(folder):
        (folder / "vocabulary.txt").write_text("<eos>\n")

    def lose(folder):
        (folder / "valid.npy").unlink()

    def empty(folder):
        (folder / "checksums.json").write_text("")

    def shorten(folder):
        sums = json.loads((folder / "checksums.json").read_text())
        del sums["train.npy"]
        (folder / "checksums.json").write_text(json.dumps(sums))

    for harm in (damage_number, cut, lose, empty, shorten):
        told.clear()
        harm(folder)
        mended = text.corpus(TEXTS, tmp_path, told.append)
        assert told == [f"{folder} is damaged; encoding the text again"]
        assert mended.splits["train"].tolist() == fresh.splits["train"].tolist()
        told.clear()
        assert isinstance(text.corpus(TEXTS, tmp_path, told.append).splits["test"], np.memmap)
        assert told == []


def test_a_cache_that_cannot_be_written_is_only_told(tmp_path):
    (tmp_path / "file").write_text("")
    told = []
    found = text.corpus(TEXTS, tmp_path / "file" / "cache", told.append)
    assert found.splits["test"].tolist() == [1, 0]
    assert len(told) == 1 and told[0].startswith("the encoded text is not kept: cannot write")


def collect(iterator, count):
    return [next(iterator) for _ in range(count)]


def test_rows_continue_from_batch_to_batch():
    numbers = np.arange(1000)
    it = text.segments(numbers, batch_size=4, length=6, seed=5)
    part = 999 // 4
    count = (part - 5) // 6
    batches = collect(it, 2 * count + 1)
    offsets = set()
    for k, batch in enumerate(batches):
        assert batch["words"].shape == batch["targets"].shape == (4, 6)
        np.testing.assert_array_equal(batch["targets"], batch["words"] + 1)
        assert batch["weight"].all() and batch["mask"].all()
        fresh = k % count == 0
        assert (batch["fresh"] == fresh).all()
        if fresh:
            starts = batch["words"][:, 0] - part * np.arange(4)
            assert len(set(starts)) == 1 and 0 <= starts[0] < 6
            offsets.add(int(starts[0]))
        else:
            np.testing.assert_array_equal(batch["words"][:, 0], batches[k - 1]["targets"][:, -1])
    assert len(offsets) > 1  # the epochs are cut at other places
    assert batches[count - 1]["targets"].max() < 1000


def test_positions_are_saved_and_processes_share_the_streams():
    numbers = np.arange(300)
    whole = collect(text.segments(numbers, batch_size=4, length=5, seed=0), 40)
    it = text.segments(numbers, batch_size=4, length=5, seed=0)
    collect(it, 17)
    state = json.loads(json.dumps(it.get_state()))
    other = text.segments(numbers, batch_size=4, length=5, seed=0)
    other.set_state(state)
    np.testing.assert_array_equal(next(other)["words"], whole[17]["words"])
    halves = [
        collect(text.segments(numbers, batch_size=4, length=5, seed=0, shard=(p, 2)), 40)
        for p in (0, 1)
    ]
    for k, batch in enumerate(whole):
        for name, array in batch.items():
            both = np.concatenate([half[k][name] for half in halves])
            np.testing.assert_array_equal(both, array)


@pytest.mark.parametrize("words", [2, 9, 50, 97])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_an_evaluation_predicts_every_word_once(words, batch_size):
    numbers = np.arange(100, 100 + words)
    predicted = Counter()
    before = None
    for batch in text.eval_segments(numbers, batch_size=batch_size, length=7):
        real = batch["weight"] > 0
        np.testing.assert_array_equal(batch["targets"][real], batch["words"][real] + 1)
        predicted.update(batch["targets"][real].tolist())
        np.testing.assert_array_equal(batch["mask"] > 0, real.any(axis=1))
        if before is not None:
            going = batch["mask"] > 0
            np.testing.assert_array_equal(batch["words"][going, 0], before["targets"][going, -1])
        assert (batch["fresh"] == (before is None)).all()
        before = batch
    assert predicted == Counter(range(101, 100 + words))
    for p in (0, 1) if batch_size > 1 else ():
        part = list(text.eval_segments(numbers, batch_size=4, length=7, shard=(p, 2)))
        whole = list(text.eval_segments(numbers, batch_size=4, length=7))
        for a, b in zip(part, whole, strict=True):
            np.testing.assert_array_equal(a["words"], b["words"][2 * p : 2 * p + 2])


def test_what_cannot_be_cut_is_refused():
    numbers = np.arange(50)
    with pytest.raises(ValueError, match="got 50 words for 8 streams; wanted at least 73"):
        text.segments(numbers, batch_size=8, length=5, seed=0)
    assert next(text.segments(np.arange(73), batch_size=8, length=5, seed=0))
    with pytest.raises(ValueError, match="got 3 streams for 2 processes; wanted a multiple"):
        text.segments(numbers, batch_size=3, length=5, seed=0, shard=(0, 2))
    with pytest.raises(ValueError, match=r"got shard=\(2, 2\)"):
        text.segments(numbers, batch_size=2, length=5, seed=0, shard=(2, 2))
    with pytest.raises(ValueError, match="got batch_size=0 and length=5"):
        text.segments(numbers, batch_size=0, length=5, seed=0)
    with pytest.raises(ValueError, match="got a text of 1 words; wanted at least 2"):
        next(text.eval_segments(np.arange(1), batch_size=1, length=5))


def test_unigram_perplexity():
    train, test = np.array([0, 1, 1, 2]), np.array([2, 1, 0])
    wanted = np.exp(-(np.log(3 / 7) + np.log(2 / 7)) / 2)
    assert text.unigram_perplexity(train, test, 3) == pytest.approx(wanted)


def write_wiki(folder, texts=TEXTS):
    folder.mkdir()
    for name, content in texts.items():
        (folder / f"wiki.{name}.tokens").write_bytes(content)
    return folder


def test_wiki_files(tmp_path):
    folder = write_wiki(tmp_path / "own")
    assert corpora.wiki_files(folder) == TEXTS
    with pytest.raises(ValueError, match="got 9 words and line ends in train of .*2,088,628"):
        corpora.wiki_files(folder, "wikitext-2")
    (folder / "wiki.valid.tokens").unlink()
    with pytest.raises(MissingData, match="wiki.valid.tokens cannot be read .*python -m deq_jax"):
        corpora.wiki_files(folder)
    with pytest.raises(MissingData, match="wikitext/103 is not prepared .* --config=103"):
        corpora.wiki_tfds("wikitext-103", str(tmp_path))


def test_prose_holds_out_what_training_has_not_seen():
    texts = corpora.prose()
    lines = {split: content.decode().split("\n")[:-1] for split, content in texts.items()}
    assert not set(lines["train"]) & (set(lines["valid"]) | set(lines["test"])) - {
        line for line in lines["train"] if "<unk>" in line
    }
    counts = Counter(word for line in lines["train"] for word in line.split())
    assert min(count for word, count in counts.items()) >= corpora.RARE
    known = set(counts)
    for split in ("valid", "test"):
        assert len(lines[split]) > 20
        assert {word for line in lines[split] for word in line.split()} <= known | {"<unk>"}


@pytest.mark.skipif(not WIKITEXT2.exists(), reason="no WikiText-2 beside the project")
def test_wikitext_2():
    found = text.corpus(corpora.wiki_files(WIKITEXT2, "wikitext-2"))
    assert len(found.vocabulary) == 33_278
    assert {s: len(n) for s, n in found.splits.items()} == corpora.TOKENS["2"]
    assert found.vocabulary.words[:4] == ("<eos>", "the", ",", ".")
