"""Runs the demonstration step by step and shows each command as a user would type it."""

from pathlib import Path

from demo import assets
from demo.commands import OUTPUT, show_hits, show_run, tessera
from demo.packages import Unavailable


def main() -> None:
    """Fetch, embed, search, and run again."""
    try:
        assets.fetch()
    except Unavailable as unavailable:
        raise SystemExit(f"demo: {unavailable}") from None
    OUTPUT.mkdir(exist_ok=True)
    sets = ["photos"] + (["products"] if Path("demo/assets/products/products.csv").exists() else [])
    for name in sets:
        show_run(tessera("embed", f"demo/{name}.yaml"))
    for name in sets:
        show_hits(tessera("search", f"demo/{name}-search.yaml"))
        tessera("search", f"demo/{name}-search.yaml", f"sheet=demo/output/{name}.png")
    print("\nThe same job again: nothing to do, and no new version of the table.")
    again = tessera("embed", "demo/photos.yaml")
    show_run(again)
    print(f"\nOpen {', '.join(str(OUTPUT / f'{name}.html') for name in sets)} in a browser to see what was found.")


if __name__ == "__main__":
    main()
