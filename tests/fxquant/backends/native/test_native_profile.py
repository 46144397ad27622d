"""Every step of a program is timed, and says what it is."""

import pytest
import torch
from torch import nn

import fxquant


@pytest.mark.usefixtures("native")
def test_each_step_has_a_time_a_kernel_and_a_node() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    x = torch.randn(2, 3, 9, 9)
    q = fxquant.compile(model, "w8a8", calibration=x, target="native")
    segment = q.stages["native"].native_0.segments[0]
    outputs = [torch.empty(port.shape, dtype=port.dtype) for port in segment.plan.outputs]
    times = segment.program.profile(segment.plan.batch, [x], outputs)
    steps = zip(times, segment.plan.steps, strict=True)
    rows = [(time, step.kernel, step.node) for time, step in steps]
    assert sum(time for time, _, _ in rows) > 0
    assert [node for _, kernel, node in rows if kernel == "conv"] == ["_0", "_2"]
    assert torch.equal(outputs[0], q(x))
