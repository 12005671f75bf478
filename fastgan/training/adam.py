"""torch.optim.Adam with a step that moves the parameters' moving average in the same pass."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgan.ops.adam import Numbers, op


class Adam(torch.optim.Adam):
    """`torch.optim.Adam(params, ..., fused=True)`: the same numbers to rounding, groups, schedules and state_dict.

    A step is one pass over each parameter, its gradient and its state (on a GPU one launch for 32 of them), by the
    fastest of our kernels and PyTorch's fused Adam, as the race over the ops has it.

    Args:
        params, lr, betas, eps, weight_decay, maximize, decoupled_weight_decay: as torch's; lr may be a 0-dim tensor.

    Raises:
        ValueError: as torch's, and at a step with amsgrad in a group.
        RuntimeError: parameters on devices that fused optimisers do not run on, sparse gradients.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
    ):
        flags = {"maximize": maximize, "decoupled_weight_decay": decoupled_weight_decay, "fused": True}
        known = inspect.signature(torch.optim.Adam).parameters
        super().__init__(
            params, lr, betas, eps, weight_decay, **{name: v for name, v in flags.items() if name in known}
        )
        # torch 2.6 does not know it
        for group in (self.defaults, *self.param_groups):
            group.setdefault("decoupled_weight_decay", decoupled_weight_decay)

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        averages: dict[Tensor, Tensor] | None = None,
        weight: float = 0.0,
    ) -> Any:
        """One update.

        Args:
            closure: as torch's.
            averages: {parameter: the tensor that follows it}; average <- average + weight (parameter - average) for
                every parameter that is updated, which is then removed from the dict.
            weight: 1 - decay of the averages.

        Returns:
            What the closure returned, or None.
        """
        with torch.enable_grad():
            loss = None if closure is None else closure()
        followers = {} if averages is None else averages
        for group in self.param_groups:
            if group["amsgrad"]:
                raise ValueError("Adam: amsgrad must be off, got a group with it; use torch.optim.Adam for it")
            for parameters in self._by_device(group):
                self._update(group, parameters, followers, weight)
        return loss

    def _by_device(self, group: dict[str, Any]) -> list[list[Tensor]]:
        """The group's parameters that have gradients, with their state made where it is not there yet."""
        found: dict[torch.device, list[Tensor]] = defaultdict(list)
        for p in group["params"]:
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                raise RuntimeError("Adam: gradients must be dense, got a sparse one; use torch.optim.SparseAdam")
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                for name in ("exp_avg", "exp_avg_sq"):
                    self.state[p][name] = torch.zeros_like(p, memory_format=torch.preserve_format)
            found[p.device].append(p)
        return list(found.values())

    def _update(
        self, group: dict[str, Any], parameters: list[Tensor], averages: dict[Tensor, Tensor], weight: float
    ) -> None:
        states = [self.state[p] for p in parameters]
        followed = all(p in averages for p in parameters)
        beta1, beta2 = group["betas"]
        op.run(
            parameters,
            [p.grad for p in parameters],
            *([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step")),
            [averages.pop(p) for p in parameters] if followed else [],
            Numbers(
                lr=_rate(group["lr"], parameters[0].device),
                beta1=beta1,
                beta2=beta2,
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                decoupled=group.get("decoupled_weight_decay", False),  # no key in the state of an older torch
                maximize=group["maximize"],
                weight=weight,
                grad_scale=getattr(self, "grad_scale", None),
                found_inf=getattr(self, "found_inf", None),
            ),
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, also of an optimiser that was not fused."""
        groups = [{**group, "fused": True, "foreach": None} for group in state_dict["param_groups"]]
        super().load_state_dict({**state_dict, "param_groups": groups})


def _rate(lr: float | Tensor, device: torch.device) -> float | Tensor:
    """The learning rate as a kernel takes it: a number, or a float32 scalar on the device."""
    return lr.to(torch.float32) if isinstance(lr, Tensor) and lr.device == device else float(lr)
