"""Small models for the tests of GradCache, float64: rows of different lengths, images with their own grids, layers, two towers."""

import torch
from torch import nn


class Text(nn.Module):
    """Rows are lists of token ids. Blocks with dropout, padding masked out; a vector of each block if `layers`."""

    def __init__(self, dim=8, *, dropout=0.0, layers=False, blocks=2):
        super().__init__()
        self.tokens = nn.Embedding(50, dim)
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Linear(dim, 2 * dim), nn.Dropout(dropout), nn.GELU(), nn.Linear(2 * dim, dim)) for _ in range(blocks)]
        )
        self.norm = nn.LayerNorm(dim)
        self.layers = layers

    def forward(self, rows):
        ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        mask = torch.arange(ids.shape[1]) < torch.tensor([[len(row)] for row in rows])
        hidden, vectors = self.tokens(ids), []
        for block in self.blocks:
            hidden = hidden + block(hidden)
            vectors.append((self.norm(hidden) * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True))
        return tuple(vectors) if self.layers else vectors[-1]


class Visual(nn.Module):
    """Rows are (token ids, patches (h * w, 3) or None, grid (h, w)), as of Qwen-VL: all patches of a chunk are joined in one tensor.

    The vision tower runs only if a row of the chunk has an image.
    """

    def __init__(self, dim=8):
        super().__init__()
        self.text = Text(dim)
        self.vision = nn.Sequential(nn.Linear(3, dim), nn.GELU(), nn.Linear(dim, dim))

    def forward(self, rows):
        vectors = self.text([ids for ids, _, _ in rows])
        if any(patches is not None for _, patches, _ in rows):
            patches = self.vision(torch.cat([patches for _, patches, _ in rows if patches is not None]))
            counts = [0 if patches is None else grid[0] * grid[1] for _, patches, grid in rows]
            pooled = [part.mean(dim=0) if len(part) else part.sum(dim=0) for part in patches.split(counts)]
            vectors = vectors + torch.stack(pooled)
        return vectors


def texts(num, seed, longest=9):
    """Lists of 1 to `longest` token ids."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (num,), generator=generator).tolist()
    return [torch.randint(50, (length,), generator=generator).tolist() for length in lengths]


def images(num, seed):
    """Rows of text and image, half of them without an image, row 7 and 11 among them."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for place, ids in enumerate(texts(num, seed)):
        h, w = torch.randint(1, 5, (2,), generator=generator).tolist()
        patches = None if place % 4 in (0, 3) else torch.randn(h * w, 3, generator=generator, dtype=torch.float64)
        rows.append((ids, patches, (h, w)))
    return rows


def ragged(num, seed):
    """For each row 0 to 3 texts."""
    flat, counts = texts(3 * num, seed), torch.randint(0, 4, (num,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [flat[3 * row : 3 * row + count] for row, count in enumerate(counts)]


def made(module, seed=0):
    """The module in float64, with seeded weights."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def gradients(*modules):
    """Copies of all gradients, by name; whole ones where they are sharded."""
    found = {}
    for place, module in enumerate(modules):
        for name, parameter in module.named_parameters():
            grad = parameter.grad
            if grad is not None and hasattr(grad, "full_tensor"):
                grad = grad.full_tensor()
            found[f"{place}.{name.removeprefix('module.')}"] = None if grad is None else grad.detach().clone()
    return found


def worst(left, right):
    """The largest difference of two `gradients`, which must have the same names, and be None together."""
    assert left.keys() == right.keys()
    assert all((left[name] is None) == (right[name] is None) for name in left)
    return max(float((left[name] - right[name]).abs().max()) for name in left if left[name] is not None)
