"""Pictures to measure on, and a store of what has been measured."""

import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image


@dataclass(frozen=True)
class Picture:
    """name: of its file. image: 8-bit RGB without metadata, so that all codecs get the same. digest: of its pixels."""

    name: str
    image: Image.Image
    digest: str

    @property
    def pixels(self) -> int:
        return self.image.width * self.image.height


def open_picture(file: Path) -> Picture:
    """The picture of a file, as 8-bit RGB. Raises OSError if Pillow cannot read it."""
    image = Image.open(file).convert("RGB")
    image.info.clear()
    digest = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
    return Picture(file.stem, image, digest)


@dataclass(frozen=True)
class Cache:
    """Results that take long, as JSON files named by the hash of what they depend on."""

    folder: Path

    def __call__(self, key: object, compute: Callable[[], Any]) -> Any:
        """What is stored for ``key``, computed and stored if there is nothing yet."""
        path = self.folder / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.json"
        if not path.exists():
            value = compute()
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{threading.get_ident()}")
            partial.write_text(json.dumps(value), "utf-8")
            partial.replace(path)  # an interrupted run leaves nothing half written
        return json.loads(path.read_text("utf-8"))
