"""8-bit linears: exact given their operands, and as close to full precision as 8 bits allow."""

import pytest
import torch
import torch.nn.functional as F

from vat_fast.kernels import low_precision as lp
from vat_fast.kernels.gemm import Film, RowStats, Workspace, fold_layernorm

DTYPES = [torch.int8, torch.float8_e4m3fn]
EPS = 1e-6


def config(m: int = 64, n: int = 64, k: int = 64, split: int = 1) -> dict[str, int]:
    return {
        "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": 2, "SPLIT_K": split, "num_warps": 4, "num_stages": 3,
    }  # fmt: skip


def normal(*shape: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale + shift


def unwritten(M: int, K: int, dtype: torch.dtype, group: int) -> lp.Quantized:
    values = (
        torch.full((M, K), -128).to(torch.int8) if dtype == torch.int8 else torch.full((M, K), float("nan")).to(dtype)
    )
    return lp.Quantized(values, torch.full((-(-K // group), M), float("nan")), group)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("M", "K"), [(1, 300), (57, 1152), (70, 96)])
def test_quantising_pass_equals_the_reference(M, K, norm, dtype, trace):
    x = normal(M, K, seed=0, scale=3.0, shift=0.5).to(torch.bfloat16)
    if M > 1:
        x[0] = 0  # a row of zeros still needs a finite scale
    out = unwritten(M, K, dtype, K)
    tensors = {"x": x, "values": out.values, "scales": out.scales}
    with trace(tensors, outputs=("values", "scales")) as report:
        lp.launch_quantize(x, out, norm=norm, eps=EPS)
    report.check()
    wide = F.layer_norm(x.double(), (K,), eps=EPS) if norm else x.double()
    reference = lp.quantize_ref(wide, dtype)
    torch.testing.assert_close(out.scales, reference.scales, rtol=1e-5, atol=0)
    # A value within a rounding of a tie may fall either way: one step of the 8-bit grid, rarely.
    error = (out.dequantize(torch.float64) - wide).abs().max()
    assert error <= 1.01 * (reference.dequantize(torch.float64) - wide).abs().max() + 1e-9
    assert (out.values.float() != reference.values.float()).float().mean() < 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("M", "N", "K", "split"), [(1, 269, 304, 1), (7, 100, 1152, 3), (57, 269, 304, 1), (70, 64, 96, 2)]
)
def test_product_of_quantised_operands(M, N, K, split, dtype, trace, assert_error_at_most_2x_eager):
    """Against fp64 of the same 8-bit operands; eager multiplies the dequantised operands in bf16."""
    x = lp.quantize_ref(normal(M, K, seed=0), dtype)
    weight, weight_scale = lp.quantize_weight(normal(N, K, seed=1, scale=K**-0.5), dtype)
    bias, scale, residual = normal(N, seed=2), normal(N, seed=3), normal(M, N, seed=4).to(torch.bfloat16)
    blocks = config(split=split)
    out = torch.full((M, N), float("nan"), dtype=torch.bfloat16)
    with trace({"x": x.values, "weight": weight, "out": out}, outputs=("out",)) as report:
        lp.launch_quant_linear(
            x, weight, weight_scale, out, bias_N=bias, activation="gelu", residual_MN=residual, layer_scale_N=scale,
            workspace=Workspace.allocate(Workspace.sizes(M, N, blocks), "cpu"), config=blocks,
        )  # fmt: skip
    report.check()
    arguments = (x, weight, weight_scale, bias, "gelu", residual, scale)
    eager = lp.quant_linear_ref(*arguments, dtype=torch.bfloat16)
    assert_error_at_most_2x_eager(out, eager, lp.quant_linear_ref(*arguments, dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_mlp_quantised_in_the_epilogue(dtype, assert_error_at_most_2x_eager):
    """norm + quantise, fc1 + GELU + quantise, fc2 + residual: three launches, no full-precision tensor between."""
    M, D, hidden, group = 57, 96, 269, 64
    x = normal(M, D, seed=0, shift=0.3).to(torch.bfloat16)
    norm = normal(D, seed=1, scale=0.2, shift=1.0), normal(D, seed=2, scale=0.2)
    fc1, fc1_bias = normal(hidden, D, seed=3, scale=D**-0.5), normal(hidden, seed=4)
    fc2, fc2_bias = normal(D, hidden, seed=5, scale=hidden**-0.5), normal(D, seed=6)
    folded, folded_bias, _ = fold_layernorm(fc1, fc1_bias, *norm, torch.float32)
    fc1_q, fc2_q = lp.quantize_weight(folded, dtype), lp.quantize_weight(fc2, dtype)

    normed = unwritten(M, D, dtype, D)
    lp.launch_quantize(x, normed, norm=True, eps=EPS)
    middle = unwritten(M, hidden, dtype, group)
    lp.launch_quant_linear(
        normed, *fc1_q, None, eight_out=middle, bias_N=folded_bias, activation="gelu", config=config(n=group)
    )
    out = torch.full((M, D), float("nan"), dtype=torch.bfloat16)
    lp.launch_quant_linear(middle, *fc2_q, out, bias_N=fc2_bias, residual_MN=x, config=config(k=32))

    def emulated(wide: torch.dtype) -> torch.Tensor:
        quantised = lp.quantize_ref(F.layer_norm(x.double(), (D,), eps=EPS), dtype)
        h = lp.quant_linear_ref(quantised, *fc1_q, folded_bias, "gelu", dtype=wide)
        return lp.quant_linear_ref(lp.quantize_ref(h, dtype, group), *fc2_q, fc2_bias, residual=x, dtype=wide)

    exact = x.double() + F.linear(
        F.gelu(
            F.linear(F.layer_norm(x.double(), (D,), *(v.double() for v in norm), EPS), fc1.double(), fc1_bias.double())
        ),
        fc2.double(),
        fc2_bias.double(),
    )
    # The error of the whole MLP against full precision is that of quantisation, not of the kernels.
    assert_error_at_most_2x_eager(out, emulated(torch.bfloat16), exact)
    allowed = {torch.int8: 0.02, torch.float8_e4m3fn: 0.06}[dtype]
    assert (out - exact).norm() / exact.norm() < allowed


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_activation_groups(group, dtype, assert_error_at_most_2x_eager):
    x = lp.quantize_ref(normal(33, 269, seed=0) * torch.linspace(0.1, 10, 269), dtype, group)
    weight, weight_scale = lp.quantize_weight(normal(48, 269, seed=1), dtype)
    out = torch.full((33, 48), float("nan"))
    lp.launch_quant_linear(x, weight, weight_scale, out, config=config(k=32))
    truth = lp.quant_linear_ref(x, weight, weight_scale, dtype=torch.float64)
    assert_error_at_most_2x_eager(out, lp.quant_linear_ref(x, weight, weight_scale), truth)


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_and_film_of_an_8_bit_product(dtype, assert_error_at_most_2x_eager):
    M, N, K = 12, 80, 64
    x = lp.quantize_ref(normal(M, K, seed=0), dtype)
    weight, weight_scale = lp.quantize_weight(normal(N, K, seed=1), dtype)
    gamma, beta = normal(3, N, seed=2), normal(3, N, seed=3)
    out, filmed = (torch.full((M, N), float("nan")) for _ in range(2))
    stats = RowStats(torch.full((2, 2, M), float("nan")), 64)
    lp.launch_quant_linear(
        x, weight, weight_scale, out, film=Film(gamma, beta, filmed, 4), stats_out=stats, config=config()
    )
    y = lp.quant_linear_ref(x, weight, weight_scale, dtype=torch.float64)
    modulated = y * (1 + gamma.double().repeat_interleave(4, 0)) + beta.double().repeat_interleave(4, 0)
    torch.testing.assert_close(out.double(), y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(filmed.double(), modulated, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats.values[0, 0].double(), modulated[:, :64].mean(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        stats.values[1, 1].double(), modulated[:, 64:].var(1, correction=0) * 16, rtol=1e-4, atol=1e-4
    )


def test_weight_scales_are_per_channel():
    weight = normal(6, 64, seed=0) * torch.tensor([1e-3, 1e-2, 0.1, 1, 10, 100])[:, None]
    for dtype, step in ((torch.int8, 1 / 127), (torch.float8_e4m3fn, 1 / 16)):
        values, scales = lp.quantize_weight(weight, dtype)
        assert values.shape == (6, 64)
        error = (values.float() * scales[:, None] - weight).abs().amax(1) / weight.abs().amax(1)
        assert (error <= step).all()


def test_bad_input_is_named():
    x = lp.quantize_ref(normal(8, 64, seed=0), torch.int8)
    weight, scale = lp.quantize_weight(normal(16, 64, seed=1), torch.int8)
    out = torch.zeros(8, 16)
    with pytest.raises(ValueError, match=r"needs a weight \(N, 64\) of the same dtype"):
        lp.launch_quant_linear(x, weight.to(torch.float8_e4m3fn), scale, out, config=config())
    with pytest.raises(ValueError, match="weight scales must be"):
        lp.launch_quant_linear(x, weight, scale.half(), out, config=config())
    with pytest.raises(ValueError, match="activation must be one of"):
        lp.launch_quant_linear(x, weight, scale, out, activation="silu", config=config())
    with pytest.raises(ValueError, match=r"scales \(1, 8\)"):
        lp.launch_quant_linear(lp.Quantized(x.values, x.scales[:, :7], 64), weight, scale, out, config=config())
    with pytest.raises(ValueError, match="BLOCK_K that divides"):
        lp.launch_quant_linear(
            lp.quantize_ref(normal(8, 64, seed=0), torch.int8, 32), weight, scale, out, config=config()
        )
    with pytest.raises(ValueError, match=r"out must be \(8, 16\)"):
        lp.launch_quant_linear(x, weight, scale, torch.zeros(8, 15), config=config())
    eight = unwritten(8, 16, torch.int8, 16)
    with pytest.raises(ValueError, match="in groups of BLOCK_N=64"):
        lp.launch_quant_linear(x, weight, scale, None, eight_out=eight, config=config())
    with pytest.raises(ValueError, match="something to write"):
        lp.launch_quant_linear(x, weight, scale, None, config=config())
    with pytest.raises(ValueError, match="all 64 columns in one group"):
        lp.launch_quantize(normal(8, 64, seed=0), unwritten(8, 64, torch.int8, 32), norm=True)
    with pytest.raises(ValueError, match=r"torch\.int8 or torch\.float8_e4m3fn"):
        lp.quantize_weight(normal(8, 64, seed=0), torch.int32)


def test_custom_op_passes_opcheck_and_compiles():
    x = normal(2, 5, 64, seed=0)
    weight, scale = lp.quantize_weight(normal(24, 64, seed=1), torch.int8)
    arguments = (x, weight, scale, normal(24, seed=2), True, EPS, "gelu")
    torch.library.opcheck(torch.ops.vat_fast.quant_linear, arguments)
    eager = lp.quant_linear(*arguments)

    def doubled(*arguments):
        return lp.quant_linear(*arguments) * 2

    torch.testing.assert_close(torch.compile(doubled, fullgraph=True, backend="aot_eager")(*arguments), eager * 2)
    torch.testing.assert_close(lp.quant_linear._init_fn(*arguments), eager, rtol=1e-2, atol=1e-2)
