"""The run: recipes, exact resuming, interrupts, the guard, what a run directory holds."""

from __future__ import annotations

import copy
import json
import math
import os
import signal

import pytest
import torch
from tiny_run import TINY, assert_same_state, noise, tensors, trainer
from torch import nn

import fastgan
from fastgan.choice import STATE, settle, winners
from fastgan.training import checkpoint, sampling
from fastgan.training.guard import PATIENCE, STARTED, UNDECIDED, UNFLAT, DivergedError, Guard
from fastgan.training.recipes import Recipe
from fastgan.training.rundir import read_log
from fastgan.training.trainer import Trainer


@pytest.fixture
def images():
    return noise()


@pytest.fixture(autouse=True)
def reference():
    """No races: at these sizes they would be most of the time."""
    with fastgan.backend("reference"):
        yield


# --------------------------------------------------------------------------------------------- evaluation


def test_a_resumed_run_with_evaluation_is_the_run_that_was_not_stopped(images, tmp_path):
    recipe = TINY.replace(eval_every=2, steps=8)
    whole, plain = (trainer(images, tmp_path / n, r) for n, r in (("a", recipe), ("p", TINY.replace(steps=8))))
    whole.fit(), plain.fit()
    trainer(images, tmp_path / "b", recipe.replace(steps=4)).fit()
    parts = Trainer(recipe, resume=tmp_path / "b", images=images, quiet=True)
    parts.fit()
    assert_same_state(whole, parts)
    for key, value in whole.generator.state_dict().items():  # evaluation leaves the training as it was
        assert torch.equal(value, plain.generator.state_dict()[key]), key
    logs = [[r["kcd"] for r in read_log(tmp_path / n / "log.jsonl") if "kcd" in r] for n in "ab"]
    assert logs[0] == logs[1] and len(logs[0]) == 4
    best = checkpoint.load(tmp_path / "a/best/generator.pt")
    assert best["scores"]["kcd"] == pytest.approx(min(logs[0]), rel=1e-5) and best["count"] == 10


@pytest.mark.parametrize(("options", "reason", "step"), [({"target": "kcd<1e9"}, "target", 2), ({}, "steps", 6)])
def test_a_target_ends_the_run(images, tmp_path, options, reason, step):
    result = trainer(images, tmp_path / "a", TINY.replace(eval_every=2), **options).fit()
    assert (result.reason, result.step) == (reason, step)
    page = (tmp_path / "a/report.html").read_text()
    assert "best kernel distance" in page and ("target reached: kcd&lt;1e+09" in page) == (reason == "target")


def test_patience_ends_the_run(images, tmp_path):
    run = trainer(images, tmp_path / "a", TINY.replace(eval_every=1, steps=9, g_lr=0.0, ema=None), patience=2)
    run.evaluation.best = -1e9  # nothing is better
    result = run.fit()
    assert (result.reason, result.step) == ("patience", 2)
    assert "no lower kernel distance in 2 evaluations" in (tmp_path / "a/report.html").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "fid<2"}, "target must read NAME<NUMBER"),
        ({"target": "kcd<e"}, "must be a number, got 'kcd<e'"),
        ({"patience": 0}, "patience must be at least 1, got 0"),
        ({"patience": 2}, "need evaluations, set eval_every"),
        ({"target": "kcd<1"}, "need evaluations, set eval_every"),
    ],
)
def test_wrong_stop_rules(images, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(images, tmp_path / "a", TINY, **options)


# ------------------------------------------------------------------------------------------------ recipes


def test_named_recipes_follow_their_sources():
    named = fastgan.recipes()
    assert set(named) >= {"mlp-28", "dcgan-28", "dcgan-64"}
    keras, torch_example, mlp = named["dcgan-28"], named["dcgan-64"], named["mlp-28"]
    assert (keras.batch_size, keras.g_lr, keras.betas, keras.adam_eps) == (256, 1e-4, (0.9, 0.999), 1e-7)
    assert (torch_example.batch_size, torch_example.d_lr, torch_example.betas) == (64, 2e-4, (0.5, 0.999))
    assert (mlp.batch_size, mlp.g_lr, mlp.betas) == (64, 2e-4, (0.5, 0.999))
    for recipe in named.values():
        assert recipe.source and (recipe.domain != "images" or recipe.data in fastgan.data.available())
        assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_settings_are_parsed_by_field():
    recipe = TINY.with_settings(
        [
            "g_lr=1e-3",
            "betas=0,0.9",
            "ema=none",
            "flip=False",
            "steps=1e4",
            "penalty=r1",
            "data=/some/where",
            "model_options.dropout=0.1",
        ]
    )
    assert recipe.g_lr == 1e-3 and recipe.betas == (0.0, 0.9) and recipe.ema is None and recipe.flip is False
    assert recipe.steps == 10_000 and recipe.penalty == "r1" and recipe.data == "/some/where"
    assert recipe.model_options == {"g_width": 2, "d_width": 3, "dropout": 0.1}
    assert TINY.model_options == {"g_width": 2, "d_width": 3}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("g_lr", "must read KEY=VALUE, got 'g_lr'"),
        ("learning_rate=1", "no field 'learning_rate', the fields are name, model"),
        ("steps=many", "steps must be a whole number, got 'many'"),
        ("steps=1.5", "steps must be a whole number, got 1.5"),
        ("steps=0", "steps must be at least 1, got 0"),
        ("flip=1", "flip must be true or false, got 1"),
        ("betas=0.5", "betas must be 2 numbers, got 0.5"),
        ("betas=0.5,1", r"betas must be in \[0, 1\), got"),
        ("ema=1", r"ema must be none or in \[0, 1\), got 1.0"),
        ("g_lr=-1", "g_lr must be finite and at least 0, got -1.0"),
        ("loss=gan", "loss must be one of bce, minimax"),
        ("penalty=gp", "penalty must be one of None, wgan-gp"),
        ("model=dcgan", "there is no model 'dcgan'"),
        ("model_options.depth=2", "model_options of dcgan-28 are g_width, d_width, dropout, got 'depth'"),
        ("model_options.latent=2", "got 'latent'; set latent itself"),
    ],
)
def test_wrong_settings(setting, message):
    with pytest.raises((ValueError, TypeError), match=message):
        TINY.with_settings([setting])


def test_recipe_from_dict():
    assert Recipe.from_dict({"name": "dcgan-28", "steps": 5}) == fastgan.recipes()["dcgan-28"].replace(steps=5)
    with pytest.raises(ValueError, match="model must be given, the named recipes are"):
        Recipe.from_dict({"name": "mine"})


# ---------------------------------------------------------------------------------------------- resuming


def test_a_run_and_its_directory(images, tmp_path):
    run = trainer(images, tmp_path / "run")
    before = [p.clone() for p in run.generator.parameters()]
    result = run.fit()
    assert (result.step, result.reason, run.images_seen) == (6, "steps", 24)
    assert all(not torch.equal(a, b) for a, b in zip(before, run.generator.parameters(), strict=True))
    assert {p.name for p in result.out.iterdir()} == {
        "config.json",
        "log.jsonl",
        "samples",
        "checkpoints",
        "pictures",
        "ending.json",
        "report.html",
    }
    assert [p.name for p in sorted((result.out / "samples").iterdir())] == [f"step-{k:07d}.png" for k in (0, 2, 4, 6)]
    assert checkpoint.list_steps(result.out / "checkpoints") == [4, 6]  # the two newest
    assert result.checkpoint == checkpoint.path_of(result.out / "checkpoints", 6)
    log = read_log(result.out / "log.jsonl")
    assert [r["step"] for r in log] == [1, 2, 3, 4, 5, 6] and log[-1]["images"] == 24
    for key in (
        "d_loss",
        "g_loss",
        "d_real",
        "d_fake",
        "images_per_second",
        "step_ms",
        "memory_mb",
        "seconds",
    ):
        assert math.isfinite(log[-1][key]), key
    config = json.loads((result.out / "config.json").read_text())
    assert Recipe.from_dict(config["recipe"]) == TINY and config["machine"]["torch"] == torch.__version__
    page = (result.out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 1 + 1 + 4 + 1 and "<polyline" in page and "http" not in page


@pytest.mark.parametrize(
    "changes",
    [{}, {"ema": None, "d_steps": 2, "penalty": "r1", "penalty_every": 2}],
    ids=["plain", "penalty"],
)
def test_resuming_is_exact(images, tmp_path, changes):
    recipe = TINY.replace(**changes)
    straight = trainer(images, tmp_path / "straight", recipe)
    straight.fit()
    trainer(images, tmp_path / "halves", recipe.replace(steps=3)).fit()
    torch.manual_seed(12345)
    torch.randn(7)
    halves = Trainer(recipe, resume=tmp_path / "halves", images=images, quiet=True)
    assert halves.step == 3
    assert halves.fit().step == 6
    assert_same_state(straight, halves)
    logs = [read_log(tmp_path / name / "log.jsonl") for name in ("straight", "halves")]
    assert [(r["step"], r["d_loss"], r["g_loss"]) for r in logs[0]] == [
        (r["step"], r["d_loss"], r["g_loss"]) for r in logs[1]
    ]
    pictures = [(tmp_path / name / "samples" / "step-0000006.png").read_bytes() for name in ("straight", "halves")]
    assert pictures[0] == pictures[1]


def test_a_resumed_run_takes_the_kernels_of_the_first(images, tmp_path):
    """Races are timings: another process, or another day, may decide them otherwise."""
    with fastgan.backend("auto"):
        trainer(images, tmp_path, TINY.replace(steps=1)).fit()
        table = dict(winners())
        turned = {case: {"winner": "reference" if name == "native" else "native"} for case, name in table.items()}
        STATE.cache.winners.update(turned)  # another day's races
        Trainer(TINY.replace(steps=2), resume=tmp_path, images=images, quiet=True).fit()
        assert table and table.items() <= winners().items()


def test_the_tables_of_a_run_and_its_resumed_twin_are_equal(images, tmp_path):
    """Both hold the cases of the run, not what else the cache knows; equal caches give equal verdicts."""
    STATE.cache.winners["a case of another run"] = {"winner": "native"}
    tables = []
    with fastgan.backend("auto"):
        trainer(images, tmp_path / "cold", TINY.replace(steps=1)).fit()  # the races
        for _ in range(20):  # a busy machine leaves a case open now and then
            settle()
        assert not STATE.open
        for name, steps in (("straight", (4,)), ("halves", (2, 4))):
            trainer(images, tmp_path / name, TINY.replace(steps=steps[0])).fit()
            for more in steps[1:]:
                Trainer(TINY.replace(steps=more), resume=tmp_path / name, images=images, quiet=True).fit()
            tables.append(checkpoint.load(checkpoint.latest(tmp_path / name / "checkpoints"))["winners"])
    assert tables[0] == tables[1] and tables[0] and "a case of another run" not in tables[0]


def test_a_log_beyond_the_checkpoint_is_cut_back(images, tmp_path):
    """As after a crash: three logged steps, the checkpoint of step 2 is the newest."""
    trainer(images, tmp_path, TINY.replace(steps=3)).fit()
    checkpoint.path_of(tmp_path / "checkpoints", 3).unlink()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 4, "d_lo')
    Trainer(TINY, resume=tmp_path, images=images, quiet=True).fit()
    assert [r["step"] for r in read_log(tmp_path / "log.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_seed_decides_everything(images, tmp_path):
    first, again, other = (
        trainer(images, tmp_path / str(k), TINY.replace(seed=seed)) for k, seed in enumerate((7, 7, 8))
    )
    for run in (first, again, other):  # built before any is trained: they must not disturb each other
        run.fit()
    assert_same_state(first, again)
    assert not torch.equal(first.generator.main[0].weight, other.generator.main[0].weight)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (None, {"out": "new"}, "config must be a recipe"),
        ("dcgan-99", {"out": "new"}, "no recipe 'dcgan-99', choose one of fastgan, mlp-28"),
        (TINY, {}, "out must be given"),
        (TINY, {"out": "full"}, "full must be new or empty, it holds files; resume"),
        (TINY, {"out": "full/file"}, "file is a file"),
        (TINY, {"resume": "full"}, "full must be a run directory"),
        (TINY, {"resume": "full", "out": "new"}, "goes on in the run's own directory"),
        (TINY, {"out": "new", "device": "tpu9"}, "it must be auto, cpu or cuda"),
        (TINY, {"out": "new", "device": "meta"}, "it must be auto, cpu or cuda"),
        (TINY, {"out": "new", "device": "cuda:99"}, "cuda:99 must exist, this machine has"),
        (TINY, {"out": "new", "time_limit": 0}, "time_limit must be positive, got 0"),
        (TINY.replace(image_size=12), {"out": "new"}, r"images must be \[N, 1, 12, 12\]"),
    ],
)
def test_wrong_options(images, tmp_path, monkeypatch, config, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(ValueError, match=message):
        Trainer(config, images=images, quiet=True, **options)
    assert not (tmp_path / "new").exists()


def test_a_resumed_run_keeps_its_recipe(images, tmp_path):
    trainer(images, tmp_path, TINY.replace(steps=2)).fit()
    with pytest.raises(ValueError, match=r"g_lr must stay 0\.0002, got 0\.1"):
        Trainer(TINY.replace(g_lr=0.1), resume=tmp_path, images=images)
    with pytest.raises(ValueError, match="steps must be above the 2 that"):
        Trainer(resume=tmp_path, images=images)


def test_overwriting_deletes_the_run_and_nothing_else(images, tmp_path):
    trainer(images, tmp_path).fit()
    (tmp_path / "notes.txt").write_text("mine")
    trainer(images, tmp_path, TINY.replace(steps=1), overwrite=True).fit()
    assert checkpoint.list_steps(tmp_path / "checkpoints") == [1]
    assert [r["step"] for r in read_log(tmp_path / "log.jsonl")] == [1]
    assert len(list((tmp_path / "samples").iterdir())) == 2
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_networks_of_ones_own(images, tmp_path):
    def networks():
        return (
            nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Unflatten(1, (1, 8, 8))),
            nn.Sequential(nn.Flatten(), nn.Linear(64, 1), nn.Flatten(0)),
        )

    recipe = TINY.replace(steps=2)
    trainer(images, tmp_path, recipe, networks=networks()).fit()
    with pytest.raises(ValueError, match="networks of its own, pass networks= again"):
        Trainer(recipe.replace(steps=3), resume=tmp_path, images=images)
    more = Trainer(recipe.replace(steps=3), resume=tmp_path, images=images, networks=networks(), quiet=True)
    assert more.fit().step == 3
    with pytest.raises(ValueError, match="networks of its own, pass generator="):
        sampling.load_generator(tmp_path)
    generator, _ = sampling.load_generator(tmp_path, generator=networks()[0])
    assert torch.equal(generator[0].weight, more.sampler[0].weight)


# ----------------------------------------------------------------------------------------- ways to end


@pytest.fixture
def heard(number):
    """A handler for the signal: a shell's background job ignores SIGINT, and so does what it starts."""
    before = signal.signal(number, signal.default_int_handler)
    yield
    signal.signal(number, before)


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_after_the_step_and_can_be_resumed(images, tmp_path, number):
    straight = trainer(images, tmp_path / "straight")
    straight.fit()

    def interrupt(run: Trainer) -> bool:
        if run.step == 2:
            os.kill(os.getpid(), number)
        return False

    run = trainer(images, tmp_path / "cut", target=interrupt)
    result = run.fit()
    assert (result.reason, result.step) == ("interrupted", 3)
    assert signal.getsignal(number) is signal.default_int_handler
    assert result.checkpoint == checkpoint.path_of(tmp_path / "cut" / "checkpoints", 3)
    resumed = Trainer(resume=tmp_path / "cut", images=images, quiet=True)
    resumed.fit()
    assert_same_state(straight, resumed)


def test_target_and_time_limit(images, tmp_path):
    seen = []

    def target(run: Trainer) -> bool:
        seen.append((run.step, set(run.metrics) >= {"d_loss", "g_loss"}))
        return run.step >= 4

    recipe = TINY.replace(log_every=2)
    result = trainer(images, tmp_path / "a", recipe, target=target).fit()
    assert (result.reason, result.step) == ("target", 4)
    assert seen == [(1, True), (2, True), (4, True)]
    result = trainer(images, tmp_path / "b", TINY.replace(steps=10_000), time_limit=0.2).fit()
    assert result.reason == "time" and 1 <= result.step < 10_000


def test_fit_again_goes_on(images, tmp_path):
    straight = trainer(images, tmp_path / "straight")
    straight.fit()
    run = trainer(images, tmp_path / "run", target=lambda run: run.step == 3)
    assert run.fit().reason == "target"
    assert run.fit().step == 6
    assert_same_state(straight, run)
    with pytest.raises(ValueError, match="has its 6 steps already"):
        run.fit()


@pytest.mark.parametrize(
    ("poisoned", "message"),
    [
        (3, r"d_loss must be finite, it is nan at step 4; the last good checkpoint is .*step-0000002\.pt"),
        (4, r"discriminator.dense.bias must be finite, it is not at step 4; .*step-0000002\.pt"),
        (1, r"d_loss must be finite, it is nan at step 2; no checkpoint had been saved"),
    ],
)
def test_divergence_stops_the_run_and_names_the_last_good_checkpoint(images, tmp_path, poisoned, message):
    def poison(run: Trainer) -> bool:
        if run.step == poisoned:
            with torch.no_grad():
                run.discriminator.dense.bias.fill_(float("nan"))
        return False

    with pytest.raises(DivergedError, match=message):
        trainer(images, tmp_path, target=poison).fit()
    assert checkpoint.list_steps(tmp_path / "checkpoints") == ([] if poisoned == 1 else [2])


# D's loss when D(x) and D(G(z)) are 0.999 and 0.001, or a squared distance of 0.003 in all, and when D cannot tell
SURE = {"bce": 0.002, "minimax": 0.002, "lsgan": 0.003, "hinge": 0.0, "relativistic": 0.002}


@pytest.mark.parametrize("loss", SURE)
def test_the_guard_warns_of_a_certain_discriminator_once(loss):
    guard = Guard(loss, 784)
    sure, unsure = {"d_loss": SURE[loss]}, {"d_loss": UNDECIDED[loss]}
    warnings = [guard.check(step, sure) for step in range(2 * PATIENCE)]
    assert [k for k, w in enumerate(warnings) if w] == [PATIENCE - 1]
    assert "certain for 20 logged steps" in warnings[PATIENCE - 1]
    guard.check(0, unsure)
    assert not any(guard.check(step, sure) for step in range(PATIENCE - 1))
    assert guard.check(0, sure)
    assert not any(guard.check(step, {"d_loss": 0.05 * UNDECIDED[loss]}) for step in range(2 * PATIENCE))


@pytest.mark.parametrize("loss", SURE)
def test_what_an_undecided_discriminator_pays(loss):
    score = torch.tensor([0.5 if loss == "lsgan" else 0.0])
    assert float(fastgan.functional.gan_loss(score, score, kind=loss, side="d")) == pytest.approx(UNDECIDED[loss])


@pytest.mark.parametrize(
    ("loss", "real", "fake", "grows"),
    [
        ("wasserstein", 987_175.0, 987_100.0, True),
        ("wasserstein", 900.0, -900.0, True),  # 56 is the diameter of 28 x 28 images in [-1, 1]
        ("wasserstein", 250.0, 200.0, False),
        ("lsgan", 150.0, 0.0, True),
        ("lsgan", 1.5, -0.5, False),
        ("hinge", 5_000.0, 4_000.0, True),
        ("relativistic", -2_000.0, -2_001.0, True),
        ("bce", 40.0, -40.0, False),
    ],
)
def test_the_guard_warns_of_scores_without_bound(loss, real, fake, grows):
    guard = Guard(loss, 784)
    said = [guard.check(k, {"logit_real": real, "logit_fake": fake}) for k in range(10)]
    assert [k for k, text in enumerate(said) if text] == ([2] if grows else [])
    assert not grows or "scores grow without bound" in said[2]


def test_the_guard_warns_of_one_image_for_all():
    guard = Guard("bce", 64)
    same, varied = torch.rand(1, 1, 8, 8).expand(4, 1, 8, 8), torch.rand(4, 1, 8, 8) * 2 - 1
    assert guard.check_samples(0, same) is None  # before training
    assert guard.check_samples(1, varied) is None
    assert "collapsed to one image" in guard.check_samples(2, same)
    assert guard.check_samples(3, same) is None  # said already
    assert guard.check_samples(4, varied) is None
    assert guard.check_samples(5, same)


def test_the_guard_warns_of_samples_that_were_flat_from_the_start():
    slow = Guard("bce", 64, ema=0.999)  # the average follows over 1000 steps
    guard, same = Guard("bce", 64), torch.rand(1, 1, 8, 8).expand(4, 1, 8, 8)
    said = [guard.check_samples(step, same) for step in (0, STARTED, UNFLAT, 2 * UNFLAT)]
    assert [text is not None for text in said] == [False, False, True, False]
    assert "have been one image from the start" in said[2]
    assert [k for k in (0, UNFLAT, 1999, 2000) if slow.check_samples(k, same)] == [2000]


def test_the_guard_warns_of_a_generator_that_does_not_move(images, tmp_path, capsys):
    recipe = TINY.replace(steps=60, sample_every=20, checkpoint_every=0)
    trainer(images, tmp_path / "still", recipe.replace(g_lr=1e-12)).fit()
    said = "warning: step 60: the generator has not moved since step 0, it does not learn; try a higher g_lr\n"
    assert said in capsys.readouterr().err
    trainer(images, tmp_path / "moving", recipe.replace(g_lr=2e-5)).fit()
    assert "not moved" not in capsys.readouterr().err


# ------------------------------------------------------------------------------ checkpoints and sampling


def test_checkpoints_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    path = checkpoint.path_of(tmp_path, 7)
    checkpoint.save({"step": 7, "w": torch.arange(3)}, path)
    assert checkpoint.latest(tmp_path) == path and torch.equal(checkpoint.load(path)["w"], torch.arange(3))
    original = torch.save

    def fails_half_way(state, file):
        original(state, file)
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fails_half_way)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save({"step": 7, "w": torch.zeros(3)}, path)
    assert torch.equal(checkpoint.load(path)["w"], torch.arange(3))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 cut off"])
def test_damaged_checkpoints_are_refused_in_one_line(tmp_path, content):
    path = tmp_path / "step-0000001.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"step-0000001\.pt must be a checkpoint of fastgan"):
        checkpoint.load(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="holds no training state"):
        checkpoint.load(path)


def test_a_checkpoint_runs_no_code(tmp_path):
    torch.save({"step": 1, "x": Guard("bce", 64)}, tmp_path / "step-0000001.pt")
    with pytest.raises(ValueError, match="must be a checkpoint of fastgan"):
        checkpoint.load(tmp_path / "step-0000001.pt")


def test_sampling_disturbs_nothing(images, tmp_path):
    run = trainer(images, tmp_path)
    run.discriminator.main[0].eval()
    before, rng = copy.deepcopy(dict(tensors(run.state()))), torch.get_rng_state()
    modes = [m.training for m in run.generator.modules()]
    drawn = sampling.draw(run.generator, run.noise)
    torch.testing.assert_close(sampling.draw(run.generator, run.noise, batch=3), drawn)
    assert [m.training for m in run.generator.modules()] == modes and any(modes)
    assert torch.equal(torch.get_rng_state(), rng)
    after = dict(tensors(run.state()))
    assert all(torch.equal(v, after[k]) for k, v in before.items() if isinstance(v, torch.Tensor))


def test_a_run_can_be_sampled_by_its_directory(images, tmp_path):
    run = trainer(images, tmp_path)
    run.fit()
    generator, config = sampling.load_generator(tmp_path)
    assert not generator.training and config["recipe"]["name"] == "tiny"
    # the averaged generator, not the last one
    torch.testing.assert_close(sampling.draw(generator, run.noise), sampling.draw(run.sampler, run.noise))
    assert not torch.allclose(sampling.draw(run.generator, run.noise), sampling.draw(run.sampler, run.noise))


def test_latents():
    z = sampling.latents(2000, 4, seed=3)
    assert torch.equal(z, sampling.latents(2000, 4, seed=3)) and not torch.equal(z[:5], sampling.latents(5, 4, seed=4))
    cut = sampling.latents(2000, 4, seed=3, truncation=0.5)
    assert cut.abs().max() <= 0.5 and cut.abs().max() > 0.49 and abs(cut.mean()) < 0.02
    # the standard deviation of a normal distribution cut to [-2, 2] is 0.880
    assert abs(sampling.latents(50_000, 4, seed=0, truncation=2.0).std() - 0.880) < 0.005
    wide = sampling.latents(50_000, 4, seed=0, truncation=50.0)
    assert wide.isfinite().all() and abs(wide.std() - 1) < 0.01 and wide.abs().max() > 4
    with pytest.raises(ValueError, match="truncation must be positive and finite, got 0"):
        sampling.latents(1, 1, seed=0, truncation=0)


def test_walks():
    z = torch.randn(3, 16)
    for mode in ("slerp", "lerp"):
        path = sampling.walk(z, 12, mode=mode)
        assert path.shape == (12, 16)
        torch.testing.assert_close(path[::4], z)  # passes every stop, and closes
    unit = torch.nn.functional.normalize(z, dim=1)
    torch.testing.assert_close(sampling.walk(unit, 12).norm(dim=1), torch.ones(12))
    assert sampling.walk(unit, 12, mode="lerp").norm(dim=1).min() < 0.95
    steps = sampling.walk(unit[:2], 8)[:5]  # a great arc at constant speed
    cosines = (steps[1:] * steps[:-1]).sum(1)
    torch.testing.assert_close(cosines, cosines[:1].expand(4))
    torch.testing.assert_close(sampling.walk(z[:1].expand(2, -1), 4), z[:1].expand(4, -1))  # parallel: no 0/0
    with pytest.raises(ValueError, match="mode must be slerp or lerp, got 'arc'"):
        sampling.walk(z, 3, mode="arc")
    with pytest.raises(ValueError, match="needs 2 latents"):
        sampling.walk(z[:1], 3)
