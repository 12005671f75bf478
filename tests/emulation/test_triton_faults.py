"""Faults planted in copies of the real kernels: the checker or the comparison with the reference catches every one."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", "3.8", reason="triton 3.8 or newer is needed to emulate Triton kernels")
from checks import distance

from fastgan import kernels, testing
from fastgan._op import OPS

KERNELS = Path(kernels.__file__).parent  # beside the package in a checkout, within it in a wheel
SLICED = "c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)"
STREAMED = {
    "RESIDENT": "RESIDENT = 8192",
    "TILE": "TILE = 2048",
}  # set to 1 and 64 in every copy: streamed, small tiles

# name: (file, what stood there, what stands there now, op, what says so); "value" is the comparison
FAULTS = {
    "off by one": ("bias_act", "(s < S)[:, None]", "(s <= S)[:, None]", "bias_act", "outside every argument"),
    "missing mask": (
        "bias_act",
        "v.to(y.dtype.element_ty), mask=mask)",
        "v.to(y.dtype.element_ty))",
        "bias_act",
        "race|outside every argument",
    ),
    "lost update": ("bias_act", "dbias + chunk * C + c", "dbias + c", "bias_act_backward", "race"),
    "overlapping tiles": ("bias_act", "* BLOCK_S + tl.arange", "* (BLOCK_S // 2) + tl.arange", "bias_act", "race"),
    "wrong channel": ("numerics", "(c * P)[None, :]", "(c * (P + 1))[None, :]", "bias_act", "race|one address|outside"),
    "wrong bias": ("bias_act", "load_channels(bias, c, C", "load_channels(bias, c * 0, C", "bias_act", "value"),
    "undefined lanes": (
        "normalisation",
        "tl.load(x + at, mask=mask, other=0.0).to(tl.float32)",
        "tl.load(x + at, mask=mask).to(tl.float32)",
        "bn_act",
        "depends on lanes",
    ),
    "block of another program": ("normalisation", SLICED, SLICED.replace("% blocks", "% 1"), "bn_act", "race"),
    "chunks overlap": (
        "normalisation",
        "tl.minimum(first + rows, S)",
        "tl.minimum(first + rows + 1, S)",
        "bn_act",
        "value",
    ),
    "a chunk is forgotten": (
        "normalisation",
        "mask = (k >= 0)[:, None] & inside[None, :]",
        "mask = (k > 0)[:, None] & inside[None, :]",
        "bn_act_backward",
        "value",
    ),
    "wrong group": ("normalisation", "(C // CG) + c // CG", "(C // CG) + c // (CG + 1)", "gn_act", "value"),
    "a row is forgotten": ("column_sums", "(r < R)[:, None]", "(r < R - 1)[:, None]", "gn_act_backward", "value"),
    "wrong slope": ("numerics", "dy, dy * slope)", "dy, dy)", "bn_act_double_backward", "value"),
    "loss of half the logits": ("gan_loss", "lr += tl.where(i < m", "lr += tl.where(i < m // 2", "gan_loss", "value"),
    "into the next sample": ("samples", "(j < M)[None, :]", "(j <= M)[None, :]", "interpolate", "outside|race"),
    "a tap is forgotten": ("upfirdn2d", "(KW + UP_X - 1) // UP_X", "KW // UP_X", "upfirdn2d", "value"),
    "the padding is read": ("upfirdn2d", "(column >= 0) & ", "", "upfirdn2d", "value|outside"),
    "outputs of two programs": ("upfirdn2d", "program * BLOCK +", "program * (BLOCK // 2) +", "upfirdn2d", "race"),
    "a tap of the upsampling is forgotten": (
        "filtered_lrelu",
        "for j in range((KH + UP - 1) // UP):\n            tap",
        "for j in range(KH // UP):\n            tap",
        "filtered_lrelu",
        "value",
    ),
    "a tap of the downsampling is forgotten": (
        "filtered_lrelu",
        "along = tl.zeros((FINE_Y, OUT_X), tl.float32)\n        for i in range(KW):",
        "along = tl.zeros((FINE_Y, OUT_X), tl.float32)\n        for i in range(KW - 1):",
        "filtered_lrelu",
        "value",
    ),
    "signs of the padding": (
        "filtered_lrelu",
        "packed(is_low & inside, FINE_Y, FINE_X)",
        "packed(is_low, FINE_Y, FINE_X)",
        "filtered_lrelu",
        "value",
    ),
    "signs of two tiles": (
        "filtered_lrelu",
        "(left + TILE_X) * DOWN // 8)",
        "(left + TILE_X) * DOWN // 8 + 1)",
        "filtered_lrelu",
        "race",
    ),
    "the clamped have slopes": (
        "filtered_lrelu",
        "held != 0, 0.0, v)",
        "held != 0, v, v)",
        "filtered_lrelu_backward",
        "value",
    ),
    "a sample past the row": (
        "filtered_lrelu",
        "in_column = (tap < KW) & (column >= 0) & (column < W)",
        "in_column = (tap < KW) & (column >= 0) & (column <= W)",
        "filtered_lrelu",
        "value|outside",
    ),
    "a key past the end": ("attention", "(j < S)[None, :]", "(j <= S)[None, :]", "attention", "value|outside|race"),
    "sums keep their old maximum": ("attention", "total = total * shrink +", "total = total +", "attention", "value"),
    "rows of two programs": ("attention", "% blocks) * BLOCK +", "% blocks) * (BLOCK // 2) +", "attention", "race"),
    "delta is forgotten": ("attention", "p * (dp - row_delta[:, None])", "p * dp", "attention_backward", "value"),
    "the last keys' rows": (
        "attention",
        "range(begin, L, BLOCK)",
        "range(begin, L - 3, BLOCK)",
        "attention_backward",
        "value",
    ),
    "a row sum is forgotten": ("attention", " + shift[:, None])", ")", "attention_double_backward", "value"),
    "half of a's product": (
        "attention",
        "(product(ddq, tl.trans(k), PRECISION) + product(q, tl.trans(ddk), PRECISION))",
        "product(ddq, tl.trans(k), PRECISION)",
        "attention_double_backward",
        "value",
    ),
    "norm without its root": ("grad_norm_penalty", "tl.sqrt(squares)", "squares", "grad_norm_penalty", "value"),
}


def planted(folder, package, file="", before="", after=""):
    """A copy of kernels/ as a package of its own, with one fault; streamed norms and small tiles."""
    target = folder / package
    target.mkdir()
    for source in KERNELS.glob("*.py"):
        text = source.read_text().replace("fastgan.kernels", package)
        text = text.replace("RESIDENT = 8192", "RESIDENT = 1").replace("TILE = 2048", "TILE = 64")
        text = text.replace("LEAST_PIXELS = 64", "LEAST_PIXELS = 1").replace("LONGEST_BLOCK = 64", "LONGEST_BLOCK = 16")
        if source.stem == file:
            assert before in text, f"{file}.py has no {before!r} any more"
            text = text.replace(before, after)
        (target / source.name).write_text(text)


def arguments(name):
    """The op's example with sizes that no tile divides."""
    x, other = torch.randn(4, 18, 5, 3), torch.randn(4, 18, 5, 3)
    weight, bias = torch.rand(18) + 0.5, torch.randn(18)
    mean, var = torch.randn(2, 18), torch.rand(2, 18) + 0.5
    wide = torch.randn(1, 1, 5, 80)  # two tiles of filtered_lrelu
    q, k = torch.randn(1, 2, 35, 8), torch.randn(1, 2, 18, 8)
    square = torch.randn(35, 18)
    lse = torch.logsumexp((q + 1) @ k.mT * 0.5 + square, -1)
    of_sample, var_of_sample = torch.randn(4, 2), torch.rand(4, 2) + 0.5
    return {
        "bias_act": (x[:3], bias, "tanh", 0.0, 1.4, 1.0),
        "bias_act_backward": (x, other, "leaky_relu", 0.2, 1.4, 1.0, True),
        "bn_act": (x, weight, bias, None, None, True, 1e-5, "leaky_relu", 0.2, 2),
        "bn_act_backward": (x, other, weight, bias, mean, var, True, 1e-5, "leaky_relu", 0.2),
        "bn_act_double_backward": (
            x,
            x + other,
            weight,
            bias,
            other,
            weight,
            bias,
            mean,
            var,
            True,
            1e-5,
            "leaky_relu",
            0.2,
        ),
        "gn_act": (x, weight, bias, 2, 1e-5, "leaky_relu", 0.2),
        "gn_act_backward": (x, other, weight, bias, of_sample, var_of_sample, 1e-5, "leaky_relu", 0.2),
        "gan_loss": (x.flatten()[:40], other.flatten()[:50], "bce", "d", 0.0, True),
        "interpolate": (x, other, torch.rand(4), None),
        "grad_norm_penalty": (x, 1.0),
        "attention": (q, k, k + 1, square, False, 0.5),
        "attention_backward": (q, q + 1, k, k + 1, square, q - 1, lse, False, 0.5, True),
        "attention_double_backward": (
            *(q, q, k, k + 2, torch.randn(1, 1, 35, 18), q + 1, k, k + 1, square, lse),
            *(False, 0.5, True),
        ),
        "upfirdn2d": (x, torch.randn(4, 3), [2, 2], [1, 1], [2, 1, 2, 1], False, 1.5),
        "filtered_lrelu": (wide, bias[:1], torch.rand(5), torch.rand(3), 2, 2, [3, 4, 3, 4], False, 1.4, 0.2, 1.0),
        "filtered_lrelu_backward": (
            *(wide, torch.randint(256, (2, 1, 1, 10, 20), dtype=torch.uint8), torch.rand(3), torch.rand(5)),
            *(2, 2, [1, 1, 1, 1], [1, 1, 1, 1], True, 1.4, 0.2, 1.0, None),
        ),
    }[name]


def verdict(package, module, name):
    """What the ladder says of an op's copied kernels: the checker's words, "value", or ""."""
    args = arguments(name)
    launcher = importlib.import_module(f"{package}.{module}").LAUNCHERS[name]
    assert not launcher.declines(*args)
    checker = testing._emulator("triton")
    try:
        with checker.emulation():
            got = launcher.run(*args)
    except checker.CheckError as error:
        return str(error)
    pairs = (
        zip(got, OPS[name].reference(*args), strict=True)
        if isinstance(got, tuple)
        else [(got, OPS[name].reference(*args))]
    )
    return "value" if any(not distance(g, w) < 1e-4 for g, w in pairs) else ""


@pytest.fixture
def copies(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("planted_"):
            del sys.modules[name]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault, copies):
    file, before, after, name, words = FAULTS[fault]
    package = f"planted_{list(FAULTS).index(fault)}"
    planted(copies, package, file, before, after)
    module = name.removesuffix("_double_backward").removesuffix("_backward")
    said = verdict(package, module, name)
    assert any(word in said for word in words.split("|")), said or "nothing was said"


def test_copies_without_a_fault_are_right(copies):
    planted(copies, "planted_nothing")
    for name in {fault[3] for fault in FAULTS.values()}:
        module = name.removesuffix("_double_backward").removesuffix("_backward")
        assert verdict("planted_nothing", module, name) == "", name
