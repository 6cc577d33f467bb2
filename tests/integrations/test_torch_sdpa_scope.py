"""Scope of replace_sdpa: blocks, threads, decorated functions, the process; and that everything is restored."""

import threading

import pytest
import torch
from torch.func import grad, jvp
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention as imported_before

import metaattn
from tests.helpers import assert_close, dense
from tests.integrations.models import F64, encoder

X, T = (torch.randn(2, 4, 5, 8, generator=torch.Generator().manual_seed(i), **F64) for i in range(2))


def _call(x):
    return F.scaled_dot_product_attention(x, x, x)


def _dense(x):
    return dense(x, x, x)[0]


def _hvp(f):
    return jvp(grad(lambda x: f(x).sin().sum()), (X,), (T,))[1]


class TestBlocks:
    def test_the_innermost_names_the_backend(self, used):
        with metaattn.replace_sdpa(backend="reference"):
            F.scaled_dot_product_attention(X, X, X)
            with metaattn.replace_sdpa(backend="blockwise"):
                F.scaled_dot_product_attention(X, X, X)
            F.scaled_dot_product_attention(X, X, X)
            with metaattn.replace_sdpa(), metaattn.use_backend("blockwise"):
                F.scaled_dot_product_attention(X, X, X)
        assert used == ["reference", "blockwise", "reference", "blockwise"]

    def test_ended_by_an_exception(self, used, fast_paths):
        block = metaattn.replace_sdpa()
        with pytest.raises(ZeroDivisionError), block, block:
            1 / fast_paths()  # False
        F.scaled_dot_product_attention(X, X, X)
        assert not used

    def test_decorator(self, used):
        @metaattn.replace_sdpa(backend="reference")
        def power(x, n):
            """Docstring that the decorator keeps."""
            y = F.scaled_dot_product_attention(x, x, x)
            return y if n == 1 else power(y, n - 1)

        assert_close(power(X, 3), _dense(_dense(_dense(X))))
        assert used == ["reference"] * 3
        assert (power.__name__, power.__doc__) == ("power", "Docstring that the decorator keeps.")

    def test_are_of_their_thread(self, used):
        with metaattn.replace_sdpa():
            thread = threading.Thread(target=F.scaled_dot_product_attention, args=(X, X, X))
            thread.start()
            thread.join()
        assert not used

    def test_of_two_threads_may_overlap(self, fast_paths):
        """The switch of the fast paths belongs to the process; the last block to end restores it."""
        entered, leave = threading.Event(), threading.Event()

        def other():
            with metaattn.replace_sdpa():
                entered.set()
                leave.wait()

        thread = threading.Thread(target=other)
        with metaattn.replace_sdpa():
            thread.start()
            entered.wait()
        assert not fast_paths()
        leave.set()
        thread.join()

    def test_a_switch_that_was_off_stays_off(self, fast_paths):
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with metaattn.replace_sdpa():
                pass
            assert not fast_paths()
        finally:
            torch.backends.mha.set_fastpath_enabled(True)

    def test_with_another_mode(self, used):
        """A device block is a mode too, inside and outside of the block."""
        with torch.device("cpu"), metaattn.replace_sdpa(), torch.device("cpu"):
            assert_close(_hvp(_call), _hvp(_dense))
            encoder()(X[0])
        assert len(used) > 2

    def test_our_own_attention_inside(self):
        """metaattn.sdpa and its derivative rules run with the mode enabled, under transforms too."""
        model = metaattn.Transformer(dim=8, heads=2, depth=1, input="continuous", in_features=8).double()
        x = torch.randn(2, 5, 8, **F64)
        f = lambda x: model(x).sin().sum()
        want = jvp(grad(f), (x,), (x.cos(),))[1]
        with metaattn.replace_sdpa():
            assert torch.equal(jvp(grad(f), (x,), (x.cos(),))[1], want)


class TestInstall:
    @pytest.fixture(autouse=True)
    def _uninstalled(self, fast_paths):
        yield
        metaattn.replace_sdpa.uninstall()

    def test_all_threads_and_every_module(self, used):
        original = F.scaled_dot_product_attention
        metaattn.replace_sdpa.install(backend="reference")
        thread = threading.Thread(target=lambda: imported_before(X, X, X))
        thread.start()
        thread.join()
        assert_close(_hvp(_call), _hvp(_dense))
        model = encoder()
        with torch.no_grad():
            model.eval()(X[0])
        assert used == ["reference"] * 4
        metaattn.replace_sdpa.uninstall()
        assert (
            original is F.scaled_dot_product_attention is imported_before is torch._C._nn.scaled_dot_product_attention
        )
        model(X[0])
        assert len(used) == 4

    def test_again_and_never(self, used, fast_paths):
        metaattn.replace_sdpa.uninstall()
        metaattn.replace_sdpa.install(backend="reference")
        metaattn.replace_sdpa.install()
        F.scaled_dot_product_attention(X, X, X)
        assert used == ["auto"]
        metaattn.replace_sdpa.uninstall()
        assert fast_paths()

    def test_a_block_goes_first(self, used):
        metaattn.replace_sdpa.install(backend="reference")
        with metaattn.replace_sdpa(backend="blockwise"):
            F.scaled_dot_product_attention(X, X, X)
            encoder()(X[0])
        with torch.device("cpu"):
            F.scaled_dot_product_attention(X, X, X)
        assert used == ["blockwise"] * 3 + ["reference"]
