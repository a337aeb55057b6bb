"""With the solver off ours is stock bit for bit: every scheduler, 4- and 9-channel UNets."""

import numpy as np
import pytest
import tiny
from subjects import SUBJECTS

STOCK, NONE, _ = SUBJECTS
SEEDED = [cls for cls in tiny.schedulers() if cls.__name__ != "DPMSolverSDEScheduler"]  # that one draws its own seeds


@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize("cls", SEEDED, ids=lambda cls: cls.__name__)
def test_solver_none_is_stock(parts, cls, channels):
    parts["unet"] = tiny.unet(channels)
    images = []
    for subject in (STOCK, NONE):
        pipe = subject.make(parts)
        pipe.scheduler = cls.from_config(parts["scheduler"].config)
        images.append(subject.images(pipe, strength=0.8, num_inference_steps=6, num_images_per_prompt=2))
    assert np.array_equal(*images)
