"""Network calls counted, timed by the wall or by a device's own marks, and stopped between two of them."""

import pytest
import torch
from gaussian import random_problem

from vml_ldm.metering import Clock, Metered, Stopped


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
