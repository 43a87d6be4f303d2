"""Action cross-attention: kernels against fp64, splits, maps, autograd, opcheck and torch.compile."""

import importlib
import itertools
import re

import pytest
import torch
from triton._C.libtriton import ir
from triton.runtime import interpreter

from vat_fast.kernels import attention_tiles, configs
from vat_fast.kernels.cross_attention import cross_attention, cross_attention_ref
from vat_fast.kernels.proof import worker

# The module, not the function of the same name.
ca = importlib.import_module("vat_fast.kernels.cross_attention")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# B, T, S, E, H, head_dim: one to three views of three backbones, with and without extra tokens, and odd sizes.
SHAPES = [
    (1, 56, 512, 0, 1, 72),
    (1, 57, 257, 1, 1, 72),
    (1, 70, 768, 0, 1, 96),
    (1, 58, 522, 2, 1, 64),
    (2, 7, 257, 2, 2, 36),
    (3, 1, 1, 1, 2, 72),
    (2, 2, 1, 2, 2, 96),
    (2, 20, 70, 1, 2, 18),
    (1, 5, 30, 1, 3, 9),
    (1, 17, 40, 0, 1, 128),
]


def make(B, T, S, E, H, d, dtype, strided=False):
    """(q, kv_vision, kv_extra, grad_out); `strided` makes kv_vision the last columns of a 5*D projection."""
    generator = torch.Generator().manual_seed(1000 * S + 10 * T + E)
    D = H * d
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    if strided:
        q, kv = draw(B, T + 2, D + 8)[:, 1 : T + 1, 8:], draw(B, S + 1, 5 * D)[:, 1:, 3 * D :]
    else:
        q, kv = draw(B, T, D), draw(B, S, 2 * D)
    extra = draw(B, T, 2 * D)[:, T - E :] if E and strided and T >= E else draw(B, E, 2 * D) if E else None
    return q, kv, extra, draw(B, T, D)


def reference(tensors, H, scale, dtype):
    """(out, map, gradients) of the eager reference in `dtype`."""
    *inputs, grad = tensors
    leaves = [None if x is None else x.detach().to(dtype).requires_grad_() for x in inputs]
    out, attention_map = cross_attention_ref(*leaves[:2], H, scale, leaves[2], need_map=True)
    gradients = torch.autograd.grad(out, [x for x in leaves if x is not None], grad.to(dtype))
    return out.detach(), attention_map.detach(), gradients


def launch(tensors, H, scale, nan_like, workspace=None):
    """(out, lse, map, gradients) of the kernels, into NaN-filled tensors."""
    q, kv, extra, grad = tensors
    out, lse = nan_like(grad), torch.full((q.shape[0], H, q.shape[1]), float("nan"))
    ca.launch_cross_attention(q, kv, H, scale, out, lse, extra, workspace)
    columns = kv.shape[1] + (0 if extra is None else extra.shape[1])
    attention_map = torch.full((*lse.shape, columns), float("nan")).to(q.dtype)
    ca.launch_attention_map(q, kv, H, scale, lse, attention_map, extra)
    grads = [None if x is None else nan_like(x.contiguous()) for x in (q, kv, extra)]
    ca.launch_cross_attention_backward(grad, q, kv, out, lse, H, scale, *grads[:2], extra, grads[2])
    return out, lse, attention_map, [x for x in grads if x is not None]


def poisoned_workspace(q, kv, H, splits):
    """Shares NaN-filled; `splits` None: as the table says, "most": as many as whole key tiles, up to eight."""
    config = ca._pick(ca._forward_configs(q.shape[1]), q, H)
    if splits == "most":
        splits = min(8, kv.shape[1] // config["BLOCK_N"])
    made = ca.make_workspace(q, kv, H, config if splits is None else {**config, "SPLITS": splits})
    if made is not None:
        made.partial.fill_(float("nan"))
        made.partial_lse.fill_(float("nan"))
    return made


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_match_fp64(shape, dtype, nan_like, assert_error_at_most_2x_eager):
    H, scale = shape[4], shape[5] ** -0.5
    tensors = make(*shape, dtype, strided=shape[1] % 2 == 0)
    workspace = poisoned_workspace(*tensors[:2], H, "most")
    assert (workspace is not None) or shape[2] < 256
    out, _, attention_map, gradients = launch(tensors, H, scale, nan_like, workspace)
    truth, eager = (reference(tensors, H, scale, d) for d in (torch.float64, dtype))
    assert_error_at_most_2x_eager(out, eager[0], truth[0])
    assert_error_at_most_2x_eager(attention_map, eager[1], truth[1])
    for name, actual, low, high in zip(("dq", "dkv", "dkv_extra"), gradients, eager[2], truth[2], strict=False):
        if name == "dq" and truth[1].shape[-1] == 1:
            continue  # one key: dq is zero, and its relative error means nothing
        assert_error_at_most_2x_eager(actual, low, high)
    if workspace is not None:
        assert not workspace.counters.any(), "counters must be zero for the next launch"


@pytest.mark.parametrize("splits", [None, 1, 2, 3, 8])
def test_splits_agree_and_the_workspace_can_be_used_again(splits, nan_like, assert_error_at_most_2x_eager):
    shape = (2, 70, 522, 2, 1, 64)
    tensors = make(*shape, torch.bfloat16)
    truth, eager = (reference(tensors, 1, 0.125, d)[0] for d in (torch.float64, torch.bfloat16))
    q, kv, extra, grad = tensors
    workspace = poisoned_workspace(q, kv, 1, splits)
    results = []
    for _ in range(2):
        out, lse = nan_like(grad), torch.full((2, 1, 70), float("nan"))
        ca.launch_cross_attention(q, kv, 1, 0.125, out, lse, extra, workspace)
        assert_error_at_most_2x_eager(out, eager, truth)
        results.append((out, lse))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("arch", [80, 87, 89, 90, 100, "gfx942"])
def test_every_table_gives_the_right_answer(arch, nan_like, assert_error_at_most_2x_eager):
    for d in (64, 72, 96):
        tensors = make(1, 58, 138, 2, 1, d, torch.float16)
        with configs.override_arch(arch):
            workspace = poisoned_workspace(*tensors[:2], 1, None)
            out, _, _, gradients = launch(tensors, 1, d**-0.5, nan_like, workspace)
        truth, eager = (reference(tensors, 1, d**-0.5, dtype) for dtype in (torch.float64, torch.float16))
        for actual, low, high in zip((out, *gradients), (eager[0], *eager[2]), (truth[0], *truth[2]), strict=True):
            assert_error_at_most_2x_eager(actual, low, high)


@pytest.mark.parametrize(
    ("queries", "block", "arch", "expected"),
    [
        (56, 32, 90, (16, 8)),
        (56, 64, 90, (64, 0)),
        (57, 32, 90, (32, 0)),
        (112, 64, 90, (32, 16)),
        (64, 32, 90, (0, 0)),
        (261, 64, 80, (8, 0)),
        (1, 64, 80, (8, 0)),
        (56, 32, "gfx942", (32, 0)),
        (112, 64, "gfx942", (32, 16)),
        (7, 64, "gfx942", (16, 0)),
    ],
)
def test_tiles_of_the_last_queries(queries, block, arch, expected):
    tails = attention_tiles.query_tails(queries, block, arch)
    assert tails == expected
    assert queries // block * block + sum(tails) >= queries
    assert attention_tiles.query_tiles(queries, block, arch) == queries // block + sum(rows > 0 for rows in tails)


@pytest.mark.parametrize("warps", [2, 4])
@pytest.mark.parametrize(
    ("T", "block", "E", "d"), [(56, 32, 0, 72), (56, 32, 2, 36), (8, 32, 1, 96), (112, 64, 0, 72), (40, 64, 1, 64)]
)
def test_queries_as_columns_match_fp64(T, block, E, d, warps, nan_like, assert_error_at_most_2x_eager):
    """Tiles with fewer rows than the warps multiply, split over the keys and whole."""
    q, kv, extra, grad = tensors = make(2, T, 200, E, 1, d, torch.bfloat16, strided=True)
    truth, eager = (reference(tensors, 1, d**-0.5, dtype) for dtype in (torch.float64, torch.bfloat16))
    for splits in (1, 3):
        config = {"BLOCK_M": block, "BLOCK_N": 64, "SPLITS": splits, "num_warps": warps, "num_stages": 2}
        workspace = ca.make_workspace(q, kv, 1, config)
        if workspace is not None:
            workspace.partial.fill_(float("nan"))
        out, lse = nan_like(grad), torch.full((2, 1, T), float("nan"))
        ca.launch_cross_attention(q, kv, 1, d**-0.5, out, lse, extra, workspace, config)
        assert_error_at_most_2x_eager(out, eager[0], truth[0])
        keys = kv.chunk(2, -1)[0] if extra is None else torch.cat([extra, kv], 1).chunk(2, -1)[0]
        scores = q.double() @ keys.double().mT * d**-0.5
        torch.testing.assert_close(lse[:, 0].double(), torch.logsumexp(scores, -1), rtol=1e-5, atol=1e-5)


def test_how_keys_are_split():
    """As the model says for device and tokens, never more splits than whole key tiles, none once the batch fills it."""

    def splits(batch, queries, keys, arch):
        q, kv = torch.empty(batch, queries, 1152, device="meta"), torch.empty(batch, keys, 2304, device="meta")
        with configs.override_arch(arch):
            workspace = ca.make_workspace(q.bfloat16(), kv.bfloat16(), 16)
        return 1 if workspace is None else workspace.partial.shape[2]

    assert splits(1, 56, 512, 90) == 2
    assert splits(1, 57, 512, 90) == 4
    assert splits(1, 57, 140, 90) == 2
    assert splits(1, 112, 768, 90) == 1
    assert splits(1, 56, 128, 90) == 1
    assert splits(4, 56, 512, 90) == 1
    assert splits(16, 56, 512, 90) == 1
    assert splits(1, 56, 512, 89) == 4
    assert splits(1, 56, 512, 87) == 1
    assert splits(1, 56, 512, "gfx942") == 8
    assert splits(1, 56, 40, 90) == 1


SPLIT_IN_THREE = {"BLOCK_M": 64, "BLOCK_N": 64, "SPLITS": 8, "num_warps": 4, "num_stages": 2}
"""Of 200 keys."""


@pytest.mark.parametrize("extra", [0, 2])
def test_memory_accesses_of_split_kernels(extra, trace):
    """The last program reads the others' shares: ordered by the counter, so no race; every element written once."""
    q, kv, kv_extra, grad = make(1, 70, 200, extra, 2, 72, torch.bfloat16, strided=True)
    tensors = {"q": q, "kv": kv, "out": torch.empty_like(grad), "lse": torch.empty(1, 2, 70)}
    if kv_extra is not None:
        tensors["kv_extra"] = kv_extra
    workspace = ca.make_workspace(q, kv, 2, SPLIT_IN_THREE)
    assert workspace.partial.shape[2] == 3
    with trace(tensors, outputs=("out", "lse")) as report:
        ca.launch_cross_attention(q, kv, 2, 0.1, tensors["out"], tensors["lse"], kv_extra, workspace, SPLIT_IN_THREE)
    report.check()
    assert report.launches == ["_attention_forward_kernel"]


def test_a_combination_without_order_is_a_race(trace, monkeypatch):
    """Negative control: with a relaxed counter nothing orders the last program's reads after the others' stores."""
    builder = interpreter.InterpreterBuilder
    q, kv, _, grad = make(1, 20, 200, 0, 1, 72, torch.bfloat16)
    out, lse = torch.empty_like(grad), torch.empty(1, 1, 20)
    workspace = ca.make_workspace(q, kv, 1, SPLIT_IN_THREE)
    with trace({"q": q, "kv": kv, "out": out, "lse": lse}) as report:
        traced = builder.create_atomic_rmw

        def relaxed(self, op, pointer, value, mask, semantics, scope):
            return traced(self, op, pointer, value, mask, ir.MEM_SEMANTIC.RELAXED, scope)

        with monkeypatch.context() as patch:
            patch.setattr(builder, "create_atomic_rmw", relaxed)
            ca.launch_cross_attention(q, kv, 1, 0.1, out, lse, None, workspace, SPLIT_IN_THREE)
    assert any("another program stored" in race for race in report.races)


def test_compiled_combination_is_ordered():
    """In the compiled code: stores, barrier, acquire-release count, barrier, and only then loads of others' shares."""
    keys = [("cross_attention/so400m 1 sample", arch) for arch in (80, 90)]
    for (launch,) in worker.run("ptx", keys).values():
        accesses = re.findall(r"\b(?:ld\.global|st\.global|bar\.sync|atom)[.\w:]*", launch["ptx"])
        counts = [i for i, access in enumerate(accesses) if access.startswith("atom")]
        assert counts  # one for whole tiles of queries, one for the last
        for count in counts:
            assert accesses[count] == "atom.global.gpu.acq_rel.add.u32"
            assert accesses[count - 1] == "bar.sync", "the count must come after every thread's stores"
            assert accesses[count + 1] == "bar.sync", "no thread may load before the count has been answered"
            combining = itertools.takewhile(lambda access: not access.startswith("st.global"), accesses[count + 2 :])
            shares = [access for access in combining if access.startswith("ld.global")]
            assert len(shares) > 8
            assert all(access.startswith("ld.global.cg") for access in shares), "others' lines must come from L2"


def test_map_columns_start_with_the_extra_tokens(nan_like):
    """The extra token's key equals every query, the vision keys are zero: its column takes nearly all the weight."""
    q = torch.ones(1, 4, 32)
    kv, extra = torch.zeros(1, 20, 64), torch.ones(1, 1, 64)
    attention_map = launch((q, kv, extra, torch.ones(1, 4, 32)), 2, 1.0, nan_like)[2]
    assert (attention_map[..., 0] > 0.99).all()
    torch.testing.assert_close(attention_map.sum(-1), torch.ones(1, 2, 4))
    out, cpu_map = cross_attention(q, kv, 2, 1.0, extra, need_map=True)
    torch.testing.assert_close(cpu_map, attention_map)
    assert out.shape == q.shape


@pytest.mark.parametrize("extra", [0, 2])
def test_gradcheck(extra):
    q, kv, kv_extra, _ = make(2, 3, 5, extra, 2, 3, torch.float64, strided=True)
    leaves = [x.detach().clone().requires_grad_() for x in (q, kv, kv_extra) if x is not None]
    call = lambda q, kv, kv_extra=None: cross_attention(q, kv, 2, 0.4, kv_extra)  # noqa: E731
    torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("extra", [0, 2])
def test_opcheck(extra):
    q, kv, kv_extra, grad = make(2, 3, 5, extra, 2, 4, torch.float32, strided=True)
    leaves = [None if x is None else x.detach().requires_grad_() for x in (q, kv, kv_extra)]
    torch.library.opcheck(torch.ops.vat_fast.cross_attention.default, (*leaves, 2, 0.4, bool(extra)))
    out, lse, _ = torch.ops.vat_fast.cross_attention(q, kv, kv_extra, 2, 0.4, False)
    arguments = (grad, q, kv, kv_extra, out, lse, 2, 0.4)
    torch.library.opcheck(torch.ops.vat_fast.cross_attention_backward.default, arguments)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("extra", [0, 2])
def test_cpu_op_matches_reference(extra, dtype, assert_error_at_most_2x_eager):
    tensors = make(2, 9, 37, extra, 3, 12, dtype, strided=True)
    leaves = [None if x is None else x.detach().requires_grad_() for x in tensors[:3]]
    out, attention_map = cross_attention(*leaves[:2], 3, 0.3, leaves[2], need_map=True)
    gradients = torch.autograd.grad(out, [x for x in leaves if x is not None], tensors[3])
    truth, eager = (reference(tensors, 3, 0.3, d) for d in (torch.float64, dtype))
    floor = 1e-12 if dtype == torch.float64 else None
    pairs = zip(
        (out.detach(), attention_map, *gradients), (*eager[:2], *eager[2]), (*truth[:2], *truth[2]), strict=True
    )
    for actual, low, high in pairs:
        assert_error_at_most_2x_eager(actual, low, high, floor)


class ActionAttention(torch.nn.Module):
    """One D -> 5*D projection of the vision tokens, whose last columns are the action stream's keys and values."""

    def __init__(self, width, heads):
        super().__init__()
        self.query, self.merged = torch.nn.Linear(width, width), torch.nn.Linear(width, 5 * width)
        self.heads, self.width = heads, width

    def forward(self, action, vision):
        kv_extra = self.merged(action[:, -1:])[..., 3 * self.width :]
        kv = self.merged(vision)[..., 3 * self.width :]
        return action + cross_attention(self.query(action), kv, self.heads, 0.25, kv_extra)


def test_compiled_module_equals_eager():
    torch.manual_seed(0)
    module = ActionAttention(48, 3)
    action, vision = torch.randn(2, 5, 48), torch.randn(2, 17, 48)
    results = []
    for run in (module, torch.compile(module, fullgraph=True)):
        module.zero_grad()
        out = run(action, vision)
        out.square().sum().backward()
        results.append((out.detach(), module.merged.weight.grad.clone(), module.query.weight.grad.clone()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("q", "kv", "extra", "heads", "scale", "message"),
    [
        (torch.zeros(2, 4, 9), torch.zeros(2, 5, 18), None, 2, 0.1, r"q has shape \(2, 4, 9\)"),
        (torch.zeros(2, 4, 8), torch.zeros(2, 5, 8), None, 2, 0.1, r"kv_vision has shape \(2, 5, 8\)"),
        (torch.zeros(2, 4, 8), torch.zeros(1, 5, 16), None, 2, 0.1, r"kv_vision has shape \(1, 5, 16\)"),
        (torch.zeros(2, 4, 8), torch.zeros(2, 0, 16), None, 2, 0.1, "at least 1"),
        (torch.zeros(2, 4, 8), torch.zeros(2, 5, 16), torch.zeros(2, 1, 8), 2, 0.1, "kv_extra has shape"),
        (torch.zeros(2, 4, 8), torch.zeros(2, 5, 16).half(), None, 2, 0.1, "kv_vision has dtype torch.float16"),
        (torch.zeros(2, 4, 8), torch.zeros(2, 5, 16), None, 2, -1.0, "scale is -1.0"),
    ],
)
def test_bad_input_is_refused(q, kv, extra, heads, scale, message):
    with pytest.raises(ValueError, match=message):
        cross_attention(q, kv, heads, scale, extra)


def test_launcher_refuses_what_kernels_cannot_read():
    q, kv, out, lse = torch.zeros(1, 3, 8), torch.zeros(1, 5, 16), torch.zeros(1, 3, 8), torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match="float64"):
        ca.launch_cross_attention(q.double(), kv.double(), 2, 0.1, out, lse)
    with pytest.raises(ValueError, match="kv_vision has stride 5"):
        ca.launch_cross_attention(q, torch.zeros(1, 16, 5).transpose(1, 2), 2, 0.1, out, lse)
    with pytest.raises(ValueError, match="together"):
        ca.launch_cross_attention_backward(out, q, kv, out, lse, 2, 0.1, q.clone(), kv.clone(), kv)
