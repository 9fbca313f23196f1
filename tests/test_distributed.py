"""What decides whether a process is one of many; test_processes.py has the many."""

import numpy as np
import pytest

from deq_jax.training import UsageError, distributed
from deq_jax.training.distributed import PreemptionSync


@pytest.mark.parametrize(
    ("environment", "announced"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "8"}, False),  # a shell of salloc: not started by srun
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NODELIST": "node[1-2]"}, True),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "node1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"TPU_WORKER_HOSTNAMES": "host-0,host-1"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"JAX_COORDINATOR_ADDRESS": "host:1234"}, True),
    ],
)
def test_launchers_are_recognised(environment, announced):
    assert distributed.is_announced(environment) is announced


def test_jax_is_asked_to_find_out_only_where_something_is_announced(monkeypatch):
    import jax

    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **settings: calls.append(settings))
    assert distributed.initialize() is None
    assert calls == []
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    distributed.initialize()
    distributed.initialize("auto")
    distributed.initialize("host:1", 1, 0)
    address = {"coordinator_address": "host:1", "num_processes": 1, "process_id": 0}
    assert [{**call, "heartbeat_timeout_seconds": 0} for call in calls] == [
        {"heartbeat_timeout_seconds": 0},
        {"heartbeat_timeout_seconds": 0},
        {"heartbeat_timeout_seconds": 0, **address},
    ]


def test_what_jax_cannot_do_is_said_in_words(monkeypatch):
    import jax

    def fail(**_):
        raise RuntimeError("DEADLINE_EXCEEDED: Barrier timed out\nstack")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(UsageError, match=r"cannot join .*Barrier timed out; see that all are"):
        distributed.initialize("host:1", 2, 0)


def test_alone_nobody_has_to_be_asked():
    from deq_jax.training.parallel import make_mesh

    assert distributed.is_first() and distributed.largest(3) == 3
    assert distributed.from_first({"a": [1]}) == {"a": [1]}
    np.testing.assert_array_equal(distributed.fetch({"a": np.arange(2)})["a"], [0, 1])
    votes = PreemptionSync(make_mesh(), 2)
    assert (votes.poll(None), votes.poll(15)) == (0, 15)
