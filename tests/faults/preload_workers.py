"""Imported once by the process that workers are forked from: what extraction's, selection's and training's import."""

import deepspeed
import transformers.models.llama.modeling_llama
import zarr

import cluster.extract
import cluster.select
import cluster.train_worker
import engine.gradients
import engine.plain_stepper
import faults.preload

__all__ = ["cluster", "deepspeed", "engine", "faults", "transformers", "zarr"]
