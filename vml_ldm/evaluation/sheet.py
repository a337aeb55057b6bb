"""Contact sheets: rows of images under each other, with names."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_GAP = 4
_FONT_SIZE = 14


def draw_sheet(
    rows: Sequence[tuple[str, Sequence[Image.Image]]], columns: Sequence[str], per_band: int = 10
) -> Image.Image:
    """Draw rows of images, all of one size, with row names at the left and column names on top.

    Args:
        rows: (name, one image for each column).
        columns: names; a name equal to the one before it is written once.
        per_band: columns side by side; what is left continues below, all rows again.

    Raises:
        ValueError: nothing to draw, or a row with another number of images than there are columns.
    """
    if not rows or not columns or any(len(images) != len(columns) for _, images in rows):
        lengths = [len(images) for _, images in rows]
        raise ValueError(f"rows of {lengths} images for {len(columns)} columns; expected as many, at least one.")
    font = ImageFont.load_default(_FONT_SIZE)
    margin = int(max(font.getlength(name) for name, _ in rows)) + 3 * _GAP
    width, height = rows[0][1][0].size
    bands = [range(start, min(start + per_band, len(columns))) for start in range(0, len(columns), per_band)]
    band_height = _FONT_SIZE + 2 * _GAP + len(rows) * (height + _GAP)
    sheet = Image.new("RGB", (margin + len(bands[0]) * (width + _GAP), len(bands) * band_height), "white")
    for number, band in enumerate(bands):
        corner = (margin, number * band_height)
        _draw_band(sheet, corner, [(name, [images[i] for i in band]) for name, images in rows], font)
        _draw_columns(sheet, corner, [columns[i] for i in band], width + _GAP, font)
    return sheet


def _draw_band(sheet: Image.Image, corner: tuple[int, int], rows, font) -> None:
    """Draw rows of images right of and below the corner, their names left of it."""
    pen = ImageDraw.Draw(sheet)
    left, top = corner[0], corner[1] + _FONT_SIZE + 2 * _GAP
    for name, images in rows:
        width, height = images[0].size
        pen.text((_GAP, top + height / 2), name, fill="black", font=font, anchor="lm")
        for column, image in enumerate(images):
            sheet.paste(image, (left + column * (width + _GAP), top))
        top += height + _GAP


def _draw_columns(sheet: Image.Image, corner: tuple[int, int], names: list[str], pitch: int, font) -> None:
    """Write column names right of the corner, each over the first column that has it."""
    pen = ImageDraw.Draw(sheet)
    for column, name in enumerate(names):
        if column == 0 or name != names[column - 1]:
            pen.text((corner[0] + column * pitch, corner[1] + _GAP), name, fill="black", font=font)
