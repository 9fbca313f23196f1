"""The settings of segmentation that have a name.

cityscapes_small, _large and _xl are the published settings of the multiscale DEQ paper (Bai, Koltun
and Kolter, NeurIPS 2020; val mIoU 75.1, 77.8 and 80.3), as its code has them: from weights trained
on ImageNet, 4 devices, crops of 3 images on each (2 for xl), 500 epochs of whole batches of the
2,975 finely labelled images.  Without Jacobian regularisation: arXiv 2106.14342 gives no setting
for Cityscapes; --jac.gamma and --jac.prob turn it on.

  from the code     channels, expansion, 1 block a branch, 8 groups, scale and bias after the
                    fusion, dropout, batch-norm momentum .01, Broyden 27 forward and 30 backward
                    with absolute residuals of 1e-3, warm-up of 3 layers, SGD .9 without nesterov
                    at .01, weight decay, cosine to 1e-6, crops, scales .5 to 2, flip, the 19
                    published class weights, label 255 ignored
  from the paper    the same, as far as it states them
  chosen here       evaluation every 10 epochs, 4 images at a time; worker processes

The published start is an ImageNet model with the same trunk.  Stem and equilibrium of a run here,
or of converted weights, are loaded; the head starts anew:

    python -m experiments.image_classification.main --preset=imagenet_small --workdir=IMAGENET
    python -m experiments.segmentation.main --preset=cityscapes_small --init_from=IMAGENET/model

camvid_small is this repository's own small job: 367 road scenes of 256 x 192, 11 classes; three
branches, the finest at a quarter of the resolution, with Jacobian regularisation.  1,000 steps, the
first 400 of them unrolled; batch norm keeps a tenth of each batch, as 1,000 steps are too few for
a hundredth.  The settings come from a few short runs, one seed each, looked at on the validation
split; they were not searched.

    python -m experiments.segmentation.main --preset=camvid_small --data.dir=DIR

Expect, on the 233 test images (seed 0): mIoU 35 %, pixel accuracy 77 %; road, sky and building at
60 to 90 %, while poles and signs, thinner than the finest grid's 4 pixels, are not found.
Measured: 23 minutes on 2 CPU cores that other jobs kept busy (1.2 s a step; 0.3 to 0.5 s in
quieter minutes).
"""

from __future__ import annotations

import dataclasses

from deq_jax.training import EvalConfig, JacConfig, OptimConfig, TrainConfig
from experiments.common import compare, mdeq
from experiments.segmentation.config import DataConfig, ModelConfig, SegmentationConfig

CITYSCAPES_EXAMPLES = 2975


def cityscapes_schedule(batch: int, warmup_steps: int) -> TrainConfig:
    """500 epochs of Cityscapes.

    Args:
      batch: images in a batch, over all devices.
      warmup_steps: steps that train the weight-tied unrolled network of 3 layers.

    Returns:
      The configuration.

    Example:
      >>> cityscapes_schedule(12, 60_000).steps
      123500
    """
    epoch = CITYSCAPES_EXAMPLES // batch
    return TrainConfig(
        steps=500 * epoch,
        batch_size=batch,
        warmup_steps=warmup_steps,
        warmup_layers=3,
        log_every=50,
        eval_every=10 * epoch,
        checkpoint_every=epoch,
    )


SMALL = ModelConfig(
    classes=19,
    channels=(32, 64, 128, 256),
    post_affine=True,
    dropout=0.05,
    downsample=2,
    momentum=0.01,
)
CITYSCAPES_SGD = OptimConfig(
    name="sgd", lr=0.01, end_lr=1e-6, momentum=0.9, nesterov=False, weight_decay=2e-4
)
CITYSCAPES_SMALL = SegmentationConfig(
    model=SMALL,
    data=DataConfig(
        name="cityscapes",
        eval_split="validation",
        crop=(512, 1024),
        class_weights="published",
        in_memory=False,
        workers=8,
        eval_batch_size=4,
    ),
    optim=CITYSCAPES_SGD,
    train=cityscapes_schedule(12, 60_000),
    eval=EvalConfig(budgets=(9, 18), spectral_batches=1, spectral_iters=50),
    **mdeq.broyden(27, 30, "abs"),
)
LARGE_SGD = dataclasses.replace(CITYSCAPES_SGD, weight_decay=3e-4)

PRESETS = compare.in_runs(
    cityscapes_small=CITYSCAPES_SMALL,
    cityscapes_large=dataclasses.replace(
        CITYSCAPES_SMALL,
        model=dataclasses.replace(SMALL, channels=(80, 160, 320, 640), dropout=0.03),
        optim=LARGE_SGD,
    ),
    cityscapes_xl=dataclasses.replace(
        CITYSCAPES_SMALL,
        model=dataclasses.replace(SMALL, channels=(88, 176, 352, 704), expansion=6, dropout=0.04),
        data=dataclasses.replace(CITYSCAPES_SMALL.data, crop=(768, 1024)),
        optim=LARGE_SGD,
        train=cityscapes_schedule(8, 40_000),
    ),
    camvid_small=SegmentationConfig(
        model=ModelConfig(classes=11, channels=(24, 32, 48), expansion=3, downsample=2),
        data=DataConfig(
            name="camvid",
            eval_split="test",
            crop=(128, 192),
            scale_low=0.75,
            scale_high=1.5,
            class_weights="frequency",
            eval_batch_size=12,
        ),
        jac=JacConfig(gamma=1.0, prob=0.5, probes=1, budget_low=-2, budget_high=1),
        optim=OptimConfig(name="adam", lr=5e-3, end_lr=1e-5, warmup_steps=50, clip=1.0),
        train=TrainConfig(
            steps=1000,
            batch_size=8,
            warmup_steps=400,
            warmup_layers=4,
            log_every=50,
            eval_every=500,
            checkpoint_every=500,
        ),
        eval=EvalConfig(max_steps=12, budgets=(2, 4, 8), spectral_batches=1, spectral_iters=50),
        **mdeq.broyden(8, 8, "rel"),
    ),
)
