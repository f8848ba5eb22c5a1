"""What can be wrong with a file. Standard library only."""

from typing import ClassVar


class VaeError(Exception):
    """Base of every error that bad input causes; `exit_code` is what a command line returns for it."""

    exit_code: ClassVar[int] = 1


class CorruptError(VaeError):
    """The bytes break a rule of the format or fail a checksum."""

    exit_code: ClassVar[int] = 3


class TruncatedError(CorruptError):
    """The bytes end before the declared lengths do."""


class VersionError(VaeError):
    """The file needs a newer reader: a newer version, or a kind, mode or critical section unknown here."""

    exit_code: ClassVar[int] = 3


class LimitError(VaeError):
    """The file declares more than the caller's limits allow."""

    exit_code: ClassVar[int] = 5
