"""The operators compiled for this processor against PyTorch in float64: values and all gradients, at odd shapes."""

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vat_fast.native import calls, functions, library

pytestmark = pytest.mark.skipif(library.why_not() is not None, reason=str(library.why_not()))

Inputs = dict[str, Tensor]
Model = Callable[[Inputs], list[Tensor]]


@pytest.fixture(autouse=True)
def unwritten_is_nan() -> Iterator[None]:
    """Fill what `torch.empty` gives with NaN, so that an element that nobody writes is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[None, 4, 16])
def lanes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int | None:
    """This processor's own vectors, and the layouts of narrower and wider ones."""
    if request.param is not None:
        compiler, folder = library._compiler(), library.cache_folder()
        path = library.build(compiler, folder, (f"-DVAT_LANES={request.param}", "-O1"))
        other = library.prepared(ctypes.CDLL(str(path)))
        for user in (functions, calls):
            monkeypatch.setattr(user, "load", lambda: other)
    return request.param


def compare(inputs: Inputs, ours: Model, theirs: Model, most: float = 2.0) -> None:
    """Errors against float64, of outputs and gradients, at most `most` times eager float32's and a few roundings."""
    generator = torch.Generator().manual_seed(7)

    def run(dtype: torch.dtype, model: Model) -> list[Tensor]:
        leaves = {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}
        outs = model(leaves)
        generator.manual_seed(7)
        upstream = [torch.randn(out.shape, generator=generator).to(dtype) for out in outs]
        torch.autograd.backward(outs, upstream)
        return [out.detach() for out in outs] + [leaves[name].grad for name in leaves]

    exact, eager, fused = run(torch.float64, theirs), run(torch.float32, theirs), run(torch.float32, ours)
    for index, (truth, plain, found) in enumerate(zip(exact, eager, fused, strict=True)):
        assert found.shape == truth.shape
        assert found.isfinite().all(), index
        error, usual, size = (found - truth).norm(), (plain - truth).norm(), truth.norm()
        assert error <= most * usual + 4e-7 * size, (index, float(error / size), float(usual / size))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


@pytest.mark.parametrize(
    ("rows", "D", "widths"), [((1,), 8, [5]), ((7,), 40, [16, 33]), ((3, 97), 72, [72, 216]), ((2, 200), 300, [17])]
)
def test_norm_linears(rows: tuple[int, ...], D: int, widths: list[int], lanes: int | None) -> None:
    inputs = {"x": randn(*rows, D) + 3, "norm": randn(D), "norm_bias": randn(D, seed=1)}
    for i, width in enumerate(widths):
        inputs |= {f"w{i}": randn(width, D, seed=i) / D**0.5, f"b{i}": randn(width, seed=i)}

    def ours(i: Inputs) -> list[Tensor]:
        pairs = [(i[f"w{k}"], i[f"b{k}"]) for k in range(len(widths))]
        x, outs = functions.norm_linears(i["x"], i["norm"], i["norm_bias"], 1e-6, pairs)
        return [x * 0.5, *outs]

    def theirs(i: Inputs) -> list[Tensor]:
        n = F.layer_norm(i["x"], (D,), i["norm"], i["norm_bias"], 1e-6)
        return [i["x"] * 0.5, *(F.linear(n, i[f"w{k}"], i[f"b{k}"]) for k in range(len(widths)))]

    compare(inputs, ours, theirs)


@pytest.mark.parametrize(("rows", "K", "N"), [((1,), 3, 2), ((5, 97), 600, 40), ((13,), 64, 129)])
@pytest.mark.parametrize("has_residual", [False, True])
def test_linear(rows: tuple[int, ...], K: int, N: int, has_residual: bool, lanes: int | None) -> None:
    inputs = {"x": randn(*rows, K), "w": randn(N, K) / K**0.5, "b": randn(N)}
    if has_residual:
        inputs["r"] = randn(*rows, N, seed=3)
    compare(
        inputs,
        lambda i: [functions.linear(i["x"], i["w"], i["b"], i.get("r"))],
        lambda i: [F.linear(i["x"], i["w"], i["b"]) + i.get("r", 0)],
    )


@pytest.mark.parametrize(
    ("rows", "D", "hidden"), [((1,), 8, 5), ((2, 101), 72, 269), ((96,), 64, 256), ((7,), 300, 700)]
)
def test_mlp(rows: tuple[int, ...], D: int, hidden: int, lanes: int | None) -> None:
    inputs = {
        "x": 2 * randn(*rows, D),
        **{"norm": randn(D), "norm_bias": randn(D, seed=1)},
        **{"w1": 3 * randn(hidden, D) / D**0.5, "b1": randn(hidden)},
        **{"w2": randn(D, hidden) / hidden**0.5, "b2": randn(D, seed=2)},
    }

    def ours(i: Inputs) -> list[Tensor]:
        return [functions.mlp(i["x"], i["norm"], i["norm_bias"], 1e-5, (i["w1"], i["b1"]), (i["w2"], i["b2"]))]

    def theirs(i: Inputs) -> list[Tensor]:
        h = F.gelu(F.linear(F.layer_norm(i["x"], (D,), i["norm"], i["norm_bias"], 1e-5), i["w1"], i["b1"]))
        return [i["x"] + F.linear(h, i["w2"], i["b2"])]

    compare(inputs, ours, theirs)


def heads(x: Tensor, parts: int, H: int) -> tuple[Tensor, ...]:
    return x.unflatten(-1, (parts, H, -1)).permute(2, 0, 3, 1, 4).unbind()


def plain_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return ((q * scale @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    ("B", "P", "H", "d"), [(1, 1, 1, 8), (3, 57, 2, 24), (2, 197, 3, 64), (1, 130, 1, 72), (2, 49, 2, 5)]
)
def test_vision_attention(B: int, P: int, H: int, d: int, lanes: int | None) -> None:
    scale = 2 * d**-0.5
    compare(
        {"qkv": randn(B, P, 3 * H * d)},
        lambda i: [functions.vision_attention(i["qkv"], H, scale)],
        lambda i: [plain_attention(*heads(i["qkv"], 3, H), scale)],
    )


@pytest.mark.parametrize(
    ("B", "T", "S", "H", "d"), [(1, 1, 1, 1, 4), (2, 56, 257, 3, 64), (2, 7, 522, 2, 36), (1, 58, 13, 2, 72)]
)
def test_cross_attention(B: int, T: int, S: int, H: int, d: int, lanes: int | None) -> None:
    scale = 2 * d**-0.5
    compare(
        {"q": randn(B, T, H * d), "kv": randn(B, S, 2 * H * d)},
        lambda i: [functions.cross_attention(i["q"], i["kv"], H, scale)],
        lambda i: [plain_attention(*heads(i["q"], 1, H), *heads(i["kv"], 2, H), scale)],
    )


def test_large_scores_do_not_overflow() -> None:
    compare(
        {"qkv": 30 * randn(2, 20, 3 * 16)},
        lambda i: [functions.vision_attention(i["qkv"], 1, 1.0)],
        lambda i: [plain_attention(*heads(i["qkv"], 3, 1), 1.0)],
    )


def test_nan_stays_nan(lanes: int | None) -> None:
    """A run that has gone wrong must show it."""
    norm, zero, eye = torch.ones(16), torch.zeros(16), torch.eye(16)
    x = randn(3, 16)
    x[1, 5] = torch.nan
    y = functions.mlp(x, norm, zero, 1e-6, (eye, zero), (eye, zero))
    assert y[1].isnan().all()
    assert y[::2].isfinite().all()
    for part in range(3):  # of query, key and value
        qkv = randn(2, 20, 3 * 16)
        qkv[1, 7, 16 * part + 3] = torch.nan
        out = functions.vision_attention(qkv, 1, 0.5)
        assert out[0].isfinite().all()
        assert out[1, 7 if part == 0 else slice(None)].isnan().any(-1).all()


def test_gelu_is_exact_in_its_tails() -> None:
    """With fc2 = 1 and the norm undone the output shows GELU itself."""
    u = torch.linspace(-12, 12, 4001)[:, None]
    one, zero = torch.ones(1, 1), torch.zeros(1)
    out = functions.mlp(u, zero, zero, 1.0, (one, zero), (one, zero)) - u  # norm gives 0, GELU(0) = 0
    assert torch.equal(out, torch.zeros_like(out))
    x = torch.stack([u[:, 0], -u[:, 0]], dim=1)  # LN of (u, -u) is (+-1, -+1): scaled by the weight it is u's grid
    grid = torch.linspace(-9, 9, 1001)
    got = torch.stack(
        [
            functions.mlp(
                x[:1],
                torch.tensor([g, g]),
                torch.zeros(2),
                1e-12,
                (torch.eye(2), torch.zeros(2)),
                (torch.eye(2), torch.zeros(2)),
            )[0]
            for g in grid
        ]
    )
    signs = torch.sign(x[0])
    want = x[0] + F.gelu((grid[:, None] * signs).double())
    assert (got - want).abs().max() < 3e-6  # of |x| = 12: a rounding is 1e-6


def test_inputs_may_lie_anyhow() -> None:
    x, w, b = randn(30, 7).t(), randn(30, 12).t(), randn(24)[::2]
    assert not any(tensor.is_contiguous() for tensor in (x, w, b))
    compare(
        {"x": x, "w": w, "b": b},
        lambda i: [functions.linear(i["x"], i["w"], i["b"]).t()],
        lambda i: [F.linear(i["x"], i["w"], i["b"]).t()],
    )


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_equal_threads_give_equal_bits(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:

        def run() -> list[Tensor]:
            x, qkv = randn(2, 300, 48).requires_grad_(), randn(2, 100, 3 * 32, seed=9).requires_grad_()
            w1, w2 = (randn(90, 48).requires_grad_(), randn(48, 90).requires_grad_())
            norm = torch.ones(48).requires_grad_()
            y = functions.mlp(x, norm, torch.zeros(48), 1e-6, (w1, torch.zeros(90)), (w2, torch.zeros(48)))
            loss = y.square().mean() + functions.vision_attention(qkv, 2, 0.3).square().mean()
            return [loss.detach(), *torch.autograd.grad(loss, [x, qkv, w1, w2, norm])]

        first, again = run(), run()
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        torch.set_num_threads(1)
        for a, b in zip(run(), first, strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm()
    finally:
        torch.set_num_threads(before)


def test_what_nobody_asks_for_is_not_computed() -> None:
    x, w, b = randn(9, 16), randn(5, 16).requires_grad_(), randn(5)
    functions.linear(x, w, b).sum().backward()
    assert w.grad is not None
    assert w.grad.isfinite().all()
    frozen, x = randn(5, 16), randn(9, 16).requires_grad_()
    functions.linear(x, frozen, b).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, frozen.sum(0).expand(9, 16), atol=1e-5)
    with torch.no_grad():
        assert not functions.linear(x, w, b).requires_grad


def test_what_does_not_fit_is_refused() -> None:
    x, w, b, norm = randn(4, 8), randn(6, 8), randn(6), torch.ones(8)
    for weight, bias in ((randn(6, 9), b), (w, randn(5)), (w[0], b)):
        with pytest.raises(ValueError, match=r"needs a weight \(N, 8\) and a bias"):
            functions.linear(x, weight, bias)
        with pytest.raises(ValueError, match=r"needs a weight \(N, 8\) and a bias"):
            functions.norm_linears(x, norm, norm, 1e-6, [(w, b), (weight, bias)])
    with pytest.raises(ValueError, match=r"residual must be \(4, 6\), got \(4, 5\)"):
        functions.linear(x, w, b, randn(4, 5))
    with pytest.raises(ValueError, match=r"fc2 must give 8 numbers"):
        functions.mlp(x, norm, norm, 1e-6, (w, b), (randn(7, 6), randn(7)))
    with pytest.raises(ValueError, match="is not q, k, v of 2 heads"):
        functions.vision_attention(randn(1, 3, 8), 2, 1.0)
    with pytest.raises(ValueError, match=r"do not fit to k\|v"):
        functions.cross_attention(randn(2, 3, 8), randn(2, 5, 8), 2, 1.0)
    with pytest.raises(TypeError, match=r"take float32 on the CPU, got torch.bfloat16"):
        functions.linear(x, w.bfloat16(), b.bfloat16())


def test_a_missing_or_failing_compiler_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(library.BuildError, match="cannot compile the operators"):
        library.build(library._compiler(), tmp_path, ("-DVAT_LANES=nonsense",))
    assert not list(tmp_path.glob("*.so"))
    (tmp_path / "file").write_text("")
    with pytest.raises(library.BuildError, match="cannot be compiled into"):
        library.build(library._compiler(), tmp_path / "file" / "folder")
    monkeypatch.setattr(library.shutil, "which", lambda name: None)
    with pytest.raises(library.BuildError, match=r"no C\+\+ compiler"):
        library._compiler()
