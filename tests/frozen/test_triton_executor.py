"""The launches of a plan, run by Triton's interpreter, against the reference."""

import pytest
import torch

from benchmarks.parity import relative
from benchmarks.variants import small_config
from tests.frozen.test_passes import arguments, models
from vat_fast.frozen.engine import FrozenVAT

SMALL = {"depth": 3}


@pytest.mark.parametrize(
    ("preset", "variant"),
    [
        ("siglip2-so400m", "VAT"),
        ("dinov2-large", "proprio"),
        ("siglip2-giantopt", "tanh GELU"),
        ("siglip2-so400m", "action width D/2"),
        ("siglip2-so400m", "shared weights, last view"),
        ("siglip2-so400m", "last-layer baseline"),
        ("vit-tiny", "additive task"),
    ],
)
@torch.inference_mode()
def test_launches_equal_the_reference(preset: str, variant: str) -> None:
    config = small_config(preset, variant).replace(**SMALL)
    vat, reference = models(config)
    args = arguments(config, 2)
    frozen = FrozenVAT(vat, batch=2, executor="triton")
    assert relative(frozen(*args), reference(*args)) < 1e-5


@torch.inference_mode()
def test_denoising_in_launches() -> None:
    config = small_config("vit-tiny", "diffusion").replace(**SMALL, diffusion_steps=3)
    vat, reference = models(config)
    args = arguments(config, 1)
    frozen = FrozenVAT(vat, executor="triton")
    noise = [torch.Generator().manual_seed(5) for _ in range(2)]
    assert relative(frozen(*args, generator=noise[0]), reference(*args, generator=noise[1])) < 1e-4


@torch.inference_mode()
def test_bytes_and_half_precision() -> None:
    config = small_config("dinov2-large", "VAT").replace(**SMALL)
    vat, reference = models(config)
    S = config.image_size
    images = torch.randint(256, (1, 2, S, S, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    mean, std = (torch.tensor(v) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels = ((images / 255 - mean) / std).permute(0, 1, 4, 2, 3)
    task = torch.tensor([3])
    truth = reference.double()(pixels.double(), task)
    eager = reference.half()(pixels.half(), task)
    frozen = FrozenVAT(vat, executor="triton", dtype="fp16", images="uint8")
    assert frozen.plan.steps[0].op == "patch_embed"
    assert relative(frozen(images, task).double(), truth) < 2 * relative(eager.double(), truth)


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
@pytest.mark.parametrize(("preset", "variant"), [("siglip2-so400m", "VAT"), ("dinov2-large", "proprio")])
@torch.inference_mode()
def test_eight_bits_in_launches(preset: str, variant: str, dtype: str) -> None:
    """Within twice what rounding every linear's weight and input to 8 bits does to the reference."""
    config = small_config(preset, variant).replace(**SMALL)
    vat, reference = models(config)
    args = arguments(config, 2)
    truth = reference(*args)
    kind = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}[dtype]
    for module in reference.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = rounded(module.weight.data, kind)
            module.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0], kind),))
    frozen = FrozenVAT(vat, batch=2, executor="triton", dtype=dtype)
    quantised = [step for step in frozen.plans[2].steps if "quantised" in step.options]
    assert len(quantised) > 5 * (config.layers - 1)
    error, eager = relative(frozen(*args), truth), relative(reference(*args), truth)
    assert 0 < error < 2 * eager


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """To 8 bits and back, a scale per row."""
    from vat_fast.kernels.eight_bit import quantize_ref

    return quantize_ref(x.flatten(0, -2), dtype).dequantize().view(x.shape)
