"""The theory of the codec as experiments that can go wrong.

Each experiment states what is expected before it runs; its caption is worded from what was found. Steps, lambdas, the
random start and the rate of the ascent were chosen after trial runs.

1. A linear autoencoder, trained by gradient descent on squared error, finds the subspace of PCA.
2. A deep autoencoder has less error than PCA at the same code dimension.
3. A plain autoencoder is not a codec: the same network needs fewer bits when it is trained on bits and error together.
4. The bound is a code length: -ELBO while it is trained; lossless files reach it; lossy files reach that of the
   uniform posterior; gradient ascent for one picture improves on the inference network.
5. What the code knows: between two photographs, samples from the prior, a map of patches.

Experiments 1 to 3, the training in 4 and the map in 5 are about patches of 8 x 8 pixels and one small network
(``nets.py``); the rest measures the shipped models on crops.
"""

import resource
import time
from dataclasses import replace
from pathlib import Path

import torch

from .bound import inference, lossless, training
from .codes import dimension, linear, make_data, not_a_codec
from .latents import interpolation, patch_map, prior
from .nets import Job, cut_patches, restore, train
from .posteriors import lossy
from .report import Finding, Settings, parallel, write

__all__ = ["Finding", "Settings", "run"]


def cpu_seconds() -> float:
    """User and system time of this process and of those that it has started and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def run(training_files: list[Path], pictures: list[Path], out: Path, settings: Settings | None = None) -> list[Finding]:
    """All experiments, into ``out``: a figure each, ``theory.json`` and ``theory.md``.

    training_files: photographs to train and fit on; pictures: held out.
    """
    s, started, used = settings or Settings(), time.perf_counter(), cpu_seconds()
    out.mkdir(parents=True, exist_ok=True)
    patches = cut_patches(training_files, s.per_training_picture, seed=0)
    data = make_data(patches, cut_patches(pictures, s.per_picture, seed=1), pictures)
    largest = max(s.code_sizes)

    def job(kind: str, codes: int, seed: int, weight: float = 0.0) -> Job:
        return Job(kind, codes, seed, s.steps, s.batch, data.patches, data.held_out, weight)

    middle = s.code_sizes[len(s.code_sizes) // 2]
    groups: dict[tuple[str, float], list[Job]] = {
        **{("plain", codes): [job("plain", codes, seed) for seed in s.seeds] for codes in s.code_sizes},
        ("at PCA", middle): [replace(job("plain", middle, seed), start=data.pca) for seed in s.seeds],
        **{("rate", weight): [job("rate", largest, seed, weight) for seed in s.seeds] for weight in s.lambdas},
        ("gaussian", largest): [job("gaussian", largest, seed) for seed in s.seeds],
    }
    jobs = [one for group in groups.values() for one in group]
    trained = parallel(train, jobs, s.processes)
    models = {key: [restore(j, trained[jobs.index(j)]) for j in group] for key, group in groups.items()}
    plain = {codes: models["plain", codes] for codes in s.code_sizes}
    rated = {weight: models["rate", weight] for weight in s.lambdas}
    gaussian = models["gaussian", largest]
    with torch.random.fork_rng(devices=[]):
        findings = [
            linear(data, s, out),
            dimension(data, plain, models["at PCA", middle], out),
            not_a_codec(data, plain, rated, out),
            training(trained[-len(s.seeds) :], out),
            lossless(data, s, out),
            lossy(data, s, out),
            inference(data, gaussian, s, out),
            interpolation(data, s, out),
            prior(data, gaussian, s, out),
            patch_map(data, gaussian, out),
        ]
    facts = {
        "training patches": len(data.patches),
        "held-out patches": len(data.held_out),
        "training pictures": len(training_files),
        "held-out pictures": len(pictures),
        "seeds": len(s.seeds),
        "CPU seconds": round(cpu_seconds() - used),
        "wall-clock seconds": round(time.perf_counter() - started),
    }
    write(findings, s, facts, out)
    return findings
