"""Whole slides: SLIDE (one row a slide: what it is, what became of it) and TILE (what a tile's row carries beside ITEM).

Coordinates are pixels of level 0 of the full image, x to the right and y down; `bounds` on the slide's row is for tools that count from
the scanned part.
"""

import pyarrow as pa

from schemas import field

STATUSES = {
    "surveyed": "looked at; its tiles are not all in the table yet",
    "ok": "every tile that it should have is in the table",
    "partial": "some tiles could not be read or embedded, or one of the grids does not fit it: see reason",
    "failed": "it cannot be used: see reason; tiles of what it was before stay until it can be",
    "needs_mpp": "it does not say how large its pixels are, and nobody has stated it; tiles of what it was before stay until somebody has",
    "no_tissue": "no tile holds enough tissue: see reason",
    "duplicate": "the same content as the slide in duplicate_of, whose tiles stand for both",
    "deleted": "it is no longer where it was; its tiles stay unless sync.vanished is delete",
}
"""Every status a slide can have."""

REASONS = {
    "missing": "the file is not there, or may not be read",
    "empty": "zero bytes",
    "unreadable": "damaged, or no slide at all",
    "unsupported": "a slide that no reader here opens",
    "too_large": "larger than the cache that a remote slide is fetched into",
    "too_coarse": "its finest level is coarser than a grid asks for, and enlarging is not allowed",
    "no_mpp": "neither the file nor the job says how many microns a pixel is",
    "implausible_mpp": "its mpp would make it larger than a slide can be",
    "mask_failed": "the tissue mask raised an error",
    "worker_died": "the worker process died, or hung past limits.slide_timeout_s, on this slide",
    "changed": "it was replaced while it was read; the next run takes the new one",
    "blank": "no tissue on the glass",
    "pen_only": "nothing but pen marks on the glass",
    "little_tissue": "tissue, but no tile holds min_tissue_fraction of it",
    "bad_tiles": "tiles were rejected: see the table's rejects",
    "error": "an error that nobody foresaw: see detail",
}
"""Every reason for a status other than ok."""

LEVELS = pa.list_(pa.struct([("width", pa.int32()), ("height", pa.int32()), ("downsample", pa.float64())]))

SLIDE = pa.schema(
    [
        field("id", pa.string(), "URI of the slide", nullable=False),
        field("source", pa.string(), "name of the source that lists it", nullable=False),
        field("slide_id", pa.string(), "its path within the source: what its tiles' rows name it by", nullable=False),
        field("status", pa.string(), "one of schemas.slides.STATUSES", nullable=False),
        field("reason", pa.string(), "one of schemas.slides.REASONS; null where the status is ok or surveyed"),
        field("detail", pa.string(), "what exactly was wrong, for a person"),
        field("version", pa.string(), "the file's version when it was looked at: etag, or size and time", nullable=False),
        field("bytes", pa.int64(), "size of the file; null where the store does not say"),
        field("survey", pa.string(), "hash of the settings that it was looked at with: mask, mpp, stain, thumbnail", nullable=False),
        field("tiling", pa.string(), "hash of all that its tiles' rows depend on; null where it has none"),
        field("content_fp", pa.string(), "changes when the file is replaced, not when it is moved; null where it cannot be opened"),
        field("vendor", pa.string(), "format, as OpenSlide names it"),
        field("reader", pa.string(), "name, version and way of decoding of what reads it"),
        field("width", pa.int64(), "px of level 0"),
        field("height", pa.int64(), "px of level 0"),
        field("levels", LEVELS, "the pyramid, finest first; downsample: px of level 0 that one px covers"),
        field("tile_width", pa.int32(), "of the stored tiles of level 0, px"),
        field("tile_height", pa.int32(), "of the stored tiles of level 0, px"),
        field("compression", pa.string(), "of the stored tiles"),
        field("icc", pa.bool_(), "whether there is a colour profile; it is not applied"),
        field("mpp", pa.float64(), "microns per px of level 0: the geometric mean of both directions"),
        field("mpp_x", pa.float64(), "microns per px of level 0"),
        field("mpp_y", pa.float64(), "microns per px of level 0"),
        field("mpp_source", pa.string(), "where mpp is from: user, openslide, a vendor's key, tiff, objective (an estimate)"),
        field("mpp_flags", pa.list_(pa.string()), "what is odd about it: anisotropic, disagrees, implausible"),
        field("objective", pa.float64(), "magnification that the scanner states"),
        field("bounds", pa.list_(pa.int64()), "x, y, width, height of the part that was scanned; null: all"),
        field("notes", pa.list_(pa.string()), "what a person should know"),
        field("tissue_mm2", pa.float64(), "area of tissue"),
        field("mask", pa.binary(), "tissue as a PNG of one bit a px that spans the slide"),
        field("mask_um", pa.float64(), "microns per px of the mask"),
        field("mask_threshold", pa.float64(), "the threshold that the mask was made with; null where it has none"),
        field("contour", pa.string(), "outlines of tissue as GeoJSON, px of level 0"),
        field("thumbnail", pa.binary(), "a small JPEG of the whole slide"),
        field("white", pa.list_(pa.uint8()), "red, green, blue of the empty glass: what lies outside the slide is filled with it"),
        field("stain", pa.string(), "the stain fit, as JSON; null where none was asked for, or it was skipped (see notes)"),
        field("tiles", pa.int64(), "tiles that it should have, over all grids"),
        field("embedded", pa.int64(), "of them, those in the table"),
        field("rejected", pa.int64(), "of them, those in the table's rejects"),
        field("bad_tiles", pa.list_(pa.string()), "where the first rejected tiles are, and why"),
        field("duplicate_of", pa.string(), "URI of the slide with the same content"),
        field("moved_from", pa.string(), "URI at which an earlier run found it"),
        field("attempts", pa.int32(), "how often it was looked at in this version", nullable=False),
        field("survey_seconds", pa.float64(), "time that looking at it took"),
        field("embed_seconds", pa.float64(), "thread time that its tiles took in the run that last embedded some"),
        field("run", pa.string(), "the run that wrote this row", nullable=False),
        field("updated_at", pa.timestamp("us", tz="UTC"), "when this row was written", nullable=False),
    ],
    metadata={"tessera.schema": "slide"},
)
"""The table beside the vectors, `NAME.slides`: one row a slide, also of those that could not be used."""

QUALITY = pa.schema(
    [
        field("lapvar", pa.float32(), "variance of the 3 x 3 Laplacian of the grey tile, brought to 0.5 um/px: below 40 is blurred"),
        field("lapvar_norm", pa.float32(), "lapvar over the variance of grey: sharpness without the stain's strength"),
        field("white_frac", pa.float32(), "share of pixels with all channels > 220"),
        field("black_frac", pa.float32(), "share of pixels with all channels < 25"),
        field("grey_frac", pa.float32(), "share of pixels with a saturation < 0.05"),
        field("pen_frac", pa.float32(), "share of pixels in the colours of pens"),
        field("sat_mean", pa.float32(), "mean saturation, 0 to 1"),
        field("od_mean", pa.float32(), "mean optical density against the slide's white"),
        field("h_mean", pa.float32(), "mean concentration of haematoxylin"),
        field("e_mean", pa.float32(), "mean concentration of eosin"),
        field("entropy", pa.float32(), "entropy of the grey values, bits"),
    ]
)
"""What is measured on a tile's own pixels. Nothing is dropped for it: filter by it."""

TILE = pa.schema(
    [
        field("slide_id", pa.string(), "the slide: its path within the source", nullable=False),
        field("content_fp", pa.string(), "the slide's content: the same wherever the file lies", nullable=False),
        field("grid", pa.string(), "which grid the tile is of, such as 0.5um/256px", nullable=False),
        field("x", pa.int64(), "left edge, px of level 0 of the full image", nullable=False),
        field("y", pa.int64(), "top edge, px of level 0 of the full image", nullable=False),
        field("footprint_l0", pa.int32(), "side of the square that the tile covers, px of level 0", nullable=False),
        field("x_um", pa.float64(), "left edge in microns", nullable=False),
        field("y_um", pa.float64(), "top edge in microns", nullable=False),
        field("row", pa.int32(), "row of the grid, from 0 at the top", nullable=False),
        field("col", pa.int32(), "column of the grid, from 0 at the left", nullable=False),
        field("mpp", pa.float64(), "microns per px that the grid asks for", nullable=False),
        field("mpp_effective", pa.float64(), "microns that one px of the tile truly covers", nullable=False),
        field("tile_px", pa.int32(), "side of the tile in its own px", nullable=False),
        field("read_level", pa.int32(), "level of the pyramid that is read", nullable=False),
        field("read_px", pa.int32(), "side of what is read there, px of that level", nullable=False),
        field("upsampled", pa.bool_(), "whether the slide is coarser than the grid, and the tile enlarged", nullable=False),
        field("tissue_fraction", pa.float32(), "share of the tile that is tissue", nullable=False),
        field("valid_fraction", pa.float32(), "share of the tile that lies inside the slide", nullable=False),
        field("parent_id", pa.string(), "id of the tile of the next coarser grid that holds its centre; null where that is not kept"),
        *QUALITY,
    ],
    metadata={"tessera.schema": "tile"},
)
"""Metadata columns of a tile, beside ITEM's. A tile's `uri` is the slide's, with #xywh= and its place in px of level 0."""
