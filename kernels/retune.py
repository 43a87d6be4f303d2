"""Replace the static model's guesses by measurements, for whoever has the card.

    python -m vat_fast.kernels.retune              print kernels/tables.py with this card's rows measured
    python -m vat_fast.kernels.retune --write      and write it

For every shape class of the tables each configuration that fits is checked against PyTorch and timed. The fastest row
wins; its class is recorded in MEASURED with the card and the date, and the test that holds the tables to the static
model leaves measured targets alone. flash-attn, where it is installed, is timed against the Triton vision attention;
``vision_attention_backend`` then takes the faster.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import torch

from vat_fast.kernels import configs, eight_bit, gemm, low_precision, static_model, tables, timing
from vat_fast.kernels.attention_model import ATTENTION_TABLES, AttentionBlocks, AttentionTable, Problem
from vat_fast.kernels.cross_attention import make_workspace
from vat_fast.kernels.gemm import Workspace
from vat_fast.kernels.patch_embed import PIXEL_CENTRE, launch_patch_embed
from vat_fast.kernels.static_model import Blocks, Device
from vat_fast.kernels.vision_attention import (
    FLASH_ATTN_INSTALLED,
    flash_attention,
    launch_vision_attention,
    vision_attention_ref,
)

TABLES = Path(tables.__file__)
NO_GPU = 2
# Against fp64, relative to its norm. The product alone: rounding the result is most of it.
TOLERANCE = 1e-2
Timer = Callable[[str, Callable[[], object]], float]


def device_of_this_machine() -> Device:
    """The model's description of the card at hand, for its limits on what fits.

    Raises:
        ValueError: the model has no card of that architecture.
    """
    arch = configs.current_arch()
    for device in static_model.DEVICES.values():
        if device.arch in (arch, configs.RELATED_ARCH.get(arch)):
            return device
    raise ValueError(f"static_model knows no device of architecture {arch}; add its figures to DEVICES")


AnyBlocks = TypeVar("AnyBlocks", Blocks, AttentionBlocks)


def fastest(blocks: Sequence[AnyBlocks], time: Callable[[AnyBlocks], float]) -> AnyBlocks:
    """The configuration with the smallest time; those that do not compile or fit (RuntimeError) are left out.

    Raises:
        RuntimeError: none ran.
    """
    times: dict[AnyBlocks, float] = {}
    reasons: list[str] = []
    for candidate in blocks:
        try:
            times[candidate] = time(candidate)
        except RuntimeError as error:
            reasons.append(f"{candidate}: {error}")
    if not times:
        raise RuntimeError(f"no configuration ran; the first of {len(reasons)} reasons: {(reasons or ['none'])[0]}")
    return min(times, key=lambda candidate: times[candidate])


def linear_call(M: int, N: int, K: int, blocks: Blocks, device: str) -> Callable[[], torch.Tensor]:
    """A launch of the 2-byte GEMM at this shape on random data; returns its result."""
    x = torch.randn(M, K, device=device).bfloat16()
    weight = (torch.randn(N, K, device=device) * K**-0.5).bfloat16()
    out = torch.empty(M, N, dtype=torch.bfloat16, device=device)
    scratch = Workspace.allocate(Workspace.sizes(M, N, vars(blocks)), device)

    def call() -> torch.Tensor:
        gemm.launch_linear(x, weight, out, workspace=scratch, config=dict(vars(blocks)))
        return out

    _check(call(), x.double() @ weight.double().t(), blocks)
    return call


def quant_linear_call(M: int, N: int, K: int, blocks: Blocks, device: str) -> Callable[[], torch.Tensor]:
    """The same for the 1-byte GEMM, in int8: every target has it, and fp8 moves the same bytes."""
    x = eight_bit.quantize_ref(torch.randn(M, K, device=device), torch.int8)
    weight, scale = eight_bit.quantize_weight(torch.randn(N, K, device=device), torch.int8)
    out = torch.empty(M, N, dtype=torch.bfloat16, device=device)
    scratch = Workspace.allocate(Workspace.sizes(M, N, vars(blocks)), device)

    def call() -> torch.Tensor:
        low_precision.launch_quant_linear(x, weight, scale, out, workspace=scratch, config=dict(vars(blocks)))
        return out

    _check(call(), low_precision.quant_linear_ref(x, weight, scale, dtype=torch.float64), blocks)
    return call


def patch_embed_call(M: int, N: int, K: int, blocks: Blocks, device: str) -> Callable[[], torch.Tensor]:
    """The patch embedding of about M patches of 14 x 14 pixels, two views of 16 x 16 patches a sample."""
    side, patch = 16, 14
    batch = max(1, M // (2 * side * side))
    images = torch.randint(0, 256, (batch, 2, side * patch, side * patch, 3), dtype=torch.uint8, device=device)
    weight = (torch.randn(N, K, device=device) * 0.01).bfloat16()
    weight[:, 3 * patch * patch :] = 0
    table = torch.randn(side * side, N, device=device)
    out = torch.empty(batch, 2, side * side, N, dtype=torch.bfloat16, device=device)
    config = {name: value for name, value in vars(blocks).items() if name != "SPLIT_K"}

    def call() -> torch.Tensor:
        launch_patch_embed(images, weight, table, out, patch=patch, config=dict(config))
        return out

    pixels = (images.double() - PIXEL_CENTRE).unflatten(3, (-1, patch)).unflatten(2, (-1, patch))
    features = pixels.transpose(3, 4).flatten(4).flatten(2, 3)
    _check(call(), features @ weight[:, : features.shape[-1]].double().t() + table.double(), blocks)
    return call


def _check(actual: torch.Tensor, truth: torch.Tensor, what: object) -> None:
    error = ((actual.double() - truth).norm() / truth.norm()).item()
    if not error < TOLERANCE:
        raise RuntimeError(f"wrong result with {what}: relative error {error:.1e}")


TABLE_OPS = {
    "LINEAR": linear_call,
    "QUANT_LINEAR": quant_linear_call,
    "GROUPED_LINEAR": linear_call,
    "GROUPED_QUANT_LINEAR": quant_linear_call,
    "PATCH_EMBED": patch_embed_call,
}


AttentionTimer = Callable[[str, Problem, AttentionBlocks], float]


def attention_call(name: str, problem: Problem, blocks: AttentionBlocks, device: str) -> Callable[[], object]:
    """A launch of the attention that a table is for, forward or backward, on random data; checked."""
    from vat_fast.kernels.proof.attention_case import attention_case

    case = attention_case(ATTENTION_TABLES[name], problem, vars(blocks))
    tensors = {key: x.to(device) for key, x in case.make().items()}
    more: dict[str, Any] = {}
    if case.op == "cross_attention":  # scratch is made once, as by whoever acts
        more["workspace"] = make_workspace(tensors["q"], tensors["kv"], problem.heads, vars(blocks))

    def call() -> object:
        return case.launch(tensors, **more)

    call()
    assert case.reference is not None
    truth = case.reference({key: x.double() for key, x in tensors.items()})
    for key in case.outputs:
        _check(tensors[key], truth[key], blocks)
    return call


def retuned_attention(
    device: Device, time: AttentionTimer, names: Sequence[str]
) -> Iterator[tuple[str, list[tables.Row]]]:
    """(table's name, this device's rows) by `time(name, problem, blocks)`."""
    for name in names:
        table = ATTENTION_TABLES[name]

        def choose(problem: Problem, name: str = name, table: AttentionTable = table) -> AttentionBlocks:
            fitting = [b for b in table.candidates(device.arch) if problem.keys // b.BLOCK_N >= b.SPLITS]
            return fastest(fitting, lambda candidate: time(name, problem, candidate))

        yield name, table.table_of(choose)


def retuned(
    device: Device, time: Callable[[str, int, int, int, Blocks], float], names: Sequence[str]
) -> Iterator[tuple[str, list[tables.Row]]]:
    """(table's name, this device's rows) by `time(name, M, N, K, blocks)`."""
    for name in names:
        spec = static_model.TABLES[name]

        def choose(M: int, N: int, K: int, name: str = name, spec: static_model.TableSpec = spec) -> Blocks:
            blocks = list(spec.candidates(M, N, K, device))
            return fastest(blocks, lambda candidate: time(name, M, N, K, candidate))

        yield name, spec.table_of(choose)


TABLE_NAMES = (*TABLE_OPS, *ATTENTION_TABLES)

# Head dims of the backbones, and views of 256 patches: a rollout, a few, a training batch.
HEAD_DIMS = (64, 72, 96)
VIEWS = (2, 8, 32)
PATCHES, HEADS = 256, 16
FlashRows = list[tuple[int, int | None, float, float]]


def vision_attention_calls(head_dim: int, views: int, device: str) -> dict[str, Callable[[], torch.Tensor]]:
    """Triton's and flash-attn's vision attention on the same random data, each checked."""
    qkv = torch.randn(views, PATCHES, 3 * HEADS * head_dim, device=device).bfloat16()
    scale = head_dim**-0.5
    out = torch.empty(views, PATCHES, HEADS * head_dim, dtype=torch.bfloat16, device=device)
    lse = torch.empty(views, HEADS, PATCHES, device=device)

    def ours() -> torch.Tensor:
        launch_vision_attention(qkv, HEADS, scale, out, lse)
        return out

    def flash() -> torch.Tensor:
        return flash_attention(qkv, HEADS, scale)

    calls = {"triton": ours, "flash_attn": flash}
    truth = vision_attention_ref(qkv.double(), HEADS, scale)
    for name, call in calls.items():
        _check(call(), truth, name)
    return calls


def flash_rows(time: Callable[[str, int, int], float]) -> FlashRows:
    """Rows of tables.FLASH_ATTENTION for one card by `time(provider, head dim, views)`; the last bound is open."""
    return [
        (
            head_dim,
            None if views == VIEWS[-1] else views * PATCHES,
            round(time("triton", head_dim, views), 2),
            round(time("flash_attn", head_dim, views), 2),
        )
        for head_dim in HEAD_DIMS
        for views in VIEWS
    ]


def source(rows: dict[str, list[tables.Row]], arch: configs.Arch, note: str, flash: FlashRows | None = None) -> str:
    """kernels/tables.py with `rows` and, if measured, `flash` in place of those of `arch`, and `note` in MEASURED."""
    contents = {name: dict(getattr(tables, name)) for name in TABLE_NAMES}
    for name, new in rows.items():
        contents[name][arch] = new
    choices = tables.FLASH_ATTENTION if flash is None else tables.FLASH_ATTENTION | {arch: flash}
    return static_model.format_tables(contents, tables.MEASURED | {arch: note}, choices)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 no GPU."""
    parser = argparse.ArgumentParser(prog="python -m vat_fast.kernels.retune", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"replace {TABLES.name}")
    parser.add_argument("--tables", nargs="+", choices=TABLE_NAMES, default=list(TABLE_NAMES))
    parser.add_argument("--samples", type=int, default=30)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("retune needs a CUDA or ROCm device and PyTorch sees none; the tables stay as they are", file=sys.stderr)
        return NO_GPU
    arch, device = configs.current_arch(), device_of_this_machine()

    def time(name: str, M: int, N: int, K: int, blocks: Blocks) -> float:
        call = TABLE_OPS[name](M, N, K, blocks, "cuda")
        result = timing.time_graph(name, call, options.samples).median_us
        print(f"{name} M={M} N={N} K={K} {blocks}: {result:.1f} us", file=sys.stderr, flush=True)
        return result

    def time_attention(name: str, problem: Problem, blocks: AttentionBlocks) -> float:
        call = attention_call(name, problem, blocks, "cuda")
        result = timing.time_graph(name, call, options.samples).median_us
        print(f"{name} {problem} {blocks}: {result:.1f} us", file=sys.stderr, flush=True)
        return result

    rows = dict(retuned(device, time, [name for name in options.tables if name in TABLE_OPS]))
    rows |= retuned_attention(device, time_attention, [name for name in options.tables if name in ATTENTION_TABLES])
    note = f"{torch.cuda.get_device_name()}, {date.today()}, {timing.METHOD}"
    flash = None
    if FLASH_ATTN_INSTALLED:

        def time_provider(provider: str, head_dim: int, views: int) -> float:
            call = vision_attention_calls(head_dim, views, "cuda")[provider]
            result = timing.time_graph(provider, call, options.samples).median_us
            print(f"{provider} head dim {head_dim}, {views} views: {result:.1f} us", file=sys.stderr, flush=True)
            return result

        flash = flash_rows(time_provider)
    else:
        print("flash-attn is not installed: it is not compared with Triton's attention", file=sys.stderr)
    text = source(rows, arch, note, flash)
    print(text)
    if options.write:
        TABLES.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
