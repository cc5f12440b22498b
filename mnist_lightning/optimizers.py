"""Adam, SGD and RMSprop with the defaults and the update rules of Keras 3.

``weight_decay`` is coupled in all three: ``weight_decay * parameter`` is added to the gradient, so that 2λ is the same
as a penalty λ‖W‖² in the loss.
"""

from collections.abc import Callable

import torch
from torch.optim.optimizer import Optimizer, ParamsT


class KerasAdam(torch.optim.Adam):
    """``torch.optim.Adam`` with Keras's epsilon and the fused kernel.

    Keras adds epsilon before the bias correction of the second moment, torch after it; the difference is a factor on
    epsilon alone, at most sqrt(1 / (1 - betas[1])), about 32, in the first step.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate.
        betas: Decay rates of the first and second moment.
        eps: Added to the root of the second moment.
        weight_decay: Factor of the parameter in its gradient.
        fused: Update all parameters in one kernel.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-7,
        weight_decay: float = 0.0,
        fused: bool = True,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, fused=fused)
        self._step_supports_amp_scaling = False  # or Lightning refuses to clip gradients in mixed precision


class KerasSGD(torch.optim.SGD):
    """``torch.optim.SGD`` with Keras's learning rate and the fused kernel.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate.
        momentum: Momentum factor.
        nesterov: Use Nesterov's momentum.
        weight_decay: Factor of the parameter in its gradient.
        fused: Update all parameters in one kernel.
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
        self._step_supports_amp_scaling = False  # or Lightning refuses to clip gradients in mixed precision


class KerasRMSprop(Optimizer):
    """RMSprop with epsilon inside the root, as in ``keras.optimizers.RMSprop``.

    The update is ``v = alpha v + (1 - alpha) g²; p -= lr g / sqrt(v + eps)``. ``torch.optim.RMSprop`` divides by
    ``sqrt(v) + eps`` instead, which takes far larger steps where v is small, as for most weights of an MNIST network.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate.
        alpha: Decay rate of the mean square of the gradient (Keras's ``rho``).
        eps: Added to the mean square.
        weight_decay: Factor of the parameter in its gradient.

    Raises:
        ValueError: A value is negative.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        alpha: float = 0.9,
        eps: float = 1e-7,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay}
        for name, value in defaults.items():
            if value < 0:
                raise ValueError(f"{name} {value} is negative")
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Do one optimization step.

        Args:
            closure: Computes the loss and its gradients anew.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
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
        return loss
