"""What a picture's file says beside its pixels, in the forms in which a ``.vae`` file carries it.

Text, resolution and colour that are no profile are kept as PNG's chunks, which have a place for all of them, whatever
format they came from.
"""

from __future__ import annotations

import math
import struct
import zlib
from typing import IO, Any

from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from .boxes import colour_chunks, has_gain_map
from .gainmap import ISO, gain_map_of, other_pictures
from .reading import png_chunks

Chunk = tuple[bytes, bytes]

TEXT = frozenset({b"iTXt", b"tEXt", b"zTXt"})
COLOUR = frozenset({b"cHRM", b"cICP", b"cLLI", b"gAMA", b"mDCV", b"sRGB"})
RESOLUTION = frozenset({b"pHYs"})
KEPT = TEXT | COLOUR | RESOLUTION
FULL = b"sBIT"
"""Stands in a ``.vae`` file where white is 2**depth - 1, and not 65535; it is no metadata, and kept in any case."""
ELSEWHERE = frozenset({b"acTL", b"eXIf", b"fcTL", b"iCCP", b"sBIT", b"tRNS"})
"""In the pixels, the header or a section of their own."""

IPTC_RESOURCE, IPTC_TAG, PHOTOSHOP_TAG = 0x0404, 33723, 34377
XMP_KEYWORD = b"XML:com.adobe.xmp\0"
XMP_TAG, RESOLUTION_TAG = 700, 282
INCH = 0.0254  # metres
NOMINAL = tuple(struct.pack(">IIB", side, side, 1) for side in (2834, 2835, 3779, 3780))
"""Resolutions that say nothing: those of 72 and 96 dots an inch, which software writes that knows none."""
SEGMENT_MAX = 65533  # bytes in a segment of JPEG
TEXT_MAX = 2**24  # bytes of a text, unpacked

FOLDERS = (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)
DAMAGED = (ArithmeticError, AttributeError, LookupError, OSError, SyntaxError, TypeError, ValueError, struct.error)
"""What Pillow raises of damaged tags, and of those that it reads and does not write."""

# fmt: off
STRUCTURE = frozenset({
    254, 255, 256, 257, 258, 259, 262, 263, 264, 265, 266, 273, 274, 277, 278, 279, 284, 288, 289, 290, 291, 292, 293,
    297, 317, 320, 322, 323, 324, 325, 326, 327, 328, 330, 332, 334, 338, 339, 340, 341, 347, 512, 513, 514, 515, 517,
    518, 519, 520, 521, 529, 530, 531, 532, XMP_TAG, IPTC_TAG, PHOTOSHOP_TAG, 34675, 65537,
})
# fmt: on
"""Tags that say how a TIFF file stores its pixels, which Pillow has turned upright, or that have a section of their
own."""


def exif_of(picture: Image.Image) -> bytes:
    """Exif data, wherever the format keeps it; none, if they are damaged."""
    try:
        return _exif_of(picture)
    except DAMAGED:
        return b""


def _exif_of(picture: Image.Image) -> bytes:
    payload: Any = picture.info.get("exif")
    if isinstance(payload, Image.Exif):
        return payload.tobytes() if payload else b""
    if payload or "exif" in picture.info:
        return payload or b""
    tags = picture.getexif()
    if not set(tags) - STRUCTURE and not (274 in tags and "xmp" not in picture.info):
        return b""
    if picture.format != "TIFF":
        return tags.tobytes()
    kept = Image.Exif()
    for group in FOLDERS:
        if members := tags.get_ifd(group):
            kept.get_ifd(group).update(members)
    for tag, value in tags.items():
        if tag in STRUCTURE or tag in FOLDERS:
            continue
        kept[tag] = value
        try:
            kept.tobytes()
        except DAMAGED:
            del kept[tag]
    return kept.tobytes() if kept or any(map(kept.get_ifd, FOLDERS)) else b""


def iptc_of(picture: Any) -> bytes:
    """IPTC's records, from among Photoshop's resources or a tag of TIFF."""
    payload = picture.info.get("photoshop", {}).get(IPTC_RESOURCE)
    if picture.format == "TIFF":
        payload = picture.tag_v2.get(IPTC_TAG)
        if isinstance(payload, tuple):  # of the wrong type, in the order of the file
            order = ">" if picture.tag_v2.prefix == b"MM" else "<"
            payload = struct.pack(f"{order}{len(payload)}I", *payload)
        if payload is None:
            payload = picture.get_photoshop_blocks().get(IPTC_RESOURCE, {}).get("data")
    return payload if isinstance(payload, bytes) else b""


def chunks_of(picture: Any) -> list[Chunk]:
    """PNG's chunks for what Pillow has found in a file of any format."""
    info, made = picture.info, PngInfo()
    for key, value in getattr(picture, "text", {}).items() if picture.format == "PNG" else ():
        if key.encode("latin-1", "replace") + b"\0" != XMP_KEYWORD:
            add_text(made, key, value)
    comments = [data for name, data in getattr(picture, "applist", ()) if name == "COM"] or [info.get("comment")]
    for comment in comments:
        if isinstance(comment, bytes | str) and comment:
            add_text(made, "Comment", comment if isinstance(comment, str) else decoded(comment))
    chunks: list[Chunk] = [chunk[:2] for chunk in made.chunks]
    dpi = info.get("dpi")
    if info.get("jfif_unit") == 0 or (picture.format in ("JPEG", "MPO") and "jfif_unit" not in info):
        dpi = None  # what Pillow says instead comes from Exif, which is kept, or from nowhere
    if picture.format == "TIFF" and RESOLUTION_TAG not in picture.tag_v2:
        dpi = None  # Pillow's 1
    if dpi and all(math.isfinite(side) and 0 < side < 2**31 * INCH for side in map(float, dpi)):
        chunks.append((b"pHYs", struct.pack(">IIB", *(int(float(side) / INCH + 0.5) for side in dpi), 1)))
    elif info.get("jfif_unit") == 0 and len(set(info["jfif_density"])) > 1 and all(info["jfif_density"]):
        chunks.append((b"pHYs", struct.pack(">IIB", *info["jfif_density"], 0)))
    if picture.format == "PNG":
        if "gamma" in info:
            chunks.append((b"gAMA", struct.pack(">I", round(info["gamma"] * 1e5))))
        if "chromaticity" in info:
            chunks.append((b"cHRM", struct.pack(">8I", *(round(part * 1e5) for part in info["chromaticity"]))))
        if "srgb" in info:
            chunks.append((b"sRGB", bytes([info["srgb"]])))
    return chunks


def add_text(made: PngInfo, key: str, value: Any) -> None:
    if isinstance(value, str) and not hasattr(value, "lang") and not value.isascii():
        made.add_itxt(key, value)
    else:
        made.add_text(key, value)


def decoded(text: bytes) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError:
        return text.decode("latin-1")


def kept_chunks(file: IO[bytes]) -> list[Chunk]:
    """Of a PNG file, as they are."""
    file.seek(0)
    return [(kind, data) for kind, data in png_chunks(file) if kind in KEPT and not is_xmp(kind, data)]


def is_xmp(kind: bytes, data: bytes) -> bool:
    return kind == b"iTXt" and data.startswith(XMP_KEYWORD)


def packed(chunks: list[Chunk]) -> bytes:
    """The payload of their section: length, type and data of each, as in PNG."""
    return b"".join(len(data).to_bytes(4) + kind + data for kind, data in chunks)


def unpacked(payload: bytes) -> list[Chunk]:
    """The inverse. What follows the last whole chunk is passed over."""
    chunks, at = list[Chunk](), 0
    while at + 8 <= len(payload):
        end = at + 8 + int.from_bytes(payload[at : at + 4])
        if end > len(payload):
            break
        chunks.append((payload[at + 4 : at + 8], payload[at + 8 : end]))
        at = end
    return chunks


def text_of(kind: bytes, data: bytes) -> tuple[str, str]:
    """Keyword and text of a chunk, "" for what cannot be read."""
    key, _, rest = data.partition(b"\0")
    if kind == b"iTXt":
        packed_flag, rest = rest[:1], rest[2:]
        rest = rest.split(b"\0", 2)[-1]
    else:
        packed_flag, rest = (b"\1", rest[1:]) if kind == b"zTXt" else (b"\0", rest)
    if packed_flag == b"\1":
        try:
            rest = zlib.decompressobj().decompress(rest, TEXT_MAX)
        except zlib.error:
            rest = b""
    return key.decode("latin-1"), decoded(rest) if kind == b"iTXt" else rest.decode("latin-1")


def save_options(info: dict[Any, Any], format: str) -> dict[str, Any]:
    """Arguments for Pillow's ``save`` that put metadata, as ``carried`` gives it, where a format has a place for it."""
    options = {key: info[key] for key in ("exif", "icc_profile", "xmp") if info.get(key)}
    chunks = unpacked(info.get("png_chunks") or b"")
    for kind, data in chunks:
        if kind in RESOLUTION and len(data) == 9 and data[8] == 1:
            options["dpi"] = tuple(side * INCH for side in struct.unpack_from(">II", data))
    comments = [text for key, text in (text_of(*chunk) for chunk in chunks if chunk[0] in TEXT) if key == "Comment"]
    if format == "PNG":
        options["pnginfo"] = PngInfo()
        for kind, data in chunks:
            if kind in TEXT | COLOUR:
                options["pnginfo"].add(kind, data)
        if "xmp" in options:  # which Pillow reads under one name and writes under another
            options["pnginfo"].add(b"iTXt", XMP_KEYWORD + b"\0\0\0\0" + options.pop("xmp"))
    elif format == "TIFF":
        tags = Image.Exif()
        tags.load(options.pop("exif", b""))
        for tag, key in ((XMP_TAG, "xmp"), (IPTC_TAG, "iptc")):
            if info.get(key):
                tags[tag] = info[key]
        options |= {"exif": tags} if tags else {}
        options.pop("xmp", None)
        if RESOLUTION_TAG in tags:
            options.pop("dpi", None)
    if format in ("JPEG", "MPO") and "exif" in options:
        options["exif"] = b"Exif\0\0" + options["exif"].removeprefix(b"Exif\0\0")  # which not all formats have
    if format in ("JPEG", "MPO") and info.get("iptc"):
        records = info["iptc"] + b"\0" * (len(info["iptc"]) % 2)
        block = b"Photoshop 3.0\0" + b"8BIM" + struct.pack(">HHI", IPTC_RESOURCE, 0, len(info["iptc"])) + records
        if len(block) <= SEGMENT_MAX:
            options["extra"] = b"\xff\xed" + struct.pack(">H", len(block) + 2) + block
    if format in ("GIF", "JPEG", "JPEG2000", "MPO") and comments:
        comment = comments[0].encode()
        options |= {"comment": comment} if len(comment) <= SEGMENT_MAX else {}
    return options


def tags_of(payload: bytes) -> set[tuple[int, int]]:
    """Folder and number of all that is said in Exif data, but for what says how a file stores its pixels."""
    exif = Image.Exif()
    try:
        exif.load(payload)
        folders = {0: dict(exif), **{int(group): exif.get_ifd(group) for group in FOLDERS}}
    except DAMAGED:
        return {(0, 0)}
    return {(group, tag) for group, folder in folders.items() for tag in set(folder) - STRUCTURE - {*FOLDERS}}


def lost(info: dict[Any, Any], file: IO[bytes]) -> list[str]:
    """What of a picture's metadata is not in the file that was written of it."""
    if not any(info.get(key) for key in ("exif", "icc_profile", "xmp", "iptc", "png_chunks", "gain_map")):
        return []  # a large picture leaves no room for a second copy of its pixels
    file.seek(0)
    written: Any = Image.open(file)
    written.load()
    chunks = kept_chunks(file) if written.format == "PNG" else chunks_of(written)
    names = [key for key in ("icc_profile", "xmp", "iptc") if info.get(key)]
    missing = [key for key in names if not (written.info.get(key) or (key == "iptc" and iptc_of(written)))]
    chunks += colour_chunks(file) if written.format in ("AVIF", "HEIF") else []
    missing += ["gain_map"] if info.get("gain_map") and not gain_map_of(written, file) else []
    if tags_of(info.get("exif") or b"") - tags_of(exif_of(written)):
        missing.insert(0, "exif")
    before = unpacked(info.get("png_chunks") or b"")
    texts = {text_of(*chunk) for chunk in chunks if chunk[0] in TEXT}
    colours = {kind for kind, _ in chunks} | ({b"sRGB"} if info.get("icc_profile") else set())
    if any(kind in TEXT and text_of(kind, data) not in texts for kind, data in before):
        missing.append("text")
    kept = any(kind in RESOLUTION for kind, _ in chunks)
    if not kept and any(kind in RESOLUTION and data not in NOMINAL for kind, data in before):
        missing.append("dpi")
    return missing + (["colour"] if any(kind in COLOUR - colours for kind, _ in before) else [])


def left_out(file: IO[bytes]) -> list[str]:
    """What a picture's file says that no ``.vae`` file carries, in words."""
    if file.closed:  # by one of Pillow's readers
        return []
    file.seek(0)
    picture: Any = Image.open(file)
    if picture.format == "PNG":
        file.seek(0)
        kinds = {kind for kind, _ in png_chunks(file)} - KEPT - ELSEWHERE
        return [f"PNG's {kind.decode('latin-1')}" for kind in sorted(kinds) if kind[0] & 0x20]
    words = set[str]()
    try:
        _exif_of(picture)
    except DAMAGED:
        words.add("its Exif data, which are damaged")
    if picture.format in ("AVIF", "HEIF") and has_gain_map(file):
        words.add("its gain map")
    others = [] if len(other_pictures(picture, file)) == 1 and gain_map_of(picture, file) else ["its other pictures"]
    for name, data in getattr(picture, "applist", ()):
        known = {"APP0": b"JF", "APP2": b"ICC_PROFILE\0", "APP13": b"Photoshop 3.0\0", "APP14": b"Adobe", "COM": b""}
        if data.startswith(b"http://ns.adobe.com/xmp/extension/"):
            words.add("extended XMP")
        elif name == "APP2" and data.startswith(b"MPF\0"):
            words.update(others)
        elif name == "APP2" and data.startswith(ISO):
            continue
        elif not data.startswith((b"Exif", b"http://ns.adobe.com/xap/1.0/")) and not data.startswith(
            known.get(name, b"\xff" * 99)
        ):
            words.add(f"JPEG's {name}")
    tiff = picture.format == "TIFF"
    resources = picture.get_photoshop_blocks() if tiff else picture.info.get("photoshop", {})
    if set(resources) - {IPTC_RESOURCE, 0x03ED, 0x0425}:  # resolution and a digest of IPTC's records
        words.add("Photoshop's resources")
    if tiff and 330 in picture.tag_v2:
        words.add("its other pictures")
    return sorted(words)
