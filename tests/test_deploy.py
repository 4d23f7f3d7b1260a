"""The files under deploy/ name settings, addresses, limits and folders that the service has, and agree with each other."""

from __future__ import annotations

import importlib.resources
import ipaddress
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from resonance.config_io import parse
from resonance.config_serve import ServeConfig
from resonance.config_types import memory_bytes

DEPLOY = Path(__file__).parents[1] / "deploy"
MEGABYTE = 1_000_000
MOST_EXPOSURE = 1.5  # of systemd's points from 0 to 10: a service without any setting has 9.6
KUBERNETES = ("1.27", "1.37")  # the oldest and the newest that kubernetes-validate 1.37 has
PROBES = {"/health", "/ready"}


def text(name: str) -> str:
    return (DEPLOY / name).read_text(encoding="utf-8")


def serve(words: list[str]) -> ServeConfig:
    """The settings of `serve …`. Raises ConfigError for one that does not exist."""
    assert words[0] == "serve"
    return parse(ServeConfig, words[1:], "resonance serve")


# container file


def container() -> list[tuple[str, str]]:
    """Instructions and what stands behind them, of both stages."""
    lines = re.sub(r"\\\n", " ", text("Containerfile")).splitlines()
    rows = [line.split(maxsplit=1) for line in lines if line.strip() and not line.startswith("#")]
    return [(name, rest) for name, rest in rows]


def last_stage() -> dict[str, str]:
    rows = container()
    start = max(i for i, (name, _rest) in enumerate(rows) if name == "FROM")
    return dict(rows[start:])


def words(line: str) -> list[str]:
    """The exec form, `["a", "b"]`."""
    found = yaml.safe_load(line)
    assert isinstance(found, list)
    return [str(word) for word in found]


def test_the_container_starts_the_service_where_its_ports_and_folders_are() -> None:
    stage = last_stage()
    assert words(stage["ENTRYPOINT"]) == ["resonance"]
    config = serve(words(stage["CMD"]))
    assert (config.host, config.port) == ("0.0.0.0", int(stage["EXPOSE"]))
    folders = set(words(stage["VOLUME"]))
    assert str(config.adapters) in folders and config.tokens is not None and str(config.tokens.parent) in folders
    environment = dict(word.split("=", 1) for word in shlex.split(stage["ENV"]))
    assert environment["HF_HOME"] in folders
    assert Path(environment["RESONANCE_HOME"]) == config.tokens.parent  # where `token create` writes by itself
    for folder in folders:
        assert re.search(rf"install -d .* {folder}\b", dict(container())["RUN"] + stage["RUN"]), folder


def test_the_container_is_not_root_and_asks_for_its_health_on_its_own_port() -> None:
    stage = last_stage()
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", stage["USER"])
    assert f"--uid {stage['USER'].split(':')[0]} " in stage["RUN"]
    probe = re.search(r"http://127\.0\.0\.1:(\d+)(/\w+)", stage["HEALTHCHECK"])
    assert probe is not None and probe[1] == stage["EXPOSE"] and probe[2] == "/health"


def test_the_container_installs_torch_first_and_copies_what_is_there() -> None:
    rows = container()
    installs = [rest for name, rest in rows if name == "RUN" and "pip install" in rest]
    assert "torch" in installs[0] and "TORCH_INDEX" in installs[0] and "requirements.txt" in installs[1]
    assert ("ARG", "TORCH_INDEX=https://download.pytorch.org/whl/cpu") in rows
    for name, rest in rows:
        if name == "COPY" and not rest.startswith("--from"):
            for source in rest.split()[:-1]:
                assert (DEPLOY.parent / source).exists(), source
    python = dict(rows[:1])["ARG"].partition("=")[2]
    minimum = re.search(
        r'requires-python = ">=3\.(\d+)"', (DEPLOY.parent / "pyproject.toml").read_text(encoding="utf-8")
    )
    assert minimum is not None and int(python.split(".")[1]) >= int(minimum[1])


# compose


def seconds(duration: str) -> float:
    found = re.fullmatch(r"(\d+)(s|m|h|min)?", duration)
    assert found is not None, duration
    return int(found[1]) * {"s": 1, None: 1, "m": 60, "min": 60, "h": 3600}[found[2]]


def test_compose_starts_what_the_container_file_builds() -> None:
    services = yaml.safe_load(text("compose.yaml"))["services"]
    ours, proxy = services["resonance"], services["nginx"]
    config = serve(ours["command"])
    assert (DEPLOY / ours["build"]["context"] / ours["build"]["dockerfile"]).resolve() == DEPLOY / "Containerfile"
    mounts = {volume.split(":")[1]: volume.split(":")[0] for volume in ours["volumes"]}
    assert set(mounts) == set(words(last_stage()["VOLUME"]))
    assert set(mounts.values()) == set(yaml.safe_load(text("compose.yaml"))["volumes"])
    assert str(config.adapters) in mounts and str(config.tokens).startswith("/tokens/")
    assert ours["read_only"] is True and any(place.startswith("/tmp") for place in ours["tmpfs"])
    assert seconds(ours["stop_grace_period"]) > config.drain_seconds
    assert memory_bytes(ours["mem_limit"]) > memory_bytes(config.adapter_memory)
    assert "ports" not in ours  # reached through nginx alone
    address = ipaddress.ip_address(proxy["networks"]["inside"]["ipv4_address"])
    assert config.trusted_proxies == [str(address)]
    (network,) = yaml.safe_load(text("compose.yaml"))["networks"]["inside"]["ipam"]["config"]
    assert address in ipaddress.ip_network(network["subnet"])
    assert address not in ipaddress.ip_network(network["ip_range"])  # another container would take it first
    assert "./nginx.conf:/etc/nginx/conf.d/default.conf:ro" in proxy["volumes"]


def test_compose_keeps_to_its_specification() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    pytest.importorskip("check_jsonschema", reason="the schema is in check-jsonschema: requirements-dev.txt")
    place = importlib.resources.files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json"
    jsonschema.validate(yaml.safe_load(text("compose.yaml")), json.loads(place.read_text(encoding="utf-8")))


def test_compose_gives_nginx_the_time_that_the_service_has() -> None:
    """It is stopped first, because it needs the service, and would cut off the answers that pass through it."""
    services = yaml.safe_load(text("compose.yaml"))["services"]
    assert services["nginx"]["stop_grace_period"] == services["resonance"]["stop_grace_period"]


# systemd


def unit() -> dict[str, list[str]]:
    lines = re.sub(r"\\\n", " ", text("resonance.service")).splitlines()
    found: dict[str, list[str]] = {}
    for line in lines:
        if line and not line.startswith(("#", "[")):
            name, equals, value = line.partition("=")
            assert equals, line
            found.setdefault(name, []).append(value)
    return found


def test_the_unit_starts_the_service_and_lets_it_write_only_in_its_own_folders() -> None:
    settings = unit()
    command = shlex.split(settings["ExecStart"][0])
    assert command[0].endswith("/resonance")
    config = serve(command[1:])
    assert seconds(settings["TimeoutStopSec"][0]) > config.drain_seconds
    assert memory_bytes(settings["MemoryMax"][0]) > memory_bytes(config.adapter_memory)
    assert settings["ProtectSystem"] == ["strict"] and settings["Restart"] == ["on-failure"]
    own = [f"/var/lib/{name}" for name in settings["StateDirectory"][0].split()]
    own += [f"/var/cache/{settings['CacheDirectory'][0]}", f"/var/log/{settings['LogsDirectory'][0]}"]
    environment = dict(word.split("=", 1) for word in shlex.split(settings["Environment"][0]))
    assert str(config.adapters) in own and environment["HF_HOME"] in own
    assert config.tokens is not None and Path(environment["RESONANCE_HOME"]) == config.tokens.parent
    assert config.audit_log is not None and str(config.audit_log.parent) in own
    assert config.host in config.trusted_proxies  # nginx on the same machine


@pytest.fixture
def systemd_analyze(tmp_path: Path) -> tuple[str, Path]:
    """The program, and the unit with a program in ExecStart that is there."""
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("no systemd-analyze here")
    here = tmp_path / "resonance.service"
    here.write_text(text("resonance.service").replace("/opt/resonance/.venv/bin/resonance", sys.executable))
    return program, here


def test_systemd_reads_the_unit_without_a_complaint(systemd_analyze: tuple[str, Path]) -> None:
    program, here = systemd_analyze
    found = subprocess.run([program, "verify", "--man=no", str(here)], capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")


def test_systemd_finds_little_that_the_unit_leaves_open(systemd_analyze: tuple[str, Path]) -> None:
    program, here = systemd_analyze
    command = [program, "security", "--offline=yes", f"--threshold={MOST_EXPOSURE * 10:.0f}", "--no-pager", str(here)]
    found = subprocess.run(command, capture_output=True, text=True)
    if "unrecognized option" in found.stderr:
        pytest.skip("this systemd-analyze is too old to judge a unit that does not run (before 250)")
    assert found.returncode == 0, found.stdout[-300:] + found.stderr


# Kubernetes


@pytest.fixture(scope="module")
def objects() -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for item in yaml.safe_load_all(text("kubernetes.yaml")):
        found.setdefault(item["kind"], []).append(item)
    return found


def bytes_of(quantity: str) -> int:
    return int(quantity.removesuffix("Gi")) * 2**30


def test_the_pod_runs_the_service_and_is_asked_where_it_answers(objects: dict[str, list[dict[str, Any]]]) -> None:
    pod = objects["Deployment"][0]["spec"]["template"]["spec"]
    (box,) = pod["containers"]
    config = serve(box["args"])
    assert [port["containerPort"] for port in box["ports"]] == [config.port]
    probes = {name: box[f"{name}Probe"] for name in ("startup", "liveness", "readiness")}
    assert {name: probe["httpGet"]["path"] for name, probe in probes.items()} == {
        "startup": "/health",
        "liveness": "/health",
        "readiness": "/ready",
    }
    assert all(probe["httpGet"]["port"] == box["ports"][0]["name"] for probe in probes.values())
    assert probes["readiness"]["timeoutSeconds"] > config.ready_seconds
    assert probes["readiness"]["periodSeconds"] >= probes["readiness"]["timeoutSeconds"]
    waits = int(box["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > waits + config.drain_seconds
    assert bytes_of(box["resources"]["limits"]["memory"]) > memory_bytes(config.adapter_memory)
    threads = {item["name"]: item["value"] for item in box["env"]}["OMP_NUM_THREADS"]
    assert threads == str(box["resources"]["limits"]["cpu"])


@pytest.mark.parametrize("version", KUBERNETES)
def test_kubernetes_knows_every_field(objects: dict[str, list[dict[str, Any]]], version: str) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="requirements-dev.txt has kubernetes-validate")
    kinds = [item for items in objects.values() for item in items]
    assert len(kinds) >= 4
    for item in kinds:
        validator.validate(item, version, strict=True)
    kinds[0]["spec"]["misspelt"] = 1
    try:
        with pytest.raises(validator.ValidationError):
            validator.validate(kinds[0], version, strict=True)
    finally:
        del kinds[0]["spec"]["misspelt"]


def test_the_pod_is_closed_and_its_folders_are_there(objects: dict[str, list[dict[str, Any]]]) -> None:
    pod = objects["Deployment"][0]["spec"]["template"]["spec"]
    (box,) = pod["containers"]
    stage = last_stage()
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}" == stage["USER"]
    assert box["securityContext"]["readOnlyRootFilesystem"] is True
    assert box["securityContext"]["allowPrivilegeEscalation"] is False
    mounts = {mount["mountPath"]: mount["name"] for mount in box["volumeMounts"]}
    assert set(mounts) == {*words(stage["VOLUME"]), "/tmp"}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert set(mounts.values()) == set(volumes)
    claims = {
        volume["persistentVolumeClaim"]["claimName"] for volume in volumes.values() if "persistentVolumeClaim" in volume
    }
    assert claims == {claim["metadata"]["name"] for claim in objects["PersistentVolumeClaim"]}
    secret = volumes["tokens"]["secret"]["secretName"]
    assert f"secret generic {secret} --from-file=tokens.json" in text("kubernetes.yaml")


def test_the_service_and_the_network_policy_are_about_the_pod(objects: dict[str, list[dict[str, Any]]]) -> None:
    deployment, service, policy = (objects[kind][0] for kind in ("Deployment", "Service", "NetworkPolicy"))
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels == service["spec"]["selector"]
    assert policy["spec"]["podSelector"]["matchLabels"] == labels
    port = deployment["spec"]["template"]["spec"]["containers"][0]["ports"][0]["name"]
    assert service["spec"]["ports"][0]["targetPort"] == policy["spec"]["ingress"][0]["ports"][0]["port"] == port


# nginx


@dataclass
class Block:
    name: tuple[str, ...]
    settings: dict[str, tuple[str, ...]] = field(default_factory=dict)
    blocks: list[Block] = field(default_factory=list)

    def value(self, name: str, *around: Block) -> tuple[str, ...]:
        """The setting here, or in the nearest block around."""
        return next(block.settings[name] for block in (self, *around) if name in block.settings)


def nginx() -> Block:
    plain = re.sub(r"#.*", "", text("nginx.conf"))
    return read_block((), iter(re.findall(r'"[^"]*"|\'[^\']*\'|[{};]|[^\s{};]+', plain)))


def read_block(name: tuple[str, ...], tokens: Iterator[str]) -> Block:
    block, line = Block(name), list[str]()
    for token in tokens:
        if token == "}":
            break
        if token == "{":
            block.blocks.append(read_block(tuple(line), tokens))
            line = []
        elif token == ";":
            key = " ".join(line[:2]) if line[0] in ("proxy_set_header", "add_header") else line[0]
            block.settings[key] = tuple(line[1:])
            line = []
        else:
            line.append(token)
    assert not line, line
    return block


def tls() -> tuple[Block, dict[tuple[str, ...], Block]]:
    server = next(
        block for block in nginx().blocks if block.name == ("server",) and "ssl_certificate" in block.settings
    )
    return server, {block.name: block for block in server.blocks}


def size(value: tuple[str, ...]) -> int:
    return int(value[0].removesuffix("m")) * 2**20


def test_nginx_lets_through_what_the_service_takes() -> None:
    config = serve(words(last_stage()["CMD"]))
    server, places = tls()
    assert size(server.settings["client_max_body_size"]) > config.max_upload_mb * MEGABYTE
    adapter = places["location", "~", "^/patients/[^/]+/adapter$"]
    assert size(adapter.settings["client_max_body_size"]) > config.max_adapter_mb * MEGABYTE
    for place in places.values():
        if "proxy_pass" in place.settings:
            assert seconds(place.value("proxy_read_timeout", server)[0]) > config.deadline_seconds
    (upstream,) = (block for block in nginx().blocks if block.name[0] == "upstream")
    assert upstream.settings["server"] == (f"resonance:{config.port}",)
    assert seconds(upstream.settings["keepalive_timeout"][0]) < config.idle_seconds
    assert places["location", "/"].settings["proxy_pass"] == (f"http://{upstream.name[1]}",)


def test_nginx_passes_events_and_sockets_on_at_once_and_keeps_nothing() -> None:
    server, places = tls()
    assert server.settings["proxy_buffering"] == server.settings["proxy_request_buffering"] == ("off",)
    assert server.settings["proxy_http_version"] == ("1.1",)
    assert server.settings["proxy_set_header Upgrade"] == ("Upgrade", "$http_upgrade")
    assert server.settings["proxy_set_header X-Forwarded-For"] == ("X-Forwarded-For", "$remote_addr")
    listen = places["location", "=", "/listen"]
    assert seconds(listen.settings["proxy_read_timeout"][0]) >= 600
    # A header set in a location would drop all of the server's.
    assert not any(name.startswith("proxy_set_header") for place in places.values() for name in place.settings)
    (log,) = (line for line in text("nginx.conf").splitlines() if line.startswith("log_format"))
    assert not set(re.findall(r"\$(\w+)", log)) & {
        "request",
        "request_uri",
        "args",
        "query_string",
        "http_authorization",
    }


def test_nginx_shows_no_metrics_and_nothing_without_tls() -> None:
    server, places = tls()
    assert places["location", "=", "/metrics"].settings == {"return": ("404",)}
    assert server.settings["ssl_protocols"] == ("TLSv1.2", "TLSv1.3")
    plain = next(
        block
        for block in nginx().blocks
        if block.name == ("server",) and block is not server and "ssl_certificate" not in block.settings
    )
    assert all("proxy_pass" not in place.settings for place in plain.blocks)
