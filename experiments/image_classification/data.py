"""Opens the image set that a configuration names."""

from __future__ import annotations

from deq_jax.data import images, pipeline
from deq_jax.training import DataIterator, EvalData
from experiments.image_classification.config import ImageConfig


def build_data(config: ImageConfig) -> tuple[DataIterator, EvalData]:
    """Temporary."""
    train, test = images.digits("train"), images.digits("test")
    standardize = images.Standardize.of(train)
    batches = pipeline.train_iterator(
        train,
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        transform=standardize,
        augment=images.RandomShift(config.data.shift) if config.data.shift else None,
    )
    size = config.data.eval_batch_size
    return batches, lambda: pipeline.eval_batches(test, batch_size=size, transform=standardize)
