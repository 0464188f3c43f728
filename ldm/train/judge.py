"""Two judges that say what a 64x64 picture shows: which concept, and in which of the eight styles.

    judge = Judge(Path("runs/emoji64.npz"))                      # 15 s and 1 GB
    judge.score(images, [("2764", "noto"), ...])                 # images (n,64,64,3) uint8 on white

Both are linear in features made by hand (gradients and colours of cells; edges and colour histograms) and fitted on
the training split with numpy, so that no part of the generator judges the generator.

    real pictures of split test_pair    concept top-1 45 %, top-5 63 %, style 87 %      the ceiling
    chance                              concept top-1 0.07 %, top-5 0.4 %, style 12.5 %
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ldm.train import data


class Judge:
    """Whitened nearest class mean for the concept, ridge regression for the style.

    All is fitted on the training split. Concepts of the split test_attribute, which training has in no style, have
    their means too, but only pictures that should show one of them are compared to these.
    """

    def __init__(self, file: Path):
        rgba, meta = data.load(file)
        known = np.array([m["split"] in ("train", "test_attribute") for m in meta])
        meta = [m for m, k in zip(meta, known, strict=True) if k]
        images = data.composite(rgba[known])
        train = np.array([m["split"] == "train" for m in meta])

        features = batched(cell_features, images)  # (n,768)
        concepts, label = np.unique([m["hex"] for m in meta], return_inverse=True)
        self.concepts = {concept: i for i, concept in enumerate(concepts.tolist())}
        self.counts = np.bincount(label)
        self.held_out = np.bincount(label, weights=train) == 0  # (concepts,)
        means = np.zeros((len(concepts), features.shape[1]))
        np.add.at(means, label, features)
        means /= self.counts[:, None]
        within = (features - means[label])[train]  # the spread between the drawings of one concept
        covariance = within.T @ within / len(within)
        covariance += 0.02 * covariance.trace() / len(covariance) * np.eye(len(covariance))
        values, vectors = np.linalg.eigh(covariance)
        self.whiten = vectors / np.sqrt(values)
        self.means = means @ self.whiten
        pairs = [(m["hex"], m["style"]) for m in meta]
        self.pictures = dict(zip(pairs, (features @ self.whiten).astype(np.float32), strict=True))

        styles, label = np.unique([m["style"] for m, t in zip(meta, train, strict=True) if t], return_inverse=True)
        self.styles = {style: i for i, style in enumerate(styles.tolist())}
        small = thumbnails(images[train])
        self.small_mean = small.mean(0)
        self.basis = np.linalg.svd((small - self.small_mean)[::3], full_matrices=False)[2][:300]  # principal components
        x = batched(self._style_features, images[train])
        self.ridge = np.linalg.solve(x.T @ x + 3 * np.eye(x.shape[1]), x.T @ np.eye(len(styles))[label])

    def score(self, images: np.ndarray, wanted: list[tuple[str, str]]) -> dict[str, float]:
        """How many of the pictures (n,64,64,3) uint8, on white, show the (hex, style) that was asked for.

        Fractions concept_top1, concept_top5, style and both, which is a concept in the top 5 and the right style. A
        concept that the judge does not know (split test_concept) is never found; a style it does not know is an error.
        others_top5 is concept_top5 where the training picture of the pair itself is left out of its concept's mean
        (unless it is the only one): what a drawing shows, not whether it is that drawing.
        """
        if unknown := {style for _, style in wanted} - set(self.styles):
            raise ValueError(f"unknown styles {sorted(unknown)}: the data set has {sorted(self.styles)}")
        z = batched(cell_features, images) @ self.whiten
        target = np.array([self.concepts.get(concept, -1) for concept, _ in wanted])
        distance = squared_distances(z, self.means)
        distance[np.ix_(~self.held_out[target], self.held_out)] = np.inf
        found = nearest(distance) == target[:, None]
        for i, (concept, pair) in enumerate(zip(target, wanted, strict=True)):
            if pair in self.pictures and self.counts[concept] > 1:
                distance[i, concept] = ((z[i] - self.others(concept, pair)) ** 2).sum()
        guess = (batched(self._style_features, images) @ self.ridge).argmax(1)
        style = guess == np.array([self.styles[style] for _, style in wanted])
        return {
            "concept_top1": float(found[:, 0].mean()),
            "concept_top5": float(found.any(1).mean()),
            "others_top5": float((nearest(distance) == target[:, None]).any(1).mean()),
            "style": float(style.mean()),
            "both": float((found.any(1) & style).mean()),
        }

    def others(self, concept: int, pair: tuple[str, str]) -> np.ndarray:
        """The mean of a concept's pictures without that of the pair (768,)."""
        k = self.counts[concept]
        return (k * self.means[concept] - self.pictures[pair]) / (k - 1)

    def _style_features(self, images: np.ndarray) -> np.ndarray:
        components = (thumbnails(images) - self.small_mean) @ self.basis.T
        return np.concatenate([components, texture_features(images), np.ones((len(images), 1))], axis=1)


def nearest(distance: np.ndarray) -> np.ndarray:
    """(n,concepts) -> (n,5): the nearest five, the nearest first."""
    return np.argsort(distance, axis=1)[:, :5]


def batched(f: Callable[[np.ndarray], np.ndarray], images: np.ndarray) -> np.ndarray:
    """f(images) a thousand at a time: the features' intermediate values are large."""
    return np.concatenate([f(images[i : i + 1000]) for i in range(0, len(images), 1000)])


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n,d), (m,d) -> (n,m)."""
    return (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T


def thumbnails(images: np.ndarray) -> np.ndarray:
    """(n,64,64,3) uint8 -> (n,768): the picture at 16x16, in [0,1]."""
    return images.reshape(-1, 16, 4, 16, 4, 3).mean((2, 4), dtype=np.float32).reshape(len(images), -1) / 255


def cell_features(images: np.ndarray) -> np.ndarray:
    """(n,64,64,3) uint8 -> (n,768): for each of 8x8 cells, 9 bins of gradient orientation and the mean colour."""
    colour = images.astype(np.float32) / 255
    grey = colour.mean(-1)
    dx, dy = np.zeros_like(grey), np.zeros_like(grey)
    dx[:, :, 1:-1] = grey[:, :, 2:] - grey[:, :, :-2]
    dy[:, 1:-1] = grey[:, 2:] - grey[:, :-2]
    size = np.hypot(dx, dy)
    orientation = (np.arctan2(dy, dx) % np.pi / np.pi * 9).astype(int) % 9

    def cells(x: np.ndarray) -> np.ndarray:
        return x.reshape(len(images), 8, 8, 8, 8, -1).sum((2, 4)).reshape(len(images), 64, -1)

    histogram = np.concatenate([cells(size * (orientation == k)) for k in range(9)], axis=2)  # (n,64,9)
    histogram /= np.linalg.norm(histogram, axis=2, keepdims=True) + 0.3
    return np.concatenate([histogram, cells(colour) / 64], axis=2).reshape(len(images), -1)


def texture_features(images: np.ndarray) -> np.ndarray:
    """(n,64,64,3) uint8 -> (n,522): how many edges of which strength, and a histogram of 8x8x8 colours."""
    grey = images.mean(-1, dtype=np.float32)
    steps = [np.abs(np.diff(grey, axis=axis)) for axis in (2, 1)]
    edges = np.stack([(step >= least).mean((1, 2)) for step in steps for least in (1, 4, 16, 48, 96)], axis=1)
    bins = (images >> 5).reshape(len(images), -1, 3) @ np.array([64, 8, 1])
    colours = np.stack([np.bincount(b, minlength=512) for b in bins]) / bins.shape[1]
    return np.concatenate([5 * edges, np.sqrt(colours)], axis=1)
