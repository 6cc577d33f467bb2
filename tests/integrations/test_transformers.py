"""Models of Transformers on ``metaattn.sdpa``: values of their own eager attention, masks, and rejected models."""

import doctest
import re
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from metaattn.integrations import _transformers_layers  # noqa: E402
from metaattn.integrations import transformers as integration  # noqa: E402
from tests.helpers import assert_close, dense, python_blocks  # noqa: E402
from tests.integrations.transformers_models import DECODERS, IDS, LEFT, MASKS, ONES, build, logits  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
PAGE = Path(__file__).parents[2] / "docs" / "integrations" / "transformers.md"


@pytest.fixture(autouse=True)
def _registered(exact_eager):
    integration.register()


@pytest.fixture
def calls(monkeypatch):
    """Masks, windows and key heads of the calls of the operator, in order."""
    seen, sdpa = [], integration.sdpa

    def spy(query, key, value, attn_mask, *args, **kwargs):
        seen.append((attn_mask, kwargs["window"], key.shape[1]))
        return sdpa(query, key, value, attn_mask, *args, **kwargs)

    monkeypatch.setattr(integration, "sdpa", spy)
    return seen


def _has_interface(name):
    """Return whether a model uses the attention interface in this release: T5 and ModernBERT do since some 5.x."""
    model = build(name, "eager")
    return "ALL_ATTENTION_FUNCTIONS" in vars(sys.modules[type(model).__module__])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", [*DECODERS, "bert", "modernbert", "t5"])
def test_logits_are_those_of_eager(name, mask, calls):
    if not _has_interface(name):
        pytest.skip("does not use the attention interface in this release")
    got, want = (logits(build(name, i), attention_mask=MASKS[mask]) for i in ("metaattn", "eager"))
    assert calls
    shown = torch.ones(got.shape[:2], dtype=torch.bool)
    if name != "t5":  # its logits are those of the decoder, which has no padding
        shown = (ONES if MASKS[mask] is None else MASKS[mask]).bool()
    assert_close(got[shown], want[shown])


def test_vit():
    assert_close(*(logits(build("vit", i)) for i in ("metaattn", "eager")))


def test_keys_are_not_repeated(calls):
    logits(build("llama"))
    assert [heads for _, _, heads in calls] == [2, 2]


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_generate_is_that_of_eager(name, cache):
    """Greedy generation from left-padded prompts, beyond the length of window and chunk."""
    options = {"attention_mask": LEFT, "max_new_tokens": 6, "do_sample": False, "disable_compile": True}
    options |= {} if cache is None else {"cache_implementation": cache}
    if cache is None:
        options |= {"output_logits": True, "return_dict_in_generate": True}
        got, want = (build(name, i).generate(IDS, **options) for i in ("metaattn", "eager"))
        assert torch.equal(got.sequences, want.sequences)
        assert_close(got.logits, want.logits)
    else:
        assert torch.equal(*(build(name, i).generate(IDS, **options) for i in ("metaattn", "eager")))


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", DECODERS)
def test_a_prompt_in_two_parts(name, padding):
    """With several queries on a filled cache, rows are aligned to the tokens seen, not to the top left."""
    model, mask = build(name), MASKS[padding]
    whole = logits(model, attention_mask=mask)
    first = model(IDS[:, :6], attention_mask=None if mask is None else mask[:, :6], use_cache=True)
    second = model(IDS[:, 6:], attention_mask=mask, past_key_values=first.past_key_values, use_cache=True)
    assert_close(second.logits, whole[:, 6:])


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_packed_sequences(name):
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])
    model = build(name)
    packed = logits(model, ids=IDS[:1], position_ids=positions, use_cache=False)
    apart = [logits(model, ids=t) for t in IDS[:1].split((5, 4), 1)]
    assert_close(packed, torch.cat(apart, 1))


@pytest.mark.parametrize("additive", [False, True])
def test_a_custom_mask(additive):
    mask = torch.rand(3, 1, 9, 9) < 0.6
    mask |= torch.eye(9, dtype=torch.bool)
    numbers = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, float("-inf"))
    got = logits(build("llama"), attention_mask=numbers if additive else mask)
    assert_close(got, logits(build("llama", "eager"), attention_mask=numbers))


@pytest.mark.parametrize(("name", "limits"), [("mistral", (3, 0)), ("modernbert", (2, 2))])
def test_a_sliding_window_is_a_window(name, limits, calls, monkeypatch):
    """The operator gets the window, to skip hidden blocks, and it agrees with the mask."""
    if not _has_interface(name):
        pytest.skip("does not use the attention interface in this release")
    made, mask = [], integration.mask
    interface = transformers.AttentionMaskInterface._global_mapping
    monkeypatch.setitem(interface, "metaattn", lambda **kwargs: made.append(mask(**kwargs)) or made[-1])
    model = build(name)
    for padding in MASKS.values():
        made.clear()
        calls.clear()
        logits(model, attention_mask=padding)
        ((mask_of_layer, window),) = {(m, w) for m, w, _ in calls if w == limits}
        (local,) = (m for m in made if m is not None and hasattr(m, integration._WINDOW))
        assert window == limits
        if padding is None or padding.all():
            assert mask_of_layer is None
            i, j = torch.arange(9)[:, None], torch.arange(9)
            assert torch.equal(local, ((j >= i - limits[0]) & (j <= i + limits[1])).expand_as(local))
        else:
            assert mask_of_layer is local


def test_a_slice_of_a_window_is_only_a_mask(calls):
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    setattr(mask, integration._WINDOW, integration._Window((1, 0), True, mask._version))
    x = torch.randn(1, 1, 4, 2)
    for m in (mask, mask[:, :, :, :4]):
        integration.attention(torch.nn.Module(), x, x, x, m)
    assert [w for _, w, _ in calls] == [(1, 0), None]


def test_a_window_that_was_changed_is_only_a_mask(calls):
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    setattr(mask, integration._WINDOW, integration._Window((1, 0), True, mask._version))
    x = torch.randn(1, 1, 4, 2)
    with pytest.raises(ValueError, match="attn_mask"):  # the mask of 4 keys, for 3
        integration.attention(torch.nn.Module(), x, x[:, :, :3], x[:, :, :3], mask)
    mask[..., :2] = True
    out, _ = integration.attention(torch.nn.Module(), x, x, x, mask)
    assert calls[-1][:2] == (mask, None)
    assert_close(out.transpose(1, 2), torch.nn.functional.scaled_dot_product_attention(x, x, x, mask), torch.float32)


def test_chunks_are_no_window(calls):
    logits(build("llama4", sliding_window=4))
    assert {w for _, w, _ in calls} == {None, (None, 0)}


@pytest.mark.parametrize("mask", ["none", "bool", "additive"])
@pytest.mark.parametrize("causal", [True, False])
def test_bias_of_positions_with_every_mask(mask, causal):
    q, k, v, bias = (torch.randn(2, 3, 4, 5, dtype=torch.float64) for _ in range(4))
    bias = bias[:1, :, :, :4]
    shown = (torch.rand(2, 1, 4, 4) < 0.7) | torch.eye(4, dtype=torch.bool)
    masks = {"none": None, "bool": shown, "additive": torch.where(shown, 0.0, float("-inf")).double()}
    module = torch.nn.Module()
    module.is_causal = causal
    out, weights = integration.attention(module, q, k, v, masks[mask], position_bias=bias)
    shown = {"none": torch.ones(4, 4).tril(0 if causal else 4).bool()}.get(mask, shown)
    want, _ = dense(q, k, v, bias + torch.where(shown, 0.0, float("-inf")))
    assert weights is None
    assert_close(out, want.transpose(1, 2))


def test_dropout_in_training_only():
    module, x = torch.nn.Module(), torch.randn(1, 2, 6, 4)
    run = lambda: integration.attention(module, x, x, x, None, dropout=0.5)[0]
    assert not torch.equal(run(), run())
    module.eval()
    assert torch.equal(run(), run())


def test_a_row_of_padding_is_zero_before_the_output_projection():
    x = torch.randn(1, 2, 3, 4)
    mask = torch.tensor([[[[False] * 3, [True] * 3, [True] * 3]]])
    out, _ = integration.attention(torch.nn.Module(), x, x, x, mask, s_aux=torch.zeros(2))
    assert (out[:, 0] == 0).all()
    assert (out[:, 1:] != 0).all()


def test_models_that_are_rejected():
    with pytest.raises(NotImplementedError, match=r"Gemma2Attention caps its scores .* attn_implementation='eager'"):
        logits(build("gemma2"))
    # It would add the boolean mask to its scores. T5 uses the interface since a release after 5.0, Bloom its masks.
    name, own = ("bloom", "BloomAttention") if _has_interface("t5") else ("t5", "T5Attention")
    with pytest.raises(NotImplementedError, match=rf"computes its attention itself \({own}.*'eager'"):
        logits(build(name))


@pytest.mark.parametrize("name", ["llama", "mistral", "bert", "gpt2", "vit"])
def test_weights_are_not_returned(name):
    model = build(name)
    inputs = {"pixel_values": torch.randn(1, 3, 6, 6).double()} if name == "vit" else {"input_ids": IDS}
    if "transformers.utils.output_capturing" in sys.modules or name in ("llama", "mistral", "bert"):
        with pytest.raises(ValueError, match="output_attentions=True requests them; drop it"):
            model(**inputs, output_attentions=True)
    else:  # the first releases of version 5 do not pass the option to these layers, which return nothing
        weights = model(**inputs, output_attentions=True).attentions
        assert not any(isinstance(w, torch.Tensor) for w in weights or ())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"softcap": 30.0}, "Module caps its scores"),
        ({"head_mask": torch.ones(2)}, "masks whole heads"),
        ({"indices": torch.ones(1, 3, 2, dtype=torch.int32)}, r"selected keys only \(indices\)"),
        ({"cache": object()}, "paged cache"),
        ({"cu_seq_lens_q": torch.tensor([0, 2, 3])}, "pass position_ids that start at 0"),
        ({"slopes": torch.ones(2)}, r"passes slopes, of shape \[2\], to its attention"),
        ({"relative": torch.zeros(1, 2, 3, 3)}, r"passes relative, of shape \[1, 2, 3, 3\]"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_unsupported_changes_of_the_scores_are_rejected(arguments, message):
    x = torch.randn(1, 2, 3, 4)
    with pytest.raises(NotImplementedError, match=message):
        integration.attention(torch.nn.Module(), x, x, x, None, **arguments)


def test_a_scale_that_only_eager_attention_gets():
    module, x = torch.nn.Module(), torch.randn(1, 2, 3, 4)
    module.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(NotImplementedError, match="by a rule that it passes to eager attention only"):
        integration.attention(module, x, x, x, None)
    integration.attention(module, x, x, x, None, scaling=0.1)


def _argument_list(text, opening):
    """Find each ``opening``, which ends with a bracket, and yield the text up to the closing bracket."""
    for start in re.finditer(re.escape(opening), text):
        depth = 1
        for end in range(start.end(), len(text)):
            depth += (text[end] in "([{") - (text[end] in ")]}")
            if depth == 0:
                yield text[start.end() : end]
                break


def test_every_argument_of_attention_in_this_release_is_handled():
    """A new argument must be supported or rejected before a release counts as tested."""
    tensors = {"query", "key", "value", "query_states", "key_states", "value_states", "attention_mask"}
    supported = {"module", "scaling", "dropout", "is_causal", "position_bias", "s_aux", "kwargs"} | tensors
    in_the_mask = {"sliding_window", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q"}
    harmless = {"max_length_k", "output_attentions", "deterministic"}
    handled = supported | in_the_mask | harmless | set(integration._UNSUPPORTED)
    of_modules = {"training", "num_key_value_groups", "head_dim", "sinks"}  # sinks come as s_aux
    of_gpt2 = {"scale_attn_weights", "scale_attn_by_inverse_layer_idx"}
    of_gpt2 |= {"is_cross_attention", "attn_dropout", "bias", "layer_idx"}
    files = sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py"))
    texts = {f.stem: t for f in files if "ALL_ATTENTION_FUNCTIONS" in (t := f.read_text())}
    assert len(texts) > 150
    for name, text in texts.items():
        for signature in _argument_list(text, "def eager_attention_forward("):
            words = set(re.findall(r"^\W*(\w+)(?=[:,=]|$)", re.sub(r"\[[^]]*\]", "", signature), re.MULTILINE))
            assert words <= handled, (name, words - handled)
        for call in _argument_list(text, "= attention_interface("):
            words = set(re.findall(r"(?:^|,)\s*(\w+)=", call))
            assert words <= handled, (name, words - handled)
        for body in re.findall(r"^def eager_attention_forward\(.*?^(?=\S)(?!\))", text, re.MULTILINE | re.DOTALL):
            words = set(re.findall(r"\bmodule\.(\w+)", body))
            assert words <= of_modules | of_gpt2, (name, words - of_modules - of_gpt2)


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'-c requirements-integrations.txt -e "\.\[transformers\]"'):
        integration.register()


@pytest.mark.parametrize("module", [integration, _transformers_layers], ids=lambda m: m.__name__)
def test_examples(module):
    tried = doctest.testmod(module)
    assert tried.attempted > 0
    assert tried.failed == 0


def test_the_page_runs_as_printed():
    blocks = python_blocks(PAGE)
    assert len(blocks) == 4
    assert len(blocks[0].splitlines()) <= 16  # "in five minutes"
    session = {}
    for block in blocks:
        exec(block, session)
    assert session["product"].keys() == session["params"].keys()
    assert [g.shape[0] for pair in session["products"].values() for g in pair] == [8] * 8
    assert session["losses"].shape == (4,)
    assert all(c.isfinite().all() and c.shape[0] == 2 for c in session["curvatures"].values())
