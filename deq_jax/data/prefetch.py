"""Batches made ahead of time, by a thread or by worker processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from typing import Any, Protocol


class Batches(Protocol):
    """Random access to batches; to be pickled where worker processes make them."""

    def __getitem__(self, index: int, /) -> Any:
        """The batch with a number."""
        ...


def prefetched(batches: Batches, indices: range, workers: int) -> Any:
    """Makes some batches ahead of time, and gives them in order.

    Args:
      batches: random access to the batches.
      indices: which ones.
      workers: processes that make them in turn; 0 for a thread of this process.

    Returns:
      A grain iterator; ``close()`` ends what it has started.

    Example:
      >>> list(prefetched(["a", "b", "c"], range(1, 3), workers=0))
      ['b', 'c']
    """
    import grain

    part: Any = _Part(batches, indices)
    # One thread, a few batches ahead: the cores belong to the solver, or to the other workers.
    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2 if workers else 4)
    data = grain.MapDataset.source(part).to_iter_dataset(ahead)
    if workers:
        from absl import flags

        # Grain reads flags of its own, which outside of an absl program nobody has parsed.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        options = grain.multiprocessing.MultiprocessingOptions(num_workers=workers)
        data = data.mp_prefetch(options, worker_init_fn=_start_worker)
    return iter(data)


class _Part:
    """Some of the batches, in the form that grain takes as a source."""

    def __init__(self, batches: Batches, indices: range) -> None:
        self._batches = batches
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Any:
        return self._batches[self._indices[index]]


def _start_worker(index: int, count: int) -> None:
    """Binds the life of a worker to its parent's, not to signals.

    A signal that ends a run goes to the whole process group, but the parent wants batches until it
    has saved; it closes its workers itself.  A parent that was killed closes nothing.
    """
    del index, count
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(0)

    threading.Thread(target=follow, daemon=True).start()
