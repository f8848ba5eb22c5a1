"""One picture three times: the original, JPEG, and vaecodec in no more bytes than JPEG."""

import io
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vaecodec import Codec
from vaecodec.metrics import psnr

from .codecs import jpeg


def run(source: Path, bpp: float, box: tuple[int, int, int, int], out: Path) -> None:
    """Write a PNG with the part ``box`` (left, top, right, bottom) of each, at about ``bpp`` bits per pixel.

    JPEG gets the lowest quality that reaches the rate, vaecodec the highest quality that needs no more bytes than that.
    """
    picture = Image.open(source).convert("RGB")
    picture.info.clear()  # vaecodec would carry the ICC profile along and Pillow's JPEG would not
    pixels = picture.width * picture.height
    baseline = jpeg("4:2:0")
    for quality in range(min(map(int, baseline.qualities)), 101):
        packed_jpeg = baseline.encode(picture, quality)
        if 8 * len(packed_jpeg) >= bpp * pixels:
            break
    size, shown_jpeg = len(packed_jpeg), baseline.decode(packed_jpeg)
    codec = Codec(device="cpu")
    low, high = 0, 1000  # quality in tenths; sizes grow with it
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(codec.compress(picture, middle / 10)) <= size else (low, middle - 1)
    packed = codec.compress(picture, low / 10)
    shown = codec.decompress(packed)
    panels = [
        (picture, f"original, {24 * pixels // 8:,} bytes"),
        (shown_jpeg, f"JPEG, {size:,} bytes, {psnr(picture, shown_jpeg):.1f} dB"),
        (shown, f"vaecodec, {len(packed):,} bytes, {psnr(picture, shown):.1f} dB"),
    ]
    save(panels, box, out)


def save(panels: list[tuple[Image.Image, str]], box: tuple[int, int, int, int], out: Path) -> None:
    """The panels side by side, each with its caption above."""
    width, height, head = box[2] - box[0], box[3] - box[1], 24
    sheet = Image.new("RGB", (len(panels) * (width + 8) - 8, height + head), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for i, (panel, caption) in enumerate(panels):
        left = i * (width + 8)
        sheet.paste(panel.crop(box), (left, head))
        draw.text((left + 2, 3), caption, "black", font)
    file = io.BytesIO()
    sheet.save(file, "PNG", optimize=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(file.getvalue())
