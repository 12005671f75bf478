import copy
import pickle
import sys

import pytest
import torch
from checks import distance
from torch import nn

import fastgan
from fastgan.convert import FusedBatchNorm2d, FusedConv2d
from fastgan.training.step import mixes_samples


def chain():
    return nn.Sequential(
        nn.Conv2d(3, 8, 4, 2, 1, bias=False), nn.BatchNorm2d(8), nn.LeakyReLU(0.2, inplace=True),
        nn.ConvTranspose2d(8, 6, 4, 2, 1), nn.BatchNorm2d(6), nn.ReLU(True),
        nn.Conv2d(6, 6, 3, padding=1), nn.Tanh(),
        nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4),
        nn.Flatten(), nn.Linear(4 * 14 * 14, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 1), nn.Sigmoid(),
    )  # fmt: skip


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.main = chain()

    def forward(self, x):
        return self.main(x).squeeze(1)


def results(model, x):
    y = model(x)
    return [y, *torch.autograd.grad(y.square().sum(), list(model.parameters()))]


@pytest.mark.parametrize("make", [chain, Holder])
def test_same_object_keys_parameters_and_numbers(make):
    model = make().double()
    twin = copy.deepcopy(model)
    parameters, keys = [id(p) for p in model.parameters()], list(model.state_dict())
    assert fastgan.convert(model) is model and type(model) is make().__class__
    assert [id(p) for p in model.parameters()] == parameters and list(model.state_dict()) == keys
    for training in (True, False, True):
        model.train(training), twin.train(training)
        x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
        for a, b in zip(results(model, x), results(twin, x), strict=True):
            assert (a - b).norm() <= 1e-9 * b.norm() + 1e-9
    for a, b in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_empty_and_single_chains():
    model = fastgan.convert(nn.Sequential(nn.Sequential(), nn.Sequential(nn.Conv2d(3, 4, 1))))
    assert model(torch.randn(1, 3, 2, 2)).shape == (1, 4, 2, 2)


def test_children_keep_their_types_and_survive_copying():
    model = fastgan.convert(chain())
    assert (
        isinstance(model[0], nn.Conv2d) and isinstance(model[1], nn.BatchNorm2d) and isinstance(model[2], nn.LeakyReLU)
    )
    assert repr(model[2]).endswith("(negative_slope=0.2, inplace=True)")
    x = torch.randn(4, 3, 16, 16)
    model.eval()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(x), model(x))
        assert twin[1].__dict__["_fused_activation"] is twin[2]
    assert fastgan.convert(model) is model and type(model[0]) is FusedConv2d


def test_a_hook_added_later_sees_the_norm_not_the_activation():
    model = chain()
    twin = copy.deepcopy(model)
    fastgan.convert(model)
    seen = []
    for m in (model, twin):
        for i in (1, 3, 6):  # a norm, and convolutions without and with an activation of their own
            m[i].register_forward_hook(lambda module, args, out: seen.append(out.detach().clone()))
    x = torch.randn(4, 3, 16, 16)
    assert distance(model(x).detach(), twin(x).detach()) < 1e-4
    for ours, theirs in zip(seen[:3], seen[3:], strict=True):
        assert distance(ours, theirs) < 1e-4
    assert "hooks" in str(fastgan.explain(model))


def test_what_is_left_alone_and_why():
    shared = nn.LeakyReLU(0.2)

    class HandWritten(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            return torch.relu(self.bn(self.conv(x)))

    hooked = nn.Conv2d(4, 4, 3)
    hooked.register_forward_hook(lambda *a: None)

    class MyConv(nn.Conv2d):
        pass

    model = nn.Sequential(
        HandWritten(), hooked, nn.Conv2d(4, 4, 3), shared, nn.Conv2d(4, 4, 3), shared, MyConv(4, 4, 1),
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4), nn.Tanh(),
    )  # fmt: skip
    twin = copy.deepcopy(model)
    fastgan.convert(model)
    rows = {r.name: r for r in fastgan.explain(model).rows}
    assert "hand-written" in rows["0.conv"].why and rows["0.conv"].runs == "torch"
    assert rows["1"].why == "has hooks" and rows["6"].why == "a subclass of a torch layer"
    assert rows["3"].why and rows["2"].runs == "fastgan.conv2d"
    assert rows["7.parametrizations.weight.0"].runs == "torch"
    assert isinstance(model[8], FusedBatchNorm2d) and rows["8"].runs == "fastgan.bn_act"
    x = torch.randn(2, 3, 12, 12)
    assert distance(model(x).detach(), twin(x).detach()) < 1e-4


def test_proof_undoes_a_conversion_that_changes_numbers(monkeypatch):
    model, x = chain(), torch.randn(2, 3, 16, 16)
    fastgan.convert(copy.deepcopy(model), example_input=x)  # passes as it is
    real = fastgan.nn.conv.conv_act
    monkeypatch.setattr(sys.modules["fastgan.convert"], "conv_act", lambda *args: real(*args) * 1.1)
    classes = [type(m) for m in model]
    with pytest.raises(RuntimeError, match="must give the same numbers"):
        fastgan.convert(model, example_input=x)
    assert [type(m) for m in model] == classes and not any("_fused_activation" in m.__dict__ for m in model)


def critic():
    return nn.Sequential(
        nn.Conv2d(3, 8, 4, 2, 1), nn.LayerNorm([8, 8, 8]), nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(8, 12, 3, padding=1), nn.GroupNorm(3, 12), nn.ReLU(True),
        nn.Conv2d(12, 6, 4, 2, 1), nn.InstanceNorm2d(6, affine=True, track_running_stats=True), nn.LeakyReLU(0.1),
        nn.Conv2d(6, 6, 1), nn.InstanceNorm2d(6), nn.Tanh(), nn.Flatten(), nn.LayerNorm(96), nn.Linear(96, 1),
    )  # fmt: skip


def test_norms_of_critics_give_the_same_numbers_and_penalty_gradients():
    model = critic().double()
    twin = copy.deepcopy(model)
    fastgan.convert(model)
    rows = {r.name: (r.runs, r.why) for r in fastgan.explain(model).rows}
    assert rows["1"] == ("fastgan.ln_act + leaky_relu", "") and rows["2"] == ("in the layer before it", "")
    assert rows["4"] == ("fastgan.gn_act + relu", "") and rows["7"] == ("fastgan.in_act + leaky_relu", "")
    assert rows["10"][0] == "fastgan.in_act" and rows["13"][0] == "fastgan.ln_act" and rows["11"][0] == "torch"

    def penalty(critic, x):
        x = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
        loss = fastgan.functional.grad_norm_penalty(g).mean()
        grads = torch.autograd.grad(loss, list(critic.parameters()), allow_unused=True)
        return [loss, *(torch.zeros(()) if v is None else v for v in grads)]

    for training in (True, False, True):
        model.train(training), twin.train(training)
        x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
        for a, b in zip(results(model, x) + penalty(model, x), results(twin, x) + penalty(twin, x), strict=True):
            assert a.shape == b.shape or not (a.any() or b.any())
            assert (a - b).norm() <= 1e-9 * b.norm() + 1e-9
    for a, b in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_norms_of_critics_keep_the_batch_mergeable():
    model = fastgan.convert(critic())
    assert "running statistics" in mixes_samples(model)  # child 7 averages over the batch
    model[7] = nn.InstanceNorm2d(6, affine=True)
    assert mixes_samples(fastgan.convert(model)) == ""


def test_explain_with_an_example_names_the_backends():
    model = fastgan.convert(chain())
    with fastgan.backend("reference"):
        report = fastgan.explain(model, torch.randn(2, 3, 16, 16))
    assert {op for op, _, _ in report.calls} == {"conv2d", "conv_transpose2d", "bn_act"}
    assert {backend for _, backend, _ in report.calls} == {"reference"}
    text = str(fastgan.explain(model.double(), torch.randn(2, 3, 16, 16, dtype=torch.float64)))
    assert "in the layer before it" in text and "float64" in text


def test_converted_model_trains_under_compile_and_autocast():
    model = fastgan.convert(chain())
    x = torch.randn(4, 3, 16, 16)
    torch.compile(model, backend="aot_eager")(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
