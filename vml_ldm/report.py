"""What the user is told of a solve: its agreement with the measurement, the VAE's own limit, and the cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from math import hypot, nan

NETWORKS = ("denoise", "decode", "draft", "encode")
_SUMMED = ("calls", "seconds", "retries")


@dataclass
class Report:
    """The figures of one call. Lists run over the batch; residuals are rms values in units of y (images in [0, 1]).

    Attributes:
        sigma_y: the noise that the caller named.
        vae_error: rms of what the VAE's own round trip, Dec(Enc(.)), changes in the measurement of an image.
        effective_sigma_y: the sigma_y that VML takes, with a share of vae_error, see `vml_ldm.measuring.measure`.
        residual: rms of y - A(image), before any paste.
        levels, inner_steps, last_steps: noise levels, and inner steps at each of them and at the last at the most.
        correct_steps: corrections of the last estimate, at the most.
        jacobian, preset: which form, which preset ("": none).
        solver: "vml", "red-diff", which takes one step at each level and never the denoiser's Jacobian, or the name of
            the caller's own.
        drawn: of each image, how much was drawn at each step, in [0, 1]; empty: all.
        trace: a dict for each level: alpha, sigma, residual, nll, steps. The residual is that of the estimate that the
            level drew last, before what its last step made of it; `residual` is the answer's.
        retries: network passes repeated in float32 after non-finite values, by network.
        calls: network calls by kind; "..._vjp" are backward passes, "..._jvp" products by the Jacobian; "draft" is the
            small decoder, where one was used.
        seconds: time by kind, and "total".
        interrupted: the solve was stopped; `trace` has the levels that ended.
        memory: how graphs were kept ("plan"), the peak predicted for that above the weights ("predicted"), and what was
            allowed ("budget"), in bytes or None; where a small decoder drew, the same of its levels ("draft_plan",
            "draft_predicted").
    """

    sigma_y: list[float]
    vae_error: list[float]
    effective_sigma_y: list[float]
    residual: list[float]
    levels: int
    inner_steps: int
    jacobian: str
    preset: str = ""
    solver: str = "vml"
    last_steps: int | None = None
    correct_steps: int = 0
    drawn: list[float] = field(default_factory=list)
    trace: list[dict] = field(default_factory=list)
    retries: dict[str, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    memory: dict = field(default_factory=dict)
    interrupted: bool = False

    @property
    def expected(self) -> list[float]:
        """sqrt(sigma_y^2 + vae_error^2): the residual of the truth after the VAE's round trip, in units of y."""
        return [hypot(s, e) for s, e in zip(self.sigma_y, self.vae_error, strict=True)]

    @property
    def in_networks(self) -> float:
        """Seconds that were spent in the networks."""
        return _sum(self.seconds, *NETWORKS)

    @property
    def overhead(self) -> float:
        """Share of the solve's time that was spent outside the networks, in [0, 1]."""
        total = self.seconds.get("total", 0.0)
        return 1 - self.in_networks / total if total else 0.0

    def to_dict(self) -> dict:
        """Every field, `expected` and `overhead`, as plain Python values."""
        return {**asdict(self), "expected": self.expected, "overhead": self.overhead}

    def text(self) -> str:
        """Five lines for a terminal."""
        calls, seconds = self.calls, self.seconds
        ratio = [r / max(e, 1e-12) for r, e in zip(self.residual, self.expected, strict=True)]
        retries = ", ".join(f"{count} x {name}" for name, count in self.retries.items()) or "none"
        return "\n".join(
            [
                f"residual   {_row(self.residual)} rms on what was measured, before any paste",
                f"expected   {_row(self.expected)} = noise {_row(self.sigma_y)} and the VAE's own round trip "
                f"{_row(self.vae_error)}; residual / expected {_row(ratio, '.2f')}",
                f"solver     {self.solver}, {self._levels()}, {self._steps()}{self._preset()}; "
                f"float32 retries: {retries}{self._memory()}{self._part()}",
                f"networks   denoiser {calls.get('denoise', 0)} forward / {calls.get('denoise_vjp', 0)} backward, "
                f"decoder {calls.get('decode', 0)} / {calls.get('decode_vjp', 0)}{self._drafts()}, "
                f"encoder {calls.get('encode', 0)}",
                f"seconds    {seconds.get('total', 0):.2f}: denoiser {_sum(seconds, 'denoise'):.2f}, "
                f"decoder {_sum(seconds, 'decode', 'draft'):.2f}, encoder {seconds.get('encode', 0):.2f}, "
                f"rest {self.overhead:.1%}",
            ]
        )

    def plot(self):
        """The residual by level, a line for each image, and beside it the time by network: a matplotlib `Figure`.

        Dashed is what is expected of the truth after the VAE's round trip, see `expected`.

        Raises:
            ModuleNotFoundError: matplotlib is not installed (the extra `eval` has it).
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.2), layout="constrained")
        curve, cost = figure.subplots(1, 2, width_ratios=(2, 1))
        levels = range(1, len(self.trace) + 2)  # the last is the answer
        for image, expected in enumerate(self.expected):
            drawn = [_drawn(level["residual"][image]) for level in self.trace]
            (line,) = curve.semilogy(levels, [*drawn, self.residual[image]], marker="o")
            curve.axhline(expected, color=line.get_color(), linestyle="--", linewidth=1)
        curve.set(
            xlabel="level; at the end the answer",
            ylabel="rms residual",
            title="residual before the level's last step; dashed: expected of the truth",
        )
        curve.xaxis.get_major_locator().set_params(integer=True)
        total = self.seconds.get("total", 0.0)
        parts = {name: _sum(self.seconds, name) for name in NETWORKS} | {"rest": self.overhead * total}
        bars = cost.barh(list(parts), list(parts.values()))
        cost.bar_label(bars, fmt="%.2f", padding=2)
        cost.set(xlabel="seconds", title=f"{total:.1f} s")
        cost.margins(x=0.2)
        cost.invert_yaxis()
        return figure

    def _drafts(self) -> str:
        calls = self.calls
        return f" (small one {calls['draft']} / {calls.get('draft_vjp', 0)})" if "draft" in calls else ""

    def _levels(self) -> str:
        return (
            f"stopped after {len(self.trace)} of {self.levels} levels" if self.interrupted else f"{self.levels} levels"
        )

    def _memory(self) -> str:
        return f"; memory: {memory_text(self.memory)}" if self.memory else ""

    def _part(self) -> str:
        return f"; drawn around the hole: {_row(self.drawn, '.0%')} of the picture" if self.drawn else ""

    def _preset(self) -> str:
        return f", preset {self.preset}" if self.preset else ""

    def _steps(self) -> str:
        if self.solver == "red-diff":
            return "one step each"
        if self.solver != "vml":
            return "steps of its own"
        last = "" if self.last_steps in (None, self.inner_steps) else f", {self.last_steps} at the last"
        corrected = f", {self.correct_steps} corrections" if self.correct_steps else ""
        return f"up to {self.inner_steps} inner steps each{last}{corrected}, Jacobian {self.jacobian}"


def memory_text(memory: dict) -> str:
    """`Report.memory` in words: both plans, their peaks, and what was allowed."""
    plan, peak, budget = memory["plan"], memory["predicted"], memory["budget"]
    if peak is None:
        why = "unknown" if budget is None else f"not predicted: {in_units(budget)} are plenty"
        words = f"{plan} (peak {why})"
    else:
        limit = "" if budget is None else f" of {in_units(budget)}"
        words = f"{plan} (at most about {in_units(peak)}{limit} above the weights)"
    if memory.get("draft_plan") in (None, plan):
        return words
    draft = "" if memory["draft_predicted"] is None else f" ({in_units(memory['draft_predicted'])})"
    return f"{words}; {memory['draft_plan']}{draft} where the small decoder draws"


def in_units(count: int) -> str:
    """Bytes for people."""
    for unit, size in (("GiB", 1024**3), ("MiB", 1024**2), ("KiB", 1024)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"


def _drawn(value: float | None) -> float:
    """A figure of a trace, NaN where a level drew nothing."""
    return nan if value is None else value


def _row(values: list[float], form: str = ".4f") -> str:
    return " ".join(format(value, form) for value in values)


def _sum(seconds: dict[str, float], *names: str) -> float:
    return sum(seconds.get(name + kind, 0.0) for name in names for kind in ("", "_vjp", "_jvp"))


def join_reports(reports: Sequence[Report], groups: Sequence[Sequence[int]]) -> Report:
    """The report of a batch that was solved in groups, from theirs and from the places of their images.

    Lists are in the batch's order. Levels, steps and corrections are those of the group that had most; calls and
    seconds are sums; the trace has the levels of one group after another, with None for images of the others.
    """
    first, batch = reports[0], sum(map(len, groups))

    def spread(values: list, group: Sequence[int]) -> list:
        row = [None] * batch
        for place, value in zip(group, values, strict=True):
            row[place] = value
        return row

    def joined(name: str) -> list:
        rows = [spread(getattr(report, name), group) for report, group in zip(reports, groups, strict=True)]
        return [next(value for value in column if value is not None) for column in zip(*rows, strict=True)]

    lists = {name: joined(name) for name in ("sigma_y", "vae_error", "effective_sigma_y", "residual")}
    drawn = [report.drawn or [1.0] * len(group) for report, group in zip(reports, groups, strict=True)]
    if any(report.drawn for report in reports):
        lists["drawn"] = [share for _, share in sorted(zip(chain(*groups), chain(*drawn), strict=True))]
    trace = [
        {name: spread(value, group) if isinstance(value, list) else value for name, value in level.items()}
        for report, group in zip(reports, groups, strict=True)
        for level in report.trace
    ]
    most = {
        name: max(getattr(report, name) or 0 for report in reports)
        for name in ("levels", "inner_steps", "last_steps", "correct_steps")
    }
    sums = {name: dict(sum((Counter(getattr(r, name)) for r in reports), Counter())) for name in _SUMMED}
    return replace(first, **lists, **most, **sums, trace=trace, interrupted=any(r.interrupted for r in reports))
