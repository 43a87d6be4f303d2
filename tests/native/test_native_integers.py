"""Linears in 16 and 8 bits: exact up to the rounding of weights and inputs, and never out of range."""

import ctypes
import platform
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vat_fast.frozen import native_integers
from vat_fast.native import calls, library
from vat_fast.native.calls import Count, Integers, call

pytestmark = pytest.mark.skipif(library.why_not() is not None, reason=str(library.why_not()))
ACTIVATIONS: list[Callable[[Tensor], Tensor]] = [
    lambda x: x,
    F.gelu,
    lambda x: F.gelu(x, approximate="tanh"),
    F.relu,
]


INSTRUCTIONS = Path(__file__).with_name("instructions.hpp")
# Builds are kept by their flags: the file's checksum is one of them.
WRITTEN_OUT = ("-include", str(INSTRUCTIONS), f"-DINSTRUCTIONS={zlib.crc32(INSTRUCTIONS.read_bytes())}")
PROCESSORS: dict[str, tuple[str, ...]] = {
    "this one": (),
    "4 lanes": ("-DVAT_LANES=4",),
    "16 lanes": ("-DVAT_LANES=16",),
    "AVX-512BW": ("-DVAT_LANES=16", "-DVAT_INTEGERS=512", "-DVAT_VNNI=0", *WRITTEN_OUT),
    "AVX512-VNNI": ("-DVAT_LANES=16", "-DVAT_INTEGERS=512", "-DVAT_VNNI=1", *WRITTEN_OUT),
    "AVX-VNNI": ("-DVAT_LANES=8", "-DVAT_INTEGERS=256", "-DVAT_VNNI=1", *WRITTEN_OUT),
}
"""Flags for the layouts of narrower and wider vectors, and for the instructions of processors that this one is not."""


@pytest.fixture(params=PROCESSORS, autouse=True)
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if flags := PROCESSORS[request.param]:
        if "-include" in flags and platform.machine() != "x86_64":
            pytest.skip("the instructions' vectors are x86's")
        path = library.build(library._compiler(), library.cache_folder(), (*flags, "-O1"))
        other = library.prepared(ctypes.CDLL(str(path)))
        for user in (native_integers, calls):
            monkeypatch.setattr(user, "load", lambda: other)
    return request.param


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


def linear(
    x: Tensor,
    weight: Tensor,
    bits: int,
    bias: Tensor | None = None,
    activation: int = 0,
    residual: Tensor | None = None,
    smooth: Tensor | None = None,
    eps: float = -1.0,
    film: tuple[Tensor, Tensor, int] | None = None,
) -> Tensor:
    """The C function on whole matrices; what it does not write stays NaN."""
    (M, K), N = x.shape, len(weight)
    packed = native_integers.pack_integers(weight, bits, smooth)
    room = torch.empty(M, native_integers.words(K, bits), dtype=torch.int32)
    out, bias = torch.full((M, N), torch.nan), torch.zeros(N) if bias is None else bias
    table, ids, tokens = film or (None, None, 1)
    call(
        "vat_integer_linear",
        *(x, x.stride(0), M, K, eps, table, None if ids is None else Integers(ids), tokens),
        *(bias, N, Count(activation), residual, N, out, N),
        *(Count(bits), packed.even, Integers(packed.numbers), packed.scale, packed.sums),
        *(Integers(room), torch.empty(M, 2)),
    )
    return out


def rounded_rows(x: Tensor, bits: int) -> Tensor:
    """What the rows become, in float64."""
    x, most = x.double(), native_integers.load().vat_input_most(bits)
    if bits == 16:
        scale, low = x.abs().amax(dim=1, keepdim=True) / most, torch.zeros(len(x), 1)
    else:
        low = x.amin(dim=1, keepdim=True)
        scale = (x.amax(dim=1, keepdim=True) - low) / most
    return ((x - low) / scale.clamp(min=1e-30)).round() * scale + low


def rounded_weight(weight: Tensor, bits: int) -> Tensor:
    """What the weight becomes, unpacked, in float64."""
    (N, K), packed = weight.shape, native_integers.pack_integers(weight, bits)
    lanes, together = native_integers.load().vat_lanes(), 32 // bits
    kind = torch.int16 if bits == 16 else torch.int8
    words = packed.numbers.view(-1, native_integers.words(K, bits), 2 * lanes).transpose(1, 2).flatten(0, 1)
    numbers = words.contiguous().view(kind).unflatten(1, (-1, lanes, together)).transpose(2, 3).flatten(1)
    return numbers[:N, :K].double() * packed.scale.double()[:, None]


@pytest.mark.parametrize(("M", "K", "N"), [(1, 3, 2), (7, 33, 5), (98, 577, 40), (13, 64, 129), (200, 1160, 33)])
@pytest.mark.parametrize("bits", [16, 8])
def test_sums_are_exact(bits: int, M: int, K: int, N: int) -> None:
    """Against float64 products of the rounded numbers; a number half way between two levels may go either way."""
    x, weight = 3 * randn(M, K) + 0.5, randn(N, K) / K**0.5
    expected = rounded_rows(x, bits) @ rounded_weight(weight, bits).T
    found = linear(x, weight, bits)
    step = (x.abs().amax(dim=1) / native_integers.load().vat_input_most(bits) * 2)[:, None] * weight.abs().amax(dim=1)
    assert ((found - expected).abs() <= 4e-6 * expected.abs().amax() + step * 1.01).all()
    assert (found - expected).norm() <= {16: 2e-5, 8: 1e-3}[bits] * expected.norm()


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("activation", [0, 1, 2, 3])
def test_with_everything_around_it(bits: int, activation: int) -> None:
    M, K, N, tokens = 102, 200, 70, 34
    x, weight, bias, residual = randn(M, 2 * K)[:, :K], randn(N, K) / K**0.5, randn(N), randn(M, N, seed=1)
    table, ids = randn(5, 2 * K) / 2, torch.tensor([4, 0, 3])
    smooth = torch.rand(K, generator=torch.Generator().manual_seed(2)) + 0.5
    gamma, beta = table[ids].repeat_interleave(tokens, 0).double().chunk(2, dim=1)
    h = F.layer_norm(x.double() * (1 + gamma) + beta, (K,), eps=1e-5)
    expected = residual + ACTIVATIONS[activation](h @ weight.double().T + bias)
    found = linear(x, weight, bits, bias, activation, residual, smooth, 1e-5, (table, ids, tokens))
    assert (found - expected).norm() < {16: 6e-4, 8: 2e-2}[bits] * (expected - residual).norm()


@pytest.mark.parametrize("signs", ["equal", "alternating", "random"])
@pytest.mark.parametrize("bits", [16, 8])
def test_the_largest_sums_stay_in_range(bits: int, signs: str) -> None:
    """All weights as large as they may be together, against inputs of the largest level."""
    K = 4304
    sign = {
        "equal": torch.ones(K),
        "alternating": torch.tensor([1.0, -1.0]).repeat(K // 2),
        "random": randn(K).sign(),
    }[signs]
    weight = torch.stack([sign, -sign, sign * 0.37])
    for x in (sign.expand(5, K), torch.where(sign > 0, 1.0, 0.0).expand(5, K), (sign * 1e20).expand(5, K)):
        expected = x.double() @ weight.double().T
        found = linear(x.contiguous(), weight, bits)
        assert (found - expected).abs().max() <= {16: 1e-3, 8: 2.5e-2}[bits] * expected.abs().max()


def test_weights_that_share_a_sum_are_bounded() -> None:
    most, lanes = native_integers.load().vat_shared_most(), native_integers.load().vat_lanes()
    if not most:
        pytest.skip("such a processor sums 8-bit products in 32 bits")
    weight = randn(50, 192) * torch.rand(192) ** 4
    packed = native_integers.pack_integers(weight, 8)
    words = packed.numbers.view(-1, native_integers.words(192, 8), 2 * lanes).transpose(1, 2).flatten(0, 1).contiguous()
    # Two words at a time, the same pair of each.
    together = words.view(torch.int8).int().abs().view(len(words), -1, 2, 2, 2).sum(dim=(2, 4))
    assert most * 0.8 < together.max() <= most
    assert native_integers.load().vat_input_most(8) * most < 2**15


@pytest.mark.parametrize("bits", [16, 8])
def test_numbers_that_are_none_stay_in_their_rows(bits: int) -> None:
    x, weight = randn(9, 70), randn(20, 70)
    x[2, 5], x[4, 69], x[6, 0] = torch.nan, torch.inf, -torch.inf
    found = linear(x, weight, bits)
    bad = [2, 4, 6]
    assert not found[bad].isfinite().any()
    good = [m for m in range(9) if m not in bad]
    assert torch.equal(found[good], linear(x[good], weight, bits))


@pytest.mark.parametrize("bits", [16, 8])
def test_rows_without_a_difference(bits: int) -> None:
    weight, bias = randn(20, 70), randn(20)
    x = torch.stack([torch.zeros(70), torch.full((70,), 2.5), torch.full((70,), -1e-38)])
    found = linear(x, weight, bits, bias)
    expected = x.double() @ weight.double().T + bias
    assert torch.equal(found[0], bias)
    assert (found - expected).norm() < {16: 1e-3, 8: 2e-2}[bits] * expected.norm()
