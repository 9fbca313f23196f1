"""A stand-in for Google Cloud Storage: gs://BUCKET/NAME is ROOT/BUCKET/NAME.

Real are what this library does, etils.epath's paths, and how Orbax lays out and completes a
checkpoint on gs://.  Not real: the network, credentials, the drivers of gcsfs and TensorStore, and
what happens to an object while it is written.  As a program,

    python tests/fake_store.py ROOT --workdir=gs://...

is tests/training_example.py with such a store.
"""

import contextlib
import os
import sys
import types
from unittest import mock

from etils.epath import backend, gpath
from orbax.checkpoint._src.path import gcs_utils


class Store(type(backend.os_backend)):
    """The file system, below a folder; what objects cannot do fails."""

    def __init__(self, root):
        self.root = str(root)

    def at(self, path):
        path = os.fspath(path)
        assert path.startswith("gs://"), path
        return os.path.join(self.root, path[5:])

    def open(self, path, mode):
        if "a" in mode or "+" in mode:
            raise OSError(f"{path}: objects cannot be changed")
        if "w" in mode:  # there are no folders, only names with slashes
            os.makedirs(os.path.dirname(self.at(path)), exist_ok=True)
        return super().open(self.at(path), mode)

    def glob(self, path):
        return [f"gs://{os.path.relpath(p, self.root)}" for p in super().glob(self.at(path))]

    def walk(self, top, **settings):
        raise NotImplementedError


def _mapped(name):
    whole = getattr(backend.os_backend, name).__func__

    def method(self, *paths, **settings):
        flags = [p for p in paths if isinstance(p, bool)]
        return whole(_LOCAL, *map(self.at, paths[: len(paths) - len(flags)]), *flags, **settings)

    return method


_LOCAL = backend.os_backend
for _name in ("exists", "isdir", "listdir", "makedirs", "mkdir", "rmtree", "remove", "stat"):
    setattr(Store, _name, _mapped(_name))
for _name in ("rename", "replace", "copy"):
    setattr(Store, _name, _mapped(_name))


@contextlib.contextmanager
def installed(root):
    """While entered, gs:// is the folder."""
    store = Store(root)
    with (
        mock.patch.dict(gpath._PREFIX_TO_BACKEND, gs=store),
        mock.patch.object(gpath, "_is_tf_installed", lambda: False),
        mock.patch.object(gcs_utils, "get_bucket", lambda name: types.SimpleNamespace()),
        mock.patch.object(
            gcs_utils,
            "get_kvstore_for_gcs",
            lambda path: {"driver": "file", "path": store.at(path)},
        ),
    ):
        yield store


if __name__ == "__main__":
    import jax
    import training_example

    jax.config.update("jax_num_cpu_devices", 2)
    with installed(sys.argv.pop(1)):
        training_example.launch()
