"""A recorded graph repeats what the function did, or recording it is an error."""

import math
import weakref

import pytest
import torch
from torch import fx, nn
from torch.func import grad, grad_and_value, jvp, vmap

import metaattn
from metaattn.compile.inductor import inductor_compiler
from metaattn.compile.piecewise import PiecewiseFunction, as_recorded
from metaattn.compile.recorder import Recording, UnrecordableError
from metaattn.meta import checkpoint
from tests.helpers import assert_close

X, Y = (torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(2))


def graph_of(function, *inputs):
    recording = Recording(function, inputs)
    return fx.GraphModule(nn.Module(), recording.graph), recording


def seen_by_a_view(x):
    y = x.exp()
    z = y.view(-1)
    y.mul_(2)
    return y, z.sin()


FUNCTIONS = {
    "value": lambda x: (x.sin() @ x.mT, x.sum()),
    "grad": lambda x: (grad(lambda x: x.square().tanh().sum())(x),),
    "backward": lambda x: torch.autograd.grad(x.requires_grad_().exp().sum(), x),
    "hvp under vmap": lambda x: (vmap(lambda x: jvp(grad(lambda x: x.sin().prod()), (x,), (x.cos(),))[1])(x),),
    "literal": lambda x: (x * torch.tensor([1.0, 2.0, 3.0, 4.0]),),
    "in place on its own": lambda x: (x.new_zeros(4).index_add_(0, torch.tensor([2]), x[:1, 0]).add_(1) * x,),
    "in place on what nothing else shows": lambda x: (x.exp().div_(x.exp().sum()).mul_(2),),
    "in place on what a view shows": seen_by_a_view,
    "the same result twice": lambda x: (x, x.sin(), x.sin()),
    "attention": lambda x: (grad(lambda x: metaattn.sdpa(x, x, x.cos()).sin().sum())(x),),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_does_the_same_on_other_numbers(name):
    f = FUNCTIONS[name]
    graph, recording = graph_of(f, X.clone())
    assert_close(graph(Y, *recording.captured), f(Y.clone()))
    piecewise = PiecewiseFunction(recording, as_recorded, {})
    assert_close(piecewise(Y, *recording.captured), f(Y.clone()))


def test_a_change_in_place_of_unshared_memory_does_not_prevent_the_split():
    def f(x):
        return (metaattn.sdpa(x, x, x).exp().div_(x.sum()) * metaattn.sdpa(x, x, x.sin()),)

    recording = Recording(f, (X,))
    assert recording.functional
    modules = []
    assert_close(PiecewiseFunction(recording, lambda m, inputs: modules.append(m) or as_recorded(m), {})(Y), f(Y))
    assert not [n for m in modules for n in m.graph.nodes if "metaattn" in str(n.target)]


def test_a_graph_with_changes_in_place_is_one_piece_though_it_begins_with_attention():
    def f(q, k, v):
        out = metaattn.sdpa(q, k, v)
        shown = out.flatten()
        out.mul_(2)
        return (shown.unsqueeze(0),)

    inputs = torch.randn(3, 2, 2, 5, 4, dtype=torch.float64).unbind()
    recording = Recording(f, inputs)
    assert not recording.functional
    assert_close(PiecewiseFunction(recording, as_recorded, {})(*inputs, *recording.captured), f(*inputs))


def test_recomputed_values_are_not_merged_with_the_originals():
    def exponentials(block):
        recording = Recording(lambda x: grad_and_value(lambda x: block(block(x)).sum())(x), (X,))
        return sum(str(n.target) == "aten.exp.default" for n in recording.graph.nodes)

    def block(x):
        return x.exp().square()

    assert exponentials(block) == 2
    assert exponentials(checkpoint(block)) == 4


def test_each_primitive_is_one_operation():
    targets = [str(n.target) for n in graph_of(FUNCTIONS["attention"], X)[0].graph.nodes]
    assert [t for t in targets if "metaattn" in t] == ["metaattn._forward.default", "metaattn._backward.default"]


def test_captured_tensors_become_inputs():
    w = torch.ones(4, dtype=torch.float64)
    _, recording = graph_of(lambda x: (x * w,), X)
    assert [t is w for t in recording.captured] == [True]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: (x * torch.rand(4),), "draws random numbers"),
        (lambda x: (metaattn.sdpa(x, x, x, dropout_p=0.5),), "draws random numbers"),
        (lambda x: (x if x.sum() > 0 else -x,), "depends on a tensor's numbers"),
        (lambda x: (x[x > 0],), "whose shape depends on numbers"),
        (lambda x: (x.view(-1).mul_(2),), "changes in place a tensor that it did not make"),
    ],
)
def test_an_operation_that_a_graph_could_not_repeat_is_an_error(function, reason):
    x, state = X.clone(), torch.get_rng_state()
    with pytest.raises(UnrecordableError, match=reason):
        Recording(function, (x,))
    assert torch.equal(x, X), "the error comes before the change"
    assert torch.equal(torch.get_rng_state(), state)


def test_equal_layers_are_compiled_once():
    def stack(x, layers):
        for _ in range(layers):
            x = x + metaattn.sdpa(x.tanh(), x, x)
        return (x.exp(),)

    counts = {}
    for layers in (3, 6):
        modules = []

        def compile_piece(module, inputs, modules=modules):
            modules.append(module)
            return as_recorded(module)

        f = PiecewiseFunction(Recording(lambda x, n=layers: stack(x, n), (X,)), compile_piece, {})
        assert_close(f(Y), stack(Y, layers))
        counts[layers] = len(modules)
    assert counts == {3: 3, 6: 3}  # before the first, between two, after the last


def pieces_of(f, x):
    """Return, for each piece of a function, its operations and the dtypes of its inputs."""
    recording = Recording(f, (x,))
    pieces = []

    def compile_piece(module, inputs):
        pieces.append(([str(n.target) for n in module.graph.nodes], [t.dtype for t in inputs]))
        return as_recorded(module)

    assert_close(PiecewiseFunction(recording, compile_piece, {})(x), f(x))
    return pieces


def test_cheap_values_are_recomputed_rather_than_stored():
    """A later piece computes them from ``x``, which it reads anyway; what is expensive to compute is stored for it."""

    def f(x):
        scaled, dear = (2 * x).cos(), x @ x.mT
        y = metaattn.sdpa(scaled, x, x)
        return (y * scaled * x * dear.sum(-1, keepdim=True),)

    targets = [operations for operations, _ in pieces_of(f, Y)]
    assert ["aten.cos.default" in t for t in targets] == [True, True]
    assert ["aten.mm.default" in t for t in targets] == [True, False]


def test_a_value_is_stored_if_recomputing_it_would_read_another():
    """Reading ``x`` to compute it again takes as long as reading the value."""

    def f(x):
        scaled = (2 * x).cos()
        return (metaattn.sdpa(scaled, x, x) * scaled,)

    assert ["aten.cos.default" in operations for operations, _ in pieces_of(f, Y)] == [True, False]


def test_a_smaller_value_is_stored_instead():
    """A token in 16 bits and its mean are stored in place of the deviation in 64 bits."""

    def f(x):
        token = (x @ x.mT @ x).half()
        deviation = token.double() - token.double().mean(-1, keepdim=True)
        y = metaattn.sdpa(deviation.square().sin(), x, x)
        return (y * deviation,)

    (before, _), (after, given) = pieces_of(f, Y)
    assert "aten.mean.dim" in before
    assert "aten.mean.dim" not in after
    assert "aten.sub.Tensor" in after
    assert sorted(map(str, given)) == ["torch.float16", "torch.float64", "torch.float64"]  # y and the mean


def test_recording_takes_no_memory():
    """Fake tensors hold no numbers: 128 tebibytes of them would not fit."""
    x = torch.ones(1).expand(2**45)
    recording = Recording(lambda x: ((x * 2).sin() + X.sum(),), (x,))
    assert [str(n.target) for n in recording.graph.nodes if n.op == "call_function"] == [
        "aten.mul.Tensor",
        "aten.sin.default",
        "aten.sum.default",
        "aten.add.Tensor",
    ]
    assert recording.outputs[0].shape == x.shape
    assert len(recording.captured) == 1
    assert recording.captured[0] is X


def test_what_a_part_took_last_is_freed_while_it_runs():
    """A piece may empty the list of its inputs: nothing else then holds what no later piece reads."""
    alive = []

    def compile_piece(module, inputs):
        def run(tensors):
            out = module(*tensors)
            made = [weakref.ref(t) for t in tensors if t.data_ptr() != Y.data_ptr()]
            tensors.clear()
            alive.append([t() is not None for t in made])
            return out

        return run

    f = PiecewiseFunction(
        Recording(lambda x: (metaattn.sdpa(x.sin(), x, x) * x.exp().sum(0) @ x.mT,), (X,)), compile_piece, {}
    )
    f(Y)
    assert alive == [[], [False]]  # the result of attention


def test_inductor_empties_the_list():
    """Tensors are then freed as soon as they were used."""
    given = [X.float(), X.float()]
    recording = Recording(lambda a, b: (a.sin() * b,), given)
    module = fx.GraphModule(nn.Module(), recording.graph)
    run = inductor_compiler({})(module, given)
    (out,) = run(given)
    assert given == []
    assert_close(out, X.sin() * X, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_inductor_keeps_the_dtype_of_a_scatter(dtype):
    """Otherwise a product with the result would have factors of two dtypes (PyTorch 2.11)."""

    def f(x, rows):
        return (torch.zeros_like(x).scatter(1, rows, 0.1) * x,)

    given = X.to(dtype), torch.tensor([[2], [0], [1]])
    (out,) = PiecewiseFunction(Recording(f, given), inductor_compiler({}), {})(*given)
    assert out.dtype == dtype
    assert_close(out, f(*given)[0], dtype)


def test_inductor_differentiates_a_cross_entropy():
    """Inductor's own kernel for a CPU ran the scatter before the zeros that it is put into (PyTorch 2.11)."""
    x, y = torch.cat([X, Y]).view(3, 4, 2), torch.arange(12).view(3, 4) % 2

    def f(x, y):
        return (vmap(grad(nn.functional.cross_entropy))(x, y),)

    run = PiecewiseFunction(Recording(f, [x, y]), inductor_compiler({}), {})
    for _ in range(3):
        junk = [torch.full_like(x, math.nan) for _ in range(100)]  # the memory that is next taken
        del junk
        assert_close(run(x, y)[0], f(x, y)[0])


@pytest.mark.parametrize("shape", [(12, 2), (3, 2, 2, 2)], ids=["rows", "images"])
@pytest.mark.parametrize("options", [{}, {"ignore_index": 1}, {"reduction": "sum"}, {"weight": True}], ids=str)
def test_a_cross_entropy_is_recorded_without_a_scatter(shape, options):
    """Outside of vmap, PyTorch's derivative is one operation, of which Inductor would make a scatter."""
    if "weight" in options:
        options = {"weight": torch.tensor([0.3, 0.7], dtype=torch.float64)}
    x, y = torch.cat([X, Y]).view(shape), (torch.arange(24).view(shape) % 2).select(1, 0)

    def f(x, y):
        return (grad(lambda x: nn.functional.cross_entropy(x, y, **options))(x),)

    graph, recording = graph_of(f, x, y)
    names = [str(n.target) for n in graph.graph.nodes]
    assert not [n for n in names if "scatter" in n or ("backward" in n and "nll" in n)]
    assert_close(graph(x.cos(), y, *recording.captured), f(x.cos(), y))


def test_a_scatter_in_place_is_recorded_as_a_choice():
    def f(x, rows):
        out = x.sin()
        out.scatter_(1, rows, 0.1)
        return (out * x,)

    graph, recording = graph_of(f, X, torch.tensor([[2], [0], [1]]))
    assert recording.functional
    assert not [n for n in graph.graph.nodes if "scatter" in str(n.target)]
    rows = torch.tensor([[1], [3], [0]])
    assert_close(graph(Y, rows), f(Y, rows))


def test_a_scatter_at_several_places_of_a_row():
    def f(x, places):
        return (torch.zeros_like(x).scatter(1, places, 1.0) * x,)

    given = X, torch.tensor([[2, 1], [0, 3], [1, 1]])
    assert_close(PiecewiseFunction(Recording(f, given), inductor_compiler({}), {})(*given)[0], f(*given)[0])
