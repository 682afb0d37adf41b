"""A teacher's state: the averages at full precision under canonical names, without the student's tensors.

A state is checked completely before anything of it is written.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wmateacher import buffers, naming, pairing, sharding
from wmateacher.pairing import Binding
from wmateacher.schedule import Clock
from wmateacher.shadow import Shadow

__all__ = ["FORMAT", "averaged", "complete", "load", "match_average", "read_header"]

FORMAT = 2
# Format 1 has a clock without joined averages and skipped snapshots, and does not say what is shared.
_READ_FORMATS = (1, 2)


def complete(shadow: Shadow, module: nn.Module, state: dict[str, Any], prefix: str) -> None:
    """Put the averages in a state at full precision under canonical keys, without the student's tensors.

    Args:
        shadow: The averaged copy.
        module: The averaged module as the teacher registers it, possibly wrapped by torch.compile.
        state: The teacher's state, which is changed in place.
        prefix: The prefix of the module's keys in it.
    """
    own, full = Binding(shadow.module), {}
    keys = [k.removeprefix(prefix) for k in state if k.startswith(prefix)]
    written = {key: state.pop(prefix + path) for path, key in naming.canonical(module, keys).items()}
    for key in _with_shared(module, written, shadow.roles.shared):
        del written[key]
    for key, name in pairing.state_names(module).items():
        if name in shadow.roles.shared:
            written.pop(key, None)
        elif name in shadow.roles.averaged:
            if name not in full:  # tied keys get one tensor
                value = shadow.average(own, name).read()
                if value.untyped_storage().nbytes() > value.nbytes:
                    value = value.clone()  # a part of a buffer would be saved and copied with all of it
                full[name] = sharding.spread(value, own.tensors[name])
            written[key] = full[name]
    state.update({prefix + key: value for key, value in written.items()})


def averaged(shadow: Shadow, student: nn.Module, dtype: torch.dtype | None) -> dict[str, Any]:
    """Return a copy of the averaged module's state, under the keys of the student's.

    Args:
        shadow: The averaged copy.
        student: The unwrapped student.
        dtype: The dtype of floating-point tensors; None stands for the module's own.
    """
    own = shadow.bind()
    names = {id(t): n for n, t in own.tensors.items()}
    # `keep_vars` keeps the tensor objects, by which entries are recognised under any key.
    state: dict[str, Any] = shadow.module.state_dict(keep_vars=True)
    for key, value in state.items():
        if id(value) in names:
            wanted = dtype if dtype is not None and value.is_floating_point() else value.dtype
            precise = shadow.precise(own, names[id(value)], wanted)
            state[key] = sharding.spread(precise.to(dtype=wanted, copy=True).contiguous(), value)
    keys = naming.canonical(shadow.module, state)
    return {naming.saved_key(student, name): state[key] for key, name in keys.items()}


def read_header(state: dict[str, Any], prefix: str, clock: Clock) -> Mapping[str, Any]:
    """Return what a teacher's state says besides its tensors: step count, kernel, horizon and roles.

    Args:
        state: The state to load. The keys of a teacher that was compiled as a whole are replaced by its own.
        prefix: The prefix of the teacher's keys in it.
        clock: The clock that is to continue.

    Raises:
        ValueError: If the state is not a teacher's, of an unknown format or damaged, or its kernel or horizon
            is not the clock's.
    """
    if f"{prefix}_orig_mod._extra_state" in state:  # the teacher that was saved had been compiled as a whole
        for key in [k for k in state if k.startswith(f"{prefix}_orig_mod.")]:
            state[prefix + key.removeprefix(f"{prefix}_orig_mod.")] = state.pop(key)
    found = state.get(f"{prefix}_extra_state")
    if not isinstance(found, Mapping) or "format" not in found:
        others = [str(k).removesuffix("_extra_state") for k, v in state.items() if _is_header(v)]
        raise ValueError(
            f"there is no teacher state under the prefix {prefix!r}: it holds no clock. "
            + (f"There is one under {others[0]!r}: load the entries below it. " if others else "")
            + "To start an average from plain weights, load them into the student and build the teacher from "
            "it; to continue the average of another library, use wmateacher.migration.load"
        )
    if found["format"] not in _READ_FORMATS:
        raise ValueError(
            f"the state has format {found['format']!r}, but this version reads formats 1 to {FORMAT}: load "
            "it with the version of wmateacher that wrote it"
        )
    clock.check(found)
    omega = found.get("omega")
    if not (isinstance(omega, int | float) and 0 <= omega <= 1):
        raise ValueError(f"the teacher's state is damaged: omega must be a weight in [0, 1], got {omega!r}")
    for field in ("shared", "unfrozen", "changed_buffers"):
        if not isinstance(found.get(field, []), list | tuple):
            raise ValueError(f"the teacher's state is damaged: {field} is {found[field]!r}, not a list")
    return found


def _is_header(value: Any) -> bool:
    return isinstance(value, Mapping) and {"format", "omega", "kernel"} <= value.keys()


def load(
    shadow: Shadow,
    module: nn.Module,
    state: dict[str, Any],
    prefix: str,
    student: nn.Module,
    header: Mapping[str, Any],
) -> None:
    """Check a teacher's state completely, then read the averages from it.

    Args:
        shadow: The averaged copy.
        module: The averaged module as the teacher registers it.
        state: The state to load. Its tensors are replaced by the module's own, so that `nn.Module` has
            nothing left to write.
        prefix: The prefix of the teacher's keys in it.
        student: The unwrapped student.
        header: The entries from `read_header`. `shared` names the parameters that were shared with the
            student when the state was written. A state of format 1 has no such entry; the parameters that
            are shared now and missing from it are then taken as shared. `unfrozen` gives the step after which
            each other parameter that had been shared was trained, and `changed_buffers` names the buffers
            whose shape may differ from that in the averaged module.

    Raises:
        ValueError: If the state is of another architecture or is sharded differently.
    """
    shared: Collection[str] | None = header.get("shared")
    unfrozen: dict[str, int] = dict(header.get("unfrozen", ()))
    changed: Sequence[str] = header.get("changed_buffers", ())
    own, home = shadow.bind(), f"{prefix}module."
    names = pairing.state_names(module)
    modules = naming.modules(shadow.module)
    places = [n for n in changed if n.rpartition(".")[0] in modules and n not in shadow.roles.averaged]
    every = naming.canonical(module, module.state_dict()).values()
    lent = _with_shared(module, every, shadow.roles.shared)
    known = {
        **names,
        **dict.fromkeys(k for k in every if k not in lent),
        **dict.fromkeys(places),
    }
    given = {k.removeprefix(home): k for k in state if k.startswith(home)}
    pairs = naming.resolve(given, {*known, *places})
    found = {key: state[given[k]] for k, key in pairs.items()}
    if shared is None:
        shared = {n for k, n in names.items() if n in shadow.roles.shared and k not in found}
    elif not shadow.shares:
        shared = ()  # they are missing, then
    held = {k: n for k, n in names.items() if n not in shared}
    fixed = {k: n for k, n in held.items() if k not in places}
    ours = {given[k] for k, key in pairs.items() if names.get(key) not in shared}
    _check_values(
        "the state was written for another architecture",
        missing=[
            home + k for k in known if k not in found and k not in places and names.get(k) not in shared
        ],
        unexpected=[k for k in state if k.startswith(prefix) and k not in {*ours, f"{prefix}_extra_state"}],
        pairs=[
            *((home + k, found[k], own.tensors[n]) for k, n in fixed.items() if k in found),
            *((home + k, found[k], found[k]) for k in places if k in found),
        ],
    )
    _check_ties("the state was written for another architecture", found, names)
    # What is frozen here and was trained there, or the reverse, takes the role that it had there.
    shadow.take_up([n for n in shadow.roles.shared if n in held.values()], 0)
    shadow.release(student, [n for n in shadow.roles.owned if n in shared])
    shadow.unfrozen = unfrozen
    for name in places:
        if name in found or name in names:  # the others are not saved
            buffers.resize(shadow.module, name, found.get(name))
    own = shadow.bind()
    names = pairing.state_names(module)
    values = {name: found[key] for key, name in names.items() if name not in shared}
    # nn.Module then copies each tensor to itself, or with assign=True assigns it where it is: tied
    # tensors stay tied and every tensor keeps its dtype.
    for key in given.values():
        del state[key]
    for key in {**found, **names}:
        value = own.tensors[names[key]] if key in names else found[key]
        state.update({home + path: value for path in naming.load_keys(module, key)})
    shadow.write(values)


def match_average(shadow: Shadow, average: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Check an average of the student's architecture and return it by canonical name, for `Shadow.write`.

    Args:
        shadow: The averaged copy.
        average: The weights, under the keys of the student's `state_dict`. Buffers and parameters that are
            shared with the student may be missing. Of tied tensors, one is enough.

    Raises:
        ValueError: If a weight is missing, unknown or of another shape, or tied ones differ.
        TypeError: If `average` is not a mapping.
    """
    if not isinstance(average, Mapping):
        raise TypeError(f"average must be a state dict, got {type(average).__name__}")
    own = shadow.bind()
    names = pairing.state_names(shadow.module)
    known = {*names, *naming.canonical(shadow.module, shadow.module.state_dict()).values()}
    keys = naming.resolve(average, known)
    found = {key: average[k] for k, key in keys.items() if key in names}
    given = {names[key] for key in found}
    needed = [
        key
        for key, name in names.items()
        if name not in given
        and name not in shadow.roles.shared
        and isinstance(own.tensors[name], nn.Parameter)
    ]
    _check_values(
        "average is of another architecture",
        missing=sorted(needed),
        unexpected=[k for k in average if k not in keys],
        pairs=[(k, value, own.tensors[names[k]]) for k, value in found.items()],
    )
    _check_ties("average", found, names)
    return {names[k]: value for k, value in found.items()}


def _with_shared(module: nn.Module, keys: Iterable[str], shared: Collection[str]) -> set[str]:
    """Return the canonical keys of what layers save besides tensors, if their parameters are shared.

    Quantised layers save the scales of their weights so. The scales are the student's, like the weights.
    """
    names, modules = pairing.state_names(module), naming.modules(module)
    lenders = {key.rpartition(".")[0] for key, name in names.items() if name in shared}

    def layer(key: str) -> str:
        while key and key not in modules:
            key = key.rpartition(".")[0]
        return key

    others = [k for k in keys if k not in names and not k.endswith("_extra_state")]
    return {key for key in others if layer(key) in lenders}


def _check_ties(what: str, found: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
    """Raise a ValueError if tensors that are one tensor here have different values there."""
    first: dict[str, str] = {}
    for key, name in names.items():
        if key in found:
            other = first.setdefault(name, key)
            one, two = found[other], found[key]
            if one is not two and not torch.equal(sharding.local(one), sharding.local(two)):
                raise ValueError(
                    f"{what}: {other!r} and {key!r} are one tensor in this model and have different values "
                    "there: it is of a model in which they are not tied"
                )


def _check_values(
    what: str,
    missing: Sequence[str],
    unexpected: Sequence[str],
    pairs: Sequence[tuple[str, Any, Tensor]],
) -> None:
    """Raise a ValueError that names what differs between given values and the module's own tensors."""
    if missing or unexpected:
        raise ValueError(f"{what}: {pairing.describe_difference(missing, unexpected)}")
    for key, given, own in pairs:
        if not isinstance(given, Tensor):
            raise ValueError(f"{what}: {key!r} is a {type(given).__name__} there and a tensor here")
        if given.shape != own.shape:
            raise ValueError(
                f"{what}: {key!r} has shape {tuple(given.shape)} there and {tuple(own.shape)} here"
            )
        if _kind(given) != _kind(own):
            raise ValueError(f"{what}: {key!r} is {given.dtype} there and {own.dtype} here")
        if given.is_meta:
            raise ValueError(f"{key!r} is on the meta device and has no values: load the state to the CPU")
        if not sharding.alike(given, own):
            raise ValueError(
                f"in the state {key!r} is {sharding.describe(given)}, the teacher's is "
                f"{sharding.describe(own)}: read it with torch.distributed.checkpoint, which fits a saved "
                "state to any sharding"
            )


def _kind(tensor: Tensor) -> tuple[bool, ...]:
    """Return whether a tensor is floating point, complex or boolean."""
    return tensor.is_floating_point(), tensor.is_complex(), tensor.dtype == torch.bool


def __dir__() -> list[str]:
    return __all__
