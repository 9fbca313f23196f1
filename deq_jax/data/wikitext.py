r"""WikiText-2 and WikiText-103 (arXiv 1609.07843) as a TFDS set: one record for each article.

    python -m deq_jax.data.wikitext --config=2 --manual_dir=DIR --data_dir=DIR

prepares the set without TensorFlow from wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens
in the manual directory, or from the published archive if none of them is there.  TFDS' own command
needs TensorFlow, which it imports before it looks at its arguments:

    tfds build wikitext/2 --imports=deq_jax.data.wikitext --file_format=array_record \
        --manual_dir=DIR --data_dir=DIR

`deq_jax.data.sources.open_tfds` reads a prepared set, and needs neither TensorFlow nor this module.
Importing this module imports tensorflow_datasets, since a builder has to be a subclass.
"""

from __future__ import annotations

import argparse
import os
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import tensorflow_datasets as tfds

from deq_jax.data.corpora import TOKENS

FILES = {
    "train": "wiki.train.tokens",
    "validation": "wiki.valid.tokens",
    "test": "wiki.test.tokens",
}
"""Split -> name of its file."""

ARCHIVES = {
    "103": "https://wikitext.smerity.com/wikitext-103-v1.zip",
    "2": "https://wikitext.smerity.com/wikitext-2-v1.zip",
}
"""Configuration -> address of the archive with its three files."""

# " = Title = ", where a section has " = = Section = = ".
TITLE = re.compile(rb" = (?!= )[^\n]+(?<! =) = \n")

_CITATION = """@inproceedings{merity2017pointer,
  title = {Pointer Sentinel Mixture Models},
  author = {Stephen Merity and Caiming Xiong and James Bradbury and Richard Socher},
  booktitle = {International Conference on Learning Representations},
  year = {2017},
  url = {https://arxiv.org/abs/1609.07843}
}"""

_MANUAL = (
    f"The manual directory has {', '.join(FILES.values())} of one configuration, as they are in "
    "its archive. With none of them there, the archive is downloaded."
)


def _lines(file: IO[bytes]) -> Iterator[tuple[bytes, bool]]:
    """Yields each line, and whether an article starts there."""
    # A title stands between blank lines.  A line of a legend or of a formula may look like one,
    # " = Wins ; L = ", and without this WikiText-2 would get 629 training articles, not 600.
    before, line = b"", file.readline()
    while line:
        after = file.readline()
        alone = not before.strip() and not after.strip()
        yield line, alone and TITLE.fullmatch(line) is not None
        before, line = line, after


def articles(file: IO[bytes]) -> Iterator[bytes]:
    r"""Splits a WikiText file into articles, without changing a byte.

    Args:
      file: opened for reading bytes.

    Yields:
      What precedes the first title, if anything does; then each article from its title, a line
      `` = Title = `` between blank lines (or at an end of the file), up to the next one.

    Example:
      >>> import io
      >>> list(articles(io.BytesIO(b" = A = \n \n one \n \n = B = \n")))
      [b' = A = \n \n one \n \n', b' = B = \n']
    """
    held: list[bytes] = []
    for line, starts in _lines(file):
        if starts and held:
            yield b"".join(held)
            held.clear()
        held.append(line)
    if held:
        yield b"".join(held)


def check(path: Path | zipfile.Path, tokens: int | None) -> None:
    """Refuses a file that is not the whole of a WikiText file.

    Args:
      path: of the file, on disk or in an archive.
      tokens: the wanted number of words and ends of lines; None to take any number.

    Raises:
      ValueError: an empty or truncated file, one that is not UTF-8 or without a title, or another
        number of tokens.
    """
    line, offset, titles, found = b"", 0, 0, 0
    with path.open("rb") as file:
        for line, starts in _lines(file):  # the next test needs the last one
            try:
                line.decode()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"got {path} with a byte that is not UTF-8 at offset {offset + error.start}; "
                    "wanted a WikiText file as it was published: get it again"
                ) from None
            words = line.rstrip(b"\n").split(b" ")
            found += len(words) - words.count(b"") + 1
            offset += len(line)
            titles += starts
    if offset == 0:
        raise ValueError(f"got {path}, which is empty; wanted a WikiText file: get it again")
    if not line.endswith(b"\n"):
        raise ValueError(
            f"got {path}, truncated: its last line does not end; wanted a file ending in a "
            "newline: get it again"
        )
    if not titles:
        raise ValueError(
            f"got {path} without a title; wanted a WikiText file, with a line ' = Title = ' "
            "between blank lines on top of each article: check that it is the right file"
        )
    if tokens is not None and found != tokens:
        raise ValueError(
            f"got {path} with {found:,} tokens; wanted {tokens:,}: check that it belongs to this "
            "configuration, and is the word-level file (not the raw one) as it was published"
        )


def _find(folder: Path | zipfile.Path) -> dict[str, Path | zipfile.Path]:
    """The files that are in a folder, by split."""
    paths = {split: folder / name for split, name in FILES.items()}
    return {split: path for split, path in paths.items() if path.is_file()}


def _manual_folder(manager: Any) -> Path | None:
    """The manual directory; None if it does not exist or is empty, which TFDS makes an error."""
    try:
        return Path(os.fspath(manager.manual_dir))
    except AssertionError:
        return None


def _archive_folder(manager: Any, config: str) -> zipfile.Path:
    """Downloads a configuration's archive; the folder inside it."""
    url = ARCHIVES[config]
    try:
        path = Path(os.fspath(manager.download(url)))
    except (OSError, tfds.download.DownloadError) as error:
        raise ConnectionError(
            f"could not download {url} ({type(error).__name__}); wanted the archive, or "
            f"{', '.join(FILES.values())} in the manual directory: put the files there"
        ) from error
    # The manager's extract and iter_archive open the archive with tf.io.gfile, so they need
    # TensorFlow where download does not.  Reading inside the archive needs neither.
    try:
        broken = zipfile.ZipFile(path).testzip()
    except (zipfile.BadZipFile, zlib.error):
        broken = "all of it"
    if broken is not None:
        raise ValueError(
            f"got a damaged archive from {url} ({broken}); wanted a zip file: delete {path} and "
            "prepare the set again"
        )
    return zipfile.Path(path) / f"wikitext-{config}"


class Wikitext(tfds.core.GeneratorBasedBuilder):
    """Builder of the set "wikitext": configurations "103" and "2", word level.

    Each record is ``{"text": bytes}``, one article as `articles` yields it, in the file's order:
    the records of a split, put together, are its file again.

    Example:
      >>> sorted(Wikitext.builder_configs)
      ['103', '2']
    """

    # The same in the set's metadata when this file is run as a program, where it is __main__.
    __module__ = "deq_jax.data.wikitext"
    # TFDS 4.9.10 looks this path up with importlib_resources, which it asks for, and so installs,
    # only below Python 3.9.
    code_path = tfds.core.Path(__file__)

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "One record for each article."}
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name=name, description=f"WikiText-{name}, word level.")
        for name in TOKENS
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = _MANUAL

    def _info(self) -> tfds.core.DatasetInfo:
        """What the set holds."""
        return tfds.core.DatasetInfo(
            builder=self,
            description="Good and featured articles of Wikipedia as word-level tokens.",
            features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
            homepage="https://arxiv.org/abs/1609.07843",
            citation=_CITATION,
            license="Creative Commons Attribution-ShareAlike (CC BY-SA)",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        """Checks all three files before the first record is written."""
        config: str = self.builder_config.name  # pyright: ignore[reportOptionalMemberAccess]
        folder = _manual_folder(dl_manager)
        if folder is None or not _find(folder):
            folder = _archive_folder(dl_manager, config)
        paths = _find(folder)
        missing = [name for split, name in FILES.items() if split not in paths]
        if missing:
            raise ValueError(
                f"got {folder} without {', '.join(missing)}; wanted {', '.join(FILES.values())} "
                "there: add what is missing"
            )
        for split, path in paths.items():
            check(path, TOKENS[config].get(split.removesuffix("ation")))
        return {split: self._generate_examples(path) for split, path in paths.items()}

    def _generate_examples(
        self, path: Path | zipfile.Path
    ) -> Iterator[tuple[int, Mapping[str, bytes]]]:
        """Yields the articles under their numbers, by which TFDS orders them."""
        # TFDS holds a split in memory up to 1000 MiB and goes through TensorFlow's files above;
        # the largest split, of WikiText-103, is about 540 MB.
        with path.open("rb") as file:
            for number, article in enumerate(articles(file)):
                yield number, {"text": article}


def prepare(config: str, manual_dir: str = "", data_dir: str = "") -> Wikitext:
    """Prepares a configuration in ArrayRecord format, unless it is prepared already.

    Args:
      config: "103" or "2".
      manual_dir: folder of the three files; empty for TFDS' own default,
        ``downloads/manual`` in data_dir.
      data_dir: folder of TFDS sets; empty for TFDS' own default.

    Returns:
      The builder of the prepared set.

    Raises:
      ValueError: an unknown configuration, a manual_dir that does not exist, or files that are not
        WikiText as it was published; the set is not prepared then.
      ConnectionError: none of the files is there, and the archive cannot be downloaded.

    Example:
      >>> builder = prepare("2", "~/wikitext-2", "~/data")  # doctest: +SKIP
    """
    if config not in TOKENS:
        raise ValueError(f"got configuration {config!r}; wanted one of {sorted(TOKENS)}: name one")
    root = os.path.expanduser(data_dir) if data_dir else None
    builder = Wikitext(config=config, data_dir=root, file_format="array_record")
    manual = os.path.expanduser(manual_dir) if manual_dir else None
    if manual and not builder.is_prepared() and not os.path.isdir(manual):
        # Without this a mistyped folder would start a download.
        raise ValueError(
            f"got manual_dir {manual}, which does not exist; wanted a folder with "
            f"{', '.join(FILES.values())}: name one, or none to download the archive"
        )
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual))
    return builder


def main(arguments: Sequence[str] | None = None) -> None:
    """Prepares a configuration, and prints where it is and how many articles each split has.

    Args:
      arguments: of the command line; None for those of this process.

    Raises:
      SystemExit: the set cannot be prepared; it has the reason.
    """
    parser = argparse.ArgumentParser(
        "python -m deq_jax.data.wikitext", description="Prepares WikiText as a TFDS set."
    )
    parser.add_argument("--config", required=True, choices=sorted(TOKENS), help="which WikiText")
    parser.add_argument("--manual_dir", default="", help=_MANUAL)
    parser.add_argument("--data_dir", default="", help="of TFDS sets; TFDS' default if left out")
    given = parser.parse_args(arguments)
    try:
        builder: Any = prepare(given.config, given.manual_dir, given.data_dir)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
    print(f"wikitext/{given.config} is in {builder.data_path}")
    for split in FILES:
        source = builder.as_data_source(split=split)
        extra = TITLE.match(source[0]["text"]) is None
        beside = " and 1 record of what precedes the first" if extra else ""
        print(f"{split}: {len(source) - extra} articles{beside}")


if __name__ == "__main__":
    main()
