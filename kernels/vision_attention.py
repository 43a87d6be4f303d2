"""Self-attention of the vision stream: every view attends to itself, heads read from one packed projection.

The projection's output (N, P, 3*D) holds queries, keys and values side by side; N is batch times views. The kernels
read and write it through strides, so that no head is ever copied. Kernels: `attention_forward`, `attention_backward`.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from vat_fast.kernels import (
    attention_backward,
    attention_forward,
    attention_math,
    attention_tiles,
    configs,
    tables,
)

# float32 uses no tensor cores; its tiles are small because products in exact float32 keep operands in registers.
_FLOAT32 = {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
_BACKWARD_FLOAT32 = {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}

CONFIGS = configs.attention_rules(tables.VISION_ATTENTION, _FLOAT32)
BACKWARD_CONFIGS = configs.attention_rules(tables.VISION_ATTENTION_BACKWARD, _BACKWARD_FLOAT32)


def vision_attention_ref(qkv_NP3D: torch.Tensor, num_heads: int, scale: float) -> torch.Tensor:
    """Plain eager attention in the input's own dtype: softmax(scale * Q K^T) V for each of N views and each head.

    Args:
        qkv_NP3D: (N, P, 3*D), queries, keys and values in that order along the last axis; any float dtype.
        num_heads: H, divides D.
        scale: multiplies the scores, usually head_dim ** -0.5.

    Returns:
        (N, P, D) in the input's dtype.
    """
    q, k, v = (attention_math.split_heads(x, num_heads) for x in qkv_NP3D.chunk(3, dim=-1))
    weights = torch.softmax(q @ k.transpose(-1, -2) * scale, dim=-1)
    return attention_math.merge_heads(weights @ v)


# --- launchers ---------------------------------------------------------------------------------------------------


def _check(qkv_NP3D: torch.Tensor, num_heads: int, scale: float) -> None:
    if qkv_NP3D.dim() != 3 or num_heads < 1 or qkv_NP3D.shape[-1] % (3 * num_heads) != 0:
        raise ValueError(
            f"qkv has shape {tuple(qkv_NP3D.shape)}, expected (N, P, 3*D) with D divisible by num_heads={num_heads}."
        )
    if not qkv_NP3D.is_floating_point():
        raise ValueError(f"qkv has dtype {qkv_NP3D.dtype}, expected a floating-point dtype.")
    if not scale > 0:
        raise ValueError(f"scale is {scale}, expected a positive number such as head_dim ** -0.5.")


def _shape_class(qkv: torch.Tensor, num_heads: int) -> dict[str, int]:
    views, patches, width = qkv.shape
    return {
        "bits": qkv.element_size() * 8,
        "head_dim": width // (3 * num_heads),
        "programs": views * num_heads * attention_tiles.num_tiles(patches, 64),
    }


def _columns(qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    width = qkv.shape[-1] // 3
    return qkv[..., :width], qkv[..., width : 2 * width], qkv[..., 2 * width :]


def launch_vision_attention(
    qkv_NP3D: torch.Tensor,
    num_heads: int,
    scale: float,
    out_NPD: torch.Tensor,
    lse_NHP: torch.Tensor,
    config: Mapping[str, int] | None = None,
) -> None:
    """One launch: write out (N, P, D) and lse (N, H, P) float32 of qkv (N, P, 3*D), all with contiguous rows.

    `config` is taken instead of the shipped configuration.
    Raises ValueError on a wrong shape, a dtype other than float32, float16 and bfloat16, or rows with gaps.
    """
    _check(qkv_NP3D, num_heads, scale)
    attention_tiles.check_dtype("qkv", qkv_NP3D)
    attention_tiles.check_rows("qkv", qkv_NP3D)
    attention_tiles.check_outputs(out_NPD, lse_NHP, (*qkv_NP3D.shape[:2], qkv_NP3D.shape[2] // 3), num_heads)
    if config is None:
        config = configs.pick(CONFIGS, configs.current_arch(), **_shape_class(qkv_NP3D, num_heads))
    q, k, v = _columns(qkv_NP3D)
    attention_forward.launch_forward(q, k, v, out_NPD, lse_NHP, num_heads, scale, config)


def launch_vision_attention_backward(
    grad_out_NPD: torch.Tensor,
    qkv_NP3D: torch.Tensor,
    out_NPD: torch.Tensor,
    lse_NHP: torch.Tensor,
    num_heads: int,
    scale: float,
    dqkv_NP3D: torch.Tensor,
    config: Mapping[str, int] | None = None,
) -> None:
    """Three launches: write dqkv (N, P, 3*D), packed like qkv, from the forward's output and log-sum-exp.

    `config` is taken instead of the shipped configuration.
    """
    _check(qkv_NP3D, num_heads, scale)
    attention_tiles.check_dtype("qkv", qkv_NP3D)
    for name, x in (("qkv", qkv_NP3D), ("grad_out", grad_out_NPD), ("out", out_NPD), ("dqkv", dqkv_NP3D)):
        attention_tiles.check_rows(name, x)
    if config is None:
        config = configs.pick(BACKWARD_CONFIGS, configs.current_arch(), **_shape_class(qkv_NP3D, num_heads))
    q, k, v = _columns(qkv_NP3D)
    dq, dk, dv = _columns(dqkv_NP3D)
    attention_backward.launch_backward(grad_out_NPD, q, k, v, out_NPD, lse_NHP, dq, dk, dv, num_heads, scale, config)


# --- custom ops --------------------------------------------------------------------------------------------------


def _empty_outputs(qkv: torch.Tensor, num_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    views, patches, width = qkv.shape
    out = qkv.new_empty(views, patches, width // 3)
    return out, qkv.new_empty(views, num_heads, patches, dtype=attention_math.wide(qkv.dtype))


@torch.library.custom_op("vat_fast::vision_attention", mutates_args=(), device_types="cuda")
def _vision_attention(qkv: torch.Tensor, num_heads: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = _empty_outputs(qkv, num_heads)
    with torch.cuda.device(qkv.device):
        launch_vision_attention(qkv, num_heads, scale, out, lse)
    return out, lse


@_vision_attention.register_kernel("cpu")
def _(qkv: torch.Tensor, num_heads: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    _check(qkv, num_heads, scale)
    return attention_math.attention_torch(*_columns(qkv), num_heads, scale)[:2]


@_vision_attention.register_fake
def _(qkv: torch.Tensor, num_heads: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty_outputs(qkv, num_heads)


@torch.library.custom_op("vat_fast::vision_attention_backward", mutates_args=(), device_types="cuda")
def _vision_attention_backward(
    grad_out: torch.Tensor, qkv: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, num_heads: int, scale: float
) -> torch.Tensor:
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    with torch.cuda.device(qkv.device):
        launch_vision_attention_backward(grad_out.contiguous(), qkv, out, lse, num_heads, scale, dqkv)
    return dqkv


@_vision_attention_backward.register_kernel("cpu")
def _(
    grad_out: torch.Tensor, qkv: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, num_heads: int, scale: float
) -> torch.Tensor:
    grads = attention_math.attention_backward_torch(grad_out, *_columns(qkv), out, lse, num_heads, scale)
    return torch.cat(grads, dim=-1)


@_vision_attention_backward.register_fake
def _(
    grad_out: torch.Tensor, qkv: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, num_heads: int, scale: float
) -> torch.Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output) -> None:
    qkv, ctx.num_heads, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(qkv, out, lse)


def _autograd_backward(ctx, grad_out, grad_lse):
    qkv, out, lse = ctx.saved_tensors
    return _vision_attention_backward(grad_out, qkv, out, lse, ctx.num_heads, ctx.scale), None, None


_vision_attention.register_autograd(_autograd_backward, setup_context=_setup_context)


# --- which implementation runs -----------------------------------------------------------------------------------

BACKENDS = ("auto", "triton", "flash_attn", "torch")
FLASH_ATTN_INSTALLED = importlib.util.find_spec("flash_attn") is not None
FLASH_ATTN_MAX_HEAD_DIM = 256
# Those that flash-attn has kernels for; it pads others. Source: csrc/flash_attn/src of flash-attention 2.
FLASH_ATTN_HEAD_DIMS = (32, 64, 96, 128, 192, 256)

_selected = os.environ.get("VAT_FAST_VISION_ATTENTION", "auto")


@dataclass(frozen=True)
class BackendChoice:
    """Which implementation runs, and the reason in one sentence."""

    name: str
    reason: str


def set_vision_attention_backend(name: str) -> None:
    """Ask for one of `BACKENDS` from now on. The environment variable VAT_FAST_VISION_ATTENTION sets the first value.

    Raises:
        ValueError: unknown name.
    """
    if name not in BACKENDS:
        raise ValueError(f"vision attention backend is {name!r}, expected one of {', '.join(BACKENDS)}.")
    global _selected
    _selected = name


def _flash_attn_obstacle(device_type: str, dtype: torch.dtype, head_dim: int) -> str:
    """Why flash-attn cannot run here; empty if it can."""
    if not FLASH_ATTN_INSTALLED:
        return "flash-attn is not installed"
    if device_type != "cuda":
        return f"flash-attn needs a CUDA or ROCm device and the tensor is on {device_type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"flash-attn takes float16 and bfloat16, not {dtype}"
    if head_dim % 8 or head_dim > FLASH_ATTN_MAX_HEAD_DIM:
        return f"flash-attn takes head dims that are multiples of 8 up to {FLASH_ATTN_MAX_HEAD_DIM}, not {head_dim}"
    return ""


def _faster(head_dim: int, rows: int) -> BackendChoice:
    """Of flash-attn and Triton, both of which can run: what `retune` measured here, else what padding says."""
    measured = tables.FLASH_ATTENTION.get(configs.current_arch(), [])
    for dim, most_rows, triton_us, flash_us in measured:
        if dim == head_dim and (most_rows is None or rows <= most_rows):
            name = "flash_attn" if flash_us < triton_us else "triton"
            return BackendChoice(
                name, f"measured on this architecture: Triton {triton_us} us, flash-attn {flash_us} us"
            )
    if head_dim in FLASH_ATTN_HEAD_DIMS:
        return BackendChoice("flash_attn", f"not measured here, and flash-attn has kernels for head dim {head_dim}")
    return BackendChoice("triton", f"not measured here, and flash-attn would pad head dim {head_dim}")


def vision_attention_backend(device_type: str, dtype: torch.dtype, head_dim: int, rows: int = 512) -> BackendChoice:
    """The implementation that `vision_attention` runs for such a tensor, with the reason.

    "auto": on the CPU, torch ops. On a GPU where flash-attn is installed and can run, the faster of it and the Triton
    kernels as `python -m vat_fast.kernels.retune` measured them on this architecture (kernels/tables.py). Where nobody
    measured: flash-attn for the head dims it has kernels for, since it is tuned by its authors; Triton for others,
    such as 72, which flash-attn pads to the next (72 to 96 is a third more work, 72 to 64 + 8 is a ninth).

    Args:
        device_type: `tensor.device.type`, such as "cuda" or "cpu".
        dtype: of the packed projection.
        head_dim: width of one head.
        rows: tokens of all views together.

    Raises:
        ValueError: the backend asked for is unknown or cannot run on such a tensor; says why.
    """
    if _selected not in BACKENDS:
        raise ValueError(f"VAT_FAST_VISION_ATTENTION is {_selected!r}, expected one of {', '.join(BACKENDS)}.")
    obstacle = _flash_attn_obstacle(device_type, dtype, head_dim)
    if _selected == "torch":
        return BackendChoice("torch", "asked for by name")
    if _selected == "flash_attn":
        if obstacle:
            raise ValueError(f"vision attention backend 'flash_attn' was asked for, but {obstacle}.")
        return BackendChoice("flash_attn", "asked for by name")
    if device_type == "cpu":
        if _selected == "triton":
            raise ValueError(
                "vision attention backend 'triton' was asked for, but the tensor is on the CPU: move it to a GPU or "
                "choose 'auto'."
            )
        return BackendChoice("torch", "the tensor is on the CPU, where torch ops do the same maths")
    if _selected == "triton":
        return BackendChoice("triton", "asked for by name")
    return BackendChoice("triton", obstacle) if obstacle else _faster(head_dim, rows)


def flash_attention(qkv_NP3D: torch.Tensor, num_heads: int, scale: float) -> torch.Tensor:
    """`vision_attention` by flash-attn, which must be installed; float16 or bfloat16 on a GPU."""
    from flash_attn import flash_attn_qkvpacked_func

    qkv_NP3Hd = qkv_NP3D.unflatten(-1, (3, num_heads, -1))
    return flash_attn_qkvpacked_func(qkv_NP3Hd, softmax_scale=scale).flatten(2)


def vision_attention(qkv_NP3D: torch.Tensor, num_heads: int, scale: float) -> torch.Tensor:
    """Self-attention within each of N = B*V views; differentiable. `vision_attention_backend` says what runs.

    Args:
        qkv_NP3D: (N, P, 3*D), queries, keys and values in that order; float32, float16 or bfloat16 (float64 too on
            the CPU). May be a strided view whose rows are contiguous.
        num_heads: H, divides D.
        scale: positive; multiplies the scores.

    Returns:
        (N, P, D) in the input's dtype, contiguous.

    Raises:
        ValueError: wrong shape, dtype or strides, or a backend was asked for that cannot run.
    """
    _check(qkv_NP3D, num_heads, scale)
    head_dim = qkv_NP3D.shape[-1] // (3 * num_heads)
    rows = qkv_NP3D.shape[0] * qkv_NP3D.shape[1]
    choice = vision_attention_backend(qkv_NP3D.device.type, qkv_NP3D.dtype, head_dim, rows)
    if choice.name == "flash_attn":
        return flash_attention(qkv_NP3D, num_heads, scale)
    if choice.name == "torch" and qkv_NP3D.device.type != "cpu":
        return vision_attention_ref(qkv_NP3D, num_heads, scale)
    return _vision_attention(qkv_NP3D, num_heads, scale)[0]
