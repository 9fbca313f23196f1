"""The texts that can be read: WikiText's files, prepared TFDS sets, and Python's documentation."""

from __future__ import annotations

import os
import re
from collections import Counter

from deq_jax import folders
from deq_jax.data.sources import MissingData, open_tfds
from deq_jax.data.text import SPLITS, UNKNOWN

TOKENS: dict[str, dict[str, int]] = {
    "2": {"train": 2_088_628, "valid": 217_646, "test": 245_569},
    "103": {"train": 103_227_021, "valid": 217_646, "test": 245_569},
}
"""Version of WikiText -> split -> words and line ends of the published file."""

RARE = 3
"""Words of Python's documentation that the training topics have less often become ``<unk>``."""


def wiki_files(folder: str | os.PathLike[str], name: str = "") -> dict[str, bytes]:
    """Reads ``wiki.{train,valid,test}.tokens``.

    Args:
      folder: where they are, local or gs://BUCKET/FOLDER.
      name: "wikitext-2" or "wikitext-103", whose number of words is checked; "" for other texts.

    Returns:
      "train", "valid", "test" -> text.

    Raises:
      MissingData: a file is not there.
      ValueError: a file has another number of words than the published one.

    Example:
      >>> wiki_files(Path("data/wikitext-2"), "wikitext-2")  # doctest: +SKIP
    """
    texts = {}
    for split in SPLITS:
        path = folders.parse(folder) / f"wiki.{split}.tokens"
        try:
            texts[split] = path.read_bytes()
        except folders.errors(path) as error:
            reason = folders.reason(error)
            raise MissingData(
                f"{path} cannot be read ({reason}); wanted the files wiki.train.tokens, "
                "wiki.valid.tokens and wiki.test.tokens of WikiText, word level, in one folder "
                "(--data.dir), or a prepared TFDS set: python -m deq_jax.data.wikitext --help"
            ) from error
    _check_tokens(texts, name, str(folder))
    return texts


def wiki_tfds(name: str, data_dir: str = "") -> dict[str, bytes]:
    """Reads a set that ``python -m deq_jax.data.wikitext`` has prepared.

    Args:
      name: "wikitext-2" or "wikitext-103".
      data_dir: folder of TFDS sets; empty for TFDS' own default.

    Returns:
      "train", "valid", "test" -> text.

    Raises:
      MissingData: the set is not prepared.
      ValueError: it has another number of words than the published one.

    Example:
      >>> wiki_tfds("wikitext-2")  # doctest: +SKIP
    """
    config = f"wikitext/{name.removeprefix('wikitext-')}"
    names = {"train": "train", "valid": "validation", "test": "test"}
    texts = {}
    for split in SPLITS:
        try:
            source = open_tfds(config, names[split], data_dir)
        except MissingData as error:
            raise MissingData(
                f"{config} is not prepared in {data_dir or '~/tensorflow_datasets'}; prepare it "
                f"with python -m deq_jax.data.wikitext --config={config.split('/')[1]}, or name a "
                "folder with wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens (--data.dir)"
            ) from error
        texts[split] = b"".join(source[i]["text"] for i in range(len(source)))
    _check_tokens(texts, name, config)
    return texts


def _check_tokens(texts: dict[str, bytes], name: str, where: str) -> None:
    for split, wanted in TOKENS.get(name.removeprefix("wikitext-"), {}).items():
        found = len(texts[split].split()) + texts[split].count(b"\n")
        if found != wanted:
            raise ValueError(
                f"got {found:,} words and line ends in {split} of {where}; wanted the {wanted:,} "
                f"of {name}: the file is truncated or another one (data.name=text takes any text)"
            )


def words_of(text: str, *, lower: bool = True) -> list[str]:
    """Splits prose into words, numbers and signs.

    Args:
      text: any text.
      lower: whether to write everything in small letters.

    Returns:
      The words.

    Example:
      >>> words_of("It's 3.5, or so")
      ['it', "'", 's', '3', '.', '5', ',', 'or', 'so']
    """
    return re.findall(r"<unk>|\w+|[^\w\s]", text.lower() if lower else text)


def prose() -> dict[str, bytes]:
    """The documentation text that comes with CPython (``pydoc_data.topics``), a paragraph a line.

    Nothing is downloaded; the text is that of the running Python.  Every fourth topic is held out,
    for "valid" and "test" in turn.  A paragraph that several topics share is kept once, so that
    nothing held out was seen in training.  Words that the training topics have fewer than ``RARE``
    times are ``<unk>``.

    Returns:
      "train", "valid", "test" -> text.

    Example:
      >>> len(prose()["train"]) > 100_000
      True
    """
    from pydoc_data.topics import topics

    lines: dict[str, list[list[str]]] = {split: [] for split in SPLITS}
    seen = set()
    for i, name in enumerate(sorted(topics)):
        split = {3: "valid", 7: "test"}.get(i % 8, "train")
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            # Lines of signs only underline headings.
            rows = [row for row in paragraph.split("\n") if re.search(r"\w", row)]
            words = words_of(" ".join(rows))
            if words and tuple(words) not in seen:
                seen.add(tuple(words))
                lines[split].append(words)
    counts = Counter(word for line in lines["train"] for word in line)
    known = {word for word, count in counts.items() if count >= RARE}
    return {
        split: "".join(
            " ".join(word if word in known else UNKNOWN for word in line) + "\n" for line in part
        ).encode()
        for split, part in lines.items()
    }
