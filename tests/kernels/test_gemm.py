"""The inference GEMM against plain PyTorch in fp64: every epilogue, odd shapes, split K, strides, statistics."""

import pytest
import torch
import torch.nn.functional as F

from vat_fast.kernels import configs, gemm
from vat_fast.kernels.gemm import Film, LastRows, RowStats, Workspace

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
EPS = 1e-6


def config(m: int = 64, n: int = 64, k: int = 64, split: int = 1) -> dict[str, int]:
    return {
        "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": 2, "SPLIT_K": split, "num_warps": 4, "num_stages": 3,
    }  # fmt: skip


def normal(*shape: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale + shift


def empty_stats(rows: int, columns: int, width: int) -> RowStats:
    return RowStats(torch.full((2, gemm.stats_parts(columns, width), rows), float("nan")), width)


def workspace(M: int, N: int, blocks: dict[str, int]) -> Workspace:
    scratch = Workspace.allocate(Workspace.sizes(M, N, blocks), "cpu")
    scratch.partials.fill_(float("nan"))
    return scratch


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("M", "N", "K"), [(1, 269, 300), (7, 269, 1152), (56, 64, 300), (57, 269, 64), (70, 96, 300), (512, 96, 64)]
)
def test_linear_with_everything_at_odd_shapes(M, N, K, dtype, assert_error_at_most_2x_eager):
    x, weight = normal(M, K, seed=0).to(dtype), normal(N, K, seed=1, scale=K**-0.5).to(dtype)
    bias, scale = normal(N, seed=2).to(dtype), normal(N, seed=3).to(dtype)
    residual = normal(M, N, seed=4).to(dtype)
    out = torch.full((M, N), float("nan"), dtype=dtype)
    gemm.launch_linear(
        x, weight, out, bias_N=bias, activation="gelu", residual_MN=residual, layer_scale_N=scale, config=config()
    )
    arguments = (x, weight, bias, "gelu", residual, scale)
    truth = gemm.linear_ref(*(value.double() if isinstance(value, torch.Tensor) else value for value in arguments))
    assert_error_at_most_2x_eager(out, gemm.linear_ref(*arguments), truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize(("M", "N", "K"), [(1, 269, 300), (7, 96, 320), (8, 64, 192), (9, 40, 300)])
def test_rows_as_columns(M, N, K, split, dtype, assert_error_at_most_2x_eager):
    """Tiles of 8 rows, which no MMA has: the product is that of the transposes."""
    x, weight = normal(M, K, seed=0).to(dtype), normal(N, K, seed=1, scale=K**-0.5).to(dtype)
    residual, out = normal(M, N, seed=4).to(dtype), torch.full((M, N), float("nan"), dtype=dtype)
    blocks = config(m=8, split=split)
    stats = empty_stats(M, N, blocks["BLOCK_N"])
    gemm.launch_linear(
        x, weight, out, activation="relu", residual_MN=residual, stats_out=stats,
        workspace=workspace(M, N, blocks), config=blocks,
    )  # fmt: skip
    arguments = (x, weight, None, "relu", residual)
    truth = gemm.linear_ref(*(value.double() if isinstance(value, torch.Tensor) else value for value in arguments))
    assert_error_at_most_2x_eager(out, gemm.linear_ref(*arguments), truth)
    first = out[:, : blocks["BLOCK_N"]].float()
    torch.testing.assert_close(stats.values[0, 0], first.mean(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", [80, "gfx942"])
@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize(("samples", "tokens", "extra", "column"), [(1, 57, 1, 64), (3, 20, 2, 96), (9, 5, 1, 40)])
def test_columns_of_the_last_rows_alone(samples, tokens, extra, column, split, arch, assert_error_at_most_2x_eager):
    """Query of all tokens, keys and values of each sample's last ones: one launch, all else is left alone."""
    M, N, K = samples * tokens, column + 168, 200
    last = LastRows(extra, tokens, column)
    x, weight = normal(M, K, seed=0, shift=0.3).bfloat16(), normal(N, K, seed=1, scale=K**-0.5).bfloat16()
    bias, row_sum = normal(N, seed=2), weight.double().sum(1).float()
    stats = empty_stats(M, K, K)
    gemm.launch_row_stats(x, stats)
    out = torch.full((M, N), float("nan"), dtype=torch.bfloat16)
    blocks = config(split=split)
    with configs.override_arch(arch):
        scratch = Workspace.allocate(Workspace.sizes(M, N, blocks, last), "cpu")
        scratch.partials.fill_(float("nan"))
        gemm.launch_linear(
            x, weight, out, bias_N=bias, norm=stats, row_sum_N=row_sum, eps=EPS, last=last,
            workspace=scratch, config=blocks,
        )  # fmt: skip
    eager = gemm.norm_linear_ref(x, weight, bias.bfloat16(), EPS)
    truth = gemm.norm_linear_ref(x.double(), weight.double(), bias.double(), EPS)
    assert_error_at_most_2x_eager(out[:, :column], eager[:, :column], truth[:, :column])
    rows = torch.arange(M).view(samples, tokens)[:, -extra:].flatten()
    assert_error_at_most_2x_eager(out[rows, column:], eager[rows, column:], truth[rows, column:])
    others = torch.ones(M, dtype=torch.bool)
    others[rows] = False
    assert out[others, column:].isnan().all()
    assert not scratch.counters.any()


def test_last_rows_that_do_not_fit_are_refused():
    x, weight, out = torch.zeros(6, 16), torch.zeros(32, 16), torch.zeros(6, 32)
    with pytest.raises(ValueError, match=r"last rows of an \(6, 32\) result cannot be"):
        gemm.launch_linear(x, weight, out, last=LastRows(1, 4, 16), config=config())
    with pytest.raises(ValueError, match="go with a norm and a bias"):
        gemm.launch_linear(x, weight, out, last=LastRows(1, 3, 16), residual_MN=out, config=config())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "N", "K"), [(1, 40, 300), (56, 269, 1152), (70, 64, 144)])
def test_folded_norm(M, N, K, dtype, assert_error_at_most_2x_eager):
    x = normal(M, K, seed=0, scale=2.0, shift=0.7).to(dtype)
    weight, bias = normal(N, K, seed=1, scale=K**-0.5), normal(N, seed=2)
    norm_weight, norm_bias = normal(K, seed=3, scale=0.3, shift=1.0), normal(K, seed=4, scale=0.3)
    folded, folded_bias, row_sum = gemm.fold_layernorm(weight, bias, norm_weight, norm_bias, dtype)
    stats = empty_stats(M, K, K)
    gemm.launch_row_stats(x, stats)
    out = torch.full((M, N), float("nan"), dtype=dtype)
    gemm.launch_linear(
        x, folded, out, bias_N=folded_bias, norm=stats, row_sum_N=row_sum, eps=EPS, activation="gelu", config=config()
    )

    def reference(wide: torch.dtype) -> torch.Tensor:
        normed = F.layer_norm(x.to(wide), (K,), norm_weight.to(wide), norm_bias.to(wide), EPS)
        return gemm.linear_ref(normed, weight.to(wide), bias.to(wide), "gelu")

    assert_error_at_most_2x_eager(out, reference(dtype), reference(torch.float64))


def test_norm_survives_a_mean_much_larger_than_the_spread(assert_error_at_most_2x_eager):
    """Statistics of squared deviations, not of squares: no cancellation."""
    M, N, K = 16, 32, 256
    x, weight = normal(M, K, seed=0, shift=3000.0), normal(N, K, seed=1, scale=K**-0.5)
    widths = empty_stats(M, K, 64)
    identity = torch.eye(K)
    copied = torch.full((M, K), float("nan"))
    gemm.launch_linear(x, identity, copied, stats_out=widths, config=config())
    torch.testing.assert_close(copied, x, rtol=0, atol=0)
    out = torch.full((M, N), float("nan"))
    gemm.launch_linear(x, weight, out, norm=widths, row_sum_N=weight.double().sum(1).float(), config=config())
    truth = gemm.norm_linear_ref(x.double(), weight.double(), None)
    # Folding subtracts mean * row_sum from the product: in fp32 that costs mean / spread roundings.
    assert (out - truth).abs().max() < 3000 * 16 * torch.finfo(torch.float32).eps * truth.abs().max()
    mean, m2 = widths.values
    torch.testing.assert_close(mean.mean(0).double(), x.double().mean(1), rtol=1e-6, atol=0)
    assert (m2.sum(0) / K).mean() == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("split", [1, 3])
def test_statistics_and_film_feed_the_next_norm(split, dtype, assert_error_at_most_2x_eager):
    """fc2 with residual, then FiLM, then the next layer's norm and query: two launches."""
    batch, tokens, N, K = 3, 19, 200, 320
    M = batch * tokens
    x, weight = normal(M, K, seed=0).to(dtype), normal(N, K, seed=1, scale=K**-0.5).to(dtype)
    residual = normal(M, N, seed=2).to(dtype)
    gamma, beta = normal(5, N, seed=3), normal(5, N, seed=4)
    task_id = torch.tensor([4, 0, 2])
    query = normal(48, N, seed=5, scale=N**-0.5).to(dtype)
    blocks = config(split=split)
    out, filmed = (torch.full((M, N), float("nan"), dtype=dtype) for _ in range(2))
    stats = empty_stats(M, N, blocks["BLOCK_N"])
    gemm.launch_linear(
        x, weight, out, residual_MN=residual, film=Film(gamma, beta, filmed, tokens, task_id), stats_out=stats,
        workspace=workspace(M, N, blocks), config=blocks,
    )  # fmt: skip
    queries = torch.full((M, 48), float("nan"), dtype=dtype)
    gemm.launch_linear(
        filmed, query, queries, norm=stats, row_sum_N=query.double().sum(1).float(), eps=EPS, config=config()
    )

    def reference(wide: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        y = gemm.linear_ref(x.to(wide), weight.to(wide), residual=residual.to(wide))
        rows = task_id.repeat_interleave(tokens)
        modulated = y * (1 + gamma[rows].to(wide)) + beta[rows].to(wide)
        return y, gemm.norm_linear_ref(modulated, query.to(wide), None, EPS)

    for actual, eager, truth in zip((out, queries), reference(dtype), reference(torch.float64), strict=True):
        assert_error_at_most_2x_eager(actual, eager, truth)


@pytest.mark.parametrize(("M", "N", "K", "split"), [(1, 96, 1152, 6), (56, 96, 1152, 3), (57, 269, 300, 4)])
def test_split_k_is_exact_ordered_and_leaves_counters_zero(M, N, K, split, trace, assert_error_at_most_2x_eager):
    dtype = torch.bfloat16
    x, weight = normal(M, K, seed=0).to(dtype), normal(N, K, seed=1, scale=K**-0.5).to(dtype)
    blocks = config(split=split)
    scratch = workspace(M, N, blocks)
    results = []
    for _ in range(2):
        out = torch.full((M, N), float("nan"), dtype=dtype)
        with trace({"x": x, "weight": weight, "out": out}, outputs=("out",)) as report:
            gemm.launch_linear(x, weight, out, workspace=scratch, config=blocks)
        report.check()
        assert not scratch.counters.any()
        results.append(out)
    assert torch.equal(*results), "the second launch with the same scratch differs"
    truth = gemm.linear_ref(x.double(), weight.double())
    assert_error_at_most_2x_eager(results[0], gemm.linear_ref(x, weight), truth)


def test_in_place_residual():
    x, weight = normal(70, 96, seed=0), normal(96, 96, seed=1, scale=0.1)
    stream = normal(70, 96, seed=2)
    expected = stream + x @ weight.T
    gemm.launch_linear(x, weight, stream, residual_MN=stream, config=config())
    torch.testing.assert_close(stream, expected, rtol=1e-5, atol=1e-5)


def test_non_contiguous_operands(assert_error_at_most_2x_eager):
    """A column slice of a packed x, a transposed weight and a row-strided result."""
    dtype = torch.float16
    packed, weight = normal(57, 3 * 96, seed=0).to(dtype), normal(96, 40, seed=1, scale=0.1).to(dtype).t()
    x = packed[:, 96:192]
    wide = torch.full((57, 80), float("nan"), dtype=dtype)
    gemm.launch_linear(x, weight, wide[:, :40], config=config())
    assert wide[:, 40:].isnan().all()
    truth = gemm.linear_ref(x.double(), weight.double())
    assert_error_at_most_2x_eager(wide[:, :40], gemm.linear_ref(x, weight), truth)
    transposed = packed.t().contiguous().t()[:, 96:192]
    out = torch.full((57, 40), float("nan"), dtype=dtype)
    gemm.launch_linear(transposed, weight, out, config=config())
    torch.testing.assert_close(out, wide[:, :40], rtol=0, atol=0)


def test_production_widths_and_the_shipped_configuration(assert_error_at_most_2x_eager):
    """fc1 of so400m on the action stream: 56 rows, 4304 columns, K 1152, as shipped for three targets."""
    M, N, K = 56, 4304, 1152
    dtype = torch.bfloat16
    x, weight = normal(M, K, seed=0).to(dtype), normal(N, K, seed=1, scale=K**-0.5).to(dtype)
    bias = normal(N, seed=2)
    truth = gemm.linear_ref(x.double(), weight.double(), bias.double(), "gelu")
    eager = gemm.linear_ref(x, weight, bias.to(dtype), "gelu")
    for arch in (80, 90):
        blocks = gemm.linear_config(M, N, K, dtype, arch)
        out = torch.full((M, N), float("nan"), dtype=dtype)
        scratch = workspace(M, N, blocks)
        gemm.launch_linear(x, weight, out, bias_N=bias, activation="gelu", workspace=scratch, config=blocks)
        assert_error_at_most_2x_eager(out, eager, truth)


def test_bad_input_is_named():
    x, weight, out = torch.zeros(8, 32), torch.zeros(16, 32), torch.zeros(8, 16)
    launch = gemm.launch_linear
    with pytest.raises(ValueError, match=r"needs a weight \(N, 32\)"):
        launch(x, torch.zeros(16, 31), out)
    with pytest.raises(ValueError, match="same dtype"):
        launch(x, weight.half(), out)
    with pytest.raises(ValueError, match="activation must be one of"):
        launch(x, weight, out, activation="swish")
    with pytest.raises(ValueError, match=r"out must be \(8, 16\)"):
        launch(x, weight, torch.zeros(8, 17))
    with pytest.raises(ValueError, match="last stride 1"):
        launch(x, weight, torch.zeros(16, 8).t())
    with pytest.raises(ValueError, match=r"bias must be a contiguous \(16,\)"):
        launch(x, weight, out, bias_N=torch.zeros(15))
    with pytest.raises(ValueError, match="got one of them"):
        launch(x, weight, out, row_sum_N=torch.zeros(16))
    with pytest.raises(ValueError, match=r"need shape \(2, 1, 8\)"):
        launch(x, weight, out, row_sum_N=torch.zeros(16), norm=RowStats(torch.zeros(2, 2, 8), 32))
    with pytest.raises(ValueError, match="width 64"):
        launch(x, weight, out, stats_out=RowStats(torch.zeros(2, 1, 8), 32), config=config())
    with pytest.raises(ValueError, match="needs a workspace of"):
        launch(x, weight, out, config=config(k=16, split=2))
    with pytest.raises(ValueError, match="choose at most 1"):
        launch(x, weight, out, config=config(split=2))
    film = Film(torch.zeros(2, 16), torch.zeros(2, 16), torch.zeros(8, 16), rows_per_sample=3)
    with pytest.raises(ValueError, match="rows per sample"):
        launch(x, weight, out, film=film, config=config())
    with pytest.raises(ValueError, match="linear takes fp16, bf16, fp32"):
        launch(x.double(), weight.double(), out.double())
    with pytest.raises(ValueError, match="row statistics of x"):
        gemm.launch_row_stats(x, RowStats(torch.zeros(2, 1, 7), 32))


def test_custom_ops_pass_opcheck():
    x, weight = normal(2, 7, 40, seed=0), normal(24, 40, seed=1)
    bias, scale, residual = normal(24, seed=2), normal(24, seed=3), normal(2, 7, 24, seed=4)
    torch.library.opcheck(torch.ops.vat_fast.linear, (x, weight))
    torch.library.opcheck(torch.ops.vat_fast.linear, (x, weight, bias, "gelu", residual, scale))
    torch.library.opcheck(torch.ops.vat_fast.norm_linear, (x, weight, bias, weight.sum(1)))


def test_compiled_equals_eager_equals_kernel():
    x, weight, bias = normal(2, 7, 40, seed=0), normal(24, 40, seed=1), normal(24, seed=2)

    def block(x: torch.Tensor) -> torch.Tensor:
        y = gemm.norm_linear(x, weight, bias, weight.sum(1), 1e-6, "gelu")
        return gemm.linear(y, weight.t().contiguous(), None, "none", x) + 1

    eager = block(x)
    torch.testing.assert_close(torch.compile(block, fullgraph=True)(x), eager)
    # The CUDA implementation, on CPU tensors in the interpreter.
    y = gemm.norm_linear._init_fn(x, weight, bias, weight.sum(1), 1e-6, "gelu")
    kernel = gemm.linear._init_fn(y, weight.t().contiguous(), None, "none", x) + 1
    torch.testing.assert_close(kernel, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", [name for name in gemm.ACTIVATIONS if name != "gelu"])
def test_other_activations(activation: str) -> None:
    x, weight, bias, residual = (normal(*shape, seed=i) for i, shape in enumerate([(7, 48), (40, 48), (40,), (7, 40)]))
    out = torch.full((7, 40), float("nan"))
    gemm.launch_linear(x, weight, out, bias_N=bias, activation=activation, residual_MN=residual)
    torch.testing.assert_close(out, gemm.linear_ref(x, weight, bias, activation, residual), rtol=1e-5, atol=1e-5)
