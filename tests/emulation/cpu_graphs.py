"""CUDA graphs on the CPU: what fastgan.training.capture asks of a device, by recording and re-running torch ops.

As on a GPU, a capture executes nothing (whatever it changed is put back), a replay runs the recorded ops with the
recorded constants on the recorded memory, in the recorded order, and no Python of the step runs.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors(part)


class Log(TorchDispatchMode):
    """Records every op with its arguments and results, and the former contents of the memory it finds."""

    def __init__(self):
        super().__init__()
        self.ops, self.before, self.made = [], {}, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(kind.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl for kind in types):
            return NotImplemented
        kwargs = kwargs or {}
        if str(func).startswith("profiler."):
            return func(*args, **kwargs)
        if str(func).startswith("aten._local_scalar_dense"):
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        for t in tensors((args, tuple(kwargs.values()))):
            storage = t.untyped_storage()
            if storage._cdata not in self.made and storage._cdata not in self.before:
                self.before[storage._cdata] = storage, storage.clone()
        out = func(*args, **kwargs)
        self.made.update(
            t.untyped_storage()._cdata for t in tensors(out) if t.untyped_storage()._cdata not in self.before
        )
        shapes = [(t.shape, t.stride(), t.storage_offset()) for t in tensors(out)]  # a later squeeze_ may change them
        self.ops.append((func, args, kwargs, out, shapes))  # holds every tensor: the graph's private pool
        return out

    def undo(self):
        for storage, former in self.before.values():
            storage.copy_(former)

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, out, shapes in self.ops:
            if torch.Tag.inplace_view in func.tags:
                continue
            again = func(*args, **kwargs)
            for new, kept, shape in zip(tensors(again), tensors(out), shapes, strict=True):
                if new.untyped_storage()._cdata != kept.untyped_storage()._cdata:
                    kept.as_strided(*shape).copy_(new)


class CPUGraphs:
    """`fastgan.training.capture.Graphs`; counts what it is asked."""

    def __init__(self):
        self.warm_ups = self.captures = self.replays = 0
        self.fail = None  # an exception that the next capture ends with

    def busy(self):
        return False

    def warm_up(self, run):
        self.warm_ups += 1
        return run()

    def capture(self, run, rng):
        self.captures += 1
        generators = [torch.default_generator, *([] if rng is None else [rng])]
        states = [g.get_state() for g in generators]
        log = Log()
        try:
            with log:
                outputs = run()
            if self.fail:
                raise self.fail
        finally:
            log.undo()
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)

        def replay():
            self.replays += 1
            log.replay()

        return replay, outputs
