"""Batch normalisation over all processes on CPUs, where PyTorch has it for GPUs only."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dejavu_exp.errors import ConfigError


class SynchronizedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm whose statistics are those of the batches of all processes, which must be equally large."""

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002 - torch's name
        if input.dim() < 2:
            raise ValueError(f"needs at least two axes, got {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """(B, C, ...) to the same shape."""
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(input)
        axes = [axis for axis in range(input.dim()) if axis != 1]
        count = input.numel() / input.shape[1] * dist.get_world_size()
        mean = _sum_over_ranks(input.sum(axes)) / count
        shape = [1, -1] + [1] * (input.dim() - 2)
        centred = input - mean.view(shape)
        variance = _sum_over_ranks(centred.square().sum(axes)) / count
        with torch.no_grad():
            if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
                self.num_batches_tracked += 1
                rate = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean, rate)
                self.running_var.lerp_(variance * (count / (count - 1)), rate)
        normal = centred * (variance.view(shape) + self.eps).rsqrt()
        if self.weight is None:
            return normal
        return normal * self.weight.view(shape) + self.bias.view(shape)


class _SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over all ranks; so is the gradient, since every rank's loss depends on every rank's part."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:  # noqa: ANN401
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:  # noqa: ANN401
        total: Tensor = grads[0].clone()
        dist.all_reduce(total)
        return total


def _sum_over_ranks(values: Tensor) -> Tensor:
    total: Tensor = _SumOverRanks.apply(values)
    return total


def synchronize(module: nn.Module) -> nn.Module:
    """Replace every batch norm of a module, in place; parameters and running statistics stay the same.

    Raises:
        ConfigError: a batch norm is of a kind that does more, such as timm's with an activation.
    """
    for name, child in list(module.named_modules()):
        if not isinstance(child, nn.modules.batchnorm._BatchNorm) or isinstance(child, SynchronizedBatchNorm):
            continue
        if type(child) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            raise ConfigError(
                f"training.devices: {type(child).__name__} of this architecture cannot be shared between CPU "
                "processes. Set training.devices=1, use GPUs, or choose an architecture with plain batch norm."
            )
        has_weight, has_state = child.weight is not None, child.running_mean is not None
        shared: Any = SynchronizedBatchNorm(child.num_features, child.eps, child.momentum, has_weight, has_state)
        shared.load_state_dict(child.state_dict())
        shared.train(child.training)
        for own, old in zip(shared.parameters(), child.parameters(), strict=True):
            own.requires_grad_(old.requires_grad)
        module.set_submodule(name, shared)
    return module
