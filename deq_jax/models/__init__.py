"""Models in Flax Linen: MDEQ, transformers, fully connected DEQs, explicit baselines."""

from deq_jax.models.embeddings import AdaptiveEmbedding
from deq_jax.models.heads import ClassificationHead, SegmentationHead
from deq_jax.models.looped import LoopedCell, LoopedTransformer
from deq_jax.models.mdeq import MDEQ
from deq_jax.models.mdeq_cell import MDEQCell
from deq_jax.models.mlp import MLPDEQ, DenseCell, ScalarDEQ, ToyCell
from deq_jax.models.resnet import ResNet
from deq_jax.models.softmax import linear_nll
from deq_jax.models.transformer import DEQTransformer, ExplicitTransformer
from deq_jax.models.transformer_cell import Injection, Memory, TransformerCell, positions

__all__ = [
    "MDEQ",
    "MLPDEQ",
    "AdaptiveEmbedding",
    "ClassificationHead",
    "DEQTransformer",
    "DenseCell",
    "ExplicitTransformer",
    "Injection",
    "LoopedCell",
    "LoopedTransformer",
    "MDEQCell",
    "Memory",
    "ResNet",
    "ScalarDEQ",
    "SegmentationHead",
    "ToyCell",
    "TransformerCell",
    "linear_nll",
    "positions",
]
