"""On which device a model runs, and in which number format. Vectors are float32 at the end, always.

On a CPU with bfloat16 instructions ViT-B-32 runs at twice the rate of float32 (37 and 19 images a second on two cores,
cosine 0.9999), and float16, which such a CPU only emulates, at a fifth of it.
"""

import contextlib
from typing import Any, Literal

import numpy as np
import torch

from pipeline.config import ConfigError, nearest

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_dtype(dtype: str) -> None:
    """Raises ConfigError unless a model can run in `dtype`."""
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}{nearest(dtype, DTYPES)}; int8 is left out, it breaks vectors")


def device_of(device: str | None) -> torch.device:
    """The device that was asked for; else CUDA where there is one, else the CPU. Raises ConfigError if CUDA is asked for and no GPU is seen."""
    if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device={device!r}, and no GPU is seen here; give the workers one with compute.gpus=1, or leave `device` out")
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def place(model: torch.nn.Module, device: torch.device, dtype: str) -> torch.nn.Module:
    """`model` ready to run. On a CPU its weights are cast to `dtype`: autocast there is half as fast as float32."""
    model = model.eval().requires_grad_(False).to(device)
    return model.to(DTYPES[dtype]) if device.type == "cpu" else model


def autocast(device: torch.device, dtype: str) -> contextlib.AbstractContextManager[Any]:
    """On CUDA the weights stay float32 and the matrix products are done in `dtype`."""
    if device.type == "cpu" or dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, DTYPES[dtype])


def unit(vectors: torch.Tensor) -> np.ndarray:
    """Vectors scaled to norm 1 in float32, as numpy. A zero vector stays zero."""
    return torch.nn.functional.normalize(vectors.float(), dim=-1).cpu().numpy()
