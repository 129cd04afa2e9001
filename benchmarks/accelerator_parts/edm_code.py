"""EDM's published PyTorch code, imported from a checkout and run as it is; nothing of it is part of
this package.
"""

import importlib
import importlib.util
import sys
import types
from typing import Any


def load(folder: str) -> types.SimpleNamespace:
    """networks, loss, augment of a checkout of NVlabs/edm, and torch with fast settings.

    TF32 is allowed for matrix products and convolutions, as JAX has it by default, and cuDNN
    chooses its algorithms by trying them.
    """
    _stand_ins()
    sys.path.insert(0, folder)
    import torch

    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    parts = {
        name: importlib.import_module(f"training.{name}")
        for name in ("networks", "loss", "augment")
    }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return types.SimpleNamespace(torch=torch, device=device, **parts)


class _StandIn(types.ModuleType):
    """A module that is imported and decorates functions, but is never called: every attribute
    leaves them alone.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: lambda function: function


def _stand_ins() -> None:
    """What the code imports at its top, where it is missing: distutils left Python in 3.12, the
    rest is not needed.
    """
    for name in ("distutils", "requests", "tqdm", "click", "PIL"):
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            sys.modules[name] = _StandIn(name)
            for part in {"distutils": ("util",), "PIL": ("Image",)}.get(name, ()):
                sys.modules[f"{name}.{part}"] = _StandIn(f"{name}.{part}")


def variant(code: Any, net: Any, name: str) -> Any:
    """The network of a case's name: WAY-TYPE.

    WAY    eager, channels_last, compile (channels_last, then torch.compile).
    TYPE   float32 (TF32), autocast (bfloat16 by torch.autocast), bfloat16 (activations in bfloat16
    throughout, the way
           in which the code runs float16).
    """
    way, kind = name.rsplit("-", 1)
    torch = code.torch
    channels_last = "eager" not in way
    if channels_last:
        net = net.to(memory_format=torch.channels_last)

    class Inner(torch.nn.Module):
        def __init__(self, model: Any):
            super().__init__()
            self.model = model

        def forward(self, x: Any, *rest: Any, **more: Any) -> Any:
            x = x.to(torch.bfloat16 if kind == "bfloat16" else torch.float32)
            if channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            with torch.autocast(code.device.type, torch.bfloat16, enabled=kind == "autocast"):
                return self.model(x, *rest, **more).float()

    inner = Inner(net.model)
    net.model = torch.compile(inner) if "compile" in way else inner
    return net


def synchronise(code: Any) -> None:
    if code.device.type == "cuda":
        code.torch.cuda.synchronize()


def peak(code: Any) -> int:
    return code.torch.cuda.max_memory_allocated() if code.device.type == "cuda" else 0
