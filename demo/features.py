"""An encoder of one's own, as a job file names it by `target`: what EfficientNet-lite0 sees in an image before it names anything.

For tiles of slides these features serve better than ConSE, which speaks in ImageNet's nouns. An encoder trained on pathology is far better still.
"""

import functools
from pathlib import Path

import numpy as np
import pyarrow as pa
import timm
import torch

from pipeline.config import ConfigError
from pipeline.encoders.conse import NUM_CLASSES, in_order
from pipeline.encoders.inputs import inputs_of
from pipeline.encoders.lineage import fingerprint_of, sha256_of
from pipeline.encoders.once import Once
from pipeline.encoders.pixels import Pixels
from pipeline.encoders.precision import device_of, place, unit
from pipeline.encoders.resize import Resize

ARCHITECTURE = "tf_efficientnet_lite0"
BATCH = 16


class Features:
    """Means over the picture of the last layer before the classifier: 1,280 numbers. `classifier`: weights as `ConSE` takes them."""

    dim = 1280
    inputs = frozenset({"image"})

    def __init__(self, classifier: str, *, device: str | None = None) -> None:
        path = Path(classifier).absolute()
        if not path.is_file():
            raise ConfigError(f"there is no file {classifier}; for the demonstration's weights run python -m demo.assets")
        given = timm.get_pretrained_cfg(ARCHITECTURE)
        side = given.input_size[1]
        self._resize, self._pixels = Resize(side, side), Pixels(given.mean, given.std)
        self._device = device_of(device)
        self._network = Once(functools.partial(_load, path, self._device))
        self.lineage: dict[str, object] = {
            "encoder": "demo.features",
            "classifier": sha256_of(path),
            "side": side,
            "mean": given.mean,
            "std": given.std,
        }
        self.fingerprint = fingerprint_of(self.lineage)

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """The image at the network's size."""
        return self._resize(image)

    def encode(self, items: pa.Table) -> np.ndarray:
        """Vectors of the images: (N, dim) float32, norm 1."""
        images = [self.prepare(image) for image in inputs_of(items, "image").images]
        vectors = np.zeros((len(images), self.dim), np.float32)
        with torch.inference_mode():
            for start in range(0, len(images), BATCH):
                batch = self._pixels.batch(images[start : start + BATCH], self._device, torch.float32)
                vectors[start : start + BATCH] = unit(self._network()(batch))
        return vectors


def _load(path: Path, device: torch.device) -> torch.nn.Module:
    network = timm.create_model(ARCHITECTURE, pretrained=False, num_classes=NUM_CLASSES)
    network.load_state_dict(in_order(torch.load(path, map_location="cpu", weights_only=True), network.state_dict(), str(path)))
    network.reset_classifier(0)
    return place(network, device, "float32")
