"""How a number is written for people: significant digits, SI prefixes, money, durations, counts.

Pure functions of finite numbers, shared by the terminal and the pages, so that a figure reads the same in both.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

PREFIXES = dict(zip(range(-3, 11), ["n", "µ", "m", "", *"kMGTPEZYRQ"], strict=True))
MINUTE, HOUR, DAY = 60, 3600, 86_400


def significant(value: float, digits: int = 3) -> str:
    """Plain decimals with `digits` significant digits and no trailing zeros: 12,300, 1.23, 0.00123."""
    rounded = float(f"{value:.{digits - 1}e}")
    text = f"{rounded:,.{max(0, digits - 1 - _exponent(value, digits))}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def si(value: float, unit: str, digits: int = 3) -> str:
    """An amount with an SI prefix, nano to quetta: si(1.2e12, "FLOP") is "1.2 TFLOP"."""
    power = min(max(_exponent(value, digits) // 3, min(PREFIXES)), max(PREFIXES))
    return f"{significant(value / 1000.0**power, digits)} {PREFIXES[power]}{unit}"


def count(n: float) -> str:
    """A number of things, as the field writes it: 9,999 in full, then 12.3k, 3.4M, 7B, 15T."""
    if abs(n) < 10_000:
        return f"{round(n):,}"
    power = min(_exponent(n, 3) // 3, 4)
    return significant(n / 1000**power) + " kMBT"[power]


def money(usd: float) -> str:
    """US dollars: cents from a dollar on, none from $1,000 on, two significant digits below a dollar."""
    sign, usd = "-" if usd < 0 else "", abs(usd)
    if round(usd) >= 1_000_000:
        return f"{sign}${count(usd)}"
    if usd >= 999.995:
        return f"{sign}${usd:,.0f}"
    if usd == 0:
        return "$0"
    if usd < 1e-6:
        return f"{sign}<$0.000001"
    whole, _, decimals = f"{usd:.{max(2, 1 - _exponent(usd, 2))}f}".partition(".")
    return f"{sign}${whole}.{decimals[:2]}{decimals[2:].rstrip('0')}"


def duration(seconds: float) -> str:
    """A length of time in its two largest units: 420 ms, 12.3 s, 4 min 7 s, 3 h 5 min, 2 d 4 h."""
    if seconds < 59.95:
        return si(seconds, "s") if seconds else "0 s"
    if round(seconds) < HOUR:
        return _two_units(seconds, MINUTE, "min", 1, "s")
    if round(seconds / MINUTE) < DAY // MINUTE:
        return _two_units(seconds, HOUR, "h", MINUTE, "min")
    return _two_units(seconds, DAY, "d", HOUR, "h")


def amount(value: float, unit: str) -> str:
    """A value with its unit: a resource of the ledger (`usd`, `flops`, ...), or a word to set after it."""
    return _WRITERS.get(unit, lambda number: f"{significant(number, 4)} {unit}".rstrip())(value)


def _exponent(value: float, digits: int) -> int:
    """The power of ten of a value once it is rounded to `digits` significant digits."""
    return int(f"{value:.{digits - 1}e}".partition("e")[2])


def _two_units(seconds: float, large: int, large_name: str, small: int, small_name: str) -> str:
    whole, rest = divmod(round(seconds / small), large // small)
    return f"{whole:,} {large_name}" + (f" {rest} {small_name}" if rest else "")


def _counted(n: float, things: str) -> str:
    return f"{count(n)} {things}"


_WRITERS: dict[str, Callable[[float], str]] = {
    "tokens": partial(_counted, things="tokens"),
    "parameters": partial(_counted, things="parameters"),
    "steps": partial(_counted, things="steps"),
    "flops": partial(si, unit="FLOP"),
    "seconds": duration,
    "usd": money,
    "kwh": lambda kwh: si(1000 * kwh, "Wh"),
    "kgco2e": lambda kg: si(1000 * kg, "gCO₂e"),
}
