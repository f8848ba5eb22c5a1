"""Runs a fuzzer with atheris on what seeds.py has written, or tells which lines of bitstream its corpora reach.

    python tests/fuzz/run.py FOLDER container|coder|decode [-runs=N and other options of libFuzzer]
    python tests/fuzz/run.py FOLDER coverage

Figures are in FOLDER/TARGET.json: executions, how many came past the header, and seconds, added up over the runs.
"""

import json
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

EVERY = 1000
folder, name = Path(sys.argv[1]), sys.argv[2]


def fuzz() -> None:
    import atheris
    from mutate import mutated

    with atheris.instrument_imports(include=["bitstream", "vaecodec"]):
        import targets
    target = getattr(targets, name)
    figures = folder / f"{name}.json"
    done = {"executions": 0, "past": 0, "seconds": 0.0}
    if figures.exists():
        done |= json.loads(figures.read_text())
    last = time.perf_counter()

    def one(data: bytes) -> None:
        nonlocal last
        done["past"] += target(data)
        done["executions"] += 1
        if done["executions"] % EVERY == 0:
            now = time.perf_counter()
            done["seconds"], last = done["seconds"] + now - last, now
            figures.write_text(json.dumps(done))

    def mutator(data: bytes, most: int, seed: int) -> bytes:
        if name == "coder" or seed % 8 == 0:
            return bytes(atheris.Mutate(data, most))
        return mutated(data, seed, most)

    atheris.Setup([sys.argv[0], str(folder / name), *sys.argv[3:]], one, custom_mutator=mutator)
    atheris.Fuzz()


def coverage() -> None:
    from coverage import Coverage

    watched = Coverage(source_pkgs=["bitstream"], data_file=None)
    watched.start()
    import targets

    for target in (targets.container, targets.coder, targets.decode):
        for path in sorted((folder / target.__name__).iterdir()):
            target(path.read_bytes())
    watched.stop()
    watched.report(show_missing=True)


if __name__ == "__main__":
    coverage() if name == "coverage" else fuzz()
