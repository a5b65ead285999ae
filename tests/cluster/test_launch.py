"""What is in cluster/launch/ fits the schemas of those who read it: Ray, AWS, Google, Kubernetes, KubeRay, SLURM."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import jsonschema
import kuberay_schema
import kubernetes_validate
import pyarrow.parquet as pq
import pytest
import tiny
import yaml
from packaging.requirements import Requirement
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.resources import Node, Offer, missing, needs
from engine.spec import RunSpec

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "cluster/launch"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FILLED = {
    "REGISTRY": "registry.example", "BUCKET": "bucket", "PROJECT": "project-1", "IMAGE": "image-1", "ACCOUNT": "1234",
}  # fmt: skip
"""What a user puts for the words that stand for something of theirs; AMI, SUBNET and so on are made in a test."""

KUBERNETES = "1.34"


def filled(name: str, **own: str) -> str:
    """A file's text with the user's words in it."""
    text = (LAUNCH / name).read_text()
    for word, value in {**FILLED, **own}.items():
        text = re.sub(rf"(?<![A-Z_]){word}(?![A-Z_])", value, text)
    return text


def load(name: str, **own: str) -> Any:
    return yaml.safe_load(filled(name, **own))


def launcher(name: str, **own: str) -> dict[str, Any]:
    """A configuration as `ray up` prepares it."""
    made: dict[str, Any] = prepare_config(load(name, **own))
    return made


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(filled(f"kuberay/{name}")))


def ray_cluster() -> dict[str, Any]:
    return next(one for one in documents("raycluster.yaml") if one["kind"] == "RayCluster")


def kuberay_types() -> dict[str, Any]:
    """Node types as Ray's autoscaler reads them from the RayCluster."""
    found = ray_cluster()
    found["metadata"]["namespace"] = "default"
    return _derive_autoscaling_config_from_ray_cr(found)


CLUSTERS = {
    "aws": lambda: launcher("aws.yaml"),
    "gcp": lambda: launcher("gcp.yaml"),
    "kuberay": kuberay_types,
}


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_rays_launcher_takes_the_file(name: str) -> None:
    config = launcher(name)
    validate_config(config)
    head, types = config["head_node_type"], config["available_node_types"]
    assert not types[head]["resources"].get("GPU")
    assert types[head]["max_workers"] == 0
    assert set(types) == {head, "extract", "retrain"}
    assert sum(kind["max_workers"] for kind in types.values()) <= config["max_workers"]
    assert all(kind["min_workers"] == 0 for kind in types.values())
    assert 0 < config["idle_timeout_minutes"] <= 10
    for image in (config["docker"]["head_image"], config["docker"]["worker_image"]):
        assert image.rpartition(":")[2].startswith(f"{PROJECT['version']}-"), image
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    for command in starts:
        assert subprocess.run(["bash", "-n", "-c", command]).returncode == 0
        assert "ray start" not in command or "RAY_AUTH_MODE=token" in command
    assert any("--dashboard-host=127.0.0.1" in command for command in starts)


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_every_stage_of_the_spec_finds_nodes_of_its_own_and_only_those(cluster: str) -> None:
    config = CLUSTERS[cluster]()
    validate_config(config)
    types = {
        name: Node({n: float(a) for n, a in kind["resources"].items()}, kind.get("labels", {}))
        for name, kind in config["available_node_types"].items()
    }
    startable = [
        (types[name], kind["max_workers"])
        for name, kind in config["available_node_types"].items()
        if name != config["head_node_type"]
    ]
    spec = RunSpec.from_yaml(filled("run.yaml"))
    wanted = {one.stage: one for one in needs(spec, ("extract", "select", "retrain"), threads=1)}
    assert set(wanted) == {"extract", "select", "retrain"}
    for one in wanted.values():
        assert missing(one, Offer([types[config["head_node_type"]]], startable)) is None
    for stage in ("extract", "retrain"):
        others = [pair for pair in startable if pair[0] is not types[stage]]
        assert missing(wanted[stage], Offer([types[config["head_node_type"]]], others)) is not None


def test_no_file_holds_a_key_or_opens_a_port_to_the_world() -> None:
    for path in LAUNCH.rglob("*"):
        if path.is_file():
            text = path.read_text()
            assert not re.search(r"AKIA|aws_secret|aws_access|private_key|auth_token:|Bearer ", text), path
            assert not re.search(r"0\.0\.0\.0|::/0|accessConfigs:|LoadBalancer|NodePort|hostPort", text), path


# AWS, on moto: what `ray up` does with its API, up to running instances


@pytest.fixture
def aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """A pretended account in which aws-network.yaml was deployed; the words of aws.yaml that come from it."""
    import boto3
    from moto import mock_aws

    monkeypatch.setenv("HOME", str(tmp_path))  # Ray writes an SSH key there
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    with mock_aws():
        ec2 = boto3.client("ec2")
        vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
        subnet = ec2.create_subnet(VpcId=vpc, CidrBlock="10.0.0.0/20", AvailabilityZone="us-east-1a")
        cloud = boto3.client("cloudformation")
        values = {"Vpc": vpc, "Bucket": "bucket"}
        parameters = [{"ParameterKey": k, "ParameterValue": v} for k, v in values.items()]
        template = (LAUNCH / "aws-network.yaml").read_text()
        cloud.create_stack(StackName="unbake", TemplateBody=template, Parameters=parameters)
        stack = cloud.describe_stacks(StackName="unbake")["Stacks"][0]
        assert stack["StackStatus"] == "CREATE_COMPLETE"
        yield {
            "SECURITY_GROUP": stack["Outputs"][0]["OutputValue"],
            "SUBNET": subnet["Subnet"]["SubnetId"],
            "AMI": ec2.describe_images()["Images"][0]["ImageId"],
        }


def world(permission: dict[str, Any]) -> bool:
    """Whether a rule lets in anybody by address: of another group's members nobody outside is one."""
    return bool(permission["IpRanges"] or permission["Ipv6Ranges"] or permission["PrefixListIds"])


def test_ray_up_on_aws_starts_spot_workers_that_nobody_outside_can_reach(aws: dict[str, str]) -> None:
    import boto3
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    plain = launcher("aws.yaml", **aws)
    config = AWSNodeProvider.fillout_available_node_types_resources(plain)
    for name, kind in plain["available_node_types"].items():  # as AWS itself says of these instance types
        known = config["available_node_types"][name]["resources"]
        if name != "head":
            assert {n: a for n, a in known.items() if n != "memory"} == kind["resources"]
            assert known["memory"] > 10e9
    validate_config(config)
    config = AWSNodeProvider.bootstrap_config(config)
    ec2, iam = boto3.client("ec2"), boto3.client("iam")
    used = {g for k in config["available_node_types"].values() for g in k["node_config"]["SecurityGroupIds"]}
    assert used == {aws["SECURITY_GROUP"]}
    for group in ec2.describe_security_groups(GroupIds=list(used))["SecurityGroups"]:
        assert [pair["GroupId"] for rule in group["IpPermissions"] for pair in rule["UserIdGroupPairs"]] == [
            aws["SECURITY_GROUP"]
        ]
        assert not any(world(rule) for rule in group["IpPermissions"])
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for name, spot in (("head", False), ("extract", True), ("retrain", True)):
        node_config = config["available_node_types"][name]["node_config"]
        made = next(iter(provider.create_node(node_config, {"ray-user-node-type": name}, 1)))
        found = ec2.describe_instances(InstanceIds=[made])["Reservations"][0]["Instances"][0]
        assert (found.get("InstanceLifecycle") == "spot") == spot
        assert found["InstanceType"] == node_config["InstanceType"]
        assert "PublicIpAddress" not in found
        profile = "unbake-head" if name == "head" else "unbake-worker"
        assert found["IamInstanceProfile"]["Arn"].endswith(profile)
        roles = iam.get_instance_profile(InstanceProfileName=profile)["InstanceProfile"]["Roles"]
        assert [role["RoleName"] for role in roles] == [profile]


def test_workers_on_aws_may_use_the_bucket_and_start_no_machines(aws: dict[str, str]) -> None:
    import boto3
    from moto.cloudformation.utils import yaml_tag_constructor

    iam = boto3.client("iam")
    assert iam.list_role_policies(RoleName="unbake-worker")["PolicyNames"] == []
    storage = next(p["Arn"] for p in iam.list_policies(Scope="Local")["Policies"])
    document = iam.get_policy_version(PolicyArn=storage, VersionId="v1")["PolicyVersion"]["Document"]
    assert set(re.findall(r"(\w+):[A-Z]\w+", json.dumps(document))) == {"s3"}
    assert all(one["Resource"].startswith("arn:aws:s3:::bucket") for one in document["Statement"])

    class Loader(yaml.SafeLoader):
        """Knows CloudFormation's own tags."""

    Loader.add_multi_constructor("", yaml_tag_constructor)
    resources = yaml.load((LAUNCH / "aws-network.yaml").read_text(), Loader)["Resources"]
    assert "Policies" not in resources["WorkerRole"]["Properties"]
    assert resources["WorkerRole"]["Properties"]["ManagedPolicyArns"] == [
        {"Ref": "Storage"},  # moto does not attach them, so that they are read here
        "arn:aws:iam::aws:policy/AmazonSSMManagedInstanceCore",
        "arn:aws:iam::aws:policy/AmazonEC2ContainerRegistryReadOnly",
    ]
    rules = [one for one in resources.values() if one["Type"] == "AWS::EC2::SecurityGroupIngress"]
    assert [set(rule["Properties"]) for rule in rules] == [{"GroupId", "SourceSecurityGroupId", "IpProtocol"}]
    assert "SecurityGroupIngress" not in resources["Nodes"]["Properties"]


# Google: node configurations against the Compute API's own description, which its client carries


def compute_schema() -> dict[str, Any]:
    """The Compute API's schemas, as JSON schema in which a field that is not named is an error."""
    discovery = pytest.importorskip("googleapiclient.discovery_cache")
    text = (Path(discovery.__file__).parent / "documents/compute.v1.json").read_text()

    def translated(node: Any) -> Any:
        if isinstance(node, list):
            return [translated(item) for item in node]
        if not isinstance(node, dict):
            return node
        if isinstance(node.get("$ref"), str):
            return {"$ref": f"#/$defs/{node['$ref']}"}
        kept = {k: v for k, v in node.items() if k in ("type", "items", "enum", "additionalProperties")}
        made = {k: translated(v) for k, v in kept.items()}
        if made.get("type") == "any":
            del made["type"]
        if "properties" in node:
            made["properties"] = {name: translated(value) for name, value in node["properties"].items()}
            made.setdefault("additionalProperties", False)
        return made

    return {name: translated(value) for name, value in json.loads(text)["schemas"].items()}


def test_google_takes_the_machines_and_they_are_spot_and_private() -> None:
    # jsonschema.validate would check the whole description anew at each call
    instance = jsonschema.Draft202012Validator({"$ref": "#/$defs/Instance", "$defs": compute_schema()})
    types = launcher("gcp.yaml")["available_node_types"]
    for name, kind in types.items():
        instance.validate(kind["node_config"])
        with pytest.raises(jsonschema.ValidationError):
            instance.validate({**kind["node_config"], "machine_type": "x"})
        assert all("accessConfigs" not in one for one in kind["node_config"]["networkInterfaces"])
        spot = kind["node_config"].get("scheduling", {}).get("provisioningModel") == "SPOT"
        assert spot == (name != "head")
        assert name == "head" or kind["node_config"]["serviceAccounts"][0]["email"].startswith(
            "unbake-worker@"
        )


# Kubernetes


def pod_templates(cluster: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield cluster["headGroupSpec"]["template"]
    for group in cluster["workerGroupSpecs"]:
        yield group["template"]


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_kuberay_takes_the_file(name: str) -> None:
    for found in documents(name):
        jsonschema.validate(found["spec"], kuberay_schema.SPECS[found["kind"]])
        cluster = found["spec"].get("rayClusterSpec", found["spec"])
        for template in pod_templates(cluster):
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": template["spec"]}
            kubernetes_validate.validate(pod, KUBERNETES, strict=True)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**found["spec"], "authOption": {}}, kuberay_schema.SPECS[found["kind"]])


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_kuberays_own_crds_take_the_file(name: str) -> None:
    folder = os.environ.get("UNBAKE_KUBERAY_CRDS")
    if not folder:
        pytest.skip(
            "no package carries KubeRay's CRDs: UNBAKE_KUBERAY_CRDS names a folder with their YAML files"
        )
    crds = [yaml.safe_load(path.read_text()) for path in Path(folder).glob("*.yaml")]
    for found in documents(name):
        crd = next(one for one in crds if one["spec"]["names"]["kind"] == found["kind"])
        version = next(one for one in crd["spec"]["versions"] if one["name"] == "v1")
        jsonschema.validate(found, kuberay_schema.strict(version["schema"]["openAPIV3Schema"]))


def test_kubernetes_takes_what_is_its_own() -> None:
    found = documents("access.yaml")
    for one in found:
        kubernetes_validate.validate(one, KUBERNETES, strict=True)
    policy = next(one for one in found if one["kind"] == "NetworkPolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress"]
    assert all(rule["from"] for rule in policy["ingress"])  # an empty one would be everybody
    assert not any("ipBlock" in peer for rule in policy["ingress"] for peer in rule["from"])
    for template in pod_templates(ray_cluster()["spec"]):
        assert policy["podSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()


def test_the_rayjob_brings_the_same_cluster() -> None:
    job = documents("rayjob.yaml")[0]
    assert job["spec"]["rayClusterSpec"] == ray_cluster()["spec"]
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    mounts = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0][
        "volumeMounts"
    ]
    place = next(mount["mountPath"] for mount in mounts if mount["name"] == "run")
    assert job["spec"]["entrypoint"] == f"unbake recover {place}/run.yaml"


def test_pods_run_as_nobody_in_particular_with_a_token_and_workers_come_from_none() -> None:
    spec = ray_cluster()["spec"]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    for template in pod_templates(spec):
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["restartPolicy"] == "Never"
        for container in [*pod["containers"], *pod["initContainers"]]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["image"].rpartition(":")[2].startswith(f"{PROJECT['version']}-")
    for group in spec["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        assert group["minReplicas"] == group["replicas"] == 0
        assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert {one["key"] for one in pod["tolerations"]} == {"nvidia.com/gpu", "cloud.google.com/gke-spot"}
        assert "cloud.google.com/gke-accelerator" in pod["nodeSelector"]


# The image, and what is done on a node


def test_the_image_is_pinned_not_roots_and_has_both_variants() -> None:
    text = (LAUNCH / "Dockerfile").read_text()
    lines = text.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    verbs = [(line[0], line[1:]) for line in words if line]
    bases = [rest[0] for verb, rest in verbs if verb == "FROM"]
    assert all(re.search(r":\d+\.\d+\.\d+", base) for base in bases), bases
    users = [rest[0] for verb, rest in verbs if verb == "USER"]
    assert users[-1] not in ("root", "0")
    order = [verb for verb, _ in verbs]
    assert "RUN" not in order[order.index("USER") :]
    arguments = dict(rest[0].partition("=")[::2] for verb, rest in verbs if verb == "ARG")
    assert arguments["VARIANT"] in ("cpu", "cuda")
    assert {"cpu)", "cuda)"} <= {word for verb, rest in verbs if verb == "RUN" for word in rest}
    wanted = {one.name: one for one in map(Requirement, PROJECT["dependencies"])}
    assert wanted["ray"].specifier.contains(arguments["RAY"])
    assert wanted["torch"].specifier.contains(arguments["TORCH"])
    assert set(arguments["EXTRAS"].split(",")) <= set(PROJECT["optional-dependencies"])
    assert ray_cluster()["spec"]["rayVersion"] == arguments["RAY"]
    copied = {name for verb, rest in verbs if verb == "COPY" for name in rest[:-1]}
    assert all((ROOT / name).exists() for name in copied)
    assert {"engine", "cluster", "jobs", "pyproject.toml"} <= copied
    assert not re.search(r"(?i)password|secret", text)


def fetching() -> dict[str, str]:
    """What each kind of cluster does on a node to have the models there: Python code."""
    pod = ray_cluster()["spec"]["headGroupSpec"]["template"]["spec"]
    found = {"kuberay": pod["initContainers"][0]["args"][0]}
    for name in ("aws", "gcp"):
        command = load(f"{name}.yaml")["setup_commands"][0]
        found[name] = re.findall(r'python -c "(.*)"', command)[0]
    return found


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_a_node_has_the_models_where_the_spec_says(cluster: str, tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    names = ("base/config.json", "finetuned/config.json", "finetuned/deep/weights")
    for name in names:
        store.pipe(f"/bucket/models/{name}", name.encode())
    code = fetching()[cluster].replace("s3://", "memory://").replace("gs://", "memory://")
    place = "/models" if cluster == "kuberay" else "/home/ray/models.part"
    if cluster == "kuberay":  # where a volume is mounted
        (tmp_path / "there").mkdir()
    exec(code.replace(f'"{place}"', f'"{tmp_path}/there"').replace(f"'{place}'", f"'{tmp_path}/there'"))
    assert {
        p.relative_to(tmp_path / "there").as_posix() for p in (tmp_path / "there").rglob("*") if p.is_file()
    } == {*names}
    spec = RunSpec.from_yaml(filled("run.yaml"))
    assert {spec.models.base, spec.models.finetuned} == {
        "/home/ray/models/base",
        "/home/ray/models/finetuned",
    }


# SLURM

STUB = """#!/bin/bash
printf '%s\\n' "$@" > "$CALLS/$(basename "$0")"
printf '%s\\n' "$RAY_AUTH_MODE" "$RAY_AUTH_TOKEN" > "$CALLS/token"
[ "$(basename "$0")" != scontrol ] || printf 'node-a\\nnode-b\\n'
exit "${CODE:-0}"
"""


def sbatch(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the script as SLURM would, with stand-ins for srun and scontrol that write down how they were called."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    for name in ("srun", "scontrol"):
        (tools / name).write_text(STUB)
        (tools / name).chmod(0o755)
    (folder / ".venv/bin").mkdir(parents=True, exist_ok=True)
    (folder / ".venv/bin/activate").write_text(f'PATH="$PATH:{Path(sys.executable).parent}"\n')
    given = {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "CALLS": str(folder), "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_NNODES": "2", "SLURM_CPUS_ON_NODE": "64",
        "SLURM_SUBMIT_DIR": str(folder), **environment,
    }  # fmt: skip
    command = ["bash", str(LAUNCH / "unbake.sbatch"), *arguments]
    return subprocess.run(command, env=given, capture_output=True, text=True, timeout=60)


def test_slurm_starts_one_ray_over_all_nodes_and_the_driver_with_the_spec(tmp_path: Path) -> None:
    assert subprocess.run(["bash", "-n", str(LAUNCH / "unbake.sbatch")]).returncode == 0
    done = sbatch(tmp_path, "run.yaml", "--select.size", "500")
    assert done.returncode == 0, done.stderr
    called = (tmp_path / "srun").read_text().splitlines()
    ray = called.index("ray")
    end = called.index("--")
    assert {"--nodes=2", "--ntasks=2"} <= set(called[:ray])
    assert called[ray + 1 : ray + 6] == ["symmetric-run", "--address", "node-a:24711", "--min-nodes", "2"]
    assert {"--num-cpus=64", "--labels=unbake-extract=true,unbake-retrain=true"} <= set(called[ray:end])
    assert called[end + 1 :] == [
        "unbake", "recover", "run.yaml", "--ray.address", "node-a:24711", "--select.size", "500",
    ]  # fmt: skip
    mode, token = (tmp_path / "token").read_text().split()
    assert (mode, len(token)) == ("token", 64)
    sbatch(tmp_path, "run.yaml")
    assert (tmp_path / "token").read_text().split()[1] != token


ALONE = """
mount -t tmpfs tmpfs /tmp/ray && ip link set lo up || exit 77
exec bash "$SCRIPT" "$@"
"""
"""Run with processes, network and Ray's folder of its own: `ray stop`, at the end, stops every Ray that it sees."""


def one_node(folder: Path) -> dict[str, str]:
    """The environment of a job with one node, this one, where srun runs what it is given."""
    tools, home = folder / "tools", folder / "home"
    tools.mkdir()
    home.mkdir()
    (tools / "scontrol").write_text("#!/bin/bash\necho localhost\n")
    (tools / "srun").write_text('#!/bin/bash\nwhile [ "$1" != ray ]; do shift; done\nexec "$@"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {
        **kept, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "HOME": str(home),
        "SCRIPT": str(LAUNCH / "unbake.sbatch"), "UNBAKE_VENV": str(Path(sys.executable).parents[1]),
        "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": "1", "SLURM_CPUS_ON_NODE": "2",
    }  # fmt: skip


@pytest.mark.slow
def test_slurms_script_brings_a_whole_run_to_its_end(
    tmp_path: Path, tiny_base: str, tiny_finetuned: str, tiny_corpus: str
) -> None:
    spec = {
        "run_dir": str(tmp_path / "run"),
        "models": {"base": tiny_base, "finetuned": tiny_finetuned},
        "corpus": {"paths": [tiny_corpus], "partition_rows": 64},
        "task": {"labels": tiny.LABELS, "template": "{text} topic:", "max_tokens": 24},
        "extract": {"workers_max": 1, "threads": 1, "node_labels": {"unbake-extract": "true"}},
        "select": {"size": 16},
        "retrain": {"strategies": ["greedy"], "epochs": 1, "batch_size": 8, "threads": 1,
                    "node_labels": {"unbake-retrain": "true"}},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(spec))
    Path("/tmp/ray").mkdir(exist_ok=True)
    apart = ["unshare", "-m", "-n", "-p", "-f", "--mount-proc"]
    if subprocess.run([*apart, "true"], capture_output=True).returncode:
        pytest.skip("no namespaces are permitted here, and without them other Rays would be stopped")
    command = [*apart, "bash", "-c", ALONE, "bash", str(tmp_path / "run.yaml"), "--select.size", "12"]
    given = one_node(tmp_path)
    done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run/report.html").exists()
    assert pq.read_metadata(tmp_path / "run/selection.parquet").num_rows == 12
    again = subprocess.run([*command, "--gradients.dim", "64"], env=given, capture_output=True, timeout=500)
    assert again.returncode == 2  # the driver's own: the run directory holds another dim


def test_slurm_hands_on_the_drivers_exit_code_and_says_how_it_is_used(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    without = sbatch(tmp_path / "one")
    assert without.returncode != 0
    assert "usage: sbatch" in without.stderr
    script = (LAUNCH / "unbake.sbatch").read_text()
    assert "exec srun" in script  # so that its exit code, and SLURM's signals, are the job's
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", script, re.M))
    assert options["ntasks-per-node"] == "1"
    assert {"exclusive", "requeue", "gpus-per-node", "signal", "time"} <= options.keys()


def test_the_labels_of_slurm_are_those_of_the_spec() -> None:
    script = (LAUNCH / "unbake.sbatch").read_text()
    labels = dict(pair.split("=") for pair in re.findall(r"--labels=(\S+)", script)[0].split(","))
    spec = RunSpec.from_yaml(filled("run.yaml"))
    for section in (spec.extract, spec.retrain):
        assert section.node_labels.items() <= labels.items()


def test_the_table_of_costs_is_what_its_command_prints() -> None:
    command = [sys.executable, "benchmarks/cluster_cost.py"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": "."}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    printed = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(printed) > 10
    text = (ROOT / "docs/clusters.md").read_text()
    assert [line for line in printed if line not in text] == []
