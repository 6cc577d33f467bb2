"""Threads that capture and run steps at once get what each gets by itself."""

import contextlib
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from metaattn.autodiff import FunctionKey
from metaattn.compile import capture, compiler, precompile
from metaattn.compile.piecewise import as_recorded
from metaattn.meta import adam, maml, sgd
from tests.helpers import assert_close

SEEDS = range(3)
PARAMS = {"w": torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4), "v": torch.ones(4, dtype=torch.float64)}


class Meeting:
    """Place where a loss waits a moment for those of the other threads, so that the threads take turns there.

    It waits only for a moment, because another thread may itself wait until this one has recorded its loss.
    """

    def __init__(self, parties):
        self._barrier, self._open = threading.Barrier(parties), True

    def __call__(self):
        if self._open:
            with contextlib.suppress(threading.BrokenBarrierError):
                self._barrier.wait(0.005)
            if self._barrier.broken:
                self._barrier.reset()

    def close(self):
        self._open = False


class Case:
    """Learner whose loss counts its calls, notes the threads that call it, and meets the losses of other threads."""

    def __init__(self, meeting, scale, device="cpu", **settings):
        self.calls, self.threads, self.device = 0, set(), device

        def loss(params, x, y):
            self.calls += 1
            self.threads.add(threading.get_ident())
            meeting()
            out = scale * ((x @ params["w"]).tanh() @ params["v"] - y).square().mean()
            meeting()
            return out

        self.learner = maml(loss, learning_rate=0.1, **settings)
        meta = self.learner.init({k: t.to(device) for k, t in PARAMS.items()})
        self.meta = {group: {k: t.detach() for k, t in part.items()} for group, part in meta.items()}

    def data(self, seed):
        g = torch.Generator().manual_seed(seed)
        shapes = ((2, 5, 3), (2, 5))
        sets = [[torch.randn(s, generator=g, dtype=torch.float64).to(self.device) for s in shapes] for _ in range(2)]
        return tuple(map(tuple, sets))

    def eager(self, seed):
        return self.learner.value_and_grad(self.meta, *self.data(seed))

    def compiled(self, lower=None):
        """Return a function of a seed that runs the captured step, the step, and the modules that it compiles."""
        fast, modules = capture(self.learner.value_and_grad, mode="inductor"), []
        make = lower or fast.compiler.compile_piece

        def compile_piece(module, inputs):
            modules.append(module)
            return make(module, inputs)

        fast.compiler.compile_piece = compile_piece
        return lambda seed: fast(self.meta, *self.data(seed)), fast, modules


def for_seeds(run, *seeds):
    return lambda: [run(seed) for seed in seeds]


def at_once(*functions):
    """Run functions in threads that begin together, and return their results."""
    start = threading.Barrier(len(functions))

    def run(function):
        start.wait()
        return function()

    with ThreadPoolExecutor(len(functions)) as pool:
        return [f.result(timeout=300) for f in [pool.submit(run, function) for function in functions]]


@pytest.fixture(autouse=True)
def _switch_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")  # Inductor's own
@pytest.mark.parametrize(("lower", "rounds"), [(as_recorded, 3), (None, 1)], ids=["recorded", "inductor"])
def test_different_steps(lower, rounds):
    """Two are compiled, by different ways to differentiate; a third runs eagerly meanwhile."""
    for _ in range(rounds):
        meeting = Meeting(3)
        cases = [
            Case(meeting, 1.0, steps=2, gradient="reverse"),
            Case(meeting, 2.0, steps=3, gradient="mixed", optimizer=adam()),
            Case(meeting, 3.0, steps=2, gradient="first_order", optimizer=sgd()),
        ]
        runs = [cases[0].compiled(lower), cases[1].compiled(lower)]
        got = at_once(*(for_seeds(run, *SEEDS) for run in (runs[0][0], runs[1][0], cases[2].eager)))
        # The eager case calls its loss in each step of each call, in its thread; the others only to record it.
        eager = cases[2].calls
        assert all(len(case.threads) == 1 for case in cases)
        meeting.close()
        for case, results in zip(cases, got, strict=True):
            for seed, result in zip(SEEDS, results, strict=True):
                assert_close(result, case.eager(seed))
        assert eager == cases[2].calls - eager
        alone = [case.compiled(lower) for case in cases[:2]]
        for (_, fast, modules), (run, _, expected) in zip(runs, alone, strict=True):
            assert not fast.compiler.reasons
            run(0)
            assert len(modules) == len(expected) > 0


def test_the_same_step():
    """One thread records it, and the others wait."""
    for _ in range(3):
        meeting = Meeting(2)
        case = Case(meeting, 1.0, steps=2, gradient="mixed")
        run, fast, modules = case.compiled(as_recorded)
        got = at_once(*(for_seeds(run, seed, seed + 1) for seed in SEEDS))
        meeting.close()
        for seed, results in zip(SEEDS, got, strict=True):
            assert_close(results, [case.eager(seed), case.eager(seed + 1)])
        alone = case.compiled(as_recorded)
        alone[0](0)
        assert len(modules) == len(alone[2]) > 0
        assert not fast.compiler.reasons


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["graph", "inductor"])
def test_graphs(mode):
    """Two steps are captured, of which one is replayed by two threads on separate streams; a third runs eagerly."""
    meeting = Meeting(3)
    cases = [
        Case(meeting, 1.0, "cuda", steps=2, gradient="reverse"),
        Case(meeting, 2.0, "cuda", steps=3, gradient="mixed" if mode == "inductor" else "first_order"),
        Case(meeting, 3.0, "cuda", steps=2, gradient="reverse"),
    ]
    fast = [capture(case.learner.value_and_grad, mode=mode) for case in cases[:2]]

    def replayed(step, case):
        def run(seed):
            with torch.cuda.stream(stream):
                stream.wait_stream(torch.cuda.default_stream())
                result = step(case.meta, *case.data(seed))
                stream.synchronize()
                return result

        stream = torch.cuda.Stream()
        return run

    for _ in range(2):
        got = at_once(
            for_seeds(replayed(fast[0], cases[0]), *SEEDS),
            for_seeds(replayed(fast[0], cases[0]), *SEEDS),
            for_seeds(replayed(fast[1], cases[1]), *SEEDS),
            for_seeds(cases[2].eager, *SEEDS),
        )
        assert [step.reason for step in fast] == [None, None]
        for case, results in zip([cases[0], *cases], got, strict=True):
            for seed, result in zip(SEEDS, results, strict=True):
                assert_close(result, case.eager(seed))
    assert all(step.compiler is None or not step.compiler.reasons for step in fast)


def test_a_step_runs_eagerly_where_recording_would_have_to_wait():
    """A backward pass may run in a thread of PyTorch that the recording waits for: if both waited, none would end."""
    case = Case(Meeting(1), 1.0, steps=1)
    _, fast, modules = case.compiled(as_recorded)
    key = FunctionKey("key", (), "key")
    with compiler._recording:
        assert fast.compiler.run(key, lambda x: (x.sin(),), [torch.ones(3)]) is None
    (out,) = fast.compiler.run(key, lambda x: (x.sin(),), [torch.ones(3)])
    assert_close(out, torch.ones(3).sin(), torch.float32)
    assert len(modules) == 1
    assert not fast.compiler.reasons


def test_one_pool_of_processes_is_started(monkeypatch):
    made = []

    class Pool:
        def __init__(self):
            threading.Event().wait(0.05)
            made.append(self)

    monkeypatch.setattr(precompile, "_pool", None)
    monkeypatch.setattr(precompile, "WorkerPool", Pool)
    assert len({id(pool) for pool in at_once(*[precompile.worker_pool] * 4)}) == len(made) == 1
