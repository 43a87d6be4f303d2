"""Launch sequences of a whole layer: equal to plain PyTorch, and as many launches as promised."""

from dataclasses import replace

import pytest
import torch

from vat_fast.kernels import layers, static_model
from vat_fast.kernels.eight_bit import Quantized
from vat_fast.kernels.gemm import RowStats, launch_row_stats

EPS = 1e-6
HEADS = 2
D, HIDDEN = 144, 304


def parameters(qkv_rows: int, scale: bool, seed: int) -> layers.LayerParameters:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * scale

    def linear(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        return normal(rows, columns, scale=columns**-0.5), normal(rows, scale=0.2)

    def norm() -> tuple[torch.Tensor, torch.Tensor]:
        return 1 + normal(D, scale=0.2), normal(D, scale=0.2)

    return layers.LayerParameters(
        norm1=norm(),
        qkv=linear(qkv_rows, D),
        kv=linear(2 * D, D),
        proj=linear(D, D),
        norm2=norm(),
        fc1=linear(HIDDEN, D),
        fc2=linear(D, HIDDEN),
        scale1=normal(D) if scale else None,
        scale2=normal(D) if scale else None,
    )


def cast(layer: layers.LayerParameters, dtype: torch.dtype) -> layers.LayerParameters:
    def to(value):
        if isinstance(value, tuple):
            return tuple(tensor.to(dtype) for tensor in value)
        return value.to(dtype) if isinstance(value, torch.Tensor) else value

    return layers.LayerParameters(**{name: to(value) for name, value in vars(layer).items()})


def poison(buffers: layers.StreamBuffers) -> None:
    """NaN everywhere that a launch must write before another reads."""
    written = [buffers.projected, buffers.attended, buffers.x_stats.values, buffers.split.partials]
    for eight in (buffers.hidden, buffers.x_eight, buffers.read_eight):
        if isinstance(eight, Quantized):
            eight.values.fill_(-128)
        written += [] if eight is None else [getattr(eight, "scales", eight)]
    for tensor in (*written, buffers.read_stats.values):
        tensor.fill_(float("nan"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_two_vision_layers_equal_the_reference(dtype, trace, assert_error_at_most_2x_eager):
    batch, views, tokens = 1, 2, 21
    trained = [parameters(3 * D, scale=True, seed=seed) for seed in (0, 1)]
    weights = [layers.LayerWeights.fold(layer, dtype) for layer in trained]
    x = (torch.randn(batch, views, tokens, D, generator=torch.Generator().manual_seed(2)) + 0.3).to(dtype)
    buffers = layers.vision_buffers(batch, views, tokens, weights[0], HEADS, EPS)
    poison(buffers)
    buffers.x.copy_(x.flatten(0, 1))
    stats = RowStats(torch.full((2, 1, batch * views * tokens), float("nan")), D)
    launch_row_stats(buffers.x.view(-1, D), stats)

    with trace({"x": buffers.x, "projected": buffers.projected}, outputs=("projected",)) as report:
        layers.vision_layer(buffers, weights[0], stats)
    report.check()
    assert len(report.launches) == layers.VISION_LAUNCHES == 5, report.launches
    keys_values = [buffers.keys_values.clone()]
    layers.vision_layer(buffers, weights[1])
    keys_values.append(buffers.keys_values)

    results = {}
    for name, wide in (("eager", dtype), ("truth", torch.float64)):
        tokens_out, outputs = x.to(wide), []
        for layer in trained:
            tokens_out, kv = layers.vision_layer_ref(tokens_out, cast(layer, wide), HEADS, EPS)
            outputs.append(kv)
        results[name] = [*outputs, tokens_out.flatten(0, 1)]
    for actual, eager, truth in zip([*keys_values, buffers.x], results["eager"], results["truth"], strict=True):
        assert_error_at_most_2x_eager(actual, eager, truth)


def test_last_vision_layer_is_one_launch_of_keys_and_values(trace):
    weights = layers.LayerWeights.fold(parameters(3 * D, scale=False, seed=3), torch.float32)
    buffers = layers.vision_buffers(1, 1, 19, weights, HEADS, EPS)
    poison(buffers)
    buffers.x.normal_()
    stats = RowStats(torch.empty(2, 1, 19), D)
    launch_row_stats(buffers.x.view(-1, D), stats)
    with trace({"x": buffers.x}) as report:
        layers.vision_keys_values(buffers, weights, stats)
    assert len(report.launches) == 1
    assert buffers.projected[..., : 3 * D].isnan().all(), "queries of a dead layer were computed"
    alone = buffers.keys_values.clone()
    layers.vision_layer(buffers, weights, stats)
    # Not bit for bit: in the interpreter NumPy multiplies, whose sums depend on the shape of the whole product.
    torch.testing.assert_close(alone, buffers.keys_values, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize(("batch", "num_extra"), [(1, 0), (2, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_two_action_layers_equal_the_reference(dtype, batch, num_extra, trace, assert_error_at_most_2x_eager):
    tokens, num_keys = 14, 41
    generator = torch.Generator().manual_seed(4)
    trained = [parameters(D, scale=True, seed=seed) for seed in (5, 6)]
    weights = [layers.LayerWeights.fold(layer, dtype) for layer in trained]
    x = torch.randn(batch, tokens + num_extra, D, generator=generator).to(dtype)
    film = torch.randn(2, 2, 5, D, generator=generator) * 0.5  # layer, gamma or beta, task
    task_id = torch.tensor([3, 1])[:batch]
    wide_kv = torch.randn(2, batch, num_keys, 5 * D, generator=generator).to(dtype)
    keys_values = wide_kv[..., 3 * D :]  # strided, as the vision stream leaves them

    buffers = layers.action_buffers(batch, tokens, num_extra, num_keys, weights[0], HEADS, EPS)
    poison(buffers)
    buffers.read.fill_(float("nan"))
    buffers.x.copy_(x)
    with trace({"x": buffers.x}) as start:
        layers.start_action(buffers, *film[0], torch.ones(D), torch.zeros(D), task_id)
    assert len(start.launches) == 1
    with trace({"x": buffers.x, "attended": buffers.attended}, outputs=("attended",)) as report:
        layers.action_layer(buffers, weights[0], keys_values[0], *film[1], task_id, first=True)
    report.check()
    assert len(report.launches) == layers.ACTION_LAUNCHES == 5, report.launches
    with trace({"x": buffers.x}) as report:
        layers.action_layer(buffers, weights[1], keys_values[1])
    report.check()
    assert len(report.launches) == 5

    results = {}
    for name, wide in (("eager", dtype), ("truth", torch.float64)):
        out = x.to(wide)
        for layer, (gamma, beta), kv in zip(trained, film, keys_values, strict=True):
            gamma, beta = gamma[task_id].to(wide), beta[task_id].to(wide)
            out = layers.action_layer_ref(out, gamma, beta, kv.to(wide), cast(layer, wide), HEADS, num_extra, EPS)
        results[name] = out
    assert_error_at_most_2x_eager(buffers.x, results["eager"], results["truth"])


def test_streams_of_one_layer_write_different_buffers():
    """The two streams may run at the same time: nothing that one launch sequence writes belongs to the other."""
    vision = layers.LayerWeights.fold(parameters(3 * D, scale=False, seed=7), torch.bfloat16)
    action = layers.LayerWeights.fold(parameters(D, scale=False, seed=8), torch.bfloat16)
    one = layers.vision_buffers(1, 1, 16, vision, HEADS)
    two = layers.action_buffers(1, 14, 0, 16, action, HEADS)

    def storages(buffers: layers.StreamBuffers) -> set[int]:
        tensors = [value for value in vars(buffers).values() if isinstance(value, torch.Tensor)]
        tensors += [buffers.read_stats.values, buffers.x_stats.values, *vars(buffers.split).values()]
        return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}

    assert not storages(one) & storages(two)


def test_rejected_fusions_cost_more_than_a_launch():
    """The figures in the module's docstring, from the static model of an H100."""
    device = static_model.DEVICES["H100"]
    query = static_model.choose(56, 1152, 1152, 2, device)
    assert static_model.microseconds(56, 1152, 1152, query, 2, device)[0] == pytest.approx(2.6, abs=0.1)
    steps = 1152 // 64
    assert steps * static_model.LATENCY / 2 / device.clock / 1e3 == pytest.approx(3.4, abs=0.1)
    l2_bytes_per_us = device.l2 * device.multiprocessors * device.clock * 1e3
    assert 2 * 16 * 512 * 1152 * 4 / l2_bytes_per_us == pytest.approx(6.6, abs=0.1)


def test_quantising_for_the_output_projection_saves_no_more_than_it_costs():
    """The same for the layers in 8 bits."""
    device = static_model.DEVICES["H100"]

    def projection(M: int, element: int) -> float:
        blocks = static_model.choose(M, 1152, 1152, element, device)
        return static_model.microseconds(M, 1152, 1152, blocks, element, device)[0]

    assert projection(512, 2) - projection(512, 1) == pytest.approx(2.8, abs=0.1)
    assert projection(56, 2) - projection(56, 1) == pytest.approx(0.5, abs=0.1)
    fixed = (static_model.FIXED + static_model.LATENCY) / device.clock / 1e3
    assert fixed + 3 * 512 * 1152 / device.bandwidth / 1e3 == pytest.approx(1.5, abs=0.1)


# --- variants ----------------------------------------------------------------------------------------------------


def test_vat_small_with_tanh_gelu(assert_error_at_most_2x_eager):
    """An action stream half as wide: narrower keys and values behind q k v, the vision stream's softmax scale."""
    views, tokens, narrow, batch, dtype = 2, 18, D // 2, 2, torch.float32
    generator = torch.Generator().manual_seed(0)

    def linear(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(rows, columns, generator=generator) * columns**-0.5, torch.randn(rows, generator=generator)

    vision = replace(parameters(3 * D, scale=False, seed=1), kv=linear(2 * narrow, D), activation="gelu_tanh")
    norm = torch.ones(narrow), torch.zeros(narrow)
    action = layers.LayerParameters(
        norm, linear(narrow, narrow), None, linear(narrow, narrow), norm, linear(152, narrow), linear(narrow, 152)
    )
    weights = layers.LayerWeights.fold(vision, dtype)
    one = layers.vision_buffers(batch, views, tokens, weights, HEADS, EPS)
    x = torch.randn(one.x.shape, generator=generator)
    one.x.copy_(x)
    stats = RowStats(torch.empty(2, 1, batch * views * tokens), D)
    launch_row_stats(one.x.view(-1, D), stats)
    layers.vision_layer(one, weights, stats)
    assert one.keys_values.shape == (batch, views * tokens, 2 * narrow)
    scale = (D // HEADS) ** -0.5
    small = layers.LayerWeights.fold(action, dtype)
    two = layers.action_buffers(batch, 14, 0, views * tokens, small, HEADS, EPS, scale=scale, film="none")
    a = torch.randn(two.x.shape, generator=generator)
    two.x.copy_(a)
    layers.start_action(two, None, None, torch.ones(narrow), torch.zeros(narrow))
    layers.action_layer(two, small, one.keys_values, first=True)
    layers.action_layer(two, small, one.keys_values)  # reads x itself: no FiLM

    for wide in (torch.float32, torch.float64):
        out, kv = layers.vision_layer_ref(x.to(wide).unflatten(0, (batch, views)), cast(vision, wide), HEADS, EPS)
        stream = a.to(wide)
        for _ in range(2):
            stream = layers.action_layer_ref(stream, None, None, kv, cast(action, wide), HEADS, 0, EPS, scale)
        if wide == torch.float32:
            eager = out.flatten(0, 1), stream
    assert_error_at_most_2x_eager(one.x, eager[0], out.flatten(0, 1))
    assert_error_at_most_2x_eager(two.x, eager[1], stream)


def test_shared_weights_read_keys_and_values_of_the_vision_projection(assert_error_at_most_2x_eager):
    """VAT-ViT: one projection of 3D; the last view alone where asked for."""
    views, tokens, dtype = 3, 17, torch.float32
    layer = replace(parameters(3 * D, scale=True, seed=2), kv=None)
    weights = layers.LayerWeights.fold(layer, dtype)
    buffers = layers.vision_buffers(1, views, tokens, weights, HEADS, EPS)
    x = torch.randn(buffers.x.shape, generator=torch.Generator().manual_seed(3))
    buffers.x.copy_(x)
    stats = RowStats(torch.empty(2, 1, views * tokens), D)
    launch_row_stats(buffers.x.view(-1, D), stats)
    layers.vision_keys_values(buffers, weights, stats)
    alone = buffers.keys_values.clone()
    layers.vision_layer(buffers, weights, stats)
    # Not bit for bit: in the interpreter NumPy multiplies, whose sums depend on the shape of the whole product.
    torch.testing.assert_close(alone, buffers.keys_values, rtol=1e-5, atol=5e-6)
    out, kv = layers.vision_layer_ref(x.double()[None], cast(layer, torch.float64), HEADS, EPS)
    eager, _ = layers.vision_layer_ref(x[None], layer, HEADS, EPS)
    assert_error_at_most_2x_eager(buffers.x, eager[0], out[0])
    assert_error_at_most_2x_eager(buffers.keys_values[:, -tokens:], kv[:, -tokens:].float(), kv[:, -tokens:])
    # The action stream runs on the same weights.
    D3 = layer.qkv[0].shape[0]
    query, key_value = (tuple(part[rows] for part in layer.qkv) for rows in (slice(0, D), slice(D, D3)))
    action = replace(layer, qkv=query, kv=key_value)
    small = layers.LayerWeights.fold(action, dtype)
    assert torch.equal(small.project.weight, weights.project.weight)


def test_last_layer_baseline_replaces_the_residual(assert_error_at_most_2x_eager):
    layer, dtype = parameters(D, scale=True, seed=4), torch.float32
    weights = layers.LayerWeights.fold(layer, dtype)
    generator = torch.Generator().manual_seed(5)
    buffers = layers.action_buffers(1, 14, 0, 41, weights, HEADS, EPS, film="residual")
    a, kv = torch.randn(1, 14, D, generator=generator), torch.randn(1, 41, 2 * D, generator=generator)
    gamma, beta = (torch.randn(1, D, generator=generator) * 0.5 for _ in range(2))
    buffers.x.copy_(a)  # after the first layer's FiLM
    layers.start_action(buffers, None, None, torch.ones(D), torch.zeros(D))
    layers.action_layer(buffers, weights, kv, gamma, beta, first=True)
    layers.action_layer(buffers, weights, kv)
    results = []
    for wide in (torch.float32, torch.float64):
        arguments = (None, None, kv.to(wide), cast(layer, wide), HEADS, 0, EPS)
        out = layers.action_layer_ref(a.to(wide), *arguments)
        out = out * (1 + gamma.to(wide)[:, None]) + beta.to(wide)[:, None]
        results.append(layers.action_layer_ref(out, *arguments))
    assert_error_at_most_2x_eager(buffers.x, *results)
