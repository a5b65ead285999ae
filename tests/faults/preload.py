"""Imported once by the process that drivers are forked from: what takes seconds."""

import ray.data
import ray.train
import torch
import transformers

import jobs.extract
import jobs.pipeline

torch.set_num_threads(1)
__all__ = ["jobs", "ray", "transformers"]
