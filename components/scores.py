"""Scores of sets of images, each with replicates that spread as it would over new images.

A statistic is computed for many ways to count the same N images at once: `counts_RN` says how often
replicate r has image n. Row 0 counts each image once, and its score is the value. The others leave
a tenth of the images out, a delete-d jackknife (Shao and Wu 1989, A general theory for jackknife
variance estimation, section 2). A bootstrap counts images several times, which shifts an FID by as
much as itself where images are few beside features, and spreads it several times too far.

Letters of shapes: R replicates, N images, M real images, D features.
"""

from collections.abc import Callable
from functools import cached_property

import numpy as np

from components.evaluation import Estimate

NUM_REPLICATES = 300
LEFT_OUT = 0.1
# Kernel values between images and real ones that are held at a time.
REFERENCES_AT_A_TIME = 4096

Statistic = Callable[[np.ndarray], np.ndarray]
"""From counts (R, N) to scores (R,)."""


def resamples(num_images: int, num_replicates: int = NUM_REPLICATES) -> np.ndarray:
    """All images, then all but a tenth of them, many times: counts (1 + R, N) of 0 and 1.

    The same in every evaluation, so that replicates of any two are paired.
    """
    generator = np.random.default_rng(0)
    num_left_out = min(max(1, round(LEFT_OUT * num_images)), num_images - 1)
    counts_RN = np.ones((1 + num_replicates, num_images))
    for row in counts_RN[1:]:
        row[generator.permutation(num_images)[:num_left_out]] = 0
    return counts_RN


def estimate(statistic: Statistic, counts_RN: np.ndarray, what: str = "a score") -> Estimate:
    """A score and its replicates: around its value, as far from it as it is from the true one.

    Scores without d of N images vary by ``sqrt(d / (N - d))`` of what scores of N new ones do, and
    each may be a little higher than with all of them, as FID is.

    Raises ValueError, saying `what`, if it is no number.
    """
    scores_R = np.asarray(statistic(counts_RN), dtype=np.float64)
    value, found_R = float(scores_R[0]), scores_R[1:]
    if not np.isfinite(value):
        raise ValueError(f"{what} came out as {value}")
    # Without all images that a share is of, it tells nothing, so it moves nothing.
    told_R = np.isfinite(found_R)
    middle = found_R[told_R].mean() if told_R.any() else value
    share = counts_RN[1:].mean() if len(found_R) else 1.0
    factor = np.sqrt(share / (1 - share)) if share < 1 else 0.0
    moved_R = np.where(told_R, found_R - middle, 0) * factor
    return Estimate(value=value, replicates=tuple((value + moved_R).tolist()))


def mean_of(scores_N: np.ndarray) -> Statistic:
    """The mean of a score that each image has."""
    return lambda counts_RN: counts_RN @ scores_N / counts_RN.sum(axis=1)


def share_of(parts_N: np.ndarray, wholes_N: np.ndarray) -> Statistic:
    """The sum of parts over the sum of wholes."""

    def share(counts_RN: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            shares: np.ndarray = (counts_RN @ parts_N) / (counts_RN @ wholes_N)
        return shares

    return share


def diversity(features_ND: np.ndarray) -> Statistic:
    """Mean distance of two images, 1 - cos of their features.

    The average pairwise distance of Zhu et al. 2017 (Toward multimodal image-to-image translation,
    section 5), which is over images of one input, here over all: most prompts come once.
    """
    unit = features_ND / np.linalg.norm(features_ND, axis=1, keepdims=True)
    distances_NN = 1 - unit.astype(np.float64) @ unit.T
    return lambda counts_RN: mean_of_pairs(distances_NN, counts_RN)


def mean_of_pairs(values_NN: np.ndarray, counts_RN: np.ndarray) -> np.ndarray:
    """Mean over ordered pairs of two different images, (R,); an image drawn twice is no pair."""
    apart = values_NN - np.diag(np.diag(values_NN))
    sums = ((counts_RN @ apart) * counts_RN).sum(axis=1)
    result: np.ndarray = sums / (counts_RN.sum(axis=1) ** 2 - (counts_RN**2).sum(axis=1))
    return result


class RealImages:
    """What FID and KID compare with: features (M, D) of real images, the same in each replicate.

    `kernel_mean` may be given by who has kept it: it takes M x M values of KID's kernel.
    """

    def __init__(self, features_MD: np.ndarray, *, kernel_mean: float | None = None) -> None:
        if kernel_mean is not None:
            self.kernel_mean = kernel_mean
        self.features_MD = features_MD.astype(np.float64)
        self.mean_D = self.features_MD.mean(axis=0)
        values_D, vectors_DD = np.linalg.eigh(np.cov(self.features_MD, rowvar=False))
        kept = values_D > 1e-12 * values_D.max()
        self.trace = float(values_D[kept].sum())
        self.root_DK = vectors_DD[:, kept] * np.sqrt(values_D[kept])  # times its own T: covariance

    def fid(self, features_ND: np.ndarray) -> Statistic:
        """Fréchet distance of Gaussians (Heusel et al. 2017, section 2).

        ``|m_x - m_y|^2 + tr C_x + tr C_y - 2 tr (C_x C_y)^(1/2)``. With ``C_y = L L^T`` the last
        trace is the sum of the square roots of the eigenvalues of ``L^T C_x L``, which are those of
        the centred images' products in coordinates ``x L`` too, if these are fewer than dimensions:
        N x N numbers, of which a replicate takes a part.
        """
        x = features_ND.astype(np.float64)
        middle_D = x.mean(axis=0)
        x = x - middle_D
        z_NK = x @ self.root_DK
        products_NN = z_NK @ z_NK.T if len(z_NK) <= z_NK.shape[1] else None

        def distances(counts_RN: np.ndarray) -> np.ndarray:
            num_R = counts_RN.sum(axis=1)
            means_RD = counts_RN @ x / num_R[:, None]
            squares_R = (means_RD**2).sum(axis=1)
            traces_R = (counts_RN @ (x**2).sum(axis=1) - num_R * squares_R) / (num_R - 1)
            apart_R = ((means_RD + middle_D - self.mean_D) ** 2).sum(axis=1)
            overlaps_R = np.array([overlap(counts) for counts in counts_RN])
            result: np.ndarray = apart_R + traces_R + self.trace - 2 * overlaps_R
            return result

        def overlap(counts_N: np.ndarray) -> float:
            rows = counts_N > 0
            counts, num = counts_N[rows], counts_N.sum()
            if products_NN is not None:
                part = products_NN[np.ix_(rows, rows)]
                means = part @ counts / num
                part = part - means - means[:, None] + counts @ means / num
                scale = np.sqrt(counts / (num - 1))
                values = np.linalg.eigvalsh(part * scale * scale[:, None])
            else:
                z = z_NK[rows]
                z = (z - counts @ z / num) * np.sqrt(counts / (num - 1))[:, None]
                values = np.linalg.eigvalsh(z.T @ z)
            return float(np.sqrt(values.clip(min=0)).sum())

        return distances

    def parts(self) -> list[np.ndarray]:
        """The features, some at a time."""
        starts = range(0, len(self.features_MD), REFERENCES_AT_A_TIME)
        return [self.features_MD[start : start + REFERENCES_AT_A_TIME] for start in starts]

    @cached_property
    def kernel_mean(self) -> float:
        """Mean of KID's kernel over ordered pairs of two different real images."""
        y = self.features_MD
        within = sum(float(kernel(a, b).sum()) for a in self.parts() for b in self.parts())
        itself = float((((y**2).sum(axis=1) / y.shape[1] + 1) ** 3).sum())
        return (within - itself) / (len(y) * (len(y) - 1))

    def kid(self, features_ND: np.ndarray) -> Statistic:
        """Kernel distance (Bińkowski et al. 2018, section 4) over all pairs.

        The unbiased estimate of MMD^2 with the kernel ``(x y / D + 1)^3``: unlike FID's, its
        expectation does not depend on the counts.
        """
        x, y = features_ND.astype(np.float64), self.features_MD
        across_N = sum(kernel(x, part).sum(axis=1) for part in self.parts()) / len(y)
        theirs = self.kernel_mean
        own_NN = kernel(x, x)

        def distances(counts_RN: np.ndarray) -> np.ndarray:
            across_R = mean_of(across_N)(counts_RN)
            return mean_of_pairs(own_NN, counts_RN) + theirs - 2 * across_R

        return distances


def kernel(x_ND: np.ndarray, y_MD: np.ndarray) -> np.ndarray:
    """The polynomial kernel of KID, (N, M)."""
    result: np.ndarray = (x_ND @ y_MD.T / x_ND.shape[1] + 1) ** 3
    return result


def fid(features_ND: np.ndarray, references_MD: np.ndarray) -> float:
    """The Fréchet distance alone, see :meth:`RealImages.fid`."""
    return float(RealImages(references_MD).fid(features_ND)(np.ones((1, len(features_ND))))[0])


def kid(features_ND: np.ndarray, references_MD: np.ndarray) -> float:
    """The kernel distance alone, see :meth:`RealImages.kid`."""
    return float(RealImages(references_MD).kid(features_ND)(np.ones((1, len(features_ND))))[0])
