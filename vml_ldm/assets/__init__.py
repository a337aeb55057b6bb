"""What ships in the box: a small Stable Diffusion checkpoint and example images it was not trained on."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent
_SPLITS = {"held_out": "held-out.txt", "validation": "validation.txt"}
_TRAINING, _DRAWN = "training.txt", "prompts.txt"


def bundled_model() -> str:
    """Return the folder of the bundled checkpoint (Stable Diffusion 1.x layout, 128 x 128 pixels).

    Give it to ``from_pretrained`` of :class:`vml_ldm.VMLInpaintPipeline` or of any Stable Diffusion pipeline.

    Raises:
        FileNotFoundError: the installation lacks the checkpoint.
    """
    folder = _FOLDER / "emoji-sd-128"
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"no checkpoint at {folder}; expected a folder with model_index.json. "
            "Install vml-ldm again from a complete copy, or pass the folder of another checkpoint."
        )
    return str(folder)


def example_images(split: str) -> list[tuple[Path, str]]:
    """Return (path, prompt) of the images of one split that ship in the box, in their list's order.

    The lists ``held-out.txt`` and ``validation.txt`` name every image that was kept from training; the
    images (256 x 256, RGBA, webp) of some of them are included.

    Args:
        split: "held_out" (for figures) or "validation" (for choosing settings).

    Raises:
        ValueError: no such split.
        FileNotFoundError: the installation lacks the list or all of its images.
    """
    if split not in _SPLITS:
        raise ValueError(f"split is {split!r}; expected one of {', '.join(map(repr, _SPLITS))}.")
    listed = _read_list(_FOLDER / _SPLITS[split])
    folder = _FOLDER / "images" / split
    shipped = [(folder / name, prompt) for name, prompt in listed if (folder / name).is_file()]
    if not shipped:
        raise FileNotFoundError(
            f"{folder} has none of the images listed in {_SPLITS[split]}. Install vml-ldm again from a complete copy."
        )
    return shipped


def training_list() -> list[tuple[str, str]]:
    """(file, prompt) of every image that the bundled checkpoint was trained on; the images do not ship in the box."""
    return _read_list(_FOLDER / _TRAINING)


def drawn_list() -> list[tuple[str, str]]:
    """(file, prompt) of training images that text-to-image draws recognisably, in the order in which they were tried.

    The head of the list tells the rule and the command that made it, see `vml_ldm.evaluation.choosing`.
    """
    return _read_list(_FOLDER / _DRAWN)


def _read_list(path: Path) -> list[tuple[str, str]]:
    """Read lines ``file.webp<TAB>prompt`` (more cells may follow), without empty lines and those that start with #."""
    if not path.is_file():
        raise FileNotFoundError(f"no list at {path}. Install vml-ldm again from a complete copy.")
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = (line.split("\t")[:2] for line in lines if line.strip() and not line.startswith("#"))
    return [(name.strip(), prompt.strip()) for name, prompt in rows]
