"""Work that threads take in turn: all of it is done, and by whom changes nothing."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.native.test_native_integers import linear as integer_linear
from tests.native.test_native_integers import randn
from vat_fast.frozen.native_executor import pack_weight
from vat_fast.native import functions, library
from vat_fast.native.calls import Count, call

pytestmark = pytest.mark.skipif(library.why_not() is not None, reason=str(library.why_not()))


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def linear(x: Tensor, weight: Tensor, bits: int, eps: float) -> Tensor:
    """One linear of a frozen policy; what is not written stays NaN."""
    if bits < 32:
        return integer_linear(x, weight, bits, eps=eps)
    (M, K), N = x.shape, len(weight)
    out, normalised = torch.full((M, N), torch.nan), torch.empty(M, K)
    call(
        "vat_step_linear",
        *(x, K, M, K, eps, None, None, 1, torch.zeros(N), N, Count(0), None, 0, out, N),
        *(pack_weight(weight), normalised),
    )
    return out


@pytest.mark.parametrize("threads", [1, 2, 3, 7], indirect=True)
@pytest.mark.parametrize(("M", "K", "N"), [(1, 5, 1), (3, 300, 17), (97, 33, 200), (500, 260, 70), (96, 64, 1100)])
@pytest.mark.parametrize("eps", [-1.0, 1e-5])
@pytest.mark.parametrize("bits", [32, 16, 8])
def test_every_share_of_a_linear_is_done(bits: int, eps: float, M: int, K: int, N: int, threads: int) -> None:
    x, weight = randn(M, K), randn(N, K) / K**0.5
    rows = x.double() if eps < 0 else F.layer_norm(x.double(), (K,), eps=eps)
    expected, found = rows @ weight.double().T, linear(x, weight, bits, eps)
    assert (found - expected).norm() <= {32: 1e-6, 16: 1e-3, 8: 5e-2}[bits] * expected.norm()
    torch.set_num_threads(1)
    assert torch.equal(linear(x, weight, bits, eps), found)


@pytest.mark.parametrize("threads", [1, 2, 3, 7], indirect=True)
@pytest.mark.parametrize(("B", "T", "H"), [(1, 1, 1), (1, 48, 1), (1, 257, 3), (3, 100, 5), (4, 50, 8)])
def test_every_query_attends(B: int, T: int, H: int, threads: int) -> None:
    qkv = randn(B, T, 3 * H * 24)
    found = functions.vision_attention(qkv, H, 0.2)
    query, key, value = (part.unflatten(2, (H, -1)).transpose(1, 2) for part in qkv.double().chunk(3, dim=2))
    expected = F.scaled_dot_product_attention(query, key, value, scale=0.2).transpose(1, 2).flatten(2)
    assert (found - expected).abs().max() <= 3e-6
    torch.set_num_threads(1)
    assert torch.equal(functions.vision_attention(qkv, H, 0.2), found)
