"""scikit-learn's bundled handwritten digits, resized to 3x32x32: real data that needs no network.

1,797 images of 8x8 pixels; a fixed fifth of them (stratified) is set aside as test images.
Source: https://scikit-learn.org/stable/datasets/toy_dataset.html#digits-dataset
"""

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn import functional as F

from data.images import IMAGE_SIZE, LabelledImages

TEST_SHARE = 0.2
DIVISION_SEED = 0


def load_part(test: bool) -> LabelledImages:
    """The training images, or with ``test`` those set aside; only `data.holdout` asks for the latter."""
    digits = load_digits()
    rows = np.arange(len(digits.target))
    training, held_out = train_test_split(
        rows, test_size=TEST_SHARE, stratify=digits.target, random_state=DIVISION_SEED
    )
    chosen = np.sort(held_out if test else training)
    grey = torch.from_numpy(digits.images[chosen]).float().unsqueeze(1) * (255 / 16)
    large = F.interpolate(grey, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", align_corners=False)
    images = large.round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(digits.target[chosen]).long()
    return LabelledImages(images, labels, tuple(str(name) for name in digits.target_names), mirror=False)
