"""The executors for CPUs against the reference, in every precision they have."""

import pytest
import torch

from benchmarks.parity import relative
from benchmarks.variants import VARIANTS, random_batch, small_config
from tests.frozen.marks import needs_onednn_bf16
from tests.frozen.test_passes import arguments, models
from tests.native.test_native_integers import linear as integer_linear
from vat_fast import VATConfig
from vat_fast.frozen import openvino_executor
from vat_fast.frozen.cpu import Choice, candidates, cpu_executor, has_integers
from vat_fast.frozen.int8 import ALPHAS, Range, evening, quantise_linear, weight_levels

pytest.importorskip("openvino", reason="needs the package openvino")


needs_integers = pytest.mark.skipif(not has_integers(), reason="the native operators have no integers here")


def calibration(config: VATConfig, seed: int = 5) -> list[dict[str, torch.Tensor]]:
    inputs = random_batch(config, 4, seed)
    return [{name: value for name, value in inputs.items() if name != "actions"}]


@pytest.mark.parametrize("executor", ["openvino", "onednn", "native"])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_every_variant_equals_the_reference(variant: str, executor: str) -> None:
    config = small_config("dinov2-large" if "D/2" in variant or "proprio" in variant else "siglip2-so400m", variant)
    vat, reference = models(config)
    args = arguments(config, 2)
    noise = [{"generator": torch.Generator().manual_seed(7)} if config.head == "diffusion" else {} for _ in range(2)]
    actions = vat.freeze(batch=2, executor=executor)(*args, **noise[0])
    # Ten clipped denoising rounds carry rounding errors further; test_passes measures that against float64.
    assert relative(actions, reference(*args, **noise[1])) < (1e-3 if config.head == "diffusion" else 1e-5)


@pytest.mark.parametrize("executor", ["openvino", pytest.param("onednn", marks=needs_onednn_bf16)])
@pytest.mark.parametrize("variant", ["VAT", "no task", "proprio", "shared weights", "last-layer baseline"])
@torch.inference_mode()
def test_bf16_is_no_worse_than_the_reference_in_bf16(variant: str, executor: str) -> None:
    config = small_config("siglip2-so400m", variant)
    vat, reference = models(config)
    args = arguments(config, 4)
    truth = reference(*args)
    actions = vat.freeze(batch=4, executor=executor, dtype="bf16")(*args)
    narrow = [x.bfloat16() if x is not None and x.is_floating_point() else x for x in args]
    # Root mean squares: the largest of so few errors says more about the draw than about the executor.
    assert (actions - truth).norm() < 1.5 * (reference.bfloat16()(*narrow).float() - truth).norm()


@pytest.mark.parametrize("variant", ["VAT", "proprio", "shared weights", "last-layer baseline", "action width D/2"])
@pytest.mark.parametrize("executor", ["openvino", pytest.param("native", marks=needs_integers)])
@torch.inference_mode()
def test_int8_follows_the_reference(variant: str, executor: str) -> None:
    config = small_config("siglip2-so400m", variant)
    vat, reference = models(config)
    args = arguments(config, 4)
    frozen = vat.freeze(batch=2, executor=executor, dtype="int8", calibration=calibration(config))
    assert relative(frozen(*args), reference(*args)) < 0.06


@needs_integers
@pytest.mark.parametrize("variant", [name for name in VARIANTS if "diffusion" not in name])
@torch.inference_mode()
def test_int16_is_nearer_to_the_reference_than_bfloat16(variant: str) -> None:
    config = small_config("dinov2-large" if "D/2" in variant or "proprio" in variant else "siglip2-so400m", variant)
    vat, reference = models(config)
    args = arguments(config, 4)
    truth = reference(*args)
    actions = vat.freeze(batch=[1, 3], dtype="int16")(*args)
    narrow = [x.bfloat16() if x is not None and x.is_floating_point() else x for x in args]
    assert 0 < (actions - truth).norm() < (reference.bfloat16()(*narrow).float() - truth).norm() / 3


@needs_integers
@torch.inference_mode()
def test_what_the_passes_leave_out_runs_in_integers_too() -> None:
    config = small_config("dinov2-large", "VAT")
    vat, reference = models(config)
    args = arguments(config, 3)
    for without in (["fuse_norms"], ["fold_layer_scale", "fold_norms"], ["views_as_batch", "merge_projections"]):
        assert relative(vat.freeze(batch=3, dtype="int16", without=without)(*args), reference(*args)) < 5e-3


@needs_integers
def test_int8_without_samples_is_the_native_executors() -> None:
    vat, _ = models(small_config("vit-tiny", "VAT"))
    assert vat.freeze(dtype="int8").target.executor == "native"
    with pytest.raises(ValueError, match="int8 needs calibration"):
        vat.freeze(dtype="int8", executor="openvino")


def test_int16_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    vat, _ = models(small_config("vit-tiny", "VAT"))
    with pytest.raises(ValueError, match="the onednn executor has no int16: it is for x86 processors"):
        vat.freeze(dtype="int16", executor="onednn")
    monkeypatch.setattr("vat_fast.frozen.cpu.has_integers", lambda: False)
    with pytest.raises(ValueError, match="has int16 on x86 processors with AVX2 or AVX-512BW alone"):
        vat.freeze(dtype="int16")


def test_smoothing_saves_what_outlier_channels_would_drown() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(256, 64, generator=generator), torch.randn(48, 64, generator=generator) / 8
    x[:, [3, 40]] *= 60
    observed = Range(*x.aminmax(dim=0), x.square().mean(dim=0))

    def error(*alphas: float) -> float:
        q = quantise_linear(weight, observed, alphas or ALPHAS)
        step = (q.high - q.low) / 255
        even = x if q.smooth is None else x / q.smooth
        rounded = ((even - q.low) / step).round().clamp(0, 255) * step + q.low
        return float((rounded @ (q.weight * q.scale[:, None]).T - x @ weight.T).norm() / (x @ weight.T).norm())

    assert error() < 0.03
    assert error() < error(0.0) / 2
    assert error() <= 1.02 * min(error(alpha) for alpha in ALPHAS)  # what is expected is what happens


def test_even_inputs_are_left_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(256, 64, generator=generator), torch.randn(48, 64, generator=generator)
    observed = Range(*x.aminmax(dim=0), x.square().mean(dim=0))
    assert quantise_linear(weight, observed).smooth is None
    weight[:, 20] *= 64  # weights may be uneven alone: folded norms
    assert quantise_linear(weight, observed).smooth is not None


@pytest.mark.parametrize("bits", [16, 8])
def test_uneven_weights_are_evened_out_without_samples(bits: int) -> None:
    """Both ways: what is large in x is small in W, or folding a norm made W alone uneven."""
    if not has_integers():
        pytest.skip("the native operators have no integers here")
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(256, 64, generator=generator), torch.randn(48, 64, generator=generator) / 8
    assert evening(weight) is None
    x[:, [3, 40]] *= 64
    weight[:, [3, 40]] /= 64
    weight[:, 20] *= 64
    weight[:, 21] = 0.0
    expected = x.double() @ weight.double().T
    errors = [
        float((integer_linear(x, weight, bits, smooth=smooth) - expected).norm() / expected.norm())
        for smooth in (None, evening(weight))
    ]
    assert errors[1] < errors[0] / 3
    assert errors[1] < {16: 5e-4, 8: 2e-2}[bits]


def test_raw_bytes_are_normalised_inside() -> None:
    config = small_config("siglip2-so400m", "VAT")
    vat, _ = models(config)
    S = config.image_size
    images = torch.randint(0, 256, (2, 2, S, S, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    plain, *others = (
        vat.freeze(batch=2, images="uint8", executor=executor)(images, 3)
        for executor in ("torch", "openvino", "onednn", "native")
    )
    assert all(relative(actions, plain) < 1e-5 for actions in others)


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_without_bfloat16_products_openvino_computes_in_float32(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    config = small_config("siglip2-so400m", "VAT")
    vat, reference = models(config)
    args = arguments(config, 4)
    errors, precisions = {}, []
    real = openvino_executor.compile_for_cpu
    monkeypatch.setattr(
        openvino_executor, "compile_for_cpu", lambda graph, dtype: precisions.append(dtype) or real(graph, dtype)
    )
    for there in (True, False):
        monkeypatch.setattr(openvino_executor, "multiplies_bfloat16", lambda device, there=there: there)
        samples = calibration(config) if dtype == "int8" else None
        frozen = vat.freeze(batch=4, executor="openvino", dtype=dtype, calibration=samples)
        assert frozen.plan.dtype == "bf16"
        errors[there] = relative(frozen(*args), reference(*args))
    assert set(precisions) == {"bf16", "fp32"}
    # Only what is rounded on purpose is left: weights, and the inputs of 8-bit products.
    assert 0 < errors[False] < 1.05 * errors[True]


def test_layer_scale_that_is_not_folded() -> None:
    config = small_config("dinov2-large", "VAT")
    vat, reference = models(config)
    args = arguments(config, 3)
    with torch.inference_mode():
        actions = vat.freeze(batch=3, executor="native", without=["fold_layer_scale", "fold_norms"])(*args)
        assert relative(actions, reference(*args)) < 1e-5


def test_without_a_compiler_the_native_executor_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    vat, _ = models(small_config("vit-tiny", "VAT"))
    monkeypatch.setattr("vat_fast.native.library.why_not", lambda: "no C++ compiler was found")
    with pytest.raises(ValueError, match=r"the native executor cannot run: no C\+\+ compiler was found"):
        vat.freeze(executor="native")


def test_onednn_says_where_it_has_no_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    vat, _ = models(small_config("vit-tiny", "VAT"))
    monkeypatch.setattr("vat_fast.frozen.cpu.computes_bfloat16_in_onednn", lambda: False)
    with pytest.raises(ValueError, match="oneDNN has no bf16 products for this processor"):
        vat.freeze(dtype="bf16", executor="onednn")
    monkeypatch.setattr("vat_fast.frozen.cpu.find_spec", lambda name: None)
    assert candidates("bf16") == []
    assert cpu_executor("bf16", vat.config).executor == "torch"
    assert "onednn" in candidates("fp32")


def test_weights_have_seven_bits_where_products_saturate(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.rand(64, 96, generator=generator), torch.randn(48, 96, generator=generator)
    observed = Range(*x.aminmax(dim=0), x.square().mean(dim=0))
    assert quantise_linear(weight, observed).weight.abs().max() == 127
    narrow = quantise_linear(weight, observed, levels=63)
    assert narrow.weight.abs().max() == 63
    assert (narrow.weight * narrow.scale[:, None] - weight).abs().max() <= narrow.scale.max() / 2 * 1.001
    for saturates, levels in ((True, 63), (False, 127)):
        monkeypatch.setattr("vat_fast.frozen.int8.saturates_int8", lambda saturates=saturates: saturates)
        assert weight_levels() == levels


@needs_onednn_bf16
def test_emulated_bfloat16_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    vat, _ = models(small_config("vit-tiny", "VAT"))
    monkeypatch.setattr("vat_fast.frozen.cpu.multiplies_bfloat16", lambda device: False)
    monkeypatch.setattr("vat_fast.frozen.explain.multiplies_bfloat16", lambda device: False)
    with pytest.warns(UserWarning, match="does not multiply bfloat16 itself, so the onednn executor emulates it"):
        frozen = vat.freeze(dtype="bf16", executor="onednn")
    assert "what is bf16 here is emulated, slower than fp32." in frozen.explain()
    assert "what is bf16 here is computed in float32." in vat.freeze(dtype="bf16", executor="openvino").explain()
    assert "bfloat16" not in vat.freeze(executor="openvino").explain()


def test_choice_and_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    vat, _ = models(small_config("vit-tiny", "VAT"))
    monkeypatch.setattr("vat_fast.frozen.cpu.computes_bfloat16_in_onednn", lambda: True)
    assert [candidates(dtype) for dtype in ("fp32", "bf16", "int8", "fp16")] == [
        ["native", "onednn", "openvino"],
        ["onednn", "openvino"],
        ["native", "openvino"] if has_integers() else ["openvino"],
        [],
    ]
    assert candidates("int8", calibrated=False) == (["native"] if has_integers() else [])
    narrow = vat.config.replace(width=96, num_heads=vat.config.num_heads)
    chosen = {dtype: cpu_executor(dtype, narrow) for dtype in ("fp32", "fp16")}
    assert chosen["fp32"] == Choice("native", "a model 96 wide is too small for a trial")
    assert chosen["fp16"] == Choice("torch", "nothing else here computes in fp16")
    monkeypatch.setattr("vat_fast.native.library.why_not", lambda: "no C++ compiler was found")
    assert candidates("fp32") == ["onednn", "openvino"]
    assert cpu_executor("int8", narrow) == Choice("openvino", "the only one here for int8")
    with pytest.raises(ValueError, match="int8 needs calibration"):
        vat.freeze(dtype="int8")
    with pytest.raises(ValueError, match="calibration has no samples"):
        vat.freeze(dtype="int8", calibration=[])
    with pytest.raises(ValueError, match="the onednn executor has no int8, only fp32, bf16"):
        vat.freeze(dtype="int8", executor="onednn")
    with pytest.raises(ValueError, match="the native executor has no bf16, only fp32, int16, int8"):
        vat.freeze(dtype="bf16", executor="native")
    with pytest.raises(ValueError, match="the openvino executor has no fp16"):
        vat.freeze(dtype="fp16", executor="openvino")
