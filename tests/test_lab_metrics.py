"""Figures of finished pictures: of sets, of single pictures, and of what scenes show."""

from __future__ import annotations

import math
import sys
from collections import Counter
from dataclasses import replace
from itertools import combinations, permutations, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.linalg import sqrtm
from scipy.stats import chisquare
from test_scenes import scenes, seeds

from guidancekit import GuidanceError, measures
from guidancekit.lab import metrics
from guidancekit.lab import scenes as lab
from guidancekit.lab.metrics import Figure, figure
from samples.scenes import recogniser
from samples.scenes.world import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLOURS,
    RELATIONS,
    Scene,
    Thing,
    complete,
    fits,
    held_out,
    parse,
    write,
)

few = settings(max_examples=40)  # drawing scenes takes longer than the laws do

CAPTIONS, EACH = 6, 9
NUMBER = np.repeat(np.arange(CAPTIONS), EACH)


def everything(captions=CAPTIONS):
    return np.ones(captions, bool)


# --- a figure and its error -----------------------------------------------------------------------


@given(seeds, st.integers(2, 12), st.integers(1, 5))
def test_the_jackknife_of_a_mean_is_its_textbook_error(seed, captions, each):
    """Of groups of one size: the deviation of the groups' means over the root of their number."""
    values = np.random.default_rng(seed).normal(3, 2, (captions, each))
    found = figure(metrics.mean(values.ravel(), np.repeat(np.arange(captions), each)), captions)
    error = values.mean(1).std(ddof=1) / math.sqrt(captions)
    assert found.value == pytest.approx(values.mean())
    assert found.error == pytest.approx(error)
    assert found.interval == pytest.approx((found.value - 1.96 * error, found.value + 1.96 * error))


def test_differences_are_taken_caption_by_caption():
    """What two sets share does not blur their difference; a set does not differ from itself."""
    rng = np.random.default_rng(0)
    hard, ours, theirs = rng.normal(0, 9, CAPTIONS), *rng.normal(0, 0.1, (2, CAPTIONS))
    number = np.arange(CAPTIONS)
    a, b = (figure(metrics.mean(hard + x, number), CAPTIONS) for x in (ours, theirs))
    paired = (ours - theirs).std(ddof=1) / math.sqrt(CAPTIONS)
    assert (a - b).value == pytest.approx((ours - theirs).mean())
    assert (a - b).error == pytest.approx(paired)
    assert paired < a.error / 10
    assert (a - a).value == (a - a).error == 0


def test_one_caption_tells_no_error():
    found = figure(metrics.mean(np.ones(3), np.zeros(3, int)), 1)
    assert found.value == 1 and math.isnan(found.error)
    assert math.isnan((found - found).error)
    assert Figure(0.0, np.array([1.0, 1.0])).error == 0


def test_a_mean_passes_over_what_is_unknown():
    values, number = np.array([1.0, np.nan, 4.0, np.nan]), np.array([0, 0, 1, 2])
    metric = metrics.mean(values, number)
    assert metric(everything(3)) == 2.5
    assert metric(np.array([True, False, True])) == 1
    assert math.isnan(metric(np.array([False, False, True])))


SIZES = {"shape 0": 8, "size 0": 2, "size 1": 2, "background": 5}


def random_factors(rng, number, share=0.8):
    """Every factor free in most pictures."""
    return {
        name: np.where(rng.random(len(number)) < share, rng.integers(0, k, len(number)), -1)
        for name, k in SIZES.items()
    }


def all_metrics(number, rng):
    """Every figure, of one random set and a true one; as functions of the pictures they see."""
    factors, pictures = random_factors(rng, number), rng.integers(0, 256, (len(number), 4, 4, 3))
    ours, theirs = (rng.normal(shift, 1, (len(number), 3)) for shift in (0, 1.5))

    def some(chosen, number):
        own = {name: values[chosen] for name, values in factors.items()}
        pair = ours[chosen], number, theirs[chosen], number
        precision, recall = metrics.precision_recall(*pair)
        return {
            "mean": metrics.mean(ours[chosen, 0], number),
            "diversity": metrics.diversity(own, SIZES, number),
            "total variation": metrics.total_variation(own, SIZES, number),
            "frechet": metrics.frechet(*pair),
            "precision": precision,
            "recall": recall,
            "pixel diversity": metrics.pixel_diversity(pictures[chosen].astype(np.uint8), number),
        }

    return some


@pytest.mark.parametrize("left_out", [0, 2, CAPTIONS - 1])
def test_leaving_a_caption_out_is_never_having_asked_it(left_out):
    some = all_metrics(NUMBER, np.random.default_rng(left_out))
    rest = left_out != NUMBER
    fewer = NUMBER[rest] - (NUMBER[rest] > left_out)
    whole, part = some(np.ones_like(rest), NUMBER), some(rest, fewer)
    for name, metric in whole.items():
        found = figure(metric, CAPTIONS)
        assert found.without[left_out] == pytest.approx(part[name](everything(CAPTIONS - 1))), name
        assert found.without[left_out] != found.value, name


# --- diversity ------------------------------------------------------------------------------------


@given(seeds)
def test_diversity_counts_pairs(seed):
    """Against a loop over all pairs of a caption's pictures."""
    rng = np.random.default_rng(seed)
    number = np.sort(rng.integers(0, 3, 12))
    number[-1] = 2
    factors = random_factors(rng, number, share=0.6)
    captions = []
    for caption in range(3):
        shares = []
        for name, values in factors.items():
            pairs = list(combinations([v for v in values[number == caption] if v >= 0], 2))
            if pairs:
                differ = np.mean([a != b for a, b in pairs])
                shares.append(differ / (1 - 1 / SIZES[name]))
        captions += [np.mean(shares)] if shares else []
    found = metrics.diversity(factors, SIZES, number)(everything(3))
    assert found == pytest.approx(np.mean(captions) if captions else math.nan, nan_ok=True)


@pytest.mark.parametrize("each", [2, 3, 10])
def test_diversity_is_unbiased_however_few_the_pictures(each):
    """1 for uniform draws; for others 1 - sum p^2, over what uniform ones have."""
    rng, captions = np.random.default_rng(each), 600
    number = np.repeat(np.arange(captions), each)
    for p in ([0.125] * 8, [0.5, 0.5, 0, 0, 0, 0, 0, 0], [0.7, 0.1, 0.1, 0.1, 0, 0, 0, 0]):
        drawn = {"shape 0": rng.choice(8, len(number), p=p)}
        found = figure(metrics.diversity(drawn, SIZES, number), captions)
        expected = (1 - np.square(p).sum()) / (7 / 8)
        assert abs(found.value - expected) < 4 * found.error
        assert 0 < found.error < 0.03


def test_pictures_that_are_alike_have_no_diversity():
    """Even if every caption has pictures of its own, which total variation does not see."""
    alike = {"shape 0": NUMBER, "size 0": NUMBER % 2}
    assert metrics.diversity(alike, SIZES, NUMBER)(everything()) == 0
    unlike = {"size 0": np.arange(len(NUMBER)) % 2}
    assert metrics.diversity(unlike, SIZES, NUMBER)(everything()) > 1
    nothing = {"size 0": np.full(len(NUMBER), -1)}
    assert math.isnan(metrics.diversity(nothing, SIZES, NUMBER)(everything()))


def total_variation(number=None, **factors):
    named = {name.replace("_", " "): np.array(values) for name, values in factors.items()}
    number = np.zeros(len(next(iter(named.values()))), int) if number is None else number
    return metrics.total_variation(named, SIZES, number)


def test_total_variation_in_closed_form():
    one = everything(1)
    assert total_variation(shape_0=range(8))(one) == 0
    assert total_variation(shape_0=[3] * 5)(one) == pytest.approx(7 / 8)
    assert total_variation(shape_0=[0, 1, 2, 3])(one) == pytest.approx(1 / 2)
    assert total_variation(size_0=[0, 0, 0, 1])(one) == pytest.approx(1 / 4)
    assert total_variation(size_0=[0, -1, -1, -1])(one) == pytest.approx(1 / 2)
    assert total_variation(shape_0=[3, 3], size_0=[0, 1])(one) == pytest.approx(7 / 16)
    assert math.isnan(total_variation(size_0=[-1, -1])(one))


def test_total_variation_joins_both_objects_and_all_captions():
    assert total_variation(size_0=[0, 0], size_1=[1, 1])(everything(1)) == 0
    apart = total_variation(np.array([0, 0, 1, 1]), size_0=[0, 0, 1, 1])
    assert apart(everything(2)) == 0
    assert apart(np.array([True, False])) == pytest.approx(1 / 2)


def test_entropy_in_closed_form():
    def entropy(**factors):
        named = {name.replace("_", " "): np.array(values) for name, values in factors.items()}
        return metrics.entropy(named, SIZES, np.zeros(len(next(iter(named.values()))), int))

    one = everything(1)
    assert entropy(shape_0=range(8))(one) == pytest.approx(1)
    assert entropy(shape_0=[3] * 5)(one) == 0
    assert entropy(shape_0=[0, 0, 5, 5])(one) == pytest.approx(1 / 3)
    assert entropy(size_0=[0, 0], size_1=[1, 1])(one) == pytest.approx(1)  # joined
    assert entropy(shape_0=[3, 3], size_0=[0, 1])(one) == pytest.approx(1 / 2)
    assert math.isnan(entropy(size_0=[-1, -1])(one))


def test_cosine_diversity_by_a_loop():
    rng = np.random.default_rng(0)
    features, number = rng.normal(size=(6, 5)), np.array([0, 0, 0, 1, 1, 2])
    unit = features / np.linalg.norm(features, axis=1)[:, None]
    first = np.mean([1 - unit[i] @ unit[j] for i, j in combinations(range(3), 2)])
    metric = metrics.cosine_diversity(features, number)
    assert metric(everything(3)) == pytest.approx((first + 1 - unit[3] @ unit[4]) / 2, abs=1e-6)
    assert metric(np.array([True, False, True])) == pytest.approx(first, abs=1e-6)


def test_pixel_diversity_is_a_root_mean_square():
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (6, 4, 5, 3)).astype(np.uint8)
    number = np.array([0, 0, 0, 1, 1, 2])  # one picture of the last: no pair, not counted
    means = []
    for caption in range(2):
        own = pictures[number == caption] / 255
        means.append(np.mean([math.sqrt(np.mean((a - b) ** 2)) for a, b in combinations(own, 2)]))
    found = metrics.pixel_diversity(pictures, number)(everything(3))
    assert found == pytest.approx(np.mean(means), rel=1e-5)
    ends = np.stack([np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)])
    assert metrics.pixel_diversity(ends, np.zeros(2, int))(everything(1)) == pytest.approx(1)
    assert metrics.pixel_diversity(ends[[0, 0]], np.zeros(2, int))(everything(1)) == 0


# --- distances of sets ----------------------------------------------------------------------------


def frechet(a, b):
    own = np.zeros(len(a), int), np.zeros(len(b), int)
    return metrics.frechet(a, own[0], b, own[1])(everything(1))


@pytest.mark.parametrize("seed", range(3))
def test_frechet_distance_of_any_two_sets(seed):
    """Against the root of the product of both covariances, by SciPy."""
    rng = np.random.default_rng(seed)
    a, b = (
        rng.normal(size=(40, 5)) @ rng.normal(size=(5, 5)) + rng.normal(size=5) for _ in range(2)
    )
    first, second = np.cov(a.T), np.cov(b.T)
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(first) + np.trace(second)
    expected -= 2 * np.trace(sqrtm(first @ second)).real
    assert frechet(a, b) == pytest.approx(expected)
    assert frechet(b, a) == pytest.approx(expected)
    # what float32 features lose; a shift adds its square
    assert frechet(a.astype(np.float32), b.astype(np.float32)) == pytest.approx(expected, rel=1e-4)
    assert frechet(a, a + 2.0) == pytest.approx(4 * 5)


def test_frechet_distance_of_diagonal_gaussians():
    """Corners of a box have a diagonal covariance: the squared differences of the deviations."""
    corners = np.array(list(product((-1, 1), repeat=4)), float)
    one, two = np.array([1.0, 2.0, 0.5, 0.0]), np.array([1.0, 0.5, 3.0, 1.0])
    shift = np.array([0.0, 1.0, -2.0, 0.0])
    expected = 5 + 16 / 15 * np.square(one - two).sum()  # covariances are divided by n - 1
    assert frechet(corners * one, corners * two + shift) == pytest.approx(expected)


@pytest.mark.parametrize("count", [4, 12, 100])
def test_frechet_distance_of_a_set_to_itself(count):
    """Also of fewer pictures than features, whose covariance is singular."""
    a = np.random.default_rng(count).normal(size=(count, 12))
    assert frechet(a, a) == pytest.approx(0, abs=1e-6)  # roots of eigenvalues of 1e-16


def precision_recall(a, b):
    pair = metrics.precision_recall(a, np.zeros(len(a), int), b, np.zeros(len(b), int))
    return [metric(everything(1)) for metric in pair]


def inside_share(points, reference):
    """A loop: the share of points that lie in the neighbourhood of one of the reference."""
    found = 0
    for x in points:
        for i, y in enumerate(reference):
            others = sorted(np.linalg.norm(y - z) for j, z in enumerate(reference) if j != i)
            if np.linalg.norm(x - y) <= others[: metrics.NEIGHBOURS][-1]:
                found += 1
                break
    return found / len(points)


@pytest.mark.parametrize("sizes", [(20, 30), (31, 31), (4, 9)])
def test_precision_and_recall_by_a_loop(sizes):
    rng = np.random.default_rng(sizes)
    a, b = rng.normal(0.7, 0.7, (sizes[0], 4)), rng.normal(size=(sizes[1], 4))
    found = precision_recall(a, b)
    assert found == [inside_share(a, b), inside_share(b, a)]
    assert precision_recall(b, a) == found[::-1]
    assert 0 < min(found) < 1 or sizes == (4, 9)


def test_precision_and_recall_at_their_ends():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(40, 4)).astype(np.float32)
    assert precision_recall(a, a) == [1, 1]
    assert precision_recall(a, a + 100) == [0, 0]
    narrow = a.mean(0) + 0.01 * a
    assert precision_recall(narrow, a) == [1, inside_share(a, narrow)]
    assert inside_share(a, narrow) < 0.1


def test_copies_of_one_true_picture_recall_that_one():
    """Their neighbourhoods have no extent: rounding must not give them one, nor take the point."""
    true = np.random.default_rng(0).normal(5, 1, (40, 8))
    for i in range(5):
        assert precision_recall(np.repeat(true[i : i + 1], 30, 0), true) == [1, 1 / 40]


# --- single pictures ------------------------------------------------------------------------------


def coloured(*colours):
    """A picture of one row for each colour."""
    return np.repeat(np.array(colours, np.float32)[:, None], 4, axis=1)


def checkers(size=8):
    return np.repeat((np.indices((size, size)).sum(0) % 2)[..., None], 3, -1).astype(np.float32)


def test_statistics_against_pillow():
    """Saturation and luma of single colours, to the bytes that Pillow rounds them to."""
    colours = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    colours[0, 0] = 0
    image = Image.fromarray(colours)
    single = measures.pixels(image).reshape(-1, 1, 1, 3)
    for mine, theirs in (
        (measures.saturation, np.asarray(image.convert("HSV"))[..., 1]),
        (measures.luminance, np.asarray(image.convert("L"))),
    ):
        np.testing.assert_allclose(mine(single), theirs.ravel() / 255, atol=1.001 / 255)
        assert mine(measures.pixels(image)) == pytest.approx(theirs.mean() / 255, abs=1 / 255)


def test_pixels_of_any_image():
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    image = Image.fromarray(picture)
    for each in (image, image.convert("RGBA")):
        found = measures.pixels(each)
        assert found.dtype == np.float32 and found.shape == (5, 7, 3)
        assert np.array_equal(np.rint(found * 255), picture)
    grey = measures.pixels(image.convert("L"))
    assert grey.shape == (5, 7, 3) and np.ptp(grey, axis=-1).max() == 0


@pytest.mark.parametrize(
    ("name", "picture", "expected"),
    [
        ("saturation", coloured((0.4, 0.4, 0.4), (0, 0, 0)), 0),
        ("saturation", coloured((1, 0, 0), (0.5, 0.25, 0.25)), 0.75),
        ("clipping", coloured((0.5, 0.5, 0.5), (0.01, 0.99, 0.3)), 0),
        ("clipping", coloured((1, 0.5, 0.5), (0.5, 0, 0.5), (0, 0, 1), (0.2, 0.3, 0.4)), 0.75),
        ("luminance", coloured((1, 0, 0), (0, 1, 0), (0, 0, 1)), 1 / 3),
        ("luminance", coloured((0, 1, 0)), 0.587),
        ("contrast", coloured((0.3, 0.7, 0.1)), 0),
        ("contrast", checkers(), 0.5),
        ("contrast", coloured((0.2, 0.2, 0.2), (0.6, 0.6, 0.6)), 0.2),
        ("colourfulness", coloured((0.1, 0.1, 0.1), (0.9, 0.9, 0.9)), 0),
        ("colourfulness", coloured((1, 0, 0)), 0.3 * math.sqrt(1 + 0.5**2)),
        ("colourfulness", coloured((1, 0, 0), (0, 1, 0)), 1 + 0.3 * 0.5),
        ("colourfulness", coloured((0.5, 0.5, 0), (0, 0, 0.5)), 0.5),
        ("sharpness", np.linspace(0, 1, 64, dtype=np.float32)[:, None, None] * np.ones((9, 3)), 0),
        ("sharpness", checkers(), 16),
    ],
)
def test_statistics_in_closed_form(name, picture, expected):
    assert measures.STATISTICS[name](picture) == pytest.approx(expected, abs=1e-6)


def test_sharpness_of_a_point():
    """Its Laplacian is -4 there and 1 at four neighbours, of 6 x 8 inner pixels, 0 on average."""
    point = np.zeros((8, 10, 3), np.float32)
    point[3, 4] = 0.5
    assert measures.sharpness(point) == pytest.approx(0.25 * (16 + 4) / 48)


def test_distance_of_pictures():
    black, white = np.zeros((4, 4, 3)), np.ones((4, 4, 3))
    assert measures.distance(black, white) == 1
    assert measures.distance(black, checkers(4)) == pytest.approx(math.sqrt(0.5))
    assert measures.distance(white, white) == 0
    both = measures.distance(np.stack([black, white]), white)
    assert both.tolist() == [1, 0]


@pytest.mark.parametrize("name", measures.STATISTICS)
def test_a_batch_of_pictures_is_one_by_one(name):
    pictures = np.random.default_rng(0).random((2, 3, 6, 7, 3)).round(1).astype(np.float32)
    found = measures.STATISTICS[name](pictures)
    assert found.shape == (2, 3)
    for at in np.ndindex(2, 3):
        assert found[at] == pytest.approx(measures.STATISTICS[name](pictures[at]), rel=1e-5)


# --- the true distribution of scenes --------------------------------------------------------------


def orders(scene, wanted):
    """Every order of a scene's objects in which it shows what is wanted."""
    found = permutations(range(len(scene.objects))) if wanted.relation is None else [(0, 1)]
    return [
        order
        for order in found
        if all(
            getattr(want, name) in (None, getattr(scene.objects[slot], name))
            for want, slot in zip(wanted.objects, order, strict=True)
            for name in ATTRIBUTES
        )
    ]


@few
@given(scenes(optional=True), seeds)
def test_a_completed_scene_fits_and_is_full(wanted, seed):
    scene = complete(wanted, np.random.default_rng(seed))
    assert fits(scene, wanted) and orders(scene, wanted)
    assert fits(scene, parse(write(wanted)))
    assert (scene.relation is None) == (len(scene.objects) == 1)
    assert None not in [
        scene.background,
        *(getattr(t, a) for t in scene.objects for a in ATTRIBUTES),
    ]


@few
@given(scenes(), seeds)
def test_a_full_scene_is_its_own_completion(scene, seed):
    assert complete(scene, np.random.default_rng(seed)) == scene


def uniform(values, vocabulary):
    counts = Counter(values)
    assert set(counts) <= set(vocabulary)
    return chisquare([counts[each] for each in vocabulary]).pvalue > 1e-3  # of a fixed seed


def test_what_a_caption_leaves_open_is_uniform_and_independent():
    rng, wanted = np.random.default_rng(4), parse("a red star and a blue shape")
    drawn = []
    for _ in range(5000):
        scene = complete(wanted, rng)
        red = next(i for i, thing in enumerate(scene.objects) if thing.colour == "red")
        drawn.append((scene.objects[red], scene.objects[1 - red], scene, red))
    for name, words in ATTRIBUTES.items():
        if name not in ("colour", "shape"):
            assert uniform([getattr(a, name) for a, *_ in drawn], words), name
        if name != "colour":
            assert uniform([getattr(b, name) for _, b, *_ in drawn], words), name
    assert {a.shape for a, *_ in drawn} == {"star"} and {b.colour for _, b, *_ in drawn} == {"blue"}
    assert uniform([scene.background for *_, scene, _ in drawn], BACKGROUNDS)
    jointly = list(product(RELATIONS, (0, 1), ATTRIBUTES["size"], ATTRIBUTES["texture"]))
    assert uniform([(s.relation, red, a.size, b.texture) for a, b, s, red in drawn], jointly)


def test_a_named_relation_fixes_the_order():
    rng, wanted = np.random.default_rng(0), parse("a red star above a blue ring")
    for _ in range(50):
        scene = complete(wanted, rng)
        assert scene.relation == "above"
        assert [thing.colour for thing in scene.objects] == ["red", "blue"]


@few
@given(scenes(optional=True))
def test_what_is_free_is_what_is_not_named(wanted):
    """Naming a factor takes that one from the list, and no other."""
    names = lab.free(wanted)
    attributes = [getattr(thing, a) for thing in wanted.objects for a in ATTRIBUTES]
    open_ones = [*attributes, wanted.background, *[wanted.relation] * (len(wanted.objects) - 1)]
    assert len(set(names)) == len(names) == open_ones.count(None)
    for slot, thing in enumerate(wanted.objects):
        for name in ATTRIBUTES:
            assert (f"{name} {slot}" in names) == (getattr(thing, name) is None)
    assert ("background" in names) == (wanted.background is None)


def test_captions_are_held_out_open_and_of_both_kinds():
    texts = lab.captions(24)
    assert len(texts) == len(set(texts)) == 24
    assert all(held_out(text) and len(lab.free(parse(text))) > 1 for text in texts)
    assert [len(parse(text).objects) for text in texts] == [1, 2] * 12
    assert all(lab.captions(count) == texts[:count] for count in (1, 2, 3, 7, 16))
    assert lab.captions(24, seed=4) != texts


# --- what pictures show ---------------------------------------------------------------------------


@given(scenes(), scenes(optional=True), seeds, st.booleans())
def test_a_match_is_the_order_that_gets_most_right(scene, wanted, seed, swapped):
    """Of any scene, and of one that shows what is wanted with the objects swapped."""
    if swapped:
        other = replace(wanted, objects=wanted.objects[::-1])
        scene = complete(other, np.random.default_rng(seed))
    order, found = recogniser.match(scene, wanted)
    slots = scene.objects + (Thing(),) * (len(wanted.objects) - len(scene.objects))

    def right(order):
        kinds = [name for name in ATTRIBUTES if any(getattr(w, name) for w in wanted.objects)]
        marks = {
            name: all(
                getattr(want, name) in (None, getattr(slots[slot], name))
                for want, slot in zip(wanted.objects, order, strict=True)
            )
            for name in kinds
        }
        if wanted.relation:
            marks["relation"] = scene.relation == wanted.relation and tuple(order) == (0, 1)
        return marks

    best = max(sum(right(o).values()) for o in permutations(range(len(slots)), len(wanted.objects)))
    mine = right(order)
    assert sum(mine.values()) == best
    assert {name: found[name] for name in mine} == mine
    assert found["count"] == (len(scene.objects) == len(wanted.objects))


@few
@given(scenes(optional=True), seeds)
def test_a_completion_is_matched_as_it_was_meant(wanted, seed):
    scene = complete(wanted, np.random.default_rng(seed))
    order, found = recogniser.match(scene, wanted)
    assert order in orders(scene, wanted) and all(found.values())


@few
@given(st.lists(scenes(), min_size=1, max_size=4))
def test_certain_heads_give_the_scene_back(several):
    """`scenes` inverts `targets`; where a head has nothing to answer its value does not matter."""
    logits = {
        head: torch.nn.functional.one_hot(right.clamp(min=0), len(recogniser.HEADS[head])).float()
        for head, right in recogniser.targets(several).items()
    }
    assert recogniser.scenes(logits) == several


@pytest.fixture(scope="module")
def judge():
    judge = lab.Judge()
    assert len(judge.components) == 2  # before any picture is looked at
    return judge


@pytest.fixture(scope="module")
def shown(judge):
    """Captions, one per picture; the true scenes; what the judge sees in their renders."""
    each, scenes, pictures, prompts = 6, [], [], []
    for text in lab.captions(40):
        rng = np.random.default_rng([lab.TRUTH_SEED, *text.encode()])
        scenes += [complete(parse(text), rng) for _ in range(each)]
        pictures.append(lab.truth(text, each))
        prompts += [text] * each
    pictures = np.concatenate(pictures)
    return prompts, scenes, pictures, judge.look(pictures, prompts)


def test_forward_is_heads_of_features(judge, shown):
    x = recogniser.to_input(shown[2][:5])
    with torch.no_grad():
        features, whole = judge.network.features(x), judge.network(x)
        parts = judge.network.heads(features)
    assert features.shape == (5, 160) and features.min() >= 0
    assert {head: each.shape[1] for head, each in parts.items()} == {
        head: len(words) for head, words in recogniser.HEADS.items()
    }
    torch.testing.assert_close(parts, whole)
    assert recogniser.scenes(parts) == judge.network.recognise(shown[2][:5])


def test_true_renders_are_judged_right(shown):
    prompts, _, _, seen = shown
    assert np.nanmean(seen.marks["all"]) > 0.98
    assert not np.isnan(seen.marks["all"]).any()
    for name in ("relation", "background"):
        named = [getattr(parse(text), name) is not None for text in prompts]
        assert np.array_equal(~np.isnan(seen.marks[name]), named)
        assert seen.marks[name][named].mean() > 0.98


def test_factors_are_the_true_attributes(judge, shown):
    prompts, scenes, _, seen = shown
    assert list(seen.factors) == list(judge.vocabularies)
    right = []
    for i, (text, scene) in enumerate(zip(prompts, scenes, strict=True)):
        wanted = parse(text)
        names = lab.free(wanted)
        values = {name: column[i] for name, column in seen.factors.items()}
        assert all(value == -1 for name, value in values.items() if name not in names)
        if not seen.marks["count"][i]:
            assert set(values.values()) == {-1}
            continue
        found = {name: judge.vocabularies[name][values[name]] for name in names}

        def true(name, order, scene=scene):
            if name == "background":
                return scene.background
            if name == lab.LAYOUT:
                return scene.relation, order
            attribute, slot = name.split()
            return getattr(scene.objects[order[int(slot)]], attribute)

        # two objects that both fit either way may be taken for each other
        right.append(
            max(
                np.mean([found[name] == true(name, order) for name in names])
                for order in orders(scene, wanted)
            )
        )
    assert len(right) > 0.99 * len(scenes)
    assert np.mean(right) > 0.98


def test_a_set_of_true_renders_has_true_figures(judge, shown):
    prompts, _, _, seen = shown
    number = np.unique(prompts, return_inverse=True)[1]
    sizes = {name: len(words) for name, words in judge.vocabularies.items()}
    found = figure(metrics.diversity(seen.factors, sizes, number), 40)
    assert abs(found.value - 1) < 3 * found.error < 0.1


def test_pictures_are_judged_one_by_one(judge, shown):
    prompts, _, pictures, seen = shown
    for i in (0, 9, 100):
        one = judge.look(pictures[i : i + 1], prompts[i : i + 1])
        for many, alone in ((seen.marks, one.marks), (seen.factors, one.factors)):
            for name in many:
                np.testing.assert_array_equal(alone[name], many[name][i : i + 1])
        np.testing.assert_allclose(one.features, seen.features[i : i + 1], atol=1e-5)
        np.testing.assert_allclose(one.colour_error, seen.colour_error[i : i + 1])


def test_the_wrong_caption_is_seen(judge, shown):
    text = "a red star on a navy background"
    pictures = lab.truth(text, 8)
    seen = judge.look(pictures, ["a red star on a white background", "a blue star"] * 4)
    assert (
        seen.marks["background"][::2].max() == 0 and np.isnan(seen.marks["background"][1::2]).all()
    )
    assert seen.marks["colour"][::2].min() == 1 and seen.marks["colour"][1::2].max() == 0
    assert seen.marks["all"].max() == 0
    two = judge.look(pictures, ["a red star and a red star"] * 8)
    assert two.marks["count"].max() == 0
    assert all((values == -1).all() for values in two.factors.values())


def test_truth_depends_on_prompt_and_seed_alone(judge):
    text = "a red star"
    picture = lab.truth(text, 2)
    assert picture.shape == (2, 64, 64, 3) and picture.dtype == np.uint8
    assert np.array_equal(picture, lab.truth(text, 2))
    assert not np.array_equal(picture, lab.truth(text, 2, seed=(5,)))
    assert not np.array_equal(picture, lab.truth("a blue star", 2))


def test_features_have_the_variance_they_say(judge):
    mean, components = judge.components
    assert mean.shape == (160,) and components.shape == (160, lab.COMPONENTS)
    seen = judge.look(lab.truth("", 300, seed=(5,)), [""] * 300)
    variance = seen.features.var(0)
    # 89 % of that of all scenes, within what 300 of them tell
    assert variance.sum() == pytest.approx(0.89, abs=0.06)
    assert np.abs(seen.features.mean(0)).max() < 4 * math.sqrt(variance.max() / 300)
    assert variance[0] > variance[-1] * 10
    for values in seen.marks.values():  # the empty prompt asks for nothing
        assert np.isnan(values).all()
    assert all((values == -1).all() for values in seen.factors.values())


def test_colour_error_is_the_distance_to_the_palette(judge):
    scene = Scene((Thing(colour="red"),), None, "navy")
    pictures = np.tile(np.array(BACKGROUNDS["navy"], np.uint8), (3, 64, 64, 1))
    pictures[:, 20:40, 20:40] = COLOURS["red"]
    pictures[1, 20:40, 20:40] += np.array([10, 0, 20], np.uint8)  # the object alone
    pictures[2, 30, 20:40] = 0  # a median passes over a line
    found = judge.colour_error(pictures, [scene] * 3)
    off = math.sqrt(500 / 3) / 255
    np.testing.assert_allclose(found, [0, off / 2, 0], atol=1e-12)
    plain = np.tile(np.array(BACKGROUNDS["navy"], np.uint8), (1, 64, 64, 1))
    assert judge.colour_error(plain, [scene])[0] == 0  # what is not there has no colour
    twins = Scene((Thing(colour="red"), Thing(colour="red")), "above", "navy")
    np.testing.assert_allclose(judge.colour_error(pictures[1:2], [twins]), off / 2)
    prompt = "a red star on a navy background"
    shown = lab.truth(prompt, 20)
    true = judge.colour_error(shown, [scene] * 20)
    assert 0 < true.max() < 0.04
    harder = ((shown.astype(float) - 128) * 1.4 + 128).clip(0, 255).astype(np.uint8)
    assert judge.colour_error(harder, [scene] * 20).min() > true.max()


@pytest.mark.parametrize("missing", ["samples", "samples.scenes"])
def test_without_the_repository_the_world_says_where_it_is(monkeypatch, missing):
    """`samples` may be absent, or another package of that name."""
    for name in [name for name in sys.modules if name.startswith("samples.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    for call in (lab.world, lab.Judge, lambda: lab.captions(2)):
        with pytest.raises(GuidanceError, match=r"clone the repository.*--prompts-file"):
            call()
