"""Executors: each thread has its own, and what is differentiated carries that of its call."""

import threading

import pytest
import torch

from metaattn.autodiff import FunctionKey, active_executor, recompute, use_executor


class Declining:
    """Runs nothing, and records the transform of each function that it is offered."""

    def __init__(self):
        self.structures, self.offered = {}, []

    def run(self, key, function, inputs):
        self.offered.append(key.key[-1] if isinstance(key.key, tuple) else key.key)


def in_thread(call):
    """Return what a call returns in another thread."""
    results = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    thread.join()
    return results[0]


def loss():
    x = torch.ones(3, requires_grad=True)
    return recompute(lambda x: x.sin().sum(), x, key=FunctionKey("sin", (), "sin"))


def test_blocks_nest_and_end():
    outer, inner = Declining(), Declining()
    with use_executor(outer):
        with use_executor(inner):
            assert active_executor() is inner
        with use_executor(None):
            assert active_executor(inner) is None
        assert active_executor(inner) is outer
    assert active_executor() is None
    assert active_executor(inner) is inner


def test_other_threads_do_not_see_it():
    with use_executor(Declining()):
        assert in_thread(active_executor) is None


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_backward_pass_uses_the_executor_of_its_call(elsewhere):
    """The autograd engine runs backward passes on a GPU in threads that are in no block."""
    executor = Declining()
    with use_executor(executor):
        value = loss()
        before = len(executor.offered)
        if not elsewhere:
            value.backward()
    if elsewhere:
        in_thread(value.backward)
    assert before == 1
    assert len(executor.offered) == 2


def test_two_threads_at_once():
    """Each offers its functions to its own executor, though their blocks overlap."""
    barrier, executors = threading.Barrier(2, timeout=60), [Declining(), Declining()]

    def work(executor):
        with use_executor(executor):
            barrier.wait()
            for _ in range(5):
                loss().backward()
            barrier.wait()

    threads = [threading.Thread(target=work, args=(e,)) for e in executors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(e.offered) for e in executors] == [10, 10]
