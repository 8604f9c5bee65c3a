"""Scores and their intervals, against clean-fid, plain sums and spreads that are known."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from cleanfid.fid import fid_from_feats, kernel_distance

from components.scores import (
    RealImages,
    diversity,
    estimate,
    fid,
    kid,
    mean_of,
    resamples,
    share_of,
)

GENERATOR = np.random.default_rng(0)


def drawn(counts: np.ndarray, features: np.ndarray) -> np.ndarray:
    """The images of one resample, each as often as it was drawn."""
    return np.repeat(features, counts.astype(int), axis=0)


@pytest.mark.parametrize(
    ("num_images", "num_features"), [(60, 8), (20, 30)], ids=["many images", "many features"]
)
def test_a_replicate_of_fid_is_the_fid_of_the_resampled_images(
    num_images: int, num_features: int
) -> None:
    x = GENERATOR.normal(size=(num_images, num_features))
    y = GENERATOR.normal(0.3, 1.5, size=(50, num_features))
    counts = resamples(num_images, 3)
    found = RealImages(y).fid(x)(counts)
    for score, row in zip(found, counts, strict=True):
        assert score == pytest.approx(fid_from_feats(drawn(row, x), y), rel=1e-3)
    assert found[0] == pytest.approx(fid(x, y))


def test_fid_of_few_images_is_that_of_clean_fid() -> None:
    x, y = GENERATOR.normal(size=(60, 8)), GENERATOR.normal(0.3, 1.5, size=(50, 8))
    plain = fid(x, y)
    assert plain == pytest.approx(fid_from_feats(x, y))
    padding = np.zeros((60, 80))  # dimensions that add nothing
    assert fid(np.hstack([x, padding]), np.hstack([y, padding[:50]])) == pytest.approx(plain)


def test_kid_is_what_clean_fid_finds_in_parts_of_the_images() -> None:
    x, y = GENERATOR.normal(size=(300, 16)), GENERATOR.normal(0.3, 1.2, size=(300, 16))
    np.random.seed(0)  # clean-fid draws its subsets from numpy's global generator
    parts = kernel_distance(x, y, num_subsets=1000, max_subset_size=100)
    assert kid(x, y) == pytest.approx(parts, rel=0.02)


def test_kid_is_the_unbiased_estimate_written_out() -> None:
    x, y = GENERATOR.normal(size=(7, 3)), GENERATOR.normal(0.5, 1, size=(5, 3))

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / 3 + 1) ** 3)

    own = [k(x[i], x[j]) for i in range(7) for j in range(7) if i != j]
    theirs = [k(y[i], y[j]) for i in range(5) for j in range(5) if i != j]
    across = [k(a, b) for a in x for b in y]
    assert kid(x, y) == pytest.approx(np.mean(own) + np.mean(theirs) - 2 * np.mean(across))


def test_diversity_is_the_mean_distance_of_two_different_images() -> None:
    x = GENERATOR.normal(size=(6, 4))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    apart = [1 - unit[i] @ unit[j] for i in range(6) for j in range(i)]
    counts = np.array([[1, 1, 1, 1, 1, 1], [0, 2, 0, 1, 0, 3.0]])
    whole, part = diversity(x)(counts)
    assert whole == pytest.approx(np.mean(apart))
    pairs = {(1, 3): 2, (1, 5): 6, (3, 5): 3}  # how often each pair of different images is drawn
    expected = sum(times * (1 - unit[i] @ unit[j]) for (i, j), times in pairs.items()) / 11
    assert part == pytest.approx(expected)


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    low, high = estimate(mean_of(GENERATOR.normal(5, 2, size=1000)), resamples(1000)).interval
    assert (high - low) / 2 == pytest.approx(1.96 * 2 / np.sqrt(1000), rel=0.15)


def test_the_interval_of_fid_is_as_wide_as_fid_spreads_over_new_images() -> None:
    real = RealImages(GENERATOR.normal(size=(2000, 6)))

    def images() -> np.ndarray:
        return GENERATOR.normal(0.4, 1.0, size=(150, 6))

    spread = np.std([real.fid(images())(np.ones((1, 150)))[0] for _ in range(400)])
    ends = [estimate(real.fid(images()), resamples(150)).interval for _ in range(10)]
    width = np.mean([high - low for low, high in ends]) / (2 * 1.96)
    assert width == pytest.approx(spread, rel=0.2)


def test_with_few_images_beside_features_an_fid_is_not_surer_than_its_spread_allows() -> None:
    """Nor a ratio of two, or a gain; a jackknife leans to the other side, by less than twice."""
    generator = np.random.default_rng(1)
    num_images, dim = 72, 48
    width_D = (1 / np.arange(1, dim + 1) ** 0.35) * generator.uniform(0.8, 1.1, dim)
    real = RealImages(generator.normal(size=(2000, dim)) * width_D)

    def images() -> list[np.ndarray]:
        """Of the guide, CFG and no guidance: the first two share most of what a task decides."""
        shared, own = generator.normal(size=(num_images, dim)), generator.normal
        alike = (0.8 * shared + 0.6 * own(size=shared.shape) for _ in range(2))
        apart = (1.3 * own(size=shared.shape) + 0.3,)
        return [x * width_D for x in (*alike, *apart)]

    def numbers(fids: Sequence[Any]) -> list[Any]:
        ours, theirs, least = fids
        return [ours, ours / theirs, (least - ours) / (least - theirs)]

    once, counts = np.ones((1, num_images)), resamples(num_images, 60)
    drawn = [[real.fid(x)(once)[0] for x in images()] for _ in range(200)]
    spread = np.std([numbers(fids) for fids in drawn], axis=0)
    told = [
        np.std(numbers([np.array(estimate(real.fid(x), counts).replicates) for x in images()]), 1)
        for _ in range(12)
    ]
    too_wide = np.mean(told, axis=0) / spread
    assert (too_wide > 0.9).all() and (too_wide < 2).all(), too_wide


def test_the_difference_of_two_scores_of_the_same_tasks_is_surer_than_either() -> None:
    hard = GENERATOR.normal(size=200)  # what a prompt does to every method
    one, two = (
        estimate(mean_of(hard + 0.1 * GENERATOR.normal(size=200)), resamples(200)) for _ in range(2)
    )
    widths = [high - low for low, high in (one.interval, two.interval)]
    low, high = one.with_other(two, lambda a, b: a - b).interval
    assert high - low < 0.3 * min(widths)


def test_resamples_that_miss_all_that_a_share_is_of_move_nothing() -> None:
    share = estimate(share_of(np.array([1.0]), np.array([2.0])), resamples(8)[:, :1])
    assert share.value == 0.5 and set(share.replicates) == {0.5}


def test_a_score_that_is_no_number_is_refused_by_its_name() -> None:
    with pytest.raises(ValueError, match="fid of guided came out as nan"):
        estimate(mean_of(np.array([1.0, np.nan])), resamples(2), "fid of guided")


def test_fid_with_all_its_replicates_takes_seconds() -> None:
    real = RealImages(GENERATOR.normal(size=(600, 512)))
    x = GENERATOR.normal(size=(192, 512))
    start = time.process_time()
    estimate(real.fid(x), resamples(192))
    assert time.process_time() - start < 10, "of the processor, whatever runs beside it"
