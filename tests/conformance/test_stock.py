"""With the solver off ours is stock bit for bit: every scheduler, 4- and 9-channel UNets."""

import numpy as np
import pytest
import tiny
from subjects import SUBJECTS

STOCK, NONE, _ = SUBJECTS
UNSEEDED = "DPMSolverSDEScheduler"  # draws its own seeds
SLOW = ("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler")
CLASSES = [cls for cls in tiny.schedulers() if cls.__name__ not in (UNSEEDED, *SLOW)]


@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_solver_none_is_stock(parts, cls, channels):
    parts["unet"] = tiny.unet(channels)
    images = []
    for subject in (STOCK, NONE):
        pipe = subject.make(parts)
        pipe.scheduler = cls.from_config(parts["scheduler"].config)
        images.append(subject.images(pipe, strength=0.8))
    assert np.array_equal(*images)
