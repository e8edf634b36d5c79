"""Parts of study files for tests."""

SMALL_TRIALS = """[trial]
epochs = 2
train_images = 96

[space]
blocks = { low = 1, high = 2 }
convs = { low = 1, high = 2 }
width = { low = 8, high = 16, step = 8 }
width_growth = { low = 1.0, high = 2.0, step = 0.5 }
lr = { low = 0.01, high = 0.2, log = true }
augment = { low = 0.0, high = 0.2, step = 0.1 }
pools = 1
batch_size = 32
precision = "float32"
"""
"""Trials that take a fraction of a second on digits."""
