"""Numbers as people read them: one place that decides digits and units, for the page and the terminal."""

from __future__ import annotations

NONE = "–"


def value(number: float | None, metric: str) -> str:
    """A metric: accuracy in percent with one digit, perplexity with three figures or two decimals."""
    if number is None:
        return NONE
    if metric == "accuracy":
        return f"{100 * number:.1f}%"
    return f"{number:.2f}" if number < 1000 else f"{number:.3g}"


def plus_minus(mean: float | None, spread: float | None, metric: str) -> str:
    """``mean ± spread`` in the metric's unit; the mean alone without a spread."""
    if mean is None or spread is None:
        return value(mean, metric)
    if metric == "accuracy":
        return f"{100 * mean:.1f} ± {100 * spread:.1f}%"
    return f"{value(mean, metric)} ± {value(spread, metric)}"


def gap(closed: float | None, spread: float | None) -> str:
    """A share of the gap in whole percent, or with one digit where the spread asks for it."""
    if closed is None:
        return NONE
    if not spread:  # one seed, or random itself
        return f"{100 * closed:.0f}%"
    digits = 0 if spread >= 0.01 else 1
    return f"{100 * closed:.{digits}f} ± {100 * spread:.{digits}f}%"


def interval(bounds: tuple[float, float] | list[float] | None) -> str:
    """A confidence interval of a share in whole percent, or with one digit where it is narrow; empty for none."""
    if bounds is None:
        return ""
    low, high = bounds
    digits = 0 if high - low >= 0.02 else 1
    return f"{100 * low:.{digits}f} to {100 * high:.{digits}f}%"


def figures(number: float | None, digits: int = 3) -> str:
    """A number with so many significant figures."""
    if number is None or number != number:
        return NONE
    return f"{number:.{digits}g}".replace("e-0", "e-").replace("e+0", "e")


def fixed(number: float | None, decimals: int) -> str:
    """A number with so many decimals."""
    return NONE if number is None or number != number else f"{number:.{decimals}f}"


def count(number: int | None) -> str:
    """A count with thousands separated."""
    return NONE if number is None else f"{number:,}"


def duration(seconds: float | None) -> str:
    """Seconds as 12.3 s, 4 min 05 s or 2 h 03 min."""
    if seconds is None:
        return NONE
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
