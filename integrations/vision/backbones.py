"""Build timm networks from a spec such as `vit_tiny_patch16_224(patch_size=4,depth=4)`."""

from __future__ import annotations

from typing import Any

from torch import nn

from wmateacher.checks import nearest
from wmateacher.spec import parse_call

__all__ = ["build"]


def build(spec: str, image_size: int, *, channels: int = 3, classes: int = 0) -> nn.Module:
    """Build a network with random weights.

    Args:
        spec: The name of a timm network, with any of its arguments in brackets.
        image_size: Height and width of the images, in pixels. Vision transformers take other sizes too, with
            their position embedding interpolated.
        channels: The number of channels of the images.
        classes: The number of outputs of the classifier; 0 for no classifier, so that the network returns
            pooled features `[B, num_features]`.

    Raises:
        ValueError: If timm has no such network, or cannot build it with these arguments.
    """
    import timm

    call = parse_call(spec)
    if call.args:
        raise ValueError(f"backbone {spec!r}: give arguments by name, as in {call.name}(depth=4)")
    if not timm.is_model(call.name):
        raise ValueError(
            f"unknown backbone {call.name!r}; {nearest(call.name, timm.list_models())}, "
            "see timm.list_models()"
        )
    given = {"in_chans": channels, "num_classes": classes, **call.kwargs}
    # Families of networks differ in the arguments for the image size; the first that fits is taken.
    size: dict[str, Any] = {"img_size": image_size}
    reason: Exception | None = None
    for told in ({**size, "dynamic_img_size": True}, size, {}):
        try:
            return timm.create_model(call.name, **{**told, **given})
        except TypeError as error:
            reason = error
        except (AssertionError, ValueError, RuntimeError) as error:
            reason = error
            break
    raise ValueError(
        f"timm does not build backbone {spec!r} for images of {image_size} pixels ({reason}): choose "
        "other arguments or another image size"
    ) from reason
