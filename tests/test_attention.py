"""Attention to second order against plain PyTorch, and what its arguments may be."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from checks import BACKENDS, DTYPES, assert_close, distance, leaves, orders

import fastgan
from fastgan import functional
from fastgan._op import OPS
from fastgan.choice import native as native_core
from fastgan.choice import watching
from fastgan.ops import attention

INFINITE = float("inf")


def plain(q, k, v, bias=None, causal=False, scale=None):
    """The composite; rows without a key give zeros, as torch's own."""
    s = q @ k.mT * (scale or 1 / math.sqrt(q.shape[-1]))
    s = s if bias is None else s + bias
    s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), -INFINITE) if causal else s
    empty = (s == -INFINITE).all(-1, keepdim=True)
    return torch.softmax(s.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0) @ v


def heads(n, h, rows, keys, d, e):
    return [torch.randn(n, h, *size, dtype=torch.float64) for size in ((rows, d), (keys, d), (keys, e))]


def against_plain(ours, composite, inputs, dtype, backend, forward=True):
    """As checks.against_plain, with plain PyTorch's bfloat16 beside ours: results and both derivatives.

    forward: whether the op itself has to run, beside its derivatives.
    """
    rounded = [t.to(dtype).double() for t in inputs]
    layout = torch.contiguous_format
    want = orders(composite, leaves(rounded, torch.float64, layout))
    theirs = orders(composite, leaves(rounded, dtype, layout))
    seen = set()
    with fastgan.backend(backend), watching(lambda op, name, why: seen.add((op.name, name))):
        got = orders(ours, leaves(rounded, dtype, layout))
    for i, (g, w, t) in enumerate(zip(got, want, theirs, strict=True)):
        assert g.dtype == dtype
        assert_close(g, w, dtype, distance(t, w), f"result {i} on {backend}")
    if backend == "native" and dtype != torch.float64:
        names = {"attention_backward", "attention_double_backward", *(["attention"] if forward else [])}
        assert {(name, "native") for name in names} <= seen, seen


CASES = [  # N, heads, rows, keys, d, e, causal
    (2, 3, 5, 7, 4, 6, False),
    (1, 2, 1, 1, 1, 1, False),
    (2, 1, 50, 50, 16, 16, True),
    (1, 2, 13, 29, 33, 17, True),
    (1, 1, 101, 401, 24, 40, False),
    (1, 1, 100, 390, 64, 64, True),
    (1, 1, 9, 70, 256, 256, False),
    (1, 3, 2, 40, 8, 8, True),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_composite_to_second_order(case, dtype, backend):
    *sizes, causal = case
    ours = lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    against_plain(ours, lambda q, k, v: plain(q, k, v, causal=causal), heads(*sizes), dtype, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 3, 50, 61), (3, 50, 61), (1, 3, 50, 61), (2, 1, 50, 61), (50, 61), (2, 1, 1, 61)]
)
def test_a_bias_with_gradient(shape, dtype, backend):
    inputs = [*heads(2, 3, 50, 61, 12, 8), torch.randn(shape, dtype=torch.float64)]
    ours = lambda q, k, v, b: functional.scaled_dot_product_attention(q, k, v, b, scale=0.7)
    against_plain(ours, lambda q, k, v, b: plain(q, k, v, b, scale=0.7), inputs, dtype, backend)


def masks(rows, keys):
    some = torch.rand(rows, keys) > 0.4
    empty = some.clone()
    empty[[0, 3]] = False
    padding = (torch.arange(keys) < torch.tensor([keys - 2, 0])[:, None]).view(2, 1, 1, keys)
    return {"some": some, "rows without keys": empty, "padding, and a sample without keys": padding}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", masks(4, 4))
@pytest.mark.parametrize("floating", [False, True])
def test_masks(floating, which, dtype, backend):
    mask = masks(11, 19)[which]
    bias = torch.zeros(mask.shape).masked_fill(~mask, -INFINITE)
    ours = lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, bias.to(q.dtype) if floating else mask)
    against_plain(ours, lambda q, k, v: plain(q, k, v, bias.to(q.dtype)), heads(2, 2, 11, 19, 5, 5), dtype, backend)
    with fastgan.backend(backend):
        q, k, v = (t.float() for t in heads(2, 2, 11, 19, 5, 5))
        got = functional.scaled_dot_product_attention(q, k, v, mask)
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v, mask))


def test_derivatives_are_exact():
    args = [t.requires_grad_() for t in heads(1, 2, 3, 4, 2, 3)]
    bias = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    ours = lambda q, k, v, b: OPS["attention"](q, k, v, b, False, 0.8)[0]
    assert torch.autograd.gradcheck(ours, (*args, bias)) and torch.autograd.gradgradcheck(ours, (*args, bias))
    causal = lambda q, k, v: OPS["attention"](q, k, v, None, True, 0.8)[0]
    assert torch.autograd.gradcheck(causal, args) and torch.autograd.gradgradcheck(causal, args)


def test_the_formulas_hold_to_ten_digits():
    """The closed form of docs/maths.md beside autograd of the composite, each cotangent by itself and all together."""
    inputs = [*heads(2, 2, 9, 11, 5, 7), torch.randn(2, 9, 11, dtype=torch.float64)]
    inputs = [t.requires_grad_() for t in inputs]
    dy = torch.randn(2, 2, 9, 7, dtype=torch.float64, requires_grad=True)
    ours = torch.autograd.grad(functional.scaled_dot_product_attention(*inputs), inputs, dy, create_graph=True)
    theirs = torch.autograd.grad(plain(*inputs), inputs, dy, create_graph=True)
    w = [torch.randn_like(t) for t in inputs]
    for chosen in ([0], [1], [2], [3], [0, 1, 2, 3]):
        scalar = lambda grads: sum((grads[i] * w[i]).sum() for i in chosen)  # noqa: B023 (called at once)
        leaves = [*inputs, dy]
        got, want = (
            torch.autograd.grad(scalar(g), leaves, retain_graph=True, allow_unused=True) for g in (ours, theirs)
        )
        for a, b, leaf in zip(got, want, leaves, strict=True):
            assert a.abs().max() < 1e-10 * leaf.numel() if b is None else distance(a, b) < 1e-10


def test_the_third_derivative_raises():
    q, k, v = (t.requires_grad_() for t in heads(1, 1, 3, 3, 2, 2))
    first = torch.autograd.grad(functional.scaled_dot_product_attention(q, k, v).sum(), q, create_graph=True)[0]
    second = torch.autograd.grad(first.square().sum(), q, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="attention_double_backward: derivatives of this order"):
        torch.autograd.grad(second.sum(), q)


# ---- what the arguments may be ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("q", "k"), [((2, 0, 4), (2, 3, 4)), ((2, 3, 4), (2, 0, 4)), ((1, 3, 4), (1, 1, 4))], ids=str)
def test_lengths_of_zero_and_one(q, k, backend):
    q, k = torch.randn(2, *q), torch.randn(2, *k)
    with fastgan.backend(backend):
        got = functional.scaled_dot_product_attention(q, k, k)
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, k))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), INFINITE, -INFINITE])
@pytest.mark.parametrize("keys", [5, 800])
def test_what_is_not_finite_stays_in_its_rows(keys, bad, backend):
    q, k, v = (t.float() for t in heads(1, 2, 50, keys, 8, 8))
    q[0, 1, 3, 2] = bad
    with fastgan.backend(backend):
        got = functional.scaled_dot_product_attention(q, k, v)
    # torch's fused kernel gives numbers for a row of fewer keys than a vector has lanes whose scores are all NaN
    want = plain(q, k, v) if backend == "native" else F.scaled_dot_product_attention(q, k, v)
    assert torch.equal(got.isnan(), want.isnan()) and (want.isnan().any() or backend == "reference")
    torch.testing.assert_close(got.nan_to_num(), want.nan_to_num(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_do_not_overflow(backend):
    q, k, v = (t.float() for t in heads(1, 2, 50, 800, 16, 16))
    ours = lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, scale=40.0)
    with fastgan.backend(backend):
        got = orders(ours, leaves((q, k, v), torch.float32, torch.contiguous_format))
    want = orders(lambda q, k, v: plain(q, k, v, scale=40.0), leaves((q, k, v), torch.float64, torch.contiguous_format))
    for g, w in zip(got, want, strict=True):
        assert g.isfinite().all() and distance(g, w) < 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_that_lie_apart(backend):
    """Slices of one projection, [N, L, 3, heads, d], and outputs that lie as the input's memory."""
    qkv = torch.randn(2, 9, 3, 4, 8, requires_grad=True)
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
    with fastgan.backend(backend):
        y = functional.scaled_dot_product_attention(q, k, v)
        (gradient,) = torch.autograd.grad(y.square().sum(), qkv, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), qkv)
    assert y.transpose(1, 2).is_contiguous()  # so that joining the heads is a view
    z = plain(q, k, v)
    torch.testing.assert_close(y, z)
    (want,) = torch.autograd.grad(z.square().sum(), qkv, create_graph=True)
    torch.testing.assert_close(gradient, want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(second, torch.autograd.grad(want.square().sum(), qkv)[0], atol=1e-4, rtol=1e-3)
    last = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (q, k, v)]  # d is not the innermost
    with fastgan.backend(backend):
        torch.testing.assert_close(functional.scaled_dot_product_attention(*last), z)


@pytest.mark.parametrize(
    ("q", "k", "mask"),
    [
        ((5, 4), (7, 4), (5, 7)),
        ((3, 5, 4), (3, 7, 4), (3, 1, 7)),
        ((2, 3, 2, 5, 4), (2, 3, 2, 7, 4), (3, 1, 5, 7)),
        ((2, 1, 5, 4), (1, 3, 7, 4), (5, 7)),
    ],
    ids=str,
)
def test_leading_sizes_as_in_torch(q, k, mask):
    q, k, mask = torch.randn(q), torch.randn(k), torch.rand(mask) > 0.3
    torch.testing.assert_close(
        functional.scaled_dot_product_attention(q, k, k, mask),
        plain(q, k, k, torch.zeros(mask.shape).masked_fill(~mask, -INFINITE)),
    )


def test_fewer_key_heads_and_dropout():
    q, k, v = torch.randn(2, 6, 5, 4), torch.randn(2, 2, 7, 4), torch.randn(2, 2, 7, 4)
    got = functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v, enable_gqa=True))
    k = torch.randn(2, 6, 7, 4)
    everything = functional.scaled_dot_product_attention(q, k, k, dropout_p=1.0)
    assert torch.equal(everything, torch.zeros_like(everything))
    torch.manual_seed(1)
    mean = sum(functional.scaled_dot_product_attention(q, k, k, dropout_p=0.2) for _ in range(2000)) / 2000
    torch.testing.assert_close(mean, plain(q, k, k), atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"key": torch.zeros(2, 7, 5)}, ValueError, "must agree in their last size"),
        ({"key": torch.zeros(2, 7, 4).half()}, TypeError, "of one floating dtype"),
        ({"key": torch.zeros(3, 7, 4), "value": torch.zeros(3, 7, 4)}, ValueError, "must broadcast against each other"),
        ({"attn_mask": torch.zeros(5, 6)}, ValueError, r"attn_mask must broadcast against \(2, 5, 7\)"),
        ({"attn_mask": torch.zeros(5, 7, dtype=torch.int64)}, TypeError, "must be bool or floating"),
        ({"attn_mask": torch.zeros(5, 7), "is_causal": True}, ValueError, "must be None where is_causal is True"),
        ({"query": torch.zeros(4)}, ValueError, r"must be \[N, ..., L, d\]"),
    ],
    ids=str,
)
def test_refusals_are_one_sentence(change, error, sentence):
    arguments = {"query": torch.zeros(2, 5, 4), "key": torch.zeros(2, 7, 4), "value": torch.zeros(2, 7, 4)} | change
    with pytest.raises(error, match=sentence):
        functional.scaled_dot_product_attention(**arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("offset, causal", [(0.0, False), (0.0, True), (10.0, False)])
def test_attention_by_distance(offset, causal, dtype, backend):
    """As exact as distances of differences, also where queries and keys lie together far from zero."""
    seen = torch.ones(9, 13, dtype=torch.bool).tril() if causal else torch.ones(9, 13, dtype=torch.bool)

    def composite(q, k, v):
        distance = (q.unsqueeze(-2) - k.unsqueeze(-3)).square().sum(-1)
        return torch.softmax((-0.3 * distance).masked_fill(~seen, -INFINITE), -1) @ v

    q, k, v = heads(2, 2, 9, 13, 6, 5)
    ours = lambda q, k, v: functional.l2_attention(q, k, v, scale=0.3, is_causal=causal)
    against_plain(ours, composite, [q + offset, k + offset, v], dtype, backend)


def test_attention_by_distance_without_keys():
    q, k, v = (t.requires_grad_() for t in heads(1, 2, 3, 0, 4, 5))
    y = functional.l2_attention(q, k, v)
    assert y.shape == (1, 2, 3, 5) and not y.any()
    assert not torch.autograd.grad(y.sum(), q)[0].any()


# ---- the native kernels ----------------------------------------------------------------------------------------------

native = pytest.mark.skipif("native" not in BACKENDS, reason="fastgan._C is not built here")


def results(case, threads):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    *sizes, causal = case
    with fastgan.backend("native"):
        run = lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return orders(run, leaves(heads(*sizes), torch.float32, torch.contiguous_format))


@native
@pytest.mark.parametrize("case", [(1, 1, 211, 150, 8, 8, False), (1, 3, 120, 120, 8, 8, True)], ids=str)
def test_threads_share_a_head_and_add_in_order(case):
    once, again, alone = results(case, 3), results(case, 3), results(case, 1)
    for a, b, c in zip(once, again, alone, strict=True):
        assert torch.equal(a, b) and distance(a, c) < 1e-5


@native
@pytest.mark.parametrize("table", ["portable", "avx2", "avx512"])
def test_every_table(table):
    module = native_core()[0]
    if module.tables().get(table) != "":
        pytest.skip(f"this CPU or build has no kernels of the table {table}")
    module.use_table(table)
    try:
        for case in CASES[2:6]:
            *sizes, causal = case
            ours = lambda q, k, v, c=causal: functional.scaled_dot_product_attention(q, k, v, is_causal=c)
            composite = lambda q, k, v, c=causal: plain(q, k, v, causal=c)
            against_plain(ours, composite, heads(*sizes), torch.float32, "native")
    finally:
        module.use_table(None)


@native
def test_memory_is_linear_in_the_keys_at_every_order():
    """Scratch of twice the length is at most twice as much; the scores of one head alone would be four times."""

    def scratch(length):
        module = native_core()[0]
        q, k, v = (t.float().requires_grad_() for t in heads(1, 1, length, length, 8, 8))
        with fastgan.backend("native"):
            module.scratch_highest(True)
            first = torch.autograd.grad(
                functional.scaled_dot_product_attention(q, k, v).square().sum(), (q, k, v), create_graph=True
            )
            torch.autograd.grad(sum(g.square().sum() for g in first), (q, k, v))
        return module.scratch_highest()

    base, small, large = scratch(64), scratch(1024), scratch(2048)  # with what earlier calls left
    assert large < 2.5 * small + (1 << 20) and large - base < 2048 * 2048 * 4


# ---- traced ----------------------------------------------------------------------------------------------------------


class Block(torch.nn.Module):
    """A transformer block with a forward of its own."""

    def __init__(self, width=16, heads=2):
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = torch.nn.LayerNorm(width), torch.nn.Linear(width, 3 * width), None
        self.out = torch.nn.Linear(width, width)

    def forward(self, x):
        n, length, width = x.shape
        q, k, v = self.qkv(self.norm(x)).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(1, 2).reshape(n, length, width))


def test_a_traced_block_has_second_derivatives():
    """PyTorch's fused attention has none, so the way that it would take is not among the part's."""
    block, x = Block(), torch.randn(2, 9, 16, requires_grad=True)

    def second(run):
        (gradient,) = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), x)[0]

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        want = second(block)
    with pytest.raises(RuntimeError, match="derivative for aten::_scaled_dot_product_flash"):
        second(block)
    compiled = torch.compile(block, backend="fastgan")
    ran = set()
    with watching(lambda op, name, why: ran.add(op.name)):
        for _ in range(3):
            torch.testing.assert_close(second(compiled), want, atol=1e-4, rtol=1e-4)
    assert {"attention", "attention_backward", "attention_double_backward"} <= ran
    converted = fastgan.convert(Block(), trace="auto")
    for _ in range(3):
        assert second(converted).isfinite().all()
    assert "attention" in str(fastgan.explain(converted))


class FusedBlock(Block):
    """The same on our function."""

    def forward(self, x):
        n, length, width = x.shape
        q, k, v = self.qkv(self.norm(x)).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(1, 2).reshape(n, length, width))


@pytest.mark.parametrize("autocast", [False, True])
def test_r1_through_checkpointed_attention(autocast):
    """Activation checkpointing changes nothing of an exact penalty; autocast computes it in bfloat16."""
    block, x = FusedBlock(), torch.randn(3, 9, 16)
    plainly = lambda x: block(x).float().mean((1, 2))
    again = lambda x: torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False).float().mean((1, 2))

    def gradient(discriminator, autocast=autocast):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            penalty = functional.gradient_penalty(discriminator, x, kind="r1", weight=10.0)
        return torch.autograd.grad(penalty, block.qkv.weight)[0]

    got, want = gradient(again), gradient(plainly)
    assert want.abs().sum() > 0 and distance(got, want) < 1e-5
    assert distance(got, gradient(plainly, False)) < (0.05 if autocast else 1e-5)


class Judgement(torch.nn.Module):
    """A discriminator of tokens [N, L, 16] that has everything of this room in it."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out, self.gate = (torch.nn.Linear(16, width) for width in (48, 16, 64))
        self.scale, self.shift = (torch.nn.Parameter(0.3 * torch.randn(16)) for _ in range(2))

    def body(self, x):
        h = functional.layer_norm(x, (16,), scale=self.scale, shift=self.shift)
        q, k, v = self.qkv(h).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        y = functional.scaled_dot_product_attention(q, k, v) + functional.l2_attention(q, k, v)
        h, x = functional.rms_norm(self.out(y.transpose(1, 2).flatten(2)), (16,), residual=x)
        h = functional.glu(
            functional.linear_act(h, self.gate.weight, self.gate.bias, activation="gelu"), activation="silu"
        )
        return x + h[..., :16]

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=False).float().mean((1, 2))


@pytest.mark.parametrize("kind", ["r1", "r2", "r1r2"])
def test_penalties_through_everything_of_this_room(kind):
    """Under activation checkpointing, in float32 and bfloat16, against the same formulas of PyTorch in float64."""
    torch.manual_seed(3)
    module, real, fake = Judgement(), torch.randn(4, 9, 16), torch.randn(4, 9, 16)
    exact = copy.deepcopy(module).double()

    def gradients(module, dtype, autocast=False):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = functional.gradient_penalty(module, real.to(dtype), fake.to(dtype), kind=kind, weight=10.0)
        found = torch.autograd.grad(value, list(module.parameters()), allow_unused=True)
        return torch.cat([g.flatten().double() for g in found if g is not None])

    with fastgan.backend("reference"):
        want = gradients(exact, torch.float64)
    assert want.abs().sum() > 0 and distance(gradients(module, torch.float32), want) < 1e-5
    assert distance(gradients(module, torch.float32, autocast=True), want) < 0.05


# ---- in our models ---------------------------------------------------------------------------------------------------


def test_a_transformer_discriminator_s_r1_is_exact_and_on_our_kernels():
    """`vit-gan-small`'s, in float32 on the native kernels, against the plain modules in float64."""
    torch.manual_seed(0)
    _, discriminator = fastgan.models.build("vit-gan-small", d_width=24, depth=2, heads=3)
    with torch.no_grad():  # it begins nearly constant: as after some training
        for parameter in discriminator.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    images, exact = torch.randn(3, 3, 32, 32), copy.deepcopy(discriminator).double()

    def gradients(network, x):
        penalty = functional.gradient_penalty(network, x, kind="r1", weight=10.0)
        found = torch.autograd.grad(penalty, list(network.parameters()), allow_unused=True)
        return torch.cat([g.flatten().double() for g in found if g is not None])  # the last bias moves no gradient

    want, seen = gradients(exact, images.double()), set()
    converted = fastgan.convert(discriminator)
    with fastgan.backend("native"), watching(lambda op, name, why: seen.add((op.name, name))):
        got = gradients(converted, images)
    assert {(name, "native") for name in ("attention", "attention_backward", "attention_double_backward")} <= seen
    assert got.shape == want.shape and distance(got, want) < 1e-5
    assert "fastgan.attention" in str(fastgan.explain(converted))
    plain_again = fastgan.revert(converted)
    assert type(plain_again.main[1].attend[1].attention) is fastgan.models.DotProductAttention


def test_self_attention_over_pixels_is_its_formula():
    """x + gain o(v softmax(q k)) of the paper, pixel by pixel, converted too."""
    torch.manual_seed(0)
    block = fastgan.models.SelfAttention2d(8).double()
    block.gain.data.fill_(0.7)
    x = torch.randn(2, 8, 4, 6, dtype=torch.float64)
    q = block.query(x).flatten(2)
    k, v = (F.max_pool2d(layer(x), 2).flatten(2) for layer in (block.key, block.value))
    pixels = []
    for i in range(24):  # each pixel of the map looks at the six pooled ones
        share = torch.softmax(torch.einsum("nc,ncj->nj", q[:, :, i], k), -1)
        pixels.append(torch.einsum("nj,ncj->nc", share, v))
    want = x + 0.7 * block.out(torch.stack(pixels, -1).view(2, 4, 4, 6))
    torch.testing.assert_close(block(x), want)
    torch.testing.assert_close(fastgan.convert(block)(x), want)


# ---- nn.MultiheadAttention and what is built of it -------------------------------------------------------------------


class Judge(torch.nn.Module):
    """A hand-written discriminator of tokens [N, L, 8] around one of torch's modules."""

    def __init__(self, inner):
        super().__init__()
        self.first, self.inner, self.last = torch.nn.Linear(8, 16), inner, torch.nn.Linear(16, 1)

    def forward(self, x):
        h = self.first(x)
        h = self.inner(h, h, h)[0] if isinstance(self.inner, torch.nn.MultiheadAttention) else self.inner(h)
        return self.last(h).mean((1, 2))


def encoder(layers=2):
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return torch.nn.TransformerEncoder(layer, layers)


def second_derivative(run, x):
    (gradient,) = torch.autograd.grad(run(x).sum(), x, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), x)[0]


INNER = {
    "with weights": lambda: torch.nn.MultiheadAttention(16, 2, batch_first=True),
    "an encoder": encoder,
    "a layer": lambda: torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True),
}


@pytest.mark.parametrize("how", ["compile", "traced", "untraced"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("inner", INNER)
def test_modules_of_torch_have_second_derivatives_on_our_op(inner, training, how):
    """An encoder's layer in eval mode has a path of its own in torch, which it leaves where gradients are on."""
    torch.manual_seed(0)
    model, x = Judge(INNER[inner]()).train(training), torch.randn(3, 9, 8, requires_grad=True)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        want = second_derivative(model, x)
    with torch.no_grad():
        plainly = model(x)
    if how == "compile":
        torch.compiler.reset()  # a class' forward has room for eight graphs
        model = torch.compile(model, backend="fastgan")
    else:
        fastgan.convert(model, trace="auto" if how == "traced" else "off")
        named = {row.name: row for row in fastgan.explain(model).rows if row.layer.endswith("MultiheadAttention")}
        assert named and all(row.runs == "fastgan.attention" for row in named.values())
    ran = set()
    with watching(lambda op, name, why: ran.add(op.name)):
        for _ in range(2):
            torch.testing.assert_close(second_derivative(model, x), want, atol=1e-5, rtol=1e-4)
    forward = set() if inner == "with weights" else {"attention"}  # with them it comes from the weights
    assert forward | {"attention_backward", "attention_double_backward"} <= ran
    with torch.no_grad():
        torch.testing.assert_close(model(x), plainly)


def test_an_attention_that_is_not_converted_says_so():
    rows = {row.name: row for row in fastgan.explain(Judge(encoder(1))).rows}
    assert "not converted" in rows["inner.layers.0.self_attn"].why
    model = fastgan.convert(encoder(1), trace="off")
    assert type(model.layers[0].self_attn) is not torch.nn.MultiheadAttention
    assert isinstance(model.layers[0].self_attn, torch.nn.MultiheadAttention)
    assert type(fastgan.revert(model).layers[0].self_attn) is torch.nn.MultiheadAttention


def module_masks(heads=2, rows=5, keys=7):
    hidden = torch.rand(3, keys) > 0.7
    hidden[:, 0] = False
    causal = torch.ones(rows, keys, dtype=torch.bool).triu(1)
    return {
        "none": {},
        "padding": {"key_padding_mask": hidden},
        "bool": {"attn_mask": causal},
        "float of each head": {"attn_mask": torch.randn(3 * heads, rows, keys)},
        "both": {
            "attn_mask": torch.randn(rows, keys),
            "key_padding_mask": torch.zeros(3, keys).masked_fill(hidden, -9),
        },
        "causal": {"attn_mask": causal, "is_causal": True},
        "weights of each head": {"average_attn_weights": False, "attn_mask": causal},
    }


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("mask", module_masks())
def test_multi_head_attention_is_torch_s(mask, need_weights):
    """Keys and values of other widths, one's own batch order, masks: output, weights and gradients."""
    torch.manual_seed(1)
    given = module_masks()[mask]
    cases = [({"batch_first": True}, 16, 16), ({"batch_first": False, "bias": False}, 16, 16), ({}, 12, 10)]
    for options, key_width, value_width in cases:
        plain_module = torch.nn.MultiheadAttention(16, 2, kdim=key_width, vdim=value_width, **options)
        ours = fastgan.convert(copy.deepcopy(plain_module))
        inputs = [torch.randn(3, n, width) for n, width in ((5, 16), (7, key_width), (7, value_width))]
        inputs = inputs if options.get("batch_first") else [t.transpose(0, 1) for t in inputs]
        inputs = [t.requires_grad_() for t in inputs]
        results = []
        for module in (plain_module, ours):
            y, weights = module(*inputs, need_weights=need_weights, **given)
            total = y.square().sum() + (0 if weights is None else (weights * torch.arange(7)).sum())
            results.append([y, *torch.autograd.grad(total, [*inputs, *module.parameters()])])
            results[-1] += [weights] if need_weights else []
            assert (weights is None) != need_weights
        torch.testing.assert_close(results[1], results[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("of_weights", [True, False])
def test_from_the_weights_to_second_order(of_weights, dtype, backend):
    """y alone, whose derivatives are the op's, with rows without a key; y and the weights in one value."""
    bias = torch.randn(3, 50, 61, dtype=torch.float64)
    bias[:, [2, 40]] = 0.0 if of_weights else -INFINITE

    def value(y, weights):
        return y + weights.square().sum(-1, keepdim=True) if of_weights else y

    def composite(q, k, v, b):
        weights = torch.softmax(q @ k.mT * 0.7 + b, -1) if of_weights else None
        return value(plain(q, k, v, b, scale=0.7), weights)

    ours = lambda q, k, v, b: value(*attention.with_weights(q, k, v, b, 0.7))
    against_plain(ours, composite, [*heads(2, 3, 50, 61, 12, 8), bias], dtype, backend, forward=False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_who_observes_attention_with_weights_finds_the_op():
    """Forward mode is refused, as everywhere, and torch.jit.trace writes torch's ops down."""
    module, x = fastgan.convert(torch.nn.MultiheadAttention(16, 2)), torch.randn(5, 3, 16)
    names = "in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"
    into, into_bias, out, out_bias = (module.get_parameter(name).detach() for name in names)

    def run(x):
        options = None, None, False, 0.0
        return functional.multi_head_attention_forward(x, x, x, 16, 2, into, into_bias, *options, out, out_bias)

    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        run(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
    traced = torch.jit.trace(run, x, check_trace=False)
    assert "PythonOp" not in str(traced.graph)
    torch.testing.assert_close(traced(x), run(x))


def test_weights_of_a_row_without_a_key_are_nan():
    """As torch has them, but for the output, which is 0 there as everywhere in attention here."""
    module, x = torch.nn.MultiheadAttention(16, 2, bias=False), torch.randn(5, 3, 16)
    hidden = torch.zeros(5, 5, dtype=torch.bool)
    hidden[2] = True
    y, weights = fastgan.convert(module)(x, x, x, attn_mask=hidden)
    assert weights[:, 2].isnan().all() and not y[2].any()
    assert not weights[:, [0, 1, 3, 4]].isnan().any() and not y.isnan().any()


def test_multi_head_attention_of_one_sample():
    module = torch.nn.MultiheadAttention(16, 2)
    x, hidden = torch.randn(5, 16), torch.tensor([False, True, False, False, True])
    want = module(x, x, x, key_padding_mask=hidden)
    torch.testing.assert_close(fastgan.convert(module)(x, x, x, key_padding_mask=hidden), want)


def test_what_is_left_to_torch_s_multi_head_attention():
    """It runs as it did: keys of its own, a dropout in training; errors are torch's."""
    for options in ({"add_bias_kv": True}, {"add_zero_attn": True}):
        module, x = torch.nn.MultiheadAttention(16, 2, **options), torch.randn(5, 3, 16)
        want = module(x, x, x)
        torch.testing.assert_close(fastgan.convert(module)(x, x, x), want)
    module = fastgan.convert(torch.nn.MultiheadAttention(16, 2, dropout=0.5))
    ran = set()
    with watching(lambda op, name, why: ran.add(op.name)):
        assert module(x, x, x)[0].shape == x.shape
        assert not ran
        module.eval()(x, x, x, need_weights=False)
    assert ran == {"attention"}
    with pytest.raises(RuntimeError, match="attn_mask"):
        module(x, x, x, is_causal=True)
