"""Network calls counted, timed by the wall or by a device's own marks, and stopped between two of them."""

import pytest
import tiny
import torch
from gaussian import random_problem

from vml_ldm import VMLInpaintPipeline, VMLRestorePipeline
from vml_ldm.metering import Clock, Metered, Passes, Stopped
from vml_ldm.operators import Downsample


class Mark:
    """A mark in the queue of a device that is done with each piece of work long after it was asked for."""

    now, waits = 0.0, 0

    def __init__(self, device: torch.device):
        self.at = Mark.now
        Mark.now += 250.0

    def elapsed_time(self, other: "Mark") -> float:
        return other.at - self.at

    def synchronize(self) -> None:
        Mark.waits += 1


def test_a_device_is_timed_by_its_own_marks_and_waited_for_once():
    prior = random_problem()[0]
    metered = Metered(prior, clock=Clock(Mark))
    x = torch.zeros(1, 1, 1, len(prior.mean))
    for _ in range(3):
        metered.denoise(x, 1.0, 0.5)
    metered.decode(x)
    assert Mark.waits == 0
    assert metered.seconds == {"denoise": 0.75, "decode": 0.25}
    assert metered.seconds == {"denoise": 0.75, "decode": 0.25} and Mark.waits == 1


def test_a_draft_counts_on_the_same_clock():
    prior = random_problem()[0]
    metered = Metered(prior, clock=Clock(Mark))
    x = torch.zeros(1, 1, 1, len(prior.mean))
    metered.drafting(prior).decode(x)
    metered.decode(x)
    assert metered.calls == {"draft": 1, "decode": 1} and metered.seconds == {"draft": 0.25, "decode": 0.25}


def test_no_call_is_made_after_a_stop():
    prior = random_problem()[0]
    metered = Metered(prior)
    draft, x = metered.drafting(prior), torch.zeros(1, 1, 1, len(prior.mean))
    asked = []
    metered.stopped = lambda: bool(asked)
    image, pull = draft.decode_pullback(x)
    asked.append(True)
    for stopped in (lambda: metered.denoise(x, 1.0, 0.5), lambda: draft.decode(x), lambda: pull(image)):
        with pytest.raises(Stopped):
            stopped()
    assert metered.calls == {"draft": 1}
    metered.stopped = None
    metered.denoise(x, 1.0, 0.5)


class Bar:
    """What a progress bar was told."""

    def __init__(self, total: int = 0):
        self.total, self.made = total, []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def update(self, count: int = 1):
        self.made.append(count)


def test_a_bar_moves_with_each_pass_and_never_beyond_its_level():
    bar = Bar()
    passes = Passes(bar, [3, 1])
    for name in ("denoise", "decode", "denoise_vjp", "denoise"):
        passes.called(name)
    assert bar.made == [1, 1]
    passes.ended()  # it came to rest early
    assert sum(bar.made) == 3
    passes.called("denoise")
    passes.called("denoise")  # more than was foretold
    passes.ended()
    assert sum(bar.made) == 4


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("way", ["inpaint", "inpaint, plain", "restore", "red-diff"])
def test_the_pipelines_bars_count_passes(way, guided, monkeypatch):
    """All of them, where no image rests: y has no noise."""
    inpaints = way.startswith("inpaint")
    pipe = (VMLInpaintPipeline if inpaints else VMLRestorePipeline)(**tiny.components(), requires_safety_checker=False)
    bars = []
    monkeypatch.setattr(pipe, "progress_bar", lambda total: bars.append(Bar(total)) or bars[-1])
    call = {"prompt": "a hat", "num_inference_steps": 12, "guidance_scale": 3.0 if guided else 1.0}
    if inpaints:
        call = {**tiny.HALF_PAINTED, **call, "inner_steps": 2 if way == "inpaint, plain" else None}
    else:
        operator = Downsample(2)
        call |= {"y": operator(torch.rand(1, 3, 64, 64)), "operator": operator, "height": 64, "width": 64}
        call |= {"solver": "red-diff" if way == "red-diff" else "vml"}
    if way == "red-diff" and guided:
        pytest.skip("RED-diff takes no guidance")
    report = pipe(**call | {"return_report": True}, generator=torch.Generator().manual_seed(0)).report
    [bar] = bars
    pairs = guided * len(report.trace) if way == "inpaint" else 0  # both prompts in one pass, which counts as two
    assert sum(bar.made) == bar.total == report.calls["denoise"] - pairs
    assert bar.made.count(0) <= report.levels and max(bar.made) == 1
