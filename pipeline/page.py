"""The frame that all of the project's HTML pages share: colours for light and dark, type, and a policy under which a page loads nothing."""

import html as escaping

STYLE = """
:root { color-scheme: light dark; --page: #f6f6f4; --card: #fff; --ink: #1b1c1e; --soft: #6b6f76; --line: #e3e3df; --well: #eeeeeb; --mark: #2f6f5e }
@media (prefers-color-scheme: dark) {
  :root { --page: #141517; --card: #1d1f22; --ink: #e9e9e6; --soft: #9a9fa7; --line: #2c2f33; --well: #26282c; --mark: #6fc3a9 }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2.5rem clamp(1rem, 4vw, 3rem) 4rem; max-width: 100rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif }
header { margin-bottom: 2rem }
h1 { margin: 0; font-size: 1rem; font-weight: 600 }
header p { margin: .1rem 0 0; color: var(--soft); font-size: .85rem }
code { font: .92em ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace }
"""


def page(title: str, subtitle: str, body: str, *, style: str = "", images: str = "data:") -> str:
    """A whole page. `title` and `subtitle` are escaped here, `body` is HTML already; `style` is added to the common one.

    `images`: where pictures may come from, as a content security policy says it; as it stands, only from within the page.
    """
    below = f"<p>{safe(subtitle)}</p>" if subtitle else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src {images}; style-src 'unsafe-inline'">
<title>{safe(title)}</title><style>{STYLE}{style}</style></head>
<body><header><h1>{safe(title)}</h1>{below}</header>
{body}
</body></html>
"""


def safe(text: str) -> str:
    """Text as HTML."""
    return escaping.escape(text, quote=True)
