"""The lossy networks on a CPU through ONNX Runtime, see ``engine_onnx``."""

from __future__ import annotations

import os

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from ..engine_onnx import Answer, Array, Floats, Integers, Sessions, at
from ..weights import Stored, WeightsError, scrambled_array as scrambled, tables_of
from .numbers import GAIN_BITS, KNOWN_INPUTS, STEPS, Config, Steps, stream_of
from .tile import quantised

KERNELS = {
    "8-bit integers": ("", False),
    "8-bit integers, without saturation": ("", True),
    "float32": (".float", False),
}
"""Ways to run layers of 8 bits, the fastest first: which graphs, and whether x86 kernels are to be those that do not
add pairs of products in 16 bits."""

SEEN = ".seen"


class LossyNetworks(Sessions):
    """The networks of the lossy codec. ``kernel``: of ``KERNELS``, the first that gives the known answer.

    quality: hundredths, 0..10000. Raises WeightsError also where no kernel gives the known answer.
    """

    def __init__(self, source: str | os.PathLike[str] | Stored, threads: int = 1) -> None:
        super().__init__(source, threads)
        self.config = Config(**self.settings)
        self.margin = self.config.margin
        self.tables = tables_of("tables", self.part("decoder"))
        self.kernel = ""
        for self.kernel in KERNELS:
            if f"{self.known_answer():08x}" == self.answer:
                return
        raise WeightsError(f"{self.path.name} fails its self-test in ONNX Runtime {onnxruntime.__version__}")

    def quantised(self, residual: Floats, ids: Integers) -> Integers:
        return quantised(self.tables, residual, ids)

    def analyse(self, x: Floats, quality: int, seen: Floats | None = None) -> Floats:
        """g_a: x [3, H, W] in 0..255, H and W multiples of 16, to y [M, H / 16, W / 16] in steps of the quantiser.

        seen: 0 where there are no latents, else 1, [H / 16, W / 16]; without any there are all.
        """
        inverse = at(self.tensors["decoder.inverse"], quality).astype(np.float32) * np.float32(2.0**-GAIN_BITS)
        gain = np.exp(at(self.tensors["encoder.log_ratio"], quality)) / inverse
        y: Floats = self.in_8_bits("analysis", {"x": x[None], "gain": gain[:, :, None, None]}, quality, seen)[0]
        return y

    def hyper_analyse(self, y: Floats, quality: int) -> Floats:
        """h_a: y [M, h, w] in steps of the quantiser, h and w multiples of 4, to z [C_z, h / 4, w / 4]."""
        z: Floats = self.in_8_bits("hyper_analysis", {"y": y[None]}, quality)[0]
        return z

    def features(self, z: Integers, quality: int) -> Floats:
        """h_s: z_hat [C_z, h, w] in steps of 1/16 to the features [hyper, 4 h, 4 w] that ``context`` takes."""
        features: Floats = self.run("hyper_synthesis", {"z": z[None]}, quality)[0][0]
        return features

    def context(self, step: int, features: Floats, y_hat: Integers, quality: int) -> tuple[Integers, Integers]:
        """One context step: features [hyper, h, w] and y_hat [M, h, w] in steps of 2**-unit_bits to means, in the same
        steps, and table indices, [M / 4, h, w] both."""
        mean, index = self.run(f"context.{step}", {"features": features[None], "y_hat": y_hat[None]}, quality)
        return mean[0], index[0]

    def synthesise(self, stream: Steps, quality: int, seen: Floats | None = None) -> Integers:
        """g_s: stream [M, h, w] in steps of 1/128 to x_hat [3, 16 h, 16 w] in sixteenths of a grey level, not clamped
        to its range. seen: see ``analyse``."""
        x_hat: Integers = self.in_8_bits("synthesis", {"stream": stream[None]}, quality, seen)[0]
        return x_hat

    def in_8_bits(self, graph: str, inputs: dict[str, Array], quality: int, seen: Floats | None = None) -> Array:
        """The output of a graph that may have layers of 8 bits, by the kernel for them; or where something is not seen
        that of the graph that masks it."""
        which, careful = KERNELS[self.kernel]
        if seen is not None:
            which += SEEN
            inputs = inputs | {"seen": seen[None, None], "seen_fine": seen.repeat(2, 0).repeat(2, 1)[None, None]}
        # An encoder in floating point has no graph for each kernel.
        name = graph + which if f"graph.{graph}{which}" in self.tensors else graph + which.removeprefix(".float")
        output: Array = self.run(name, inputs, quality, careful)[0]
        return output

    def gains(self, quality: int) -> NDArray[np.int64]:
        """Of g_s's input, int64 [M] in steps of 2**-GAIN_BITS."""
        gains: NDArray[np.int64] = at(self.tensors["decoder.inverse"], quality)[0].astype(np.int64)
        return gains

    def prior(self, quality: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of z: means in steps of 1/16 and table numbers, int64 [C_z] both."""
        mean, index = (at(self.tensors[f"decoder.z_{name}"], quality)[0].astype(np.int64) for name in ("mean", "index"))
        return mean, index

    def known_answer(self) -> int:
        """CRC-32 of what the exact networks answer to fixed inputs, as ``LossyWeights.known_answer``."""
        answer = Answer()
        for quality, spread in KNOWN_INPUTS:
            z = scrambled(self.config.hyper_latent, 4, 6, spread).astype(np.int32)
            features = self.features(z, quality)
            y_hat = scrambled(self.config.latent, 16, 24, spread).astype(np.int32)
            answer.add(features)
            for step in range(STEPS):
                for part in self.context(step, features, y_hat, quality):
                    answer.add(part)
            answer.add(self.synthesise(stream_of(y_hat, self.gains(quality), self.config.bits), quality))
        return answer.crc
