"""TrainOpenClip: an image-text model of open_clip on its way to be an encoder: both towers, parts of them, or the heads on locked towers."""

import json
import threading
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import ConfigError
from pipeline.encoders.folder import FolderSpec, save_folder
from pipeline.encoders.openclip_model import load_open_clip, padding_of
from pipeline.encoders.openclip_weights import CONFIG, TEXT, resolve
from pipeline.encoders.pixels import Pixels
from pipeline.encoders.precision import DTYPES, Dtype, check_dtype
from pipeline.encoders.resize import Resize
from pipeline.training.batches import Told
from pipeline.training.towers import Row, TwoTower, check_towers
from pipeline.vlm.card import Card
from pipeline.vlm.message import words

WEIGHTS = "open_clip_model.safetensors"
"""The first name that open_clip looks for."""


class TrainOpenClip:
    """Any model that `pipeline.encoders.openclip:OpenClip` takes, named the same way by `model` and `pretrained`.

    `locked`: towers (image, text) that are not trained, and how many of their last groups of layers are all the same, as open_clip counts them;
    {image: 0} is LiT (arXiv 2111.07991). A head after a tower of timm's or of Hugging Face's is trained all the same. None: all is trained.
    What locked towers give is computed once for each image and text and remembered, up to `remember_mib` for each tower in each worker.
    Weights are in `dtype`; with bfloat16 small steps are lost, better use `optimisation.autocast`. `gradient_checkpointing`: less memory, a third
    more work. Images are prepared as for embedding, so there is no augmentation; batch norms keep their statistics.
    """

    def __init__(
        self,
        model: str,
        pretrained: str | None = None,
        *,
        locked: Mapping[str, int] | None = None,
        dtype: Dtype = "float32",
        gradient_checkpointing: bool = False,
        remember_mib: int = 512,
        cache_dir: str | None = None,
    ) -> None:
        check_dtype(dtype)
        check_towers(locked or {})
        if remember_mib < 0:
            raise ConfigError(f"remember_mib={remember_mib} must be at least 0, which remembers nothing")
        self._found = resolve(model, pretrained, cache_dir)
        self._resize = Resize.of(self._found.preprocess)
        self._pixels = Pixels(tuple(self._found.preprocess["mean"]), tuple(self._found.preprocess["std"]))
        self._locked, self._dtype, self._checkpointing = dict(locked or {}), dtype, gradient_checkpointing
        self._remember_mib, self._cache_dir = remember_mib, cache_dir
        self._towers: TwoTower | None = None
        self._tokenizer: Any = None
        self._lock = threading.Lock()

    @property
    def base_commit(self) -> str | None:
        """Of the hub's repository that is begun with; None for a folder."""
        return self._found.repo[1] if self._found.repo else None

    def load(self, device: torch.device) -> None:
        """Load the weights, and freeze what is not trained. Raises ConfigError if nothing would be trained, or a tower has no such groups."""
        model, self._tokenizer = load_open_clip(self._found, self._cache_dir)
        if self._checkpointing:
            model.set_grad_checkpointing()
            if padding_of(model) is not None:
                model.text.transformer.gradient_checkpointing_enable({"use_reentrant": False})
        self._towers = TwoTower(model.to(device, DTYPES[self._dtype]), self._pixels, locked=self._locked, remember_mib=self._remember_mib)

    @property
    def modules(self) -> Sequence[nn.Module]:
        """The model."""
        return [self._loaded()]

    def check(self, told: Told) -> None:
        """Raises ConfigError for what a two-tower model cannot take."""
        # Of an image alone some formats write the marker.
        text, images = words(told.message.text), told.message.images
        if told.instruction:
            raise ConfigError(f"{told.uri}: a model of two towers takes no instruction, and this row has one; leave it out of the data set")
        if len(images) > 1 or (images and text):
            given = f"{'an image' if len(images) == 1 else 'images'}{' and a text' if text else ''}"
            raise ConfigError(
                f"{told.uri}: a model of two towers takes an image or a text, and this row has {given} in one; "
                "train a vision-language model on it (pipeline.training.vlm:TrainVlm)"
            )

    def prepare(self, told: Told, *, query: bool) -> Row:
        """An image at the model's size, or the tokens of a text. Raises ConfigError for what a two-tower model cannot take."""
        self.check(told)
        text, images = told.message.text, told.message.images
        if images:
            pixels = self._resize(images[0])
            return Row(blake2b(pixels.tobytes(), digest_size=16).digest(), pixels=pixels)
        with self._lock:  # a tokenizer keeps its settings in itself while it runs
            tokens = self._tokenizer([text])[0]
        return Row(tokens.numpy().tobytes(), tokens=tokens)

    def embed(self, rows: Sequence[Row]) -> Tensor:
        """Vectors (n, D), with gradient."""
        vectors: Tensor = self._loaded()(rows)
        return vectors

    def save(self, folder: Path, card: Card) -> str:
        """An encoder for `pipeline.encoders.saved:open_encoder`, which open_clip itself loads as local-dir:FOLDER."""
        spec = FolderSpec(encoder="openclip", args={"dtype": self._dtype})
        return save_folder(folder, lambda part: self._write(part, folder.absolute()), spec=spec, card=card).fingerprint

    def _write(self, part: Path, folder: Path) -> None:
        """`folder`: where `part` will be in the end; open_clip wants the place of a Hugging Face tower's configuration to be absolute."""
        from safetensors.torch import save_file

        model: Any = self._loaded().model
        state = {name: values.detach().cpu().clone(memory_format=torch.contiguous_format) for name, values in model.state_dict().items()}
        save_file(state, part / WEIGHTS, metadata={"format": "pt"})
        if hasattr(self._tokenizer, "save_pretrained"):
            self._tokenizer.save_pretrained(part)
        config = json.loads(json.dumps(self._found.config))
        if padding_of(model) is not None:
            model.text.config.save_pretrained(part / TEXT)
            config["text_cfg"]["hf_model_name"] = str(folder / TEXT)
        if config["text_cfg"].get("hf_tokenizer_name"):
            config["text_cfg"]["hf_tokenizer_name"] = str(folder)
        preprocess = {name: value for name, value in self._found.preprocess.items() if name not in ("size", "mode")}
        (part / CONFIG).write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=2), encoding="utf-8")

    def _loaded(self) -> TwoTower:
        assert self._towers is not None, "load first"
        return self._towers
