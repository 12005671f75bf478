import copy
import pickle
import sys
from collections import Counter

import pytest
import torch
from checks import distance
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import fastgan
from fastgan.convert import FusedBatchNorm2d, FusedConv2d
from fastgan.training.step import mixes_samples


def chain():
    return nn.Sequential(
        nn.Conv2d(3, 8, 4, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.LeakyReLU(0.2, inplace=True),
        nn.ConvTranspose2d(8, 6, 4, 2, 1),
        nn.BatchNorm2d(6),
        nn.ReLU(True),
        nn.Conv2d(6, 6, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(6, 4, 3),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(4 * 14 * 14, 10),
        nn.BatchNorm1d(10),
        nn.ReLU(),
        nn.Linear(10, 1),
        nn.Sigmoid(),
    )


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


class Logits(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 1, 3, padding_mode="reflect", padding=1)

    def forward(self, x):
        y = self.b(torch.relu(self.a(x)))
        y -= y.mean()  # changed inside too
        return y


LOGITS = {
    "traced": Logits,
    "a program": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 1, 3)),
    "a layer": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Conv2d(8, 1, 3, padding="same")),
    "one pixel": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Conv2d(8, 4, 14, padding="valid")),
    "made weight": lambda: nn.Sequential(nn.GELU(), spectral_norm(nn.Conv2d(3, 1, 3))),
    "signal": lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 1, 3, padding="same")),
}


@pytest.mark.parametrize("name", LOGITS)
def test_logits_may_be_changed_in_place(name):
    """One channel or one pixel: the result was a view made inside an autograd node, which refuses that."""
    model = LOGITS[name]()
    twin = copy.deepcopy(model)
    fastgan.convert(model)
    x = torch.randn(8, 3, 16, 16)
    with fastgan.racing(False):
        found = []
        for m in (model, twin):
            y = m(x)
            y += 1
            y.mul_(2).clamp_(-1, 1.5)
            found.append([y, *torch.autograd.grad(y.square().sum(), list(m.parameters()))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


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
        assert twin.forward.owner is twin and twin.state_dict().keys() == model.state_dict().keys()
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
    shared = nn.LeakyReLU(0.2)  # without parameters: fused in both places

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
        HandWritten(),
        hooked,
        nn.Conv2d(4, 4, 3),
        shared,
        nn.Conv2d(4, 4, 3),
        shared,
        MyConv(4, 4, 1),
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 1)),
        nn.BatchNorm2d(4),
        nn.Tanh(),
    )
    twin = copy.deepcopy(model)
    fastgan.convert(model, trace="off")
    rows = {r.name: r for r in fastgan.explain(model).rows}
    assert "hand-written" in rows["0.conv"].why and rows["0.conv"].runs == "torch"
    assert rows["1"].why == "has hooks" and rows["6"].why == "a subclass of a torch layer"
    assert rows["3"].runs == "in the layer before it" and rows["2"].runs == "fastgan.conv2d + leaky_relu"
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
    assert [type(m) for m in model] == classes and "forward" not in model.__dict__


# ---- eval mode: batch norm inside the convolution before it ----------------------------------------------------------


def worn(model):
    """The model in eval mode, as after training: running statistics and affine parameters that are not the defaults."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d) and m.running_mean is not None:
            nn.init.normal_(m.running_mean, 0.0, 0.5), nn.init.uniform_(m.running_var, 0.2, 3.0)
        if isinstance(m, nn.BatchNorm2d) and m.affine:
            nn.init.normal_(m.weight), nn.init.normal_(m.bias)
    return model.eval()


def converted(model, *args, **kwargs):
    """(the model, its converted copy)."""
    return model, fastgan.convert(copy.deepcopy(model), *args, **kwargs)


def ops_of(model, x):
    return Counter(op for op, _, _ in fastgan.explain(model, x).calls)


def batch_norm_and(*layers, **options):
    return nn.Sequential(layers[0], nn.BatchNorm2d(8, **options), *layers[1:])


FOLDED = {
    "conv": batch_norm_and(nn.Conv2d(4, 8, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True)),
    "biased": batch_norm_and(nn.Conv2d(4, 8, 3), nn.ReLU()),
    "no activation": batch_norm_and(nn.Conv2d(4, 8, 3, padding="same")),
    "an activation norms do not fuse": batch_norm_and(nn.Conv2d(4, 8, 1), nn.Tanh()),
    "groups": batch_norm_and(nn.Conv2d(4, 8, 3, groups=2, dilation=2), nn.ReLU()),
    "padding mode": batch_norm_and(nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"), nn.ReLU()),
    "transposed": batch_norm_and(nn.ConvTranspose2d(4, 8, 4, 2, 1, bias=False), nn.ReLU(True)),
    "transposed, biased": batch_norm_and(nn.ConvTranspose2d(4, 8, 3, 2, 1, 1), nn.LeakyReLU(0.3)),
    "not affine": batch_norm_and(nn.Conv2d(4, 8, 3), nn.ReLU(), affine=False, eps=1e-3),
    "cumulative": batch_norm_and(nn.Conv2d(4, 8, 3), nn.ReLU(), momentum=None),
}


@pytest.mark.parametrize("name", FOLDED)
def test_eval_folds_batch_norm_and_keeps_the_numbers_and_gradients(name):
    plain, ours = converted(worn(copy.deepcopy(FOLDED[name])).double())
    x = torch.randn(3, 4, 9, 9, dtype=torch.float64, requires_grad=True)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(ours(x), plain(x), rtol=1e-9, atol=1e-12)
    for a, b in zip(results(ours, x), results(plain, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert sum(ops_of(ours, x.detach().repeat(9, 1, 1, 1)).values()) == 1
    rows = {r.name: r.runs for r in fastgan.explain(ours).rows}
    assert "+ batch norm" in rows["0"] and rows["1"] == "in the layer before it"


@pytest.mark.parametrize("conv", [nn.Conv2d(40, 8, 3), nn.ConvTranspose2d(40, 8, 3, 2)])
def test_a_weight_larger_than_the_output_is_not_multiplied(conv):
    plain, ours = converted(worn(batch_norm_and(conv, nn.ReLU())).double())
    for n, calls in ((1, 2), (100, 1)):
        x = torch.randn(n, 40, 4, 4, dtype=torch.float64)
        assert sum(ops_of(ours, x).values()) == calls
        torch.testing.assert_close(ours(x), plain(x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
def test_folding_is_no_less_exact_than_pytorch_in_bf16(parameters):
    for name in ("conv", "transposed"):
        exact = worn(copy.deepcopy(FOLDED[name])).to(parameters).double()
        plain, ours = converted(copy.deepcopy(exact).to(parameters))
        x = torch.randn(3, 4, 9, 9).to(parameters)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=parameters != torch.bfloat16):
            a, b, want = ours(x), plain(x), exact(x.double())
        assert a.dtype == b.dtype == torch.bfloat16
        assert distance(a, want) <= 2 * distance(b, want)


def test_only_what_is_in_eval_mode_folds():
    plain, ours = converted(worn(chain()))
    x = torch.randn(4, 3, 16, 16)
    assert ops_of(ours, x) == Counter(conv2d=3, conv_transpose2d=1, bn_act=1)  # the bn_act after nn.Linear
    for m in (plain, ours):
        m.train()
        m[1].eval()  # frozen
    assert (
        "+ batch norm" in str(fastgan.explain(ours)) and fastgan.explain(ours).rows[4].runs == "fastgan.bn_act + relu"
    )
    for a, b in zip(results(ours, x), results(plain, x), strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-4
    for a, b in zip(ours.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    assert fastgan.explain(ours.train()).rows[1].runs == "fastgan.bn_act + leaky_relu"


def shared_norm():
    norm = nn.BatchNorm2d(4)
    return nn.Sequential(nn.Conv2d(4, 4, 3), norm, nn.Conv2d(4, 4, 3), norm)


def hooked(which):
    model = batch_norm_and(nn.Conv2d(4, 8, 3), nn.ReLU())
    model[which].register_forward_hook(lambda m, args, out: out * 2)
    return model


def spectral(wrap):
    return batch_norm_and(wrap(nn.Conv2d(4, 8, 3)), nn.ReLU())


APART = {
    "no running statistics": lambda: batch_norm_and(nn.Conv2d(4, 8, 3), nn.ReLU(), track_running_stats=False),
    "dropout between": lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.Dropout(0.5), nn.BatchNorm2d(8), nn.ReLU()),
    "activation between": lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.BatchNorm2d(8), nn.ReLU()),
    "used twice": shared_norm,
    "hook on the convolution": lambda: hooked(0),
    "hook on the norm": lambda: hooked(1),
    "old spectral norm": lambda: spectral(nn.utils.spectral_norm),
}


@pytest.mark.parametrize("late", [False, True], ids=["before convert", "after convert"])
@pytest.mark.parametrize("name", APART)
@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.spectral_norm.*:FutureWarning")
def test_what_does_not_fold_gives_the_same_numbers(name, late):
    made = worn(APART[name]())
    if late and "hook on" in name:
        plain, ours = converted(worn(batch_norm_and(nn.Conv2d(4, 8, 3), nn.ReLU())))
        for m in (plain, ours):
            m[0 if "convolution" in name else 1].register_forward_hook(lambda m, args, out: out * 2)
    else:
        plain, ours = converted(made)
    x = torch.randn(2, 4, 9, 9)
    assert "+ batch norm" not in str(fastgan.explain(ours))
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-4, atol=1e-5)


def test_statistics_and_weights_changed_in_any_way_are_seen_at_the_next_call():
    plain, ours = converted(worn(copy.deepcopy(FOLDED["conv"])))
    x = torch.randn(2, 4, 9, 9)
    ours(x)
    for m in (plain, ours):
        m[0].weight.data.mul_(2)  # none of these moves a _version that one could watch
        m[1].running_mean.numpy()[:] += 1
        m[1].weight.data = torch.full((8,), 0.5)
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-4, atol=1e-5)
    state = {name: torch.rand_like(t) for name, t in plain.state_dict().items() if t.is_floating_point()}
    call = torch.func.functional_call
    torch.testing.assert_close(call(ours, state, (x,)), call(plain, state, (x,)), rtol=1e-4, atol=1e-5)


# ---- chains taken apart ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_slices_children_and_replacements_compute_what_they_say(training):
    plain, ours = converted(worn(chain()).double())
    plain.train(training), ours.train(training)
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    for part in (slice(0, 1), slice(0, 2), slice(0, 5), slice(0, -1)):
        a, b = copy.deepcopy(ours)[part](x), copy.deepcopy(plain)[part](x)
        torch.testing.assert_close(a, b)
    without = [nn.Sequential(*list(copy.deepcopy(m).children())[:-1]) for m in (ours, plain)]
    torch.testing.assert_close(*(m(x) for m in without))
    a, b = x, x
    for ours_child, plain_child in zip(copy.deepcopy(ours), copy.deepcopy(plain), strict=True):
        a, b = ours_child(a), plain_child(b)
        torch.testing.assert_close(a, b)
    for m in (ours, plain):
        m[2], m[7] = nn.SELU(), nn.Softsign()
        m.insert(4, nn.Upsample(scale_factor=1))
    torch.testing.assert_close(ours(x), plain(x))


def test_a_data_parallel_replica_runs_its_own_children():
    plain, ours = converted(worn(copy.deepcopy(FOLDED["conv"])))
    replica = ours._replicate_for_data_parallel()
    for name, child in ours.named_children():
        copied = child._replicate_for_data_parallel()
        setattr(replica, name, copied)
        for key, p in child._parameters.items():  # as torch.nn.parallel.replicate: tensors, not Parameters
            copied._parameters[key] = None
            if p is not None:
                del copied._parameters[key]
                setattr(copied, key, (p * 2).detach())
    x = torch.randn(2, 4, 9, 9)
    for p in plain.parameters():
        p.data.mul_(2)
    torch.testing.assert_close(replica(x), plain(x), rtol=1e-4, atol=1e-5)


def test_global_hooks_see_every_child():
    model = fastgan.convert(worn(chain()))
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: seen.append(type(m)))
    try:
        model(torch.randn(4, 3, 16, 16))
    finally:
        handle.remove()
    assert len(seen) == len(model) + 1


def test_an_unbatched_image_is_refused_as_before():
    for model in converted(worn(copy.deepcopy(FOLDED["conv"]))):
        with pytest.raises(ValueError, match="expected 4D input"):
            model(torch.randn(4, 9, 9))


def test_folded_chains_compile_whole():
    plain, ours = converted(worn(copy.deepcopy(FOLDED["transposed"])))
    x = torch.randn(2, 4, 5, 5)
    y = torch.compile(ours, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(y, plain(x), rtol=1e-4, atol=1e-5)


def critic():
    return nn.Sequential(
        nn.Conv2d(3, 8, 4, 2, 1),
        nn.LayerNorm([8, 8, 8]),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.GroupNorm(3, 12),
        nn.ReLU(True),
        nn.Conv2d(12, 6, 4, 2, 1),
        nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
        nn.LeakyReLU(0.1),
        nn.Conv2d(6, 6, 1),
        nn.InstanceNorm2d(6),
        nn.Tanh(),
        nn.Flatten(),
        nn.LayerNorm(96),
        nn.Linear(96, 1),
    )


def test_norms_of_critics_give_the_same_numbers_and_penalty_gradients():
    model = critic().double()
    twin = copy.deepcopy(model)
    fastgan.convert(model)
    rows = {r.name: (r.runs, r.why) for r in fastgan.explain(model).rows}
    assert rows["1"] == ("fastgan.ln_act + leaky_relu", "") and rows["2"] == ("in the layer before it", "")
    assert rows["4"] == ("fastgan.gn_act + relu", "") and rows["7"] == ("fastgan.in_act + leaky_relu", "")
    assert (
        rows["10"][0] == "fastgan.in_act" and rows["13"][0] == "fastgan.ln_act" and rows["11"][0] == "fastgan program"
    )

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


def test_a_batch_norm_over_two_values_is_as_exact_as_pytorchs():
    """Its gradient cancels to eps / var of its terms: noise in float32, whoever computes it.

    One seed of this network may show an error a hundred times PyTorch's, another one a hundredth: compare many.
    """
    ratios = []
    for seed in range(24):
        torch.manual_seed(seed)
        plain = nn.Sequential(
            nn.Conv2d(8, 1, 4, stride=3, padding=1, padding_mode="reflect"),
            nn.BatchNorm2d(1, track_running_stats=False),
            nn.LeakyReLU(1.5),
        ).to(memory_format=torch.channels_last)
        exact, ours = copy.deepcopy(plain).double(), fastgan.convert(copy.deepcopy(plain))
        x = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
        cotangent = torch.randn(2, 1, 1, 1)
        errors = []
        for model in (ours, plain):
            gradients = []
            for m, input in ((model, x), (exact, x.double())):
                input = input.clone().requires_grad_()
                gradients.append(torch.autograd.grad((m(input) * cotangent.to(input)).sum(), [input, m[0].weight]))
            errors.append(max(distance(a, b) for a, b in zip(*gradients, strict=True)))
        ratios.append(errors[0] / errors[1])
    assert torch.tensor(ratios).log().mean().exp() < 2


@pytest.mark.parametrize("kind, x", [(nn.ConvTranspose1d, (2, 3, 5)), (nn.ConvTranspose2d, (2, 3, 5, 5))])
def test_a_transposed_convolution_takes_an_output_size(kind, x):
    model, x = nn.Sequential(kind(3, 2, 3, stride=2, padding=1)), torch.randn(x)
    size = [10] * (x.dim() - 2)
    want = model[0](x, output_size=size)
    torch.testing.assert_close(fastgan.convert(model)[0](x, output_size=size), want)


def test_explain_tells_the_layers_of_an_fx_graph_of_a_chain_and_of_a_converted_one():
    """fx calls a layer of a chain by its number, and nests in bare modules; a graph shares the layers of the chain."""

    def network():
        layers = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.LeakyReLU(0.2), nn.Conv2d(8, 1, 4)
        return nn.Sequential(nn.Sequential(*layers), nn.ReLU())

    def rows(graph):
        ours = fastgan.convert(graph)
        with fastgan.racing(False):
            ours(torch.randn(2, 3, 8, 8))
        return {row.name: row for row in fastgan.explain(ours).rows}

    plain = rows(torch.fx.symbolic_trace(network()))
    assert plain["0.0"].runs.startswith("fastgan.conv2d") and plain["0.3"].runs == "fastgan.conv2d + relu"
    assert {plain[name].runs for name in ("0.2", "1")} == {"in the layer before it"}
    assert {row.where for row in plain.values()} == {""}
    chain = fastgan.convert(network())
    shared = rows(torch.fx.symbolic_trace(chain))
    assert [shared[name].runs for name in ("0.0", "0.1", "0.3")] == [
        "fastgan.conv2d",
        "fastgan.bn_act",
        "fastgan.conv2d",
    ]
    assert "fastgan.revert" in shared["0.0"].why and shared["1"].why == "no pattern for what it does there"
    inside = fastgan.convert(Around(chain))
    with fastgan.racing(False):
        inside(torch.randn(2, 3, 8, 8))
    told = {row.name: row.runs for row in fastgan.explain(inside).rows}
    assert told["inner.0.0"] == "fastgan.conv2d" and told["inner.0.2"] == told["after"] == "in the layer before it"


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.last, self.after = inner, nn.Conv2d(1, 2, 3), nn.Tanh()

    def forward(self, x):
        return self.after(self.last(self.inner(x)))
