"""The command that writes a web page."""

from __future__ import annotations

from pathlib import Path

import click

from .files import Job
from .group import main
from .inout import written

INSTALLED = Path("node_modules", "onnxruntime-web", "dist")


@main.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--runtime",
    default=INSTALLED,
    show_default=True,
    type=click.Path(path_type=Path),
    help="Folder that holds ONNX Runtime Web, which `npm install onnxruntime-web` brings.",
)
@click.option(
    "--weights",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Exported weights beside the packaged ones; may be repeated. See VAECODEC_WEIGHTS, too.",
)
@click.option("--overwrite", is_flag=True, help="Replace files of an older page.")
def page(folder: Path, runtime: Path, weights: tuple[Path, ...], overwrite: bool) -> None:
    """Write a static web page to FOLDER that decodes .vae files in the browser, to the pixels that all others get.

    It needs a web server, and nothing of it but files: `python -m http.server --directory FOLDER` will do.
    """
    from ..page import RUNTIME, files_of

    for name in RUNTIME:
        if not (runtime / name).is_file():
            hint = "type `npm install onnxruntime-web` here, or name its folder `dist` with --runtime"
            raise click.ClickException(f"{runtime / name}: no such file; {hint}")
    if not overwrite and (folder / "index.html").exists():
        raise click.ClickException(f"{folder}: holds a page already; --overwrite replaces it")
    total, files = 0, list(files_of(runtime, weights))  # of weights that are damaged nothing is written
    for name, data in files:
        target = folder / name
        with written(Job(target, target, make_folder=True, replace=overwrite), data):
            total += len(data)
    click.echo(f"{folder}: {total / 1e6:.1f} MB, of which a visitor of index.html needs one weights file for each kind")
