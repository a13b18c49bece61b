"""GradCache on 2 and 4 ranks, plain, under DDP and under fully_shard: the gradient of the plain batch in one process, in float64."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from pipeline.training.chunks import Budget, Rows
from pipeline.training.gather import world
from pipeline.training.gradcache import GradCache
from pipeline.training.infonce import InfoNCE
from pipeline.training.matryoshka import Ladder, Matryoshka
from pipeline.training.ranks import run_on_ranks
from pipeline.training.temperature import Temperature
from tests.training.towers import Text, Visual, gradients, images, made, ragged, texts, worst

ROWS = 12
TEXTS, IMAGES = (texts(ROWS, 1), texts(ROWS, 2), ragged(ROWS, 3)), (images(ROWS, 1), images(ROWS, 2), [])
MAX_NORM = 0.05


def sharded(module):
    """fully_shard as a user applies it: each block, then the whole."""
    mesh = init_device_mesh("cpu", (world()[1],))
    for part in module.modules():
        if isinstance(part, torch.nn.ModuleList):
            for block in part:
                fully_shard(block, mesh=mesh)
    return fully_shard(module, mesh=mesh)


WRAPS = {"plain": lambda module: module, "DDP": DistributedDataParallel, "FSDP2": sharded}
CASES = {
    "InfoNCE": (Text, lambda: InfoNCE(Temperature(), directions=("query-document", "document-query")), TEXTS),
    "Matryoshka": (Text, lambda: Matryoshka(InfoNCE(Temperature()), (2, 4)), TEXTS),
    "Ladder": (lambda: Text(layers=True), lambda: Ladder(InfoNCE(0.1), ((0, 4),), alignment=0.5), TEXTS),
    "images": (Visual, lambda: InfoNCE(0.1), IMAGES),
}


def case(name, wrap, chunk, sizes, **more):
    """The loss, all gradients, and their norm as clipping sees it, of this rank's rows."""
    make, make_loss, (queries, positives, negatives) = CASES[name]
    rank, _ = world()
    start = sum(sizes[:rank])
    own = slice(start, start + sizes[rank])
    module, loss = WRAPS[wrap](made(make())), make_loss().double()
    value = GradCache(module, loss, [module], chunk, **more).step(queries[own], positives[own], negatives=negatives[own])
    found = gradients(module, loss)
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), MAX_NORM)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return value, found, norm, gradients(module, loss)


def runs(wrap, sizes):
    """All cases of a wrap, whole, in chunks of which ranks need different numbers, and by budget."""
    found = {}
    for name in CASES:
        # A tower that a rank leaves out waits for ever under FSDP's own collectives, whole or cut: there images are for encoders that see to it.
        if (name, wrap) == ("images", "FSDP2"):
            continue
        for chunk in (None, Rows(3), Budget(20, lambda row: len(row[0]) if isinstance(row, tuple) else len(row))):
            found[name, str(chunk)[:6]] = case(name, wrap, chunk, sizes)
    if wrap == "FSDP2":
        found["InfoNCE", "every"] = case("InfoNCE", wrap, Rows(3), sizes, sync_every_chunk=True)
    return found


@pytest.mark.parametrize(
    ("wrap", "sizes"), [("plain", [7, 5]), ("DDP", [8, 4]), ("FSDP2", [6, 6]), ("FSDP2", [9, 3]), ("FSDP2", [1, 5, 2, 4])], ids=str
)
def test_chunks_on_ranks_give_the_gradient_of_the_plain_batch_in_one_process(wrap, sizes):
    wanted = {name: case(name, "plain", None, [ROWS]) for name in CASES}
    for found in run_on_ranks(runs, len(sizes), wrap, sizes):
        for (name, chunk), (value, grads, norm, clipped) in found.items():
            one_value, one, one_norm, one_clipped = wanted[name]
            assert worst(one, grads) < 1e-10, (name, chunk)
            assert abs(value.item() - one_value.item()) < 1e-10, (name, chunk)
            assert abs(norm.item() - one_norm.item()) < 1e-10, (name, chunk)
            assert one_norm > MAX_NORM, "clipping must act"
            assert worst(one_clipped, clipped) < 1e-10, (name, chunk)


def towers(sizes):
    rank, ranks = world()
    start = sum(sizes[:rank])
    own = slice(start, start + sizes[rank])
    left, right, loss = made(Text(), 1), made(Text(blocks=1), 2), InfoNCE(Temperature()).double()
    if ranks > 1:
        left, right = sharded(left), sharded(right)
    for _ in range(2):
        GradCache(left, loss, [left, right], Rows(2), embed_documents=right).step(TEXTS[0][own], TEXTS[1][own], negatives=TEXTS[2][own])
    return gradients(left, right, loss)


def test_two_sharded_towers_accumulate_two_batches():
    wanted = towers([ROWS])
    for found in run_on_ranks(towers, 2, [8, 4]):
        assert worst(wanted, found) < 1e-10


def wrapped():
    try:
        case("InfoNCE", "FSDP1", Rows(3), [6, 6])
    except ValueError as error:
        return str(error)


WRAPS["FSDP1"] = lambda module: FullyShardedDataParallel(module, device_id=torch.device("cpu"))


def test_the_old_fsdp_is_refused():
    """Its shards look like plain parameters: averaging them over ranks would mix different parts of the model."""
    assert all("fully_shard" in message for message in run_on_ranks(wrapped, 2))
