"""Grids of images with labels."""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MARGIN, LABEL_WIDTH, FONT_SIZE = 4, 176, 13
MARK = "#0050b0"
HELDOUT = "held-out prompts: blue, underlined"


def grid(
    rows: Mapping[str, np.ndarray],
    columns: Sequence[str],
    *,
    title: str,
    cell: int = 96,
    marked: Sequence[bool] = (),
) -> Image.Image:
    """Images in labelled rows: label -> uint8 (N, height, width, 3), `columns` the N prompts.

    Each image is scaled to `cell` pixels, by whole pixels if it is smaller. Prompts that are
    `marked` as held out stand in blue, with a line below, and the title says what that means. A
    long title is broken into lines.
    """
    font = ImageFont.load_default(FONT_SIZE)
    small = ImageFont.load_default(FONT_SIZE - 3)
    beside = LABEL_WIDTH if any(rows) else MARGIN
    table = beside + len(columns) * (cell + MARGIN)
    titles = _wrapped(title, table - 2 * MARGIN, font) or [""]
    header = (len(titles) + 1) * (FONT_SIZE + MARGIN) + 3 * FONT_SIZE
    note = HELDOUT if any(marked) else ""
    head = font.getlength(titles[0]) + (beside + 2 * MARGIN + font.getlength(note) if note else 0)
    width = max(table, int(head) + 2 * MARGIN)
    sheet = Image.new("RGB", (width, header + len(rows) * (cell + MARGIN)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(titles):
        draw.text((MARGIN, MARGIN + number * (FONT_SIZE + MARGIN)), line, fill="black", font=font)
    left = 2 * MARGIN + draw.textlength(titles[0], font=font)
    draw.text((left + beside, MARGIN), note, fill=MARK, font=font)
    for number, prompt in enumerate(columns):
        left = beside + number * (cell + MARGIN)
        lines = _wrapped(prompt, cell, small)[:3]
        top = header - MARGIN - len(lines) * FONT_SIZE
        is_marked = number < len(marked) and marked[number]
        fill = MARK if is_marked else "black"
        draw.text((left, top), "\n".join(lines), fill=fill, font=small, spacing=1)
        if is_marked:
            ends = [(left, header - 2), (left + cell, header - 2)]
            draw.line(ends, fill=MARK, width=2)
    for number, (label, images) in enumerate(rows.items()):
        top = header + number * (cell + MARGIN)
        draw.text((MARGIN, top + cell / 2), label, fill="black", font=font, anchor="lm")
        for column, image in enumerate(images[: len(columns)]):
            up = Image.Resampling.NEAREST if image.shape[0] < cell else Image.Resampling.LANCZOS
            picture = Image.fromarray(image).resize((cell, cell), up)
            sheet.paste(picture, (beside + column * (cell + MARGIN), top))
    return sheet


def stacked(sheets: Sequence[Image.Image]) -> Image.Image:
    """Sheets one below the other."""
    whole = Image.new("RGB", (max(s.width for s in sheets), sum(s.height for s in sheets)), "white")
    top = 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height
    return whole


def _wrapped(
    text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont
) -> list[str]:
    """Its lines; a word that is wider than one is broken."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        lines.append("")
        for sign in word:
            if lines[-1] and font.getlength(lines[-1] + sign) > width:
                lines.append("")
            lines[-1] += sign
    return lines
