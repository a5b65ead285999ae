"""The fields of KubeRay's RayCluster and RayJob that are its own, as a JSON schema.

Written down from `ray-operator/apis/ray/v1/raycluster_types.go` and `rayjob_types.go` of KubeRay 1.7. Whatever is
Kubernetes' own (pod templates and the like) is `{}` here; kubernetes-validate knows it.
"""

from __future__ import annotations

from typing import Any

ANY: dict[str, Any] = {}
TEXT, FLAG, NUMBER, COUNT = {"type": "string"}, {"type": "boolean"}, {"type": "number"}, {"type": "integer"}
TEXTS = {"type": "object", "additionalProperties": TEXT}


def one_of(*values: str) -> dict[str, Any]:
    return {"enum": list(values)}


def fields(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    """An object with these fields and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


HEAD = fields(
    ("template",),
    template=ANY, headService=ANY, enableIngress=FLAG, ingressOptions=ANY, resources=TEXTS, labels=TEXTS,
    rayStartParams=TEXTS, serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer", "ExternalName"),
)  # fmt: skip
WORKERS = fields(
    ("groupName", "minReplicas", "maxReplicas", "template"),
    suspend=FLAG, groupName=TEXT, replicas=COUNT, minReplicas=COUNT, maxReplicas=COUNT, idleTimeoutSeconds=COUNT,
    priority=COUNT, resources=TEXTS, labels=TEXTS, rayStartParams=TEXTS, template=ANY,
    scaleStrategy=fields(workersToDelete={"type": "array", "items": TEXT}), numOfHosts=COUNT,
)  # fmt: skip
AUTOSCALER = fields(
    resources=ANY, image=TEXT, imagePullPolicy=one_of("Always", "IfNotPresent", "Never"), securityContext=ANY,
    idleTimeoutSeconds=COUNT, upscalingMode=one_of("Default", "Aggressive", "Conservative"), version=one_of("v1", "v2"),
    env=ANY, envFrom=ANY, volumeMounts=ANY, command=ANY, args=ANY,
)  # fmt: skip
CLUSTER = fields(
    ("headGroupSpec",),
    upgradeStrategy=fields(type=one_of("Recreate", "None")),
    authOptions=fields(enableK8sTokenAuth=FLAG, secretName=TEXT, mode=one_of("disabled", "token")),
    suspend=FLAG, managedBy=TEXT, autoscalerOptions=AUTOSCALER, headServiceAnnotations=TEXTS,
    enableInTreeAutoscaling=FLAG, gcsFaultToleranceOptions=ANY, historyServerOptions=ANY, networkPolicy=ANY,
    tlsOptions=ANY, headGroupSpec=HEAD, rayVersion=TEXT, workerGroupSpecs={"type": "array", "items": WORKERS},
)  # fmt: skip
JOB = fields(
    activeDeadlineSeconds=COUNT, backoffLimit=COUNT, rayClusterSpec=CLUSTER, submitterPodTemplate=ANY, metadata=TEXTS,
    clusterSelector=TEXTS, submitterConfig=fields(backoffLimit=COUNT), managedBy=TEXT, deletionStrategy=ANY,
    entrypoint=TEXT, runtimeEnvYAML=TEXT, jobId=TEXT,
    submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"), entrypointResources=TEXT,
    entrypointNumCpus=NUMBER, entrypointNumGpus=NUMBER, ttlSecondsAfterFinished=COUNT, shutdownAfterJobFinishes=FLAG,
    suspend=FLAG,
)  # fmt: skip
SPECS = {"RayCluster": CLUSTER, "RayJob": JOB}
"""Kind -> schema of its `spec`."""


def strict(schema: Any) -> Any:
    """A CRD's OpenAPI schema that also refuses fields which it does not name: Kubernetes would drop them silently."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: strict(value) for name, value in schema.items()}
    if isinstance(made.get("properties"), dict) and "type" in made:
        made.setdefault("additionalProperties", False)
    return made
