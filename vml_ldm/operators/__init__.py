"""What the camera did: measurement operators, and a measurement with its noise.

An operator is any callable that maps images (B, 3, H, W) with values in [0, 1] to a measurement and that torch can
differentiate. It knows nothing of latents, schedulers or prompts. A `Measurement` binds an operator to what was
observed, ``y = A(x0) + n`` with ``n ~ N(0, sigma_y^2 I)``.

    operator             y                                     pinv            solve
    Mask                 m * x                                 exact           closed form
    Crop, Subsample      a rectangle; some rows, columns       exact           closed form
    Downsample           block averages, or bicubic            exact           closed form
    GaussianBlur         k * x                                 regularised     closed form
    Blur, MotionBlur     k * x                                 regularised     closed form if circular
    Grayscale            w . x                                 exact           closed form
    CompressedSensing    random Walsh-Hadamard coefficients    exact           closed form
    FourierLines         lines of the Fourier transform        exact           closed form
    JPEG                 decoded after compression             nonlinear: start only
    HDR, Gamma           clipped contrast; a tone curve        nonlinear: start only
    NonlinearBlur        blur of light, then a tone curve      nonlinear: start only
    PhaseRetrieval       |F x|, oversampled                    nonlinear: start only

``Compose(a, b)``, or ``b @ a``, is first a, then b; `Custom` takes a function and its vector-Jacobian product,
`LinearCustom` a linear one, whose adjoint torch finds; `from_physics` takes deepinv's. All of them say whether they are
``linear``. A linear one has ``adjoint(y)``, ``normal(x) = A^T A x``, ``pinv(y)`` and ``solve(b, rho) = (A^T A + rho
I)^-1 b`` (`LinearOperator`); ``start(y)`` is an image in [0, 1] to begin from. y has the image's dtype, float32 or
float64 (complex for FourierLines), and its device: at each call the tensors that an operator holds follow the image.
"""

from .base import (
    Compose,
    LinearOperator,
    Operator,
    column,
    conjugate_gradients,
    dot,
    is_linear,
    is_whole,
    length_of_rms,
    normal_of,
    own,
    squares,
    uncast,
)
from .blur import Blur, GaussianBlur, MotionBlur, NonlinearBlur, motion_kernel
from .foreign import Custom, LinearCustom, from_physics
from .jpeg import JPEG
from .measurement import Measurement, solves
from .pointwise import HDR, Gamma, Grayscale
from .sampling import Crop, Downsample, Mask, Subsample
from .spectral import CompressedSensing, FourierLines, PhaseRetrieval

__all__ = [
    "HDR",
    "JPEG",
    "Blur",
    "Compose",
    "CompressedSensing",
    "Crop",
    "Custom",
    "Downsample",
    "FourierLines",
    "Gamma",
    "GaussianBlur",
    "Grayscale",
    "LinearCustom",
    "LinearOperator",
    "Mask",
    "Measurement",
    "MotionBlur",
    "NonlinearBlur",
    "Operator",
    "PhaseRetrieval",
    "Subsample",
    "column",
    "conjugate_gradients",
    "dot",
    "from_physics",
    "is_linear",
    "is_whole",
    "length_of_rms",
    "motion_kernel",
    "normal_of",
    "own",
    "solves",
    "squares",
    "uncast",
]
