"""Settings for all tests: no network, no GPU test where there is no GPU, and no more threads than cores."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any test imports a hub client

import pytest
import torch

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):  # they share the cores
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))


CORE = {f"test_{name}.py" for name in ("loss", "objective", "optimize", "proximal", "red", "solve", "spread")}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name in CORE:
            item.add_marker(pytest.mark.core)
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
