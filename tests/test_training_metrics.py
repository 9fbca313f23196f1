"""Sums that merge, the files they are written to, and what of them a resumed run keeps."""

import contextlib
import errno
import json
import os
import struct
import subprocess
import sys

import numpy as np
import pytest

from deq_jax.training import metrics, read_history, writers
from deq_jax.training.console import Console
from deq_jax.training.metrics import Mean


def test_merged_means_weigh_examples_not_batches():
    merged = metrics.merge({"a": Mean(2.0, 1)}, {"a": Mean(10.0, 4), "b": Mean(1.0, 2)})
    assert metrics.compute(merged) == {"a": 12 / 5, "b": 0.5}


def test_a_mean_over_nothing_is_left_out():
    assert metrics.compute({"penalty": Mean(0.0, 0.0)}) == {}


def test_arrays_merge_too():
    confusion = Mean(np.eye(2, dtype=np.float32), np.float32(2))
    merged = metrics.merge(metrics.merge({}, {"c": confusion}), {"c": confusion})
    np.testing.assert_array_equal(merged["c"].total, 2 * np.eye(2))


def test_means_pass_through_json_bit_for_bit():
    sums = {
        "a": Mean(np.float64(1) / 3, np.float64(7)),
        "b": Mean(np.float64("inf"), np.float64(1)),
    }
    back = metrics.from_json(json.loads(json.dumps(metrics.to_json(sums))))
    assert back["a"].total == sums["a"].total
    assert back["b"].total == np.inf


@pytest.fixture
def open_writer():
    with contextlib.ExitStack() as stack:

        def make(path, step=0, said=None):
            said = said if said is not None else []
            return stack.enter_context(writers.MetricWriter(path, step, said.append))

        yield make


def test_history_is_what_was_written(open_writer, tmp_path):
    writer = open_writer(tmp_path)
    writer.write("train", 10, {"loss": 0.5})
    writer.write("eval", 10, {"loss": 0.25}, budget=12)
    assert read_history(tmp_path) == [
        {"kind": "train", "step": 10, "loss": 0.5},
        {"kind": "eval", "step": 10, "budget": 12, "loss": 0.25},
    ]


def test_a_resumed_run_drops_what_lies_beyond_and_a_line_cut_short(open_writer, tmp_path):
    writer = open_writer(tmp_path)
    for step in (10, 20, 30):
        writer.write("train", step, {"loss": 1.0})
    with (tmp_path / writers.HISTORY).open("a") as file:
        file.write('{"kind": "tra')
    assert [r["step"] for r in read_history(tmp_path)] == [10, 20, 30]
    open_writer(tmp_path, step=20).write("train", 30, {"loss": 2.0})
    assert [(r["step"], r["loss"]) for r in read_history(tmp_path)] == [(10, 1), (20, 1), (30, 2)]


def test_a_full_disk_delays_records_without_losing_or_tearing_them(
    open_writer, tmp_path, monkeypatch
):
    said = []
    writer = open_writer(tmp_path, said=said)
    writer.write("train", 1, {"loss": 1.0})

    def partly(path, data):
        with path.open("ab", buffering=0) as file:
            end = file.tell()
            file.write(data[: len(data) // 2])
            os.truncate(path, end)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    whole = writers._append
    monkeypatch.setattr(writers, "_append", partly)
    writer.write("train", 2, {"loss": 2.0})
    assert [r["step"] for r in read_history(tmp_path)] == [1]
    assert "No space left" in said[0]
    monkeypatch.setattr(writers, "_append", whole)
    writer.write("train", 3, {"loss": 3.0})
    assert [r["step"] for r in read_history(tmp_path)] == [1, 2, 3]


def read_events(path):
    from tensorboardX.proto.event_pb2 import Event  # type: ignore[attr-defined]
    from tensorboardX.record_writer import masked_crc32c

    data, at = path.read_bytes(), 0
    while at < len(data):
        (length,) = struct.unpack("<Q", data[at : at + 8])
        body = data[at + 12 : at + 12 + length]
        assert struct.unpack("<I", data[at + 8 : at + 12])[0] == masked_crc32c(data[at : at + 8])
        at += 12 + length + 4
        assert struct.unpack("<I", data[at - 4 : at])[0] == masked_crc32c(body)
        yield Event.FromString(body)


def test_tensorboard_reads_the_events_and_forgets_the_overwritten_ones(open_writer, tmp_path):
    open_writer(tmp_path).write("eval", 10, {"loss": 0.25}, budget=12)
    first, value = read_events(next(tmp_path.glob("events*")))
    assert first.file_version == "brain.Event:2"
    assert (value.step, value.summary.value[0].tag) == (10, "eval/loss/budget_12")
    assert value.summary.value[0].simple_value == 0.25
    open_writer(tmp_path, step=5)
    _, start = read_events(max(tmp_path.glob("events*")))
    assert (start.step, start.session_log.status) == (6, start.session_log.START)


def test_two_runs_in_the_same_second_write_two_event_files(open_writer, tmp_path):
    for step in (0, 5):
        open_writer(tmp_path, step=step).write("train", step + 1, {"loss": 1.0})
    files = sorted(tmp_path.glob("events*"))
    assert [[event.step for event in read_events(path)] for path in files] == [[0, 1], [0, 6, 6]]


def test_a_full_disk_ends_the_event_file_with_one_sentence(tmp_path):
    """In a program of its own, where Python would complain of the file at the end."""
    program = f"""
import resource
from deq_jax.training.writers import MetricWriter
writer = MetricWriter({str(tmp_path)!r}, 0, print)
writer.write("train", 1, {{"loss": 1.0}})
limit = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (120, limit[1]))
writer.write("train", 2, {{"a name long enough to meet the limit" * 3: 2.0}})
resource.setrlimit(resource.RLIMIT_FSIZE, limit)
writer.write("train", 3, {{"loss": 3.0}})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.count("no more TensorBoard events are written: File too large") == 1
    assert [record["step"] for record in read_history(tmp_path)] == [1, 2, 3]
    (path,) = tmp_path.glob("events*")
    steps = []
    with contextlib.suppress(struct.error):  # the record that was being written
        steps += (event.step for event in read_events(path))
    assert steps == [0, 1]


def test_without_a_terminal_progress_is_plain_lines(capsys):
    with Console(100, enabled=True) as console:
        console.advance(50)
        console.show(
            50, {"loss": 0.5, "fwd_steps": 6.25, "unconverged": 0.1, "steps_per_second": 2}
        )
        console.say("saved")
    assert capsys.readouterr().err == (
        "step 50/100  loss 0.5  nfe 6.2  unconverged 10%  2.00 steps/s  eta 0:00:25\nsaved\n"
    )
    with Console(100, enabled=False) as console:
        console.say("nothing")
    assert capsys.readouterr().err == ""


def test_on_a_terminal_progress_is_a_bar(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Console(100, enabled=True) as console:
        console.advance(50)
        console.show(50, {"loss": 0.5, "fwd_steps": 6.25})
        console.say("saved")
        console.advance(51)
    shown = capsys.readouterr().err
    assert "50/100" in shown
    assert "saved" in shown
