"""Launches as a CUDA graph needs them: they allocate nothing, create no tensor, ask no value of the device, and leave
their scratch as they found it. Outputs may be views with strides."""

import contextlib

import pytest
import torch
from test_layers import EPS, HEADS, D, parameters
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime import interpreter

from vat_fast.kernels import gemm, layers, low_precision
from vat_fast.kernels.attention_forward import SplitWorkspace
from vat_fast.kernels.cross_attention import launch_cross_attention
from vat_fast.kernels.eight_bit import Quantized, quantize_ref, quantize_weight
from vat_fast.kernels.film_norm import launch_film_layernorm
from vat_fast.kernels.gemm import Film, RowStats, Workspace
from vat_fast.kernels.patch_embed import launch_patch_embed
from vat_fast.kernels.vision_attention import launch_vision_attention

# Operators that only look at memory in another way.
VIEWS = {
    "view", "slice", "select", "as_strided", "unsqueeze", "squeeze", "expand", "permute", "transpose", "t", "alias",
    "detach", "split", "split_with_sizes", "chunk", "_unsafe_view", "unbind",
}  # fmt: skip


class Watch(TorchDispatchMode):
    """Fails on every operator that is no view, and on views of another size than their base's memory."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.seen.append(name)
        out = func(*args, **(kwargs or {}))
        # view.dtype reinterprets; view, slice and their like share storage.
        assert name in VIEWS, f"a launch ran torch's {name}: it allocates or reads"
        return out


@pytest.fixture
def captured(monkeypatch):
    """captured(): a context that fails if launch code does what a CUDA graph cannot record. The interpreter itself, in
    place of the device, is not watched."""
    stock = interpreter.GridExecutor.__call__

    def call(self, *arguments, **keywords):
        with _disable_current_modes():
            return stock(self, *arguments, **keywords)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", call)

    @contextlib.contextmanager
    def watching():
        with Watch() as watch:
            yield watch

    return watching


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_the_watch_sees_what_a_graph_cannot_record(captured):
    x = torch.ones(4)
    for forbidden in (lambda: torch.empty(3), lambda: x + 1, lambda: x.sum().item(), lambda: torch.tensor([1.0])):
        with captured(), pytest.raises(AssertionError, match="a launch ran torch's"):
            forbidden()


@pytest.mark.parametrize("eight", [None, torch.int8], ids=["bf16", "int8"])
def test_layer_sequences_record_and_repeat(eight, captured):
    """Both streams: nothing allocated; a second run gives the same bits, so the counters were zero again."""
    views, tokens, action_tokens, extra = 2, 17, 14, 1
    vision = layers.LayerWeights.fold(parameters(3 * D, scale=True, seed=0), torch.bfloat16, eight)
    action = layers.LayerWeights.fold(parameters(D, scale=True, seed=1), torch.bfloat16, eight)
    one = layers.vision_buffers(1, views, tokens, vision, HEADS, EPS)
    two = layers.action_buffers(1, action_tokens, extra, views * tokens, action, HEADS, EPS)
    x, a = normal(*one.x.shape, seed=2, dtype=torch.bfloat16), normal(*two.x.shape, seed=3, dtype=torch.bfloat16)
    gamma, beta = normal(5, D, seed=4) * 0.3, normal(5, D, seed=5) * 0.3
    ones, zeros, task_id = torch.ones(D), torch.zeros(D), torch.tensor([2])
    stats = RowStats(torch.empty(2, 1, views * tokens), D)
    runs = []
    for _ in range(2):
        one.x.copy_(x)
        two.x.copy_(a)
        with captured() as watch:
            gemm.launch_row_stats(one.x.view(-1, D), stats)
            if eight is not None:
                layers.start_8bit(one)
            layers.vision_layer(one, vision, stats)
            layers.vision_keys_values(one, vision)
            layers.start_action(two, gamma, beta, ones, zeros, task_id)
            layers.action_layer(two, action, one.keys_values, gamma, beta, task_id, first=True)
            layers.action_layer(two, action, one.keys_values)
        assert watch.seen, "the watch saw no operator at all: it is not looking"
        assert not one.split.counters.any()
        assert not two.split.counters.any()
        assert two.attention_split is None or not two.attention_split.counters.any()
        runs.append((one.x.clone(), two.x.clone()))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)
        assert torch.isfinite(first).all()


def test_streams_share_no_scratch_and_alternate_layers_share_all_but_projected():
    weights = layers.LayerWeights.fold(parameters(3 * D, scale=False, seed=0), torch.bfloat16, torch.int8)
    action = layers.LayerWeights.fold(parameters(D, scale=False, seed=1), torch.bfloat16, torch.int8)
    one = layers.vision_buffers(1, 2, 256, weights, HEADS)
    other = layers.with_projected(one)
    two = layers.action_buffers(1, 56, 0, 512, action, HEADS)
    assert two.attention_split is not None, "these shapes split keys: the scratch must be looked at"

    def storages(value):
        if isinstance(value, torch.Tensor):
            return {value.untyped_storage().data_ptr()} if value.numel() else set()
        if isinstance(value, (layers.StreamBuffers, RowStats, Workspace, SplitWorkspace, Quantized)):
            return set().union(*(storages(part) for part in vars(value).values()))
        return set()

    assert not storages(one) & storages(two)
    assert storages(one) - storages(other) == storages(one.projected)
    assert storages(other) - storages(one) == storages(other.projected)
    assert other.keys_values.shape == one.keys_values.shape == (1, 512, 2 * D)


def strided(*shape, dtype=torch.float32):
    """A NaN-filled view whose rows have gaps, and the memory around it."""
    whole = torch.full((*shape[:-1], shape[-1] + 24), float("nan")).to(dtype)
    return whole[..., 8 : 8 + shape[-1]], whole


def check_gaps(view, whole):
    assert torch.isfinite(view.float()).all()
    width = view.shape[-1]
    assert whole[..., :8].float().isnan().all()
    assert whole[..., 8 + width :].float().isnan().all()


def test_every_launch_writes_into_strided_views(captured, trace):
    """Launch, strided and recorded; equal to the contiguous result; the gaps untouched."""
    M, N, K = 21, 80, 48
    x, weight = normal(M, K), normal(N, K, seed=1)
    gamma, beta = normal(3, N, seed=2), normal(3, N, seed=3)
    calls = {}

    def linear(out, film_out):
        gemm.launch_linear(x, weight, out, residual_MN=residual, film=Film(gamma, beta, film_out, 7))

    residual = normal(M, 2 * N, seed=4)[:, N:]
    calls["linear"] = ((M, N), (M, N)), linear
    eight = quantize_ref(x, torch.int8)
    weight_8, scale = quantize_weight(weight, torch.int8)
    calls["quant_linear"] = ((M, N),), lambda out: low_precision.launch_quant_linear(eight, weight_8, scale, out)
    qkv = normal(2, 19, 3 * D, seed=5)
    lse = torch.empty(2, HEADS, 19)
    calls["vision_attention"] = (
        ((2, 19, D),),
        lambda out: launch_vision_attention(qkv, HEADS, 0.1, out, lse),
    )
    keys = normal(2, 70, 5 * D, seed=6)[..., 3 * D :]
    query = normal(2, 14, 3 * D, seed=7)[..., :D]
    lse_14 = torch.empty(2, HEADS, 14)
    calls["cross_attention"] = (
        ((2, 14, D),),
        lambda out: launch_cross_attention(query, keys, HEADS, 0.1, out, lse_14),
    )
    tokens, ones, zeros = normal(2, 7, N, seed=8), torch.ones(N), torch.zeros(N)
    mean, rstd = torch.empty(2, 7), torch.empty(2, 7)
    calls["film_layernorm"] = (
        ((2, 7, N),),
        lambda out: launch_film_layernorm(tokens, gamma[:2], beta[:2], ones, zeros, EPS, None, out, mean, rstd),
    )
    images = torch.randint(0, 256, (1, 2, 12, 12, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    patches, table = normal(N, 48, seed=9) * 0.01, normal(9, N, seed=10)
    calls["patch_embed"] = (
        ((1, 2, 9, N),),
        lambda out: launch_patch_embed(images, patches, table, out, patch=4),
    )
    for name, (shapes, call) in calls.items():
        plain = [torch.full(shape, float("nan")) for shape in shapes]
        call(*plain)
        views, wholes = zip(*(strided(*shape) for shape in shapes), strict=True)
        with captured():
            call(*views)
        for view, whole, expected in zip(views, wholes, plain, strict=True):
            check_gaps(view, whole)
            assert torch.equal(view, expected), name


def test_8_bit_outputs_may_be_strided(captured):
    x = normal(21, 48, dtype=torch.bfloat16)
    whole = torch.full((21, 64), -128, dtype=torch.int8)
    out = Quantized(whole[:, 8:56], torch.empty(3, 40)[:, :21], 16)
    with captured():
        low_precision.launch_quantize(x, out, norm=False)
    expected = quantize_ref(x, torch.int8, 16)
    torch.testing.assert_close(out.dequantize(), expected.dequantize(), rtol=0, atol=0.05)
    assert (whole[:, :8] == -128).all()
    assert (whole[:, 56:] == -128).all()


def test_outputs_of_attention_that_do_not_fit_are_named():
    qkv, out, lse = normal(1, 16, 3 * D), torch.empty(1, 16, D), torch.empty(1, HEADS, 16)
    with pytest.raises(ValueError, match=r"out has shape \(1, 15, 144\), expected \(1, 16, 144\)"):
        launch_vision_attention(qkv, HEADS, 0.1, out[:, :15], lse)
    with pytest.raises(ValueError, match="lse has shape"):
        launch_vision_attention(qkv, HEADS, 0.1, out, lse[:, :1])
    with pytest.raises(ValueError, match="stride 2 along its last axis"):
        launch_vision_attention(qkv, HEADS, 0.1, torch.empty(1, 16, 2 * D)[..., ::2], lse)
