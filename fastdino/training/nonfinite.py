"""Detection of NaN and infinite losses and gradients, without a host sync per step.

A flag on the device records the first failure. While it is set, no update changes the state, so a
check many steps later still finds the state as it was before the failed step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdino.errors import NonFiniteError


class FiniteGuard:
    """The first non-finite loss or gradient since the last check.

    Args:
        device: device of the loss and the gradients.
        steps_per_epoch: for the error message.
        immediate: check at every watch_loss and watch_norms, which waits for the device.

    Attributes:
        bad: fp32 [] on the device, 1 after a failure, else 0. While it is 1, an update must leave
            the state unchanged.
        iteration: all steps before it are known to be finite.
    """

    def __init__(self, device: torch.device, steps_per_epoch: int, *, immediate: bool):
        self.bad = torch.zeros((), device=device)
        self.iteration = 0
        self._steps_per_epoch = steps_per_epoch
        self._immediate = immediate
        self._good_steps = torch.zeros((), device=device)
        self._loss = torch.zeros((), device=device)  # of the first failure, or the last step

    def watch_loss(self, loss: Tensor) -> None:
        """Set the flag if the step's loss [] is not finite."""
        loss = loss.detach().to(self._loss.dtype)
        self._loss.copy_(torch.where(self.bad > 0, self._loss, loss))
        self._set_unless(loss.isfinite())

    def watch_norms(self, norms: Tensor) -> None:
        """Set the flag if one of the gradient norms [n] is not finite."""
        self._set_unless(norms.isfinite().all())

    def _set_unless(self, finite: Tensor) -> None:
        self.bad.copy_(torch.maximum(self.bad, (~finite).to(self.bad.dtype)))
        if self._immediate:
            self.check()

    def end_step(self) -> None:
        """Count the step unless the flag is set."""
        self._good_steps.add_(1 - self.bad)

    def check(self) -> None:
        """Wait for the device; raise NonFiniteError, and clear the flag, if it is set."""
        bad, good_steps, loss = torch.stack([self.bad, self._good_steps, self._loss]).tolist()
        self._good_steps.zero_()
        self.iteration += int(good_steps)
        if not bad:
            return
        self.bad.zero_()
        problem = "a gradient is not finite" if math.isfinite(loss) else f"the loss is {loss}"
        epoch = self.iteration // self._steps_per_epoch
        error = NonFiniteError(f"{problem} at iteration {self.iteration} (epoch {epoch + 1})")
        error.iteration = self.iteration
        raise error

    def restart(self, iteration: int) -> None:
        """Forget all earlier steps; the next one is `iteration`."""
        self.bad.zero_()
        self._good_steps.zero_()
        self.iteration = iteration
