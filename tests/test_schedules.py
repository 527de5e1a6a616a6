"""Schedules: the card's indices on published grids, means and end points of the ramps."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guidancekit import (
    BetaCurve,
    Constant,
    Cosine,
    GuidanceError,
    Interval,
    Linear,
    Moment,
    PerStep,
    PowerCosine,
    Schedule,
    Triangle,
)
from guidancekit.schedules import SCHEDULES, from_config

RAMPS = (Linear, Cosine, Triangle)


def edm_grid(steps, low, high, rho):
    """Noise levels of the EDM paper, arXiv:2206.00364 Eq. 5."""
    ends = high ** (1 / rho), low ** (1 / rho)
    return [(ends[0] + i / (steps - 1) * (ends[1] - ends[0])) ** rho for i in range(steps)]


def iddpm_grid(steps, maximum=1000, c1=0.001, c2=0.008):
    """The iDDPM grid as the EDM paper writes it (Table 1, with j0 = 0)."""

    def alpha_bar(j):
        return math.sin(math.pi / 2 * j / maximum / (c2 + 1)) ** 2

    u = [0.0] * (maximum + 1)
    for j in range(maximum, 0, -1):
        u[j - 1] = math.sqrt((u[j] ** 2 + 1) / max(alpha_bar(j - 1) / alpha_bar(j), c1) - 1)
    return [u[math.floor((maximum - 1) / (steps - 1) * i + 0.5)] for i in range(steps)]


def moments(grid, scale=None):
    return [Moment(i, len(grid), (*grid, 0.0), scale) for i in range(len(grid))]


def ramp(schedule, steps=501, scale=None):
    return [schedule(Moment(i, steps, (), scale)) for i in range(steps)]


EDM = edm_grid(32, 0.002, 80, 7)


@pytest.mark.parametrize(
    ("grid", "low", "high", "first", "last"),
    [
        (EDM, 0.19, 1.61, 17, 22),
        (EDM, 0.60, 5.00, 13, 19),
        (EDM, 0.28, 2.90, 15, 21),
        (edm_grid(32, 0.0292, 14.6146, 3), 0.28, 5.42, 10, 25),
        (edm_grid(32, 0.03, 14.61, 3), 0.28, 5.42, 10, 25),
        (iddpm_grid(250), 0.34, 1.02, 124, 198),
        (iddpm_grid(250), 0.45, 1.23, 109, 182),
    ],
)
def test_interval_guides_the_steps_of_the_paper(grid, low, high, first, last):
    schedule = Interval(3.0, low, high)
    guided = [moment.index for moment in moments(grid) if schedule(moment) != 1]
    assert guided == list(range(first, last + 1))


def test_interval_is_half_open():
    schedule = Interval(3.0, low=1.0, high=4.0, tolerance=0.0)
    assert [schedule(moment) for moment in moments([8.0, 4.0, 2.0, 1.0, 0.5])] == [1, 3, 3, 1, 1]


def test_interval_over_everything_is_constant():
    everywhere = Interval(3.0, low=0.0, high=1e9, tolerance=0.0)
    assert {everywhere(moment) for moment in moments(EDM)} == {3.0}


def test_interval_without_noise_levels_is_an_error():
    with pytest.raises(GuidanceError, match="noise level"):
        Interval(3.0)(Moment(0, 4, (), None))


@pytest.mark.parametrize("cls", RAMPS)
@pytest.mark.parametrize("decreasing", [False, True])
@given(w=st.floats(1, 20))
def test_ramps_keep_the_mean_scale(cls, decreasing, w):
    for ramps in ("excess", "scale"):
        values = ramp(cls(w, decreasing=decreasing, ramps=ramps))
        mean = (sum(values) - (values[0] + values[-1]) / 2) / (len(values) - 1)  # trapezoids
        assert mean == pytest.approx(w, rel=1e-3)


@pytest.mark.parametrize("cls", RAMPS)
def test_ramps_start_and_end(cls):
    up, down = ramp(cls(5.0)), ramp(cls(5.0, decreasing=True))
    assert up[0] == pytest.approx(1) and min(up) >= 1 - 1e-9 and min(down) >= 1 - 1e-9
    if cls is Triangle:
        assert up[250] == pytest.approx(9) and down[250] == pytest.approx(1)
    else:
        assert up[-1] == pytest.approx(9) and down[0] == pytest.approx(9)
        assert up == sorted(up), "increasing means towards the clean image"


@pytest.mark.parametrize("cls", RAMPS)
def test_ramp_floor(cls):
    assert min(ramp(cls(5.0, floor=2.0))) == pytest.approx(3.0)
    assert min(ramp(cls(5.0, floor=2.0, ramps="scale"))) == pytest.approx(2.0)


@pytest.mark.parametrize("cls", [*RAMPS, Constant, PowerCosine])
def test_scale_one_is_one_everywhere(cls):
    assert ramp(cls(1.0), steps=11) == pytest.approx([1.0] * 11)


def test_power_cosine():
    values = ramp(PowerCosine(4.0, power=1.0))
    assert values[0] == 1 and values[250] == pytest.approx(2.5) and values[-1] == pytest.approx(4)
    assert min(ramp(PowerCosine(4.0, power=0.01), steps=250)[1:]) > 1 + 3 * 0.99


def test_beta_curve_is_a_density():
    values = ramp(BetaCurve(6.0, a=2.0, b=3.0))
    assert values[0] == values[-1] == 0
    assert sum(values) / 500 == pytest.approx(6.0, rel=1e-3)
    assert values.index(max(values)) == pytest.approx(500 / 3, abs=1)
    assert ramp(BetaCurve(6.0, base="cond"))[0] == 1


def test_per_step_counts_its_steps():
    schedule = PerStep([1, 2.5, 4])
    assert ramp(schedule, steps=3) == [1, 2.5, 4]
    with pytest.raises(GuidanceError, match="3 scales, but the run has 4 steps"):
        ramp(schedule, steps=4)


def test_schedules_nest_and_follow_the_pipeline():
    nested = Interval(Linear(None), low=0.3, high=100.0)
    values = [nested(moment) for moment in moments(EDM, scale=5.0)]
    assert values[0] == pytest.approx(1.0) and values[-1] == 1.0
    assert max(values) == pytest.approx(Linear(5.0)(moments(EDM)[21]))


@pytest.mark.parametrize("cls", SCHEDULES.values())
def test_config_round_trip(cls):
    schedule = cls([1.0, 2.0]) if cls is PerStep else cls(Linear(3.0))
    again = from_config(schedule.to_config())
    assert again == schedule and isinstance(again, Schedule)


def test_one_step_runs():
    for cls in (*RAMPS, Constant, PowerCosine, BetaCurve):
        assert math.isfinite(cls(4.0)(Moment(0, 1, (1.0, 0.0), None)))
