"""From a real slide to a table of tiles, to the tiles that are like a tile: `python -m demo.slides`.

Takes the weights of `demo.assets` and the Aperio slide of `demo.slide_assets`, fetched once. Shows each command as a user would type it.
"""

import json

import lance

from demo import assets
from demo.commands import OUTPUT, tessera
from demo.packages import Unavailable
from demo.slide_assets import fetch_slides

TABLE = OUTPUT / "vectors" / "tiles.lance"
ASKED = {  # what a tile is the extreme of, of the measured columns
    "most haematoxylin: dark epithelium": "h_mean DESC",
    "most eosin: dense collagen": "e_mean DESC",
    "most white: torn, at the edge": "white_frac DESC",
}


def show_slides(report: dict) -> None:
    """The counts of slides and of tiles, which add up."""
    parts = [f"{report[name]} {name}" for name in ("unchanged", "ok", "partial", "failed", "needs_mpp", "no_tissue") if report[name]]
    print(f"  slides: {report['listed']} listed = {' + '.join(parts)}, {report['opened']} opened   ({report['wall_s']:.1f} s)")
    tiles = report["tiles"]
    print(f"  tiles: {tiles['listed']} listed = {tiles['unchanged']} unchanged + {tiles['written']} written + {tiles['rejected']} rejected")


def extreme(order: str) -> dict:
    """The first tile of the table in an order."""
    name, _, direction = order.partition(" ")
    rows = lance.dataset(str(TABLE)).to_table(columns=["id", "x", "y", "tissue_fraction", name]).sort_by([(name, f"{direction.lower()}ending")])
    found: dict = rows.slice(0, 1).to_pylist()[0]
    return found


def show_neighbours() -> None:
    """A contact sheet of the tiles nearest to three tiles, searched in one go."""
    queries = []
    for why, order in ASKED.items():
        tile = extreme(order)
        print(f"  {why}: the tile at ({tile['x']}, {tile['y']})")
        queries.append({"id": tile["id"], "k": 10, "columns": ["id", "x", "y", "tissue_fraction", "thumbnail"]})
    search = OUTPUT / "tiles-search.yaml"
    wanted = {"table": {"uri": str(TABLE.parent), "name": TABLE.stem}, "queries": queries, "sheet": str(OUTPUT / "tiles.html")}
    search.write_text(json.dumps(wanted, indent=1))  # JSON is YAML
    report = tessera("search", str(search))
    tessera("search", str(search), f"sheet={OUTPUT / 'tiles.png'}")
    for number, why in enumerate(ASKED):
        hits = [f"{hit['similarity']:.2f} at ({hit['x']}, {hit['y']})" for hit in report["hits"] if hit["_query"] == number]
        print(f"  {why.partition(':')[0]}: {', '.join(hits[:4])}")


def main() -> None:
    """Fetch, cut and embed, look, search, and run again."""
    try:
        assets.fetch()
        fetch_slides()
    except Unavailable as unavailable:
        raise SystemExit(f"demo.slides: {unavailable}") from None
    OUTPUT.mkdir(exist_ok=True)
    show_slides(tessera("slides", "demo/slides.yaml"))
    show_neighbours()
    print("\nThe same job again: no slide is opened, and the table gets no new version.")
    show_slides(tessera("slides", "demo/slides.yaml"))
    print(
        f"\nOpen {OUTPUT / 'slides' / 'index.html'} to see the slide with its tissue and its tiles, and {OUTPUT / 'tiles.html'} to see what is alike."
    )


if __name__ == "__main__":
    main()
