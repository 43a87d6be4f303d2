"""Vision self-attention: kernels against fp64, autograd, opcheck, torch.compile, and the choice of implementation."""

import importlib
import itertools
import sys
import types

import pytest
import torch

from vat_fast.kernels import attention_forward, attention_math, configs, tables
from vat_fast.kernels.vision_attention import vision_attention, vision_attention_ref

# The module, not the function of the same name.
va = importlib.import_module("vat_fast.kernels.vision_attention")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def make(N, P, H, d, dtype, merged=False, seed=0):
    """(qkv, grad_out) with values of order one; `merged` makes qkv the first columns of a wider projection."""
    generator = torch.Generator().manual_seed(seed + 1000 * P + d)
    D = H * d
    wide = torch.randn(N, P, (5 if merged else 3) * D, generator=generator).to(dtype)
    return wide[..., : 3 * D], torch.randn(N, P, D, generator=generator).to(dtype)


def reference(qkv, grad, H, scale, dtype):
    """(out, dqkv) of the eager reference in `dtype`."""
    leaf = qkv.detach().to(dtype).requires_grad_()
    out = vision_attention_ref(leaf, H, scale)
    return out.detach(), torch.autograd.grad(out, leaf, grad.to(dtype))[0]


def launch(qkv, grad, H, scale, nan_like):
    """(out, lse, dqkv) of the kernels, into NaN-filled tensors."""
    out, lse = nan_like(grad), torch.full((qkv.shape[0], H, qkv.shape[1]), float("nan"))
    va.launch_vision_attention(qkv, H, scale, out, lse)
    dqkv = nan_like(qkv.contiguous())
    va.launch_vision_attention_backward(grad, qkv, out, lse, H, scale, dqkv)
    return out, lse, dqkv


def compare(qkv, grad, H, scale, nan_like, assert_error_at_most_2x_eager):
    out, lse, dqkv = launch(qkv, grad, H, scale, nan_like)
    truth, eager = (reference(qkv, grad, H, scale, dtype) for dtype in (torch.float64, qkv.dtype))
    assert_error_at_most_2x_eager(out, eager[0], truth[0])
    for actual, low, high in zip(dqkv.chunk(3, -1), eager[1].chunk(3, -1), truth[1].chunk(3, -1), strict=True):
        assert_error_at_most_2x_eager(actual, low, high)
    q, k, v = qkv.double().chunk(3, -1)
    torch.testing.assert_close(lse.double(), attention_math.attention_torch(q, k, v, H, scale)[1], rtol=1e-6, atol=5e-6)


SIZES = [(256, 64), (256, 72), (257, 72), (257, 96), (261, 64), (261, 96), (2, 72), (17, 40), (70, 72)]
MORE_IN_BF16 = [(256, 96), (257, 64), (261, 72)]
CASES = [*itertools.product(SIZES, DTYPES), *itertools.product(MORE_IN_BF16, DTYPES[:1])]


@pytest.mark.parametrize(("size", "dtype"), CASES)
def test_kernels_match_fp64(size, dtype, nan_like, assert_error_at_most_2x_eager):
    P, d = size
    views, heads = (1, 1) if P > 70 else (3, 2)
    qkv, grad = make(views, P, heads, d, dtype, merged=P % 2 == 1)
    compare(qkv, grad, heads, d**-0.5, nan_like, assert_error_at_most_2x_eager)


def test_a_single_token_copies_its_value(nan_like):
    """With one key the weights are 1 whatever the scores: out = v, dv = grad, and dq = dk = 0 but for rounding."""
    qkv, grad = make(2, 1, 2, 72, torch.float32)
    out, _, dqkv = launch(qkv, grad, 2, 0.1, nan_like)
    assert torch.equal(out, qkv[..., 2 * 144 :])
    torch.testing.assert_close(dqkv[..., 2 * 144 :], grad, rtol=1e-6, atol=0)  # the weight, recomputed, rounds
    assert dqkv[..., : 2 * 144].abs().max() < 1e-5


@pytest.mark.parametrize("arch", [80, 89, 90, 110, "gfx942"])
def test_every_table_gives_the_right_answer(arch, nan_like, assert_error_at_most_2x_eager):
    """Every tile size that is shipped."""
    for d in (64, 72, 96):
        qkv, grad = make(1, 133, 1, d, torch.float16)
        with configs.override_arch(arch):
            compare(qkv, grad, 1, d**-0.5, nan_like, assert_error_at_most_2x_eager)


def test_the_large_batch_tile(nan_like, assert_error_at_most_2x_eager):
    qkv, grad = make(1, 261, 1, 72, torch.bfloat16)
    q, k, v = qkv.chunk(3, -1)
    out, lse = nan_like(grad), torch.full((1, 1, 261), float("nan"))
    config = configs.pick(va.CONFIGS, 90, bits=16, head_dim=72, programs=10_000)
    assert config["BLOCK_M"] == 128
    attention_forward.launch_forward(q, k, v, out, lse, 1, 0.1, config)
    truth, eager = (reference(qkv, grad, 1, 0.1, dtype)[0] for dtype in (torch.float64, torch.bfloat16))
    assert_error_at_most_2x_eager(out, eager, truth)


def test_huge_scores_stay_finite(nan_like):
    """Scores of several thousands: softmax becomes a choice of one key, and nothing overflows.

    Rounding a score of 7000 to float32 alone moves its weight by 5e-4, hence the tolerance.
    """
    qkv, grad = make(1, 70, 1, 64, torch.float32)
    out, _, dqkv = launch(30 * qkv, grad, 1, 1.0, nan_like)
    truth_out, truth_dqkv = reference(30 * qkv, grad, 1, 1.0, torch.float64)
    assert (out - truth_out).norm() < 1e-2 * truth_out.norm()
    assert (dqkv - truth_dqkv).norm() < 5e-2 * truth_dqkv.norm()


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # in the masked lanes, before their mask
def test_very_negative_scores_stay_finite(nan_like, assert_error_at_most_2x_eager):
    """All scores near -500: a masked key, whose score is 0, would weigh exp(500) were it not masked.

    Such a score is rounded by some 3e-5. Where forward and backward round it differently, as the interpreter's products
    do on some processors, the gradients of scores sum to that instead of 0, times what all keys have in common, which
    is 80 times their differences.
    """
    qkv, grad = make(1, 70, 1, 64, torch.float32)
    q, k, v = qkv.chunk(3, -1)
    qkv = torch.cat([8 + 0.1 * q, -8 + 0.1 * k, v], dim=-1)
    out, _, dqkv = launch(qkv, grad, 1, 0.125, nan_like)
    truth, eager = (reference(qkv, grad, 1, 0.125, dtype) for dtype in (torch.float64, torch.float32))
    assert_error_at_most_2x_eager(out, eager[0], truth[0])
    assert (dqkv - truth[1]).norm() < 1e-2 * truth[1].norm()


def test_views_and_heads_do_not_mix(nan_like):
    """Changing one view leaves the others' output alone, bit for bit; likewise heads."""
    qkv, grad = make(3, 70, 2, 72, torch.bfloat16)
    before = launch(qkv, grad, 2, 0.1, nan_like)[0]
    qkv[1] += 1.0
    after = launch(qkv, grad, 2, 0.1, nan_like)[0]
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.equal(before[1], after[1])
    qkv[..., 72 : 2 * 72] += 1.0  # queries of head 1
    assert torch.equal(after[..., :72], launch(qkv, grad, 2, 0.1, nan_like)[0][..., :72])


def test_the_same_bits_twice(nan_like):
    qkv, grad = make(2, 133, 2, 72, torch.bfloat16)
    first, second = (launch(qkv, grad, 2, 0.1, nan_like) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradcheck():
    qkv, _ = make(2, 5, 2, 6, torch.float64)
    torch.autograd.gradcheck(lambda x: vision_attention(x, 2, 0.4), qkv.requires_grad_())


def test_opcheck():
    qkv, grad = make(2, 9, 2, 8, torch.float32, merged=True)
    torch.library.opcheck(torch.ops.vat_fast.vision_attention.default, (qkv.requires_grad_(), 2, 0.4))
    out, lse = torch.ops.vat_fast.vision_attention(qkv.detach(), 2, 0.4)
    torch.library.opcheck(torch.ops.vat_fast.vision_attention_backward.default, (grad, qkv.detach(), out, lse, 2, 0.4))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_cpu_op_matches_reference(dtype, assert_error_at_most_2x_eager):
    qkv, grad = make(2, 37, 3, 12, dtype, merged=True)
    leaf = qkv.detach().requires_grad_()
    out = vision_attention(leaf, 3, 0.3)
    (dqkv,) = torch.autograd.grad(out, leaf, grad)
    truth, eager = (reference(qkv, grad, 3, 0.3, d) for d in (torch.float64, dtype))
    floor = 1e-12 if dtype == torch.float64 else None
    assert_error_at_most_2x_eager(out.detach(), eager[0], truth[0], floor)
    assert_error_at_most_2x_eager(dqkv, eager[1], truth[1], floor)


class SelfAttention(torch.nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.qkv, self.proj, self.heads = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width), heads

    def forward(self, x):
        return x + self.proj(vision_attention(self.qkv(x), self.heads, 0.25))


def test_compiled_module_equals_eager():
    torch.manual_seed(0)
    module = SelfAttention(48, 3)
    x = torch.randn(2, 17, 48)
    compiled = torch.compile(module, fullgraph=True)
    results = []
    for run in (module, compiled):
        module.zero_grad()
        out = run(x)
        out.square().sum().backward()
        results.append((out.detach(), module.qkv.weight.grad.clone()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# --- which implementation runs


@pytest.fixture
def backend(monkeypatch):
    """backend(selected, flash_attn_installed)"""

    def choose(selected="auto", installed=False):
        monkeypatch.setattr(va, "_selected", selected)
        monkeypatch.setattr(va, "FLASH_ATTN_INSTALLED", installed)

    return choose


def test_choice_of_backend(backend):
    bf16 = torch.bfloat16
    backend("auto", installed=False)
    assert va.vision_attention_backend("cuda", bf16, 72) == va.BackendChoice("triton", "flash-attn is not installed")
    assert va.vision_attention_backend("cpu", bf16, 72).name == "torch"
    backend("auto", installed=True)
    assert va.vision_attention_backend("cuda", bf16, 64).name == "flash_attn"
    padded = va.vision_attention_backend("cuda", bf16, 72)
    assert padded == va.BackendChoice("triton", "not measured here, and flash-attn would pad head dim 72")
    assert "float32" in va.vision_attention_backend("cuda", torch.float32, 72).reason
    assert "36" in va.vision_attention_backend("cuda", bf16, 36).reason
    assert va.vision_attention_backend("cpu", bf16, 72).name == "torch"
    backend("triton", installed=True)
    assert va.vision_attention_backend("cuda", bf16, 72).name == "triton"
    backend("torch", installed=True)
    assert va.vision_attention_backend("cuda", bf16, 72).name == "torch"


def test_measured_times_decide_over_the_default(backend, monkeypatch):
    backend("auto", installed=True)
    rows = [(72, 512, 4.0, 3.5), (72, None, 20.0, 31.0), (64, None, 9.0, 8.0)]
    monkeypatch.setattr(tables, "FLASH_ATTENTION", {80: rows})
    bf16 = torch.bfloat16
    small = va.vision_attention_backend("cuda", bf16, 72, rows=512)
    assert small.name == "flash_attn"
    assert small.reason == "measured on this architecture: Triton 4.0 us, flash-attn 3.5 us"
    assert va.vision_attention_backend("cuda", bf16, 72, rows=513).name == "triton"
    assert "not measured" in va.vision_attention_backend("cuda", bf16, 96).reason
    with configs.override_arch(90):
        assert "not measured" in va.vision_attention_backend("cuda", bf16, 72).reason


@pytest.mark.parametrize(
    ("selected", "installed", "device", "dtype", "head_dim", "message"),
    [
        ("flash_attn", False, "cuda", torch.bfloat16, 72, "not installed"),
        ("flash_attn", True, "cpu", torch.bfloat16, 72, "on cpu"),
        ("flash_attn", True, "cuda", torch.float32, 72, "float32"),
        ("triton", True, "cpu", torch.bfloat16, 72, "on the CPU"),
        ("fastest", True, "cuda", torch.bfloat16, 72, "fastest"),
    ],
)
def test_a_backend_that_cannot_run_says_why(selected, installed, device, dtype, head_dim, message, backend):
    backend(selected, installed)
    with pytest.raises(ValueError, match=message):
        va.vision_attention_backend(device, dtype, head_dim)


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="cudnn"):
        va.set_vision_attention_backend("cudnn")


def test_flash_attn_gets_the_packed_tensor(backend, monkeypatch):
    """A stand-in with flash-attn's signature: the heads arrive in the right places, the scale too."""
    calls = []

    def flash_attn_qkvpacked_func(qkv, dropout_p=0.0, softmax_scale=None):
        calls.append(tuple(qkv.shape))
        return vision_attention_ref(qkv.flatten(2), qkv.shape[3], softmax_scale).unflatten(-1, qkv.shape[3:])

    module = types.ModuleType("flash_attn")
    module.flash_attn_qkvpacked_func = flash_attn_qkvpacked_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    choice = va.BackendChoice("flash_attn", "stand-in")
    monkeypatch.setattr(va, "vision_attention_backend", lambda *_: choice)
    qkv, _ = make(2, 9, 3, 8, torch.float32, merged=True)
    torch.testing.assert_close(vision_attention(qkv, 3, 0.2), vision_attention_ref(qkv, 3, 0.2))
    assert calls == [(2, 9, 3, 3, 8)]


# --- bad input


@pytest.mark.parametrize(
    ("qkv", "heads", "scale", "message"),
    [
        (torch.zeros(2, 4, 10), 2, 0.1, r"\(2, 4, 10\)"),
        (torch.zeros(4, 12), 2, 0.1, r"\(4, 12\)"),
        (torch.zeros(2, 4, 12, dtype=torch.int32), 2, 0.1, "int32"),
        (torch.zeros(2, 4, 12), 2, 0.0, "scale is 0.0"),
        (torch.zeros(2, 4, 12), 2, float("nan"), "scale is nan"),
    ],
)
def test_bad_input_is_refused(qkv, heads, scale, message):
    with pytest.raises(ValueError, match=message):
        vision_attention(qkv, heads, scale)


def test_launcher_refuses_what_kernels_cannot_read():
    out, lse = torch.zeros(1, 4, 4), torch.zeros(1, 2, 4)
    with pytest.raises(ValueError, match="float64"):
        va.launch_vision_attention(torch.zeros(1, 4, 12, dtype=torch.float64), 2, 0.1, out, lse)
    with pytest.raises(ValueError, match="stride 4 along its last axis"):
        va.launch_vision_attention(torch.zeros(1, 12, 4).transpose(1, 2), 2, 0.1, out, lse)
    huge = torch.empty(1, 2, 2**30, device="meta")[..., :12]
    with pytest.raises(ValueError, match="fewer than 2\\*\\*31"):
        va.launch_vision_attention(huge, 2, 0.1, out, lse)
