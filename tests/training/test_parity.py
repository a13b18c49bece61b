"""The values of sentence-transformers' and open_clip's losses, from the installed packages, on the same inputs."""

import open_clip.loss
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses as theirs
from torch import nn

from pipeline.training import Notes
from pipeline.training.chunks import Rows
from pipeline.training.distillation import KL, MarginMSE
from pipeline.training.gradcache import GradCache
from pipeline.training.infonce import Hardness, InfoNCE
from pipeline.training.matryoshka import Matryoshka
from pipeline.training.siglip import SigLIP
from pipeline.training.triplet import BatchHard, Triplet
from tests.training.test_infonce import ROWS, assert_same, batch
from tests.training.towers import Text, gradients, made, texts, worst

ALL = ("query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc")


def columns(sides):
    """sentence-transformers' columns: queries, positives, first negatives, second negatives."""
    queries, positives, negatives = sides
    return [queries, positives, *negatives.unbind(dim=1)]


def named(directions):
    return tuple(name.replace("_to_", "-").replace("doc", "document") for name in directions)


@pytest.mark.parametrize(
    ("directions", "partition"),
    [(ALL[:1], "joint"), (ALL[:2], "per_direction"), (ALL[:2], "joint"), (ALL, "joint")],
)
@pytest.mark.parametrize(("mode", "on"), [(None, None), ("in_batch_negatives", "in-batch"), ("hard_negatives", "own"), ("all_negatives", "all")])
def test_infonce_is_multiple_negatives_ranking(directions, partition, mode, on):
    sides = batch()
    other = theirs.MultipleNegativesRankingLoss(
        None, scale=20.0, directions=directions, partition_mode=partition, hardness_mode=mode, hardness_strength=5.0 if mode else 0.0
    )
    ours = InfoNCE(
        0.05, directions=named(directions), softmax="joint" if partition == "joint" else "each", hardness=Hardness(5.0, on) if mode else None
    )
    assert_same(ours(*sides), other.compute_loss_from_embeddings(columns(sides), None), sides)


def test_infonce_in_both_directions_is_open_clips():
    queries, positives, _ = batch()
    features = [nn.functional.normalize(side, dim=-1) for side in (queries, positives)]
    wanted = open_clip.loss.ClipLoss()(*features, torch.tensor(14.0))
    assert_same(InfoNCE(1 / 14, directions=("query-document", "document-query"))(queries, positives), wanted, (queries, positives))


def test_siglip_is_open_clips():
    queries, positives, _ = batch()
    features = [nn.functional.normalize(side, dim=-1) for side in (queries, positives)]
    wanted = open_clip.loss.SigLipLoss()(*features, torch.tensor(10.0), torch.tensor(-10.0))
    assert_same(SigLIP()(queries, positives), wanted, (queries, positives))


def test_triplet_is_theirs():
    """Their Euclidean distance adds 1e-6 to each difference before it squares, so the values agree to 1e-5 only."""
    queries, positives, negatives = batch(1)
    for distance, metric in (("euclidean", theirs.TripletDistanceMetric.EUCLIDEAN), ("cosine", theirs.TripletDistanceMetric.COSINE)):
        wanted = theirs.TripletLoss(None, distance_metric=metric, triplet_margin=2.0).compute_loss_from_embeddings(
            [queries, positives, negatives[:, 0]], None
        )
        assert abs(Triplet(2.0, distance=distance)(queries, positives, negatives).item() - wanted.item()) < 1e-5


def test_batch_hard_is_theirs():
    """Theirs has one set of vectors, which is ours with the same vectors on both sides."""
    vectors, _, _ = batch()
    labels = torch.tensor([0, 1, 0, 1, 2, 2])
    hard = theirs.BatchHardTripletLoss.batch_hard_triplet_loss
    other = theirs.BatchHardTripletLoss.__new__(theirs.BatchHardTripletLoss)
    nn.Module.__init__(other)
    other.triplet_margin, other.distance_metric = 2.0, theirs.BatchHardTripletLossDistanceFunction.eucledian_distance
    found = BatchHard(2.0, distance="euclidean")(vectors, vectors, None, Notes(groups=labels))
    assert abs(found.item() - hard(other, labels, vectors).item()) < 1e-5


def test_distillation_is_theirs():
    sides = batch()
    teacher = torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    notes = Notes(teacher_scores=teacher)
    margins = theirs.MarginMSELoss(None).compute_loss_from_embeddings(columns(sides), teacher)
    assert_same(MarginMSE()(*sides, notes), margins, sides)
    kl = theirs.DistillKLDivLoss(None, temperature=1.0).compute_loss_from_embeddings(columns(sides), teacher)
    assert_same(KL(1.0, similarity="dot")(*sides, notes), kl, sides)


class Tokens(nn.Module):
    """Our text tower as a module of sentence-transformers, which gives padded token ids."""

    def __init__(self):
        super().__init__()
        self.text = made(Text())

    def forward(self, features):
        lengths = features["attention_mask"].sum(dim=1).tolist()
        rows = [ids[:length].tolist() for ids, length in zip(features["input_ids"], lengths, strict=True)]
        return features | {"sentence_embedding": self.text(rows)}

    def get_sentence_embedding_dimension(self):
        return 8

    def get_embedding_dimension(self):
        return 8


def features(rows):
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < torch.tensor([[len(row)] for row in rows])).long()}


@pytest.mark.parametrize("widths", [(), (2, 4)], ids=["InfoNCE", "Matryoshka"])
def test_cached_gradients_are_those_of_cached_multiple_negatives_ranking(widths):
    queries, positives, negatives = texts(9, 1), texts(9, 2), texts(9, 3)
    tokens = Tokens()
    model = SentenceTransformer(modules=[tokens], device="cpu")
    loss = theirs.CachedMultipleNegativesRankingLoss(model, scale=20.0, mini_batch_size=4)
    if widths:
        loss = theirs.MatryoshkaLoss(model, loss, [8, *widths])
    value = loss([features(rows) for rows in (queries, positives, negatives)], torch.zeros(9))
    value.backward()
    wanted = gradients(tokens.text)
    tokens.text.zero_grad()
    ours = Matryoshka(InfoNCE(0.05), widths) if widths else InfoNCE(0.05)
    found = GradCache(tokens.text, ours, [tokens.text], Rows(4)).step(queries, positives, negatives=[[row] for row in negatives])
    assert abs(found.item() - value.item()) < 1e-10
    assert worst(wanted, gradients(tokens.text)) < 1e-10
