"""Numbers as people read them."""

from __future__ import annotations

MIB, GIB = 1 << 20, 1 << 30


def count(number: int) -> str:
    """Three or four digits and a unit of thousands: 812, 65.5K, 1.31B, 15.0T."""
    if abs(number) < 1000:
        return str(number)
    value = float(number)
    for unit in ("K", "M", "B", "T"):
        value /= 1000
        # Where rounding makes four digits before the point, the next unit says it in fewer.
        if abs(value) < 999.5 or unit == "T":
            break
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f}{unit}"


def size(num_bytes: int) -> str:
    """Bytes in GiB, MiB or KiB: 37.4 GiB, 812 MiB, 7.5 MiB."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:,.{int(unit == GIB or num_bytes < 10 * unit)}f} {name}"
    return f"{num_bytes / 1024:,.0f} KiB"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, 0:12:34; hours go on beyond a day (31:00:00), so that the form is always the same."""
    whole = round(max(0.0, seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
