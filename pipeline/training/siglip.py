"""SigLIP: one yes-or-no question for each pair of query and document, no softmax (arXiv 2303.15343, section 3.2)."""

from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from pipeline.training import NO_NOTES, Notes, normalise
from pipeline.training.blocks import Tensors, sum_over_rows
from pipeline.training.columns import gather_columns
from pipeline.training.gather import global_mean
from pipeline.training.temperature import Bias, Temperature, check_temperature, scale_of


class SigLIP(nn.Module):
    """-(1/N) sum_ij log sigmoid(z_ij (s_ij / temperature + bias)), z = 1 where the document fits the query and -1 elsewhere.

    A query has as many positives as there are documents that answer it or are of its group (`Notes`). The vectors of all
    ranks are gathered (N x D), their comparison is done in blocks: a ring of ranks would save less than the vectors take.
    """

    def __init__(self, temperature: float | Temperature = 0.1, bias: float | Bias = -10.0) -> None:
        super().__init__()
        check_temperature(temperature)
        self.temperature = temperature
        self.bias = bias

    def forward(self, queries: Tensor, positives: Tensor, negatives: Tensor | None = None, notes: Notes = NO_NOTES) -> Tensor:
        """A scalar; see `pipeline.training.Loss`."""
        queries = normalise(queries)
        columns = gather_columns(queries, normalise(positives), None if negatives is None else normalise(negatives), notes)
        bias = self.bias().to(queries) if isinstance(self.bias, Bias) else queries.new_tensor(self.bias)

        def block(start: int, rows: Tensors, shared: Tensors) -> Tensor:
            (query,), (documents, scale, bias) = rows, shared
            own = columns.own(start, len(query))
            fits = columns.is_own(own, len(documents))
            others = columns.fits(own, len(documents))
            signs = (fits if others is None else fits | others).to(query) * 2 - 1
            terms = logsigmoid(signs * (query @ documents.T * scale + bias))
            unwanted = columns.out_of_reach(start, own, len(documents))
            return -(terms if unwanted is None else terms.masked_fill(unwanted, 0)).sum()

        shared = (columns.documents, scale_of(self.temperature, queries), bias)
        return global_mean(sum_over_rows(block, len(columns.documents), (queries,), shared), len(queries))
