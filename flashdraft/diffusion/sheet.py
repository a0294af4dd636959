"""A contact sheet: pictures in rows and columns, small ones enlarged, with a line or two about each
row.

Knows pictures and text. Does not know what they mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

__all__ = ["SheetRow", "contact_sheet", "enlarged"]

_SMALL, _LARGE = 112, 256  # pixels: no picture on a sheet is less wide, nor wider
_GAP = 8
_BETWEEN = 28  # groups of rows
_MARGIN = 24
_LABELS = 216  # pixels for a row's words
_PAPER, _INK, _FAINT, _LINE = "#ffffff", "#16181d", "#666c78", "#d5d8de"

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class SheetRow:
    """starts_group: a line is drawn above it."""

    title: str
    notes: Sequence[str]
    pictures: Sequence[Image.Image]
    starts_group: bool = False


def enlarged(picture: Image.Image, width: int) -> Image.Image:
    """At least so wide, by a whole factor, so that its pixels stay what they are."""
    factor = max(-(-width // picture.width), 1)
    if factor == 1:
        return picture
    size = (picture.width * factor, picture.height * factor)
    return picture.resize(size, Image.Resampling.NEAREST)


def contact_sheet(title: str, columns: Sequence[str], rows: Sequence[SheetRow]) -> Image.Image:
    """columns: what stands above each of them, as many as every row has pictures."""
    shown: list[list[Image.Image]] = []
    cell_width = cell_height = 0
    for row in rows:
        fitted = [_fitted(picture) for picture in row.pictures]
        cell_width = max(cell_width, *(picture.width for picture in fitted))
        cell_height = max(cell_height, *(picture.height for picture in fitted))
        shown.append(fitted)
    tops = _tops(rows, cell_height)
    width = 2 * _MARGIN + _LABELS + len(columns) * (cell_width + _GAP)
    sheet = Image.new("RGB", (width, tops[-1] + cell_height + _MARGIN), _PAPER)
    pen = ImageDraw.Draw(sheet)

    head = _shortened(title, _font(22), width - 2 * _MARGIN)
    pen.text((_MARGIN, _MARGIN), head, fill=_INK, font=_font(22))
    lefts = []
    for place, name in enumerate(columns):
        left = _MARGIN + _LABELS + place * (cell_width + _GAP)
        lefts.append(left)
        pen.text((left, tops[0] - 24), name, fill=_FAINT, font=_font(14))

    for row, top, pictures in zip(rows, tops, shown, strict=True):
        if row.starts_group:
            above = top - _GAP - _BETWEEN // 2
            pen.line((_MARGIN, above, width - _MARGIN, above), fill=_LINE)
        _write_label(pen, row, top, cell_height)
        for left, picture in zip(lefts, pictures, strict=True):
            sheet.paste(picture.convert("RGB"), (left, top))
    return sheet


def _tops(rows: Sequence[SheetRow], cell_height: int) -> list[int]:
    """Where each row begins."""
    tops = []
    top = _MARGIN + 72
    for row in rows:
        if row.starts_group:
            top += _BETWEEN
        tops.append(top)
        top += cell_height + _GAP
    return tops


def _write_label(pen: ImageDraw.ImageDraw, row: SheetRow, top: int, cell_height: int) -> None:
    """In the middle of the row's height."""
    line = 20
    at = top + max((cell_height - (len(row.notes) + 1) * line) // 2, 0)
    room = _LABELS - 16
    pen.text((_MARGIN, at), _shortened(row.title, _font(17), room), fill=_INK, font=_font(17))
    for number, note in enumerate(row.notes, start=1):
        words = _shortened(note, _font(14), room)
        pen.text((_MARGIN, at + 3 + number * line), words, fill=_FAINT, font=_font(14))


def _fitted(picture: Image.Image) -> Image.Image:
    if picture.width < _SMALL:
        return enlarged(picture, _SMALL)
    if picture.width > _LARGE:
        height = max(picture.height * _LARGE // picture.width, 1)
        return picture.resize((_LARGE, height), Image.Resampling.LANCZOS)
    return picture


def _shortened(text: str, font: _Font, room: int) -> str:
    """As much of it as there is room for, in pixels."""
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(f"{text}...") > room:
        text = text[:-1]
    return f"{text}..."


def _font(size: int) -> _Font:
    """The one that Pillow brings along."""
    return ImageFont.load_default(size)
