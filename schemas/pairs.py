"""What is trained on: PAIR (a query, documents that answer it, documents that do not), and the rows of a source that are no such thing."""

import pyarrow as pa

from schemas import field

IMAGE = pa.struct(
    [
        field("bytes", pa.binary(), "the encoded image (JPEG, PNG, ...); null where it is at `uri`"),
        field("uri", pa.string(), "where to fetch the encoded image if `bytes` is null"),
    ]
)
"""One image. Exactly one of its fields is given."""

MESSAGE = pa.struct(
    [
        field("text", pa.string(), "with pipeline.vlm.message.MARKER for each image, or none; null where there is none"),
        field("images", pa.list_(pa.field("item", IMAGE, nullable=False)), "in the order of their markers; null and [] are none"),
        field("id", pa.string(), "the document's id in its source; equal ids are the same document; null: its content says which it is"),
    ]
)
"""What is embedded, as `pipeline.vlm.message.Message`. At least a text or an image."""

PAIR = pa.schema(
    [
        field("row_id", pa.string(), "unique, and the same on the next run: a hash of where the row is", nullable=False),
        field("uri", pa.string(), "where the row was read, file#row: for people, and for errors", nullable=False),
        field("task", pa.string(), "the task or data set the row belongs to; null: the data set's name"),
        field("instruction_q", pa.string(), "what the query is told; null: the data set's"),
        field("instruction_d", pa.string(), "what the documents are told; null: the data set's"),
        field("query", MESSAGE, "what is searched with", nullable=False),
        field("positives", pa.list_(pa.field("item", MESSAGE, nullable=False)), "documents that answer the query, at least one", nullable=False),
        field("negatives", pa.list_(pa.field("item", MESSAGE, nullable=False)), "documents that do not, hard ones; [] where none", nullable=False),
        field("pos_scores", pa.list_(pa.float32()), "a teacher's score of each positive; null where there is no teacher"),
        field("neg_scores", pa.list_(pa.float32()), "a teacher's score of each negative; null where there is no teacher"),
        field("group", pa.string(), "rows of one group fit each other's documents (a class, a parent document, near-duplicates); null: of none"),
        field("in_batch_negatives", pa.bool_(), "whether other rows' documents are wrong answers; null: as the data set says"),
        field("label", pa.string(), "the row's class or score as its source has it; null where there is none"),
    ],
    metadata={"tessera.schema": "pair"},
)
"""What a pair reader yields, whatever the format. Null is absent; an empty text is a fault."""

KEYS = pa.schema(
    [
        field("row_key", pa.int64(), "hash of row_id: what the order of rows is made from", nullable=False),
        field("query_key", pa.int64(), "hash of the query's content, and of its instruction where it has one", nullable=False),
        field("group_key", pa.int64(), "hash of task and group; null where the row is of no group"),
        field(
            "positive_keys",
            pa.list_(pa.int64()),
            "of each positive, a hash of its id within the data set, else of its content, and of its instruction where it has one",
            nullable=False,
        ),
        field("negative_keys", pa.list_(pa.int64()), "of each negative, likewise", nullable=False),
        field("cost", pa.int32(), "estimated tokens of query, positives and negatives together", nullable=False),
    ]
)
"""What the order of training and the masks of the loss need to know of a row, without its content."""

KINDS = field("kinds", pa.list_(pa.string()), "what its messages are, each kind once: side, told if it has an instruction, text, image or images")
"""Such as `query told text` and `document text image`: what a model must take, known without the messages."""

PREPARED = pa.schema([*PAIR, *KEYS, KINDS], metadata={"tessera.schema": "prepared"})
"""A data set ready for training: PAIR rows that were checked, with nothing left to the data set's settings, and KEYS."""

REASONS = {
    "bad_row": "the row cannot be parsed, or a column is not what the format says",
    "empty": "a text of only white space, or neither text nor image, where something must be embedded",
    "markers": "the text has image markers, but not as many as there are images",
    "missing": "an image file or a document of the corpus is not there, or may not be read",
    "no_positive": "no document that answers the query",
    "no_negative": "no negative, where the data set requires one",
    "scores": "not one score for each positive and each negative",
    "bad_image": "an image that cannot be read, is too large, or is damaged",
    "unfit": "the model that is trained cannot take the row, such as an image of more tokens than it reads; found when the row is used",
    "unwanted": "left out by the data set's own settings, such as min_score; counts as no fault",
}
"""Every reason for which a row is not trained on."""

PAIR_REJECT = pa.schema(
    [
        field("uri", pa.string(), "where the row was read, file#row", nullable=False),
        field("reason", pa.string(), "one of schemas.pairs.REASONS", nullable=False),
        field("detail", pa.string(), "what exactly was wrong, for a person"),
    ],
    metadata={"tessera.schema": "pair_reject"},
)
"""A row that is not trained on, and why. Never replaced by a dummy."""
