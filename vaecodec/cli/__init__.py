"""The command line. Nothing here imports torch before a command needs it."""

from . import commands, looking, training, webpage  # which add themselves to the group
from .group import main

__all__ = ["commands", "looking", "main", "training", "webpage"]
