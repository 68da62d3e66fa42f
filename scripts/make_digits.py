"""Write ``sg_lightning/datamodules/data/digits.npz`` from scikit-learn's handwritten digits.

Run from the repository root with scikit-learn installed: ``python scripts/make_digits.py``.
The test split is drawn once here and stored, so no seed of a user and no version of a library can move it.
"""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

TARGET = Path(__file__).parent.parent / "sg_lightning" / "datamodules" / "data" / "digits.npz"
TEST_SIZE = 497
SEED = 2024


def stratified(labels: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Draw ``size`` indices with each class at its share of the whole (largest remainders), sorted."""
    rng = np.random.default_rng(seed)
    classes, counts = np.unique(labels, return_counts=True)
    exact = counts * size / len(labels)
    take = np.floor(exact).astype(int)
    take[np.argsort(take - exact, kind="stable")[: size - take.sum()]] += 1
    drawn = [rng.permutation(np.flatnonzero(labels == c))[:n] for c, n in zip(classes, take, strict=True)]
    return np.sort(np.concatenate(drawn))


def main() -> None:
    """Write the file and say what is in it."""
    source = load_digits()
    images, labels = source.images.astype(np.uint8), source.target.astype(np.uint8)
    assert (images == source.images).all()
    test = stratified(labels, TEST_SIZE, SEED).astype(np.int16)
    np.savez_compressed(TARGET, images=images, labels=labels, test=test)
    print(f"{TARGET}: {TARGET.stat().st_size:,} bytes, {len(images)} images of {images.shape[1:]}, {len(test)} test")


if __name__ == "__main__":
    main()
