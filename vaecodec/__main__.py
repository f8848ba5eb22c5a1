"""``python -m vaecodec``, which torchrun needs."""

from .cli import main

main(prog_name="vaecodec")
