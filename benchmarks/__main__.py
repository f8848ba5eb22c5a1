"""``python -m benchmarks``: kodak, bitsback, depth, progressive, speed, scaling, effort, exactness, same-bytes, theory,
readme, pca-train, training-speed, sweep."""

from pathlib import Path

import click

from vaecodec.folders import PICTURES

try:
    from . import (
        bitsback,
        depth,
        device_speed,
        effort,
        exactness,
        kodak,
        pca,
        progressive,
        same_bytes,
        scaling,
        speed,
        sweep,
        theory,
        training_speed,
    )
    from .codecs import CODECS
except ModuleNotFoundError as error:
    raise SystemExit(
        f"benchmarks: there is no {(error.name or '').partition('.')[0]}; pip install '.[bench]' brings it"
    ) from None

PHOTO, RESULTS = Path("tests/data/astronaut.png"), Path("benchmarks/results")
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
data_option = click.option(
    "--data",
    required=True,
    type=FOLDER,
    help="Folder of pictures.",
)

out_option = click.option(
    "--out",
    default=RESULTS,
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Results go to a folder in here with the name of the pictures' folder.",
)


def find_pictures(folder: Path) -> list[Path]:
    """The picture files directly in the folder, by name."""
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)
    if not files:
        raise click.ClickException(f"{folder} holds no pictures")
    return files


def parse_codecs(_context: click.Context, _parameter: click.Parameter, value: str) -> list[str]:
    """Comma-separated names of codecs."""
    names = value.split(",")
    if unknown := set(names) - set(CODECS):
        raise click.BadParameter(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(CODECS)}")
    return names


@click.group()
def main() -> None:
    """Rate, distortion and speed of vaecodec."""


@main.command("kodak")
@click.option(
    "--data",
    type=FOLDER,
    help="Folder of pictures. Default: the Kodak pictures, in $KODAK or where they usually are.",
)
@out_option
@click.option(
    "--codecs",
    default=",".join(CODECS),
    callback=parse_codecs,
    help="Those to measure; others come from earlier results. Default: all.",
)
def kodak_command(data: Path | None, out: Path, codecs: list[str]) -> None:
    """Rate, distortion and speed against other codecs, on Kodak or any other folder."""
    data = data or kodak.find_kodak()
    kodak.run(find_pictures(data), out / data.resolve().name, codecs)


@main.command("bitsback")
@data_option
@out_option
def bitsback_command(data: Path, out: Path) -> None:
    """Lossless rate, where its bits go, and the bound."""
    bitsback.run(find_pictures(data), out / data.resolve().name)


@main.command("depth")
@data_option
@out_option
def depth_command(data: Path, out: Path) -> None:
    """The same pictures with 8, 10, 12 and 16 bits a sample."""
    depth.run(find_pictures(data), out / data.resolve().name)


@main.command("progressive")
@data_option
@out_option
@click.option("--quality", default=75.0, show_default=True, help="Of the lossy files.")
@click.option("--lossless", "count", default=0, show_default=True, help="So many of the pictures without loss, too.")
def progressive_command(data: Path, out: Path, quality: float, count: int) -> None:
    """PSNR over the share of a progressive file that has been read, beside JPEG and JPEG XL."""
    progressive.run(find_pictures(data), out / data.resolve().name, quality, count)


@main.command("speed")
@data_option
@click.option("--quality", default=75.0, show_default=True, help="Quality of vaecodec.")
@click.option("--device", help="cpu or cuda: where vaecodec's time goes there, instead of the comparison.")
def speed_command(data: Path, quality: float, device: str | None) -> None:
    """Speed against CompressAI's mbt2018-mean, start-up time and peak memory."""
    if device:
        device_speed.run(find_pictures(data), quality, device)
    else:
        speed.run(find_pictures(data), quality)


@main.command("scaling")
@data_option
@out_option
def scaling_command(data: Path, out: Path) -> None:
    """Time and memory over the number of pixels."""
    scaling.run(find_pictures(data), out / data.resolve().name)


@main.command("effort")
@data_option
@out_option
@click.option("--efforts", default="0,1,3", show_default=True, help="Commas between them.")
@click.option("--count", default=2, show_default=True, help="How many of the pictures, evenly spaced.")
def effort_command(data: Path, out: Path, efforts: str, count: int) -> None:
    """What the efforts of the lossy encoder save, and their time."""
    files = find_pictures(data)
    effort.run(
        files[:: max(1, len(files) // count)][:count], out / data.resolve().name, [*map(int, efforts.split(","))]
    )


@main.command("exactness")
@data_option
def exactness_command(data: Path) -> None:
    """Compare what engines, with one thread and two, and coders make of files of both kinds, whole and of regions."""
    exactness.run(find_pictures(data))


@main.command("same-bytes")
@click.argument("picture", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--bpp", default=0.4, show_default=True, help="JPEG's bits per pixel, at least.")
@click.option("--box", nargs=4, type=int, required=True, help="The part to show: left top right bottom.")
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="PNG to write.")
def same_bytes_command(picture: Path, bpp: float, box: tuple[int, int, int, int], out: Path) -> None:
    """One picture as JPEG and as vaecodec in no more bytes."""
    same_bytes.run(picture, bpp, box, out)


@main.command("theory")
@click.option(
    "--data",
    required=True,
    type=FOLDER,
    help="Folder of photographs to train on.",
)
@click.option(
    "--pictures",
    type=FOLDER,
    help="Folder of photographs that are held out. Default: every tenth of --data, not trained on.",
)
@click.option(
    "--out",
    default="benchmarks/results/theory",
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the results.",
)
def theory_command(data: Path, pictures: Path | None, out: Path) -> None:
    """What theory says of autoencoders, PCA, the bound and the code, as experiments."""
    training = find_pictures(data)
    held_out = find_pictures(pictures) if pictures else training[::10]
    theory.run([file for file in training if file not in set(held_out)], held_out, out)


@main.command("readme")
@click.pass_context
@click.option("--data", type=FOLDER, help="As for kodak.")
@click.option(
    "--photographs",
    required=True,
    type=FOLDER,
    help="Folder to train the small networks of the theory on.",
)
@click.option("--held-out", type=FOLDER, help="As theory's --pictures.")
def readme_command(context: click.Context, data: Path | None, photographs: Path, held_out: Path | None) -> None:
    """Every figure and number of the README: kodak, bitsback, speed, same-bytes, theory."""
    data = data or kodak.find_kodak()
    context.invoke(kodak_command, data=data, codecs=[*CODECS])
    context.invoke(bitsback_command, data=data)
    context.invoke(speed_command, data=data)
    context.invoke(same_bytes_command, picture=PHOTO, bpp=0.3, box=(110, 0, 410, 300), out=RESULTS / "same_bytes.png")
    context.invoke(theory_command, data=photographs, pictures=held_out)


@main.command("pca-train")
@click.option(
    "--data",
    required=True,
    type=FOLDER,
    help="Folder of photographs to learn from, and the folders in it.",
)
@click.option(
    "--out",
    default=pca.PARAMETERS,
    show_default="the packaged weights",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File to write.",
)
def pca_train_command(data: Path, out: Path) -> None:
    """The parameters of the PCA codec."""
    pca.train(data, out)


@main.command("training-speed")
@click.argument("config", default="lossy")
@click.option("--data", type=FOLDER, help="Folder of pictures. Default: noise.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--seconds", default=20.0, show_default=True, help="For each phase.")
def training_speed_command(config: str, data: Path | None, device: str, seconds: float) -> None:
    """Megapixels a second of `vaecodec train` CONFIG, phase by phase."""
    training_speed.run(config, device, seconds, data)


@main.command("sweep")
@click.argument("folder", type=FOLDER)
@click.option("--max-pixels", default=100_000, show_default=True, help="Larger pictures are passed over.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="JSON to write.")
def sweep_command(folder: Path, max_pixels: int, out: Path | None) -> None:
    """Every picture below FOLDER without loss, compared with what a reader other than Pillow makes of it."""
    sweep.run(folder, max_pixels, out)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
