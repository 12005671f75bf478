"""fastgan.freeze: a network for generation alone, whose weights are folded and packed once."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastgan import program
from fastgan.convert import convert

DTYPES = (torch.float32, torch.bfloat16)


class Frozen(nn.Module):
    """What `freeze` returns. It has no parameters, buffers or modes: there is nothing to load or to train."""

    def __init__(self, network: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self._inside = (network,)  # not a child: nothing reaches its tensors by accident
        self._hold()
        self.train(False)

    def _hold(self) -> None:
        (network,) = self._inside
        program.hold_constant((*network.parameters(), *network.buffers()))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        wants = any(isinstance(a, Tensor) and a.requires_grad for a in tree_leaves((args, kwargs)))
        if wants and torch.is_grad_enabled():
            raise RuntimeError(
                "a frozen network has no gradients: its inputs must not require any, got one that does; "
                "call the network that was frozen, or this one under torch.no_grad()"
            )
        (network,) = self._inside
        with torch.no_grad(), torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            return network(*args, **kwargs)

    def train(self, mode: bool = True) -> Frozen:
        """Nothing: it stays in eval mode, as a part of a larger network, too."""
        self.training = False
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        raise RuntimeError("a frozen network stays as it is: move or cast the network itself, and freeze again")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._hold()

    def extra_repr(self) -> str:
        return f"{type(self._inside[0]).__name__}, {self.dtype}"


def freeze(network: nn.Module, *, dtype: torch.dtype = torch.float32) -> Frozen:
    """A copy of a network for generation on a CPU: what can be made of its weights is made once.

    Batch norms are folded into the convolutions before them (as by Jacob et al. 2018, arXiv:1712.05877, section 3.2),
    and the weights are packed for the kernels at the first call of each input shape. Both would else be done at each
    call, which is most of the time of one image. The folded and the packed weights are kept for eight input shapes.

    Args:
        network: any module whose parameters are float32 on the CPU, converted or not; it stays as it is.
        dtype: torch.float32, or torch.bfloat16 for autocast to it, whose results are bfloat16 then.

    Returns:
        A module that takes what `network` takes and gives what network.eval() gives, to rounding. What happens to
        `network` afterwards does not reach it: freeze again.

    Raises:
        ValueError: another dtype; parameters that are not float32 on the CPU.
        RuntimeError: of the result: an input that wants a gradient, to() and the like.
    """
    if dtype not in DTYPES:
        raise ValueError(f"freeze: dtype must be torch.float32 or torch.bfloat16, got {dtype}")
    for name, t in network.named_parameters():
        if t.dtype != torch.float32 or not t.is_cpu:
            raise ValueError(
                f"freeze: parameters must be float32 on the CPU, got {t.dtype} on {t.device} ({name}); "
                "move or cast the network first"
            )
    # the weights that torch's older norms by hooks have made: torch copies leaves alone
    made = [t for m in network.modules() for t in vars(m).values() if isinstance(t, Tensor) and not t.is_leaf]
    memo = {id(t): t.detach().clone() for t in made}
    return Frozen(convert(copy.deepcopy(network, memo).eval().requires_grad_(False)), dtype)
