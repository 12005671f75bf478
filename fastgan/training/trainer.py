"""The run: data, networks, training step, log, samples, checkpoints, report, from one recipe.

    fastgan.Trainer("dcgan-28", out="runs/garments").fit()

What a run directory holds: `rundir`. A run that was stopped goes on with ``Trainer(resume="runs/garments").fit()``, bit
for bit as if it had not been: networks, optimisers, counters, random states, place in the data and choice of kernels
come from the newest sound checkpoint, and where there is none yet the run begins anew.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgan.choice import backend, begin_run
from fastgan.domains import domain_of

from . import checkpoint, snapshot
from .assembly import assemble, precision_of, resolve_device
from .board import boards
from .clock import Clock
from .conclusion import Result, conclude
from .distributed import Exchange, LostRankError, join
from .evaluation import Evaluation
from .guard import Collapse, DivergedError, Guard, leaps_of
from .health import gradient_norms
from .origin import changed_images, configuration, load_samples, open_run, recipe_of
from .progress import memory_mb, progress_for
from .recipes import Recipe
from .recovery import check_action, recover
from .schedules import Schedules, average_decay
from .signals import Signals
from .stopping import StopRules

__all__ = ["Result", "Trainer"]


class Trainer:
    """One run of a recipe.

    config: a `Recipe`, the name of one, or a dict of its fields. None with `resume`, or a recipe that differs
        from the saved one in its length and in how often it writes.
    out: the run directory; it must be new or empty, unless `overwrite` deletes the run in it.
    resume: a run directory to go on with.
    device: "auto", "cpu", "cuda", "cuda:1"; a resumed run stays where it was unless told otherwise.
    backend: forces one backend while it trains (see `fastgan.backend`).
    time_limit: seconds that one `fit` may train; the run can be resumed.
    target: a bound on a metric of the evaluation, such as "kcd<0.05" (kernel distance) or "fcd<2" (Frechet); or a
        function, asked at every logged step; the run ends when it returns True. It may read these attributes:
        `step` (generator updates done), `metrics` (floats, of the last logged step), `sampler` (the averaged
        generator if there is one), `generator`, `discriminator`, `images`, `device`, `recipe`, `out`.
    patience: the run ends after so many evaluations in a row without a better score.
    plateau: it ends after so many in a row without a change, while the discriminator cannot tell real from generated.
    on_collapse: "warn", "rollback" (go back to the last good checkpoint, halve both rates, go on; at most three times)
        or "stop", where the guard sees one image for all, a loss of variety, gradients or numbers that explode.
    tensorboard: write event files to out/tensorboard too; ImportError where the package is absent.
    wandb: log to this project of Weights & Biases too; ImportError where the package is absent.
    quiet: show warnings only.
    images: a set of samples to use in place of the recipe's data.
    networks: (generator, discriminator) to train in place of the recipe's model.

    allow_changed_data: go on with a run although its images are no longer what they were.

    Several processes that torchrun started train one run (`world`; docs/scaling.md): batch_size counts the images of
    all ranks, rank 0 alone writes.

    Raises ValueError for settings that cannot be meant, before anything is written, and `LockedError`, a ValueError,
    where another process trains in the directory.
    """

    def __init__(
        self,
        config: Recipe | str | Mapping[str, Any] | None = None,
        *,
        out: str | Path | None = None,
        resume: str | Path | None = None,
        overwrite: bool = False,
        device: str | torch.device | None = None,
        backend: str | None = None,
        time_limit: float | None = None,
        target: Callable[[Trainer], bool] | str | None = None,
        patience: int | None = None,
        plateau: int | None = None,
        on_collapse: str = "warn",
        tensorboard: bool = False,
        wandb: str | None = None,
        quiet: bool = False,
        images: Any = None,
        networks: tuple[nn.Module, nn.Module] | None = None,
        allow_changed_data: bool = False,
    ):
        self.world = join()
        self.directory, saved, start = open_run(out, resume, overwrite, owner=self.world.first)
        self.out = self.directory.path
        self.recipe = recipe_of(config, saved)
        place = resolve_device(device if device is not None else (saved["device"] if saved else "auto"))
        self.device = resolve_device(self.world.place(place))
        self._precision = self.world.gather(precision_of(self.recipe, self.device, networks))[0]
        self.recipe = self.recipe.replace(precision=self._precision.name)  # what config.json holds
        self.backend = backend if backend is not None else (saved["backend"] if saved else None)
        rules: Any = dict(time_limit=time_limit, target=target, patience=patience, plateau=plateau)
        self.stop = StopRules.of(self.recipe, **rules)
        check_action(on_collapse, self.world.size)
        self.on_collapse, self.rollbacks, self._overwrite = on_collapse, 0, overwrite
        if saved and saved["models"] != "recipe" and not networks:
            raise ValueError(f"resume: {resume} was trained with networks of its own, pass networks= again")

        self.step = self.images_seen = 0
        self.metrics: dict[str, float] = {}
        self.progress = progress_for(quiet=quiet or not self.world.first)
        self.notes: list[str] = []
        self._penalty: dict[str, Tensor] = {}
        self._boards = boards(self.out, tensorboard=tensorboard, wandb=wandb) if self.world.first else []
        self._collapse: Collapse | None = None  # seen and not acted on yet
        self.clock = Clock(self.device)
        self._between_steps = True  # only then is the state one that a run could go on from
        self._damaged = list(start.damaged) if start else []
        begin_run()
        with self._placed():
            self.recipe, self.images = load_samples(self.recipe, images, saved, self.device, quiet=quiet)
            self.domain = domain_of(self.recipe)
            changed = changed_images(self.images, saved, allow_changed_data)
            self._build(networks)
        facts = {"backend": self.backend, "models": "own" if networks else "recipe", "images_given": images is not None}
        self.config = configuration(self.recipe, self.images, saved, self.device, **facts)
        self._owned = saved is not None  # the directory holds this very run
        if start:
            snapshot.restore(self, start.state, start.path, changed)
        self._unite()

    def _build(self, networks: tuple[nn.Module, nn.Module] | None) -> None:
        recipe, domain = self.recipe, self.domain
        self.world.check_batch(recipe.batch_size)
        self.world.check_augment(recipe.augment)
        bounds: Any = dict(flat=domain.flat, narrow=domain.narrow)
        self.guard = Guard(recipe.loss, math.prod(domain.shape), average_decay(recipe, 0), **bounds)
        self.leaps = leaps_of(recipe.loss)
        made = assemble(recipe, self.device, networks, domain=domain)
        self.generator, self.discriminator, self.train_step = made
        self.samples, held = domain.hold_out(self.images, recipe.held_out)
        self.schedules = Schedules(recipe, self.train_step, len(self.samples))
        # Data order, latents and fixed noise have generators or seeds of their own: none shifts another.
        self.batches = domain.batches(self.samples, part=(self.world.rank, self.world.size))
        self.noise, self.sample_labels, self.columns = domain.given(self.samples)
        self.evaluation = Evaluation(domain.judge(self.images))
        if recipe.eval_every and self.evaluation.judge is None:
            raise ValueError(f"recipe: eval_every must be 0, {domain.name} have no measure, got {recipe.eval_every}")
        self.health = domain.health(self.samples, held)
        self.world.seed(recipe.seed + 1)
        self.rng = checkpoint.rng_state()

    def _unite(self) -> None:
        """Make the ranks one run: the same beginning, and gradients that are averaged from here on."""
        if self.world.size > 1:
            self.world.require_same(self.recipe.to_dict() | {"images": self.config["images"], "step": self.step})
            self.world.copy_first(self.generator, self.discriminator, self.train_step.ema)
            self.train_step.exchange = Exchange(self.world)

    @property
    def seconds(self) -> float:
        """Of training, in all."""
        return self.clock.seconds

    @property
    def sampler(self) -> nn.Module:
        """The generator that samples are drawn from: the averaged one if the recipe has `ema`."""
        return self.train_step.ema if self.train_step.ema is not None else self.generator

    # ------------------------------------------------------------------------------------------- state

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on, as tensors and plain values."""
        return snapshot.take(self)

    def save(self) -> Path:
        """Write a checkpoint; raises `DivergedError` instead if a number in it is not finite."""
        state = self.state()
        if not self.world.first:
            return checkpoint.path_of(self.directory.checkpoints, self.step)
        bad = checkpoint.first_nonfinite(state)
        if bad:
            raise self._diverged(bad, "not")
        return self.directory.save(state, keep=self.recipe.keep_checkpoints)

    def _diverged(self, name: str, value: str) -> DivergedError:
        """The error that names the newest checkpoint that is sound: it is read to be sure."""
        try:
            found = self.directory.newest()
        except checkpoint.DamagedError:
            found = None
        return Guard.diverged(self.step, name, value, found.path if found else None)

    # ------------------------------------------------------------------------------------------- training

    @contextlib.contextmanager
    def _placed(self) -> Iterator[None]:
        """On the run's backend, and with its GPU as the current one."""
        with contextlib.ExitStack() as stack:
            if self.backend:
                stack.enter_context(backend(self.backend))
            if self.device.type == "cuda":
                stack.enter_context(torch.cuda.device(self.device))
            yield

    def fit(self) -> Result:
        """Train to the end of the recipe, the time limit, the target or an interrupt, whichever comes first.

        SIGINT (Ctrl-C), SIGTERM and SIGHUP finish the step under way and save; a second Ctrl-C stops at once.
        Raises `DivergedError` when a metric or a weight stops being finite. After any other error between two steps
        the last step is saved first.
        """
        if self.step >= self.recipe.steps and self.directory.finished:
            raise ValueError(f"training: the run has its {self.recipe.steps} steps already")
        lock = self.directory.locked() if self.world.first else contextlib.nullcontext()
        with self._placed(), lock, Signals() as signals:
            self._begin()
            self.progress.start(self.step, self.recipe.steps)
            try:
                try:
                    # a run that was killed after its last checkpoint lacks its last pictures and the report alone
                    reason = self._loop(signals) if self.step < self.recipe.steps else "steps"
                except Exception as error:
                    self._rescue(error)
                    raise
                result = conclude(self, reason)
                self.world.agree("")  # no rank returns before rank 0 has written everything
                return result
            finally:
                self.progress.stop()
                for board in self._boards:
                    board.close()

    def _begin(self) -> None:
        """Make the run directory, or check that it is still as it was when this run was read from it."""
        if not self.world.first:
            checkpoint.set_rng_state(self.rng)
            return
        directory = self.directory
        for path in self._damaged:
            directory.set_aside(path)
        if not self._owned:
            directory.check_new(overwrite=self._overwrite)
            if self._overwrite:
                directory.clear()
        elif directory.last_step() > self.step or directory.read_config().get("run") != self.config["run"]:
            raise ValueError(
                f"resume: {self.out} must be as it was read, at step {self.step}; another process has trained in it "
                "since, resume it again"
            )
        directory.begin(self.config, self.step)
        self._owned = True
        recipe = self.recipe
        self.progress.note(
            f"{recipe.name} on {self.images.name} ({len(self.images):,} {self.domain.noun}), {self.device}, "
            f"{self._precision}: step {self.step} to {recipe.steps}, writing to {self.out}"
        )
        if wrong := directory.name_files(getattr(self.images, "skipped", ())):
            self.progress.note(wrong)
        if self.step == 0:
            self.draw()
        checkpoint.set_rng_state(self.rng)

    def _rescue(self, error: Exception) -> None:
        """After an error: save what was reached, where it is whole, and say from where the run can go on."""
        if isinstance(error, DivergedError):  # it names the last good checkpoint itself
            return
        step = self.directory.last_step()
        if self._between_steps and self.step > step and self.world.size == 1:  # the other ranks may be gone
            with contextlib.suppress(Exception):  # the first error is the one to hear of
                self.save()
                step = self.step
        # said here, where signals wait: torchrun ends the ranks that are left, some before they have said their error
        lost = "another rank has ended, " if isinstance(error, LostRankError) else ""
        self.progress.warn(f"{lost}the run can go on from step {step}: {self.world.command(self.out)}")

    def _loop(self, signals: Signals) -> str:
        self.clock.start(self.step)
        while True:
            try:
                reason = self._advance(signals)
                seen: Collapse | DivergedError | None = self._collapse
            except DivergedError as error:
                reason, seen = "", error
            self._collapse = None
            reason = reason or (recover(self, seen) if seen is not None else "")
            if reason:
                return reason

    def _advance(self, signals: Signals) -> str:
        """One step and what is due after it; the reason why the run ends, or ""."""
        recipe, clock = self.recipe, self.clock
        self._between_steps = False
        self.schedules.apply(self.step, self.images_seen)
        drawn = [next(self.batches) for _ in range(recipe.d_steps)]
        metrics = self.train_step(*self.domain.inputs(drawn))
        # of a lazy penalty the last value is logged
        self._penalty |= {name: metrics[name] for name in ("penalty", "extra_g_loss") if name in metrics}
        self.step += 1
        self.images_seen += recipe.batch_size * recipe.d_steps
        clock.tick()
        self._between_steps = True
        self.progress.tick(self.step)
        reason = self.stop.after_step(self.step, recipe.steps, clock.elapsed, bool(signals.received))
        reason, first = self.world.agree(reason), self.world.first
        evaluate, look = self._due(recipe.eval_every), self._due(recipe.watch_every)
        # The first step is logged too: it tells at once whether the run works at all.
        due = evaluate or look or self.step == 1 or self.step % recipe.log_every == 0
        if self._strained(metrics) or due or reason:
            scores = self._evaluate() if evaluate and first else {}
            self._log(self._penalty | metrics, scores, self._look() if look and first else {})
            reason = reason or (self.stop.after_log(scores, self.evaluation, self) if first else "")
            reason = self.world.agree(reason)
        if not reason:
            with clock.aside():
                if first and self._due(recipe.sample_every):
                    self.draw()
                if self._due(recipe.checkpoint_every):
                    self.save()
        return reason

    def _strained(self, metrics: Mapping[str, Tensor]) -> bool:
        """Whether D's loss calls for a warning now: it may break a run within 10 steps. On a GPU, whose every step this
        would wait for, and on several ranks, which log together, the next logged step tells."""
        if self.leaps is None:
            return False
        self.leaps.update(self.step, metrics["d_loss"], self.train_step.scales)
        at_once = self.device.type == "cpu" and self.world.size == 1
        return at_once and self.guard.strained(self.step, self.leaps.peak)

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _look(self) -> dict[str, float]:
        """What losses do not show; see `health`."""
        if self.health is None:
            return {}
        with self.clock.aside():
            return self.health.look(self.generator, self.discriminator, self.noise, self.sample_labels)

    def _evaluate(self) -> dict[str, float]:
        """The generator's scores; the best generator so far is kept."""
        evaluation = self.evaluation
        interval = max(0.0, self.seconds - evaluation.seconds) / self.step * self.recipe.eval_every
        with self.clock.aside():
            scores = evaluation(self.sampler, self.step, interval)
            if scores and evaluation.best_step == self.step:
                best = {"step": self.step, "generator": self.sampler.state_dict(), "scores": scores}
                self.directory.save_best({**best, "count": evaluation.count})
        return scores

    def _log(self, lazy: Mapping[str, Tensor], scores: dict[str, float], looked: dict[str, float]) -> None:
        """Read the metrics (this waits for the device), check them, show them, append them to the log."""
        self.metrics = self.world.mean({name: float(value) for name, value in lazy.items()}) | scores | looked
        if not self.world.first:
            return
        self.guard.scales = self.train_step.scales
        if self.leaps is not None:
            self.metrics["d_leaps"] = self.leaps.read()
        if self.recipe.precision != "fp16":  # there the scaler's factor would be in them
            self.metrics |= gradient_norms(self.generator, self.discriminator)
        step_seconds = self.clock.pace(self.step)
        record = {
            "step": self.step,
            "images": self.images_seen,
            "seconds": round(self.seconds, 3),
            **{name: float(f"{value:.6g}") for name, value in self.metrics.items()},
            **({"eval_images": self.evaluation.count} if scores else {}),
            "images_per_second": round(self.recipe.batch_size * self.recipe.d_steps / step_seconds, 1),
            "step_ms": round(step_seconds * 1e3, 3),
            "memory_mb": round(memory_mb(self.device), 1),
        }
        bad = next((name for name, value in self.metrics.items() if not math.isfinite(value)), None)
        if bad:
            raise self._diverged(bad, str(self.metrics[bad]))
        self.directory.append(record, keep=self.recipe.keep_records, best=self.evaluation.best_step)
        left = (self.recipe.steps - self.step) * step_seconds
        if self.stop.time_limit is not None:
            left = min(left, self.stop.time_limit - self.clock.elapsed)
        self.progress.log({**record, "seconds_left": left})
        for board in self._boards:
            board.log(record)
        self.warn(self.guard.check(self.step, self.metrics))

    def warn(self, warning: str | None) -> None:
        if warning:
            self._collapse = warning if isinstance(warning, Collapse) else self._collapse
            self.notes.append(warning)
            self.progress.warn(warning)

    def draw(self) -> Tensor:
        """The sample grid of this step, from the run's fixed noise; returns its samples."""
        made = self.domain.draw(self.sampler, self.noise, self.sample_labels)
        self.domain.write(made, self.directory.grid(self.step), self.columns)
        self.directory.thin_samples(self.recipe.keep_samples, self.step)
        for board in self._boards:
            board.draw(self.step, self.domain.pictures(made), self.columns)
        self.warn(self.guard.check_samples(self.step, made))
        first = max(self.generator.parameters(), key=lambda p: p.dim())
        self.warn(self.guard.check_movement(self.step, first.flatten()[:4096]))
        return made
