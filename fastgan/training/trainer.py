"""The run: data, networks, training step, log, samples, checkpoints, report, from one recipe.

    fastgan.Trainer("dcgan-28", out="runs/garments").fit()

What a run directory holds: `rundir`. A run that was stopped goes on with ``Trainer(resume="runs/garments").fit()``, bit
for bit as if it had not been: networks, optimisers, counters, random states, place in the data and choice of kernels
come from the newest sound checkpoint, and where there is none yet the run begins anew.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgan import data
from fastgan._version import __version__
from fastgan.choice import backend, begin_run, settle, winners
from fastgan.convert import convert, explain
from fastgan.data.fingerprint import difference, fingerprint
from fastgan.doctor import machine

from . import checkpoint, needs, report
from .adam import Adam
from .evaluation import Evaluation, Target
from .guard import DivergedError, Guard
from .precision import resolve
from .progress import memory_mb, progress_for
from .recipes import Recipe, recipes
from .rundir import RunDirectory
from .sampling import build_models, draw, fill, latents
from .signals import Signals
from .step import GANStep

__all__ = ["Result", "Trainer", "assemble", "resolve_device"]

# What a resumed run may change: its length and how often it writes. Anything else would not be the same run.
MAY_CHANGE = ("steps", "sample_every", "checkpoint_every", "log_every", "eval_every", "keep_checkpoints")
# What a checkpoint must hold: see Trainer.state.
KEYS = (
    *("step", "images", "seconds", "generator", "discriminator", "sampler", "g_optimizer", "d_optimizer"),
    *("training", "data", "rng", "noise", "winners", "config"),
)


@dataclass(frozen=True)
class Result:
    """How a run ended. `reason`: "steps", "time", "target", "patience" or "interrupted"."""

    out: Path
    step: int
    reason: str
    seconds: float
    metrics: dict[str, float]
    checkpoint: Path


def resolve_device(device: str | torch.device) -> torch.device:
    """ "auto" is the GPU if there is one. Raises ValueError for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: it must be auto, cpu or cuda[:N], got {str(device)!r}") from error
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"device: it must be auto, cpu or cuda[:N], got {str(device)!r}")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: {device} must exist, this machine has {torch.cuda.device_count()} CUDA device(s)")
    return found


def assemble(
    recipe: Recipe,
    device: torch.device,
    networks: tuple[nn.Module, nn.Module] | None = None,
    capture: str = "auto",
) -> tuple[nn.Module, nn.Module, GANStep]:
    """``(generator, discriminator, step)`` of a recipe on `device`: built, converted, with optimisers.

    Seeds torch's global generators with the recipe's seed.
    """
    if networks is None:
        needs.check(recipe, device)
    torch.manual_seed(recipe.seed)
    generator, discriminator = networks or build_models(recipe)
    for module in (generator, discriminator):
        module.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    generator, discriminator = convert(generator), convert(discriminator)

    def adam(module: nn.Module, lr: float) -> Adam:
        return Adam(module.parameters(), lr=lr, betas=recipe.betas, eps=recipe.adam_eps)

    step = GANStep(
        generator,
        discriminator,
        latent=recipe.latent,
        g_optimizer=adam(generator, recipe.g_lr),
        d_optimizer=adam(discriminator, recipe.d_lr),
        loss=recipe.loss,
        penalty=recipe.penalty,
        penalty_weight=recipe.penalty_weight,
        penalty_every=recipe.penalty_every,
        d_steps=recipe.d_steps,
        ema=recipe.ema,
        precision=recipe.precision,
        capture=capture,
    )
    return generator, discriminator, step


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
    patience: the run ends after so many evaluations in a row without a lower kernel distance.
    quiet: show warnings only.
    images: an image set to use in place of the recipe's data.
    networks: (generator, discriminator) to train in place of the recipe's model.

    allow_changed_data: go on with a run although its images are no longer what they were.

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
        quiet: bool = False,
        images: Any = None,
        networks: tuple[nn.Module, nn.Module] | None = None,
        allow_changed_data: bool = False,
    ):
        self.directory, saved, start = _open(out, resume, overwrite)
        self.out = self.directory.path
        self.recipe = _recipe_of(config, saved)
        self.device = resolve_device(device if device is not None else (saved["device"] if saved else "auto"))
        self._precision = resolve(self.recipe.precision, self.device)
        self.recipe = self.recipe.replace(precision=self._precision.name)  # what config.json holds
        self.backend = backend if backend is not None else (saved["backend"] if saved else None)
        if time_limit is not None and not time_limit > 0:
            raise ValueError(f"training: time_limit must be positive, got {time_limit}")
        self._time_limit, self._overwrite = time_limit, overwrite
        self._target = Target.parse(target) if isinstance(target, str) else target
        if patience is not None and patience < 1:
            raise ValueError(f"training: patience must be at least 1, got {patience}")
        if (patience or isinstance(self._target, Target)) and not self.recipe.eval_every:
            raise ValueError("training: target and patience need evaluations, set eval_every (--eval-every STEPS)")
        self._patience = patience
        self._networks_given = networks is not None
        if saved and saved["models"] != "recipe" and not networks:
            raise ValueError(f"resume: {resume} was trained with networks of its own, pass networks= again")

        self.step = 0
        self.images_seen = 0
        self.seconds = 0.0
        self.metrics: dict[str, float] = {}
        self.progress = progress_for(quiet=quiet)
        self.notes: list[str] = []
        self._guard = Guard(self.recipe.loss, self.recipe.channels * self.recipe.image_size**2, self.recipe.ema)
        self._between_steps = True  # only then is the state one that a run could go on from
        self._damaged = list(start.damaged) if start else []
        begin_run()
        with self._placed():
            self.images = self._load_images(images, saved)
            changed = _check_images(self.images, saved, allow_changed_data)
            self._build(networks)
        self.config = self._configuration(saved, images)
        self._owned = saved is not None  # the directory holds this very run
        if start:
            self._restore(start.state, start.path, changed)

    # ------------------------------------------------------------------------------------------- building

    def _configuration(self, saved: dict[str, Any] | None, images: Any) -> dict[str, Any]:
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        config = {
            "fastgan": __version__,
            "run": saved.get("run") if saved else secrets.token_hex(8),
            "started": saved["started"] if saved else now,
            "device": str(self.device),
            "backend": self.backend,
            "models": "own" if self._networks_given else "recipe",
            "recipe": self.recipe.to_dict(),
            "images": {"given": images is not None, **fingerprint(self.images)},
            "machine": machine(self.device),
        }
        # As JSON gives it back: plain values only, which a checkpoint may hold.
        return dict(json.loads(json.dumps(config)))

    def _load_images(self, images: Any, saved: dict[str, Any] | None) -> Any:
        """The images given, else those of the recipe, whose path becomes absolute: a run can go on from anywhere."""
        if images is None and saved and saved.get("images", {}).get("given"):
            raise ValueError(f"resume: {self.out} was trained on images of its own, pass images= again")
        if images is None:
            self.recipe = recipe = self.recipe.replace(data=data.absolute(self.recipe.data))
            size, channels = recipe.image_size, recipe.channels
            try:
                images = data.load(recipe.data, image_size=size, channels=channels, device=self.device)
            except ValueError as error:
                if not saved:
                    raise
                raise ValueError(
                    f"resume: the run's images must be where they were, in {recipe.data}: {error}; "
                    "--data PATH says where they are now"
                ) from error
        shape, wanted = tuple(images.images.shape[1:]), [self.recipe.channels, *[self.recipe.image_size] * 2]
        if list(shape) != wanted:
            raise ValueError(
                f"training: images must be [N, {', '.join(map(str, wanted))}] "
                f"as the recipe says, got [N, {', '.join(map(str, shape))}]"
            )
        return images

    def _build(self, networks: tuple[nn.Module, nn.Module] | None) -> None:
        recipe = self.recipe
        self.generator, self.discriminator, self._train_step = assemble(recipe, self.device, networks)
        # Data order, latents and fixed noise have generators or seeds of their own: none shifts another.
        self._batches = self.images.batches(
            recipe.batch_size,
            generator=torch.Generator().manual_seed(recipe.seed),
            flip=recipe.flip,
            channels_last=True,
        )
        self.noise = latents(recipe.sample_count, recipe.latent, seed=recipe.seed)
        self.evaluation = Evaluation(self.images.images, recipe.latent, recipe.seed + 2, recipe.sample_count)
        torch.manual_seed(recipe.seed + 1)
        self._rng = checkpoint.rng_state()

    @property
    def sampler(self) -> nn.Module:
        """The generator that samples are drawn from: the averaged one if the recipe has `ema`."""
        return self._train_step.ema if self._train_step.ema is not None else self.generator

    # ------------------------------------------------------------------------------------------- state

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on, as tensors and plain values."""
        step = self._train_step
        return {
            "step": self.step,
            "images": self.images_seen,
            "seconds": self.seconds,
            "generator": self.generator.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "sampler": step.ema.state_dict() if step.ema is not None else None,
            "g_optimizer": step.g_optimizer.state_dict(),
            "d_optimizer": step.d_optimizer.state_dict(),
            "training": step.state_dict(),
            "data": self._batches.state_dict(),
            "rng": checkpoint.rng_state(),
            "noise": self.noise,
            "evaluation": self.evaluation.state_dict(),
            "seconds_evaluating": self.evaluation.seconds,
            "winners": dict(winners()),
            "config": self.config,
        }

    def _restore(self, state: dict[str, Any], path: Path, changed: bool) -> None:
        """Take over `state`, which `path` holds; `changed`: the images are others, so a new epoch begins."""
        missing = [key for key in KEYS if key not in state]
        if missing:
            raise ValueError(f"resume: {path} must hold {', '.join(KEYS)}, it lacks {', '.join(missing)}")
        if self.recipe.steps < state["step"] or (self.recipe.steps == state["step"] and self.directory.finished):
            raise ValueError(
                f"resume: steps must be above the {state['step']} that {self.out} has, got {self.recipe.steps}"
            )
        self.step, self.images_seen, self.seconds = state["step"], state["images"], state["seconds"]
        fill(self.generator, state["generator"], f"{path}: generator")
        fill(self.discriminator, state["discriminator"], f"{path}: discriminator")
        self._train_step.g_optimizer.load_state_dict(state["g_optimizer"])
        self._train_step.d_optimizer.load_state_dict(state["d_optimizer"])
        self._train_step.load_state_dict(state["training"])
        self._batches.load_state_dict(state["data"], changed=changed)
        self.noise = state["noise"]
        if "evaluation" in state:  # checkpoints of earlier versions have none
            self.evaluation.load_state_dict(state["evaluation"])
            self.evaluation.seconds = state["seconds_evaluating"]
        begin_run(state["winners"])
        self._rng = state["rng"]

    def save(self) -> Path:
        """Write a checkpoint; raises `DivergedError` instead if a number in it is not finite."""
        state = self.state()
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
        with self._placed(), self.directory.locked(), Signals() as signals:
            self._begin()
            self.progress.start(self.step, self.recipe.steps)
            try:
                try:
                    # a run that was killed after its last checkpoint lacks its last pictures and the report alone
                    reason = self._loop(signals) if self.step < self.recipe.steps else "steps"
                except Exception as error:
                    self._rescue(error)
                    raise
                return self._finish(reason)
            finally:
                self.progress.stop()

    def _begin(self) -> None:
        """Make the run directory, or check that it is still as it was when this run was read from it."""
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
            f"{recipe.name} on {self.images.name} ({len(self.images.images):,} images), {self.device}, "
            f"{self._precision}: step {self.step} to {recipe.steps}, writing to {self.out}"
        )
        if self.step == 0:
            self._draw()
        checkpoint.set_rng_state(self._rng)

    def _rescue(self, error: Exception) -> None:
        """After an error: save what was reached, where it is whole, and say from where the run can go on."""
        if isinstance(error, DivergedError):  # it names the last good checkpoint itself
            return
        step = self.directory.last_step()
        if self._between_steps and self.step > step:
            with contextlib.suppress(Exception):  # the first error is the one to hear of
                self.save()
                step = self.step
        self.progress.warn(f"the run can go on from step {step}: fastgan train --resume {self.out}")

    def _loop(self, signals: Signals) -> str:
        recipe = self.recipe
        self._began = self._mark = time.perf_counter()
        self._mark_step = self.step
        before = self.seconds
        while True:
            self._between_steps = False
            metrics = self._train_step([next(self._batches)[0] for _ in range(recipe.d_steps)])
            self.step += 1
            self.images_seen += recipe.batch_size * recipe.d_steps
            self.seconds = before + time.perf_counter() - self._began
            self._between_steps = True
            self.progress.tick(self.step)
            reason = self._reason(signals)
            # The first step is logged too: it tells at once whether the run works at all.
            due = recipe.eval_every and self.step % recipe.eval_every == 0
            if due or reason or self.step == 1 or self.step % recipe.log_every == 0:
                scores = self._evaluate() if due else {}
                self._log(metrics, scores)
                reason = reason or self._enough(scores)
            if reason:
                return reason
            if recipe.sample_every and self.step % recipe.sample_every == 0:
                self._aside(self._draw)
            if recipe.checkpoint_every and self.step % recipe.checkpoint_every == 0:
                self._aside(self.save)

    def _reason(self, signals: Signals) -> str:
        """Why the run ends after this step, or ""."""
        if signals.received:
            return "interrupted"
        if self.step >= self.recipe.steps:
            return "steps"
        if self._time_limit is not None and time.perf_counter() - self._began >= self._time_limit:
            return "time"
        return ""

    def _enough(self, scores: dict[str, float]) -> str:
        """Why the run ends after this logged step, or "": the target is met, or patience is at its end."""
        target = self._target
        if target is not None and (target.reached(scores) if isinstance(target, Target) else target(self)):
            return "target"
        if scores and self._patience and self.evaluation.waited >= self._patience:
            return "patience"
        return ""

    def _evaluate(self) -> dict[str, float]:
        """The generator's scores; the best generator so far is kept."""
        scores: dict[str, float] = {}
        evaluation = self.evaluation
        interval = max(0.0, self.seconds - evaluation.seconds) / self.step * self.recipe.eval_every
        self._aside(lambda: scores.update(evaluation(self.sampler, self.step, interval)))
        if scores and evaluation.best_step == self.step:
            best = {"step": self.step, "generator": self.sampler.state_dict(), "scores": scores}
            self._aside(lambda: self.directory.save_best({**best, "count": evaluation.count}))
        return scores

    def _aside(self, work: Callable[[], object]) -> None:
        """Do `work` off the clock that images/s are measured with."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        begin = time.perf_counter()
        work()
        self._mark += time.perf_counter() - begin

    def _log(self, lazy: Mapping[str, Tensor], scores: dict[str, float]) -> None:
        """Read the metrics (this waits for the device), check them, show them, append them to the log."""
        self.metrics = {name: float(value) for name, value in lazy.items()} | scores
        now = time.perf_counter()
        steps = self.step - self._mark_step
        step_seconds = (now - self._mark) / max(1, steps)
        self._mark, self._mark_step = now, self.step
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
        self.directory.append(record)
        left = (self.recipe.steps - self.step) * step_seconds
        if self._time_limit is not None:
            left = min(left, self._time_limit - (now - self._began))
        self.progress.log({**record, "seconds_left": left})
        self._warn(self._guard.check(self.step, self.metrics))

    def _warn(self, warning: str | None) -> None:
        if warning:
            self.notes.append(warning)
            self.progress.warn(warning)

    def _draw(self) -> None:
        """The sample grid of this step, from the run's fixed noise."""
        images = draw(self.sampler, self.noise)
        data.save_grid(images, self.directory.grid(self.step))
        self._warn(self._guard.check_samples(self.step, images))
        first = max(self.generator.parameters(), key=lambda p: p.dim())
        self._warn(self._guard.check_movement(self.step, first.flatten()[:4096]))

    def _finish(self, reason: str) -> Result:
        path = self.save()
        self._rng = checkpoint.rng_state()
        self._draw()
        words = {
            "steps": "all steps done",
            "time": "time limit reached",
            "target": f"target reached{f': {self._target}' if isinstance(self._target, Target) else ''}",
            "patience": f"no lower kernel distance in {self.evaluation.waited} evaluations",
            "interrupted": "interrupted",
        }
        if self.evaluation.best is not None:
            self.notes.append(self._evaluated())
            self.progress.note(self.notes[-1])
        try:
            page = report.write_report(
                self.directory, status=words[reason], notes=self.notes, explanation=self._explanation()
            )
        except Exception as error:  # the run is saved; its report can be made again
            page = None
            self.progress.warn(f"the report could not be written: {error}")
        self._settle(reason)
        self.progress.stop()
        where = f"; report: {page}" if page else ""
        self.progress.note(f"{words[reason]}: step {self.step}, {self.seconds:.0f} s of training{where}")
        if reason in ("interrupted", "time"):
            self.progress.note(f"go on with: fastgan train --resume {self.out}")
        return Result(self.out, self.step, reason, self.seconds, dict(self.metrics), path)

    def _evaluated(self) -> str:
        """What the evaluations found, how, and what they cost."""
        found = self.evaluation
        return (
            f"best kernel distance {found.best:.4f} at step {found.best_step}, kept in best/generator.pt: "
            f"{found.count} pictures and images, features of {found.identity}; "
            f"evaluation took {100 * found.seconds / max(self.seconds, found.seconds):.1f} % of the time"
        )

    def _settle(self, reason: str) -> None:
        """Race what the first steps had no time for; it counts from the next run on."""
        if reason != "interrupted" and (settled := settle()):
            self.progress.note(f"kernels chosen for the next run: {len(settled)} cases that the first steps left open")

    def _explanation(self) -> str:
        lines = [self._train_step.explain()]
        for name, network in (("generator", self.generator), ("discriminator", self.discriminator)):
            lines += ["", name, str(explain(network))]
        return "\n".join(lines)


def _open(
    out: str | Path | None, resume: str | Path | None, overwrite: bool
) -> tuple[RunDirectory, dict[str, Any] | None, checkpoint.Found | None]:
    """The run directory; for a resumed run also its configuration and its newest sound checkpoint, if it has one."""
    if resume is not None:
        if overwrite or (out is not None and Path(out) != Path(resume)):
            raise ValueError("resume: it goes on in the run's own directory, leave out and overwrite out")
        directory = RunDirectory(resume)
        saved = directory.read_config()
        directory.check_free()
        return directory, saved, directory.newest()
    if out is None:
        raise ValueError("training: out must be given, the directory that the run is written to")
    directory = RunDirectory(out)
    directory.check_new(overwrite=overwrite)
    return directory, None, None


def _check_images(images: Any, saved: dict[str, Any] | None, allow: bool) -> bool:
    """Whether a resumed run's images differ from those it began with. Raises ValueError unless that is allowed."""
    if not saved or "images" not in saved:
        return False
    differs = difference(saved["images"], fingerprint(images))
    if differs and not allow:
        raise ValueError(
            f"resume: the images must be those that the run began with, {images.name} has {differs}; "
            "restore them, or insist with --allow-changed-data (allow_changed_data=True)"
        )
    return bool(differs)


def _recipe_of(config: Recipe | str | Mapping[str, Any] | None, saved: dict[str, Any] | None) -> Recipe:
    """The recipe that `config` stands for, checked against the saved one of a resumed run."""
    before = Recipe.from_dict(saved["recipe"]) if saved else None
    if config is None:
        if before is None:
            raise ValueError("training: config must be a recipe, its name or a dict of its fields, got None")
        return before
    if isinstance(config, str):
        named = recipes()
        if config not in named:
            raise ValueError(f"recipe: there is no recipe {config!r}, choose one of {', '.join(named)}")
        config = named[config]
    recipe = config if isinstance(config, Recipe) else Recipe.from_dict(config)
    if before is not None and recipe.precision == "auto":
        recipe = recipe.replace(precision=before.precision)
    if before is not None:
        for name, value in before.to_dict().items():
            if name not in (*MAY_CHANGE, "data") and getattr(recipe, name) != value:
                raise ValueError(
                    f"resume: {name} must stay {value!r}, got {getattr(recipe, name)!r}; "
                    f"a resumed run may change {', '.join(MAY_CHANGE)}"
                )
    return recipe
