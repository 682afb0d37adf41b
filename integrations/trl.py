"""Trainers of TRL whose teacher or reference model is the kernel-weighted average of the model they train.

`SDFTTrainer` and `SDPOTrainer` distil from the average in place of TRL's own EMA, and `SFTTrainer` adds a
distillation to its loss. `DPOTrainer`, `KTOTrainer`, `GRPOTrainer` and `RLOOTrainer` use the average as the
reference model, which so moves with the model. Generation by vLLM is left as it is: it samples from the
student.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from wmateacher.integrations.huggingface import TeacherCallback, TeacherMixin
from wmateacher.integrations.huggingface.callback import CallbackMixin

try:
    import trl
    from trl.experimental import sdft, sdpo
except ImportError as error:
    raise ImportError("wmateacher.integrations.trl needs TRL: pip install 'wmateacher[trl]'") from error
from transformers import PretrainedConfig, TrainingArguments

__all__ = [
    "TESTED",
    "DPOTrainer",
    "GRPOTrainer",
    "KTOTrainer",
    "RLOOTrainer",
    "SDFTTrainer",
    "SDPOTrainer",
    "SFTTrainer",
    "TeacherCallback",
]

TESTED = ("1.16",)
"""The versions of TRL that this module works with. It replaces methods that TRL may rename at any time."""

if not trl.__version__.startswith(tuple(f"{version}." for version in TESTED)):
    raise ImportError(
        f"wmateacher.integrations.trl is made for TRL {', '.join(TESTED)}, found {trl.__version__}: "
        "pip install 'wmateacher[trl]'"
    )


class _Averaging(CallbackMixin):
    """A Trainer of TRL that keeps the average of its model; a base class before TRL's."""

    def __init__(self, *args: Any, **kwargs: Any):
        """Create the Trainer, with `teacher_callback` besides its own arguments; see `CallbackMixin`.

        Raises:
            TypeError: If `teacher_callback` is not a `TeacherCallback`.
            ValueError: If the Trainer's own arguments ask for another teacher or reference model, or for
                DeepSpeed or FSDP.
        """
        for given in (*args, *kwargs.values()):
            if isinstance(given, TrainingArguments) and (given.deepspeed or given.fsdp):
                name = "deepspeed" if given.deepspeed else "fsdp"
                raise ValueError(
                    f"{name}= is not supported by TRL's trainers with an average, for which each process "
                    "needs the whole model: train with DDP, or in a loop of your own with fully_shard"
                )
        super().__init__(*args, **kwargs)

    def _average(self) -> nn.Module:
        """Return the average, which before training is the model itself."""
        return self.model if self.teacher is None else self.teacher  # type: ignore[attr-defined]


class SFTTrainer(TeacherMixin, trl.SFTTrainer):  # type: ignore[misc]
    """TRL's `SFTTrainer` with a distillation from the average besides its own loss; see `TeacherMixin`.

    TRL computes its loss without the logits, so that the distillation takes a second forward and backward
    pass of the student.

    Examples:
        >>> callback = TeacherCallback("beta(0.5,0.5)")
        >>> trainer = SFTTrainer(model, args, teacher_callback=callback, distillation="kl")  # doctest: +SKIP
    """


# --- self-distillation --------------------------------------------------------------------------------


class _SelfDistilling(_Averaging):
    """A self-distillation Trainer whose teacher is the average."""

    @property
    def teacher_model(self) -> nn.Module:
        """The model that TRL calls as the teacher."""
        return self._average()

    def _setup_teacher_model(self) -> None:
        """Check that the arguments leave the choice of the teacher to the callback."""
        args: Any = self.args  # type: ignore[attr-defined]
        defaults = type(args).__dataclass_fields__
        if args.use_teacher_server:
            raise ValueError(
                "use_teacher_server=True takes the teacher's probabilities from a vLLM server, which has the "
                "student's weights, not the average: set it to False"
            )
        kinds = (defaults["teacher_model_kind"].default, "ema")
        if args.teacher_model_kind not in kinds:
            raise ValueError(
                f"teacher_model_kind={args.teacher_model_kind!r} asks for TRL's own teacher, but "
                "teacher_callback gives this Trainer another one: leave it out, and choose the kernel, "
                "TeacherCallback('static') for 'base'"
            )
        for name, instead in _INSTEAD.items():
            value = getattr(args, name)
            if value != defaults[name].default:
                raise ValueError(
                    f"{name}={value!r} is a setting of TRL's own teacher and has no effect on the average: "
                    f"leave it out, and pass {instead}"
                )

    def _get_teacher_context_for_self_distillation(self) -> AbstractContextManager[None]:
        """Return no context: the average has adapters of its own, which need not be switched."""
        return nullcontext()


_INSTEAD = {
    "teacher_update_rate": "TeacherCallback('ema(DECAY)') with DECAY = 1 - teacher_update_rate",
    "teacher_sync_steps": "TeacherCallback(update_every=...)",
}


class SDFTTrainer(_SelfDistilling, sdft.SDFTTrainer):  # type: ignore[misc]
    """TRL's `SDFTTrainer` with the average in place of its teacher.

    The teacher starts at the model's weights, costs only the adapter under LoRA, and is saved in each
    `checkpoint-*` folder. `ema(0.95)` is the teacher of `teacher_model_kind="ema"` with
    `teacher_update_rate=0.05`.

    Examples:
        >>> callback = TeacherCallback("beta(0.5,0.5)")
        >>> trainer = SDFTTrainer(model, args, teacher_callback=callback)  # doctest: +SKIP
    """


class SDPOTrainer(_SelfDistilling, sdpo.SDPOTrainer):  # type: ignore[misc]
    """TRL's `SDPOTrainer` with the average in place of its teacher; see `SDFTTrainer`."""


# --- reference models ---------------------------------------------------------------------------------


class _Referring(_Averaging):
    """A Trainer whose reference model is the average."""

    _built = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._built = True

    @property
    def ref_model(self) -> nn.Module | None:
        """The reference model: the average, or what TRL's constructor prepares while it runs."""
        return self._average() if self._built else self._prepared

    @ref_model.setter
    def ref_model(self, model: nn.Module | None) -> None:
        self._prepared = model


class _NoModel(nn.Module):
    """What TRL's constructors prepare as the reference model, instead of loading a second copy."""

    config = PretrainedConfig()


class _Preferring(_Referring):
    """A Trainer on preferences, which takes its reference model as an argument."""

    def __init__(self, model: Any, ref_model: None = None, args: Any = None, **kwargs: Any):
        if ref_model is not None:
            raise ValueError(
                f"ref_model={type(ref_model).__name__} would be ignored: this Trainer's reference model is "
                f"the average of teacher_callback. Leave it out, or use trl.{type(self).__name__}"
            )
        _refuse_synced(args)
        if args is not None and args.precompute_ref_log_probs:
            raise ValueError(
                "precompute_ref_log_probs=True computes the reference's log-probabilities once, but the "
                "average moves in training: set it to False"
            )
        super().__init__(model, _NoModel(), args, **kwargs)


class DPOTrainer(_Preferring, trl.DPOTrainer):  # type: ignore[misc]
    """TRL's `DPOTrainer` with the average as reference model, instead of a frozen or synchronised copy.

    With an adapter, the reference is the average of the adapter on the same base.

    Examples:
        >>> callback = TeacherCallback("ema(0.99)")
        >>> trainer = DPOTrainer(model, args=args, teacher_callback=callback)  # doctest: +SKIP
    """


class KTOTrainer(_Preferring, trl.KTOTrainer):  # type: ignore[misc]
    """TRL's `KTOTrainer` with the average as reference model; see `DPOTrainer`."""


class _Rewarded(_Referring):
    """A Trainer on rewards, which loads its reference model by itself if the coefficient `beta` is not 0."""

    def __init__(self, model: Any, reward_funcs: Any, args: Any, **kwargs: Any):
        if args is None or args.beta == 0:
            raise ValueError(
                "beta=0 leaves the reference model out of the loss, so that the average would have no "
                "effect: pass args with beta > 0, for example 0.04"
            )
        _refuse_synced(args)
        beta, args.beta = args.beta, 0.0  # with which TRL loads no reference model and copies no adapter
        try:
            super().__init__(model, reward_funcs, args, **kwargs)
        finally:
            args.beta = beta
        self.beta = beta


class GRPOTrainer(_Rewarded, trl.GRPOTrainer):  # type: ignore[misc]
    """TRL's `GRPOTrainer` with the average as reference model, weighted by `beta`; see `DPOTrainer`."""


class RLOOTrainer(_Rewarded, trl.RLOOTrainer):  # type: ignore[misc]
    """TRL's `RLOOTrainer` with the average as reference model, weighted by `beta`; see `DPOTrainer`."""


def _refuse_synced(args: Any) -> None:
    if args is not None and args.sync_ref_model:
        raise ValueError(
            "sync_ref_model=True moves a reference model by TRL's own rule, but this Trainer's is the "
            "average of teacher_callback: set it to False, and choose the kernel, such as "
            "TeacherCallback('ema(0.99)')"
        )


def __dir__() -> list[str]:
    return __all__
