"""Pictures to bytes and back, and the weights file that this rests on."""

import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, picture, same, saved, small_model
from hypothesis import given, settings, strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import vaecodec.exact
import vaecodec.lossy.tile
from bitstream import (
    AnsStack,
    CorruptError,
    Kind,
    LimitError,
    Limits,
    Mode,
    VersionError,
    gaussian_tables,
    pack,
    unpack,
)
from vaecodec import Codec, weights as weights_module
from vaecodec.image import ImageError
from vaecodec.kinds import load
from vaecodec.lossy.coder import LossyCoder
from vaecodec.lossy.grid import Band, Missing
from vaecodec.lossy.layers import SCALES, scale_of
from vaecodec.lossy.model import LossyModel
from vaecodec.lossy.tile import quantised
from vaecodec.lossy.weights import LossyWeights, save_lossy
from vaecodec.tiles import Box
from vaecodec.weights import WeightsError

CPU = torch.device("cpu")
TABLES = gaussian_tables(scale_of(torch.arange(SCALES).double()).numpy(), escape=True)
SIZES = [(1, 1), (1, 70), (70, 1), (17, 33), (31, 15), (64, 64), (130, 65)]


# Round trips


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("size", SIZES)
def test_round_trip(tiny: Codec, size: tuple[int, int], mode: str) -> None:
    decoded = tiny.decompress(tiny.compress(picture(*size, mode)))
    assert (decoded.size, decoded.mode) == (size, mode)


@settings(max_examples=15)
@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from(["L", "RGB"]), st.integers(0, 10000))
def test_any_size_and_quality(tiny: Codec, width: int, height: int, mode: str, hundredths: int) -> None:
    data = tiny.compress(picture(width, height, mode, hundredths), hundredths / 100)
    header, decoded = unpack(data).header, tiny.decompress(data)
    assert (header.width, header.height, header.quality) == (width, height, hundredths)
    assert (decoded.size, decoded.mode) == ((width, height), mode)


@pytest.mark.parametrize("colour", ["black", "white", "red"])
def test_flat_pictures(tiny: Codec, colour: str) -> None:
    image = Image.new("RGB", (40, 24), colour)
    assert tiny.decompress(tiny.compress(image, 100)).size == image.size


def test_pictures_resemble_what_went_in(tiny: Codec) -> None:
    image = picture(96, 80)
    other = tiny.decompress(tiny.compress(picture(96, 80, seed=1), 100))
    decoded = tiny.decompress(tiny.compress(image, 100))
    target = np.asarray(image, float)
    assert np.abs(np.asarray(decoded, float) - target).mean() < np.abs(np.asarray(other, float) - target).mean() / 2


def test_decoder_computes_from_the_bytes_what_the_encoder_saw(torch_tiny: Codec) -> None:
    """Both give every context network the same inputs, bit for bit, and code the same symbols."""
    seen: list[Tensor] = []

    def record(_module: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen.extend(argument.clone() for argument in arguments)

    hooks = [context.register_forward_pre_hook(record) for context in torch_tiny.lossy.model.context]
    data = torch_tiny.compress(picture(75, 53), 60)
    encoder = [*seen]
    seen.clear()
    torch_tiny.decompress(data)
    for hook in hooks:
        hook.remove()
    assert len(encoder) == len(seen) == 12
    assert all(torch.equal(a, b) for a, b in zip(encoder, seen, strict=True))
    assert any(y_hat.any() for y_hat in seen[1::3])


def test_symbols_pushed_are_the_symbols_popped(tiny: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[Any] = []
    popped: list[Any] = []
    push, pop = AnsStack.push, AnsStack.pop

    def spy_push(self: AnsStack, values: Any, tables: Any, ids: Any, locs: Any = None) -> None:
        if tables is tiny.lossy.tables:
            pushed.append((values, ids))
        push(self, values, tables, ids, locs)

    def spy_pop(self: AnsStack, tables: Any, ids: Any, locs: Any = None) -> Any:
        values = pop(self, tables, ids, locs)
        if tables is tiny.lossy.tables:
            popped.append((values, ids))
        return values

    monkeypatch.setattr(AnsStack, "push", spy_push)
    monkeypatch.setattr(AnsStack, "pop", spy_pop)
    tiny.decompress(tiny.compress(picture(75, 53), 60))
    assert len(pushed) == len(popped) == 5  # hyper-latents and four steps
    for (values, ids), (got, got_ids) in zip(reversed(pushed), popped, strict=True):
        assert (values == got).all() and (ids == got_ids).all()


# Tiles


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("size", [(64, 64), (65, 64), (130, 200), (1, 129)])
def test_tiles_round_trip(tiny: Codec, size: tuple[int, int]) -> None:
    data = tiny.compress(picture(*size))
    assert len(unpack(data).tiles) == -(-size[0] // 64) * -(-size[1] // 64)
    assert tiny.decompress(data).size == size


@pytest.mark.usefixtures("small_tiles")
def test_tiles_leave_no_seam(tiny: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Synthesis tile by tile gives exactly the pixels of synthesis in one piece; with no margin it would not."""
    data = tiny.compress(picture(200, 150), 80)
    grid, pop, boxes = Box(0, 0, 10, 13), LossyCoder._pop, list[Box]()
    band = Band(16, grid)
    band.move(0, grid.bottom)

    def spy(self: LossyCoder, box: Box, *others: Any) -> Any:
        stream, alpha = pop(self, box, *others)
        band.values[:, *box.within(grid)] = stream
        boxes.append(box)
        return stream, alpha

    monkeypatch.setattr(LossyCoder, "_pop", spy)
    tiled = np.asarray(tiny.decompress(data))
    assert len(boxes) == 4 * 3
    coder, header = LossyCoder(tiny.lossy), unpack(data).header
    whole = coder.synthesised(band, grid, header, Missing(64, set()))
    assert (tiled == whole[:150, :200]).all()
    monkeypatch.setattr(tiny.lossy, "margin", 0)
    without = np.asarray(tiny.decompress(data))
    assert (without != whole[:150, :200]).any()


@pytest.mark.usefixtures("small_tiles")
def test_a_tile_does_not_depend_on_the_bytes_of_others(tiny: Codec) -> None:
    image = picture(128, 64)
    file = unpack(tiny.compress(image))
    changed = image.copy()
    changed.paste(0, (120, 0, 128, 64))  # beyond the margin of the first tile
    assert unpack(tiny.compress(changed)).tiles[0] == file.tiles[0]


def test_the_tile_size_is_read_from_the_file(tiny: Codec) -> None:
    data = Codec("cpu", TINY, tile=128).compress(picture(200, 150))
    for side in (0, 63, 2112):
        with pytest.raises(ValueError, match=f"tile {side}"):
            Codec("cpu", tile=side)
    assert unpack(data).header.tile == 128 and tiny.decompress(data).size == (200, 150)


# What else a file carries


def test_metadata_is_carried_verbatim(tiny: Codec) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    payload = {"exif": exif.tobytes(), "icc_profile": bytes(range(256)) * 4, "xmp": b"<x:xmpmeta/>"}
    image = Image.open(io.BytesIO(saved(picture(20, 10), "JPEG", **payload)))
    decoded = tiny.decompress(tiny.compress(image))
    assert {key: decoded.info[key] for key in payload} == {key: image.info[key] for key in payload}
    assert decoded.info["icc_profile"] == payload["icc_profile"] and decoded.getexif()[0x0112] == 6
    assert decoded.size == (20, 10)  # orientation is not applied


def test_pictures_without_metadata_gain_none(tiny: Codec) -> None:
    data = tiny.compress(picture(20, 10))
    assert unpack(data).sections == () and tiny.decompress(data).info == {}


# Bytes


def test_bytes_are_deterministic_and_the_picture_is_left_alone(tiny: Codec) -> None:
    image, again = picture(50, 40), picture(50, 40)
    data = tiny.compress(image)
    assert tiny.compress(image) == data == Codec("cpu", TINY).compress(again)
    assert same(image, again)


def test_python_and_constriction_write_and_read_the_same_bytes(tiny: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("constriction")
    files, pictures = [], []
    for coder in ("constriction", "numpy"):
        monkeypatch.setenv("VAECODEC_CODER", coder)
        files.append(tiny.compress(picture(50, 40), 90))
        pictures.append(tiny.decompress(files[0]))
    assert files[0] == files[1] and same(*pictures)


def test_several_threads_share_a_codec(tiny: Codec) -> None:
    images = [picture(40 + seed, 30, seed=seed) for seed in range(6)]
    files = [tiny.compress(image) for image in images]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(tiny.compress, images)) == files
        for decoded, file in zip(pool.map(tiny.decompress, files), files, strict=True):
            assert same(decoded, tiny.decompress(file))


def test_global_settings_of_torch_are_left_alone(tiny: Codec) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        inside = tiny.compress(picture(40, 30))
        assert torch.is_autocast_enabled("cpu")
    assert torch.is_grad_enabled() and inside == tiny.compress(picture(40, 30))


def test_progress_covers_the_picture(tiny: Codec, small_tiles: None) -> None:
    done: list[int] = []
    data = tiny.compress(picture(128, 64), progress=done.append)
    tiny.decompress(data, progress=done.append)
    assert done == [64 * 64] * 4


# Alpha, grey and more than 8 bits


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_alpha_is_kept_without_loss_and_colours_are_those_of_an_opaque_file(
    tiny: Codec, small_tiles: None, mode: str
) -> None:
    image, opaque = picture(150, 90, mode), picture(150, 90, mode[:-1])
    image.putalpha(picture(150, 90, "L", seed=1))
    decoded = tiny.decompress(tiny.compress(image, 60))
    assert decoded.mode == mode and decoded.size == image.size
    assert same(decoded.getchannel("A"), image.getchannel("A"))
    assert same(decoded.convert(opaque.mode), tiny.decompress(tiny.compress(opaque, 60)))
    part = tiny.decompress(tiny.compress(image, 60), region=(50, 30, 70, 41))
    assert same(part, decoded.crop((50, 30, 120, 71)))


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("depth", [10, 16])
def test_deep_samples_are_those_of_8_bits_with_finer_steps(tiny: Codec, channels: int, depth: int) -> None:
    peak = 2**depth - 1
    shallow = np.asarray(picture(50, 40, {1: "L", 3: "RGB", 4: "RGBA"}[channels])).reshape(40, 50, channels)
    samples = np.rint(shallow * (peak / 255)).astype(np.uint16)
    data = tiny.compress(samples, 80, depth=depth)
    decoded, coarse = tiny.decode_array(data), tiny.decode_array(tiny.compress(shallow, 80))
    assert decoded.dtype == np.uint16 and decoded.max() <= peak and unpack(data).header.depth == depth
    assert np.abs(decoded[..., :3] * (255 / peak) - coarse[..., :3]).mean() < 0.5
    assert len(np.unique(decoded[..., 0])) > 256 or depth == 10
    assert np.array_equal(decoded[..., 3:], samples[..., 3:])
    if channels == 1:
        assert np.array_equal(np.asarray(tiny.decompress(data)), decoded[..., 0])
    with pytest.raises(ImageError, match="bits"):
        tiny.compress(samples, depth=depth - 1)


# What is refused


@pytest.mark.parametrize("quality", [-0.01, 100.01, float("nan"), float("inf")])
def test_qualities_out_of_range(tiny: Codec, quality: float) -> None:
    with pytest.raises(ValueError, match=r"quality|NaN"):
        tiny.compress(picture(4, 4), quality)


def test_pictures_that_cannot_be_carried(tiny: Codec) -> None:
    with pytest.raises(ImageError, match="CMYK"):
        tiny.compress(Image.new("CMYK", (4, 4)))
    with pytest.raises(LimitError):
        tiny.compress(Image.new("L", (2**17 + 1, 1)))
    with pytest.raises(LimitError):
        tiny.decompress(tiny.compress(picture(20, 10)), Limits(max_pixels=199))


def test_files_of_other_weights_kinds_modes_and_methods(tiny: Codec) -> None:
    file = unpack(tiny.compress(picture(20, 10)))
    for changes, error in (
        ({"model": bytes(16)}, WeightsError),
        ({"kind": Kind.LOSSLESS}, WeightsError),
        ({"kind": Kind.PCA}, WeightsError),
        ({"mode": Mode["RGBA"]}, CorruptError),
        ({"colour": 2}, VersionError),
    ):
        with pytest.raises(error):
            tiny.decompress(pack(replace(file.header, **changes), file.tiles))
    with pytest.raises(VersionError):
        tiny.decompress(pack(file.header, [replace(file.tiles[0], method=4)]))
    with pytest.raises(CorruptError):
        tiny.decompress(pack(file.header, [replace(file.tiles[0], crc=0)]))


# Weights


def exported(folder: Path, model: LossyModel) -> Path:
    path = folder / "small.safetensors"
    save_lossy(path, model, TABLES)
    return path


def identity(folder: Path, change: Callable[[LossyModel], object] = lambda _: None, tables: Any = TABLES) -> bytes:
    model = small_model()
    model.exact(True)
    with torch.no_grad():
        change(model)
    save_lossy(folder / "small.safetensors", model, tables)
    return load(folder / "small.safetensors", CPU).identity


def test_loaded_networks_are_those_that_were_trained(tmp_path: Path) -> None:
    model = small_model().eval()
    model.exact(True)
    lossy = load(exported(tmp_path, model), CPU)
    assert isinstance(lossy, LossyWeights)
    assert lossy.tables.digest_bytes() == TABLES.digest_bytes()
    for part in ("g_a", "h_a"):
        for name, tensor in getattr(model, part).state_dict().items():
            assert torch.equal(getattr(lossy.model, part).state_dict()[name], tensor.half().float())
    z, y_hat = torch.randn(1, 4, 3, 5) * 3, torch.randn(1, 16, 12, 20) * 3
    quality = torch.tensor([5000])
    with torch.no_grad():
        for networks in (model, lossy.model):
            networks.answer = [features := networks.h_s(z, quality)]
            for context in networks.context:
                networks.answer += context(features, y_hat, quality)
            networks.answer.append(networks.g_s(y_hat, quality))
    assert all(torch.equal(a, b) for a, b in zip(model.answer, lossy.model.answer, strict=True))


def test_identity_names_what_the_decoder_needs(tmp_path: Path) -> None:
    base = identity(tmp_path)
    assert len(base) == 16 and identity(tmp_path) == base
    assert identity(tmp_path, lambda m: m.g_a.stem.weight.mul_(2)) == base
    assert identity(tmp_path, lambda m: m.h_a.conv_a.bias.add_(1)) == base
    assert identity(tmp_path, lambda m: m.log_ratio.add_(1)) == base
    others = {
        identity(tmp_path, lambda m: m.g_s.head.bias.add_(1)),
        identity(tmp_path, lambda m: m.h_s.conv_a.weight.mul_(1.5)),
        identity(tmp_path, lambda m: m.context[3].conv_c.bias.add_(1)),
        identity(tmp_path, lambda m: m.log_inverse.add_(0.1)),
        identity(tmp_path, lambda m: m.z_mean.add_(1)),
        identity(tmp_path, lambda m: m.z_index.add_(1)),
        identity(tmp_path, tables=gaussian_tables(scale_of(torch.arange(SCALES) * 0.99).numpy(), escape=True)),
    }
    assert len(others | {base}) == 8


def tensors_of(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.mark.parametrize("part", ["h_s.conv_c.weight", "context.2.conv_a.weight", "g_s.head.bias"])
def test_a_changed_decoder_fails_the_self_test(tmp_path: Path, part: str) -> None:
    tensors, metadata = tensors_of(TINY)
    tensors[f"decoder.{part}"].view(-1)[::3] += 1
    path = tmp_path / "changed.safetensors"
    save_file(tensors, path, metadata | {"digest": weights_module.digest_of(tensors, metadata["config"]).hex()})
    with pytest.raises(WeightsError, match="self-test"):
        load(path, CPU)


@pytest.mark.parametrize("part", ["decoder.tables.lows", "decoder.z_mean", "decoder.inverse", "encoder.log_ratio"])
def test_any_changed_number_fails_the_checksum(tmp_path: Path, part: str) -> None:
    tensors, metadata = tensors_of(TINY)
    tensors[part].view(-1)[0] += 1
    path = tmp_path / "changed.safetensors"
    save_file(tensors, path, metadata)
    with pytest.raises(WeightsError, match="checksum"):
        load(path, CPU)


def test_missing_and_damaged_weights(tmp_path: Path) -> None:
    path, data = tmp_path / "some.safetensors", TINY.read_bytes()
    with pytest.raises(WeightsError, match="no weights at"):
        Codec("cpu", path)
    tensors, metadata = tensors_of(TINY)
    del tensors["decoder.z_mean"]
    damaged = (b"", b"text", data[:-100], data[:8] + b"x" + data[9:], b"\xff" * 8 + data[8:])
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(WeightsError, match="damaged"):
            Codec("cpu", path)
    for broken in ({}, {**metadata, "config": "{"}, {**metadata, "config": "[]"}, {"config": metadata["config"]}):
        save_file(tensors_of(TINY)[0], path, broken)
        with pytest.raises(WeightsError, match="damaged"):
            Codec("cpu", path)
    save_file(tensors, path, metadata)
    with pytest.raises(WeightsError, match="damaged"):
        Codec("cpu", path)
    with pytest.raises(WeightsError):
        Codec("cpu", tmp_path)  # a folder


def test_float64_takes_over_where_float32_fails_and_decodes_alike(tiny: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    known_answer = LossyWeights.known_answer

    def failing(lossy: LossyWeights) -> int:
        answer = known_answer(lossy)
        return answer if lossy.model.g_s.head.weight.dtype == torch.float64 else answer ^ 1

    monkeypatch.setattr(LossyWeights, "known_answer", failing)
    double = Codec("cpu", TINY, engine="torch")
    assert double.lossy.model.g_s.head.weight.dtype == torch.float64
    assert double.lossy.identity == tiny.lossy.identity
    for encoder in (tiny, double):
        data = encoder.compress(picture(75, 53), 70)
        assert same(tiny.decompress(data), double.decompress(data))


# The packaged weights


def psnr(a: Image.Image, b: Image.Image) -> float:
    return float(10 * np.log10(255**2 / ((np.asarray(a, float) - np.asarray(b, float)) ** 2).mean()))


def test_shipped_quality_and_rate_rise_together(shipped: Path, photo: Image.Image) -> None:
    codec, sizes, qualities = Codec("cpu", shipped), [], []
    photo = Image.fromarray(np.asarray(photo))  # without its ICC profile, which would count
    for quality in (0, 25, 50, 75, 100):
        data = codec.compress(photo, quality)
        sizes.append(len(data))
        qualities.append(psnr(photo, codec.decompress(data)))
    assert sizes == sorted(set(sizes)) and qualities == sorted(set(qualities))
    assert sizes[0] < 0.5 * photo.width * photo.height / 8 and qualities[-1] > 34


def test_shipped_entropy_networks_save_bytes(shipped: Path, photo: Image.Image) -> None:
    codec = Codec("cpu", shipped, engine="torch")
    plain = len(codec.compress(photo))

    def moved(argument: int) -> Callable[..., Any]:
        def hook(_module: torch.nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            changed = list(arguments)
            changed[argument] = changed[argument].flip(2, 3)
            return tuple(changed)

        return hook

    for argument, least in ((0, 1.05), (1, 1.02)):
        hooks = [context.register_forward_pre_hook(moved(argument)) for context in codec.lossy.model.context]
        assert len(codec.compress(photo)) > least * plain, ("features", "latents")[argument]
        for hook in hooks:
            hook.remove()


def test_shipped_weights_have_a_card_and_fit_the_budget(shipped: Path) -> None:
    for path in shipped.parent.glob("*.safetensors"):
        text = path.with_suffix(".md").read_text("utf-8")
        assert load(path, CPU).identity.hex() in text and "MIT" in text
    assert sum(path.stat().st_size for path in shipped.parent.iterdir()) <= 40e6


def test_rounding_goes_at_most_one_step_towards_zero(tiny: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    residual = np.linspace(-3, 3, 97, dtype=np.float32)[None, None]
    for table in (0, 20):
        ids = np.full(97, table, np.int32)
        plain = np.rint(residual.ravel())
        moved = np.abs(plain) - np.abs(quantised(tiny.lossy.tables, residual, ids))
        assert set(moved.tolist()) == {0, 1}
        with monkeypatch.context() as patch:
            patch.setattr(vaecodec.lossy.tile, "RATE_WEIGHT", 0.0)
            assert np.array_equal(quantised(tiny.lossy.tables, residual, ids), plain)


def test_cudnn_stays_off_until_the_last_thread_is_done() -> None:
    before = torch.backends.cudnn.enabled
    with vaecodec.exact._without_cudnn():
        with vaecodec.exact._without_cudnn():
            assert not torch.backends.cudnn.enabled
        assert not torch.backends.cudnn.enabled
    assert torch.backends.cudnn.enabled == before
