"""How a solve spends its budget of denoiser calls: the presets, and what may be asked for by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .proximal import Proximal
from .solve import check_choices, check_corrections, check_renoise

STARTS = ("noise", "measurement")
RESTORE_STARTS = (*STARTS, "outline")
EXPLICIT = ("jacobian", "inner_steps", "renoise", "use_gradient_vae", "proximal")  # a call names; None: the preset's
THROUGHOUT = "throughout"
LEAST_NOISE = 0.1  # of the levels of a restoration, in units of the latent
MOST_NOISE = {"measurement": 1.0, "outline": 3.0}  # of its levels, by where it starts
_CORRECTING = {"measurement": 1 / 3, "outline": 1 / 6, "noise": 1 / 6}  # of its budget is for corrections
_MOST_CORRECTIONS = {"outline": 8, "noise": 8}  # of what y leaves open they know nothing, and lead it from the prior
_FEWEST_LEVELS = 4  # a short budget lowers the inner steps before it goes below these


@dataclass(frozen=True)
class Settings:
    """How the solver spends its budget. A preset is one of these; an explicit argument replaces its field.

    Attributes:
        budget: denoiser evaluations, as a multiple of `num_inference_steps`.
        inner_steps: K, inner steps at each level.
        fixed: K was asked for by name: it is not lowered for a short budget, and holds at the last level too. Otherwise
            that level, whose estimate is the answer, takes 2 K if K > 1 and nothing corrects it.
        jacobian: "exact" or "free".
        renoise: share of fresh noise in the next state, see `vml_ldm.solve.Levels`.
        stop_at: an image rests within a level once its residual is below stop_at times the effective sigma_y.
        correct_steps: corrections of the last estimate by the decoder (`vml_ldm.proximal.correct`), each of which
            counts as an evaluation. None: a restoration's take a third of the budget where it starts from the
            measurement, else a sixth, at most 8, for what holes and lost colours take is levels.
        start: where a restoration starts, one of `RESTORE_STARTS`; None: no restoration.
        proximal: levels end with a proximal step, see `vml_ldm.proximal`; None: the plain algorithm.
        levels: with a proximal step, how many, as a share of `num_inference_steps`; at least four of them, or as many
            as there are steps. The budget is then what they take.
        correct_share: with a proximal step, how many corrections, as a share of `num_inference_steps`.
        mostly_open: y leaves half or more of the picture open (`vml_ldm.measuring.leaves_most_open`): a level has half
            of its inner steps, unless K is fixed, for what is open comes in over the levels.
        use_gradient_vae: all levels but the last draw with the pipeline's `gradient_vae`; "throughout": the last too.
            None: all but the last where there is one.
    """

    budget: float
    inner_steps: int
    fixed: bool = False
    jacobian: str = "exact"
    renoise: float = 1.0
    stop_at: float = 1.0
    use_gradient_vae: bool | str | None = None
    correct_steps: int | None = None
    start: str | None = None
    mostly_open: bool = False
    proximal: Proximal | None = None
    levels: float = 0.0
    correct_share: float = 0.0

    def corrections(self, num_inference_steps: float) -> int:
        """How many steps correct the last estimate."""
        if self.correct_steps is not None:
            return self.correct_steps
        if self.proximal is not None:
            return round(self.correct_share * num_inference_steps)
        if not self._corrects:
            return 0
        share = int(_CORRECTING[self.start] * self.budget * num_inference_steps)
        return min(share, _MOST_CORRECTIONS.get(self.start, share))

    def takes_gradients(self, num_inference_steps: float) -> bool:
        """Whether any network is asked for a gradient. (Proximal levels of an operator without a step in pixels always
        ask the decoder.)"""
        by_decoder = self.proximal is not None and self.proximal.steps > 0
        return self.inner_steps > 0 or by_decoder or self.corrections(num_inference_steps) > 0

    def split(self, num_inference_steps: float) -> tuple[int, int]:
        """(levels, K) that the budget pays; a level costs K + 1 denoiser evaluations, the last one more.

        K is the preset's, or less where that would leave fewer than four levels (then at least 1). With a proximal step
        the levels are a share of the steps, whatever K is.
        """
        if self.proximal is not None:
            steps = max(1, int(num_inference_steps))
            return min(steps, max(_FEWEST_LEVELS, round(self.levels * steps))), self.inner_steps
        inner = self.inner_steps if self.fixed else self._affordable(_FEWEST_LEVELS, num_inference_steps)
        more = replace(self, inner_steps=inner).last_steps - inner
        return max(1, (self._evaluations(num_inference_steps) - more) // (inner + 1)), inner

    def inner_steps_of(self, levels: int, num_inference_steps: float) -> int:
        """K for so many levels, which are given: the preset's, or as many as the budget pays, then at least 1."""
        return (
            self.inner_steps
            if self.fixed or self.proximal is not None
            else self._affordable(levels, num_inference_steps)
        )

    @property
    def last_steps(self) -> int:
        """Inner steps at the last level."""
        alike = self.fixed or self.inner_steps < 2 or self.proximal is not None or self._corrects
        return self.inner_steps if alike else 2 * self.inner_steps

    @property
    def _corrects(self) -> bool:
        if self.correct_steps is None:
            return self.start is not None and self.inner_steps > 0
        return self.correct_steps > 0

    def _evaluations(self, num_inference_steps: float) -> int:
        """The denoiser's, of the budget: what the corrections leave."""
        return int(self.budget * num_inference_steps) - self.corrections(num_inference_steps)

    def _affordable(self, levels: int, num_inference_steps: float) -> int:
        """K that the budget pays for at so many levels, at least 1 and at most the preset's."""
        shares = levels + (not self._corrects)  # the last level has two where nothing corrects it
        most = max(1, self.inner_steps // 2) if self.mostly_open else self.inner_steps
        return min(most, max(1, (self._evaluations(num_inference_steps) - levels) // shares))


def count_sampled(steps: int, count: int, start: str) -> int:
    """How many levels a sampler is asked for, of which `pick_levels` takes `count`: a call's steps, or more where those
    would leave too few below the first (about a third of a sampler's are)."""
    return max(steps, count if start == "noise" else 4 * count)


def spread_levels(noise: Sequence[float], count: int) -> list[int]:
    """Which of a sampler's levels proximal levels are: `count`, evenly, the first the noisiest.

    Those of less noise than 0.1 are left out, if there are others, as `pick_levels` leaves them out.

    Args:
        noise: ``sigma / alpha`` of the levels, falling.
    """
    found = sum(value >= LEAST_NOISE for value in noise) or len(noise)
    return sorted({i * found // count for i in range(count)})


def pick_levels(noise: Sequence[float], count: int, start: str = "noise") -> list[int]:
    """Which of a sampler's levels a measurement is solved at: `count`, evenly, the last the least noisy that is left.

    Levels of less noise than 0.1 are left out: there the prior's score, all error, holds the answer away from y. (On 8
    validation images ending at 0.14 in place of 0.04 gave noisy super-resolution up to 0.9 dB, and cost other tasks up
    to 0.5 dB before the step in pixels.)

    From the measurement the first is the noisiest of at most 1: noise as large as the latents forgets what the
    measurement told. From an outline, whose colours are not to be kept, it is that of at most 3. From noise, no level
    is left out for that. (On 24 validation images in grey at most 5 in place of 3 gave 0.6 dB less.)

    Args:
        noise: ``sigma / alpha`` of the levels, falling; enough of them above 0.1, or those are all.
        start: one of `RESTORE_STARTS`.
    """
    found = sum(value >= LEAST_NOISE for value in noise) or len(noise)
    if start == "noise":
        return sorted({max(0, round((i + 1) * found / count) - 1) for i in range(count)})
    first, last = min(sum(value > MOST_NOISE[start] for value in noise), found - 1), found - 1
    return sorted({last - round(i * (last - first) / max(1, count - 1)) for i in range(count)})


# Chosen on validation images: few levels with many inner steps beat many levels with few, and steps at the last level,
# which y alone can still correct, beat steps before it.
PRESETS = {
    "fast": Settings(budget=0.5, inner_steps=4),
    "balanced": Settings(budget=1.0, inner_steps=7),
    "best": Settings(budget=2.0, inner_steps=15),
}


_BELOW = Proximal(alone_below=1.0, refresh=4)
# With proximal levels: chosen on validation images, by what the prompt asks for and by the truth at once.
PROXIMAL_PRESETS = {
    "fast": Settings(budget=1.0, inner_steps=0, levels=0.16, proximal=Proximal()),
    "balanced": Settings(budget=1.0, inner_steps=1, levels=0.16, correct_share=0.16, proximal=_BELOW),
    "best": Settings(budget=1.0, inner_steps=1, levels=0.32, correct_share=0.16, proximal=_BELOW),
}
# Guided, levels alone: on 24 prompts corrections told no more of them, and turned one picture's background grey; twelve
# levels in place of them leave less of a seam than eight.
_GUIDED_LEVELS = {"fast": 0.16, "balanced": 0.24, "best": 0.32}
_PLAIN = ("inner_steps", "jacobian")  # who names one of these asks for inner steps alone


def settings(preset: str, inpaints: bool = False, guided: bool = False, drafts: bool = True, **explicit) -> Settings:
    """The preset with the arguments that are not None in place of its own.

    Args:
        preset: "fast", "balanced" or "best".
        inpaints: the measurement is of pixels: levels are proximal unless `proximal` is False or a call names its inner
            steps or their Jacobian. Otherwise they are only where `proximal` asks for it.
        guided: the prior is guided: proximal levels then take no inner steps, unless the call names them, and an
            inpainting no corrections. A gradient lets the measurement have its way where the prompt should; the preset
            "balanced" takes half as many levels again instead.
        drafts: there is a small decoder. Without one proximal levels take no gradient through the decoder, which would
            cost more than all else: no inner steps, unless the call names them, and no corrections.
        explicit: fields of `Settings`; `proximal` may also be True, the preset's, or False, none.

    Raises:
        ValueError: an unknown preset or Jacobian, a negative or fractional number of inner steps, or a renoise that is
            not in [0, 1].
        TypeError: a `proximal` that is no `Proximal`, True or False.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset is {preset!r}; expected one of {', '.join(map(repr, PRESETS))}.")
    given = {name: value for name, value in explicit.items() if value is not None}
    proximal = given.pop("proximal", inpaints and not any(name in given for name in _PLAIN))
    if not isinstance(proximal, (bool, Proximal)):
        raise TypeError(f"proximal is {proximal!r}; expected True, False or a vml_ldm.Proximal.")
    chosen = PRESETS[preset] if proximal is False else PROXIMAL_PRESETS[preset]
    if isinstance(proximal, Proximal):
        given["proximal"] = proximal
    if chosen.proximal is not None and (guided or not drafts):
        chosen = replace(chosen, inner_steps=0, correct_share=0.0 if inpaints or not drafts else chosen.correct_share)
        chosen = replace(chosen, levels=_GUIDED_LEVELS[preset]) if inpaints and guided else chosen
    chosen = replace(chosen, fixed="inner_steps" in given, **given)
    check_choices(chosen.inner_steps, chosen.jacobian)
    if chosen.correct_steps is not None:
        check_corrections(chosen.correct_steps)
    check_renoise(chosen.renoise)
    if chosen.use_gradient_vae not in (True, False, None, THROUGHOUT):
        raise ValueError(
            f"use_gradient_vae is {chosen.use_gradient_vae!r}; expected True, False, None or {THROUGHOUT!r}."
        )
    return chosen
