"""WikiText as a TFDS set: prepared without TensorFlow, read back byte for byte, or refused."""

import functools
import http.server
import io
import json
import os
import re
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from deq_jax.data import wikitext
from deq_jax.data.sources import MissingData, open_tfds

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT.parent / "shared" / "data" / "text" / "wikitext-2"
NAMES = {
    "train": "wiki.train.tokens",
    "validation": "wiki.valid.tokens",
    "test": "wiki.test.tokens",
}

# A section's title, a legend's line between lines of text, characters at which str.splitlines
# would split, and blanks at the end are no borders between articles.
ANT = (
    b" = Ant = \n \n An ant @-@ eater 's meal . \n \n = = Kinds = = \n \n <unk> ; \n"
    b" = Wins ; L = \n Losses \n \n"
)
BEE = " = Bée \u2028 蜂 = \n \n Honey\u00a0, \x0b \x85 \x1c  twice . \n \n".encode()
CAT = b" = Cat = dog = \n \n A cat . \n \n \n"
RECORDS = {"train": [b" \n", ANT, BEE, CAT], "validation": [BEE, ANT], "test": [b"\n", CAT]}
TEXTS = {split: b"".join(records) for split, records in RECORDS.items()}


def write(folder, texts=TEXTS):
    """Writes the three files, those whose text is None left out; the folder as str."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, text in texts.items():
        if text is not None:
            (folder / NAMES[split]).write_bytes(text)
    return str(folder)


def read(name, split, data_dir):
    """All records of a split, in order."""
    source = open_tfds(name, split, str(data_dir))
    return [source[i]["text"] for i in range(len(source))]


def written(data_dir):
    """The files of prepared sets, and unfinished folders; TFDS' note of the default is neither."""
    return sorted(
        path
        for path in Path(data_dir, "wikitext").rglob("*")
        if (path.is_file() and path.parent.name != ".config") or "incomplete" in path.name
    )


@pytest.fixture
def uncounted(monkeypatch):
    """Takes files with any number of tokens."""
    monkeypatch.setattr(wikitext, "TOKENS", {"103": {}, "2": {}})


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A function that publishes bytes on this machine as the archive of WikiText-2."""
    folder = tmp_path / "published"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            pass

    handler = functools.partial(Handler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=[0.01])
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}/wikitext-2-v1.zip"
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setitem(wikitext.ARCHIVES, "2", url)
    yield (folder / "wikitext-2-v1.zip").write_bytes
    server.shutdown()
    server.server_close()
    thread.join()


def zipped(texts=TEXTS, folder="wikitext-2"):
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as file:
        for split, text in texts.items():
            file.writestr(f"{folder}/{NAMES[split]}", text)
    return held.getvalue()


@pytest.mark.parametrize(
    "records",
    [
        [],
        [b" = A = \n"],
        [b"before \n \n", b" = A = \n \n one \n \n", b" = B = \n"],
        [b"\n = = A = = \n \n = = = B = = = \n \n"],
        [b"\n = A = \n one \n \n"],
        [b" one \n = A = \n \n"],
        [b"\n = A = = \n \n = = B = \n \n =  = \n"],
        [b" = A = \n \n", b" = B = \n \n = C = "],
    ],
)
def test_articles_start_at_titles_between_blank_lines(records):
    assert list(wikitext.articles(io.BytesIO(b"".join(records)))) == records


def test_what_is_read_is_what_was_prepared(tmp_path, uncounted):
    manual, data = write(tmp_path / "manual"), tmp_path / "data"
    wikitext.prepare("2", manual, str(data))
    for split, records in RECORDS.items():
        assert read("wikitext/2", split, data) == records
        assert b"".join(read("wikitext/2", split, data)) == TEXTS[split]
    assert read("wikitext/2", "train[1:3]", data) == [ANT, BEE]
    with pytest.raises(MissingData, match="wikitext/103"):
        open_tfds("wikitext/103", "train", str(data))


def test_both_configurations_live_in_one_folder(tmp_path, uncounted):
    other = {split: text + CAT for split, text in TEXTS.items()}
    wikitext.prepare("2", write(tmp_path / "two"), str(tmp_path))
    wikitext.prepare("103", write(tmp_path / "hundred", other), str(tmp_path))
    assert read("wikitext/2", "test", tmp_path) == RECORDS["test"]
    assert read("wikitext/103", "test", tmp_path) == [*RECORDS["test"], CAT]


def test_order_is_kept_over_several_files(tmp_path, uncounted):
    records = [f" = Title {i} = \n \n text {i} . \n \n".encode() for i in range(120)]
    manual = write(tmp_path / "manual", dict.fromkeys(TEXTS, b"".join(records)))
    builder = wikitext.Wikitext(config="2", data_dir=str(tmp_path), file_format="array_record")
    config = tfds.download.DownloadConfig(manual_dir=manual, num_shards=3)
    builder.download_and_prepare(download_config=config)
    assert len(list(Path(builder.data_dir).glob("*train*-of-00003"))) == 3
    assert read("wikitext/2", "train", tmp_path) == records


def test_reading_needs_neither_tensorflow_nor_the_builder(tmp_path, uncounted):
    wikitext.prepare("2", write(tmp_path / "manual"), str(tmp_path))
    code = (
        "import sys\n"
        "from deq_jax.data.sources import open_tfds\n"
        f"source = open_tfds('wikitext/2', 'train', {str(tmp_path)!r})\n"
        "print([source[i]['text'] for i in range(len(source))])\n"
        "print([n for n in ('tensorflow', 'deq_jax.data.wikitext') if n in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.stdout == f"{RECORDS['train']}\n[]\n", result.stderr


@pytest.mark.parametrize(
    ("split", "text", "words"),
    [
        ("test", None, r"got .*manual without wiki\.test\.tokens; wanted .* there: add"),
        ("validation", b"", r"got .*wiki\.valid\.tokens, which is empty; wanted"),
        ("train", ANT + b"\xff" + BEE, rf"train\.tokens .* not UTF-8 at offset {len(ANT)}; wanted"),
        ("train", ANT[:-1], r"train\.tokens, truncated: .* does not end; wanted"),
        ("test", BEE[:-9] + "é".encode()[:1], r"test\.tokens .* not UTF-8 at offset \d+; wanted"),
        (
            "test",
            b" \n <html> \n = = A = = \n \n",
            r"test\.tokens without a title; wanted .* Title",
        ),
    ],
)
def test_a_file_that_is_not_wikitext_is_refused(tmp_path, uncounted, split, text, words):
    data = tmp_path / "data"
    manual = write(tmp_path / "manual", TEXTS | {split: text})
    with pytest.raises(ValueError, match=words):
        wikitext.prepare("2", manual, str(data))
    assert written(data) == []
    with pytest.raises(MissingData):
        open_tfds("wikitext/2", "train", str(data))
    # Nothing that is left behind is in the way of the right files.
    wikitext.prepare("2", write(tmp_path / "manual"), str(data))
    assert read("wikitext/2", split, data) == RECORDS[split]


def test_a_missing_file_is_not_downloaded(tmp_path, uncounted, archive):
    archive(zipped())
    manual = write(tmp_path / "manual", {"train": TEXTS["train"]})
    with pytest.raises(ValueError, match=r"without wiki\.valid\.tokens, wiki\.test\.tokens"):
        wikitext.prepare("2", manual, str(tmp_path / "data"))


@pytest.mark.parametrize("split", list(NAMES))
def test_tokens_are_counted(tmp_path, monkeypatch, split):
    text = b" = Cat = \n \n A  cat . \n\n"  # 3 + 1, 0 + 1, 3 + 1, 0 + 1
    manual, data = write(tmp_path / "manual", dict.fromkeys(TEXTS, text)), tmp_path / "data"
    monkeypatch.setattr(wikitext, "TOKENS", {"2": {split.removesuffix("ation"): 11}})
    with pytest.raises(ValueError, match=rf"{re.escape(NAMES[split])} with 10 tokens; wanted 11"):
        wikitext.prepare("2", manual, str(data))
    assert written(data) == []
    monkeypatch.setattr(wikitext, "TOKENS", {"2": {split.removesuffix("ation"): 10}})
    wikitext.prepare("2", manual, str(data))
    assert read("wikitext/2", split, data) == [text]


def test_a_second_preparation_changes_nothing(tmp_path, uncounted):
    manual, data = write(tmp_path / "manual"), tmp_path / "data"
    wikitext.prepare("2", manual, str(data))
    before = [(path, path.stat().st_mtime_ns, path.read_bytes()) for path in written(data)]
    assert len(before) == 6  # the splits, and what describes them
    write(tmp_path / "manual", dict.fromkeys(TEXTS, b"something else"))
    for folder in (manual, str(tmp_path / "gone")):
        wikitext.prepare("2", folder, str(data))
    after = [(path, path.stat().st_mtime_ns, path.read_bytes()) for path in written(data)]
    assert after == before


def test_names_that_do_not_exist_are_refused(tmp_path):
    with pytest.raises(ValueError, match="got configuration '3'; wanted one of"):
        wikitext.prepare("3", str(tmp_path), str(tmp_path))
    with pytest.raises(ValueError, match=r"got manual_dir .*gone, which does not exist; wanted"):
        wikitext.prepare("2", str(tmp_path / "gone"), str(tmp_path))
    assert written(tmp_path) == []


@pytest.mark.parametrize("manual", ["", "others"])
def test_the_archive_is_used_if_no_file_is_there(tmp_path, uncounted, archive, manual):
    archive(zipped())
    if manual:
        (tmp_path / manual).mkdir()
        (tmp_path / manual / "cifar-10.tar.gz").write_bytes(b"of another set")
        manual = str(tmp_path / manual)
    wikitext.prepare("2", manual, str(tmp_path / "data"))
    for split, records in RECORDS.items():
        assert read("wikitext/2", split, tmp_path / "data") == records


def damaged():
    """An archive with a changed byte in its first file."""
    whole = bytearray(zipped())
    whole[whole.index(b"Ant")] ^= 1
    return bytes(whole)


@pytest.mark.parametrize(
    ("published", "words"),
    [
        (b"<html>moved</html>", r"damaged archive .* \(all of it\); wanted a zip file: delete"),
        (damaged(), r"damaged archive .* \(wikitext-2/wiki\.train\.tokens\); wanted a zip"),
        (zipped(folder="raw"), r"wikitext-2-v1.*without wiki\.train\.tokens, wiki\.valid\.tokens"),
        (zipped(TEXTS | {"test": b""}), r"wikitext-2/wiki\.test\.tokens, which is empty"),
    ],
)
def test_an_archive_of_something_else_is_refused(tmp_path, uncounted, archive, published, words):
    archive(published)
    with pytest.raises(ValueError, match=words):
        wikitext.prepare("2", "", str(tmp_path / "data"))
    assert written(tmp_path / "data") == []


@pytest.mark.parametrize("kind", [OSError, tfds.download.DownloadError])
def test_a_download_that_fails_says_what_to_do(tmp_path, monkeypatch, kind):
    def download(self, url):
        raise kind("no network")

    monkeypatch.setattr(tfds.download.DownloadManager, "download", download)
    words = r"could not download https://wikitext\.smerity\.com/wikitext-103-v1\.zip .*: put"
    with pytest.raises(ConnectionError, match=words):
        wikitext.prepare("103", "", str(tmp_path))
    assert written(tmp_path) == []


def test_the_command_says_where_and_how_many(tmp_path, uncounted, capsys):
    manual = write(tmp_path / "manual")
    given = ["--config=2", f"--manual_dir={manual}", f"--data_dir={tmp_path}"]
    wikitext.main(given)
    lines = capsys.readouterr().out.splitlines()
    where = os.path.join(tmp_path, "wikitext", "2", "1.0.0")
    assert lines[-4:] == [
        f"wikitext/2 is in {where}",
        "train: 3 articles and 1 record of what precedes the first",
        "validation: 2 articles",
        "test: 1 articles and 1 record of what precedes the first",
    ]


def test_the_command_refuses_in_words(tmp_path):
    given = ["--config=2", f"--manual_dir={write(tmp_path / 'manual')}", f"--data_dir={tmp_path}"]
    with pytest.raises(SystemExit, match=r"got .*train\.tokens with \d+ tokens; wanted 2,088,628"):
        wikitext.main(given)
    assert written(tmp_path) == []


@pytest.mark.skipif(not PUBLISHED.exists(), reason="needs WikiText-2 in ../shared/data/text")
def test_published_files_have_the_published_numbers(tmp_path):
    given = ["--config=2", f"--manual_dir={PUBLISHED}", f"--data_dir={tmp_path}"]
    code = [sys.executable, "-m", "deq_jax.data.wikitext", *given]
    result = subprocess.run(code, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr  # the tokens are counted
    for split, articles in {"train": 600, "validation": 60, "test": 60}.items():
        assert f"{split}: {articles} articles and 1 record" in result.stdout
        records = read("wikitext/2", split, tmp_path)
        assert b"".join(records) == (PUBLISHED / NAMES[split]).read_bytes()
        assert (records[0], len(records)) == (b" \n", articles + 1)
    info = json.loads((tmp_path / "wikitext" / "2" / "1.0.0" / "dataset_info.json").read_text())
    assert info["moduleName"] == "deq_jax.data.wikitext"
