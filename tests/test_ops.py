"""The operators' backends: which one runs and why, and that all of them compute the same model."""

from collections.abc import Callable, Iterable

import pytest
import torch

from benchmarks.variants import random_batch, randomise, small_config
from vat_fast import VAT
from vat_fast import model as model_module
from vat_fast.native import library, trial
from vat_fast.ops import Choice, NativeOps, TorchOps, TritonOps, choose

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_choice_is_visible_and_never_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose("auto", CUDA).ops is TritonOps
    assert choose("torch", CUDA).ops is TorchOps
    assert choose("torch", CPU).ops is TorchOps
    assert "no kernels for 'mps'" in choose("auto", torch.device("mps")).reason
    with pytest.raises(ValueError, match="need tensors on a CUDA or ROCm device, these are on 'cpu'"):
        choose("triton", CPU)
    with pytest.raises(ValueError, match="backend must be"):
        choose("cutlass", CPU)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="need tensors on a CPU, these are on 'cuda'"):
        choose("native", CUDA)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "not installed" in choose("auto", CUDA).reason
    with pytest.raises(ValueError, match="pip install triton"):
        choose("triton", CUDA)


def test_a_cpu_gets_the_compiled_operators_or_the_reason_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "speed", lambda: 1.5)
    for backend in ("auto", "native"):
        monkeypatch.setattr(library, "why_not", lambda: None)
        assert choose(backend, CPU).ops is NativeOps
        assert "compiled for this processor" in choose("auto", CPU).reason
        monkeypatch.setattr(library, "why_not", lambda: "no C++ compiler was found")
        if backend == "native":
            with pytest.raises(ValueError, match=r"backend 'native' cannot run: no C\+\+ compiler"):
                choose(backend, CPU)
        else:
            assert choose(backend, CPU) == Choice(TorchOps, "no C++ compiler was found")


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


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run VAT on the operators compiled for this processor."""
    if library.why_not():
        pytest.skip(str(library.why_not()))
    monkeypatch.setattr(model_module, "choose", lambda backend, device: Choice(NativeOps, "test"))


VARIANTS = ["VAT", "proprio", "shared weights", "last-layer baseline", "action width D/2", "no task", "diffusion"]


@pytest.mark.parametrize("backend", ["fused", "compiled"])
@pytest.mark.parametrize("variant", [*VARIANTS, "frozen vision", "action only", "tanh GELU"])
@pytest.mark.parametrize("preset", ["siglip2-so400m", "dinov2-large"])
def test_backends_compute_the_same_model(
    preset: str, variant: str, backend: str, request: pytest.FixtureRequest
) -> None:
    vat = VAT(small_config(preset, variant))
    vat.backend = "torch"
    randomise(vat, 0)
    batch = random_batch(vat.config, 2, 1)

    def run() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        vat.zero_grad()
        loss = vat.loss(batch, torch.Generator().manual_seed(0))
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in vat.named_parameters() if p.grad is not None}

    plain_loss, plain = run()
    request.getfixturevalue(backend)
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
    # Where a processor emulates bfloat16, PyTorch rounds less often than the kernels, which round as on a GPU.
    assert (fused - exact).norm() <= 2 * (plain - exact).norm()
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


@pytest.mark.parametrize("extra", [None, 2])
def test_bfloat16_attention_on_cpus_is_as_exact_as_plain_operators(extra: int | None) -> None:
    """Training in bf16 on a CPU takes products of its own, forward and backward, instead of PyTorch's attention."""
    torch.manual_seed(0)
    H, scale = 3, 0.3
    wide = {
        "qkv": torch.randn(3, 37, 3 * H * 16),
        "q": torch.randn(2, 11, H * 16),
        "kv": torch.randn(2, 29, 2 * H * 16),
    }
    if extra:
        wide["extra"] = torch.randn(2, extra, 2 * H * 16)
    upstream = torch.randn(3, 37, H * 16), torch.randn(2, 11, H * 16)

    def split(x: torch.Tensor, parts: int) -> Iterable[torch.Tensor]:
        return x.unflatten(-1, (parts, H, 16)).permute(2, 0, 3, 1, 4).unbind()

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return ((q * scale @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)

    def theirs(x: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        kv = torch.cat([x["extra"], x["kv"]], dim=1) if extra else x["kv"]
        return plain(*split(x["qkv"], 3)), plain(*split(x["q"], 1), *split(kv, 2))

    def ours(x: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        out = TorchOps.vision_attention(x["qkv"], H, scale)
        return out, TorchOps.cross_attention(x["q"], x["kv"], H, scale, x.get("extra"))[0]

    Model = Callable[[dict[str, torch.Tensor]], tuple[torch.Tensor, torch.Tensor]]

    def run(dtype: torch.dtype, model: Model) -> dict[str, torch.Tensor]:
        inputs = {name: x.to(dtype, copy=True).requires_grad_() for name, x in wide.items()}
        outputs = model(inputs)
        torch.autograd.backward(outputs, [g.to(dtype) for g in upstream])
        return {"vision": outputs[0], "cross": outputs[1]} | {
            n: x.grad for n, x in inputs.items() if x.grad is not None
        }

    exact, eager, fused = run(torch.float64, theirs), run(torch.bfloat16, theirs), run(torch.bfloat16, ours)
    assert exact.keys() == fused.keys() == {"vision", "cross", *wide}
    for name, truth in exact.items():
        assert 0 < (fused[name].double() - truth).norm() <= 1.1 * (eager[name].double() - truth).norm(), name
    # In float32 it is PyTorch's own.
    for name, truth in run(torch.float32, ours).items():
        assert (truth.double() - exact[name]).norm() <= 1e-5 * exact[name].norm(), name


def test_bfloat16_attention_on_cpus_compiles() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 9, 96, dtype=torch.bfloat16, requires_grad=True)

    def loss(x: torch.Tensor) -> torch.Tensor:
        x = x * 1.5
        out, _ = TorchOps.cross_attention(x[..., :32], x[..., 32:], 2, 0.3)
        return (TorchOps.vision_attention(x, 2, 0.3) * out).float().square().sum()

    (eager,) = torch.autograd.grad(loss(x), x)
    (compiled,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x), x)
    assert eager.norm() > 0
    assert (compiled - eager).norm() <= 0.02 * eager.norm()
