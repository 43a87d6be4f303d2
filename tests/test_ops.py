"""The operators' backends: which one runs and why, and that all of them compute the same model."""

from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.variants import random_batch, randomise, small_config
from vat_fast import VAT
from vat_fast import model as model_module
from vat_fast import ops as ops_module
from vat_fast.ops import Choice, TorchOps, TritonOps, choose

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_choice_is_visible_and_never_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose("auto", CPU).ops is TorchOps
    assert choose("auto", CUDA).ops is TritonOps
    assert choose("torch", CUDA).ops is TorchOps
    assert "no Triton kernels for 'cpu'" in choose("auto", CPU).reason
    with pytest.raises(ValueError, match="need tensors on a CUDA or ROCm device, these are on 'cpu'"):
        choose("triton", CPU)
    with pytest.raises(ValueError, match="backend must be"):
        choose("cutlass", CPU)  # type: ignore[arg-type]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "not installed" in choose("auto", CUDA).reason
    with pytest.raises(ValueError, match="pip install triton"):
        choose("triton", CUDA)


def test_a_model_obeys_its_backend() -> None:
    vat = VAT(small_config("vit-small", "VAT"))
    batch = random_batch(vat.config, 1, 0)
    vat.backend = "triton"
    with pytest.raises(ValueError, match="CUDA or ROCm"):
        vat(batch["pixels"], batch["task_id"])


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run VAT on the fused custom operators. On the CPU they have PyTorch implementations behind the same interface,
    autograd formulas included; the Triton kernels themselves are proven in tests/kernels."""
    monkeypatch.setattr(model_module, "choose", lambda backend, device: Choice(TritonOps, "test"))


VARIANTS = ["VAT", "proprio", "shared weights", "last-layer baseline", "action width D/2", "no task", "diffusion"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("preset", ["siglip2-so400m", "dinov2-large"])
def test_fused_operators_compute_the_same_model(preset: str, variant: str, request: pytest.FixtureRequest) -> None:
    vat = VAT(small_config(preset, variant))
    randomise(vat, 0)
    batch = random_batch(vat.config, 2, 1)

    def run() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        vat.zero_grad()
        loss = vat.loss(batch, torch.Generator().manual_seed(0))
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in vat.named_parameters() if p.grad is not None}

    plain_loss, plain = run()
    request.getfixturevalue("fused")
    fused_loss, gradients = run()
    torch.testing.assert_close(fused_loss, plain_loss, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == plain.keys()
    for name, g in gradients.items():
        assert (g - plain[name]).norm() <= 1e-4 * plain[name].norm(), name


def test_fused_operators_under_autocast(request: pytest.FixtureRequest) -> None:
    """bf16 autocast keeps the residual in float32 on both backends, so that their errors are alike."""
    vat = VAT(small_config("siglip2-so400m", "proprio")).eval()
    randomise(vat, 0)
    batch = random_batch(vat.config, 2, 1)
    inputs = (batch["pixels"], batch["task_id"], batch["proprio"])
    with torch.no_grad():
        exact = vat(*inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            plain = vat(*inputs).float()
            request.getfixturevalue("fused")
            fused = vat(*inputs).float()
    assert (fused - exact).norm() <= 1.5 * (plain - exact).norm()
    assert (plain - exact).norm() < 0.05 * exact.norm()


def test_fused_attention_maps(fused: None) -> None:
    vat = VAT(small_config("dinov2-large", "proprio")).eval()
    randomise(vat, 0)
    batch = random_batch(vat.config, 2, 1)
    with torch.no_grad():
        d = vat.details(batch["pixels"], batch["task_id"], batch["proprio"])
    for attention in d.attention:
        torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))


@pytest.mark.parametrize("backend", ["torch", "fused"])
def test_compiled_equals_eager(backend: str, request: pytest.FixtureRequest) -> None:
    """torch.compile of a whole VAT, forward and backward, in one graph."""
    if backend == "fused":
        request.getfixturevalue("fused")
    vat = VAT(small_config("vit-small", "VAT").replace(num_layers=2, num_views=1))
    randomise(vat, 0)
    batch = random_batch(vat.config, 2, 1)

    def gradients(model: torch.nn.Module) -> tuple[torch.Tensor, list[torch.Tensor]]:
        vat.zero_grad()
        actions = model(batch["pixels"], batch["task_id"])
        (actions - batch["actions"]).square().mean().backward()
        return actions.detach(), [p.grad.clone() for p in vat.parameters() if p.grad is not None]

    eager, eager_gradients = gradients(vat)
    compiled, compiled_gradients = gradients(torch.compile(vat, fullgraph=True))
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
    for a, b in zip(compiled_gradients, eager_gradients, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()


def test_bfloat16_attention_on_cpus_is_as_exact_as_plain_operators() -> None:
    """Training in bf16 on a CPU takes three products instead of PyTorch's fused attention, whose backward is slow."""
    torch.manual_seed(0)
    wide = [torch.randn(3, 2, tokens, 16) for tokens in (11, 37, 37)]
    upstream = torch.randn(3, 2, 11, 16)

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        return (q * scale @ k.mT).softmax(-1) @ v

    def run(dtype: torch.dtype, function: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        q, k, v = (x.to(dtype, copy=True).requires_grad_() for x in wide)
        out = function(q, k, v, scale=0.3)
        out.backward(upstream.to(dtype))
        return [x.double() for x in (out.detach(), *(t.grad for t in (q, k, v) if t.grad is not None))]

    fused = ops_module.attention
    for name, exact, theirs, ours in zip(
        ["out", "q", "k", "v"],
        run(torch.float64, plain),
        run(torch.bfloat16, plain),
        run(torch.bfloat16, fused),
        strict=True,
    ):
        assert 0 < (ours - exact).norm() <= 1.1 * (theirs - exact).norm(), name
    # In float32 it is PyTorch's own.
    for ours, theirs in zip(run(torch.float32, fused), run(torch.float32, scaled_dot_product_attention), strict=True):
        assert torch.equal(ours, theirs)
