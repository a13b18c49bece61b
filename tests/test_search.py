"""Search: exact equals numpy, indices find at least 0.95 of the truth, new rows are found, foreign encoders are refused."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipeline.config import ConfigError, Ref
from pipeline.index import IndexSettings, build
from pipeline.media import to_pixels
from pipeline.search import Query, Searcher, search
from schemas.items import encoder_schema
from tests.tables import clustered, rows_of, unit, write, write_model

HASHING = Ref(target="pipeline.encoders.hashing:Hashing", args={"dim": 64})


class FromFile:
    """A small encoder whose weights are a text file: a text's vector is the weights, turned by the text's length."""

    built = 0

    def __init__(self, path: str, query: bool = False):
        type(self).built += 1
        self.path, self.query, self.dim = path, query, 8
        self.lineage = {"encoder": "from-file", "weights": Path(path).read_text()}
        self.fingerprint = f"from-file-{self.lineage['weights']}"

    def for_queries(self):
        return FromFile(self.path, query=True)

    def encode(self, items):
        turns = [len(text) + (100 if self.query else 0) for text in items["text"].to_pylist()]
        return unit([np.roll(np.arange(1, 9), turn) for turn in turns])


@pytest.fixture
def vectors():
    return clustered(1200)


@pytest.fixture
def at(tmp_path, vectors):
    return write(tmp_path, rows_of(vectors))


@pytest.fixture
def hashed(tmp_path):
    """A table of texts and of one red and one blue picture, embedded by Hashing."""
    encoder = HASHING.build()
    texts = ["a red fox in the snow", "two owls on a branch", "a fox and a hen", "plain words"]
    flat = [np.full((20, 30, 3), colour, np.uint8) for colour in ([200, 30, 30], [30, 30, 200])]
    pixels = to_pixels([None] * 4 + [encoder.prepare(image) for image in flat])
    items = pa.Table.from_arrays([pa.array(list("abcdef")), pa.array([*texts, None, None]), pixels], schema=encoder_schema())
    at = write(tmp_path, rows_of(encoder.encode(items), fingerprint=encoder.fingerprint, texts=[*texts, None, None]))
    write_model(at, HASHING)
    return at


def reference(vectors, query, k, mask=None):
    """Ids of the nearest rows, by the plain definition."""
    similarities = (vectors.astype(np.float64) @ query) / (np.linalg.norm(vectors, axis=1) * np.linalg.norm(query))
    rows = [row for row in range(len(vectors)) if mask is None or mask[row]]
    best = sorted(rows, key=lambda row: -similarities[row])[:k]
    return [f"item-{row}" for row in best], similarities[best]


def recall(at, vectors, *, num_queries=50, k=10, **settings):
    searcher, found = Searcher(at), 0
    queries = clustered(num_queries, dim=vectors.shape[1], seed=7)
    hits = searcher.search([Query(vector=query.tolist(), k=k, columns=[], **settings) for query in queries])
    for query, table in zip(queries, hits, strict=True):
        found += len(set(table["id"].to_pylist()) & set(reference(vectors, query, k)[0]))
    return found / (num_queries * k)


def test_exact_search_equals_the_definition(at, vectors):
    query = clustered(1, seed=5)[0]
    hits = search(at, Query(vector=(query * 3).tolist(), k=25, exact=True))
    ids, similarities = reference(vectors, query, 25)
    assert hits["id"].to_pylist() == ids
    np.testing.assert_allclose(hits["similarity"].to_numpy(), similarities, atol=1e-6)


def test_float16_vectors_are_searched(tmp_path, vectors):
    at = write(tmp_path, rows_of(vectors, dtype="float16"))
    query = clustered(1, seed=5)[0]
    ids, similarities = reference(vectors.astype(np.float16), query, 10)
    hits = search(at, Query(vector=query.tolist(), exact=True))
    assert hits["id"].to_pylist() == ids
    np.testing.assert_allclose(hits["similarity"].to_numpy(), similarities, atol=1e-3)


@pytest.mark.parametrize("kind", ["ivf_rq", "ivf_hnsw_sq", "ivf_pq"])
def test_an_index_finds_nearly_all_that_exact_search_finds(tmp_path, kind):
    vectors = clustered(5000)
    at = write(tmp_path, rows_of(vectors))
    build(at, IndexSettings(kind=kind))
    # IVF_PQ is the kind that is never chosen by itself: this is why.
    assert recall(at, vectors) >= (0.95 if kind != "ivf_pq" else 0.8)
    assert recall(at, vectors, exact=True) == 1.0


@pytest.mark.parametrize("kind", ["exact", "ivf_rq", "ivf_hnsw_sq"])
def test_every_hit_fulfils_the_filter_and_a_narrow_filter_still_finds(at, vectors, kind):
    build(at, IndexSettings(kind=kind, scalar=["label"]))
    query = clustered(1, seed=5)[0]
    hits = search(at, Query(vector=query.tolist(), k=10, where="label = 'owl' and year < 60"))
    mask = [row % 3 == 2 and row < 60 for row in range(1200)]
    assert hits["id"].to_pylist() == reference(vectors, query, 10, mask)[0]
    assert search(at, Query(vector=query.tolist(), where="year < 0")).num_rows == 0
    assert search(at, Query(vector=query.tolist(), k=10, where="year < 3")).num_rows == 3


@pytest.mark.parametrize("kind", ["exact", "ivf_rq", "ivf_hnsw_sq"])
def test_new_rows_are_found_before_and_after_the_index_takes_them_in(at, kind):
    build(at, IndexSettings(kind=kind))
    new = clustered(50, seed=3)
    write(at.uri, rows_of(new, start=1200))
    for _ in range(2):
        hits = search(at, Query(vector=new[7].tolist(), k=1))
        assert hits["id"].to_pylist() == ["item-1207"]
        assert hits["similarity"][0].as_py() == pytest.approx(1, abs=1e-5)
        build(at, IndexSettings(kind=kind))


def test_a_searcher_sees_rows_and_indices_that_came_after_its_first_search(at):
    searcher, new = Searcher(at), clustered(1, seed=3)
    assert searcher.search([Query(vector=new[0].tolist(), k=1)])[0]["id"].to_pylist() != ["item-1200"]
    write(at.uri, rows_of(new, start=1200))
    assert searcher.search([Query(vector=new[0].tolist(), k=1)])[0]["id"].to_pylist() == ["item-1200"]
    build(at, IndexSettings(kind="ivf_rq"))
    assert searcher.search([Query(vector=new[0].tolist(), k=1)])[0]["id"].to_pylist() == ["item-1200"]


@pytest.mark.parametrize("kind", ["exact", "ivf_rq", "ivf_hnsw_sq", "ivf_pq"])
def test_k_may_be_larger_than_the_table(at, vectors, kind):
    build(at, IndexSettings(kind=kind))
    hits = search(at, Query(vector=vectors[0].tolist(), k=10**9))
    assert sorted(hits["id"].to_pylist()) == sorted(f"item-{row}" for row in range(1200))
    assert hits["similarity"].to_pylist() == sorted(hits["similarity"].to_pylist(), reverse=True)


def test_an_empty_table_has_no_hits(tmp_path):
    at = write(tmp_path, rows_of(clustered(1)).slice(0, 0))
    assert search(at, Query(vector=[1.0] * 64)).num_rows == 0


def test_a_row_is_left_out_of_what_is_like_it_unless_asked_for(at, vectors):
    expected = reference(vectors, vectors[5], 6)[0]
    assert expected[0] == "item-5"
    assert search(at, Query(id="item-5", k=5, exact=True))["id"].to_pylist() == expected[1:]
    assert search(at, Query(id="item-5", k=6, exact=True, itself=True))["id"].to_pylist() == expected
    assert search(at, Query(id="item-5", k=3, exact=True, where="year > 600")).num_rows == 3


def test_an_id_with_a_quote_is_a_name_like_any_other(at):
    with pytest.raises(ConfigError, match="no such row"):
        search(at, Query(id="it's"))


def test_columns_are_chosen_and_similarity_is_always_there(at):
    everything = search(at, Query(id="item-1"))
    assert everything.column_names == ["id", "similarity", "uri", "text", "label", "year", "thumbnail", "source"]
    some = search(at, Query(id="item-1", columns=["year", "_run", "similarity"]))
    assert some.column_names == ["id", "similarity", "year", "_run"]


def test_a_text_finds_the_row_that_says_it(hashed):
    hits = search(hashed, Query(text="a red fox in the snow", k=3))
    assert hits["id"][0].as_py() == "item-0"
    assert hits["similarity"][0].as_py() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("colour", "row"), [((210, 40, 35), "item-4"), ((25, 20, 190), "item-5")])
def test_a_picture_finds_the_picture_of_its_colour(hashed, tmp_path, colour, row):
    path = tmp_path / "query.png"
    Image.new("RGB", (64, 48), colour).save(path)
    assert search(hashed, Query(image=str(path), k=1, where="text is null"))["id"].to_pylist() == [row]


def test_several_queries_of_every_kind_keep_their_order(hashed, tmp_path):
    path = tmp_path / "query.png"
    Image.new("RGB", (64, 48), (210, 40, 35)).save(path)
    queries = [Query(id="item-5", itself=True), Query(text="plain words"), Query(image=str(path)), Query(text="two owls on a branch")]
    hits = Searcher(hashed).search(queries)
    assert [table["id"][0].as_py() for table in hits] == ["item-5", "item-3", "item-4", "item-1"]


def test_the_query_side_of_an_encoder_is_used_and_built_once(tmp_path):
    (tmp_path / "weights").write_text("1")
    ref = Ref(target="tests.test_search:FromFile", args={"path": str(tmp_path / "weights")})
    from tests.test_search import FromFile as Imported

    sides = unit([np.roll(np.arange(1, 9), turn) for turn in range(8)])
    at = write(tmp_path, rows_of(sides, fingerprint="from-file-1"))
    write_model(at, ref)
    searcher = Searcher(at)
    before = Imported.built
    # The query side turns by 100 more than the document side, and 104 is 0 modulo 8.
    assert searcher.search([Query(text="word", k=1)])[0]["id"].to_pylist() == ["item-0"]
    assert searcher.search([Query(text="words", k=1)])[0]["id"].to_pylist() == ["item-1"]
    assert Imported.built - before == 2


def test_changed_weights_are_refused_and_the_change_is_named(tmp_path):
    (tmp_path / "weights").write_text("1")
    ref = Ref(target="tests.test_search:FromFile", args={"path": str(tmp_path / "weights")})
    at = write(tmp_path, rows_of(unit(np.eye(8)), fingerprint="from-file-1"))
    write_model(at, ref)
    (tmp_path / "weights").write_text("2")
    with pytest.raises(ConfigError, match=r"weights was '1', is '2'.*bring back the old ones"):
        search(at, Query(text="word"))
    assert search(at, Query(id="item-1", k=2)).num_rows == 2, "a search without the encoder needs no weights"


@pytest.mark.parametrize("query", [Query(text="fox"), Query(id="item-1")])
def test_a_foreign_encoder_is_refused(hashed, query):
    foreign = Ref(target=HASHING.target, args={"dim": 32})
    with pytest.raises(ConfigError) as caught:
        search(hashed, query, encoder=foreign)
    for part in (HASHING.build().fingerprint, foreign.build().fingerprint, "dim was 64, is 32", "leave `encoder` out"):
        assert part in str(caught.value)


def test_the_right_encoder_may_be_given_though_nobody_wrote_it_down(tmp_path):
    encoder = HASHING.build()
    at = write(tmp_path, rows_of(clustered(20), fingerprint=encoder.fingerprint))
    with pytest.raises(ConfigError, match=r"no row for the fingerprint.*encoder\.target"):
        search(at, Query(text="fox"))
    assert search(at, Query(text="fox", k=4), encoder=HASHING).num_rows == 4


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"where": "lable = 'cat'"}, r"No field named lable.*columns are id string, uri string.*label string, year int64"),
        ({"where": "year >"}, "is not a condition on this table"),
        ({"where": "year > 'new'"}, "is not a condition on this table"),
        ({"columns": ["lable"]}, "did you mean 'label'"),
    ],
)
def test_a_wrong_query_says_what_is_allowed(at, query, message):
    with pytest.raises(ConfigError, match=message):
        search(at, Query(id="item-1", **query))


@pytest.mark.parametrize(
    ("vector", "message"), [([1.0, 2.0], "has 2 numbers, and the table's vectors have 64"), ([0.0] * 64, "zero"), ([float("nan")] * 64, "not finite")]
)
def test_a_vector_that_points_nowhere_is_refused(at, vector, message):
    with pytest.raises(ConfigError, match=message):
        search(at, Query(vector=vector))


@pytest.mark.parametrize(("content", "reason"), [(None, "missing"), (b"", "empty"), (b"GIF89a", "corrupt_image"), (b"hello", "not_an_image")])
def test_an_unreadable_query_image_says_why(hashed, tmp_path, content, reason):
    path = tmp_path / "query.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=reason):
        search(hashed, Query(image=str(path)))


@pytest.mark.parametrize("given", [{}, {"text": "a", "id": "b"}, {"text": "  "}, {"text": "a", "k": 0}])
def test_a_query_is_exactly_one_thing(given):
    with pytest.raises(ValueError, match=r"exactly one|empty|greater than 0"):
        Query(**given)
