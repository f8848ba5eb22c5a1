"""report.html: tables, plots, and pictures to compare at equal bytes; one file, which loads nothing."""

import base64
import html
import io
import json
import os
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from vaecodec.metrics import compare, psnr

from .codecs import Codec
from .pictures import Cache, Picture

BPP = 0.3
PICTURES = 6
SIDE = 768
"""Pixels: of pictures with a longer side the middle is shown."""
PAGE = Path(__file__).with_name("report_page.html")

View = dict[str, Any]
"""A picture as the page gets it: name, width and height of what is shown, and versions, the original first."""


def views(codecs: Sequence[Codec], pictures: Sequence[Picture], cache: Cache) -> list[View]:
    """Up to PICTURES pictures, spread over all. No time is measured here, so all cores are used."""
    chosen = pictures[:: -(-len(pictures) // PICTURES)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda picture: view(codecs, picture, cache), chosen)
        return list(tqdm(found, total=len(chosen), desc="report"))


def view(codecs: Sequence[Codec], picture: Picture, cache: Cache) -> View:
    """One picture by every codec, in no more bytes than vaecodec, or the first codec, needs for BPP at the most."""
    budget, versions = int(BPP * picture.pixels / 8), []
    for codec in sorted(codecs, key=lambda codec: codec.name != "vaecodec"):
        key = ["equal bytes, seen", SIDE, *codec.identity, picture.digest, budget]
        versions.append(cache(key, lambda codec=codec, budget=budget: nearest_below(codec, picture, budget)))  # type: ignore[misc]
        budget = min(budget, versions[0]["bytes"])
    shown = middle(picture.image)
    original = {"title": "original", "bytes": 3 * picture.pixels, "bpp": 24, **embedded(shown)}
    return {"name": picture.name, "width": shown.width, "height": shown.height, "versions": [original, *versions]}


def nearest_below(codec: Codec, picture: Picture, budget: int) -> dict[str, Any]:
    """The picture at the quality whose file is the largest within ``budget`` bytes, or at the lowest quality there is.

    Sizes are taken to grow along ``codec.scale``.
    """
    after = bisect_right(codec.scale, budget, key=lambda quality: len(codec.encode(picture.image, quality)))
    quality = codec.scale[max(after - 1, 0)]
    data = codec.encode(picture.image, quality)
    decoded = codec.decode(data)
    likeness = compare(picture.image, decoded)
    return {
        "title": codec.title,
        "quality": quality,
        "bytes": len(data),
        "bpp": 8 * len(data) / picture.pixels,
        "psnr": psnr(picture.image, decoded),
        "ms_ssim": likeness.ms_ssim,
        "ssimulacra2": likeness.ssimulacra2,
        **embedded(middle(decoded)),
    }


def middle(picture: Image.Image) -> Image.Image:
    """At most SIDE x SIDE pixels."""
    width, height = (min(side, SIDE) for side in picture.size)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def embedded(picture: Image.Image) -> dict[str, Any]:
    """A JPEG copy: much smaller than PNG and, at this quality, as good to the eye. copy_psnr: how near it is."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=95, subsampling="4:4:4", optimize=True)
    copy = Image.open(file).convert("RGB")
    return {"source": data_uri("image/jpeg", file.getvalue()), "copy_psnr": psnr(picture, copy)}


def data_uri(media_type: str, data: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def html_table(rows: list[list[str]]) -> str:
    """The head first; the first column names the row."""
    head, *body = rows
    lines = ["<tr>" + "".join(f"<th scope=col>{html.escape(cell)}</th>" for cell in head) + "</tr>"]
    for name, *cells in body:
        numbers = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        lines.append(f"<tr><th scope=row>{html.escape(name)}</th>{numbers}</tr>")
    return "<div class=scroll><table>" + "\n".join(lines) + "</table></div>"


def page(title: str, tables: list[list[list[str]]], plots: list[Path], views: list[View]) -> str:
    """The whole of report.html. tables: rows of cells, the head first. plots: SVG files."""
    copies = [version["copy_psnr"] for view in views for version in view["versions"]]
    drawn = (
        f'<img class=plot alt="{path.stem}" src="{data_uri("image/svg+xml", path.read_bytes())}">' for path in plots
    )
    parts = {
        "TITLE": html.escape(title),
        "FIRST": html.escape(views[0]["versions"][1]["title"]) if views else "",
        "COPIES": f"{min(copies):.1f}" if copies else "",
        "BPP": f"{BPP:g}",
        "TABLES": "\n".join(map(html_table, tables)),
        "PLOTS": "\n".join(drawn),
        "VIEWS": json.dumps(views).replace("</", "<\\/"),
    }
    text = PAGE.read_text("utf-8")
    for name, part in parts.items():
        text = text.replace(f"<!--{name}-->", part)
    return text
