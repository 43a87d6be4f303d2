"""Patch embedding from uint8 images against plain PyTorch in fp64."""

import pytest
import torch
import torch.nn.functional as F

from vat_fast.kernels import gemm
from vat_fast.kernels.patch_embed import (
    launch_patch_embed,
    pack_patch_embed,
    patch_embed,
    patch_embed_config,
    patch_embed_ref,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CASES = [  # patch, patches per side, prefix tokens, D, views, extra pixels (rows, columns), crop
    (14, 4, 5, 72, 2, (5, 9), (3, 7)),
    (16, 3, 0, 40, 1, (0, 0), (0, 0)),
    (14, 5, 0, 133, 3, (1, 2), (1, 2)),
]


def inputs(patch: int, side: int, prefix: int, width: int, views: int, extra: tuple[int, int], batch: int = 2):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * scale

    height, image_width = side * patch + extra[0], side * patch + extra[1]
    images = torch.randint(0, 256, (batch, views, height, image_width, 3), dtype=torch.uint8, generator=generator)
    weight, bias = normal(width, 3, patch, patch, scale=0.04), normal(width)
    return images, weight, bias, normal(side * side, width), normal(prefix, width) if prefix else None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("patch", "side", "prefix", "width", "views", "extra", "crop"), CASES)
def test_equals_the_reference(
    patch, side, prefix, width, views, extra, crop, dtype, trace, assert_error_at_most_2x_eager
):
    images, *parameters = inputs(patch, side, prefix, width, views, extra)
    weight, table = pack_patch_embed(*parameters, MEAN, STD, dtype)
    out = torch.full((2, views, prefix + side * side, width), float("nan"), dtype=dtype)
    with trace({"images": images, "weight": weight, "table": table, "out": out}, outputs=("out",)) as report:
        launch_patch_embed(images, weight, table, out, patch=patch, prefix=prefix, crop=crop)
    report.check()
    assert len(report.launches) == 1

    def reference(wide: torch.dtype) -> torch.Tensor:
        cast = [None if value is None else value.to(wide) for value in parameters]
        return patch_embed_ref(images, *cast, MEAN, STD, crop)

    truth, eager = reference(torch.float64), reference(dtype)
    assert_error_at_most_2x_eager(out, eager, truth)
    on_cpu = patch_embed(images, weight, table, patch, prefix, *crop)
    assert_error_at_most_2x_eager(on_cpu, eager, truth)


def test_extreme_pixels_are_exact():
    """Black, white and grey images differ by what the fp64 weights say: 0, 128 and 255 reach the product unrounded."""
    images, *parameters = inputs(14, 2, 0, 32, 1, (0, 0), batch=3)
    images[0], images[1], images[2] = 0, 128, 255
    weight, table = pack_patch_embed(*parameters, MEAN, STD, torch.float32)
    out = torch.full((3, 1, 4, 32), float("nan"))
    launch_patch_embed(images, weight, table, out, patch=14)
    torch.testing.assert_close(out[1, 0], table, rtol=0, atol=0)
    truth = patch_embed_ref(images, *(value.double() for value in parameters[:3]), None, MEAN, STD)
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)


def test_leaves_statistics_for_the_first_norm(assert_error_at_most_2x_eager):
    images, *parameters = inputs(14, 4, 5, 136, 2, (0, 0))
    weight, table = pack_patch_embed(*parameters, MEAN, STD, torch.float32)
    blocks = patch_embed_config(84, 136, torch.float32)
    stats = gemm.RowStats(
        torch.full((2, gemm.stats_parts(136, blocks["BLOCK_N"]), 84), float("nan")), blocks["BLOCK_N"]
    )
    out = torch.full((2, 2, 21, 136), float("nan"))
    launch_patch_embed(images, weight, table, out, patch=14, prefix=5, stats_out=stats, config=blocks)
    projection = torch.randn(40, 136, generator=torch.Generator().manual_seed(1))
    y = torch.full((84, 40), float("nan"))
    gemm.launch_linear(out.view(84, 136), projection, y, norm=stats, row_sum_N=projection.double().sum(1).float())
    x = out.view(84, 136)
    truth = gemm.norm_linear_ref(x.double(), projection.double(), None)
    assert_error_at_most_2x_eager(y, F.linear(F.layer_norm(x, (136,), eps=1e-6), projection), truth)


def test_non_contiguous_views():
    """Every second frame of a video buffer, the views in a slice of a wider axis."""
    images, *parameters = inputs(14, 3, 0, 32, 2, (2, 2), batch=1)
    weight, table = pack_patch_embed(*parameters, MEAN, STD, torch.float32)
    buffer = torch.zeros(3, 4, *images.shape[2:], dtype=torch.uint8)
    buffer[1:2, 1:3] = images
    out, again = (torch.full((1, 2, 9, 32), float("nan")) for _ in range(2))
    launch_patch_embed(images, weight, table, out, patch=14, crop=(1, 2))
    launch_patch_embed(buffer[1:2, 1:3], weight, table, again, patch=14, crop=(1, 2))
    torch.testing.assert_close(again, out, rtol=0, atol=0)


def test_bad_input_is_named():
    images, *parameters = inputs(14, 3, 0, 32, 2, (2, 2), batch=1)
    weight, table = pack_patch_embed(*parameters, MEAN, STD, torch.float32)
    out = torch.empty(1, 2, 9, 32)

    def launch(images=images, weight=weight, table=table, out=out, patch=14, **more):
        launch_patch_embed(images, weight, table, out, patch=patch, **more)

    with pytest.raises(ValueError, match="must be uint8"):
        launch(images=images.float())
    with pytest.raises(ValueError, match="rows must be contiguous"):
        launch(images=images.permute(0, 1, 3, 2, 4))
    with pytest.raises(ValueError, match="leaves the 44x44 image"):
        launch(crop=(3, 0))
    with pytest.raises(ValueError, match="needs the weight of pack_patch_embed"):
        launch(patch=16)
    with pytest.raises(ValueError, match="square grid"):
        launch(prefix=1)
    with pytest.raises(ValueError, match="table must be fp32"):
        launch(table=table.half())
    with pytest.raises(ValueError, match="with evenly spaced rows"):
        launch(out=out.half())


def test_custom_op_passes_opcheck_and_compiles():
    images, *parameters = inputs(14, 2, 3, 32, 2, (4, 4))
    weight, table = pack_patch_embed(*parameters, MEAN, STD, torch.float32)
    arguments = (images, weight, table, 14, 3, 1, 2)
    torch.library.opcheck(torch.ops.vat_fast.patch_embed, arguments)
    eager = patch_embed(*arguments)

    def tokens(*arguments):
        return patch_embed(*arguments) * 2

    torch.testing.assert_close(torch.compile(tokens, fullgraph=True, backend="aot_eager")(*arguments), eager * 2)
    torch.testing.assert_close(patch_embed._init_fn(*arguments), eager, rtol=1e-5, atol=1e-5)
