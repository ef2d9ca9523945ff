"""stats: bootstrap over objects and Wilson's interval, against closed forms and brute force."""

import itertools
import time

import numpy
import pytest

from immunize.stats import (
    Intervals,
    mean,
    mean_intervals,
    percentiles,
    resample_objects,
    wilson,
    wilson_difference,
)


def _names(count: int) -> list[str]:
    return [f"object{index}" for index in range(count)]


def _intervals(values: numpy.ndarray, objects: list[str], *, name: str = "a check", resamples: int = 2000) -> Intervals:
    drawn = resample_objects(objects, name=name, resamples=resamples)
    return mean_intervals(numpy.atleast_2d(values), resamples=drawn, confidence=0.95)


def test_wilson_at_zero_is_the_closed_form() -> None:
    square = 1.959963984540054**2
    for objects, published in ((64, 0.057), (32, 0.107)):
        low, high = wilson(numpy.zeros(1), objects=objects, confidence=0.95)
        assert low[0] == 0
        assert high[0] == pytest.approx(square / (objects + square))
        assert round(float(high[0]), 3) == published


@pytest.mark.parametrize(("hits", "objects"), [(0, 64), (1, 64), (7, 32), (16, 32), (63, 64), (128, 128)])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_wilson_agrees_with_scipy(hits: int, objects: int, confidence: float) -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    expected = scipy_stats.binomtest(hits, objects).proportion_ci(confidence_level=confidence, method="wilson")
    low, high = wilson(numpy.array([hits / objects]), objects=objects, confidence=confidence)
    assert (low[0], high[0]) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_of_a_difference_is_symmetric_continuous_and_increasing() -> None:
    difference = numpy.linspace(-1, 1, 2001)
    low, high = wilson_difference(difference, objects=64, confidence=0.95)
    swapped_low, swapped_high = wilson_difference(-difference, objects=64, confidence=0.95)
    assert numpy.allclose(low, -swapped_high) and numpy.allclose(high, -swapped_low)
    for bound in (low, high):
        assert (numpy.diff(bound) >= -1e-12).all()
        # Wilson's bound has a steep but finite slope near 0; a jump would be the whole 0.057.
        assert numpy.diff(bound).max() < 0.02
    assert (low <= difference).all() and (difference <= high).all()
    plain = wilson(difference[1000:], objects=64, confidence=0.95)
    assert numpy.allclose(high[1000:], plain[1])
    assert numpy.allclose(low[1300:], plain[0][300:])


def test_bootstrap_against_all_resamples_of_three_objects() -> None:
    values = numpy.array([0.0, 0.3, 0.9])
    every = [numpy.mean(draw) for draw in itertools.product(values, repeat=3)]
    drawn = resample_objects(_names(3), name="three", resamples=20000).means(values[None])[:, 0]
    for value in numpy.unique(numpy.round(every, 9)):
        share = numpy.mean(numpy.isclose(every, value))
        assert numpy.mean(numpy.isclose(drawn, value)) == pytest.approx(share, abs=4 * numpy.sqrt(share / 20000))


def test_objects_with_several_prompts_weigh_by_their_prompts() -> None:
    values = numpy.array([[1.0, 1.0, 0.0]])
    objects = ["a", "a", "b"]
    drawn = resample_objects(objects, name="weights", resamples=4000).means(values)[:, 0]
    assert set(numpy.round(drawn, 6)) == {0.0, 0.666667, 1.0}  # bb, ab, aa
    assert numpy.mean(drawn == 0.0) == pytest.approx(0.25, abs=0.03)
    assert mean(values)[0] == pytest.approx(2 / 3)


def test_bootstrap_width_is_the_normal_one_for_many_objects() -> None:
    values = numpy.random.default_rng(0).random(400)
    shown = _intervals(values - 0.5, _names(400), resamples=8000).at(0)
    expected = 1.96 * values.std() / numpy.sqrt(400)
    drawn = resample_objects(_names(400), name="width", resamples=8000)
    low, high = percentiles(drawn.means(values[None] - 0.5), confidence=0.95)
    assert float(high[0] - low[0]) / 2 == pytest.approx(expected, rel=0.05)
    assert shown.low <= low[0] + 0.003 and shown.high >= high[0] - 0.003


def test_the_wider_bound_counts() -> None:
    agreed = _intervals(numpy.zeros(64), _names(64)).at(0)
    assert agreed.high == pytest.approx(0.0566, abs=1e-4)
    assert agreed.low == pytest.approx(-0.0566, abs=1e-4)
    spread = numpy.tile([1.0, -1.0], 32)  # Wilson at 0 knows nothing of this spread
    assert _intervals(spread, _names(64)).at(0).high > 0.2


def test_lowest_bounds_a_share() -> None:
    drawn = resample_objects(_names(64), name="share", resamples=300)
    shown = mean_intervals(numpy.zeros((1, 64)), resamples=drawn, confidence=0.95, lowest=0.0).at(0)
    assert shown.low == 0 and shown.high == pytest.approx(0.0566, abs=1e-4)


def test_equal_names_give_equal_draws() -> None:
    first, again, other = (resample_objects(_names(20), name=name, resamples=200) for name in ("a", "a", "b"))
    assert first.weights.tobytes() == again.weights.tobytes()
    assert first.weights.tobytes() != other.weights.tobytes()


def test_permuting_items_leaves_bounds_within_bootstrap_noise() -> None:
    generator = numpy.random.default_rng(1)
    values, order = generator.random(64), generator.permutation(64)
    straight, permuted = _intervals(values, _names(64)).at(0), _intervals(values[order], _names(64)).at(0)
    assert permuted.estimate == straight.estimate
    assert permuted.low == pytest.approx(straight.low, abs=0.01)
    assert permuted.high == pytest.approx(straight.high, abs=0.01)
    same_order_of_objects = [_names(64)[index] for index in order]
    moved = _intervals(values[order], same_order_of_objects).at(0)
    assert (moved.low, moved.high) == (straight.low, straight.high)


def test_duplicate_prompts_of_an_object_do_not_narrow() -> None:
    values = numpy.random.default_rng(2).random(32)
    once = _intervals(values, _names(32)).at(0)
    twice = _intervals(numpy.repeat(values, 2), numpy.repeat(_names(32), 2).tolist()).at(0)
    assert (twice.low, twice.high) == pytest.approx((once.low, once.high), abs=1e-9)
    as_if_independent = _intervals(numpy.repeat(values, 2), _names(64)).at(0)
    assert as_if_independent.high - as_if_independent.low < 0.9 * (once.high - once.low)


def test_swapping_arms_negates() -> None:
    generator = numpy.random.default_rng(3)
    control, defended = generator.random((2, 5, 64))
    straight, swapped = (_intervals(values, _names(64)) for values in (defended - control, control - defended))
    assert numpy.allclose(straight.estimate, -swapped.estimate)
    assert numpy.allclose(straight.low, -swapped.high, atol=2e-3)  # order statistics are taken outward on both sides
    assert numpy.allclose(straight.high, -swapped.low, atol=2e-3)


def test_rounding_keeps_equal_means_equal() -> None:
    values = numpy.array([[0.1] * 3, [0.3, 0.0, 0.0]])
    assert mean(values)[0] == mean(values)[1] == 0.1


def test_it_is_fast() -> None:
    values = numpy.random.default_rng(4).random((16, 64))
    _intervals(values, _names(64))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        _intervals(values, _names(64))
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.05
