"""In place of hypothesis, where only pytest is installed: the tests that it would feed are skipped, the others run."""

import functools
from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock

import pytest

strategies = HealthCheck = MagicMock()


def given(*_: Any, **__: Any) -> Callable[..., Any]:
    def skipped(test: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(test)
        @pytest.mark.skip(reason="needs hypothesis")
        def skip(*_: Any, **__: Any) -> None:  # which a test may call itself
            pytest.skip("needs hypothesis")

        return skip

    return skipped


class settings:  # noqa: N801
    register_profile = load_profile = staticmethod(lambda *_, **__: None)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, test: Callable[..., Any]) -> Callable[..., Any]:
        return test
