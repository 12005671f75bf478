"""A run on several processes of torch.distributed: who this one is, and what they do together.

Each rank holds whole networks and trains on its part of every batch. Gradients are averaged once an update, when they
are complete: after every pass and penalty, before clipping and the optimiser. Equal parameters at the start and equal
gradients at each update keep the ranks equal, so nothing else is sent.

DistributedDataParallel would average in hooks of the backward instead. It counts on one forward for each backward; a
discriminator has up to three (real, fake, penalty), and its part in the generator's update must not be averaged at all.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastgan._ranks import LostRankError, together

from .augment import ADAPTIVE

__all__ = ["Exchange", "LostRankError", "World", "join", "leave"]

# Why a run ends. Where ranks differ, they all take the reason that comes later in this list.
REASONS = ("", "steps", "time", "target", "patience", "plateau", "collapse", "interrupted")
# Between two ranks' seeds: 2^32 over the golden ratio. PyTorch's CPU generator keeps the low 32 bits of a seed alone.
SEED_STRIDE = 0x9E3779B9


@dataclass(frozen=True)
class World:
    """The processes of a run. Every method but `first` and `seed` must be called by all of them, in the same order.

    rank: 0 <= rank < size; rank 0 writes the run directory. local: the number of this process on its machine. control:
    the gloo group for values on the CPU, None where the default group takes them.
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    control: Any = field(default=None, compare=False)

    @property
    def first(self) -> bool:
        """Whether this rank is the one that logs, draws and saves."""
        return self.rank == 0

    def place(self, device: torch.device) -> torch.device:
        """This rank's device of the kind: on GPUs the one with the process's number on its machine."""
        return torch.device("cuda", self.local) if self.size > 1 and device.type == "cuda" else device

    def seed(self, seed: int) -> None:
        """Seed torch's global generators, differently on every rank."""
        torch.manual_seed((seed + self.rank * SEED_STRIDE) % 2**32 if self.rank else seed)

    def check_batch(self, batch: int) -> None:
        """Raise ValueError unless a batch has a part for every rank."""
        if batch % self.size:
            raise ValueError(
                f"training: batch_size, the images of all ranks together, must be a multiple of the {self.size} ranks, "
                f"got {batch}; take {self.size * max(1, round(batch / self.size))} or another number of ranks"
            )

    def command(self, out: object) -> str:
        """What goes on with the run in `out`."""
        return f"{'torchrun ... -m ' if self.size > 1 else ''}fastgan train --resume {out}"

    def check_augment(self, policy: str | None) -> None:
        """Raise ValueError for an augmentation that ranks would not share."""
        if policy == ADAPTIVE and self.size > 1:
            raise ValueError(
                f"training: augment must not be {ADAPTIVE} on {self.size} ranks, which would each follow their own "
                "images; take colour,translation,cutout"
            )

    def agree(self, reason: str) -> str:
        """The same one of `REASONS` on every rank: the gravest."""
        if self.size == 1:
            return reason
        number = torch.tensor(REASONS.index(reason))
        with together(self.size):
            dist.all_reduce(number, dist.ReduceOp.MAX, group=self.control)
        return REASONS[int(number)]

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """The mean over the ranks of each value; all ranks have the same names."""
        if self.size == 1:
            return dict(values)
        total = torch.tensor(list(values.values()), dtype=torch.float64)
        with together(self.size):
            dist.all_reduce(total, group=self.control)
        return dict(zip(values, (total / self.size).tolist(), strict=True))

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank: plain values and CPU tensors."""
        found = [value] * self.size
        if self.size > 1:
            with together(self.size):
                dist.all_gather_object(found, value, group=self.control)
        return found

    def require_same(self, values: Mapping[str, Any]) -> None:
        """Raise ValueError, which names the first of `values` that differs from rank 0's on some rank."""
        found = self.gather(dict(values))
        for rank, other in enumerate(found):
            for name, value in found[0].items():
                if other[name] != value:
                    raise ValueError(
                        f"distributed: {name} must be the same on every rank, rank 0 has {str(value)[:80]} and rank "
                        f"{rank} {str(other[name])[:80]}; start all ranks with one command, on files that they all see"
                    )

    def copy_first(self, *modules: nn.Module | None) -> None:
        """Give every rank the parameters and buffers of rank 0."""
        groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
        for module in filter(None, modules if self.size > 1 else ()):
            for t in (*module.parameters(), *module.buffers()):
                groups[t.dtype, t.device].append(t.detach())
        for group in groups.values():
            flat = torch.cat([t.reshape(-1) for t in group])
            with together(self.size):
                dist.broadcast(flat, 0)
            for t, numbers in zip(group, flat.split([t.numel() for t in group]), strict=True):
                t.copy_(numbers.view(t.shape))


def join() -> World:
    """The world that torchrun's environment (RANK, WORLD_SIZE, LOCAL_RANK) names, or a process of its own.

    Its process group is made unless the caller made one: NCCL for what lies on a GPU, gloo for what lies on a CPU.

    Raises:
        ValueError: the environment names several ranks and not which one this is, or not where rank 0 is.
    """
    size = dist.get_world_size() if dist.is_initialized() else _number("WORLD_SIZE", 1)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _end_with_the_launcher()
    if size <= 1:
        return World()
    control = None
    if not dist.is_initialized():
        _number("RANK", None)
        store, rank, size = next(dist.rendezvous("env://"))
        # torchrun's store outlives a restart of the ranks: without a prefix they would connect to ranks that are gone
        store = dist.PrefixStore(f"fastgan-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        kinds = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(kinds, store=store, rank=rank, world_size=size)
    elif dist.get_backend() != "gloo":
        control = dist.new_group(backend="gloo")
    rank = dist.get_rank()
    return World(rank, size, _number("LOCAL_RANK", rank), control)


def _end_with_the_launcher() -> None:
    """SIGTERM for this rank when torchrun's process is gone, `kill -9` included: ranks went on without it. Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG


def leave() -> None:
    """Close the process group, if there is one: NCCL complains at exit about one that is left open."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _number(name: str, default: int | None) -> int:
    text = os.environ.get(name, default)
    try:
        return int(text)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise ValueError(f"distributed: {name} must be a number, as torchrun sets it, got {text!r}") from error


class Exchange:
    """Averages gradients over the ranks: one flat bucket, and so one all_reduce, an update, dtype and device.

    A parameter without a gradient on any rank at a network's first update stays without one. A parameter that has one
    on some ranks counts as zeros on the others.
    """

    def __init__(self, world: World):
        self._world = world
        self._plans: dict[tuple[int, ...], tuple[list[_Bucket], list[Tensor]]] = {}

    def exchange(self, parameters: Sequence[Tensor]) -> None:
        """Replace each gradient by its mean over the ranks; nothing is read back to the host.

        parameters: those of one update, the same on every rank. The gradients must be complete.

        Raises:
            ValueError: the ranks' parameters differ, or a parameter has a gradient that none had at the first update.
            LostRankError: another rank is gone.
        """
        key = tuple(map(id, parameters))
        if key not in self._plans:
            self._plans[key] = self._plan(parameters)
        buckets, without = self._plans[key]
        late = [tuple(p.shape) for p in without if p.grad is not None]
        if late:
            raise ValueError(
                f"distributed: parameters must have gradients from the first update on, got a first one later for the "
                f"parameters of shapes {late}; let every loss take part from the start"
            )
        for bucket in buckets:
            bucket.fill()
            with together(self._world.size):
                dist.all_reduce(bucket.flat)
            bucket.empty(1 / self._world.size)

    def _plan(self, parameters: Sequence[Tensor]) -> tuple[list[_Bucket], list[Tensor]]:
        """The buckets, and the parameters that no rank has a gradient of."""
        layouts = [(tuple(p.shape), _strides(p), str(p.dtype)) for p in parameters]
        self._world.require_same({"parameters": layouts})
        anywhere = [any(has) for has in zip(*self._world.gather([p.grad is not None for p in parameters]), strict=True)]
        groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
        without: list[Tensor] = []
        for p, has in zip(parameters, anywhere, strict=True):
            (groups[p.dtype, p.device] if has else without).append(p)
        return [_Bucket(group) for group in groups.values()], without


class _Bucket:
    """The gradients of parameters of one dtype and device, in one piece of memory.

    Each has its own strides there, so that filling and emptying are one copy without a change of layout.
    """

    def __init__(self, parameters: list[Tensor]):
        self.parameters = parameters
        sizes = [p.numel() for p in parameters]
        self.flat = torch.empty(sum(sizes), dtype=parameters[0].dtype, device=parameters[0].device)
        parts = zip(parameters, self.flat.split(sizes), strict=True)
        self._places = [part.as_strided(p.shape, _strides(p)) for p, part in parts]

    @torch.no_grad()
    def fill(self) -> None:
        """Take the parameters' gradients; one that has none gets zeros."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        torch._foreach_copy_(self._places, grads)
        for p, grad in zip(self.parameters, grads, strict=True):
            p.grad = grad

    @torch.no_grad()
    def empty(self, factor: float) -> None:
        """Give `factor` times the numbers back to the gradients."""
        self.flat.mul_(factor)
        torch._foreach_copy_([p.grad for p in self.parameters if p.grad is not None], self._places)


def _strides(p: Tensor) -> tuple[int, ...]:
    """Of a dense tensor laid out as `p`."""
    return torch.empty_like(p, device="meta").stride()
