"""Timings of deq_jax beside its peers; run from a clone, never installed."""
