"""Messages whose text is drawn: each stretch of it becomes a page among the message's images."""

from pipeline.vlm.message import MARKER, Message, placed
from pipeline.vlm.textimage import Page, draw


def drawn(message: Message, page: Page) -> Message:
    """The message with images alone, in the order that texts and images had; without letters, as it was.

    Text beyond the page's last line is not drawn, nor are letters that its font lacks. Raises ValueError if that leaves
    nothing of a stretch of text: an empty page has a vector too.
    """
    if not message.text.replace(MARKER, "").strip():
        return message
    before, images = placed(message).split(MARKER), iter(message.images)
    found = []
    for index, text in enumerate(before):
        if index:
            found.append(next(images))
        if text.strip():
            sheet = draw(text, page)
            if not sheet.image.min() < 255:
                raise ValueError(f"the page's font has none of the letters {sheet.missing[:40]!r}; name a font file that has (page.font)")
            found.append(sheet.image)
    return Message("", tuple(found))
