"""Whole layers in 8 bits: the same launches, and no further from full precision than eager W8A8, outliers included."""

import pytest
import torch
import torch.nn.functional as F
from test_layers import EPS, HEADS, HIDDEN, D, cast, parameters, poison

from vat_fast.kernels import layers, low_precision
from vat_fast.kernels.eight_bit import quantize_ref, quantize_weight
from vat_fast.kernels.gemm import RowStats, launch_row_stats

DTYPES = [torch.int8, torch.float8_e4m3fn]
# Channels of the residual stream that are far larger than the rest, as in trained ViTs.
OUTLIERS = {3: 60.0, 77: -40.0}
ALLOWED = {torch.int8: 0.03, torch.float8_e4m3fn: 0.06}


def with_outliers(x: torch.Tensor) -> torch.Tensor:
    for channel, size in OUTLIERS.items():
        x[..., channel] *= size
    return x


def relative(x: torch.Tensor, truth: torch.Tensor) -> float:
    return ((x.double() - truth).norm() / truth.norm()).item()


def w8a8(x: torch.Tensor, linear: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Eager W8A8: one scale per token and per output channel."""
    rounded = quantize_ref(x.flatten(0, -2), dtype).dequantize(torch.float64).view(x.shape)
    weight, scale = quantize_weight(linear[0], dtype)
    return F.linear(rounded, weight.double() * scale.double()[:, None], linear[1].double())


def eager_mlp(x: torch.Tensor, layer: layers.LayerParameters, dtype: torch.dtype) -> torch.Tensor:
    hidden = F.gelu(w8a8(F.layer_norm(x, (D,), *(v.double() for v in layer.norm2), EPS), layer.fc1, dtype))
    return x + layer.scale2.double() * w8a8(hidden, layer.fc2, dtype)


def eager_vision(x: torch.Tensor, layer: layers.LayerParameters, dtype: torch.dtype) -> torch.Tensor:
    normed = F.layer_norm(x, (D,), *(v.double() for v in layer.norm1), EPS)
    attended = layers.vision_attention_ref(w8a8(normed, layer.qkv, dtype), HEADS, (D // HEADS) ** -0.5)
    x = x + layer.scale1.double() * F.linear(attended, *(v.double() for v in layer.proj))
    return eager_mlp(x, layer, dtype)


def test_vision_layers_with_outlier_channels_beat_eager_w8a8(dtype, trace):
    batch, views, tokens = 1, 2, 21
    trained = [parameters(3 * D, scale=True, seed=seed) for seed in (0, 1)]
    weights = [layers.LayerWeights.fold(layer, torch.bfloat16, dtype) for layer in trained]
    assert all(w.eight_bit == dtype and w.project.weight.dtype == dtype for w in weights)
    x = with_outliers(torch.randn(views, tokens, D, generator=torch.Generator().manual_seed(2)) + 0.3).bfloat16()

    buffers = layers.vision_buffers(batch, views, tokens, weights[0], HEADS, EPS)
    poison(buffers)
    buffers.x.copy_(x)
    stats = RowStats(torch.full((2, 1, views * tokens), float("nan")), D)
    launch_row_stats(buffers.x.view(-1, D), stats)
    with trace({"x": buffers.x}) as start:
        layers.start_8bit(buffers)
    assert len(start.launches) == 1
    with trace({"x": buffers.x, "projected": buffers.projected}, outputs=("projected",)) as report:
        layers.vision_layer(buffers, weights[0], stats)
    report.check()
    assert len(report.launches) == layers.VISION_LAUNCHES == 5, report.launches
    layers.vision_layer(buffers, weights[1])

    exact, eager = x.double()[None], x.double()
    for layer in trained:
        exact, keys_values = layers.vision_layer_ref(exact, cast(layer, torch.float64), HEADS, EPS)
        eager = eager_vision(eager, layer, dtype)
    error, eager_error = relative(buffers.x, exact[0]), relative(eager, exact[0])
    assert error <= eager_error, f"relative error {error:.2e}, eager W8A8 has {eager_error:.2e}"
    assert relative(buffers.keys_values, keys_values) < ALLOWED[dtype]
    # Of the residual stream's other channels too, which the outliers' own size would hide.
    others = [c for c in range(D) if c not in OUTLIERS]
    error, eager_error = (
        relative(buffers.x[..., others], exact[0][..., others]),
        relative(eager[..., others], exact[0][..., others]),
    )
    assert error <= eager_error, f"other channels: relative error {error:.2e}, eager W8A8 has {eager_error:.2e}"
    assert error < 2 * ALLOWED[dtype]


def test_action_layers_with_outlier_channels(dtype, trace):
    tokens, num_extra, num_keys, batch = 14, 1, 41, 2
    generator = torch.Generator().manual_seed(4)
    trained = [parameters(D, scale=True, seed=seed) for seed in (5, 6)]
    weights = [layers.LayerWeights.fold(layer, torch.bfloat16, dtype) for layer in trained]
    x = with_outliers(torch.randn(batch, tokens + num_extra, D, generator=generator)).bfloat16()
    film = torch.randn(2, 2, 5, D, generator=generator) * 0.5  # layer, gamma or beta, task
    task_id = torch.tensor([3, 1])
    keys_values = torch.randn(2, batch, num_keys, 5 * D, generator=generator).bfloat16()[..., 3 * D :]

    buffers = layers.action_buffers(batch, tokens, num_extra, num_keys, weights[0], HEADS, EPS)
    poison(buffers)
    buffers.read.fill_(float("nan"))
    buffers.x.copy_(x)
    with trace({"x": buffers.x}) as start:
        layers.start_action(buffers, *film[0], torch.ones(D), torch.zeros(D), task_id)
    assert len(start.launches) == 2
    with trace({"x": buffers.x}) as report:
        layers.action_layer(buffers, weights[0], keys_values[0], *film[1], task_id, first=True)
    report.check()
    assert len(report.launches) == layers.ACTION_LAUNCHES == 5, report.launches
    layers.action_layer(buffers, weights[1], keys_values[1])

    exact = x.double()
    for layer, (gamma, beta), kv in zip(trained, film, keys_values, strict=True):
        modulation = gamma[task_id].double(), beta[task_id].double()
        exact = layers.action_layer_ref(
            exact, *modulation, kv.double(), cast(layer, torch.float64), HEADS, num_extra, EPS
        )
    assert relative(buffers.x, exact) < ALLOWED[dtype]
    others = [c for c in range(D) if c not in OUTLIERS]
    assert relative(buffers.x[..., others], exact[..., others]) < 2 * ALLOWED[dtype]


def test_last_vision_layer_in_8_bits_is_one_launch(dtype):
    weights = layers.LayerWeights.fold(parameters(3 * D, scale=False, seed=3), torch.bfloat16, dtype)
    buffers = layers.vision_buffers(1, 1, 19, weights, HEADS, EPS)
    poison(buffers)
    buffers.x.copy_(torch.randn(buffers.x.shape, generator=torch.Generator().manual_seed(7)))
    stats = RowStats(torch.empty(2, 1, 19), D)
    launch_row_stats(buffers.x.view(-1, D), stats)
    layers.start_8bit(buffers)
    layers.vision_keys_values(buffers, weights, stats)
    assert buffers.projected[..., : 3 * D].isnan().all()
    alone = buffers.keys_values.clone()
    layers.vision_layer(buffers, weights, stats)
    torch.testing.assert_close(alone, buffers.keys_values, rtol=0, atol=0)


def test_folded_norm_of_an_8_bit_product_is_exact_given_its_operands(dtype, assert_error_at_most_2x_eager):
    M, N, K, group = 13, 80, 144, 64
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(M, K, generator=generator) + 0.5
    norm = 1 + 0.2 * torch.randn(K, generator=generator), 0.2 * torch.randn(K, generator=generator)
    linear = torch.randn(N, K, generator=generator) * K**-0.5, torch.randn(N, generator=generator)
    values, bias, row_sum, scale = low_precision.fold_layernorm_8bit(*linear, *norm, dtype)
    rounded = quantize_ref(x, dtype, group)
    stats = RowStats(torch.empty(2, 1, M), K)
    launch_row_stats(rounded.dequantize(), stats)
    out = torch.full((M, N), float("nan"))
    config = {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 32, "GROUP_M": 2, "SPLIT_K": 2, "num_warps": 4, "num_stages": 2}
    scratch = low_precision.Workspace.allocate(low_precision.Workspace.sizes(M, N, config), "cpu")
    low_precision.launch_quant_linear(
        rounded, values, scale, out, bias_N=bias, norm=stats, row_sum_N=row_sum, eps=EPS, config=config,
        workspace=scratch,
    )  # fmt: skip
    weight = values.double() * scale.double()[:, None]
    truth = F.linear(F.layer_norm(rounded.dequantize(torch.float64), (K,), eps=EPS), weight, bias.double())
    assert_error_at_most_2x_eager(out, truth.float(), truth)
    folded = linear[0].double() * norm[0].double()
    torch.testing.assert_close(row_sum.double(), weight.sum(1), rtol=1e-5, atol=1e-5)
    assert relative(weight, folded) < ALLOWED[dtype]


def test_8_bit_buffers_say_what_they_need():
    weights = layers.LayerWeights.fold(parameters(3 * D, scale=False, seed=3), torch.bfloat16, torch.int8)
    buffers = layers.vision_buffers(1, 1, 16, weights, HEADS, EPS)
    assert buffers.hidden.values.shape == (16, HIDDEN)
    assert buffers.hidden.group == buffers.configs["fc1"]["BLOCK_N"]
    assert buffers.x_eight.group == buffers.configs["proj"]["BLOCK_N"] == buffers.x_stats.width
    assert buffers.read_eight.group == buffers.configs["fc2"]["BLOCK_N"] == buffers.read_stats.width
    with pytest.raises(ValueError, match="film must be one of"):
        layers.action_buffers(1, 14, 0, 16, weights, HEADS, film="both")


def pytest_generate_tests(metafunc):
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", DTYPES, ids=["int8", "fp8"])
