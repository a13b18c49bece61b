"""SigLIP against a loop over pairs."""

import pytest
import torch

from pipeline.training import Notes
from pipeline.training.siglip import SigLIP
from pipeline.training.temperature import Bias, Temperature
from tests.training.test_infonce import ROWS, assert_same, batch, cosine


@pytest.mark.parametrize("num_negatives", [0, 2])
def test_value_and_gradient_are_those_of_the_formula(num_negatives):
    """Rows 0 and 4 share a document, rows 2 and 3 a group: each has two positives. Row 1 wants its own negatives only."""
    queries, positives, negatives = sides = batch(num_negatives)
    temperature, bias = Temperature(0.1).double(), Bias(-3.0).double()
    keys, groups = torch.tensor([0, 1, 2, 3, 0, 5]), torch.tensor([0, 1, 2, 2, 4, 5])
    wants = torch.tensor([True, num_negatives == 0, True, True, True, True])
    terms = []
    for i in range(ROWS):
        for j in range(ROWS):
            if wants[i] or i == j:
                sign = 1 if keys[i] == keys[j] or groups[i] == groups[j] else -1
                terms.append(torch.sigmoid(sign * (cosine(queries[i], positives[j]) * temperature() + bias())).log())
            for k in range(num_negatives):
                if wants[i] or i == j:
                    terms.append(torch.sigmoid(-(cosine(queries[i], negatives[j, k]) * temperature() + bias())).log())
    wanted = -sum(terms) / ROWS
    notes = Notes(
        positive_keys=keys, groups=groups, negative_keys=torch.arange(100, 100 + ROWS * num_negatives).view(ROWS, -1), in_batch_negatives=wants
    )
    leaves = (*sides[: 3 if num_negatives else 2], temperature.a, bias.b)
    assert_same(SigLIP(temperature, bias)(*sides, notes), wanted, leaves)
