"""The engine on ONNX Runtime gives what torch gives: every value of every exact network."""

import os
import pickle
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, TINY_LOSSLESS, in_bytes, packaged, python
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor

from vaecodec import kinds
from vaecodec.exact import interpolate
from vaecodec.lossless import layers as lossless
from vaecodec.lossless.heads import Phase
from vaecodec.lossless.layers import CHANNEL_ORDER, LATENT_UNIT, PHASES
from vaecodec.lossless.model import Level
from vaecodec.lossless.weights import LosslessWeights as Lossless
from vaecodec.lossy.layers import STREAM_MAX, STREAM_UNIT, UNIT
from vaecodec.lossy.numbers import stream_of
from vaecodec.lossy.weights import LossyWeights as Lossy
from vaecodec.training.export import add_graphs
from vaecodec.weights import WeightsError, digest_of, read

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from vaecodec import engine_onnx
from vaecodec.lossless import engine as lossless_engine
from vaecodec.lossless.engine import LosslessNetworks
from vaecodec.lossy.engine import KERNELS, LossyNetworks

CPU = torch.device("cpu")
QUALITIES = (0, 3333, 10000)


def with_graphs(source: Path, folder: Path) -> Path:
    path = Path(shutil.copy(source, folder))
    path.chmod(0o644)
    add_graphs(path)
    return path


def without_graphs(folder: Path) -> Path:
    """The small lossy weights as they were before there were graphs."""
    stored, path = read(TINY), folder / "before.safetensors"
    tensors = {name: tensor for name, tensor in stored.tensors.items() if not name.startswith("graph")}
    with safe_open(TINY, "np") as file:
        metadata = file.metadata()
    metadata["digest"] = digest_of(tensors, metadata["config"]).hex()
    save_file(tensors, path, metadata)
    return path


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("graphs")


@pytest.fixture(scope="session", params=["tiny", "packaged"])
def lossy(request: pytest.FixtureRequest, folder: Path) -> tuple[Lossy, LossyNetworks]:
    path = with_graphs(TINY if request.param == "tiny" else packaged("lossy"), folder)
    loaded = kinds.load(path, CPU)
    assert isinstance(loaded, Lossy)
    return loaded, LossyNetworks(path)


@pytest.fixture(scope="session", params=["tiny", "tiny bytes", "tiny bytes in float32", "packaged"])
def both(request: pytest.FixtureRequest, folder: Path) -> tuple[Lossless, LosslessNetworks]:
    if "bytes" in request.param:
        path = in_bytes(folder / "bytes.safetensors")
        add_graphs(path)
    else:
        path = with_graphs(TINY_LOSSLESS if request.param == "tiny" else packaged("lossless"), folder)
    loaded, networks = kinds.load(path, CPU), LosslessNetworks(path)
    assert isinstance(loaded, Lossless)
    if "float32" in request.param:
        networks.kernel = "float32"
    return loaded, networks


@pytest.fixture(scope="session")
def tiny_graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_graphs(TINY, tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_lossless_graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_graphs(TINY_LOSSLESS, tmp_path_factory.mktemp("tiny"))


def exact_kernels(networks: LossyNetworks) -> list[str]:
    """From the one that the self-test chose on: the fastest saturates on some machines."""
    return list(KERNELS)[list(KERNELS).index(networks.kernel) :]


def equal(x: NDArray[Any], reference: Tensor, unit: float) -> bool:
    """Integers and torch's multiples of a unit."""
    expected = (reference / unit).numpy()
    return expected.shape == x.shape and np.array_equal(x, expected)


@pytest.mark.parametrize("spread", [8, 200, 2**18])
@torch.no_grad()
def test_lossy_networks(lossy: tuple[Lossy, LossyNetworks], spread: int) -> None:
    w, networks = lossy
    c, rng = w.model.config, np.random.default_rng(spread)
    for hundredths, (rows, columns) in zip(QUALITIES, ((1, 1), (7, 9), (4, 13)), strict=True):
        q = torch.tensor([hundredths])
        z = rng.integers(-spread, spread + 1, (c.hyper_latent, -(-rows // 4), -(-columns // 4)), np.int32)
        reference = w.model.h_s(torch.from_numpy(z)[None].float() * UNIT, q)
        features = networks.features(z, hundredths)
        assert equal(features, reference[0], c.unit)
        features, reference = features[:, :rows, :columns], reference[:, :, :rows, :columns]
        y_hat = rng.integers(-spread, spread + 1, (c.latent, rows, columns), np.int32)
        for step, context in enumerate(w.model.context):
            mean, index = context(reference, torch.from_numpy(y_hat)[None].float() * c.unit, q)
            means, indices = networks.context(step, features, y_hat, hundredths)
            assert equal(means, mean[0], c.unit) and equal(indices, index[0], 1)
        stream = w.stream(torch.from_numpy(y_hat)[None].long(), q)
        steps = stream_of(y_hat, networks.gains(hundredths), networks.config.bits)
        assert equal(steps, stream[0], STREAM_UNIT)
        kernels = exact_kernels(networks)
        for networks.kernel in reversed(kernels):
            assert equal(networks.synthesise(steps, hundredths), w.model.g_s(stream, q)[0], 1 / 16)


@pytest.mark.parametrize("hundredths", QUALITIES)
@torch.no_grad()
def test_sums_at_their_limits(lossy: tuple[Lossy, LossyNetworks], hundredths: int) -> None:
    """Streams of limits alone drive pairs of 8-bit products past 2**15."""
    w, networks = lossy
    signs = np.random.default_rng(hundredths).choice([-1, 1], (w.model.config.latent, 6, 5))
    limits = (signs * STREAM_MAX).astype(np.int16)
    reference = w.model.g_s(torch.from_numpy(limits)[None].float() * STREAM_UNIT, torch.tensor([hundredths]))
    kernels = exact_kernels(networks)
    for networks.kernel in reversed(kernels):
        assert equal(networks.synthesise(limits, hundredths), reference[0], 1 / 16)


@pytest.mark.parametrize("hundredths", QUALITIES)
@torch.no_grad()
def test_lossy_encoder_is_near(lossy: tuple[Lossy, LossyNetworks], hundredths: int) -> None:
    """These networks are float: last digits differ, and with them now and then what a layer in 8 bits is given."""
    w, networks = lossy
    q, x = torch.tensor([hundredths]), np.random.default_rng(0).integers(0, 256, (3, 64, 128)).astype(np.float32)
    reference = w.quantiser_units(w.model.g_a(torch.from_numpy(x)[None], q), q)[0].numpy()
    kernels = exact_kernels(networks)
    for networks.kernel in reversed(kernels):
        y = networks.analyse(x, hundredths)
        assert np.square(y - reference).mean() < 1e-4 and np.isclose(y, reference, rtol=1e-3, atol=1e-3).mean() > 0.5
        masked = networks.analyse(x, hundredths, np.ones((4, 8), np.float32))
        assert np.square(masked - reference).mean() < 1e-4
    z = networks.hyper_analyse(y * 50, hundredths)
    assert np.allclose(z, w.model.h_a(torch.from_numpy(y)[None] * 50, q)[0].numpy(), rtol=1e-3, atol=1e-3)


def picture(kind: str, *shape: int) -> NDArray[np.uint8]:
    """Smooth with some noise, or limits alone."""
    rng = np.random.default_rng(len(kind))
    if kind == "limits":
        return rng.choice(np.array([0, 255], np.uint8), shape)
    slopes = np.add.outer(np.arange(shape[1]) * 3, np.arange(shape[2]) * 2)
    noisy: NDArray[np.uint8] = (slopes % 200 + rng.integers(0, 40, shape)).astype(np.uint8)
    return noisy


def phases_agree(state: Any, x: NDArray[np.uint8], phase: Phase) -> bool:
    """Mean, index and shape of all colours of a phase x [3, h, w]."""
    agree = True
    for k, c in enumerate(CHANNEL_ORDER):
        prediction = state.predict()
        state.see(x[c])
        mean = torch.from_numpy(x[c]) - phase.residual[0, k]
        expected = torch.stack([mean * 8, phase.scale[0, k], phase.shape[0, k]])
        agree &= equal(prediction, expected, 1)
    return agree


@pytest.mark.parametrize("kind", ["ordinary", "limits"])
@pytest.mark.parametrize("stripe", [1, 40, 4096])
@torch.no_grad()
def test_lossless_levels(
    both: tuple[Lossless, LosslessNetworks], kind: str, stripe: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lossless_engine, "STRIPE", stripe)
    w, networks = both
    c, rng = w.model.config, np.random.default_rng(stripe)
    unit, most = (lossless.BYTE_UNIT, lossless.BYTE_MAX) if c.in_bytes else (lossless.UNIT, lossless.HIDDEN_MAX)
    for depth, level in enumerate(w.model.levels):
        assert isinstance(level, Level)
        for rows, columns in ((7, 9), (1, 1), (2, 5)):
            x = picture(kind, 3, 2 * rows, 2 * columns)
            features = None
            if depth:
                features = rng.integers(0, most + 1, (c.features, rows, columns)).astype(c.kind)
            given = None if features is None else torch.from_numpy(features)[None].float() * unit
            phases, handed_on = level(torch.from_numpy(x)[None].float(), given)
            state = networks.level(depth, x[:, ::2, ::2], features)
            for name, phase in zip(PHASES, phases, strict=True):
                row, column = {"D": (1, 1), "B": (0, 1), "C": (1, 0)}[name]
                assert phases_agree(state, x[:, row::2, column::2], phase)
            if handed_on is not None:
                assert equal(state.features(), handed_on[0], unit)


@pytest.mark.parametrize("kind", ["ordinary", "limits"])
@pytest.mark.parametrize("spread", [3, 600])
@torch.no_grad()
def test_lossless_latents(both: tuple[Lossless, LosslessNetworks], kind: str, spread: int) -> None:
    w, networks = both
    vae, groups, rng = w.model.vae, len(w.model.config.latents), np.random.default_rng(spread)
    side = 2**groups
    x = picture(kind, 3, side, 3 * side)
    features, found = vae.inference(torch.from_numpy(x)[None].float()), networks.inference(x)
    above, known = None, None
    for g in range(groups - 1, -1, -1):
        assert equal(found[g], features[g][0], lossless.UNIT)
        prior = vae.prior_of(g, above, features[g])
        posterior = vae.posterior_of(g, above, features[g], torch.from_numpy(x)[None].float())
        rows, columns = features[g].shape[2:]
        for (mean, index), (means, indices) in (
            (prior, networks.prior(g, known, rows, columns)),
            (posterior, networks.posterior(g, known, found[g], x)),
        ):
            assert equal(means, mean[0], LATENT_UNIT / 4) and equal(indices, index[0], 1)
        z = rng.integers(-spread, spread + 1, posterior[0].shape[1:], np.int32)
        above = vae.descend(g, above, torch.from_numpy(z)[None].float() * LATENT_UNIT)
        known = networks.descend(g, known, z)
        assert equal(known.h, above.h[0], lossless.UNIT) and equal(known.linear, above.linear[0], lossless.OUT_UNIT)
    assert above is not None and known is not None
    for rows, columns in ((side, 3 * side), (side - 1, 2 * side + 1), (1, 1)):
        inside = x[:, :rows, :columns]
        likelihood = vae.likelihood(torch.from_numpy(x)[None].float(), above)
        cut = Phase(*(part[..., :rows, :columns] for part in likelihood))
        assert phases_agree(networks.likelihood(known, rows, columns), inside, cut)


def test_two_threads(tiny_graphs: Path, tiny_lossless_graphs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lossless_engine, "STRIPE", 40)
    for kind, path in ((LossyNetworks, tiny_graphs), (LosslessNetworks, tiny_lossless_graphs)):
        assert kind(path, threads=2).known_answer() == kind(path).known_answer()


@pytest.mark.parametrize("threads", [1, 2])
def test_used_from_several_threads(tiny_graphs: Path, tiny_lossless_graphs: Path, threads: int) -> None:
    for kind, path in ((LossyNetworks, tiny_graphs), (LosslessNetworks, tiny_lossless_graphs)):
        networks = kind(path, threads)
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda _, networks=networks: networks.known_answer(), range(8)))
        assert {f"{answer:08x}" for answer in answers} == {networks.answer}


def test_pickled(tiny_graphs: Path, tiny_lossless_graphs: Path) -> None:
    for networks in (LossyNetworks(tiny_graphs, 2), LosslessNetworks(tiny_lossless_graphs, 2)):
        other = pickle.loads(pickle.dumps(networks))
        assert (other.path, other.threads) == (networks.path, 2) and other.known_answer() == networks.known_answer()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("threads", [1, 2])
def test_forked(tiny_graphs: Path, tiny_lossless_graphs: Path, threads: int) -> None:
    code = f"""
import os, sys
from vaecodec.lossless.engine import LosslessNetworks
from vaecodec.lossy.engine import LossyNetworks
networks = [LossyNetworks(sys.argv[1], {threads}), LosslessNetworks(sys.argv[2], {threads})]
for _ in range(2):  # a child, and a child of a process that went on
    before = [each.known_answer() for each in networks]
    child = os.fork()
    if child == 0:
        os._exit(0 if [each.known_answer() for each in networks] == before else 1)
    assert os.waitpid(child, 0)[1] == 0
"""
    done = python(code, tiny_graphs, tiny_lossless_graphs)
    assert done.returncode == 0, done.stderr.decode()


def test_torch_is_not_imported(tiny_graphs: Path, tiny_lossless_graphs: Path) -> None:
    code = """
import sys
from vaecodec.lossless.engine import LosslessNetworks
from vaecodec.lossy.engine import LossyNetworks
LossyNetworks(sys.argv[1]), LosslessNetworks(sys.argv[2])
print(*sorted({"torch", "onnx"} & set(sys.modules)))
"""
    done = python(code, tiny_graphs, tiny_lossless_graphs)
    assert done.stdout.decode().split() == [], done.stderr.decode()


def test_few_sessions_are_kept(tiny_graphs: Path) -> None:
    networks = LossyNetworks(tiny_graphs)
    stream = np.ones((networks.config.latent, 2, 2), np.int16)
    first = networks.synthesise(stream, 100)
    for quality in range(200, 2000, 100):
        networks.synthesise(stream, quality)
    assert sum(key[0] == "synthesis" for key in networks._open) == engine_onnx.KEPT
    assert np.array_equal(networks.synthesise(stream, 100), first)


@pytest.mark.parametrize("broken", [0, 1, 2, 3])
def test_the_first_exact_kernel_of_lossless(broken: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels, computed = list(lossless_engine.KERNELS), LosslessNetworks.computed

    def saturating(self: LosslessNetworks, graph: str, inputs: dict[str, Any]) -> list[Any]:
        first, *others = computed(self, graph, inputs)
        return [first + (self.kernel in kernels[:broken] and "updates" in graph), *others]

    path = in_bytes(tmp_path / "bytes.safetensors")
    add_graphs(path)
    first = kernels.index(LosslessNetworks(path).kernel)  # of this machine
    monkeypatch.setattr(LosslessNetworks, "computed", saturating)
    if broken < len(kernels):
        assert LosslessNetworks(path).kernel == kernels[max(broken, first)]
    else:
        with pytest.raises(WeightsError, match="self-test"):
            LosslessNetworks(path)


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_the_first_exact_kernel_is_used(tiny_graphs: Path, broken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that saturate, or that leave out a bias, are passed over."""
    first = list(KERNELS).index(LossyNetworks(tiny_graphs).kernel)  # of this machine
    wrong, right = list(KERNELS)[:broken], list(KERNELS)[max(broken, first)]
    synthesise = LossyNetworks.synthesise

    def saturating(self: LossyNetworks, stream: NDArray[np.int16], quality: int) -> NDArray[np.int32]:
        x_hat = synthesise(self, stream, quality)
        x_hat[0, 0, 0] += self.kernel in wrong
        return x_hat

    monkeypatch.setattr(LossyNetworks, "synthesise", saturating)
    assert LossyNetworks(tiny_graphs).kernel == right


def test_no_exact_kernel(tiny_graphs: Path, tiny_lossless_graphs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, path in ((LossyNetworks, tiny_graphs), (LosslessNetworks, tiny_lossless_graphs)):
        monkeypatch.setattr(kind, "known_answer", lambda _: 1)
        with pytest.raises(WeightsError, match="self-test"):
            kind(path)


def test_damaged_graphs(tiny_graphs: Path, tmp_path: Path) -> None:
    data = bytearray(tiny_graphs.read_bytes())
    place = data.index(b"QLinearConv")
    assert data.count(b"QLinearConv") > 1
    data[place] ^= 1
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(data)
    with pytest.raises(WeightsError, match="checksum"):
        LossyNetworks(damaged)
    with pytest.raises(WeightsError, match="checksum"):
        kinds.load(damaged, CPU)
    damaged.write_bytes(data[: place - 1])
    with pytest.raises(WeightsError, match="damaged"):
        LossyNetworks(damaged)
    with pytest.raises(WeightsError, match="no graphs"):
        LossyNetworks(without_graphs(tmp_path))
    with pytest.raises(WeightsError, match="no weights"):
        LossyNetworks(tmp_path / "none.safetensors")


def test_graphs_leave_the_identity(tiny_graphs: Path, tiny_lossless_graphs: Path) -> None:
    for before, after in ((TINY, tiny_graphs), (TINY_LOSSLESS, tiny_lossless_graphs)):
        assert kinds.load(before, CPU).identity == kinds.load(after, CPU).identity
        with safe_open(after, "np") as file:
            once = file.metadata()
        add_graphs(after)
        with safe_open(after, "np") as file:
            assert file.metadata() == once  # its digest, too


def test_biases_between_knots() -> None:
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2, 9):
        knots = torch.randint(-(2**20), 2**20, (count, 5), generator=generator)
        for quality in (0, 1, 1249, 1250, 5000, 9999, 10000):
            expected = interpolate(knots, torch.tensor([quality])).numpy()
            assert np.array_equal(engine_onnx.at(knots.numpy(), quality), expected)
            some = interpolate(knots.float(), torch.tensor([quality])).numpy()
            assert np.allclose(engine_onnx.at(knots.float().numpy(), quality), some, rtol=1e-6)


def test_tables_are_those_of_the_models() -> None:
    """The engine does not import the modules that define them."""
    e = lossless_engine
    assert e.GIVEN_MAX == lossless.HIDDEN_MAX + 1
    assert np.array_equal(e.LOGARITHMS, (lossless.LOGARITHMS / lossless.UNIT).numpy())
    index = torch.arange(lossless.SCALES).float()
    assert torch.equal(torch.from_numpy(e.INVERSES * 64), (0.5 / lossless.scale_of(index) * 256).round())
    x = np.arange(-600, 601, dtype=np.int16).reshape(1, 1, -1)
    limited = torch.from_numpy(x).float().clamp(-512, 512) * lossless.UNIT
    units = torch.tensor(lossless.OF_COARSE)[:, None, None]
    three = np.concatenate(e.coarse(x, np.dtype(np.uint8)))
    assert equal(three, lossless.coarse_bytes(limited[None], True)[0] / units, 1)
    two = np.concatenate(e.signs(x, np.dtype(np.uint8)))
    assert equal(two, lossless.signs(limited[None])[0], lossless.UNIT)
    x = np.arange(-70, 70)
    assert np.array_equal(e.halved(x, 2), np.rint(x / 4)) and np.array_equal(e.halved(x, 1), np.rint(x / 2))


def test_opening_once(tiny_graphs: Path) -> None:
    """Threads that want the same session at the same time share it."""
    networks, opened = LossyNetworks(tiny_graphs), list[tuple[Any, ...]]()
    original = networks._opened

    def counting(*key: Any) -> Any:
        opened.append(key)
        return original(*key)

    networks._opened = counting  # type: ignore[method-assign]
    networks._forget()
    threads = [threading.Thread(target=networks.known_answer) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == len(set(opened)) == 8
