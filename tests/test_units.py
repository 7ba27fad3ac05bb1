"""Units: what parses, to what, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.units import format_bytes, format_time, parse


@pytest.mark.parametrize(
    ("text", "dimension", "value"),
    [
        ("80 GiB", "bytes", 80 * 2**30),
        ("80GB", "bytes", 80e9),
        ("8 Gb", "bytes", 1e9),
        ("450 GB/s", "bytes/s", 450e9),
        ("400 Gb/s", "bytes/s", 50e9),
        ("2.5 us", "seconds", 2.5e-6),
        ("2.5 µs", "seconds", 2.5e-6),
        ("989 TFLOP/s", "flop/s", 989e12),
        ("0.7 kW", "watts", 700.0),
        ("2.5 $/h", "dollars/h", 2.5),
        ("-1 GB/s", "bytes/s", -1e9),
        (0, "bytes", 0.0),
    ],
)
def test_a_number_with_its_unit_becomes_si(text: str | int, dimension: str, value: float) -> None:
    assert parse(text, dimension) == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "dimension"),
    [
        ("80", "bytes"),
        (80, "bytes"),
        (True, "bytes"),
        ("80 GB", "bytes/s"),
        ("400 Gb/s", "bytes"),
        ("3 gB", "bytes"),
        ("fast", "bytes/s"),
        ("1e999 GB", "bytes"),
        ("nan GB", "bytes"),
        ("2 m", "seconds"),
    ],
)
def test_a_missing_or_foreign_unit_is_refused(text: str | int, dimension: str) -> None:
    with pytest.raises(ValueError):
        parse(text, dimension)


@given(st.floats(min_value=1e-3, max_value=1e6), st.sampled_from(["B", "KiB", "MiB", "GiB"]))
def test_formatting_and_parsing_agree(number: float, unit: str) -> None:
    value = parse(f"{number!r} {unit}", "bytes")
    assert parse(format_bytes(value), "bytes") == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize(("seconds", "text"), [(0.0, "0 s"), (1.25e-3, "1.25 ms"), (2.5e-6, "2.5 µs"), (3e-10, "0.3 ns"), (90.0, "90 s")])
def test_time_is_shown_in_the_unit_that_reads_best(seconds: float, text: str) -> None:
    assert format_time(seconds) == text
