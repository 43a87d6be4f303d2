"""One VAT layer as a sequence of launches over static buffers, for inference.

Vision stream, 5 launches                          Action stream, 5 launches
  1 norm, D -> 5D projection (q k v | k v action)    1 norm, query (of extra tokens also k v)
  2 self-attention of each view                      2 cross-attention to the vision keys
  3 output projection, residual                      3 output projection, residual
  4 norm, fc1, GELU                                  4 norm, fc1, GELU
  5 fc2, residual                                    5 fc2, residual, FiLM of the next layer

No launch is spent on a norm or on FiLM. Both norms are folded (see ``gemm``): 3 and 5 leave the row statistics that the
next GEMM applies, and the action stream's 5 also writes FiLM of its result, which is what the next layer's norm reads.
Before the first layer, ``start_action`` spends one launch on FiLM and norm, and ``patch_embed`` leaves statistics.

Why not fewer. Two dependent launches of a CUDA graph are about 1 us apart, which is what a fusion can save. By
``static_model`` on an H100 at batch 1, two views, so400m:
- query into cross-attention: every split over keys repeats a head's query product. One such program alone takes 18 loop
  steps of at least the 350 cycles that three stages leave uncovered, 3.4 us, beside 2.6 us for the GEMM it replaces.
- output projection into attention: a program holds one head, so sixteen fp32 partial results of (512, 1152) meet in L2:
  37.7 MB written and read again, at the H100's 11.4 TB/s of L2 6.6 us, to save one launch.
- fc2 into fc1: a tile of fc2 needs all 4304 hidden columns of its rows, that is every fc1 program of those rows.

In 8 bits (``LayerWeights.fold`` with `eight_bit`) the launches are the same. D -> 5D, query, fc1 and fc2 read 8-bit
weights, one scale per output channel, and 8-bit activations, one scale per token and column group, which the launch
before them left; only the first layer of a stream costs a launch more (``start_8bit``). Norms stay folded: the
accumulator is rescaled, see ``low_precision``. The residual stream stays in 16 bits, and so do attention and the output
projection behind it: a head of 72 columns is no group that 8-bit products could walk in steps of 32. A pass of its own
to quantise would take 1.5 us on an H100 and a launch's 1 us, to save 2.8 us of the vision stream's projection and
0.5 us of the action stream's.

All buffers exist beforehand; nothing here allocates, so a CUDA graph can record it. The residual stream is updated in
place. The vision stream of layer l + 1 may run beside the action stream of layer l if the two layers' `projected`
buffers differ (``with_projected``).

Variants. Views, class and register tokens are rows like others. VAT-small: `scale` of ``action_buffers``, and a `kv` of
the action stream's width. VAT-ViT: the vision layer has no `kv` of its own, its keys and values are those of `qkv`.
Without FiLM: film="none". Last-layer baseline: vision layers without `kv`, film="residual", and keys and values from
``launch_linear`` over the last vision tokens, view by view where tokens stand in front of the patches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vat_fast.kernels.attention_forward import SplitWorkspace
from vat_fast.kernels.cross_attention import cross_attention_ref, launch_cross_attention, make_workspace
from vat_fast.kernels.eight_bit import Quantized, quantize_weight
from vat_fast.kernels.film_norm import film_layernorm_ref, launch_film_layernorm
from vat_fast.kernels.gemm import (
    Film,
    LastRows,
    RowStats,
    Workspace,
    activate_ref,
    fold_layernorm,
    launch_linear,
    linear_config,
    stats_parts,
)
from vat_fast.kernels.low_precision import (
    fold_layernorm_8bit,
    launch_quant_linear,
    launch_quantize,
    quant_linear_config,
)
from vat_fast.kernels.vision_attention import launch_vision_attention, vision_attention_ref

VISION_LAUNCHES = 5
ACTION_LAUNCHES = 5


# ---------------------------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerParameters:
    """One stream of one layer as trained. Linear weights are (out, in); `kv` is the projection to action keys, values.

    `qkv` is (3D, D) in the vision stream and the query (D, D) in the action stream. `kv` is (2 * action width, D), None
    where nothing reads it or `qkv` holds it already. `scale1` and `scale2` are the LayerScale of the attention and MLP
    branch, None without. activation: one of ``gemm.ACTIVATIONS``.
    """

    norm1: tuple[Tensor, Tensor]
    qkv: tuple[Tensor, Tensor]
    kv: tuple[Tensor, Tensor] | None
    proj: tuple[Tensor, Tensor]
    norm2: tuple[Tensor, Tensor]
    fc1: tuple[Tensor, Tensor]
    fc2: tuple[Tensor, Tensor]
    scale1: Tensor | None = None
    scale2: Tensor | None = None
    activation: str = "gelu"


@dataclass(frozen=True)
class NormLinear:
    """A linear with the LayerNorm before it folded in (``gemm.fold_layernorm``). scale: (N,) of an 8-bit weight."""

    weight: Tensor
    bias: Tensor
    row_sum: Tensor
    scale: Tensor | None = None

    def rows(self, begin: int, end: int) -> NormLinear:
        """Only the output channels [begin, end)."""
        scale = None if self.scale is None else self.scale[begin:end]
        return NormLinear(self.weight[begin:end], self.bias[begin:end], self.row_sum[begin:end], scale)


@dataclass(frozen=True)
class LayerWeights:
    """One stream of one layer as the kernels read it. `project` holds qkv and kv, one below the other."""

    project: NormLinear
    proj_weight: Tensor
    proj_bias: Tensor
    fc1: NormLinear
    fc2_weight: Tensor
    fc2_bias: Tensor
    scale1: Tensor | None
    scale2: Tensor | None
    fc2_scale: Tensor | None = None
    activation: str = "gelu"

    @property
    def width(self) -> int:
        """D."""
        return self.proj_weight.shape[0]

    @property
    def hidden(self) -> int:
        """Width of the MLP."""
        return self.fc1.weight.shape[0]

    @property
    def eight_bit(self) -> torch.dtype | None:
        """torch.int8 or torch.float8_e4m3fn; None if all weights are in 16 or 32 bits."""
        return None if self.fc2_scale is None else self.fc2_weight.dtype

    @property
    def kv_columns(self) -> int:
        """Columns of `project` that hold action keys and values, the last ones; for the vision stream."""
        return self.project.weight.shape[0] - 3 * self.width or 2 * self.width

    @classmethod
    def fold(cls, layer: LayerParameters, dtype: torch.dtype, eight_bit: torch.dtype | None = None) -> LayerWeights:
        """Fold the norms and cast: matrices to `dtype`, all but the output projection to `eight_bit` if given, vectors
        to fp32."""
        weight, bias = layer.qkv
        if layer.kv is not None:
            weight, bias = torch.cat([weight, layer.kv[0]]), torch.cat([bias, layer.kv[1]])

        def folded(linear: tuple[Tensor, Tensor], norm: tuple[Tensor, Tensor]) -> NormLinear:
            if eight_bit is None:
                return NormLinear(*fold_layernorm(*linear, *norm, dtype))
            return NormLinear(*fold_layernorm_8bit(*linear, *norm, eight_bit))

        fc2_weight, fc2_scale = layer.fc2[0].to(dtype).contiguous(), None
        if eight_bit is not None:
            fc2_weight, fc2_scale = quantize_weight(layer.fc2[0], eight_bit)
        return cls(
            project=folded((weight, bias), layer.norm1),
            proj_weight=layer.proj[0].to(dtype).contiguous(),
            proj_bias=layer.proj[1].float(),
            fc1=folded(layer.fc1, layer.norm2),
            fc2_weight=fc2_weight,
            fc2_bias=layer.fc2[1].float(),
            scale1=None if layer.scale1 is None else layer.scale1.float(),
            scale2=None if layer.scale2 is None else layer.scale2.float(),
            fc2_scale=fc2_scale,
            activation=layer.activation,
        )


# ---------------------------------------------------------------------------------------------------------------
# Reference
# ---------------------------------------------------------------------------------------------------------------


def _layernorm(x: Tensor, norm: tuple[Tensor, Tensor], eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], *norm, eps)


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x * scale


def _mlp(x: Tensor, layer: LayerParameters, eps: float) -> Tensor:
    hidden = activate_ref(F.linear(_layernorm(x, layer.norm2, eps), *layer.fc1), layer.activation)
    return x + _scaled(F.linear(hidden, *layer.fc2), layer.scale2)


def vision_layer_ref(x_BVLD: Tensor, layer: LayerParameters, num_heads: int, eps: float) -> tuple[Tensor, Tensor]:
    """(next vision tokens (B, V, L, D), the keys and values (B, V*L, 2 * action width) for the action stream)."""
    B, V, L, D = x_BVLD.shape
    x = x_BVLD.flatten(0, 1)
    normed = _layernorm(x, layer.norm1, eps)
    qkv = F.linear(normed, *layer.qkv)
    attended = vision_attention_ref(qkv, num_heads, (D // num_heads) ** -0.5)
    keys_values = (qkv[..., D:] if layer.kv is None else F.linear(normed, *layer.kv)).reshape(B, V * L, -1)
    x = x + _scaled(F.linear(attended, *layer.proj), layer.scale1)
    return _mlp(x, layer, eps).view(B, V, L, D), keys_values


def action_layer_ref(
    x_BND: Tensor,
    gamma_BD: Tensor | None,
    beta_BD: Tensor | None,
    kv_BS2D: Tensor,
    layer: LayerParameters,
    num_heads: int,
    num_extra: int,
    eps: float,
    scale: float | None = None,
) -> Tensor:
    """Next action-stream tokens (B, N, D), N = T + num_extra with the extra tokens last.

    gamma, beta: FiLM of what attention sees, or None. scale: of the attention scores, head_dim ** -0.5 if None.
    """
    normed = film_layernorm_ref(x_BND, gamma_BD, beta_BD, *layer.norm1, eps)
    extra = F.linear(normed[:, -num_extra:], *layer.kv) if num_extra and layer.kv is not None else None
    scale = scale or (x_BND.shape[-1] // num_heads) ** -0.5
    attended = cross_attention_ref(F.linear(normed, *layer.qkv), kv_BS2D, num_heads, scale, extra)
    assert isinstance(attended, Tensor)
    x = x_BND + _scaled(F.linear(attended, *layer.proj), layer.scale1)
    return _mlp(x, layer, eps)


# ---------------------------------------------------------------------------------------------------------------
# Buffers
# ---------------------------------------------------------------------------------------------------------------


FILMS = ("read", "residual", "none")


@dataclass(frozen=True)
class StreamBuffers:
    """Everything that one stream's launches write, for tokens (B, N, D).

    x: (B, N, D), the residual stream, updated in place. read: what the first norm reads: x itself, or in an action
    stream FiLM of x; read_stats are its statistics. `split` is the GEMMs' shared scratch. In 8 bits, x_eight,
    read_eight and hidden hold what the 8-bit products read.
    """

    x: Tensor
    read: Tensor
    read_stats: RowStats
    projected: Tensor  # (B, N, 3D + keys and values) vision; (B, N, D or 3D) action
    attended: Tensor  # (B, N, D)
    lse: Tensor
    x_stats: RowStats  # of x after attention
    hidden: Tensor | Quantized  # (B, N, hidden); in 8 bits (B * N, hidden)
    split: Workspace
    attention_split: SplitWorkspace | None  # cross-attention's scratch, None if it splits no keys
    configs: dict[str, dict[str, Any]]  # of the four GEMMs
    num_heads: int
    num_extra: int
    views: int  # 0 in an action stream
    eps: float
    scale: float  # of the attention scores
    film: str  # one of FILMS; "none" in a vision stream
    kv_columns: int  # of `projected`: the action keys and values
    last: LastRows | None  # extra tokens, whose keys and values `projected` holds; in 8 bits it has all tokens'
    x_eight: Quantized | None = None  # (B * N, D)
    read_eight: Quantized | None = None  # (B * N, D)

    @property
    def keys_values(self) -> Tensor:
        """(B, V*L, 2 * action width): the action keys and values, a strided view of the vision stream's `projected`.

        A layer that reads one view alone slices its rows: [:, -L:] is the last view.
        """
        kv = self.projected[..., -self.kv_columns :]
        return kv.unflatten(0, (-1, self.views)).flatten(1, 2)


def with_projected(buffers: StreamBuffers) -> StreamBuffers:
    """The same buffers with a `projected` of their own.

    The vision stream's layers take turns between two such sets: layer l + 1 then writes its projection while the action
    stream still reads the keys and values of layer l. All else is read and written by the vision stream alone.
    """
    return replace(buffers, projected=torch.empty_like(buffers.projected))


def _stats(rows: int, width: int, block: int, device: torch.device | str) -> RowStats:
    return RowStats(torch.empty(2, stats_parts(width, block), rows, dtype=torch.float32, device=device), block)


def _configs(rows: int, weights: LayerWeights, projected: int) -> dict[str, dict[str, Any]]:
    """Configurations of the four GEMMs; `projected` are the columns that all rows have.

    In 8 bits a writer's column tile is the group in which its reader reads.
    """
    D, hidden, dtype, eight = weights.width, weights.hidden, weights.proj_weight.dtype, weights.eight_bit
    proj = linear_config(rows, D, D, dtype, eight_out=eight is not None)
    if eight is None:
        return {
            "project": linear_config(rows, projected, D, dtype),
            "proj": proj,
            "fc1": linear_config(rows, hidden, D, dtype),
            "fc2": linear_config(rows, D, hidden, dtype),
        }
    fc1 = quant_linear_config(rows, hidden, D, eight, proj["BLOCK_N"], eight_out=True)
    fc2 = quant_linear_config(rows, D, hidden, eight, fc1["BLOCK_N"], eight_out=True)
    return {
        "project": quant_linear_config(rows, projected, D, eight, fc2["BLOCK_N"]),
        "proj": proj,
        "fc1": fc1,
        "fc2": fc2,
    }


def _allocate(
    batch: int,
    tokens: int,
    weights: LayerWeights,
    projected: int,
    num_heads: int,
    num_extra: int,
    views: int,
    eps: float,
    scale: float | None,
    film: str,
) -> StreamBuffers:
    D, hidden, dtype, device = weights.width, weights.hidden, weights.proj_weight.dtype, weights.proj_weight.device
    rows = batch * tokens
    last = LastRows(num_extra, tokens, D) if num_extra and weights.eight_bit is None else None
    configs = _configs(rows, weights, last.column if last else projected)
    columns = {"proj": D, "fc1": hidden, "fc2": D}
    sizes = [Workspace.sizes(rows, N, configs[name]) for name, N in columns.items()]
    sizes.append(Workspace.sizes(rows, projected, configs["project"], last))
    eight = weights.eight_bit

    def empty(width: int) -> Tensor:
        return torch.empty(batch, tokens, width, dtype=dtype, device=device)

    def empty_8bit(width: int, writer: str) -> Quantized | None:
        return None if eight is None else Quantized.empty(rows, width, configs[writer]["BLOCK_N"], eight, device)

    x = empty(D)
    return StreamBuffers(
        x=x,
        read=x if film == "none" and views else empty(D),
        read_stats=_stats(rows, D, configs["fc2"]["BLOCK_N"], device),
        projected=empty(projected),
        attended=empty(D),
        lse=torch.empty(batch, num_heads, tokens, dtype=torch.float32, device=device),
        x_stats=_stats(rows, D, configs["proj"]["BLOCK_N"], device),
        hidden=empty_8bit(hidden, "fc1") or empty(hidden),
        split=Workspace.allocate((max(size[0] for size in sizes), max(size[1] for size in sizes)), device),
        attention_split=None,
        configs=configs,
        num_heads=num_heads,
        num_extra=num_extra,
        views=views,
        eps=eps,
        scale=scale or (D // num_heads) ** -0.5,
        film=film,
        kv_columns=weights.kv_columns,
        last=last,
        x_eight=empty_8bit(D, "proj"),
        read_eight=empty_8bit(D, "fc2"),
    )


def vision_buffers(
    batch: int, views: int, tokens_per_view: int, weights: LayerWeights, num_heads: int, eps: float = 1e-6
) -> StreamBuffers:
    """Buffers of the vision stream on the weights' device; x is (B*V, L, D). Any layer's weights give the sizes."""
    projected = weights.project.weight.shape[0]
    return _allocate(
        batch * views, tokens_per_view, weights, projected, num_heads, 0, views, eps, scale=None, film="none"
    )


def action_buffers(
    batch: int,
    tokens: int,
    num_extra: int,
    num_keys: int,
    weights: LayerWeights,
    num_heads: int,
    eps: float = 1e-6,
    scale: float | None = None,
    film: str = "read",
) -> StreamBuffers:
    """Buffers of the action stream; x is (B, T + E, D), the extra tokens last.

    Args:
        num_keys: the vision tokens, V*L.
        scale: of the attention scores; head_dim ** -0.5 if None.
        film: "read": FiLM changes what attention reads; "residual": it replaces the stream too; "none": there is none.
    """
    if film not in FILMS:
        raise ValueError(f"film must be one of {FILMS}, got {film!r}")
    D = weights.width
    projected = 3 * D if num_extra else D
    buffers = _allocate(
        batch, tokens + num_extra, weights, projected, num_heads, num_extra, 0, eps, scale=scale, film=film
    )
    keys = torch.empty(batch, num_keys, 2 * D, dtype=buffers.x.dtype, device="meta")
    return replace(buffers, attention_split=make_workspace(buffers.projected[..., :D], keys, num_heads))


# ---------------------------------------------------------------------------------------------------------------
# Launch sequences
# ---------------------------------------------------------------------------------------------------------------


def _rows(x: Tensor) -> Tensor:
    return x.view(-1, x.shape[-1])


def _linear(
    buffers: StreamBuffers,
    name: str,
    x: Tensor | Quantized,
    weight: Tensor,
    weight_scale: Tensor | None,
    out: Tensor | None,
    **optional: Any,
) -> None:
    """The GEMM of that name, 8-bit if x is."""
    optional |= {"workspace": buffers.split, "config": buffers.configs[name], "eps": buffers.eps}
    if isinstance(x, Quantized):
        assert weight_scale is not None
        launch_quant_linear(x, weight, weight_scale, out, **optional)
    else:
        launch_linear(_rows(x), weight, out, **optional)


def _project(buffers: StreamBuffers, source: Tensor, project: NormLinear, out: Tensor, stats: RowStats | None) -> None:
    _linear(
        buffers,
        "project",
        buffers.read_eight or source,
        project.weight,
        project.scale,
        out,
        **({"last": buffers.last} if buffers.last else {}),
        bias_N=project.bias,
        norm=stats,
        row_sum_N=None if stats is None else project.row_sum,
    )


def _after_attention(buffers: StreamBuffers, weights: LayerWeights, film: Film | None) -> None:
    """Launches 3 to 5: output projection and MLP, both onto the residual stream."""
    x, hidden = _rows(buffers.x), buffers.hidden
    _linear(
        buffers,
        "proj",
        buffers.attended,
        weights.proj_weight,
        None,
        x,
        bias_N=weights.proj_bias,
        layer_scale_N=weights.scale1,
        residual_MN=x,
        stats_out=buffers.x_stats,
        eight_out=buffers.x_eight,
    )
    _linear(
        buffers,
        "fc1",
        buffers.x_eight or x,
        weights.fc1.weight,
        weights.fc1.scale,
        None if isinstance(hidden, Quantized) else _rows(hidden),
        bias_N=weights.fc1.bias,
        activation=weights.activation,
        norm=buffers.x_stats,
        row_sum_N=weights.fc1.row_sum,
        eight_out=hidden if isinstance(hidden, Quantized) else None,
    )
    _linear(
        buffers,
        "fc2",
        hidden,
        weights.fc2_weight,
        weights.fc2_scale,
        None if film is not None and buffers.film == "residual" else x,
        bias_N=weights.fc2_bias,
        layer_scale_N=weights.scale2,
        residual_MN=x,
        film=film,
        stats_out=buffers.read_stats,
        eight_out=buffers.read_eight,
    )


def start_8bit(buffers: StreamBuffers) -> None:
    """One launch before the first layer in 8 bits: buffers.read_eight from buffers.read, which another launch wrote."""
    assert buffers.read_eight is not None, "start_8bit is for buffers of 8-bit weights"
    launch_quantize(_rows(buffers.read), buffers.read_eight, norm=False)


def vision_layer(buffers: StreamBuffers, weights: LayerWeights, stats: RowStats | None = None) -> None:
    """Five launches: buffers.x -> next vision tokens, buffers.keys_values for the action stream.

    Args:
        buffers: from ``vision_buffers``; x holds the layer's input.
        stats: statistics of x, where a launch other than the previous layer's wrote it (``patch_embed``); else
            buffers.read_stats is used. Afterwards buffers.read_stats are those of the new x.
    """
    D = weights.width
    _project(buffers, buffers.x, weights.project, _rows(buffers.projected), stats or buffers.read_stats)
    launch_vision_attention(
        buffers.projected[..., : 3 * D], buffers.num_heads, buffers.scale, buffers.attended, buffers.lse
    )
    _after_attention(buffers, weights, film=None)


def vision_keys_values(buffers: StreamBuffers, weights: LayerWeights, stats: RowStats | None = None) -> None:
    """One launch in place of the last vision layer, of which the action stream reads nothing but keys and values."""
    columns = weights.project.weight.shape[0]
    begin = columns - buffers.kv_columns
    out = _rows(buffers.projected)[:, begin:]
    _project(buffers, buffers.x, weights.project.rows(begin, columns), out, stats or buffers.read_stats)


def start_action(
    buffers: StreamBuffers,
    gamma: Tensor | None,
    beta: Tensor | None,
    ones_D: Tensor,
    zeros_D: Tensor,
    task_id: Tensor | None = None,
) -> None:
    """One launch before the first layer, two in 8 bits: buffers.read = norm(FiLM(buffers.x)), without affine part.

    Args:
        gamma, beta: the first layer's FiLM, (B, D), or tables (tasks, D) with task_id (B,). None where there is none,
            or with film="residual", where x must hold FiLM's result.
        ones_D, zeros_D: the norm's weight and bias, which the layer's weights already hold.
    """
    # The mean and rstd that this kernel leaves are for a backward; the first attention overwrites the memory they use.
    B, N, _ = buffers.x.shape
    scratch = buffers.attended.view(-1).view(torch.float32)[: 2 * B * N].view(2, B, N)
    launch_film_layernorm(
        buffers.x, gamma, beta, ones_D, zeros_D, buffers.eps, task_id, buffers.read, scratch[0], scratch[1]
    )
    if buffers.read_eight is not None:
        start_8bit(buffers)


def action_layer(
    buffers: StreamBuffers,
    weights: LayerWeights,
    kv_BS2D: Tensor,
    next_gamma: Tensor | None = None,
    next_beta: Tensor | None = None,
    task_id: Tensor | None = None,
    first: bool = False,
) -> None:
    """Five launches: buffers.x -> next action-stream tokens.

    Args:
        buffers: from ``action_buffers``; x holds the layer's input, `read` its FiLM (by ``start_action`` or the
            previous layer).
        kv_BS2D: the same layer's vision keys and values, any row stride.
        next_gamma, next_beta: the next layer's FiLM, (B, D), or tables (tasks, D) with task_id (B,); None at the
            last layer.
        first: `read` comes from ``start_action``, so it is normalised already.
    """
    D, E, N = weights.width, buffers.num_extra, buffers.x.shape[1]
    _project(
        buffers,
        buffers.read if first or buffers.film == "read" else buffers.x,
        weights.project if E else weights.project.rows(0, D),
        _rows(buffers.projected),
        None if first else buffers.read_stats,
    )
    launch_cross_attention(
        buffers.projected[..., :D],
        kv_BS2D,
        buffers.num_heads,
        buffers.scale,
        buffers.attended,
        buffers.lse,
        buffers.projected[:, N - E :, D:] if E else None,
        buffers.attention_split,
    )
    film = None
    if next_gamma is not None and next_beta is not None:
        out = {"read": None if buffers.read_eight else buffers.read, "residual": buffers.x}[buffers.film]
        film = Film(next_gamma, next_beta, None if out is None else _rows(out), rows_per_sample=N, task_id=task_id)
    _after_attention(buffers, weights, film)
