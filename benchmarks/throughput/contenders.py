"""The same images to the same table of vectors in five ways, each a process of its own: `python -m benchmarks.throughput.contenders NAME ...`.

Each prints one JSON line: when its first vectors were there, when the table was written, how many vectors were there at
first. Modules are imported and the model is made before the clock starts, but for Ray's workers, who do it in their own time.
"""

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa

BATCH = 32


def write(uri: str, ids: list[str], vectors: np.ndarray) -> None:
    """The table, as the obvious code writes it."""
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.astype(np.float32).ravel()), vectors.shape[1])
    lance.write_dataset(pa.table({"id": ids, "vector": column}), uri)


def load(model: str, dtype: str) -> tuple[Any, Any]:
    """open_clip's model and transform."""
    import open_clip
    import torch

    made, transform = open_clip.create_model_from_pretrained(f"local-dir:{model}")
    return made.eval().to(getattr(torch, dtype)), transform


def floor(images: list[Path], model: str, dtype: str, out: str) -> dict[str, float]:
    """The tight process: two threads, each decoding (libjpeg-turbo), resizing (torch, uint8) and encoding 32 images at a time."""
    import simplejpeg
    import torch

    net, _ = load(model, dtype)
    mean, std = (torch.tensor(v)[:, None, None] for v in (net.visual.image_mean, net.visual.image_std))
    scale, shift = (1 / (255 * std)).to(net.visual.conv1.weight.dtype), (-mean / std).to(net.visual.conv1.weight.dtype)
    side = 224

    def pixels(path: Path) -> torch.Tensor:
        image = torch.from_numpy(simplejpeg.decode_jpeg(path.read_bytes()))[None].permute(0, 3, 1, 2)
        height, width = image.shape[2:]
        ratio = side / min(height, width)
        image = torch.nn.functional.interpolate(image, (round(height * ratio), round(width * ratio)), mode="bicubic", antialias=True)[0]
        top, left = (image.shape[1] - side) // 2, (image.shape[2] - side) // 2
        return image[:, top : top + side, left : left + side]

    def vectors(start: int) -> np.ndarray:
        with torch.inference_mode():
            batch = torch.stack([pixels(path) for path in images[start : start + BATCH]]).to(scale.dtype)
            return torch.nn.functional.normalize(net.encode_image(torch.addcmul(shift, batch, scale)).float(), dim=-1).numpy()

    torch.set_num_threads(1)
    vectors(0)
    started = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        found = np.concatenate(list(pool.map(vectors, range(0, len(images), BATCH))))
    write(out, [str(path) for path in images], found)
    return {"first_s": 0.0, "first_items": 0, "end_s": time.perf_counter() - started}


def dataloader(images: list[Path], model: str, dtype: str, out: str) -> dict[str, float]:
    """A PyTorch DataLoader with two workers and open_clip's transform, the model in the main process."""
    import torch
    from PIL import Image

    net, transform = load(model, dtype)

    class Files(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, index: int) -> Any:
            return transform(Image.open(images[index]).convert("RGB"))

    started = time.perf_counter()
    found, first = [], 0.0
    with torch.inference_mode():
        for batch in torch.utils.data.DataLoader(Files(), batch_size=64, num_workers=2):
            found.append(torch.nn.functional.normalize(net.encode_image(batch.to(getattr(torch, dtype))).float(), dim=-1).numpy())
            first = first or time.perf_counter()
    write(out, [str(path) for path in images], np.concatenate(found))
    return {"first_s": first - started, "first_items": 64, "end_s": time.perf_counter() - started}


def obvious(images: list[Path], model: str, dtype: str, out: str) -> dict[str, float]:
    """Ray Data as its documentation shows it: read_images, the model's transform in map_batches, the model in an actor, one write."""
    import ray
    import ray.data
    import torch
    from PIL import Image

    class Encode:
        def __init__(self) -> None:
            self.net, _ = load(model, dtype)

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            with torch.inference_mode():
                found = self.net.encode_image(torch.from_numpy(batch["pixels"]).to(getattr(torch, dtype)))
                return {"id": batch["path"], "vector": torch.nn.functional.normalize(found.float(), dim=-1).numpy()}

    transforms: list[Any] = []

    def preprocess(batch: dict[str, Any]) -> dict[str, Any]:
        if not transforms:
            transforms.append(load(model, "float32")[1])
        return {"path": batch["path"], "pixels": np.stack([transforms[0](Image.fromarray(image)).numpy() for image in batch["image"]])}

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False
    started = time.perf_counter()
    rows = ray.data.read_images(str(images[0].parent), include_paths=True, mode="RGB").map_batches(preprocess, batch_size=64)
    rows = rows.map_batches(Encode, batch_size=64, compute=ray.data.ActorPoolStrategy(size=1))
    ids: list[str] = []
    found, first, first_items = [], 0.0, 0
    for batch in rows.iter_batches(batch_size=None, batch_format="numpy"):
        ids += batch["id"].tolist()
        found.append(batch["vector"])
        first_items, first = first_items or len(ids), first or time.perf_counter()
    write(out, ids, np.concatenate(found))
    return {"first_s": first - started, "first_items": first_items, "end_s": time.perf_counter() - started}


def tessera(images: list[Path], model: str, dtype: str, out: str) -> dict[str, float]:
    """The embed job, its defaults."""
    from jobs import embed

    encoder = {"target": "pipeline.encoders.openclip:OpenClip", "args": {"model": f"local-dir:{model}", "dtype": dtype}}
    source = {"target": "pipeline.readers.images:Images", "args": {"uri": str(images[0].parent)}}
    table = {"uri": out, "name": "vectors", "thumbnail_px": None}
    started = time.perf_counter()
    report = embed.run(embed.EmbedJob.model_validate({"source": source, "encoder": encoder, "table": table}))
    assert report.written == len(images)
    ended = time.perf_counter() - started
    assert report.items_per_s and report.seconds_to_first_chunk
    return {"rate": report.items_per_s, "start_s": report.seconds_to_first_chunk, "end_s": ended}


CONTENDERS = {"floor": floor, "dataloader": dataloader, "obvious": obvious, "tessera": tessera}


def main() -> None:
    """One contender, one JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=CONTENDERS)
    for option in ("images", "model", "dtype", "out"):
        parser.add_argument(f"--{option}", required=True)
    given = parser.parse_args()
    images = sorted(Path(given.images).glob("*.jpg"))
    result = CONTENDERS[given.name](images, given.model, given.dtype, given.out)
    if "rate" not in result:
        result["rate"] = (len(images) - result["first_items"]) / (result["end_s"] - result["first_s"])
    print(json.dumps({name: round(value, 3) for name, value in result.items()}))


if __name__ == "__main__":
    main()
