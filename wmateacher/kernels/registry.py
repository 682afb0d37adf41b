"""The registry, in which strings find kernels by name."""

from __future__ import annotations

from collections.abc import Callable

from wmateacher import checks
from wmateacher.kernels.base import Kernel

__all__ = ["available", "named", "register"]


def __dir__() -> list[str]:
    return __all__


_Factory = Callable[..., Kernel]
_FACTORIES: dict[str, _Factory] = {}


def register(name: str, *, override: bool = False) -> Callable[[_Factory], _Factory]:
    """Give a kernel class, or a function that returns kernels, a name for use in strings.

    Examples:
        >>> from dataclasses import dataclass
        >>> from wmateacher import kernels
        >>> @kernels.register("rising", override=True)
        ... @dataclass(frozen=True)
        ... class Rising(kernels.Density):
        ...     power: float = 1.0
        ...     def density(self, tau):
        ...         return tau**self.power
        >>> str(kernels.build("rising(2)"))
        'rising(2)'

    Args:
        name: The name, a Python identifier.
        override: Whether to replace a kernel that already has this name.

    Raises:
        ValueError: If the name is taken or is not an identifier.
    """
    if not name.isidentifier():
        raise ValueError(f"name must be an identifier such as 'my_kernel', got {name!r}")
    if name in _FACTORIES and not override:
        raise ValueError(f"name {name!r} is taken; choose another or pass override=True")

    def add(factory: _Factory) -> _Factory:
        if isinstance(factory, type) and issubclass(factory, Kernel):
            factory.name = name
        _FACTORIES[name] = factory
        return factory

    return add


def available() -> list[str]:
    """Return the registered names, sorted."""
    return sorted(_FACTORIES)


def named(name: str) -> _Factory:
    """Return the class or function that is registered under a name.

    Raises:
        ValueError: If no kernel has that name.
    """
    return checks.lookup("kernel", name, _FACTORIES, also="scipy.stats.NAME(...), or a callable density")
