"""``python -m benchmarks.ray_folder IN OUT``: a folder of pictures, and those below it, compressed by Ray Data.

Each worker keeps one codec. OUT mirrors IN; on several machines, all have to see both. A file's bytes are those of
``vaecodec compress`` with the same options, device and threads, whichever worker makes it. What OUT holds already is
passed over, what fails is named and the rest goes on; then the exit code is 1.
"""

import io
import secrets
import time
from pathlib import Path
from typing import Any

import click
import ray
import torch
from PIL import Image, UnidentifiedImageError

from vaecodec import Codec
from vaecodec.folders import PICTURES

Batch = dict[str, Any]
"""Columns: arrays or lists of equal length."""


class Compress:
    """A worker. root, out: the folders. options: of ``Codec.compress``."""

    def __init__(self, root: Path, out: Path, device: str, threads: int, options: dict[str, Any]) -> None:
        torch.set_num_threads(threads)
        self.root, self.out, self.codec, self.options = root, out, Codec(device), options

    def __call__(self, batch: Batch) -> Batch:
        """Paths and contents of pictures to paths, pixels and errors, "" where a file has been written."""
        done = [self.attempt(path, data) for path, data in zip(batch["path"], batch["bytes"], strict=True)]
        return {"path": batch["path"], "pixels": [pixels for pixels, _ in done], "error": [error for _, error in done]}

    def attempt(self, path: str, data: bytes) -> tuple[int, str]:
        try:
            picture = Image.open(io.BytesIO(data))
            picture.load()  # PNG may have its metadata after the pixels
            packed = self.codec.compress(picture, **self.options)
            self.codec.decode_array(packed)  # as the command does: what cannot be read is not written
            write(target_of(Path(path), self.root, self.out), packed)
        except UnidentifiedImageError:
            return 0, "not a picture that Pillow reads"
        except Exception as error:  # whatever it is, the other files are none the worse for it
            return 0, f"{type(error).__name__}: {error}"
        return picture.width * picture.height, ""


def write(target: Path, data: bytes) -> None:
    """All of a file or, if the process dies, none of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".vaecodec-{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def target_of(path: Path, root: Path, out: Path) -> Path:
    return (out / path.relative_to(root)).with_suffix(".vae")


def planned(root: Path, out: Path) -> tuple[set[str], list[str]]:
    """The pictures that have no output yet, and a line for each whose output is another's."""
    todo, writers, problems = set[str](), dict[Path, Path](), list[str]()
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in PICTURES and path.is_file():
            target = target_of(path, root, out)
            if (first := writers.setdefault(target, path)) is not path:
                problems.append(f"{path}: {target} is what {first} is written to")
            elif not target.exists():
                todo.add(str(path))
    return todo, problems


@click.command()
@click.argument("root", metavar="IN", type=click.Path(exists=True, file_okay=False, resolve_path=True, path_type=Path))
@click.argument("out", type=click.Path(file_okay=False, resolve_path=True, path_type=Path))
@click.option("--quality", type=click.FloatRange(0, 100), default=75.0, show_default=True)
@click.option("--lossless", is_flag=True)
@click.option(
    "--device", default="auto", show_default=True, help="cpu, or auto: a GPU to each worker, if there are any."
)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="CPU threads of a worker.")
@click.option("--workers", type=click.IntRange(1), help="Default: one to a GPU or, without, to so many CPUs.")
def main(root: Path, out: Path, quality: float, lossless: bool, device: str, threads: int, workers: int | None) -> None:
    """Compress all pictures below IN to files below OUT, on every machine of a Ray cluster."""
    todo, problems = planned(root, out)
    for problem in problems:
        click.echo(problem, err=True)
    if not todo:
        raise click.exceptions.Exit(bool(problems))
    ray.init(ignore_reinit_error=True)  # the cluster of $RAY_ADDRESS, or this machine
    ray.data.DataContext.get_current().max_errored_blocks = -1  # files that cannot be read end up without a row
    gpus = 0 if device == "cpu" else int(ray.cluster_resources().get("GPU", 0))
    workers = workers or gpus or max(1, int(ray.cluster_resources()["CPU"]) // threads)
    start = time.perf_counter()
    # Reading takes no CPU of its own: the workers may hold them all.
    rows = ray.data.read_binary_files(sorted(todo), include_paths=True, num_cpus=0).map_batches(
        Compress,
        fn_constructor_args=(root, out, device, threads, {"quality": quality, "lossless": lossless}),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=threads,
        num_gpus=min(1, gpus),
    )
    pixels, failed, lost = 0, len(problems), set(todo)
    for row in rows.iter_rows():
        pixels += row["pixels"]
        lost.discard(row["path"])
        if row["error"]:
            failed += 1
            click.echo(f"{row['path']}: {row['error']}", err=True)
    for path in sorted(lost):
        click.echo(f"{path}: could not be read", err=True)
    failed += len(lost)
    seconds = time.perf_counter() - start
    done = len(todo) + len(problems) - failed
    click.echo(f"{done} files, {failed} failed; {pixels / 1e6 / seconds:.3g} MP/s with {workers} workers", err=True)
    if failed:
        raise click.exceptions.Exit(1)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.ray_folder")
