"""The decorator that makes a test of a function which every rank runs."""

import functools
import inspect

import pytest
import torch
from pool import TIMEOUT

_NCCL = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def on_ranks(*sizes, timeout=TIMEOUT):
    """Run the decorated function, called with a folder, on every rank of each world size.

    With gloo, and where there is a GPU also with nccl, in one process. Other worlds than that of two ranks are slow.
    """
    worlds = [
        pytest.param("gloo", n, id=f"gloo-{n}", marks=[] if n == 2 else pytest.mark.slow) for n in sizes
    ]
    worlds.append(pytest.param("nccl", 1, id="nccl-1", marks=_NCCL))

    def decorate(function):
        @pytest.mark.parametrize(("backend", "size"), worlds)
        def test(pools, tmp_path, backend, size):
            pools(backend, size).run(test, str(tmp_path), timeout=timeout)

        functools.update_wrapper(test, function)
        test.__signature__ = inspect.signature(_arguments)
        return test

    return decorate


def _arguments(pools, tmp_path, backend, size):
    """What pytest must see instead of the wrapped function's."""
