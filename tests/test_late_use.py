"""Outputs used later than they may be, and dtypes that a device cannot do: errors that say so."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxsplit
from fxsplit.errors import DeviceError, PipelineError
from fxsplit.runtime.precision import check_autocast
from fxsplit.trace.replay import Surroundings
from tests.comparison import CHAIN2, TRANSPORTS


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_output_stays_but_its_backward_comes_before_the_next_step(transport: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    with fxsplit.compile(model, CHAIN2, cuts=["2"], chunks=2, example_inputs=x, transport=transport) as pipe:
        optimizer = pipe.optimizer(torch.optim.SGD, lr=0.1)
        late, early = pipe(x), pipe(x)
        before = late.detach().clone()
        early.square().sum().backward()
        optimizer.step()
        assert torch.equal(late, before)
        with pytest.raises(PipelineError, match=r"after an optimizer's step[^$]*1 steps since"):
            late.square().sum().backward()
        pipe(x).square().sum().backward()  # it goes on


def test_autocast_to_what_a_device_cannot_do_is_refused() -> None:
    cpu = torch.device("cpu")
    check_autocast(Surroundings(True, (("cpu", torch.bfloat16), ("cuda", torch.float16))), [cpu])
    with pytest.raises(DeviceError, match="autocast to float8_e4m3fn is not for this device"):
        check_autocast(Surroundings(True, (("cpu", torch.float8_e4m3fn),)), [cpu])
