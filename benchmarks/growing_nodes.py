"""Ray's fake node provider for nodes whose type names its memory, as every cloud's does.

Ray Data asks for more nodes like those that are there, by CPUs, GPUs and memory; a type that names no memory could
not give them. The fake provider would hand the memory to its raylets as a resource of the user's own, which Ray
refuses: they are left to find out what this machine has.
"""

from __future__ import annotations

from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class GrowingNodes(FakeMultiNodeProvider):
    """Raylets of this machine as nodes that come and go."""

    def create_node_with_resources_and_labels(
        self,
        node_config: dict[str, Any],
        tags: dict[str, str],
        count: int,
        resources: dict[str, float],
        labels: dict[str, str],
    ) -> None:
        """Start nodes of a type."""
        own = {name: amount for name, amount in resources.items() if name != "memory"}
        super().create_node_with_resources_and_labels(node_config, tags, count, own, labels)
