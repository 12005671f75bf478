import json
import subprocess
import sys

import pytest
import torch

import fastgan
from fastgan import functional
from fastgan.backends import cache_dir, load_winners, missing, winners

CORE = pytest.mark.skipif(bool(missing("native")), reason=f"no native core here: {missing('native')}")


@pytest.fixture
def forget(monkeypatch):
    """A process that has decided nothing yet."""
    module = sys.modules["fastgan.backends"]
    monkeypatch.setattr(module, "_chosen", {})
    monkeypatch.setattr(module, "_winners", None)
    monkeypatch.setattr(module, "_disabled", {})
    return module


def call(n=2):
    return functional.bias_act(torch.randn(n, 3, 4, 4))


def test_table_has_a_reason_for_everything_missing():
    table = fastgan.backends()
    assert set(table) >= {"conv2d", "conv_transpose2d", "conv2d_weight", "bn_act", "bias_act", "gan_loss"}
    for row in table.values():
        assert set(row) == {"cuda", "triton", "native", "reference"} and row["reference"] == (True, "")
        assert all(available != bool(reason) for available, reason in row.values())


def test_backend_nests_and_is_a_plain_call():
    state = sys.modules["fastgan.backends"]
    with fastgan.backend("reference"):
        with fastgan.backend("auto"):
            assert state._forced == "auto"
        assert state._forced == "reference"
    assert state._forced == "auto"
    fastgan.backend("reference")
    assert state._forced == "reference"
    fastgan.backend("auto")


def test_unknown_or_missing_backends_say_so():
    with pytest.raises(ValueError, match="backend: name must be one of auto"):
        fastgan.backend("cudnn")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="backend: cuda must be available, got none: "):
            fastgan.backend("cuda")


@CORE
def test_a_declined_case_runs_on_the_reference():
    calls = []
    with fastgan.backend("native"), sys.modules["fastgan.backends"].watching(lambda *c: calls.append(c[1:])):
        call()
        functional.bias_act(torch.randn(2, 3).double())
    assert calls[0][0] == "native" and calls[1][0] == "reference" and "float64" in calls[1][1]


@CORE
def test_winners_are_remembered_and_travel(forget):
    call()
    stored = json.loads((cache_dir() / "winners.json").read_text())
    assert len(winners()) > 0 and set(winners()) <= set(stored)
    digest = next(iter(winners()))
    load_winners({digest: "reference"})
    calls = []
    with forget.watching(lambda op, name, why: calls.append(name)):
        call()
    assert calls == ["reference"]


@CORE
@pytest.mark.parametrize("content", ["", "{", "[1, 2]", '{"a": 3}', '{"a": "gone"}'])
def test_a_damaged_cache_counts_as_empty(forget, content):
    path = cache_dir() / "winners.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    call()
    assert all(v in forget.NAMES for v in json.loads(path.read_text()).values())


@CORE
def test_a_kernel_that_fails_its_proof_is_switched_off(forget, monkeypatch):
    from fastgan._op import OPS
    from fastgan.backends import Backend

    op = OPS["bias_act"]
    wrong = Backend(lambda x, *rest: op.reference(x, *rest) * 1.01)
    monkeypatch.setitem(op.backends, "native", wrong)
    x = torch.randn(5, 7, 3, 3)
    with pytest.warns(RuntimeWarning, match="bias_act on native is switched off: output 0 must be within"):
        y = functional.bias_act(x)
    torch.testing.assert_close(y, torch.nn.functional.leaky_relu(x, 0.2))
    assert fastgan.backends()["bias_act"]["native"][0] is False


@CORE
def test_racing_can_be_switched_off(forget):
    with fastgan.racing(False):
        calls = []
        with forget.watching(lambda op, name, why: calls.append(name)):
            call(7)
    assert calls == ["native"]


@CORE
def test_the_slow_backend_loses(forget, monkeypatch):
    import time

    from fastgan._op import OPS
    from fastgan.backends import Backend

    op = OPS["bias_act"]
    monkeypatch.setitem(op.backends, "native", Backend(lambda *a: (time.sleep(0.02), op.reference(*a))[1]))
    calls = []
    with forget.watching(lambda op, name, why: calls.append((name, why))):
        call(11)
    assert calls == [("reference", "PyTorch's own op won the race")]


def test_environment_variable_forces_and_never_breaks_the_import():
    code = "import fastgan, sys; print(sys.modules['fastgan.backends']._forced)"
    for value, want in [("reference", "reference"), ("nonsense", "auto")]:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True,
            env={**__import__("os").environ, "FASTGAN_BACKEND": value},
        )  # fmt: skip
        assert done.returncode == 0 and done.stdout.strip() == want, done.stderr
