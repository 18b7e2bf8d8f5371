"""torch code that asks for float32 in places, run in float64 throughout."""

import torch
from torch.overrides import TorchFunctionMode


class Float64(TorchFunctionMode):
    """While it is on, every float32 that a torch function is asked for is a float64.

    transformers computes norms, rotary angles and softmax in float32 whatever the model's dtype:
    without this its float64 logits would have float32's errors.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        args = tuple(_wider(a) for a in args)
        return function(*args, **{k: _wider(v) for k, v in (kwargs or {}).items()})


def _wider(value):
    return torch.float64 if isinstance(value, torch.dtype) and value == torch.float32 else value
