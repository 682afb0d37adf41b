"""A Trainer that distils from the average of its own model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from wmateacher import checks, diagnostics, losses
from wmateacher.integrations.huggingface import comparison
from wmateacher.integrations.huggingface.callback import FILE, CallbackMixin, TeacherCallback
from wmateacher.integrations.huggingface.comparison import Comparison
from wmateacher.integrations.resuming import Weights
from wmateacher.losses import Criterion

__all__ = ["TeacherMixin", "TeacherTrainer"]

# The distillation of "auto" for each kind of outputs. All of these are 0 where student and teacher agree.
_AUTO = {"classes": "kl", "labels": "kl", "values": "mse(logits)", "paired": "fd + crd"}
_SAME = 1e-4  # the relative gap below which weights may well have the same outputs
_PREFIX = "teacher_"  # of the columns of a batch that are the teacher's alone

Inputs = Mapping[str, Any]


class TeacherMixin(CallbackMixin):
    """Add distillation from the average of its own model to a Trainer; a base class before the Trainer's.

    The teacher gets the same batch as the model, without dropout and gradient, and the loss is
    `loss + distill_weight * distillation(model(batch).logits, teacher(batch).logits)`. The distillation is a
    mean over the tokens that the model's own loss counts, and not over those whose label is -100, such as
    prompts and padding. If the Trainer passes `num_items_in_batch`, it is a mean over all the batches of an
    optimizer step and all processes, like the model's own loss. Its mean, before its weight, is logged as
    `distillation`.

    Examples:
        >>> class MyTrainer(TeacherMixin, Trainer): ...

    Attributes:
        teacher_callback: The callback.
    """

    def __init__(
        self,
        *args: Any,
        teacher_callback: TeacherCallback | None = None,
        distillation: str | Criterion | None = "auto",
        distill_weight: float = 1.0,
        evaluate_with: Weights = "student",
        teacher_inputs: Callable[[Inputs], Inputs] | None = None,
        **kwargs: Any,
    ):
        """Create the Trainer, with these arguments besides its own.

        Args:
            *args: Arguments of the Trainer.
            teacher_callback: The callback that keeps the teacher; None for `TeacherCallback()`.
            distillation: The distillation loss, a criterion or its spec (see `wmateacher.losses.build`); None
                for no distillation. "auto" is `kl` for logits, `mse(logits)` for a regression and `fd + crd`
                for image-text models. A loss for logits sees each label of a multi-label model as a pair of
                logits, z for yes and 0 for no.
            distill_weight: The weight of the distillation beside the model's own loss.
            evaluate_with: The weights that `evaluate` and `predict` use. With "teacher",
                `load_best_model_at_end` leaves the average of the best checkpoint in the model.
            teacher_inputs: A function that takes a batch and returns the teacher's view of it; see the method
                `teacher_inputs`.
            **kwargs: Keyword arguments of the Trainer.

        Raises:
            ValueError: If `evaluate_with` is neither "student" nor "teacher", the distillation compares
                features, or `distill_weight` is not a number of at least 0.
            TypeError: If `teacher_callback` is not a `TeacherCallback`, or `teacher_inputs` not a function.
        """
        checks.one_of("weights for evaluate_with", evaluate_with, ("student", "teacher"))
        if not isinstance(distill_weight, int | float) or not 0 <= distill_weight < float("inf"):
            raise ValueError(f"distill_weight must be a number of at least 0, got {distill_weight!r}")
        if teacher_inputs is not None and not callable(teacher_inputs):
            raise TypeError(f"teacher_inputs must be a function of the batch, got {teacher_inputs!r}")
        auto = isinstance(distillation, str) and distillation == "auto"
        built = None if distillation is None or auto else losses.build(distillation)
        if built is not None and built.family not in (None, "logits", "paired"):
            raise ValueError(
                f"distillation {distillation!r} compares {built.family}, but models of transformers return "
                f"logits: choose from {', '.join(losses.available('logits'))}"
            )
        super().__init__(*args, teacher_callback=teacher_callback, **kwargs)
        self._distills, self._distillation = distillation is not None, built
        self._distill_weight, self._evaluate_with, self._view = distill_weight, evaluate_with, teacher_inputs
        self._checked = False  # whether the distillation fits the model's outputs
        self._sum: Tensor | None = None  # of the distillation since the last log
        self._first_step = 0  # that of the last log
        self._suspect, self._warned = False, False  # whether the distillation has been exactly 0

    # --- distillation ---------------------------------------------------------------------------------

    def teacher_inputs(self, inputs: Inputs) -> Inputs:
        """Return the teacher's view of a batch; override it, or pass a function `teacher_inputs`.

        By default, the columns `teacher_NAME` of a batch take the place of NAME for the teacher and are
        hidden from the model. For example, `teacher_input_ids`, `teacher_attention_mask` and `teacher_labels`
        hold a prompt with further context. The answers of the two views, the tokens whose label is not -100,
        must be the same, and are compared wherever they stand.

        Args:
            inputs: The batch, on the model's device.
        """
        if self._view is not None:
            return self._view(inputs)
        return _own(inputs) | {k.removeprefix(_PREFIX): v for k, v in inputs.items() if k.startswith(_PREFIX)}

    def outputs_to_compare(self, outputs: Any, inputs: Inputs) -> Comparison:
        """Return what the distillation compares in the outputs of the model or the teacher.

        Override it for models whose outputs are not one tensor of logits, or whose loss counts other
        positions than those with a label.

        Args:
            outputs: The outputs of the model or the teacher.
            inputs: The inputs that they are of.
        """
        model = self.accelerator.unwrap_model(self.model)  # type: ignore[attr-defined]
        return comparison.read(model, outputs, inputs)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """Return the Trainer's loss, plus the distillation in training."""
        own = _own(inputs)
        if not (self._distills and self.teacher is not None and model.training):
            return super().compute_loss(model, own, return_outputs=return_outputs, **kwargs)  # type: ignore[misc]
        seen: list[Any] = []
        hook = model.register_forward_hook(
            lambda module, args, outputs: seen.append(outputs) if torch.is_grad_enabled() else None
        )
        try:
            result = super().compute_loss(model, dict(own), return_outputs=return_outputs, **kwargs)  # type: ignore[misc]
        finally:
            hook.remove()
        if len(seen) != 1 or self._lacks_logits(seen[0]):
            # Some Trainers compute their loss without building the logits.
            seen = [model(**self._for_logits(own))]
        view = self.teacher_inputs(inputs)
        comparison.check_view(self.accelerator.unwrap_model(self.model), own, view)  # type: ignore[attr-defined]
        term = self._term(seen[0], own, view, kwargs.get("num_items_in_batch"))
        loss, *outputs = result if return_outputs else (result,)
        loss = loss + self._distill_weight * term
        return (loss, *outputs) if return_outputs else loss

    def _term(self, outputs: Any, own: Inputs, view: Inputs, items: Any) -> Tensor:
        """Return the distillation, scaled so that its sum over the batches of a step is its mean."""
        assert self.teacher is not None
        student = self.outputs_to_compare(outputs, own)
        labelled = isinstance(outputs, tuple | list)  # of which the logits are the second if there is a loss
        targets = self.teacher(**(view if labelled else self._for_logits(view)))
        teacher = self.outputs_to_compare(targets, view)
        is_view = view.keys() != own.keys() or any(view[k] is not own[k] for k in own)
        if is_view:
            teacher = comparison.align(student, teacher)
        count = self._count(items)
        part = _reduced(self._criterion(student), student, teacher.values, count)
        steps = self.current_gradient_accumulation_steps  # type: ignore[attr-defined]
        if count is None:
            part = part / steps
        self._note(part.detach(), student.mask)
        return part if self._is_scaled(items) else part * steps

    def _criterion(self, compared: Comparison) -> Criterion:
        """Return the distillation, which must be one for what the model returns."""
        if self._distillation is None:
            self._distillation = losses.build(_AUTO[compared.kind])
        built = self._distillation
        if self._checked:
            return built
        family = "paired" if compared.kind == "paired" else "logits"
        if built.family not in (None, family):
            raise ValueError(
                f"distillation '{built}' compares {built.family}, but this model returns {family}: choose "
                f"from {', '.join(losses.available(family))}"
            )
        if compared.kind == "values" and _is_blind(built):
            raise ValueError(
                f"distillation '{built}' is always 0 for the outputs of a regression, whose softmax is 1: "
                "use distillation='mse(logits)'"
            )
        self._checked = True
        return built

    def _count(self, items: Any) -> Tensor | None:
        """Return the divisor of a sum over this process's batch; None for the number in the batch."""
        if items is None:
            return None
        count = torch.as_tensor(items).reshape(-1)[0]
        args = self.args  # type: ignore[attr-defined]
        if not args.average_tokens_across_devices:
            return (count * max(1, args.n_gpu)).clamp(min=1)  # the Trainer has divided by nn.DataParallel's
        # Gradients are averaged over the processes.
        processes = self.accelerator.num_processes // self.get_tp_size()  # type: ignore[attr-defined]
        return count.clamp(min=1) / processes

    def _is_scaled(self, items: Any) -> bool:
        """Return whether the Trainer takes the loss as it is, instead of dividing it by the batches."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is not None:
            return bool(scaled)
        by_model = self.model_accepts_loss_kwargs and items is not None  # type: ignore[attr-defined]
        return by_model or self.compute_loss_func is not None  # type: ignore[attr-defined]

    def _for_logits(self, inputs: Inputs) -> Inputs:
        """Return the inputs with which a language model returns its logits, and neither loss nor cache."""
        model = self.accelerator.unwrap_model(self.model)  # type: ignore[attr-defined]
        if not comparison.is_causal(model):
            return inputs
        needed = {k: v for k, v in inputs.items() if k not in ("labels", "shift_labels")}
        return needed | ({"use_cache": False} if hasattr(model.config, "use_cache") else {})

    def _lacks_logits(self, outputs: Any) -> bool:
        model = self.accelerator.unwrap_model(self.model)  # type: ignore[attr-defined]
        lacks = isinstance(outputs, Mapping) and outputs.get("logits") is None
        return lacks and comparison.is_causal(model)

    def _note(self, part: Tensor, mask: Tensor | None) -> None:
        """Add a part of the distillation to the log, and warn if a teacher that differs says nothing."""
        if self._sum is None:
            self._first_step = self.state.global_step  # type: ignore[attr-defined]
        self._sum = part if self._sum is None else self._sum + part
        if self._suspect:  # seldom, because the host waits here
            assert self.teacher is not None
            says_nothing = not part.any() and (mask is None or mask.any())
            if says_nothing and diagnostics.parameter_gap(self.teacher) > _SAME:
                self._warned = True
                warnings.warn(
                    "the distillation is exactly 0, although the teacher's weights differ from the model's: "
                    "the outputs that are compared do not depend on the weights that are trained, or the "
                    "loss does not depend on these outputs. Check distillation=, or override "
                    "outputs_to_compare",
                    stacklevel=2,
                )
            self._suspect = False

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as the Trainer does, with the mean of the distillation since the last log, on this process."""
        if self._sum is not None and "loss" in logs:
            steps = max(1, self.state.global_step - self._first_step)  # type: ignore[attr-defined]
            logs = {**logs, "distillation": self._sum.item() / steps}
            self._suspect = logs["distillation"] == 0 and not self._warned
            self._sum = None
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    # --- evaluation -----------------------------------------------------------------------------------

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as the Trainer does, with the weights of `evaluate_with`.

        Before training, the teacher is read from the checkpoint of `TeacherCallback(resume_from=...)`, or
        from the one that the model comes from.

        Raises:
            RuntimeError: If the teacher is to be evaluated and there is none.
        """
        if self._evaluate_with == "student":
            return super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]
        if self.teacher is None:
            self.teacher_callback.load(self.model, self._checkpoint())  # type: ignore[attr-defined]
        assert self.teacher is not None
        with self.teacher.swap():
            return super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Predict as the Trainer does, without the teacher's columns of the batch."""
        return super().prediction_step(model, _own(inputs), *args, **kwargs)  # type: ignore[misc]

    def _checkpoint(self) -> str | Path:
        """Return the folder of the teacher before training."""
        if self.teacher_callback.resume_from is not None:
            return self.teacher_callback.resume_from
        folder = getattr(getattr(self.model, "config", None), "_name_or_path", "")  # type: ignore[attr-defined]
        if folder and (Path(folder) / FILE).is_file():
            return str(folder)
        raise RuntimeError(
            "evaluate_with='teacher' before train(): there is no teacher yet. Train first, or read one: "
            "TeacherCallback(resume_from=CHECKPOINT), or a model from_pretrained(CHECKPOINT) whose folder "
            f"holds {FILE}; evaluate_with='student' evaluates the model itself"
        )

    def _load_best_model(self) -> None:
        super()._load_best_model()  # type: ignore[misc]
        if self._evaluate_with == "teacher" and self.teacher is not None:
            state = self.state  # type: ignore[attr-defined]
            # The run counts as a whole, and not as long as the best checkpoint.
            self.teacher_callback.on_train_end(self.args, state, self.control)  # type: ignore[attr-defined]
            teacher = self.teacher_callback.load(self.model, state.best_model_checkpoint)  # type: ignore[attr-defined]
            teacher.copy_to(self.model)  # type: ignore[attr-defined]

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns: list[str]
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        own = [c for c in self._signature_columns if not c.startswith(_PREFIX)]
        self._signature_columns = [*own, *(_PREFIX + c for c in own)]


class TeacherTrainer(TeacherMixin, Trainer):  # type: ignore[misc]
    """The Trainer of transformers with a teacher; see `TeacherMixin`."""


def _own(inputs: Inputs) -> dict[str, Any]:
    """Return a batch without the teacher's columns."""
    return {k: v for k, v in inputs.items() if not k.startswith(_PREFIX)}


def _reduced(criterion: Criterion, compared: Comparison, targets: Any, count: Tensor | None) -> Tensor:
    """Return the sum over the positions that count, divided by `count`, or by their number if it is None."""
    values, mask = compared.values, compared.mask
    if not isinstance(values, Tensor):
        return criterion(values, targets)
    if criterion.takes_mask:
        return criterion(values, targets, mask=mask, num_items=count)
    if mask is not None:
        values, targets = values[mask], targets[mask]
    number = values[..., 0].numel()
    mean = criterion(values, targets) if number else values.sum()  # 0, with a gradient
    return mean if count is None else mean * (number / count)


def _is_blind(criterion: Criterion) -> bool:
    """Return whether a criterion sees no difference between single outputs."""
    return not copy.deepcopy(criterion)(torch.zeros(1, 1), torch.ones(1, 1)).any()


def __dir__() -> list[str]:
    return __all__
