"""The base class for mean teachers: updates, saving and loading."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gradkit.core.caller import caller_level
from gradkit.core.context import Context
from gradkit.core.ranks import as_part_of, is_sharded, local, reshard
from gradkit.core.transform import Transform
from gradkit.core.unwrapping import modules_by_path, unwrapped
from gradkit.teachers.copying import make_teacher, saved_buffers
from gradkit.teachers.decay import warmed_up
from gradkit.teachers.following import Buffers, Following, Plan, Share, is_short, paired

_SAMPLES = 8


class MeanTeacher(Transform):
    """Base class for teachers, which follow a student after each applied step; see `EMA`.

    A subclass is a dataclass with the fields below. It calls `_begin` after it has checked them,
    and `_move` from `after_step`.

    Attributes:
        student: The module that is trained.
        teacher: The module that follows it.
        warmup: Whether to start as a plain mean of the student's weights.
        in_state: Whether the optimizer's state dict includes the teacher.
        buffers: What the teacher's buffers do.
    """

    student: nn.Module
    teacher: nn.Module
    warmup: bool
    in_state: bool
    buffers: Buffers

    def _begin(self) -> None:
        if not isinstance(self.in_state, bool):
            raise TypeError(f"in_state is {self.in_state!r}; pass True or False")
        if self.buffers not in ("copy", "average", "skip"):
            raise ValueError(f"buffers is {self.buffers!r}; choose 'copy', 'average' or 'skip'")
        self.teacher = make_teacher(self.student, self.teacher)
        self._following = Following(self.teacher, self.student, buffers=self.buffers)
        self._plan: Plan | None = None
        self._saved_mark: str | None = None
        self.state["t"] = 0

    def before_step(self, context: Context) -> None:
        """Check that the teacher can follow the student.

        Raises:
            ValueError: If it cannot.
        """
        self._plan = self._following.plan(self.teacher, self.student)

    def after_load(self) -> None:
        """Warn if the teacher is not the saved one."""
        saved, self._saved_mark = self._saved_mark, None
        if saved is not None and saved != self.mark():
            warnings.warn(
                f"the teacher of {type(self).__name__} is not the one that was saved with the "
                "optimizer's state, so that its average would start again from what it holds now, "
                "unless it is still to be loaded; save and load teacher.state_dict(), at best "
                "before the optimizer's, or pass in_state=True, with which that holds the teacher",
                UserWarning,
                stacklevel=caller_level(),
            )

    def _move(self, share: Share) -> None:
        """Move the teacher, and count the step."""
        plan = self._plan or self._following.plan(self.teacher, self.student)
        self._plan = None
        self._following.move(plan, share)
        self.state["t"] += 1

    def _present(self, decay: float) -> float:
        """A decay in the step that is being applied: during warm-up less than its final value."""
        return warmed_up(decay, self.state["t"] + 1) if self.warmup else decay

    # What is saved with the optimizer.

    def tensors(self) -> dict[str, tuple[Tensor | None, Tensor]]:
        """The float32 averages of weights in half precision, and the teacher if `in_state`."""
        found: dict[str, tuple[Tensor | None, Tensor]] = {}
        shadows = self._following.shadows
        if not (self.in_state or shadows):
            return found
        reshard(self.teacher.modules())
        for pair in paired(self.teacher, self.student):
            if self.in_state:
                found[f"teacher.{pair.name}"] = (pair.its, pair.own.detach())
            if is_short(pair.own) and pair.name in shadows:
                shadow = self._following.shadow(pair)
                found[f"shadow.{pair.name}"] = (pair.its, as_part_of(shadow, pair.own))
        if self.in_state:
            for name, buffer in saved_buffers(unwrapped(self.teacher)):
                found[f"buffer.{name}"] = (None, buffer.detach())
        return found

    def check_tensors(self, saved: Mapping[str, Tensor]) -> None:
        """Check that saved tensors fit this teacher.

        Raises:
            ValueError: If they do not.
        """
        teacher = unwrapped(self.teacher)
        reshard(teacher.modules())
        own = dict(teacher.named_parameters())
        modules = modules_by_path(teacher)
        for key, value in saved.items():
            kind, _, name = key.partition(".")
            if kind == "buffer" and name.rpartition(".")[0] in modules:
                continue
            if kind == "buffer" or name not in own:
                raise ValueError(
                    f"the saved teacher has {name!r} and this one has not; the state is of "
                    "another model"
                )
            if value.shape != own[name].shape:
                raise ValueError(
                    f"the saved teacher's {name!r} has shape {tuple(value.shape)} where this one's "
                    f"has {tuple(own[name].shape)}; the state is of another model"
                )
            if is_sharded(value) != is_sharded(own[name]):
                raise ValueError(
                    f"the saved teacher's {name!r} is {'sharded' if is_sharded(value) else 'whole'}"
                    " and this one's is not; save and load by torch.distributed.checkpoint, which "
                    "shards it anew"
                )
        has_teacher = any(key.startswith("teacher.") for key in saved)
        missing = [name for name in own if has_teacher and f"teacher.{name}" not in saved]
        if missing:
            raise ValueError(
                f"the saved teacher has no {missing[0]!r} and this one has; the state is of "
                "another model"
            )

    @torch.no_grad()
    def load_tensors(self, saved: Mapping[str, Tensor], mark: str | None) -> None:
        """Load a saved teacher, or else keep its fingerprint for `after_load`."""
        teacher = unwrapped(self.teacher)
        self._plan = None
        own, shadows = dict(teacher.named_parameters()), self._following.shadows
        old, found = dict(shadows), False
        shadows.clear()
        for key, value in saved.items():
            kind, _, name = key.partition(".")
            if kind == "teacher":
                local(own[name]).copy_(local(value))
                found = True
            elif kind == "shadow" and is_short(own[name]):
                shadows[name] = local(value).to(own[name].device, torch.float32, copy=True)
            elif kind == "buffer":
                path, _, leaf = name.rpartition(".")
                _set_buffer(teacher.get_submodule(path), leaf, value)
        for name in old.keys() - shadows.keys():
            if name in own and is_short(own[name]):
                shadows[name] = local(own[name]).detach().to(torch.float32, copy=True)
        self._saved_mark = None if found else mark

    @torch.no_grad()
    def mark(self) -> str | None:
        """A hash of a few elements of the teacher's weights; None if they are sharded."""
        parameters = [*unwrapped(self.teacher).parameters()]
        if any(is_sharded(each) or each.is_meta for each in parameters):
            return None
        samples: list[Tensor] = []
        with torch._C.DisableTorchFunctionSubclass():
            for each in parameters:
                numbers = torch.view_as_real(each) if each.is_complex() else each
                count = min(_SAMPLES, numbers.numel())
                if count and numbers.layout == torch.strided and not numbers.is_quantized:
                    where = torch.arange(count, device=each.device) * (numbers.numel() - 1)
                    sample = numbers.detach().take(where // max(count - 1, 1))
                    samples.append(sample.to(torch.float32))
            by_device = {sample.device: list[Tensor]() for sample in samples}
            for sample in samples:
                by_device[sample.device].append(sample)
            joined = [torch.cat(alike).cpu() for alike in by_device.values()]
        data = b"".join(each.numpy().tobytes() for each in joined)
        return hashlib.blake2b(data, digest_size=8).hexdigest() if data else None


def _set_buffer(module: nn.Module, key: str, value: Tensor) -> None:
    own = dict(module._buffers.items()).get(key)
    if own is not None and own.shape == value.shape and own.dtype == value.dtype:
        local(own).copy_(local(value))
    else:
        device = value.device if own is None else own.device
        module._buffers[key] = value.detach().to(device, copy=True)
