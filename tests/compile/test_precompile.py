"""Pieces that other processes compile: they are found when they first run, and the step runs without them too."""

import os
import sys
import threading

import pytest
import torch
from torch import fx
from torch._dynamo.utils import counters
from torch.func import functional_call

import metaattn
from metaattn.compile import capture, precompile
from metaattn.compile.piecewise import as_recorded
from metaattn.meta import maml
from tests.helpers import assert_close


@pytest.fixture
def step():
    """Return a meta-gradient with attention in it, so that it has more than one piece, and its arguments."""
    model = metaattn.Transformer(
        input="continuous", in_features=3, output="pooled", out_features=1, dim=8, heads=2, depth=1
    )
    torch.nn.init.normal_(model.double().get_parameter("head.weight"))
    learner = maml(
        lambda params, x: functional_call(model, params, (x,)).square().mean(),
        steps=1,
        learning_rate=0.1,
        gradient="first_order",
    )
    x = torch.randn(2, 2, 4, 5, 3, dtype=torch.float64)
    return learner.value_and_grad, (learner.init(dict(model.named_parameters())), (x[0],), (x[1],))


@pytest.fixture
def begun(monkeypatch):
    """List the pieces that are sent to two processes."""
    pieces = []
    begin = precompile.WorkerPool.begin

    def recorded(self, piece, options):
        pieces.append(piece)
        return begin(self, piece, options)

    monkeypatch.setattr(precompile, "process_count", lambda: 2)
    monkeypatch.setattr(precompile.WorkerPool, "begin", recorded)
    monkeypatch.setattr(precompile, "_pool", None)
    yield pieces
    if precompile._pool is not None:
        precompile._pool.end()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Inductor's own
def test_what_a_process_compiled_is_found(step, begun, precision, tmp_path, monkeypatch):
    precision("high")
    precision("highest")  # which is not what it was before, to Inductor's keys
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._inductor.utils.clear_caches()  # those in memory
    counters["inductor"].clear()
    value_and_grad, args = step
    fast = capture(value_and_grad, mode="inductor")
    assert_close(fast(*args), value_and_grad(*args))
    assert not fast.compiler.reasons
    assert len(begun) > 1
    assert counters["inductor"]["fxgraph_cache_hit"] == len(begun)


@pytest.mark.filterwarnings("ignore")
def test_without_the_process_the_step_is_compiled_here(step, begun):
    precompile.worker_pool().end()
    value_and_grad, args = step
    fast = capture(value_and_grad, mode="inductor")
    fast.compiler.compile_piece = as_recorded
    assert_close(fast(*args), value_and_grad(*args))
    assert begun
    assert set(fast.compiler._precompiler._begun.values()) == {None}


@pytest.mark.filterwarnings("ignore")
def test_processes_that_are_of_no_use_get_no_more_pieces(step, begun, monkeypatch):
    """One takes too long; another says that it is done, but has compiled nothing."""
    value_and_grad, args = step
    for done in (False, True):
        begun.clear()
        event = threading.Event()
        if done:
            event.set()
        monkeypatch.setattr(
            precompile.WorkerPool, "begin", lambda self, piece, options, e=event: begun.append(piece) or e
        )
        monkeypatch.setattr(precompile, "TIMEOUT", 0.1)
        fast = capture(value_and_grad, mode="inductor")
        fast.compiler.compile_piece = as_recorded
        assert_close(fast(*args), value_and_grad(*args))
        assert 0 < len(begun) <= 2  # one for each process, and none after the first wait
        assert fast.compiler._precompiler._max_processes == 0


def test_where_no_process_can_be_started_the_step_runs(step, begun, monkeypatch):
    monkeypatch.setattr(sys, "executable", "")
    value_and_grad, args = step
    fast = capture(value_and_grad, mode="inductor")
    fast.compiler.compile_piece = as_recorded
    assert_close(fast(*args), value_and_grad(*args))
    assert not begun


@pytest.mark.parametrize("options", [{"force_disable_caches": True}, {"fx_graph_cache": False}])
def test_without_caches_no_process_is_started(step, begun, options):
    value_and_grad, args = step
    fast = capture(value_and_grad, mode="inductor", options=options)
    fast.compiler.compile_piece = as_recorded
    fast(*args)
    assert not begun
    assert precompile._pool is None


def test_a_process_that_dies_is_noticed(begun):
    class Fatal:
        """Object that ends the process which unpickles it."""

        def __reduce__(self):
            return os._exit, (1,)

    graph = fx.Graph()
    graph.output((graph.placeholder("x"),))
    piece = precompile.Piece(
        fx.GraphModule(torch.nn.Module(), graph), [precompile.TensorSpec((1,), (1,), torch.float32, "nowhere")]
    )
    here = precompile.worker_pool()
    assert here.begin(piece._replace(specs=[Fatal()]), {}).wait(60)
    done = here.begin(piece, {})  # an error, but the process that forks the others still runs
    assert done.wait(60)
    here._process.kill()
    here._process.wait()
    assert here.begin(piece, {}) is None


@pytest.mark.parametrize(
    ("cores", "ranks", "count"), [(1, 1, 0), (3, 1, 0), (4, 1, 2), (16, 1, 8), (64, 1, 8), (64, 8, 4)]
)
def test_how_many_processes(cores, ranks, count, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(cores), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.delenv("METAATTN_COMPILE_PROCESSES")
    assert precompile.process_count() == count
    monkeypatch.setenv("METAATTN_COMPILE_PROCESSES", "0")
    assert precompile.process_count() == 0
    monkeypatch.setenv("METAATTN_COMPILE_PROCESSES", "all")
    with pytest.raises(ValueError, match="must be a number"):
        precompile.process_count()
