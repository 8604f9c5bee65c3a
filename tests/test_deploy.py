"""What is in deploy/ is valid, of the pinned versions, and keeps secrets in files."""

import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from prefect.utilities.templating import apply_values
from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
PINNED = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
)
VERSION = re.findall(r"^version = .(.+).$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[0]
IMAGE = f"pnp-guide:{VERSION}"

# The parts of KubeRay's v1 resources that are used here; what a CRD does not know it drops unseen.
QUANTITIES = {"type": "object", "additionalProperties": {"type": "string"}}
NAMED = {"type": "object", "required": ["name"]}
POD = {
    "type": "object",
    "required": ["spec"],
    "additionalProperties": False,
    "properties": {
        "spec": {
            "type": "object",
            "required": ["containers"],
            "additionalProperties": False,
            "properties": {
                "containers": {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        **NAMED,
                        "required": ["name", "image", "resources"],
                        "additionalProperties": False,
                        "properties": {
                            "name": {"type": "string"},
                            "image": {"const": IMAGE},
                            "env": {"type": "array", "items": NAMED},
                            "ports": {"type": "array"},
                            "resources": {
                                "type": "object",
                                "additionalProperties": False,
                                "properties": {"requests": QUANTITIES, "limits": QUANTITIES},
                            },
                            "volumeMounts": {"type": "array", "items": NAMED},
                        },
                    },
                },
                "volumes": {"type": "array", "items": NAMED},
            },
        }
    },
}
START = {"type": "object", "additionalProperties": {"type": "string"}}
CLUSTER: dict[str, Any] = {
    "type": "object",
    "required": ["rayVersion", "headGroupSpec", "workerGroupSpecs"],
    "additionalProperties": False,
    "properties": {
        "rayVersion": {"const": PINNED["ray"]},
        "headGroupSpec": {
            "type": "object",
            "required": ["template", "rayStartParams"],
            "additionalProperties": False,
            "properties": {"rayStartParams": START, "template": POD},
        },
        "workerGroupSpecs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["groupName", "template", "rayStartParams", "maxReplicas"],
                "additionalProperties": False,
                "properties": {
                    "groupName": {"type": "string"},
                    "replicas": {"type": "integer"},
                    "minReplicas": {"type": "integer"},
                    "maxReplicas": {"type": "integer"},
                    "rayStartParams": START,
                    "template": POD,
                },
            },
        },
    },
}
JOB = {
    "type": "object",
    "required": ["entrypoint", "rayClusterSpec"],
    "additionalProperties": False,
    "properties": {
        "entrypoint": {"type": "string"},
        "shutdownAfterJobFinishes": {"type": "boolean"},
        "ttlSecondsAfterFinished": {"type": "integer"},
        "backoffLimit": {"type": "integer"},
        "rayClusterSpec": CLUSTER,
    },
}


def load(name: str) -> Any:
    return YAML(typ="safe", pure=True).load(DEPLOY / name)


@pytest.mark.parametrize(
    ("name", "kind", "schema"),
    [("cluster", "RayCluster", CLUSTER), ("job", "RayJob", JOB)],
)
def test_kuberays_manifests_have_only_what_kuberay_knows(
    name: str, kind: str, schema: dict[str, Any]
) -> None:
    manifest = load(f"kuberay/{name}.yaml")
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", kind)
    jsonschema.validate(manifest["spec"], schema)
    manifest["spec"]["headgroupSpec"] = {}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest["spec"], schema)


def test_every_mounted_volume_is_there() -> None:
    claim = load("kuberay/volume.yaml")["metadata"]["name"]
    job = load("kuberay/job.yaml")["spec"]["rayClusterSpec"]
    for cluster in (load("kuberay/cluster.yaml")["spec"], job):
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            pod = group["template"]["spec"]
            volumes = {volume["name"]: volume for volume in pod["volumes"]}
            assert volumes["checkout"]["persistentVolumeClaim"]["claimName"] == claim
            for mount in (mount for c in pod["containers"] for mount in c["volumeMounts"]):
                assert mount["name"] in volumes


def test_the_servers_are_of_pinned_versions_healthy_before_they_are_used_and_local() -> None:
    compose = load("compose.yaml")
    services = compose["services"]
    assert services["prefect"]["image"].startswith(f"prefecthq/prefect:{PINNED['prefect']}-")
    for name, service in services.items():
        image, _, tag = service["image"].rpartition(":")
        assert image and re.search(r"\d", tag), f"{name}: {service['image']} may become another"
        if image == "pnp-guide":
            assert service["image"] == IMAGE
        assert "healthcheck" in service, name
        for other in service.get("depends_on", {}):
            assert other in services
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), f"{name} is open to others"
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert source.startswith(("./", "${")) or source in compose["volumes"]
        for secret in service.get("secrets", ()):
            assert secret in compose["secrets"]


def test_secrets_are_files_that_git_does_not_have() -> None:
    compose = load("compose.yaml")
    for secret in compose["secrets"].values():
        assert secret["file"].startswith("secrets/")
    assert "/deploy/secrets/" in (ROOT / ".gitignore").read_text().splitlines()
    text = (DEPLOY / "compose.yaml").read_text()
    assert not re.search(r"(PASSWORD|SECRET\w*_KEY|TOKEN): ", text), "none in clear"


def test_each_worker_says_itself_where_its_checkout_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Prefect stores of the pull steps as it deploys has no path of the machine that does."""
    text = (ROOT / "prefect.yaml").read_text()
    pull = YAML(typ="safe", pure=True).load(text)["pull"]
    monkeypatch.setenv("PNP_GUIDE_HOME", "/srv/here")
    assert "/srv/here" in str(apply_values(pull, {}, remove_notset=False))
    monkeypatch.delenv("PNP_GUIDE_HOME")
    assert apply_values(pull, {}, remove_notset=False) == pull
    for path in (DEPLOY / "compose.yaml", ROOT / "docs/server.md"):
        (command,) = re.findall(r".*prefect --no-prompt deploy --all", path.read_text())
        assert "env -u PNP_GUIDE_HOME prefect" in command, path
    worker = load("compose.yaml")["services"]["worker"]
    assert worker["environment"]["PNP_GUIDE_HOME"], "where runs look"


def test_links_of_a_run_are_to_ports_that_a_browser_here_reaches() -> None:
    services = load("compose.yaml")["services"]
    open_here = {port.rpartition(":")[0] for s in services.values() for port in s.get("ports", ())}
    for name in ("PREFECT_UI_URL", "PNP_MLFLOW_UI_URL"):
        assert services["worker"]["environment"][name].removeprefix("http://") in open_here


def test_helms_values_are_of_the_pinned_versions() -> None:
    tag = load("helm/prefect-server.yaml")["global"]["prefect"]["image"]["prefectTag"]
    assert tag.startswith(f"{PINNED['prefect']}-")
    image = load("helm/prefect-worker.yaml")["worker"]["image"]
    assert f"{image['repository']}:{image['prefectTag']}" == IMAGE


def test_who_starts_work_on_ray_is_a_node_of_the_cluster() -> None:
    """Else Ray aborts the process."""
    worker = load("compose.yaml")["services"]["worker"]
    assert "RAY_ADDRESS" in worker["environment"]
    assert 'ray start --address="$$RAY_ADDRESS" --num-cpus=0' in worker["command"][-1]
    values = load("helm/prefect-worker.yaml")["worker"]
    (address,) = (x["value"] for x in values["extraEnvVars"] if x["name"] == "RAY_ADDRESS")
    (node,) = values["extraContainers"]
    assert node["image"] == IMAGE and f"--address={address}" in node["args"]
    sockets = {"name": "tmp", "mountPath": "/tmp"}
    assert sockets in node["volumeMounts"] and sockets in values["extraVolumeMounts"]


def test_the_image_is_built_from_the_constraints() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    assert "--constraint constraints.txt" in text
    assert re.search(r"^FROM python:3\.11\.\d+-slim", text, re.MULTILINE)
