"""The captured step: replays against eager steps, what ends a graph's validity, and what falls back.

CUDA's graphs are stood in for by tests/emulation/cpu_graphs.py, so that the logic around them runs everywhere; the
tests marked gpu run the same on a card.
"""

import copy
import importlib.util
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import fastgan
from fastgan.training import capture, step
from fastgan.training.assembly import assemble
from fastgan.training.recording import Recording, difference


def emulator():
    path = Path(__file__).parent / "emulation" / "cpu_graphs.py"
    spec = importlib.util.spec_from_file_location("cpu_graphs", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.CPUGraphs()


@pytest.fixture
def graphs(monkeypatch):
    """CPU steps are captured, by an emulator."""
    made = emulator()
    torch.set_num_threads(1)  # tiny networks
    monkeypatch.setattr(step, "capturable_device", lambda device: "")
    monkeypatch.setattr(step, "graphs_of", lambda device: made)
    with fastgan.backend("reference"):
        yield made


def networks(dropout=0.0, labels=False):
    g = nn.Sequential(
        nn.ConvTranspose2d(5, 6, 4), nn.BatchNorm2d(6), nn.ReLU(), nn.ConvTranspose2d(6, 2, 4, 2, 1), nn.Tanh()
    )
    d = nn.Sequential(
        nn.Conv2d(2, 6, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Dropout(dropout),
        nn.Conv2d(6, 6, 3, 1, 1),
        nn.BatchNorm2d(6),
        nn.LeakyReLU(0.2),
        nn.Conv2d(6, 1, 4),
        nn.Flatten(0),
    )
    return (Conditional(g, 5), Conditional(d, 2)) if labels else (g, d)


class Conditional(nn.Module):
    def __init__(self, net, channels):
        super().__init__()
        self.net, self.embed = net, nn.Embedding(3, channels)

    def forward(self, x, labels):
        return self.net(x + self.embed(labels)[:, :, None, None])


def adam(module, **options):
    return torch.optim.Adam(module.parameters(), 1e-3, betas=(0.5, 0.999), **{"fused": True, **options})


def pair(device="cpu", dropout=0.0, labels=False, seeded=False, convert=True, optimizer=adam, **options):
    """The same step twice: captured and eager, with float64 networks (fp32 under autocast)."""
    dtype = torch.float64 if options.get("precision", "fp32") == "fp32" else torch.float32
    built = networks(dropout, labels)
    made = []
    for mode in ("auto", "off"):
        g, d = (copy.deepcopy(m).to(device, dtype) for m in built)
        if convert:
            g, d = fastgan.convert(g), fastgan.convert(d)
        rng = torch.Generator(device).manual_seed(5) if seeded else None
        settings = {"latent": (5, 1, 1), **options}
        made.append(
            fastgan.GANStep(g, d, g_optimizer=optimizer(g), d_optimizer=optimizer(d), capture=mode, rng=rng, **settings)
        )
    return made


def images(n=6, device="cpu", dtype=torch.float64):
    return torch.randn(n, 2, 8, 8, device=device, dtype=dtype).tanh()


def same(ours, theirs, close):
    for a, b in (
        (ours.generator, theirs.generator),
        (ours.discriminator, theirs.discriminator),
        (ours.ema, theirs.ema),
    ):
        if a is None:
            continue
        for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
            # learning rates are float32 scalars on the device: 6e-8 of a step of 1e-3
            torch.testing.assert_close(x, y, rtol=close, atol=close / 50, msg=lambda m, name=name: f"{name}: {m}")


def walk(ours, theirs, steps, batches=None, close=1e-6, **more):
    """Both steps on the same data and random numbers; every metric equal at every step, the state at the end."""
    device = ours.device.type
    kept = []
    for i in range(steps):
        real = batches(i) if batches else images(device=device, dtype=ours.dtype)
        found = []
        for one in (ours, theirs):
            torch.manual_seed(100 + i)
            found.append(one(real, **more))
        assert found[0].keys() == found[1].keys()
        kept.append((found[0], {k: v.clone() for k, v in found[1].items()}))
    for a, b in kept:  # looked at only now: a later replay must not have changed an earlier step's metrics
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=close, atol=close / 10)
    assert ours.d_updates == theirs.d_updates
    same(ours, theirs, close)


CASES = {
    "bce": {},
    "relativistic-r1r2": dict(loss="relativistic", penalty="r1r2"),
    "wasserstein-gp": dict(loss="wasserstein", penalty="wgan-gp", d_steps=2),
    "hinge-dragan": dict(loss="hinge", penalty="dragan"),
    "our-adam": dict(optimizer=lambda m: fastgan.Adam(m.parameters(), 1e-3, betas=(0.5, 0.999)), ema=0.9),
    "lazy-r1-ema": dict(penalty="r1", penalty_every=3, ema=0.9),
    "lsgan-own-generator": dict(loss="lsgan", seeded=True, penalty="wgan-gp"),
    "two-passes": dict(convert=False, dropout=0.3),
    "augment": dict(augment=lambda x: x + 0.1 * torch.randn_like(x)),
    "bf16": dict(precision="bf16", penalty="r1"),
    "extra-losses": dict(
        penalty="r1",
        extra_d_loss=lambda o: 0.01 * o.d_real.square().mean(),
        extra_g_loss=lambda o: (o.fake - o.real).abs().mean() + (o.d_fake - o.d_real).abs().mean(),
    ),
    "clipped-parts": dict(loss="wasserstein", grad_clip=0.1, weight_clip=0.05, accumulate=2),
}


@pytest.mark.parametrize("case", CASES)
def test_replays_equal_eager_steps(graphs, case):
    ours, theirs = pair(**CASES[case])
    walk(ours, theirs, 14)
    assert ours._capture.declined == "" and graphs.replays >= 3 and "CUDA graph" in ours.explain()
    assert "eager (capture is off)" in theirs.explain()


def test_a_lazy_penalty_is_two_graphs(graphs):
    ours, theirs = pair(penalty="r1", penalty_every=3)
    walk(ours, theirs, 15)
    assert graphs.captures == 2 and graphs.warm_ups == 6 and graphs.replays == 9
    assert "2 CUDA graphs, 9 replays" in ours.explain()


def test_every_pattern_of_due_penalties_is_a_graph(graphs):
    ours, theirs = pair(penalty="r1", penalty_every=3, d_steps=2)
    walk(ours, theirs, 18)  # (yes, no), (no, yes), (no, no)
    assert graphs.captures == 3


def test_shapes_and_types_have_graphs_of_their_own(graphs):
    ours, theirs = pair()
    batches = lambda i: images(6 if i % 2 else 4)
    walk(ours, theirs, 12, batches)
    assert graphs.captures == 2 and graphs.replays == 6
    layout = lambda i: images().contiguous(memory_format=torch.channels_last)
    walk(ours, theirs, 5, layout)
    assert graphs.captures == 3


def test_the_number_of_captures_is_bounded(graphs, monkeypatch):
    monkeypatch.setattr(capture, "MAX_CAPTURES", 2)
    ours, theirs = pair(penalty="r1")
    for weight in (1.0, 2.0):
        ours.penalty_weight = theirs.penalty_weight = weight
        walk(ours, theirs, 4)
    ours.penalty_weight = theirs.penalty_weight = 3.0
    with pytest.warns(RuntimeWarning, match="changed 2 times"):
        walk(ours, theirs, 4)
    walk(ours, theirs, 2)
    assert graphs.captures == 2


def test_the_number_of_keys_is_bounded(graphs, monkeypatch):
    monkeypatch.setattr(capture, "MAX_CAPTURES", 2)
    ours, theirs = pair()
    with pytest.warns(RuntimeWarning, match="more than 2 kinds of steps"):
        walk(ours, theirs, 3, lambda i: images(4 + i))
    assert graphs.captures == 0 and not ours._capture._entries


def test_labels_latents_and_sequences(graphs):
    ours, theirs = pair(labels=True, d_steps=2)
    walk(
        ours,
        theirs,
        6,
        lambda i: [images(), images()],
        labels=[torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([2, 2, 1, 1, 0, 0])],
        z=[torch.randn(6, 5, 1, 1).double() for _ in range(2)],
    )
    assert graphs.replays == 3


def test_drawn_latents_by_a_callable(graphs):
    draw = lambda n, device, rng: torch.rand(n, 5, 1, 1, device=device, generator=rng, dtype=torch.float64)
    ours, theirs = pair(latent=draw, seeded=True, d_steps=2)
    walk(ours, theirs, 8)
    assert graphs.replays == 5


class Noisy(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, z, noise):
        return self.net(z + 0.1 * noise)


@pytest.mark.parametrize("d_steps", [1, 2])
def test_latents_in_tuples(graphs, d_steps):
    draw = lambda n, device, rng: (torch.randn(n, 5, 1, 1).double(), torch.rand(n, 5, 1, 1).double())
    ours, theirs = pair(latent=draw, d_steps=d_steps)
    for one in (ours, theirs):
        one.generator = Noisy(one.generator)
    walk(ours, theirs, 8)
    assert graphs.replays >= 3 and ours._capture.declined == ""


def test_learning_rates_may_change_at_every_step(graphs):
    ours, theirs = pair()
    schedules = [
        torch.optim.lr_scheduler.ExponentialLR(o, 0.7) for s in (ours, theirs) for o in (s.g_optimizer, s.d_optimizer)
    ]
    for _ in range(8):
        walk(ours, theirs, 1)
        for schedule in schedules:
            schedule.step()
    assert graphs.captures == 1 and graphs.replays == 5
    rates = [g["lr"] for o in (ours.g_optimizer, ours.d_optimizer) for g in o.param_groups]
    assert all(isinstance(lr, float) for lr in rates) and rates[0] == pytest.approx(1e-3 * 0.7**8)
    assert not ours.g_optimizer.param_groups[0]["capturable"]


def test_gradients_are_those_of_the_step(graphs):
    ours, theirs = pair(penalty="r1", penalty_every=2)
    for _ in range(12):
        walk(ours, theirs, 1)
        for a, b in ((ours.generator, theirs.generator), (ours.discriminator, theirs.discriminator)):
            for p, q in zip(a.parameters(), b.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-8)


def change_penalty_weight(s):
    s.penalty_weight = 3.0


def change_beta(s):
    for group in s.d_optimizer.param_groups:
        group["betas"] = (0.1, 0.9)


def load_optimizer(s):
    s.g_optimizer.load_state_dict(copy.deepcopy(s.g_optimizer.state_dict()))


def replace_parameter(s):
    with torch.no_grad():
        last = list(s.discriminator.modules())[1]
        last.weight.data = last.weight.data.clone() * 0.5


def replace_optimizer(s):
    s.d_optimizer = torch.optim.Adam(s.discriminator.parameters(), 2e-3, betas=(0.5, 0.999), fused=True)


def freeze(s):
    next(s.discriminator.parameters()).requires_grad_(False)


def evaluate(s):
    for m in s.discriminator.modules():
        m.training = False


CHANGES = (change_penalty_weight, change_beta, load_optimizer, replace_parameter, replace_optimizer, freeze, evaluate)


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_what_a_replay_cannot_follow_is_captured_anew(graphs, change):
    ours, theirs = pair(penalty="r1", ema=0.9)
    walk(ours, theirs, 5)
    for one in (ours, theirs):
        change(one)
    walk(ours, theirs, 6)
    assert graphs.captures == 2 and graphs.replays == 2 + 3


def test_a_forced_backend_is_obeyed(graphs):
    ours, theirs = pair()
    walk(ours, theirs, 5)
    before = graphs.replays
    with fastgan.backend("auto"):
        walk(ours, theirs, 1)
    assert graphs.replays == before


@pytest.mark.parametrize("name, width", [("dcgan-28", 2), ("sngan-32", 2), ("r3gan-small", 16), ("vit-gan-small", 4)])
def test_recipes_are_captured(graphs, name, width):
    """Dropout, spectral norm's power iteration, R1 + R2 with an average: nothing in them is taken for a violation."""
    recipe = fastgan.recipes()[name]
    options = recipe.model_options | {"g_width": width, "d_width": width}
    recipe = recipe.replace(batch_size=4, d_steps=min(recipe.d_steps, 2), model_options=options)
    real = [torch.rand(4, recipe.channels, recipe.image_size, recipe.image_size) * 2 - 1] * recipe.d_steps
    ours, theirs = (assemble(recipe, torch.device("cpu"), capture=mode)[2] for mode in ("auto", "off"))
    for i in range(5):
        found = []
        for one in (ours, theirs):
            torch.manual_seed(i)
            found.append(one(real))
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert ours._capture.declined == "" and graphs.replays == 2


# ---- fallbacks ------------------------------------------------------------------------------------------------------


class Faulty(nn.Module):
    """Adds a violation behind a discriminator."""

    def __init__(self, fault):
        super().__init__()
        self.fault, self.calls, self.mean = fault, 0, torch.zeros((), dtype=torch.float64)

    def forward(self, x):
        self.calls += 1
        if self.fault == "reads back":
            return x * (1.0 if x.sum().item() > -1e9 else 2.0)
        if self.fault == "branches":
            return x * 1.0 if bool((x > -1e9).all()) else x
        if self.fault == "counts":
            return x * (1 + 0.01 * self.calls)
        if self.fault == "alternates":
            return x.sin() if self.calls % 2 else x.cos()  # three calls a step: two passes of D's update, one of G's
        self.mean = self.mean.lerp(x.detach().mean(), 0.1)  # "replaces": its next step reads another tensor
        return x - self.mean


@pytest.mark.parametrize(
    "fault, words",
    [
        ("reads back", "reads a value back"),
        ("branches", "reads a value back"),
        ("counts", "aten.mul.Tensor takes"),
        ("alternates", "ops change from step to step"),
        ("replaces", "replaced, not changed in place"),
    ],
)
def test_models_that_a_replay_would_get_wrong_run_eagerly(graphs, fault, words):
    ours, theirs = pair()
    for one in (ours, theirs):
        one.discriminator.append(Faulty(fault))
    with pytest.warns(RuntimeWarning, match=words) as told:
        walk(ours, theirs, 6)
    assert len(told) == 1 and graphs.captures == 0 and words in ours.explain()


def test_a_failing_capture_leaves_the_step_as_it_was(graphs):
    ours, theirs = pair(penalty="r1", penalty_every=2, ema=0.9)
    graphs.fail = RuntimeError("CUDA error: operation not permitted when stream is capturing\nand so on")
    with pytest.warns(
        RuntimeWarning, match="capture failed with RuntimeError: CUDA error: operation not permitted"
    ) as told:
        walk(ours, theirs, 8)
    assert len(told) == 1 and graphs.captures == 1 and graphs.replays == 0


def test_a_failing_capture_in_the_middle_of_a_scaled_step(graphs):
    ours, _ = pair(precision="fp16")
    counter = Late()
    ours.discriminator.append(counter)
    for _ in range(3):
        ours(images(dtype=torch.float32))
    before = copy.deepcopy(ours.discriminator.state_dict())
    counter.broken = True
    with pytest.warns(RuntimeWarning, match="not now"), pytest.raises(RuntimeError, match="not now"):
        ours(images(dtype=torch.float32))  # eager after the failed capture: the model's own error is seen
    counter.broken = False
    for name, value in ours.discriminator.state_dict().items():
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(value, before[name]), name
    metrics = ours(images(dtype=torch.float32))
    assert metrics["d_loss"].isfinite()


def test_a_step_that_raises_is_no_warm_up(graphs):
    ours, _ = pair()
    late = Late()
    ours.discriminator.append(late)
    ours(images())
    late.broken = True
    with pytest.raises(RuntimeError, match="not now"):
        ours(images())
    late.broken = False
    for _ in range(2):
        ours(images())
    assert graphs.captures == 0 and ours.d_updates == 3
    ours(images())
    assert graphs.captures == 1 and ours._capture.declined == ""


class Late(nn.Module):
    def __init__(self):
        super().__init__()
        self.broken = False

    def forward(self, x):
        if self.broken and torch.is_grad_enabled():
            raise RuntimeError("not now")
        return x


def test_optimisers_that_cannot_be_captured(graphs):
    ours, theirs = pair(optimizer=lambda m: torch.optim.SGD(m.parameters(), 1e-2))
    with pytest.warns(
        RuntimeWarning, match="SGD is not capturable: make it with fused=True or capturable=True"
    ) as told:
        walk(ours, theirs, 5)
    assert len(told) == 1 and graphs.warm_ups == 0
    ours, _ = pair(precision="fp16", optimizer=lambda m: adam(m, fused=False, capturable=True))
    assert "fp16 reads back whether gradients are finite" in ours.explain()


def test_fp16_with_fused_adam_is_captured(graphs):
    ours, theirs = pair(precision="fp16")
    for one in (ours, theirs):
        for scaler in (one._g_scaler, one._d_scaler):
            scaler.set_growth_interval(2)
            scaler.set_growth_factor(3.0)  # no number of threes and halves makes the first scale again
    walk(ours, theirs, 8)
    assert graphs.replays == 5
    assert ours._d_scaler.get_scale() == theirs._d_scaler.get_scale() != 65536.0


def test_hooks_and_odd_inputs_run_eagerly(graphs):
    ours, theirs = pair()
    seen = []
    ours.generator[0].register_forward_hook(lambda *a: seen.append(1))
    with pytest.warns(RuntimeWarning, match=r"the generator's 0 \(.*\) has hooks"):
        walk(ours, theirs, 5)
    assert len(seen) == 5
    ours, theirs = pair(labels=True)
    with pytest.warns(RuntimeWarning, match="plain tensors, got"):
        ours(images(), labels=torch.zeros(6, dtype=torch.long).as_subclass(Tagged))


class Tagged(torch.Tensor):
    pass


def test_insisting(graphs):
    g, d = (m.double() for m in networks())
    one = fastgan.GANStep(
        g, d, latent=(5, 1, 1), capture="on", g_optimizer=adam(g), d_optimizer=torch.optim.SGD(d.parameters(), 1e-2)
    )
    before = copy.deepcopy(g.state_dict())
    with pytest.raises(RuntimeError, match="capture='on' must be possible, got SGD is not capturable"):
        one(images())
    assert all(torch.equal(v, before[k]) for k, v in g.state_dict().items()) and one.d_updates == 0


def test_insisting_on_the_cpu():
    g, d = networks()
    with pytest.raises(RuntimeError, match="capture='on' must be possible, got CUDA graphs need a GPU"):
        fastgan.GANStep(g, d, latent=5, g_optimizer=adam(g), d_optimizer=adam(d), capture="on")
    auto = fastgan.GANStep(g, d, latent=(5, 1, 1), g_optimizer=adam(g), d_optimizer=adam(d))
    assert "eager (CUDA graphs need a GPU, the networks are on cpu)" in auto.explain()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        auto(images(dtype=torch.float32))


def test_under_a_dispatch_mode_the_step_runs_its_ops(graphs):
    ours, _ = pair()
    for _ in range(5):
        ours(images())
    with Recording(torch.device("cpu")) as recording:
        ours(images())
    assert len(recording.ops) > 50 and graphs.replays == 2


def test_difference_names_what_changed():
    x = torch.randn(3)
    runs = []
    for scale in (2.0, 2.0, 3.0):
        with Recording(torch.device("cpu")) as run:
            x * scale
        runs.append(run)
    assert difference(runs[0], runs[1]) == ""
    assert "takes 2.0 in one step and 3.0 in the next" in difference(runs[0], runs[2])
    with Recording(torch.device("cpu")) as longer:
        x * 2.0
        x + 1
    assert "runs 1 ops in one step and 2" in difference(runs[0], longer)


# ---- on a card ------------------------------------------------------------------------------------------------------


GPU_CASES = CASES | {"capturable": dict(optimizer=lambda m: adam(m, fused=False, capturable=True))}  # CPUs lack it


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES)
def test_gpu_replays_equal_eager_steps(case):
    ours, theirs = pair("cuda", **GPU_CASES[case])
    # in bf16 a learning rate that is rounded to float32 can flip a rounding of 4e-3
    walk(ours, theirs, 14, close=2e-2 if case == "bf16" else 1e-6)
    assert ours._capture.replays >= 3 and ours._capture.declined == ""


@pytest.mark.gpu
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_gpu_changes_are_followed(change):
    ours, theirs = pair("cuda", penalty="r1", ema=0.9)
    walk(ours, theirs, 5)
    for one in (ours, theirs):
        change(one)
    walk(ours, theirs, 6)
    assert ours._capture.captures == 2


@pytest.mark.gpu
def test_gpu_shapes_and_rates():
    ours, theirs = pair("cuda", penalty="r1", penalty_every=2)
    for i in range(16):
        walk(ours, theirs, 1, lambda _, i=i: images(6 if i % 4 < 2 else 4, "cuda"))
        for one in (ours, theirs):
            for group in one.d_optimizer.param_groups:
                group["lr"] *= 0.9
    assert ours._capture.captures == 4


@pytest.mark.gpu
@pytest.mark.parametrize("fault", ["reads back", "branches", "counts", "alternates"])
def test_gpu_fallbacks(fault):
    ours, theirs = pair("cuda")
    for one in (ours, theirs):
        one.discriminator.append(Faulty(fault))
    with pytest.warns(RuntimeWarning, match="runs eagerly"):
        walk(ours, theirs, 6)


@pytest.mark.gpu
def test_gpu_a_capture_that_breaks_off_leaves_the_process_working():
    ours, theirs = pair("cuda", seeded=True)
    for one in (ours, theirs):
        one.discriminator.append(ReadsBackWhenCapturing())
    with pytest.warns(RuntimeWarning, match="capture failed"):
        walk(ours, theirs, 8)
    torch.randn(3, device="cuda").sum().item()
    third, fourth = pair("cuda")
    walk(third, fourth, 6)
    assert third._capture.replays == 3


class ReadsBackWhenCapturing(nn.Module):
    def forward(self, x):
        if torch.cuda.is_current_stream_capturing():
            x.sum().item()
        return x
