"""Pictures as commands want them. Pillow is imported where it is needed."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import IO, TYPE_CHECKING

from bitstream import Limits

from .. import folders
from . import files

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..image import DeepPicture


def with_a_picture(plan: files.Plan) -> files.Plan:
    """The plan. If it is one file, that is looked at before anything large is imported."""
    if len(plan.jobs) != 1 or plan.jobs[0].problem or plan.jobs[0].source == files.STANDARD:
        return plan
    from PIL import Image, UnidentifiedImageError

    from ..saving import lacking, load_plugins

    (job,) = plan.jobs
    if folders.special(job.source):
        return plan
    while True:
        try:
            Image.open(job.source).close()
        except UnidentifiedImageError:
            if not load_plugins():
                problem = f"not a picture that Pillow reads{lacking(job.source.suffix)}"
                return replace(plan, jobs=[replace(job, problem=problem)])
        except Exception:  # it will be said where it is read
            return plan
        else:
            return plan


def picture_in(file: IO[bytes], limits: Limits | None = None, suffix: str = "") -> Image | DeepPicture:
    """The picture that ``open_picture`` gives, by way of a plugin if Pillow alone gives none. suffix: of the file."""
    from ..image import ImageError, open_picture
    from ..saving import lacking, load_plugins

    try:
        return open_picture(file, limits)
    except ImageError as error:
        if load_plugins():
            file.seek(0)
            return picture_in(file, limits, suffix)
        raise ImageError(f"{error}{lacking(suffix)}") from None


def overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> int:
    """Pixels that two regions share."""
    sides = (min(a[i] + a[i + 2], b[i] + b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    return math.prod(max(side, 0) for side in sides)


def reduced(picture: Image | DeepPicture, factor: int) -> Image | DeepPicture:
    """Averages of factor x factor pixels; where alpha is, weighed by it."""
    from ..image import DeepPicture

    return picture.reduced(factor) if isinstance(picture, DeepPicture) else picture.reduce(factor)


@contextlib.contextmanager
def pillow_limit(limits: Limits) -> Iterator[None]:
    """Let Pillow open what the limits allow. Its own limit is the whole process's, so this is for commands alone."""
    from PIL import Image

    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, limits.max_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # what it warns of is refused
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before
