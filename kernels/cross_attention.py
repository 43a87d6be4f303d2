"""Cross-attention of the action stream: action and extra tokens attend to the extra tokens and to all vision tokens.

Keys and values of the vision tokens stay where the D -> 5*D projection put them (its last 2*D columns); those of the
few extra tokens come from a small tensor of their own. A batch element has one short list of queries (1..128) and
several hundred keys: with one program per head most of a GPU would idle, so the keys are split over programs
(flash-decoding, Dao et al. 2023), each of which leaves the attention over its own keys and their log-sum-exp.

The shares are combined inside the same launch by whichever program of a head arrives last, known from an atomic
counter. A second kernel would be simpler, but this op sits on the action stream's critical path, where one more launch
costs more than the combination itself. Nobody waits: a program that is not last is done. The sum runs in split order,
so the result does not depend on who was last. Kernels: `attention_forward`, `attention_backward`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vat_fast.kernels import (
    attention_backward,
    attention_forward,
    attention_map,
    attention_math,
    attention_tiles,
    configs,
    tables,
)
from vat_fast.kernels.attention_forward import SplitWorkspace

# float32 is for checking, see `vision_attention`.
_FLOAT32 = {"BLOCK_M": 32, "BLOCK_N": 32, "SPLITS": 8, "num_warps": 4, "num_stages": 1}
_BACKWARD_FLOAT32 = {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}

CONFIGS = configs.attention_rules(tables.CROSS_ATTENTION, _FLOAT32)
FULL_CONFIGS = configs.attention_rules(tables.CROSS_ATTENTION_FULL, _FLOAT32)
BACKWARD_CONFIGS = configs.attention_rules(tables.CROSS_ATTENTION_BACKWARD, _BACKWARD_FLOAT32)


def cross_attention_ref(
    q_BTD: torch.Tensor,
    kv_vision_BS2D: torch.Tensor,
    num_heads: int,
    scale: float,
    kv_extra_BE2D: torch.Tensor | None = None,
    need_map: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Plain eager attention in the inputs' own dtype; same arguments and result as `cross_attention`."""
    kv = kv_vision_BS2D if kv_extra_BE2D is None else torch.cat([kv_extra_BE2D, kv_vision_BS2D], dim=1)
    k_BSD, v_BSD = kv.chunk(2, dim=-1)
    q, k, v = (attention_math.split_heads(x, num_heads) for x in (q_BTD, k_BSD, v_BSD))
    map_BHTS = torch.softmax(q @ k.transpose(-1, -2) * scale, dim=-1)
    out = attention_math.merge_heads(map_BHTS @ v)
    return (out, map_BHTS) if need_map else out


# --- launchers ---------------------------------------------------------------------------------------------------


def _check(
    q: torch.Tensor, kv_vision: torch.Tensor, kv_extra: torch.Tensor | None, num_heads: int, scale: float
) -> None:
    if q.dim() != 3 or num_heads < 1 or q.shape[-1] % num_heads != 0:
        raise ValueError(f"q has shape {tuple(q.shape)}, expected (B, T, D) with D divisible by num_heads={num_heads}.")
    for name, kv in (("kv_vision", kv_vision), ("kv_extra", kv_extra)):
        if kv is None:
            continue
        if kv.dim() != 3 or kv.shape[0] != q.shape[0] or kv.shape[2] != 2 * q.shape[2] or kv.shape[1] < 1:
            raise ValueError(
                f"{name} has shape {tuple(kv.shape)}, expected ({q.shape[0]}, at least 1, {2 * q.shape[2]}): keys and "
                "values side by side, each as wide as q."
            )
        if kv.dtype != q.dtype:
            raise ValueError(f"{name} has dtype {kv.dtype}, expected q's {q.dtype}.")
    if not q.is_floating_point():
        raise ValueError(f"q has dtype {q.dtype}, expected a floating-point dtype.")
    if not scale > 0:
        raise ValueError(f"scale is {scale}, expected a positive number such as head_dim ** -0.5.")


def _check_for_kernels(
    q: torch.Tensor, kv_vision: torch.Tensor, kv_extra: torch.Tensor | None, num_heads: int, scale: float
) -> None:
    _check(q, kv_vision, kv_extra, num_heads, scale)
    attention_tiles.check_dtype("q", q)
    attention_tiles.check_rows("q", q)
    attention_tiles.check_rows("kv_vision", kv_vision)
    if kv_extra is not None:
        attention_tiles.check_rows("kv_extra", kv_extra)


def _columns(kv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    width = kv.shape[-1] // 2
    return kv[..., :width], kv[..., width:]


def _pick(table: configs.ConfigTable, q: torch.Tensor, num_heads: int) -> dict[str, int]:
    batch, num_queries, width = q.shape
    return configs.pick(
        table,
        configs.current_arch(),
        bits=q.element_size() * 8,
        head_dim=width // num_heads,
        programs=batch * num_heads * attention_tiles.num_tiles(num_queries, 64),
    )


def _forward_configs(num_queries: int) -> configs.ConfigTable:
    """Queries that nearly fill their last 64 have a table of their own: smaller tiles would save them nothing."""
    return CONFIGS if (num_queries - 1) % 64 < attention_tiles.ACTION_TOKENS else FULL_CONFIGS


def make_workspace(
    q_BTD: torch.Tensor, kv_vision_BS2D: torch.Tensor, num_heads: int, config: Mapping[str, int] | None = None
) -> SplitWorkspace | None:
    """Scratch for `launch_cross_attention` at these shapes on the current device; None if it needs none.

    May be kept and used again, also by a replayed CUDA graph, but not by two launches at the same time. `config` is
    taken instead of the shipped configuration, and the launch must be given the same.
    """
    batch, num_queries, width = q_BTD.shape
    if config is None:
        config = _pick(_forward_configs(q_BTD.shape[1]), q_BTD, num_heads)
    splits = min(config["SPLITS"], kv_vision_BS2D.shape[1] // config["BLOCK_N"])
    if splits < 2:
        return None
    return SplitWorkspace.make(
        batch, num_heads, num_queries, width // num_heads, splits, config["BLOCK_M"], q_BTD.device
    )


def launch_cross_attention(
    q_BTD: torch.Tensor,
    kv_vision_BS2D: torch.Tensor,
    num_heads: int,
    scale: float,
    out_BTD: torch.Tensor,
    lse_BHT: torch.Tensor,
    kv_extra_BE2D: torch.Tensor | None = None,
    workspace: SplitWorkspace | None = None,
    config: Mapping[str, int] | None = None,
) -> None:
    """One launch: write out (B, T, D) and lse (B, H, T) float32. Keys are split as `make_workspace` decided.

    `config` is taken instead of the shipped configuration.
    Raises ValueError on wrong shapes, a dtype other than float32, float16 and bfloat16, or rows with gaps.
    """
    _check_for_kernels(q_BTD, kv_vision_BS2D, kv_extra_BE2D, num_heads, scale)
    attention_tiles.check_outputs(out_BTD, lse_BHT, tuple(q_BTD.shape), num_heads)
    k, v = _columns(kv_vision_BS2D)
    attention_forward.launch_forward(
        q_BTD, k, v, out_BTD, lse_BHT, num_heads, scale,
        config or _pick(_forward_configs(q_BTD.shape[1]), q_BTD, num_heads),
        extra=None if kv_extra_BE2D is None else _columns(kv_extra_BE2D), workspace=workspace,
    )  # fmt: skip


def launch_attention_map(
    q_BTD: torch.Tensor,
    kv_vision_BS2D: torch.Tensor,
    num_heads: int,
    scale: float,
    lse_BHT: torch.Tensor,
    map_BHTS: torch.Tensor,
    kv_extra_BE2D: torch.Tensor | None = None,
) -> None:
    """One or two launches: write map (B, H, T, E + S) after softmax, extra tokens' columns first."""
    _check_for_kernels(q_BTD, kv_vision_BS2D, kv_extra_BE2D, num_heads, scale)
    num_extra = 0 if kv_extra_BE2D is None else kv_extra_BE2D.shape[1]
    if kv_extra_BE2D is not None:
        attention_map.launch_map(q_BTD, _columns(kv_extra_BE2D)[0], lse_BHT, map_BHTS, 0, num_heads, scale)
    attention_map.launch_map(q_BTD, _columns(kv_vision_BS2D)[0], lse_BHT, map_BHTS, num_extra, num_heads, scale)


def launch_cross_attention_backward(
    grad_out_BTD: torch.Tensor,
    q_BTD: torch.Tensor,
    kv_vision_BS2D: torch.Tensor,
    out_BTD: torch.Tensor,
    lse_BHT: torch.Tensor,
    num_heads: int,
    scale: float,
    dq_BTD: torch.Tensor,
    dkv_vision_BS2D: torch.Tensor,
    kv_extra_BE2D: torch.Tensor | None = None,
    dkv_extra_BE2D: torch.Tensor | None = None,
    config: Mapping[str, int] | None = None,
) -> None:
    """Three launches: write dq, dkv_vision and, with extra tokens, dkv_extra, each shaped like its input.

    `config` is taken instead of the shipped configuration.
    """
    _check_for_kernels(q_BTD, kv_vision_BS2D, kv_extra_BE2D, num_heads, scale)
    if (kv_extra_BE2D is None) != (dkv_extra_BE2D is None):
        raise ValueError("kv_extra and dkv_extra come together: give both or neither.")
    for name, x in (("grad_out", grad_out_BTD), ("out", out_BTD), ("dq", dq_BTD), ("dkv_vision", dkv_vision_BS2D)):
        attention_tiles.check_rows(name, x)
    attention_backward.launch_backward(
        grad_out_BTD, q_BTD, *_columns(kv_vision_BS2D), out_BTD, lse_BHT, dq_BTD, *_columns(dkv_vision_BS2D),
        num_heads, scale, config or _pick(BACKWARD_CONFIGS, q_BTD, num_heads),
        extra=None if kv_extra_BE2D is None else _columns(kv_extra_BE2D),
        dextra=None if dkv_extra_BE2D is None else _columns(dkv_extra_BE2D),
    )  # fmt: skip


# --- custom ops --------------------------------------------------------------------------------------------------


def _empty_outputs(
    q: torch.Tensor, kv_vision: torch.Tensor, kv_extra: torch.Tensor | None, num_heads: int, need_map: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, num_queries, width = q.shape
    num_keys = kv_vision.shape[1] + (0 if kv_extra is None else kv_extra.shape[1])
    out = q.new_empty(batch, num_queries, width)
    lse = q.new_empty(batch, num_heads, num_queries, dtype=attention_math.wide(q.dtype))
    return out, lse, q.new_empty((batch, num_heads, num_queries, num_keys) if need_map else (0,))


@torch.library.custom_op("vat_fast::cross_attention", mutates_args=(), device_types="cuda")
def _cross_attention(
    q: torch.Tensor,
    kv_vision: torch.Tensor,
    kv_extra: torch.Tensor | None,
    num_heads: int,
    scale: float,
    need_map: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    out, lse, attention_map = _empty_outputs(q, kv_vision, kv_extra, num_heads, need_map)
    with torch.cuda.device(q.device):
        workspace = make_workspace(q, kv_vision, num_heads)
        launch_cross_attention(q, kv_vision, num_heads, scale, out, lse, kv_extra, workspace)
        if need_map:
            launch_attention_map(q, kv_vision, num_heads, scale, lse, attention_map, kv_extra)
    return out, lse, attention_map


def _all_columns(kv_vision: torch.Tensor, kv_extra: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    return _columns(kv_vision if kv_extra is None else torch.cat([kv_extra, kv_vision], dim=1))


@_cross_attention.register_kernel("cpu")
def _(
    q: torch.Tensor,
    kv_vision: torch.Tensor,
    kv_extra: torch.Tensor | None,
    num_heads: int,
    scale: float,
    need_map: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check(q, kv_vision, kv_extra, num_heads, scale)
    out, lse, weights = attention_math.attention_torch(q, *_all_columns(kv_vision, kv_extra), num_heads, scale)
    return out, lse, weights.to(q.dtype) if need_map else q.new_empty(0)


@_cross_attention.register_fake
def _(
    q: torch.Tensor,
    kv_vision: torch.Tensor,
    kv_extra: torch.Tensor | None,
    num_heads: int,
    scale: float,
    need_map: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _empty_outputs(q, kv_vision, kv_extra, num_heads, need_map)


def _empty_grads(
    q: torch.Tensor, kv_vision: torch.Tensor, kv_extra: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    extra = q.new_empty(0) if kv_extra is None else kv_extra.new_empty(kv_extra.shape)
    return q.new_empty(q.shape), kv_vision.new_empty(kv_vision.shape), extra


@torch.library.custom_op("vat_fast::cross_attention_backward", mutates_args=(), device_types="cuda")
def _cross_attention_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    kv_vision: torch.Tensor,
    kv_extra: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    num_heads: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dq, dkv_vision, dkv_extra = _empty_grads(q, kv_vision, kv_extra)
    with torch.cuda.device(q.device):
        launch_cross_attention_backward(
            grad_out.contiguous(), q, kv_vision, out, lse, num_heads, scale, dq, dkv_vision,
            kv_extra, None if kv_extra is None else dkv_extra,
        )  # fmt: skip
    return dq, dkv_vision, dkv_extra


@_cross_attention_backward.register_kernel("cpu")
def _(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    kv_vision: torch.Tensor,
    kv_extra: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    num_heads: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    columns = _all_columns(kv_vision, kv_extra)
    dq, dk, dv = attention_math.attention_backward_torch(grad_out, q, *columns, out, lse, num_heads, scale)
    num_extra = 0 if kv_extra is None else kv_extra.shape[1]
    dkv_vision = torch.cat([dk[:, num_extra:], dv[:, num_extra:]], dim=-1)
    dkv_extra = torch.cat([dk[:, :num_extra], dv[:, :num_extra]], dim=-1) if num_extra else q.new_empty(0)
    return dq, dkv_vision, dkv_extra


@_cross_attention_backward.register_fake
def _(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    kv_vision: torch.Tensor,
    kv_extra: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    num_heads: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _empty_grads(q, kv_vision, kv_extra)


def _setup_context(ctx, inputs, output) -> None:
    q, kv_vision, kv_extra, ctx.num_heads, ctx.scale, _ = inputs
    out, lse, attention_map = output
    ctx.mark_non_differentiable(lse, attention_map)
    ctx.save_for_backward(q, kv_vision, kv_extra, out, lse)


def _autograd_backward(ctx, grad_out, grad_lse, grad_map):
    q, kv_vision, kv_extra, out, lse = ctx.saved_tensors
    dq, dkv_vision, dkv_extra = _cross_attention_backward(
        grad_out, q, kv_vision, kv_extra, out, lse, ctx.num_heads, ctx.scale
    )
    return dq, dkv_vision, None if kv_extra is None else dkv_extra, None, None, None


_cross_attention.register_autograd(_autograd_backward, setup_context=_setup_context)


def cross_attention(
    q_BTD: torch.Tensor,
    kv_vision_BS2D: torch.Tensor,
    num_heads: int,
    scale: float,
    kv_extra_BE2D: torch.Tensor | None = None,
    need_map: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of T queries to E extra and S vision tokens; differentiable in q, kv_vision and kv_extra.

    Args:
        q_BTD: (B, T, D), action tokens then extra tokens; float32, float16 or bfloat16 (float64 too on the CPU). D is
            the action stream's width, which may be smaller than the vision stream's.
        kv_vision_BS2D: (B, S, 2*D), keys then values along the last axis, S = V * (prefix + P). May be a strided view,
            such as the last 2*D columns of a merged projection, if rows are contiguous.
        num_heads: H, divides D.
        scale: positive; multiplies the scores.
        kv_extra_BE2D: (B, E, 2*D) of the extra tokens, or None.
        need_map: also return the softmax weights. They carry no gradient.

    Returns:
        (B, T, D) in q's dtype; with `need_map` also the map (B, H, T, E + S), extra tokens' columns first.

    Raises:
        ValueError: wrong shapes, dtypes or strides.
    """
    _check(q_BTD, kv_vision_BS2D, kv_extra_BE2D, num_heads, scale)
    out, _, attention_map = _cross_attention(q_BTD, kv_vision_BS2D, kv_extra_BE2D, num_heads, scale, need_map)
    return (out, attention_map) if need_map else out
