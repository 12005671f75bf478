"""Hand-written forwards: traced, they give the numbers, gradients, R1 gradients and side effects of plain PyTorch."""

import contextlib
import copy
import functools
import logging
import pickle
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from handwritten import FAMILIES, ResStack, SNDiscriminator, SNGenerator, UNet, images
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils._pytree import tree_leaves

import fastgan
from fastgan.choice import STATE, calls, whole
from fastgan.choice.budget import Account
from fastgan.program import switched_off
from fastgan.program.run import Compiled
from fastgan.trace import Part, graphs, part, rewrite

# layers of each family that run on our ops at least, in train mode
FUSED = {
    "sngan d": 7,
    "sngan d, hook": 7,
    "sngan d, labels": 7,
    "sngan g": 12,
    "unet": 8,
    "patchgan": 6,
    "vocoder": 12,
    "vocoder, hook": 12,
    "vocoder d": 10,
    "stylegan g": 4,
    "stylegan d": 5,
}


@pytest.fixture(autouse=True)
def ours_runs():
    """No race: plain PyTorch, which may win one, would be compared with itself."""
    with fastgan.racing(False):
        yield


def twins(name, seed=0):
    """(a family's model, its traced copy, arguments), in float64."""
    made = []
    for _ in range(2):  # not deepcopy: torch's older weight norm refuses it
        torch.manual_seed(seed)
        model, arguments = FAMILIES[name]()
        made.append(model.double())
    return made[0], fastgan.convert(made[1]), arguments


def numbers(model, arguments, seed=7):
    """Outputs, gradients (first, then R1's), and buffers."""
    torch.manual_seed(seed)
    x = [a.clone().requires_grad_() if a.is_floating_point() else a for a in arguments]
    inputs = [a for a in x if a.requires_grad]
    outputs = tree_leaves(model(*x))
    leaves = [p for p in model.parameters() if p.requires_grad]
    total = sum(y.square().sum() for y in outputs)
    first = torch.autograd.grad(total, leaves + inputs, create_graph=True, allow_unused=True)
    penalty = sum(g.square().sum() for g in first[len(leaves) :])
    second = torch.autograd.grad(penalty, leaves, allow_unused=True)
    found = [*first, *second]
    return [[y.detach() for y in outputs], [None if t is None else t.detach() for t in found], list(model.buffers())]


def assert_equal(ours, plain):
    """Strides of outputs, and all values: to rounding of the largest, since a bias before a norm has only noise."""
    assert [y.stride() for y in ours[0]] == [y.stride() for y in plain[0]]
    for these, those in zip(ours, plain, strict=True):
        scale = max((float(b.abs().max()) for b in those if b is not None and b.numel()), default=0.0)
        for a, b in zip(these, those, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12 * scale + 1e-12)


def groups(model):
    return [group for graph in model.forward.graphs for group in graph.groups]


@pytest.mark.parametrize("name", FAMILIES)
def test_families_keep_numbers_gradients_penalties_buffers_and_keys(name):
    plain, ours, arguments = twins(name)
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert [type(m).__name__ for m in ours.modules()] == [type(m).__name__ for m in plain.modules()]
    for training in (True, False):
        plain.train(training), ours.train(training)
        assert_equal(numbers(ours, arguments), numbers(plain, arguments))
    assert isinstance(ours.forward, Part) and len(groups(ours)) >= FUSED[name]


@pytest.mark.parametrize("name", ["sngan d, hook", "sngan g", "unet", "vocoder d", "stylegan g", "stylegan d"])
def test_a_graph_in_channels_last_keeps_numbers_strides_and_masks(name, monkeypatch):
    monkeypatch.setattr(graphs.Graph, "_raced", lambda self, case, arguments: self.ways["channels_last"])
    plain, ours, arguments = twins(name)
    assert_equal(numbers(ours, arguments), numbers(plain, arguments))
    x = [a.clone().requires_grad_() for a in arguments]
    torch.manual_seed(0)
    gradients = [torch.autograd.grad(sum(y.sum() for y in tree_leaves(m(*x))), x) for m in (ours, plain)]
    assert [g.stride() for g in gradients[0]] == [g.stride() for g in gradients[1]]


@pytest.mark.parametrize("name", ["sngan d", "unet"])
def test_the_backend_by_name_does_the_same(name):
    plain, _, arguments = twins(name)
    compiled = torch.compile(copy.deepcopy(plain), backend="fastgan")
    assert_equal(numbers(compiled, arguments), numbers(plain, arguments))


def test_another_batch_size_and_dtype_and_mode():
    plain, ours, _ = twins("sngan g")
    for n in (4, 7, 1, 3):
        z = torch.randn(n, 16, dtype=torch.float64)
        assert_equal(numbers(ours, (z,)), numbers(plain, (z,)))
    with torch.no_grad():
        torch.testing.assert_close(ours(z), plain(z))
    plain.float(), ours.float()
    torch.testing.assert_close(ours(z.float()), plain(z.float()), rtol=1e-4, atol=1e-5)


def test_dropout_draws_the_same_masks():
    plain, ours, (x,) = twins("unet")
    for image in (x, x.contiguous(memory_format=torch.channels_last)):
        results = []
        for model in (ours, plain):
            torch.manual_seed(3)
            results.append(model(image))
            results.append(torch.rand(3))
        torch.testing.assert_close(results[:2], results[2:])


# ---- what a user may do to the model afterwards ---------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        return F.leaky_relu(self.norm(self.conv(x)), 0.2)


def pair(model=None):
    torch.manual_seed(0)
    plain = (model or Block()).double()
    return plain, fastgan.convert(copy.deepcopy(plain)), images()


def test_hooks_are_called_with_what_they_saw_before():
    plain, ours, x = pair()
    numbers(ours, (x,))  # traced without a hook: the trace must not outlive it
    seen = {}
    for name, model in (("plain", plain), ("ours", ours)):
        numbers(model, (x,)) if name == "plain" else None
        model.norm.register_forward_hook(lambda m, args, out, name=name: seen.setdefault(name, []).append(out.detach()))
    assert_equal(numbers(ours, (x,)), numbers(plain, (x,)))
    torch.testing.assert_close(seen["ours"], seen["plain"])
    assert "hooks" in str(fastgan.explain(ours))


class EqualLR:
    """An equalised learning rate (Karras et al. 2018) as a hook in the form of torch's."""

    def __init__(self, layer):
        self.name = "weight"
        weight = layer._parameters.pop(self.name)
        layer.register_parameter(self.name + "_orig", nn.Parameter(weight.data))
        layer.register_forward_pre_hook(self)

    def compute_weight(self, module):
        weight = getattr(module, self.name + "_orig")
        return weight * (2 / weight[0].numel()) ** 0.5

    def __call__(self, module, inputs):
        setattr(module, self.name, self.compute_weight(module))


def equalised(layer):
    EqualLR(layer)
    return layer


def test_a_users_hooks_that_make_weights_are_traced():
    """A StyleGAN of 116 rows ran on PyTorch alone: its layers have such hooks."""

    class Equalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(equalised(nn.Conv2d(3, 4, 3)), nn.LeakyReLU(0.2), equalised(nn.Conv2d(4, 4, 3)))
            self.last = equalised(nn.Linear(4, 1))

        def forward(self, x):
            return self.last(F.leaky_relu(self.body(x), 0.2).mean((2, 3)))

    plain, ours, x = pair(Equalised())
    chain = fastgan.convert(nn.Sequential(equalised(nn.Conv2d(3, 4, 3)), nn.ReLU()).double())
    keys = list(plain.state_dict())
    for _ in range(2):
        assert_equal(numbers(ours, (x,)), numbers(plain, (x,)))
        with torch.no_grad():  # the next call makes the weights anew
            for model in (plain, ours):
                model.body[0].weight_orig.mul_(1.5)
    assert [group.key[0] for group in groups(ours)] == ["conv2d + leaky_relu"] * 2 and list(ours.state_dict()) == keys
    chain(x.clone().requires_grad_()).sum().backward()
    assert len(groups(chain)) == 1 and chain[0].weight_orig.grad is not None
    seen = []
    ours.body[2].register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0].shape))
    assert_equal(numbers(ours, (x,)), numbers(plain, (x,)))
    assert len(seen) == 1 and "hooks" in str(fastgan.explain(ours))


def test_global_hooks_see_every_module():
    _, ours, x = pair()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: seen.append(type(m)))
    try:
        ours(x)
    finally:
        handle.remove()
    assert seen == [nn.Conv2d, nn.BatchNorm2d, Block]


def test_a_parametrization_added_later_is_seen():
    plain, ours, x = pair()
    ours(x), plain(x)
    for model in (plain, ours):
        torch.manual_seed(1)
        nn.utils.parametrizations.spectral_norm(model.conv)
    assert_equal(numbers(ours, (x,)), numbers(plain, (x,)))


def test_layers_replaced_or_shared_are_seen():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = self.again = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            return F.relu(self.again(F.relu(self.conv(x))))

    plain, ours, x = pair(Shared())
    assert_equal(numbers(ours, (x,)), numbers(plain, (x,)))
    for model in (plain, ours):
        torch.manual_seed(2)
        model.again = nn.Conv2d(3, 5, 1).double()
    assert_equal(numbers(ours, (x,)), numbers(plain, (x,)))


def test_an_error_of_the_forward_is_all_that_is_said(capfd):
    """Dynamo said 200 lines more of it."""

    class Wrong(Block):
        def forward(self, x):
            return F.relu(self.conv(x).view(7, 11, 13))

    with pytest.raises(RuntimeError, match="shape"):
        fastgan.convert(Wrong())(images(size=8).float())
    assert capfd.readouterr() == ("", "")


class InitialisedByData(nn.Module):
    """Glow's ActNorm, as VQGAN's discriminator has it: its first batch sets its parameters."""

    def __init__(self):
        super().__init__()
        self.conv, self.shift = nn.Conv2d(3, 5, 3), nn.Parameter(torch.zeros(1, 5, 1, 1))
        self.register_buffer("ready", torch.tensor(0, dtype=torch.uint8))

    def forward(self, x):
        h = self.conv(x)
        if self.training and self.ready.item() == 0:
            with torch.no_grad():
                self.shift.data.copy_(-h.mean((0, 2, 3), keepdim=True))
                self.ready.fill_(1)
        return F.leaky_relu(h + self.shift, 0.2)


def test_parameters_set_by_the_first_batch_are_set_in_silence(monkeypatch):
    """Dynamo advised a switch of its own there, on 14 lines; outside a trace it says what it says."""
    said, handler = [], logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    monkeypatch.setattr(part.TRACER, "handlers", [handler])
    TensorVariable = torch._dynamo.variables.TensorVariable
    getattr(TensorVariable._warn_capture_scalar_outputs, "cache_clear", lambda: None)()  # said once a process
    plain, ours, x = pair(InitialisedByData())
    for _ in range(2):
        assert_equal(numbers(ours, (x,)), numbers(plain, (x,)))
    assert torch.equal(ours.shift, plain.shift) and ours.shift.abs().min() > 0 and ours.ready == 1
    assert groups(ours) and not said
    tracer = logging.getLogger("torch._dynamo.variables")
    with part._tracing():
        for say in (tracer.warning, tracer.error):
            say("consider setting")
        tracer.warning("hit config.recompile_limit")
    tracer.warning("outside")
    assert said == ["consider setting", "hit config.recompile_limit", "outside"]


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, functools.partial(nn.GroupNorm, 2)])
def test_numbers_that_dynamo_leaves_open(norm):
    """The second eps that it sees in a class's forward becomes an argument of the graph, which no program can hold."""

    class Normed(nn.Module):
        def __init__(self, eps):
            super().__init__()
            self.a, self.n, self.b = nn.Conv2d(3, 4, 3), norm(4, eps=eps), nn.Conv2d(4, 4, 3)

        def forward(self, x):
            return self.b(F.leaky_relu(self.n(self.a(x)), 0.2))

    for eps in (1e-5, 1e-3, 1e-1):
        plain, ours, x = pair(Normed(eps))
        assert_equal(numbers(ours, (x,)), numbers(plain, (x,)))
        plain.n.eps = ours.n.eps = 3 * eps
        assert_equal(numbers(ours, (x,)), numbers(plain, (x,)))


def test_the_forwards_own_warnings_are_all_that_is_warned():
    """Older networks wrap their noise as Variable(x), which the tracer cannot follow: AttnGAN, StackGAN."""

    class Old(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x):
            warnings.warn("my own", stacklevel=1)
            h = F.relu(self.a(x))
            return self.b(h + cached(2) * torch.autograd.Variable(torch.ones_like(h)))

    cached = functools.lru_cache(lambda n: n / 7)
    plain, ours, x = pair(Old())
    with pytest.warns(UserWarning) as caught:
        assert_equal(numbers(ours, (x,)), numbers(plain, (x,)))
    assert {str(w.message) for w in caught} == {"my own"} and groups(ours)


def test_graph_breaks_and_control_flow_that_depends_on_data(capsys):
    class Branching(Block):
        def forward(self, x):
            h = super().forward(x)
            print("seen", len(h))
            if h.mean() > 0:  # data
                h = F.relu(self.conv(x) + 1)
            for _ in range(x.shape[0] % 3):
                h = h * 1.5
            return h

    plain, ours, x = pair(Branching())
    for sign in (1, -1, 1):
        for model in (plain, ours):
            model.norm.bias.data.fill_(sign)
        for n in (4, 2):
            assert_equal(numbers(ours, (x[:n],)), numbers(plain, (x[:n],)))
    assert capsys.readouterr().out.count("seen") == 12


def test_a_users_autograd_function_keeps_its_second_derivative():
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return 3 * x * x * g

    class Cubed(Block):
        def forward(self, x):
            return Cube.apply(super().forward(x))

    plain, ours, x = pair(Cubed())
    assert_equal(numbers(ours, (x,)), numbers(plain, (x,)))


def test_values_written_in_place_are_not_kept_for_a_derivative():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

        def forward(self, x):
            h = F.leaky_relu(self.a(x), 0.2)  # PyTorch keeps the input, our op would keep h
            h += self.b(x)
            h[:, 0].mul_(2)
            t = self.c(h)
            u = F.relu(t)
            t.add_(1)  # relu's input; its output is another tensor
            return F.leaky_relu(u + t, 0.3)

    plain, ours, x = pair(InPlace())
    assert_equal(numbers(ours, (x,)), numbers(plain, (x,)))


def test_a_value_with_two_readers_stays():
    class Twice(Block):
        def forward(self, x):
            h = self.conv(x)
            return F.relu(h) + torch.sigmoid(h), self.norm(h)

    plain, ours, x = pair(Twice())
    assert_equal(numbers(ours, (x,)), numbers(plain, (x,)))


def test_copies_pickles_and_state_dicts():
    plain, ours, x = pair()
    numbers(ours, (x,)), numbers(plain, (x,))  # running statistics that are not the defaults
    fresh = fastgan.convert(Block().double())
    fresh.load_state_dict(ours.state_dict())
    want = numbers(plain, (x,))
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), fresh):
        assert twin.forward.owner is twin and twin.conv.weight is not ours.conv.weight
        assert_equal(numbers(twin, (x,)), want)
        assert len(groups(twin)) == 1


def test_revert_takes_everything_back():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    holder = nn.ModuleDict({"chain": model, "block": Block()})
    before = [type(m) for m in holder.modules()]
    fastgan.convert(holder)
    assert [type(m) for m in holder.modules()] != before and isinstance(holder["block"].forward, Part)
    assert fastgan.revert(holder) is holder
    assert [type(m) for m in holder.modules()] == before
    assert all("forward" not in m.__dict__ for m in holder.modules())


def test_trace_off_leaves_hand_written_forwards_alone():
    model = fastgan.convert(SNDiscriminator(), trace="off")
    assert all("forward" not in m.__dict__ for m in model.modules())
    with pytest.raises(ValueError, match="trace must be"):
        fastgan.convert(model, trace="on")


def test_where_dynamo_is_missing_everything_is_as_before(monkeypatch):
    module = sys.modules["fastgan.convert"]
    monkeypatch.setattr(module, "missing", lambda: "torch 1.0 has no Dynamo")
    model = fastgan.convert(Block())
    assert "forward" not in model.__dict__ and "no Dynamo" in str(fastgan.explain(model))


def test_explain_lists_groups_by_source_line():
    _, ours, x = pair()
    report = fastgan.explain(ours, x)
    rows = {r.name: r for r in report.rows}
    assert rows["conv"].runs == "fastgan.conv2d + batch norm + leaky_relu"
    assert rows["norm"].runs == "in the layer before it" and rows["conv"].where.startswith("test_trace.py:")
    assert {op for op, _, _ in report.calls} == {"conv2d"}


def test_explain_says_why_3d_layers_stay_with_pytorch():
    class Video(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.frame = nn.Conv3d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 3)

        def forward(self, x):
            return self.frame(F.relu(self.conv(x)).mean(2))

    plain, ours, _ = pair(Video())
    x = torch.randn(2, 3, 4, 6, 6, dtype=torch.float64)
    assert_equal(numbers(ours, (x,)), numbers(plain, (x,)))
    for model in (ours, fastgan.convert(nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU()))):
        rows = {r.layer: r for r in fastgan.explain(model).rows}
        assert rows["Conv3d"].runs == "torch" and "no faster" in rows["Conv3d"].why


def test_proof_leaves_a_group_that_differs_to_pytorch(monkeypatch):
    plain, _, x = pair()
    model = copy.deepcopy(plain).eval()
    wrong = lambda *args, **kwargs: fastgan.functional.conv2d_bn_act(*args, **kwargs) * 1.1
    monkeypatch.setitem(rewrite.FOLDED, "conv2d", wrong)
    with pytest.warns(UserWarning, match="left to PyTorch"):
        fastgan.convert(model, example_input=x)
    assert_equal(numbers(model, (x,)), numbers(plain.eval(), (x,)))
    assert "numbers differ" in str(fastgan.explain(model))


def always(way):
    """A race that this way has won."""

    def decided(contest, arguments):
        contest.settled = True
        return way

    return decided


def test_a_part_that_plain_pytorch_runs_faster_is_left_to_it(monkeypatch):
    plain, ours, x = pair()
    monkeypatch.setattr(graphs.Contest, "__call__", always("plain"))
    for _ in range(3):
        assert_equal(numbers(ours, (x,)), numbers(plain, (x,)))
    assert "won the race" in str(fastgan.explain(ours))
    ours.forward._compiled = None
    monkeypatch.setattr(Part, "_compile", lambda self: pytest.fail("Dynamo is asked"))
    assert_equal(numbers(ours, (x,)), numbers(plain, (x,)))
    monkeypatch.undo()
    assert_equal(numbers(ours, (x[:3],)), numbers(plain, (x[:3],)))  # another size is traced
    assert ours.forward.graphs[-1].calls


def test_a_call_that_no_trace_fits_any_more_is_traced_again():
    plain, ours, x = pair()
    for _ in range(3):
        assert_equal(numbers(ours, (x,)), numbers(plain, (x,)))
    assert 1 in ours.forward._known.values()
    graphs = len(ours.forward.graphs)
    for model in (plain, ours):
        model.norm.eval()  # the part's own mode stays
    for _ in range(3):
        assert_equal(numbers(ours, (x,)), numbers(plain, (x,)))
    assert len(ours.forward.graphs) > graphs and ours.forward.graphs[-1].calls


def test_warnings_as_errors_do_not_keep_an_input_that_is_no_leaf_from_being_traced():
    plain, ours, x = pair()
    scaled = [model(x.clone().requires_grad_() * 2) for model in (ours, plain)]
    torch.testing.assert_close(*scaled)
    assert len(groups(ours)) == 1


class Clock:
    """Time that passes as the ways say."""

    now = 0.0

    def __call__(self):
        return self.now


def contest(monkeypatch, held, found=None, on_calls=False, **seconds):
    clock, found = Clock(), found if found is not None else []

    def way(took):
        def run(x):
            clock.now += took
            return x * 1

        return run

    monkeypatch.setattr(STATE, "account", Account(clock, held))
    monkeypatch.setattr(whole, "remembered", lambda case: None)
    monkeypatch.setattr(whole, "remember_fact", lambda case, way: found.append(way))
    monkeypatch.setattr(whole, "keep_to", lambda case, config: None)
    ways = {name: way(took) for name, took in seconds.items()}
    return clock, whole.Contest(("case",), ways, overhead=0.05, on_calls=on_calls)


def test_a_race_goes_on_until_the_account_has_paid_for_it(monkeypatch):
    clock, race = contest(monkeypatch, 1.0, ours=0.4, plain=0.3)
    arguments = [torch.ones(2)]
    with fastgan.racing(True):
        assert race(arguments) == "ours" and not race.settled  # two first runs, then nothing is left
        answers = []
        while not race.settled:
            clock.now += 0.5
            answers.append(race(arguments))
        assert answers[-1] == race(arguments) == "plain" and len(answers) > 3
    assert all(len(samples) > 1 for samples in race.samples.values())


class Slow(torch.autograd.Function):
    """A backward pass that takes its time."""

    @staticmethod
    def forward(ctx, x, clock, took):
        ctx.clock, ctx.took = clock, took
        return x * 1

    @staticmethod
    def backward(ctx, g):
        ctx.clock.now += ctx.took
        return g * 1, None, None


def test_a_race_on_the_users_calls_runs_each_once_and_pays_nothing(monkeypatch):
    """ours is ahead in forward and behind with its backward pass, which is what training takes."""
    found = []
    clock, race = contest(monkeypatch, 0.0, found, on_calls=True, ours=0.1, plain=0.3)
    forward, calls = dict(race.ways), []
    for name, took in (("ours", 0.9), ("plain", 0.5)):

        def run(x, name=name, took=took):
            calls.append(name)
            return Slow.apply(forward[name](Slow.apply(x, clock, took / 2)), clock, took / 2)

        race.ways[name] = run
    x = torch.ones(2, requires_grad=True)
    with fastgan.racing(True):
        while not race.settled:
            way = race([x])
            assert race.watching
            y = race.watched(way, [x])
            clock.now += 10.0  # the user's loss, and other networks
            y.sum().backward()
            clock.now += 10.0
        assert race([x]) == "plain" and not race.watching and found == ["plain"]
    assert len(calls) == 2 * 3 and STATE.account.spent == 0.0 and x.grad[0] == len(calls)
    assert race.samples["ours"] == pytest.approx([1.0] * 2) and race.samples["plain"] == pytest.approx([0.8] * 2)


def test_no_way_has_all_the_dear_calls_of_a_step(monkeypatch):
    clock, race = contest(monkeypatch, 0.0, on_calls=True, ours=1.0, plain=0.8)
    run, calls = dict(race.ways), []

    def dear(x, name):
        calls.append(name)
        clock.now += 0.5 * (len(calls) % 2 == 0)
        return run[name](x)

    race.ways = {name: functools.partial(dear, name=name) for name in run}
    with fastgan.racing(True):
        while not race.settled:
            way = race([torch.ones(1)])
            if race.watching:
                race.watched(way, [torch.ones(1)])
        assert race([torch.ones(1)]) == "plain"
    assert {*calls[::2]} == {*calls[1::2]} == {"ours", "plain"}


def test_a_way_that_is_behind_costs_its_user_few_calls(monkeypatch):
    """The further behind, the fewer: a first call of each way, then 2 of one that takes 4 times as long, 3, 4, 5."""
    times = {"ours": 1.0, "far": 4.0, "half": 1.6, "third": 1.4, "near": 1.2}
    _, race = contest(monkeypatch, 0.0, on_calls=True, **{name: 1e-3 * took for name, took in times.items()})
    race.overhead, calls = 0.0, []
    with fastgan.racing(True):
        while not race.settled:
            calls.append(race([torch.ones(1)]))
            race.watched(calls[-1], [torch.ones(1)])
        assert race([torch.ones(1)]) == "ours"
    assert {name: calls.count(name) - 1 for name in times} == {"ours": 5, "far": 2, "half": 3, "third": 4, "near": 5}


def test_one_busy_run_of_two_cuts_no_way_off(monkeypatch):
    _, race = contest(monkeypatch, 0.0, on_calls=True, ours=1e-3, plain=0.9e-3)
    race.overhead, race.first, race.samples = (
        0.0,
        {"ours": 1.0, "plain": 1.0},
        {"ours": [1e-3] * 2, "plain": [9e-4, 1.0]},
    )
    assert set(race._alive()) == {"ours", "plain"}
    race.samples["plain"] = [1.0]
    assert set(race._alive()) == {"ours", "plain"}


@pytest.mark.parametrize("passes", ["none", "some gradients", "differentiated"])
def test_a_race_whose_calls_have_no_whole_backward_pass_goes_on_by_copies(monkeypatch, passes):
    _, race = contest(monkeypatch, 1e9, on_calls=True, ours=0.4, plain=0.3)
    x, weight = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    race.ways = {name: lambda x, w, way=way: way(x * w) for name, way in race.ways.items()}
    with fastgan.racing(True):
        for _ in range(whole.PATIENCE):
            y = race.watched(race([x, weight]), [x, weight])
            if passes == "some gradients":
                torch.autograd.grad(y.sum(), x)
            elif passes == "differentiated":
                torch.autograd.grad(y.sum(), [x, weight], create_graph=True)
        assert not race.first and race([x, weight]) == "plain" and race.settled
    assert STATE.account.spent > 0.0


def test_a_network_in_a_loop_of_the_users_own_races_on_its_calls(monkeypatch):
    """Two outputs, one of them read by the other, twice in one backward pass, and once without gradients."""

    class Two(Block):
        def forward(self, x):
            h = torch.relu(self.norm(self.conv(x)))
            return h, h.mean((2, 3)).tanh()

    copies = []
    monkeypatch.setattr(whole, "_seconds", lambda *a: copies.append(a) or 1.0)
    monkeypatch.setattr(whole, "remembered", lambda case: None)
    plain, ours, x = pair(Two())
    with fastgan.racing(True):
        for _ in range(60):
            for model in (plain, ours):
                model.zero_grad()
                sum(y.square().mean() for image in (x, x + 1) for y in model(image)).backward()
        for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(list(ours.buffers()), list(plain.buffers()))
        (graph,) = ours.forward.graphs
        assert list(graph.chosen) == [(("auto", True),)] and not graph.contests and not copies
        with torch.no_grad():
            for _ in range(60):
                ours(x)
        assert len(ours.forward.graphs) == 2 and ours.forward.graphs[1].chosen and not copies


def test_a_checkpointed_network_races_with_one_answer(monkeypatch):
    """Each forward runs twice, and the ways save other tensors: neither turns nor a race in between may mix them."""
    monkeypatch.setattr(whole, "remembered", lambda case: None)
    found, race = [], whole._seconds

    monkeypatch.setattr(whole, "_seconds", lambda *a: found.append(race(*a)) or 1.0)
    monkeypatch.setattr(STATE, "account", Account(Clock(), 1.0))  # pays for every run
    plain, ours, x = pair()
    again = lambda model: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    with fastgan.racing(True):
        for _ in range(6):
            for model in (plain, ours):
                model.zero_grad()
                again(model).square().mean().backward()
            for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)
    assert found and list(ours.forward.graphs[0].chosen)


@pytest.mark.parametrize("ask", [calls.is_repacked, calls._asked])
def test_hooks_on_saved_tensors_are_seen(ask):
    """Also as torch < 2.8 is asked."""
    assert not ask()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert ask() and ask()
    with torch.autograd.graph.disable_saved_tensors_hooks("none"):
        assert not ask() and not torch._C._autograd._saved_tensors_hooks_is_enabled()
    assert not ask() and torch._C._autograd._saved_tensors_hooks_is_enabled()


def test_an_answer_stands_to_the_end_of_a_run(monkeypatch):
    """So that equal seeds and caches give equal bits; what the race finds later counts from the next run on."""
    monkeypatch.setattr(STATE, "in_run", True)
    found = []
    clock, race = contest(monkeypatch, 1.0, found, ours=0.4, plain=0.3)
    answers = []
    with fastgan.racing(True):
        while not race.settled:
            answers.append(race([torch.ones(2)]))
            clock.now += 0.5
    assert set(answers) == {"ours"} and len(answers) > 3 and found == ["plain"]


def test_a_busy_moment_decides_no_race(monkeypatch):
    """Two threads that wait for each other on a busy core took 300 times as long."""
    clock, race = contest(monkeypatch, 1e9, ours=0.9, plain=0.5)
    plain, slow = race.ways["plain"], [0.0, 90.0]  # its first run, then the first that counts

    def run(x):
        clock.now += slow.pop(0) if slow else 0.0
        return plain(x)

    race.ways["plain"] = run
    with fastgan.racing(True):
        assert race([torch.ones(2)]) == "plain" and not slow


def test_what_a_trace_costs_beside_its_run_counts(monkeypatch):
    _, race = contest(monkeypatch, 1e9, ours=0.98, plain=1.0)
    with fastgan.racing(True):
        assert race([torch.ones(2)]) == "plain" and race.settled
    _, race = contest(monkeypatch, 1e9, ours=0.9, plain=1.0)
    with fastgan.racing(True):
        assert race([torch.ones(2)]) == "ours" and race.settled


def test_gan_step_with_traced_networks_equals_the_plain_one():
    def losses(convert):
        torch.manual_seed(0)
        g, d = SNGenerator().double(), SNDiscriminator().double()
        if convert:
            g, d = fastgan.convert(g), fastgan.convert(d)
        adam = lambda m: torch.optim.Adam(m.parameters(), 1e-3, betas=(0.0, 0.9))
        step = fastgan.GANStep(
            g,
            d,
            latent=16,
            g_optimizer=adam(g),
            d_optimizer=adam(d),
            loss="hinge",
            penalty="r1",
            penalty_every=2,
        )
        return [float(v) for _ in range(4) for v in step(images()).values()]

    torch.testing.assert_close(losses(True), losses(False), rtol=1e-7, atol=1e-9)


def test_inductor_and_autocast_take_a_converted_model():
    plain, ours, _ = pair(UNet().eval())
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images(size=32)).shape, plain(images(size=32)).shape)
    plain.float(), ours.float()
    image = images(size=32).float()
    with torch.autocast("cpu", torch.bfloat16):
        a, b = ours(image), plain(image)
    assert a.dtype == b.dtype
    torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)


def test_a_trace_is_paid_from_the_account_of_races():
    """So that races wait behind it, and the first step of a hand-written model keeps its bound."""
    _, model, arguments = twins("unet")
    account = STATE.account
    spent, begin = account.spent, account.clock()
    model(*arguments)
    assert account.spent - spent > 0.5 * (account.clock() - begin)
    spent = account.spent
    model(*arguments)
    assert account.spent == spent


def test_what_a_call_spends_beside_its_graph_is_measured_before_the_race(monkeypatch):
    """The clock passes 1 s at each look: every call spends some beside its graph, and the race gets to know it."""
    looks = iter(range(10_000))
    monkeypatch.setattr(STATE, "account", Account(lambda: float(next(looks)), 1e9))
    told = []
    monkeypatch.setattr(graphs.Contest, "__call__", lambda race, arguments: (told.append(race.overhead), "ours")[1])
    _, ours, x = pair()
    with torch.no_grad():
        for _ in range(6):
            ours(x)
    assert told == [None, None, None, None, 2.0, 2.0]  # traced, learned to be traced, measured twice
    _, named, _ = pair()
    named = torch.compile(fastgan.revert(named), backend="fastgan")
    with torch.no_grad():
        named(x)
    assert told[-1] == 0.0  # every way goes through Dynamo


# ---- straight stretches as programs ---------------------------------------------------------------------------------


class Ladder(nn.Module):
    """Every layer that programs know, one after the other, and a skip that ends a stretch."""

    def __init__(self):
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 6, 4, 2, 1), spectral_norm(nn.Conv2d(6, 8, 3, padding=1, bias=False))
        self.b2, self.c3, self.i3 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1), nn.InstanceNorm2d(8)
        self.up, self.g = nn.ConvTranspose2d(8, 4, 4, 2, 1), nn.GroupNorm(2, 4)
        self.l1, self.n1, self.l2 = nn.Linear(1024, 9), nn.BatchNorm1d(9), nn.Linear(9, 1)

    def forward(self, x):
        h = F.leaky_relu(self.c1(x), 0.2)
        h = F.relu(self.b2(self.c2(h)))
        h = h + F.relu(self.i3(self.c3(h)))
        h = F.leaky_relu(self.g(self.up(h)), 0.1)
        h = F.relu(self.n1(self.l1(torch.tanh(h).flatten(1))))
        return self.l2(h)


class SignalLadder(nn.Module):
    """The same of signals: both norms of a weight, dilation, groups, strides, norms of [N, C, L]."""

    def __init__(self):
        super().__init__()
        self.c1 = weight_norm(nn.Conv1d(3, 6, 5, 2, 2))
        self.c2, self.b2 = spectral_norm(nn.Conv1d(6, 8, 3, padding=3, dilation=3, groups=2)), nn.BatchNorm1d(8)
        self.c3, self.c4 = weight_norm(nn.Conv1d(8, 8, 3, padding=1)), nn.Conv1d(8, 8, 7, padding=3, bias=False)
        self.up, self.g = weight_norm(nn.ConvTranspose1d(8, 4, 8, 4, 2)), nn.GroupNorm(2, 4)
        self.last = nn.ConvTranspose1d(4, 1, 3, 2, 1, 1)

    def forward(self, x):
        h = F.leaky_relu(self.c1(x), 0.2)
        h = F.relu(self.b2(self.c2(h)))
        h = h + self.c4(F.leaky_relu(self.c3(h), 0.1))
        h = F.leaky_relu(self.g(self.up(h)), 0.1)
        return torch.tanh(self.last(h))


class SharedNorm(nn.Module):
    """One batch norm in two branches: its running statistics follow the order of the calls."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.n = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, momentum=0.5)

    def forward(self, x):
        h = F.relu(self.n(self.a(x)))
        g = F.relu(self.n(self.a(2 * x + 1)))
        return self.b(h) + F.relu(self.b(g))


class WritesBetween(nn.Module):
    """What the first layer of a stretch reads is written to before the second one runs."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x):
        x = x * 2
        h = F.relu(self.a(x))
        with torch.no_grad():
            x.detach().zero_()
        return F.relu(self.b(h)).sum() + x.sum() + self.c(F.relu(self.b(F.relu(self.a(x + 1))))).sum()


@pytest.fixture
def programs(monkeypatch):
    """The programs that ran."""
    found, run = [], Compiled.run
    monkeypatch.setattr(Compiled, "run", lambda self, *args: (found.append(self), run(self, *args))[1])
    return found


def signals(length=16):
    return torch.randn(2, 3, length, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("network", [Ladder, SharedNorm, SignalLadder])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
def test_straight_stretches_run_as_programs_with_the_same_numbers(network, layout, programs):
    torch.manual_seed(0)
    plain = network().to(memory_format=layout)
    ours = fastgan.convert(copy.deepcopy(plain))
    if network is SignalLadder:  # channels innermost, or not
        x = signals().unsqueeze(2).contiguous(memory_format=layout).squeeze(2)
    else:
        x = images(size=16 if network is Ladder else 9).float().contiguous(memory_format=layout)
    for given in (lambda: x, lambda: x.clone().requires_grad_(), lambda: x.clone().requires_grad_() * 1):
        results = []
        for model in (ours, plain):
            image = given()
            total = sum(y.square().sum() for y in tree_leaves(model(image)))
            sources = [*([image] if image.requires_grad else []), *model.parameters()]
            first = torch.autograd.grad(total, sources, create_graph=image.requires_grad)
            second = ()
            if image.requires_grad:
                second = torch.autograd.grad(first[0].square().sum(), list(model.parameters()), allow_unused=True)
            results.append([[total.detach()], [*first], [g for g in second if g is not None], [*model.buffers()]])
        for these, those in zip(*results, strict=True):  # a bias before a norm has the noise of the others alone
            scale = max((float(b.detach().abs().max()) for b in those), default=0.0)
            for a, b in zip(these, those, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * scale)
    assert len(programs) > 2
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), plain.eval()(x), rtol=1e-4, atol=1e-4)


def test_a_stretch_reads_what_its_first_layer_would_have_read():
    plain, ours = (WritesBetween() for _ in range(2))
    ours.load_state_dict(plain.state_dict())
    fastgan.convert(ours)
    x = images(size=9).float()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), plain(x), rtol=1e-4, atol=1e-4)


def test_a_stretch_ends_where_a_value_has_another_reader_or_is_written():
    def lengths(network, size):
        _, ours, _ = pair(network())
        ours(signals(size).double() if network is SignalLadder else images(size=size))
        (graph,) = ours.forward.graphs
        modules = graph.ways["ours"].__self__.children()
        return [len(m.calls) for m in modules]

    assert lengths(Ladder, 16) == [2, 2, 2, 3]
    assert lengths(SignalLadder, 16) == [3, 2, 3]
    assert lengths(SharedNorm, 9) == [2]  # the second call of the norm; the first one must come before it
    assert lengths(WritesBetween, 9) == [3]


def test_stretches_of_signals_equal_their_ops_to_the_bit(programs):
    """A residual stack of HiFi-GAN; gradients of biases sum in the layout's order, which a program's inside decides."""
    torch.manual_seed(0)
    ours = fastgan.convert(ResStack(4, 3, weight_norm))
    x, found = torch.randn(2, 4, 24), []
    for off in (False, True):
        with switched_off() if off else contextlib.nullcontext():
            y = ours(x)
            found.append([y, *torch.autograd.grad(y, list(ours.parameters()), torch.ones_like(y))])
        assert len(programs) == 3
    for name, a, b in zip(("y", *dict(ours.named_parameters())), *found, strict=True):
        exact = {"rtol": 1e-6, "atol": 1e-5} if name.endswith("bias") else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(a, b, **exact, msg=name)


def test_signals_keep_their_r1_gradients_in_float64(programs):
    plain, ours, _ = pair(SignalLadder())
    x = signals().double()
    for training in (True, False):
        plain.train(training), ours.train(training)
        assert_equal(numbers(ours, (x,)), numbers(plain, (x,)))
    assert list(ours.state_dict()) == list(plain.state_dict())
    want = numbers(plain.train(), (x,))
    plain.float(), ours.train().float()
    assert not programs
    got = numbers(ours, (x.float(),))  # from a leaf, by the ops; behind another layer by programs
    scale = max(float(b.abs().max()) for b in want[1] if b is not None)
    for a, b in zip(got[1], want[1], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4 * scale)


def test_a_hook_inside_a_stretch_of_signals_is_called_and_programs_come_back(programs):
    ours, seen, x = fastgan.convert(SignalLadder()), [], signals()
    want = ours.eval()(x)
    handle = ours.c3.register_forward_hook(lambda m, args, y: seen.append(y.shape))
    before = len(programs)
    torch.testing.assert_close(ours(x), want)
    assert seen == [(2, 8, 8)] and before and len(programs) == before
    handle.remove()
    assert torch.equal(ours(x), want) and len(programs) > before and len(seen) == 1
