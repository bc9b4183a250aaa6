"""The schema of KubeRay's RayJob (ray.io/v1), written from the operator's types.

The API server silently drops fields that it does not know, so a misspelt or misplaced one must be detected here. The
operator's own CRD, about 800 kB with the whole schema of a pod, is in no package that tests could install. This schema
has every field of RayJobSpec and RayClusterSpec, and those fields of a pod that our cluster configs may use.
"""

from typing import Any

STRING, INTEGER, BOOLEAN, ANY = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}, {}
STRINGS = {"type": "object", "additionalProperties": STRING}


def fields(required: tuple[str, ...] = (), **types: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": types, "required": list(required), "additionalProperties": False}


def array(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item}


def enum(*values: str) -> dict[str, Any]:
    return {"enum": list(values)}


QUANTITIES = {
    "type": "object",
    "additionalProperties": {"type": ["string", "integer"], "pattern": r"^[0-9.]+(m|k|[KMGT]i?)?$"},
}
CONTAINER = fields(
    ("name", "image"),
    name=STRING,
    image=STRING,
    imagePullPolicy=enum("Always", "IfNotPresent", "Never"),
    command=array(STRING),
    args=array(STRING),
    env=array(fields(("name",), name=STRING, value=STRING, valueFrom=ANY)),
    envFrom=array(ANY),
    ports=array(fields(("containerPort",), name=STRING, containerPort=INTEGER, protocol=enum("TCP", "UDP", "SCTP"))),
    resources=fields(requests=QUANTITIES, limits=QUANTITIES),
    lifecycle=fields(preStop=fields(exec=fields(("command",), command=array(STRING))), postStart=ANY),
    securityContext=ANY,
    volumeMounts=array(ANY),
)
TOLERATION = fields(
    key=STRING,
    operator=enum("Exists", "Equal"),
    value=STRING,
    effect=enum("NoSchedule", "PreferNoSchedule", "NoExecute"),
    tolerationSeconds=INTEGER,
)
POD = fields(
    ("spec",),
    metadata=fields(labels=STRINGS, annotations=STRINGS),
    spec=fields(
        ("containers",),
        serviceAccountName=STRING,
        restartPolicy=enum("Always", "OnFailure", "Never"),
        terminationGracePeriodSeconds=INTEGER,
        nodeSelector=STRINGS,
        affinity=ANY,
        tolerations=array(TOLERATION),
        imagePullSecrets=array(ANY),
        initContainers=array(CONTAINER),
        containers=array(CONTAINER),
        securityContext=ANY,
        volumes=array(ANY),
    ),
)
AUTOSCALER = fields(
    resources=ANY,
    image=STRING,
    imagePullPolicy=STRING,
    securityContext=ANY,
    idleTimeoutSeconds=INTEGER,
    upscalingMode=enum("Default", "Aggressive", "Conservative"),
    version=enum("v1", "v2"),
    env=array(ANY),
    envFrom=array(ANY),
    volumeMounts=array(ANY),
)
HEAD = fields(
    ("template",),
    template=POD,
    headService=ANY,
    enableIngress=BOOLEAN,
    resources=STRINGS,
    labels=STRINGS,
    rayStartParams=STRINGS,
    serviceType=enum("ClusterIP", "NodePort", "LoadBalancer", "ExternalName"),
)
WORKERS = fields(
    ("groupName", "minReplicas", "maxReplicas", "template"),
    suspend=BOOLEAN,
    groupName=STRING,
    replicas=INTEGER,
    minReplicas=INTEGER,
    maxReplicas=INTEGER,
    idleTimeoutSeconds=INTEGER,
    resources=STRINGS,
    labels=STRINGS,
    rayStartParams=STRINGS,
    template=POD,
    scaleStrategy=ANY,
    numOfHosts=INTEGER,
)
CLUSTER = fields(
    ("headGroupSpec",),
    upgradeStrategy=ANY,
    authOptions=fields(mode=enum("disabled", "token"), secretName=STRING, enableK8sTokenAuth=BOOLEAN),
    suspend=BOOLEAN,
    managedBy=STRING,
    autoscalerOptions=AUTOSCALER,
    headServiceAnnotations=STRINGS,
    enableInTreeAutoscaling=BOOLEAN,
    gcsFaultToleranceOptions=ANY,
    historyServerOptions=ANY,
    networkPolicy=ANY,
    tlsOptions=ANY,
    headGroupSpec=HEAD,
    rayVersion=STRING,
    workerGroupSpecs=array(WORKERS),
)
DELETION_CONDITION = {
    **fields(
        jobStatus=enum("SUCCEEDED", "FAILED"),
        jobDeploymentStatus=enum("Failed"),
        ttlSeconds={"type": "integer", "minimum": 0},
    ),
    "oneOf": [{"required": ["jobStatus"]}, {"required": ["jobDeploymentStatus"]}],
}
DELETION_RULE = fields(
    ("policy", "condition"),
    policy=enum("DeleteCluster", "DeleteWorkers", "DeleteSelf", "DeleteNone"),
    condition=DELETION_CONDITION,
)
RAY_JOB = fields(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion=enum("ray.io/v1"),
    kind=enum("RayJob"),
    metadata=fields(("name",), name=STRING, namespace=STRING, labels=STRINGS, annotations=STRINGS),
    spec=fields(
        activeDeadlineSeconds=INTEGER,
        backoffLimit=INTEGER,
        rayClusterSpec=CLUSTER,
        submitterPodTemplate=POD,
        metadata=STRINGS,
        clusterSelector=STRINGS,
        submitterConfig=fields(backoffLimit=INTEGER),
        managedBy=STRING,
        deletionStrategy=fields(("deletionRules",), deletionRules={**array(DELETION_RULE), "minItems": 1}),
        entrypoint=STRING,
        runtimeEnvYAML=STRING,
        jobId=STRING,
        submissionMode=enum("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
        entrypointResources=STRING,
        entrypointNumCpus={"type": "number"},
        entrypointNumGpus={"type": "number"},
        preRunningDeadlineSeconds=INTEGER,
        ttlSecondsAfterFinished=INTEGER,
        shutdownAfterJobFinishes=BOOLEAN,
        suspend=BOOLEAN,
    )
    # The operator refuses deletion rules beside either of these, and a time to live without a shutdown.
    | {
        "dependentSchemas": {
            "deletionStrategy": {"properties": {"shutdownAfterJobFinishes": False, "ttlSecondsAfterFinished": False}}
        },
        "dependentRequired": {"ttlSecondsAfterFinished": ["shutdownAfterJobFinishes"]},
    },
)
