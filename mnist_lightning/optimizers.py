"""Adam, SGD and RMSprop with the defaults and update rules of Keras 3.

``weight_decay`` is coupled in all three: ``weight_decay * parameter`` is added to the gradient, so 2λ is the same as a
penalty λ‖W‖² in the loss.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import Optimizer, ParamsT


class _KerasOptimizer(Optimizer):
    """Base of the optimizers with their own update rule: each implements ``_update`` for a parameter group."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Do one optimization step.

        Args:
            closure: Recomputes the loss and its gradients.

        Returns:
            The loss that the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._update(group)
        return loss

    def _update(self, group: dict[str, Any]) -> None:
        raise NotImplementedError


class KerasAdam(_KerasOptimizer):
    """Adam as in ``keras.optimizers.Adam``, in one fused kernel.

    The update is ``m = β₁ m + (1 - β₁) g; v = β₂ v + (1 - β₂) g²; p -= lr √(1 - β₂ᵗ) / (1 - β₁ᵗ) · m / (√v + eps)``:
    epsilon is added before the bias correction of v, in ``torch.optim.Adam`` after it. A step also takes a third of
    the time of torch's, which spends more time on Python than on a network of this size.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate.
        betas: Decay rates of the first and second moment.
        eps: Added to the root of the second moment.
        weight_decay: Factor of the parameter in its gradient.

    Raises:
        ValueError: If a value is out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-7,
        weight_decay: float = 0.0,
    ) -> None:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas {betas}: each must be at least 0 and less than 1")
        _check_not_negative(lr=lr, eps=eps, weight_decay=weight_decay)
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0})

    def _update(self, group: dict[str, Any]) -> None:
        params = [param for param in group["params"] if param.grad is not None]
        if not params:
            return
        for param in params:
            if not self.state[param]:
                self.state[param] = {name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}
        states = [self.state[param] for param in params]
        group["step"] += 1
        beta1, beta2 = group["betas"]
        # at a late step, the kernel's own bias corrections are 1
        late_step = torch.full((), 1e9, dtype=torch.float32, device=params[0].device)
        torch._fused_adam_(
            params,
            [param.grad for param in params],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [late_step] * len(params),
            lr=group["lr"] * math.sqrt(1 - beta2 ** group["step"]) / (1 - beta1 ** group["step"]),
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )


class KerasSGD(torch.optim.SGD):
    """``torch.optim.SGD`` with Keras's learning rate and the fused kernel.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate.
        momentum: Momentum factor.
        nesterov: Whether to use Nesterov's momentum.
        weight_decay: Factor of the parameter in its gradient.
        fused: Whether to update all parameters in one kernel.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        fused: bool = True,
    ) -> None:
        super().__init__(params, lr, momentum, weight_decay=weight_decay, nesterov=nesterov, fused=fused)
        self._step_supports_amp_scaling = False  # else Lightning refuses to clip gradients in mixed precision


class KerasRMSprop(_KerasOptimizer):
    """RMSprop with epsilon inside the root, as in ``keras.optimizers.RMSprop``.

    The update is ``v = alpha v + (1 - alpha) g²; p -= lr g / sqrt(v + eps)``. ``torch.optim.RMSprop`` divides by
    ``sqrt(v) + eps`` instead and takes far larger steps where v is small. In the notebook's training, this alone makes
    no measurable difference (``docs/porting.md``).

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate.
        alpha: Decay rate of the mean square of the gradient (Keras's ``rho``).
        eps: Added to the mean square.
        weight_decay: Factor of the parameter in its gradient.

    Raises:
        ValueError: If a value is negative.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        alpha: float = 0.9,
        eps: float = 1e-7,
        weight_decay: float = 0.0,
    ) -> None:
        _check_not_negative(lr=lr, alpha=alpha, eps=eps, weight_decay=weight_decay)
        super().__init__(params, {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay})

    def _update(self, group: dict[str, Any]) -> None:
        lr, alpha, eps, weight_decay = (group[key] for key in ("lr", "alpha", "eps", "weight_decay"))
        for param in group["params"]:
            if param.grad is None:
                continue
            grad = param.grad.add(param, alpha=weight_decay) if weight_decay else param.grad
            state = self.state[param]
            if not state:
                state["square_avg"] = torch.zeros_like(param)
            square_avg = state["square_avg"].mul_(alpha).addcmul_(grad, grad, value=1 - alpha)
            param.addcdiv_(grad, (square_avg + eps).sqrt_(), value=-lr)


def _check_not_negative(**values: float) -> None:
    for name, value in values.items():
        if value < 0:
            raise ValueError(f"{name} {value} is negative")
