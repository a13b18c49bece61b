"""The models and steps that `benchmarks.gradcache` measures."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from pipeline.training.chunks import Rows
from pipeline.training.gradcache import GradCache
from pipeline.training.infonce import InfoNCE

DIM, LONGEST, PIXELS = 128, 32, 64


class Encoder(nn.Module):
    """A random BERT (2 layers of 128) for rows of token ids and a random ViT of the same size for images of 64 pixels; mean of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        shape = {"hidden_size": DIM, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 4 * DIM}
        shape |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        self.text = BertModel(BertConfig(vocab_size=8_192, max_position_embeddings=LONGEST, **shape), add_pooling_layer=False)
        self.image = ViTModel(ViTConfig(image_size=PIXELS, patch_size=16, **shape), add_pooling_layer=False)

    def texts(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(n, DIM) of padded token ids."""
        hidden = self.text(input_ids=ids, attention_mask=mask).last_hidden_state
        return (hidden * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)

    def images(self, pixels: Tensor) -> Tensor:
        """(n, DIM) of uint8 images (n, 3, PIXELS, PIXELS)."""
        return self.image(pixel_values=pixels.float() / 127.5 - 1).last_hidden_state.mean(dim=1)

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """As a module of sentence-transformers: adds sentence_embedding."""
        if "pixel_values" in features:
            return features | {"sentence_embedding": self.images(features["pixel_values"])}
        return features | {"sentence_embedding": self.texts(features["input_ids"], features["attention_mask"])}

    def rows(self, rows: list[Tensor]) -> Tensor:
        """As GradCache's embed: rows of token ids, or images."""
        if rows[0].dtype == torch.uint8:
            return self.images(torch.stack(rows))
        return self.texts(**padded(rows))


def padded(rows: list[Tensor]) -> dict[str, Tensor]:
    """Token ids and their mask, as wide as the longest row."""
    ids = nn.utils.rnn.pad_sequence([row.long() for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return {"ids": ids, "mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}


def texts(num: int, seed: int) -> list[Tensor]:
    """Rows of 8 to 32 token ids."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(8, LONGEST + 1, (num,), generator=generator)
    return list(torch.randint(1, 8_192, (int(lengths.sum()),), generator=generator, dtype=torch.int32).split(lengths.tolist()))


def pairs(kind: str, num: int) -> tuple[list[Tensor], list[Tensor]]:
    """Queries and positives."""
    if kind == "text":
        return texts(num, 1), texts(num, 2)
    generator = torch.Generator().manual_seed(3)
    return list(torch.randint(0, 256, (num, 3, PIXELS, PIXELS), generator=generator, dtype=torch.uint8)), texts(num, 2)


def runner(kind: str, method: str, num_pairs: int, chunk: int) -> Callable[[int], float]:
    """A function of the number of pairs that runs one step of a method and gives the loss. The data stands ready, as a loader would give it."""
    encoder = Encoder()
    queries, positives = pairs(kind, num_pairs)
    if method == "theirs":
        return theirs(encoder, queries, positives, chunk)

    chunks = Rows(chunk) if method == "ours" else None
    # Images and texts are not of one batch, so each side has its own list of chunks; the weights may be shared or not.
    cache = GradCache(encoder.rows, InfoNCE(0.05), [encoder], chunks, embed_documents=encoder.rows)
    return lambda num: cache.step(queries[:num], positives[:num]).item()


def theirs(encoder: Encoder, queries: list[Tensor], positives: list[Tensor], chunk: int) -> Callable[[int], float]:
    """sentence-transformers takes the whole batch collated, and cuts that."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    model = SentenceTransformer(modules=[encoder], device="cpu")
    loss = CachedMultipleNegativesRankingLoss(model, scale=20.0, mini_batch_size=chunk)
    sides = [collated(queries), collated(positives)]

    def run(num: int) -> float:
        value = loss([{name: tensor[:num] for name, tensor in side.items()} for side in sides], torch.zeros(num))
        value.backward()
        return value.item()

    return run


def collated(rows: list[Tensor]) -> dict[str, Tensor]:
    """One batch of all rows, under the names that sentence-transformers knows."""
    if rows[0].dtype == torch.uint8:
        return {"pixel_values": torch.stack(rows)}
    batch = padded(rows)
    return {"input_ids": batch["ids"], "attention_mask": batch["mask"]}
