"""One GAN training step: the textbook loop's numbers, at less than its cost.

What is saved against the seven lines of a tutorial: the fake batch is made once and serves both updates; D(real) and
D(fake) run as one batch with statistics per half wherever that is the same mathematics; the generator's update computes
no discriminator weight gradients; nothing is read back to the host, so metrics cost nothing until somebody looks.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_map

from fastgan import _ranks, functional, penalties
from fastgan._hooks import has_hooks, has_hooks_on_values
from fastgan._logits import logits_of
from fastgan._ranks import Sync
from fastgan.convert import synchronise
from fastgan.functional.losses import KINDS, RELATIVE, gan_loss_terms
from fastgan.nn.norm import stat_groups
from fastgan.training.adam import Adam
from fastgan.training.capture import Capture, capturable_device, graphs_of, not_capturable
from fastgan.training.ema import EMA
from fastgan.training.outputs import (
    ExtraLoss,
    Outputs,
    as_one,
    check_takes_labels,
    clip,
    clipping,
    halves,
    members_of,
    parts_of,
    scalar,
)
from fastgan.training.precision import NAMES as PRECISION_NAMES
from fastgan.training.precision import resolve, warn
from fastgan.training.probabilities import Watch

Latent = int | Sequence[int] | Callable[[int, torch.device, torch.Generator | None], Any]
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
LOOKS_AT = {"r1": ("real",), "r2": ("fake",), "r1r2": ("real", "fake")}  # a penalty of squares -> its images
# Values of real images from which D learns in turn by itself on a CPU: 64 images of 3 x 64 x 64. DCGAN-64 then holds
# 0.66 of PyTorch's worst moment in the place of 0.90, at 0.96 to 1.02 times the speed of one batch of both (float32,
# three machines), and from 128 on 1.00 to 1.18 times. With 32 images one batch of both holds 0.79 of PyTorch's.
IN_TURN_FROM = 64 * 3 * 64 * 64
PENALTY_WEIGHTS = {kind: 1.0 if kind == "r1r2" else 10.0 for kind in penalties.KINDS}

# torch modules whose forward treats every sample by itself, in training mode too
PER_SAMPLE = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.Linear, nn.Embedding, nn.Identity, nn.Flatten, nn.Unflatten),
    *(nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.SiLU, nn.GELU, nn.Mish, nn.Softplus),
    *(nn.Tanh, nn.Sigmoid, nn.Hardtanh),
    *(nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    *(nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
    *(nn.Upsample, nn.PixelShuffle, nn.PixelUnshuffle),
    *(nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.ConstantPad2d),
)


class Exchange(Protocol):
    """Averages an update's gradients over the processes of a run (`fastgan.training.distributed`)."""

    def exchange(self, parameters: Sequence[Tensor]) -> None:
        """Called once an update, when the gradients are complete and neither clipped nor unscaled."""


def mixes_samples(discriminator: nn.Module) -> str:
    """Why D(real) and D(fake) cannot run as one batch, or "" where that gives the same numbers.

    Known to be the same: per-sample torch modules, batch norms of ours (they take statistics per half), nn.Sequential,
    and classes that declare `per_sample = True`. Anything else may mix samples: two passes.
    """
    for name, m in discriminator.named_modules():
        where = f"{name or 'the discriminator'} ({type(m).__name__})"
        if has_hooks(m):
            return f"{where} has hooks, which would see both batches as one"
        if torch.nn.utils.parametrize.is_parametrized(m):
            return f"{where} is parametrized (spectral_norm advances once a forward)"
        if hasattr(m, "stat_groups"):
            continue
        if isinstance(m, _BatchNorm):
            if m.training or m.running_mean is None:
                return f"{where} takes statistics over the whole batch; fastgan.convert makes it take them per half"
        elif isinstance(m, _DropoutNd):
            if m.training and m.p > 0:
                return f"{where} draws its mask over the whole batch"
        elif isinstance(m, nn.InstanceNorm2d | nn.InstanceNorm1d | nn.InstanceNorm3d) and m.track_running_stats:
            return f"{where} tracks running statistics over the whole batch"
        elif not (
            (isinstance(m, PER_SAMPLE) and _torch_forward(m))
            or type(m).forward is nn.Sequential.forward
            or getattr(m, "per_sample", False)
        ):
            return f"{where} has a forward of its own that may mix samples (per_sample = True declares it does not)"
    return ""


def _torch_forward(m: nn.Module) -> bool:
    """Whether the class's forward is torch's or ours, rather than a user's override."""
    return type(m).forward.__module__.partition(".")[0] in ("torch", "fastgan")


class GANStep:
    """One discriminator update (or `d_steps`) and one generator update.

    Equals, to rounding: fake = G(z); D on real and on fake.detach(), its optimiser; G on D(fake) with the updated D and
    the same fake, its optimiser (the order of PyTorch's DCGAN example).

    Args:
        generator: z -> images, or (z, labels) -> images; a tuple of latents is given as so many arguments.
        discriminator: images -> logits, or (images, labels) -> logits; the logits may be a tensor, a list of them (one
            a scale), or come beside features or in a dict (`fastgan._logits.logits_of`). A final nn.Sigmoid is folded
            into the loss, with one line that says so. Several discriminators, in a list, a tuple or an nn.ModuleList,
            judge the same images: their losses and penalties add up (`outputs.Several`).
        latent: an int or a shape (normal noise), or callable(n, device, generator) -> z, a tensor or a tuple of them.
        g_optimizer, d_optimizer: over the two modules' parameters; fused=True reads nothing back.
        loss: "bce", "minimax", "lsgan", "hinge", "wasserstein", "relativistic" or "relativistic-average".
        penalty: None or a kind of `fastgan.functional.gradient_penalty` ("wgan-gp", "r1", ...) on the discriminator.
        penalty_weight: its coefficient; None takes 10 (1 for r1r2).
        penalty_every: apply it on every k-th D update with k times the weight (lazy regularisation).
        penalty_sigma: the deviation of the noise of "r1-approximate" and "r2-approximate", > 0.
        d_steps: D updates a step; `real` may then be a sequence of that many batches, else one batch serves all.
        ema: decay of an average of the generator (`step.ema`), or None.
        precision: "fp32", "bf16" or "fp16" (autocast; parameters, statistics and losses stay float32), or "auto": bf16
            where this machine is faster in it, fp32 elsewhere (`fastgan.training.precision`).
        augment: callable on the discriminator's images, real and fake alike, differentiable. Where it has a method
            `observe`, that is given D's logits of each batch of real images, and returns 0-dim tensors for the metrics;
            its `state_dict` is kept in the step's.
        label_smoothing: the target of real logits is 1 - label_smoothing (bce, minimax, lsgan); a pair (s, t) gives
            fake logits the target t too.
        top_k: the generator learns from this share of a batch alone, the images with the greatest logits (Sinha et al.
            2020, arXiv:2002.06224); it may be set between two steps. With losses that pair no logits.
        grad_clip: largest norm of each network's gradient, or ("norm", x) or ("value", x); fp16 gradients are unscaled
            first.
        weight_clip: D's parameters are kept within [-weight_clip, weight_clip] after its update (WGAN).
        accumulate: each update sums the gradients of so many equal parts of the batch, which equals the whole batch
            where no statistics are taken over it. The generator runs once more on each part.
        low_memory: D learns from real and fake images in turn, so that the activations of one half are alive at a time
            (`_in_turn`). The numbers are the same, to rounding. Not with relativistic losses or extra_d_loss. None: on
            a CPU, where the real images are IN_TURN_FROM values or more and the loss allows it.
        extra_d_loss, extra_g_loss: callable(outputs) -> scalar that is added to the network's loss (`Outputs`). An
            extra_g_loss with the attribute reads_d_real = False spares the discriminator's pass over real images.
        extra_g_every: add extra_g_loss at every k-th step, k times (lazy regularisation).
        history: callable(fake) -> what D's update sees in its place, of the same shape (`fastgan.training.history`).
        capture: "auto" replays CUDA graphs on a GPU (`fastgan.training.capture`) and runs eagerly where that is
            impossible, with one line that says why; "on" raises there; "off" runs eagerly. A model whose Python code
            does something else at each step (beyond what its first three steps show) must be run with "off".
        rng: torch.Generator for z and the penalty's noise; None uses torch's global one.
        sync: on several processes, what looks over a batch looks over those of all (True) or of a process group: batch
            norm (`fastgan.convert.synchronise`), "relativistic-average", top_k, the deviation of "dragan". With
            `exchange`, ranks of batch B then train as one process with all their images.

    Raises:
        ValueError: an unknown loss, penalty, precision or capture, or counts below 1; at the first step, a
            discriminator whose output comes from a sigmoid or softmax that is no module.
        RuntimeError: capture="on" where it is impossible.
    """

    augment: Any

    scales = 1  # tensors of logits that the discriminator gave last, whose losses are summed

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module | Sequence[nn.Module],
        *,
        latent: Latent,
        g_optimizer: torch.optim.Optimizer,
        d_optimizer: torch.optim.Optimizer,
        loss: str = "bce",
        penalty: str | None = None,
        penalty_weight: float | None = None,
        penalty_every: int = 1,
        penalty_sigma: float = 0.01,
        d_steps: int = 1,
        ema: float | None = None,
        precision: str = "fp32",
        augment: Callable[[Tensor], Tensor] | None = None,
        label_smoothing: float | tuple[float, float] = 0.0,
        top_k: float = 1.0,
        grad_clip: float | tuple[str, float] | None = None,
        weight_clip: float | None = None,
        accumulate: int = 1,
        low_memory: bool | None = None,
        extra_d_loss: ExtraLoss | None = None,
        extra_g_loss: ExtraLoss | None = None,
        extra_g_every: int = 1,
        history: Callable[[Tensor], Tensor] | None = None,
        capture: str = "auto",
        rng: torch.Generator | None = None,
        sync: Sync = False,
    ):
        _one_of("loss", loss, KINDS)
        _one_of("precision", precision, PRECISION_NAMES)
        _one_of("capture", capture, ("auto", "on", "off"))
        _check_penalty(penalty, penalty_sigma)
        _check_counts(d_steps=d_steps, penalty_every=penalty_every, accumulate=accumulate, extra_g_every=extra_g_every)
        _check_updates(weight_clip, accumulate, top_k, loss, penalty, (g_optimizer, d_optimizer))
        _check_turns(low_memory, loss, extra_d_loss)
        self.sync, self.generator, self.discriminator = sync, *_synchronised(sync, generator, as_one(discriminator))
        self.g_optimizer, self.d_optimizer = g_optimizer, d_optimizer
        self.latent, self.loss, self.label_smoothing, self.augment = latent, loss, label_smoothing, augment
        self.penalty, self.penalty_every, self.d_steps = penalty, penalty_every, d_steps
        self.grad_clip, self.weight_clip, self.accumulate = clipping(grad_clip), weight_clip, accumulate
        self.extra_d_loss, self.extra_g_loss, self.extra_g_every = extra_d_loss, extra_g_loss, extra_g_every
        self.top_k, self.low_memory, self.penalty_sigma = top_k, low_memory, penalty_sigma
        self.history: Any = history
        self.penalty_weight = PENALTY_WEIGHTS.get(penalty or "", 0.0) if penalty_weight is None else penalty_weight
        self._average = None if ema is None else EMA(generator, ema)
        first = next(generator.parameters())
        self.device, self.dtype = first.device, first.dtype
        self._resolved = resolve(precision, self.device, (generator, self.discriminator))
        self.precision, self.rng = self._resolved.name, rng
        if self._resolved.slower:
            warn(self._resolved.slower)
        scaling: Any = {"device": self.device.type, "enabled": self.precision == "fp16"}
        self._g_scaler, self._d_scaler = torch.amp.GradScaler(**scaling), torch.amp.GradScaler(**scaling)
        self.d_updates, self._labelled = 0, False  # _labelled: whether both networks are known to take labels
        self.exchange: Exchange | None = None  # set where several processes train together
        self._capture = self._make_capture(capture)
        self._watch = Watch(self.discriminator, reads=self._capture is None and self.device.type == "cpu")

    # ---- the step -----------------------------------------------------------------------------------------------

    def __call__(self, real: Tensor | Sequence[Tensor], labels: Any = None, z: Any = None) -> dict[str, Tensor]:
        """Train on one batch (or on `d_steps` batches) of real images.

        Args:
            real: [N, C, H, W], or a sequence of d_steps such batches.
            labels: [N] or None (a sequence beside a sequence of real batches); given to both networks.
            z: latents for the step, drawn where None (a sequence for d_steps > 1 gives each update its own). A tuple
                for d_steps = 1 is one batch of latents for a generator that takes several.

        Returns:
            0-dim tensors on the device: "d_loss" (without the penalty), "g_loss", "d_real" and "d_fake" (mean sigmoid
            of the logits before D's update), "logit_real", "logit_fake", "right_real" and "right_fake" (the share of
            logits above and below 0), and "penalty", "extra_d_loss" and "extra_g_loss" where they were computed.
            Reading one with float() synchronises.
        """
        if self.d_steps == 1 and isinstance(z, tuple):
            z = [z]
        if z is None and callable(self.latent):
            # outside the capture: a user's function may draw from anywhere
            z = [self.draw_latent(self._of_update(real, i).shape[0]) for i in range(self.d_steps)]
        if labels is not None and not self._labelled:
            several = isinstance(z, list) and isinstance(z[0], tuple)
            check_takes_labels(self.generator, "generator", len(z[0]) if several else 1)
            check_takes_labels(self.discriminator, "discriminator", 1)
            self._labelled = True
        every, done = self.penalty_every, self.d_updates
        penalised = [self.penalty is not None and (done + i) % every == 0 for i in range(self.d_steps)]
        due = *penalised, self.extra_g_loss is not None and done // self.d_steps % self.extra_g_every == 0
        captured = None if self._watch.may_fold else self._capture
        metrics = (captured or self.run)(due, real, labels, z)
        self.d_updates += self.d_steps
        return metrics

    def run(self, due: tuple[bool, ...], real: Any, labels: Any, z: Any) -> dict[str, Tensor]:
        """The whole step; due: which of its D updates carry the penalty, and whether G's carries its extra loss."""
        metrics: dict[str, Tensor] = {}
        for i in range(self.d_steps):
            x, y, latents = self._of_update(real, i), self._of_update(labels, i), self._of_update(z, i)
            latents = self.draw_latent(x.shape[0]) if latents is None else latents
            shared = i == self.d_steps - 1 and self.accumulate == 1  # one generator pass serves both updates
            with torch.set_grad_enabled(shared), self._autocast():
                fake = _call(self.generator, latents, y)
            shown = fake.detach() if self.history is None else self.history(fake.detach())
            metrics |= self._update_discriminator(x, shown, y, latents, due[i])
        average = self._average
        made = fake if shared else None
        if average is None:
            return metrics | self._update_generator(due[-1], x, made, y, latents)
        pairs = average.pairs(self.generator)
        metrics |= self._update_generator(due[-1], x, made, y, latents, averages=pairs, weight=1 - average.decay)
        average.update(self.generator, pairs)  # pairs that fastgan.Adam moved already are left out
        return metrics

    def _update_discriminator(
        self, real: Tensor, fake: Tensor, labels: Tensor | None, z: Any, due: bool
    ) -> dict[str, Tensor]:
        losses = (loss for part in self._parts(real, fake, labels, z) for loss in self._d_losses(due, *part))
        metrics = self._descend(losses, self.d_optimizer, self._d_scaler)
        if self.weight_clip is not None:
            with torch.no_grad():
                torch._foreach_clamp_min_(list(self.discriminator.parameters()), -self.weight_clip)
                torch._foreach_clamp_max_(list(self.discriminator.parameters()), self.weight_clip)
        return metrics

    def _d_losses(
        self, due: bool, real: Tensor, fake: Tensor, labels: Tensor | None, z: Any
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """The terms of D's loss with their metrics, made one by one: each is differentiated before the next exists."""
        real, fake = self._augmented(real), self._augmented(fake)  # the loss and its penalty see the same images
        mixes = bool(mixes_samples(self.discriminator))  # a walk over its modules: once an update
        large = real.is_cpu and real.numel() >= IN_TURN_FROM
        apart = (large if self.low_memory is None else self.low_memory) or mixes or real.shape != fake.shape
        if apart and self.loss not in RELATIVE and self.extra_d_loss is None:
            yield from self._in_turn(due, real, fake, labels, mixes)
        else:
            yield self._d_loss(due, real, fake, labels, z, mixes)

    def _in_turn(
        self, due: bool, real: Tensor, fake: Tensor, labels: Tensor | None, mixes: bool
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """The terms of real images, of fake ones, and of a penalty that has passes of its own.

        Where the images cannot be one batch anyway this costs nothing; docs/evidence/memory.md has the price elsewhere.
        """
        on_real, loss, of_real = self._term("real", due and not mixes, real, labels)
        yield loss, {}
        on_fake, loss, of_fake = self._term("fake", due and not mixes, fake, labels)
        values = [value for value in (of_real, of_fake) if value is not None]
        found = {"penalty": torch.stack(values).sum()} if values else {}
        yield loss, self._d_metrics(on_real, on_fake)[1] | found
        if due and not values:
            value = self._penalise(real, fake, labels)
            yield value, {"penalty": value.detach()}

    def _term(self, of: str, norms: bool, images: Tensor, labels: Tensor | None) -> tuple[Any, Tensor, Tensor | None]:
        """(D(images), detached; their term of D's loss; the value of the penalty in it, or None).

        norms: a penalty is due, and may come from the same pass.
        """
        with self._autocast():
            looks = norms and of in LOOKS_AT.get(self.penalty or "", ())
            found = self._logits_and_norms(images, labels) if looks else None
            run = lambda: (found[0] if found else _call(self.discriminator, images, labels),)
            (output,) = self._watch.folded(run) if of == "real" else run()
        loss = gan_loss_terms(self._loss_logits(output), of=of, kind=self.loss, label_smoothing=self.label_smoothing)
        shown = tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, output)
        if found is None:
            return shown, loss, None
        value = penalties.squared_penalty([found[1]], self._weight)
        return shown, loss + value, value.detach()

    def _d_loss(
        self, due: bool, real: Tensor, fake: Tensor, labels: Tensor | None, z: Any, mixes: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """D's whole loss at once; mixes: D may mix samples (`mixes_samples`)."""
        with self._autocast():
            merged = self._logits_and_penalty(real, fake, labels) if due and not mixes else None
            run = lambda: merged[:2] if merged else self._discriminate(real, fake, labels, mixes)
            on_real, on_fake = self._watch.folded(run)
        loss, metrics = self._d_metrics(on_real, on_fake)
        if due:
            value = merged[2] if merged else self._penalise(real, fake, labels)
            metrics["penalty"] = value.detach()
            loss = loss + value
        if self.extra_d_loss is not None:
            with self._autocast():
                extra = scalar("extra_d_loss", self.extra_d_loss(Outputs(real, fake, on_real, on_fake, labels, z)))
            metrics["extra_d_loss"] = extra.detach()
            loss = loss + extra
        return loss, metrics

    def _d_metrics(self, on_real: Any, on_fake: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """D's adversarial loss, and what is reported of it."""
        self._watch.look(on_real, on_fake)
        loss, statistics = functional.gan_loss_statistics(
            self._loss_logits(on_fake),
            self._loss_logits(on_real),
            kind=self.loss,
            side="d",
            label_smoothing=self.label_smoothing,
        )
        names = ("logit_real", "logit_fake", "d_real", "d_fake", "right_real", "right_fake")
        metrics = {"d_loss": loss.detach()} | dict(zip(names, statistics.unbind(), strict=True))
        if hasattr(self.augment, "observe"):
            metrics |= self.augment.observe(_logits(on_real))
        return loss, metrics

    def _penalise(self, real: Tensor, fake: Tensor, labels: Tensor | None) -> Tensor:
        """The penalty, by passes of its own; for several discriminators the sum of theirs."""
        with self._autocast():
            options: Any = dict(
                kind=self.penalty,
                weight=self._weight,
                labels=labels,
                generator=self.rng,
                sigma=self.penalty_sigma,
                sync=self.sync,
            )
            found = [functional.gradient_penalty(d, real, fake, **options) for d in members_of(self.discriminator)]
            return found[0] if len(found) == 1 else torch.stack(found).sum()

    @property
    def _weight(self) -> float:
        """The penalty's coefficient in an update that has one."""
        return self.penalty_weight * self.penalty_every

    def _logits_and_norms(self, images: Tensor, labels: Tensor | None) -> tuple[Any, Tensor] | None:
        """D's logits, and its squared gradient norms from the same pass: 4F instead of 3F + 4F with a penalty.

        Not for a D that mixes samples: one forward more or less would change it (spectral norm's power iteration, a
        dropout mask). None where the penalty looks elsewhere, or D does not qualify (`forward_logits_and_norms`).
        """
        if self.penalty not in LOOKS_AT or len(members_of(self.discriminator)) > 1:
            return None
        return penalties.forward_logits_and_norms(self.discriminator, images, labels)

    def _logits_and_penalty(
        self, real: Tensor, fake: Tensor, labels: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """(D(real), D(fake), r1, r2 or r1r2) with the penalty from the loss's own passes, or None."""
        if self.penalty == "r1r2":
            if real.shape != fake.shape:
                return None
            found = self._logits_and_norms(torch.cat([real, fake.to(real.dtype)]), _twice(labels))
            if found is None:
                return None
            (logits_real, logits_fake), norms = found[0].chunk(2), list(found[1].chunk(2))
            return logits_real, logits_fake, penalties.squared_penalty(norms, self._weight)
        found = self._logits_and_norms(real if self.penalty == "r1" else fake, labels)
        if found is None:
            return None
        other = _call(self.discriminator, fake if self.penalty == "r1" else real, labels)
        logits = (found[0], other) if self.penalty == "r1" else (other, found[0])
        return *logits, penalties.squared_penalty([found[1]], self._weight)

    def _loss_logits(self, output: Any) -> Tensor | list[Tensor]:
        """The logits for the loss: those of all ranks where the loss compares samples of a batch."""
        found = _logits(output)
        self.scales = len(found) if isinstance(found, list) else 1
        if (self.loss != "relativistic-average" and self.top_k == 1) or _ranks.size(self.sync) == 1:
            return found
        scales = [_ranks.pooled(t, self.sync) for t in (found if isinstance(found, list) else [found])]
        return scales if isinstance(found, list) else scales[0]

    def _discriminate(self, real: Tensor, fake: Tensor, labels: Tensor | None, mixes: bool) -> tuple[Any, Any]:
        """(D(real), D(fake)), as one batch where that is the same mathematics."""
        if mixes or real.shape != fake.shape:
            return _call(self.discriminator, real, labels), _call(self.discriminator, fake, labels)
        both = torch.cat([real.to(fake.dtype), fake])
        with stat_groups(self.discriminator, 2):
            output = _call(self.discriminator, both, _twice(labels))
        return halves(output)

    def _update_generator(
        self, due: bool, real: Tensor, fake: Tensor | None, labels: Tensor | None, z: Any, **averaging: Any
    ) -> dict[str, Tensor]:
        """fake: G(z), or None: the generator runs on each part."""
        with _frozen(self.discriminator):
            losses = (self._g_loss(due, *part) for part in self._parts(real, fake, labels, z))
            return self._descend(losses, self.g_optimizer, self._g_scaler, averaging)

    def _g_loss(
        self, due: bool, real: Tensor, fake: Tensor | None, labels: Tensor | None, z: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        with self._autocast():
            fake = self._augmented(_call(self.generator, z, labels) if fake is None else fake)
            on_real = None
            extra = self.extra_g_loss if due else None
            if self.loss in RELATIVE or (extra is not None and getattr(extra, "reads_d_real", True)):
                with torch.no_grad():
                    real = self._augmented(real)
                    on_real = _call(self.discriminator, real, labels)
            on_fake = _call(self.discriminator, fake, labels)
            logits_real = self._loss_logits(on_real) if self.loss in RELATIVE else None
            best = self._loss_logits(on_fake) if self.top_k == 1 else _most_real(self._loss_logits(on_fake), self.top_k)
            loss = functional.gan_loss(best, logits_real, kind=self.loss, side="g")
            metrics = {"g_loss": loss.detach()}
            if extra is not None:
                value = scalar("extra_g_loss", extra(Outputs(real, fake, on_real, on_fake, labels, z)))
                metrics["extra_g_loss"] = value.detach()
                loss = loss + self.extra_g_every * value
        return loss, metrics

    def _parts(self, *batches: Any) -> Iterator[tuple[Any, ...]]:
        """The batch in `accumulate` equal parts; what is None stays None."""
        if self.accumulate == 1:
            return iter([batches])
        n = len(batches[0])
        if n % self.accumulate:
            raise ValueError(f"GANStep: accumulate must divide the batch, got {self.accumulate} and {n}")
        cut = lambda t: t.chunk(self.accumulate) if isinstance(t, Tensor) else t
        split = [[None] * self.accumulate if b is None else parts_of(b, cut, self.accumulate) for b in batches]
        return zip(*split, strict=True)

    def _descend(
        self,
        losses: Iterator[tuple[Tensor, dict[str, Tensor]]],
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        averaging: dict[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """One update by the mean of the parts' losses, each in one or several terms.

        averaging: what fastgan.Adam moves with its parameters.
        """
        optimizer.zero_grad(set_to_none=True)
        found: dict[str, Tensor] = {}  # those of several parts are averaged
        for loss, metrics in losses:
            scaler.scale(loss if self.accumulate == 1 else loss / self.accumulate).backward()
            if self.accumulate > 1:
                metrics = {k: found.get(k, 0.0) + v / self.accumulate for k, v in metrics.items()}
            found |= metrics
        if self.exchange is not None:
            self.exchange.exchange([p for group in optimizer.param_groups for p in group["params"]])
        if self.grad_clip is not None:
            scaler.unscale_(optimizer)
            clip(optimizer, *self.grad_clip)
        scaler.step(optimizer, **(averaging or {} if isinstance(optimizer, Adam) else {}))
        scaler.update()
        return found

    # ---- its parts ----------------------------------------------------------------------------------------------

    def draw_latent(self, n: int) -> Tensor:
        """n latents on the generator's device, in its dtype."""
        if callable(self.latent):
            return self.latent(n, self.device, self.rng)
        shape = (self.latent,) if isinstance(self.latent, int) else tuple(self.latent)
        return torch.randn(n, *shape, device=self.device, dtype=self.dtype, generator=self.rng)

    @property
    def ema(self) -> nn.Module | None:
        """The averaged generator (eval mode, no gradients), or None."""
        return None if self._average is None else self._average.module

    @property
    def ema_decay(self) -> float | None:
        """The average's decay; it may be set between two steps where there is an average."""
        return None if self._average is None else self._average.decay

    @ema_decay.setter
    def ema_decay(self, decay: float) -> None:
        if self._average is None or not 0 <= decay < 1:
            raise ValueError(f"GANStep: ema_decay must be in [0, 1) and set with ema, got {decay}")
        self._average.decay = decay

    def explain(self) -> str:
        """How the step runs: one line, and one for the penalty."""
        reason = mixes_samples(self.discriminator)
        apart = "low_memory" if self.low_memory else reason
        passes = f"two passes: {apart}" if apart else "one batch of 2N, statistics per half"
        if not apart and self.low_memory is None and self.loss not in RELATIVE and self.extra_d_loss is None:
            passes += f" (two passes on a CPU where the N images are {IN_TURN_FROM:,} values or more)"
        said = f"D(real) and D(fake): {passes}; precision {self._resolved}; {self._runs_as()}"
        if self.penalty is None:
            return said
        members = members_of(self.discriminator)
        route = penalties.verdict(members[0]) or "decided at its first step"
        alone = self.penalty in penalties.SQUARED and not reason and len(members) == 1
        merged = alone and route.startswith("forward")
        return f"{said}\npenalty: {route}" + (", together with the loss" if merged else "")

    # ---- capture --------------------------------------------------------------------------------------------------

    def _make_capture(self, capture: str) -> Capture | None:
        """What replays the step as CUDA graphs, or None where it always runs eagerly, for the reason that is kept."""
        self._eager_because = "capture is off" if capture == "off" else capturable_device(self.device)
        if self._eager_because:
            if capture == "on":
                raise RuntimeError(f"GANStep: capture='on' must be possible, got {self._eager_because}")
            return None
        return Capture(self, graphs_of(self.device), insist=capture == "on")

    def modules(self) -> tuple[nn.Module, ...]:
        """Both networks, and the averaged generator if there is one."""
        return self.generator, self.discriminator, *([] if self.ema is None else [self.ema])

    def optimizers(self) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
        """The generator's and the discriminator's."""
        return self.g_optimizer, self.d_optimizer

    def settings(self) -> tuple:
        """What a user may change between two steps: a captured step must not outlive a change."""
        losses = self.loss, self.penalty, self.penalty_weight, self.penalty_every, self.label_smoothing, self.top_k
        inputs = self.augment, self.latent, self.precision, self.rng, self.sync
        updates = self.grad_clip, self.weight_clip, self.accumulate, self.low_memory
        extra = self.extra_d_loss, self.extra_g_loss, self.extra_g_every, self.history
        return *losses, self.d_steps, *updates, *extra, *inputs, self._average and self._average.decay

    def uncapturable(self) -> str:
        """Why the step as it is now cannot be captured, or ""."""
        if self.exchange is not None:
            return "its gradients are averaged over several processes"
        if _ranks.size(self.sync) > 1:
            return "its statistics are those of several processes"
        for network, name in ((self.generator, "the generator"), (self.discriminator, "the discriminator")):
            for path, m in network.named_modules():
                where = f"{name}'s {path}" if path else name
                if has_hooks_on_values(m):
                    return f"{where} ({type(m).__name__}) has hooks, which a replay would not call"
                if isinstance(m, nn.parallel.DistributedDataParallel | nn.DataParallel):
                    return f"{where} is spread over several devices ({type(m).__name__})"
        for optimizer in self.optimizers():
            reason = not_capturable(optimizer)
            if reason:
                return reason
            if self.precision == "fp16" and not all(g.get("fused") for g in optimizer.param_groups):
                return f"fp16 reads back whether gradients are finite, unless {type(optimizer).__name__} is fused"
        return ""

    def recover(self) -> None:
        """Fresh scalers after a capture that broke off: a scaler in the middle of a step refuses the next one."""
        for optimizer in self.optimizers():
            for name in ("grad_scale", "found_inf"):
                optimizer.__dict__.pop(name, None)
        for name in ("_g_scaler", "_d_scaler") if self.precision == "fp16" else ():
            fresh = torch.amp.GradScaler(self.device.type)
            fresh.load_state_dict(getattr(self, name).state_dict())
            setattr(self, name, fresh)

    def _runs_as(self) -> str:
        return f"eager ({self._eager_because})" if self._capture is None else self._capture.explain()

    def state_dict(self) -> dict[str, Any]:
        """Everything beyond the modules and optimisers that a resumed run needs."""
        return {
            "d_updates": self.d_updates,
            "ema": None if self._average is None else self._average.module.state_dict(),
            "g_scaler": self._g_scaler.state_dict(),
            "d_scaler": self._d_scaler.state_dict(),
            "augment": self.augment.state_dict() if hasattr(self.augment, "state_dict") else None,
            "history": self.history.state_dict() if hasattr(self.history, "state_dict") else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.d_updates = state["d_updates"]
        if self._average is not None and state["ema"] is not None:
            self._average.module.load_state_dict(state["ema"])
        if state.get("augment") and hasattr(self.augment, "load_state_dict"):
            self.augment.load_state_dict(state["augment"])
        if state.get("history") and hasattr(self.history, "load_state_dict"):
            self.history.load_state_dict(state["history"], self.device)
        if self.precision == "fp16":
            self._g_scaler.load_state_dict(state["g_scaler"])
            self._d_scaler.load_state_dict(state["d_scaler"])

    def _augmented(self, images: Tensor) -> Tensor:
        return images if self.augment is None else self.augment(images)

    def _autocast(self) -> contextlib.AbstractContextManager:
        dtype = PRECISIONS[self.precision]
        return contextlib.nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def _of_update(self, value: Any, i: int) -> Any:
        """What D's i-th update of the step is given: a batch of its own from a sequence, or the one batch for all."""
        if not isinstance(value, list | tuple):
            return value
        if len(value) != self.d_steps:
            raise ValueError(f"GANStep: a sequence must have d_steps={self.d_steps} batches, got {len(value)}")
        return value[i]


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"GANStep: {name} must be one of {', '.join(known)}, got {value!r}")


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"GANStep: {name} must be >= 1, got {value}")


def _check_updates(
    weight_clip: float | None,
    accumulate: int,
    top_k: float,
    loss: str,
    penalty: str | None,
    optimizers: Sequence[Any],
) -> None:
    """ValueError for updates that cannot be meant."""
    if not 0 < top_k <= 1 or (top_k < 1 and loss in RELATIVE):
        raise ValueError(f"GANStep: top_k must be in (0, 1], and 1 with {', '.join(RELATIVE)}, got {top_k}")
    if accumulate > 1 and (loss == "relativistic-average" or penalty == "dragan"):
        over_batch = loss if loss == "relativistic-average" else penalty
        raise ValueError(f"GANStep: accumulate must be 1 with {over_batch}, a mean over the batch, got {accumulate}")
    if weight_clip is not None and not weight_clip > 0:
        raise ValueError(f"GANStep: weight_clip must be positive, got {weight_clip}")
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError("GANStep: the optimisers must step without a closure, got LBFGS; take Adam or SGD")


def _check_penalty(penalty: str | None, sigma: float) -> None:
    if penalty is not None:
        _one_of("penalty", penalty, penalties.KINDS)
    if not 0 < sigma < float("inf"):
        raise ValueError(f"GANStep: penalty_sigma must be finite and above 0, got {sigma}")


def _check_turns(low_memory: bool | None, loss: str, extra_d_loss: ExtraLoss | None) -> None:
    """ValueError where D's loss needs both halves at once."""
    if low_memory and (loss in RELATIVE or extra_d_loss is not None):
        both = f"loss {loss!r}" if loss in RELATIVE else "extra_d_loss"
        raise ValueError(
            f"GANStep: low_memory needs a loss whose real and fake logits stand apart, got {both}; drop one"
        )


def _synchronised(sync: Sync, *networks: nn.Module) -> Sequence[nn.Module]:
    """The networks, with statistics over the processes of `sync`."""
    return networks if sync is False else [synchronise(network, sync) for network in networks]


def _call(module: nn.Module, x: Any, labels: Tensor | None) -> Any:
    """The network on its input, a tensor or a tuple of several, and on labels where there are any."""
    inputs = x if isinstance(x, tuple) else (x,)
    return module(*inputs) if labels is None else module(*inputs, labels)


def _twice(labels: Tensor | None) -> Tensor | None:
    return None if labels is None else torch.cat([labels, labels])


def _logits(output: Any) -> Tensor | list[Tensor]:
    """A discriminator's logits in float32 or better: one tensor, or one a scale."""
    found = [t if t.dtype == torch.float64 else t.float() for t in logits_of(output)]
    return found[0] if len(found) == 1 else found


def _most_real(logits: Tensor | list[Tensor], share: float) -> Tensor | list[Tensor]:
    """The logits of the images that D takes for the realest; with several scales, by the sum of each scale's mean."""
    scales = logits if isinstance(logits, list) else [logits]
    score = torch.stack([scale.detach().reshape(len(scale), -1).mean(1) for scale in scales]).sum(0)
    kept = score.topk(math.ceil(share * len(score)), sorted=False).indices
    found = [scale[kept] for scale in scales]
    return found if isinstance(logits, list) else found[0]


@contextlib.contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Within: the module's parameters want no gradients, so its backward computes none for its weights."""
    learning = [p for p in module.parameters() if p.requires_grad]
    for p in learning:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in learning:
            p.requires_grad_(True)
