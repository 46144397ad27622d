"""When a buffer lives, and where threads must wait for each other."""

from __future__ import annotations

from dataclasses import dataclass

from fxquant.backends.native.arena import Arena, Lifetime, place
from fxquant.backends.native.planner import ProgramPlan
from fxquant.backends.native.steps import Pointer, Step
from fxquant.backends.native.values import Buffer, Value

__all__ = ["Split", "place_buffers", "set_barriers", "split_batch"]

# Below this much work, in estimated nanoseconds, waking and waiting cost more than they gain.
_SERIAL_BELOW = 3000.0


def place_buffers(plan: ProgramPlan) -> Arena:
    """Give every buffer of the arena its offset, for one sample."""
    first, last = _lifetimes(plan)
    samples = plan.batch or 1
    return place(
        Lifetime(buffer, -(-buffer.size // samples), first[buffer], last[buffer])
        for buffer in first
    )


def _lifetimes(plan: ProgramPlan) -> tuple[dict[Buffer, int], dict[Buffer, int]]:
    """The first and the last step that touch each buffer of the arena."""
    first: dict[Buffer, int] = {}
    last: dict[Buffer, int] = {}
    for index, step in enumerate(plan.steps):
        for value in (*step.reads, *step.writes):
            if value.buffer.place == "arena":
                first.setdefault(value.buffer, index)
                last[value.buffer] = index
    return first, last


@dataclass(frozen=True)
class Split:
    """The steps before `at` run sample by sample; `carried` are the buffers that live on."""

    at: int
    carried: tuple[Buffer, ...]


def split_batch(plan: ProgramPlan) -> Split:
    """How far a thread takes its samples one by one, so that their values stay in its cache.

    Sample by sample a step reads its constants again and again, all samples at once it moves
    values that no cache holds: the split is where the bytes of both are fewest.
    """
    if plan.batch is None or plan.whole_batch:
        return Split(0, ())
    first, last = _lifetimes(plan)
    if any(buffer.size % plan.batch for buffer in first):
        return Split(0, ())
    constants = [_constant_bytes(step) for step in plan.steps]
    values = [_value_bytes(step) // plan.batch for step in plan.steps]
    costs = [
        sum(constants[:at])
        + sum(values[at:])
        + sum(2 * b.size // plan.batch for b in first if first[b] < at <= last[b])
        for at in range(len(plan.steps) + 1)
    ]
    best = costs.index(min(costs))
    return Split(best, tuple(b for b in first if first[b] < best <= last[b]))


def _constant_bytes(step: Step) -> int:
    buffers = [field.buffer for field in step.fields.values() if isinstance(field, Pointer)]
    return sum(buffer.size for buffer in buffers if buffer.place == "constant")


def _value_bytes(step: Step) -> int:
    return sum(v.tensor.numel() * v.dtype.itemsize for v in (*step.reads, *step.writes))


def set_barriers(plan: ProgramPlan) -> None:
    """Mark the steps that one thread does, and those that all threads must wait in front of.

    A step needs what other threads have done since the last barrier where it touches memory that
    they touched, one of them writing. Steps of one thread follow each other without waiting.
    """
    since: list[Step] = []
    for step in plan.steps:
        step.serial = step.work < _SERIAL_BELOW and not step.is_border
        step.barrier = any(
            _conflict(step, other) for other in since if not (step.serial and other.serial)
        )
        if step.barrier:
            since = []
        since.append(step)


def _conflict(step: Step, other: Step) -> bool:
    pairs = [
        *((mine, theirs) for mine in step.reads for theirs in other.writes),
        *((mine, theirs) for mine in step.writes for theirs in other.reads),
    ]
    if any(_share(mine, theirs) for mine, theirs in pairs):
        return True
    apart = step.is_border != other.is_border
    return any(
        _share(mine, theirs) and not (apart and mine.buffer is theirs.buffer)
        for mine in step.writes
        for theirs in other.writes
    )


def _share(mine: Value, theirs: Value) -> bool:
    """Whether two values may have a byte in common."""
    a, b = mine.buffer, theirs.buffer
    if a is b:
        return not _side_by_side(mine, theirs)
    if a.place != b.place or a.place == "constant":
        return False
    if a.place in ("input", "output"):
        return a.port == b.port
    return a.offset < b.offset + b.size and b.offset < a.offset + a.size


def _side_by_side(mine: Value, theirs: Value) -> bool:
    """Whether two values are different channels of one image."""
    if mine.strides[2:] != theirs.strides[2:] or len(mine.shape) != 4 or len(theirs.shape) != 4:
        return False
    if mine.strides[1] != 1 or theirs.strides[1] != 1:
        return False
    pixel = mine.strides[3]
    starts = [int(value.tensor.storage_offset()) % pixel for value in (mine, theirs)]
    ends = [start + value.shape[1] for start, value in zip(starts, (mine, theirs), strict=True)]
    return ends[0] <= starts[1] or ends[1] <= starts[0]
