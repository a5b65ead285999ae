"""Where work runs: the Ray that is used, and what a stage asks of the nodes of its workers."""

from __future__ import annotations

from pydantic import Field

from engine.sections import Section


class Ray(Section):
    """Where Ray is. With an address nothing is started and nothing is shut down."""

    address: str | None = Field(None, description="address of a cluster; default: a private local instance")
    num_cpus: int | None = Field(None, ge=1, description="CPUs of the local instance; default: all")
    num_gpus: int | None = Field(None, ge=0, description="GPUs of the local instance; default: all")
    object_store_mb: int = Field(512, ge=100, description="object store of the local instance, MB")


class Placement(Section):
    """What a stage asks of the nodes that its workers run on; changes nothing of what it writes."""

    memory_mb: int | None = Field(
        None, ge=1, description="main memory kept for one worker, MB; default: none is counted"
    )
    accelerator_type: str | None = Field(
        None, min_length=1, description="kind of GPU, by Ray's name for it: A100, H100, L4, T4, ..."
    )
    node_labels: dict[str, str] = Field(
        default_factory=dict,
        description="labels of the nodes, as Ray selects them: {ray.io/market-type: spot}, {zone: '!a'}",
    )
