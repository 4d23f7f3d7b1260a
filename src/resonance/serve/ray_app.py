"""`resonance serve --engine ray`: the same application on Ray Serve, with the model several times, on one or many machines.

One deployment, the front, has the routes and knows who may; the other, `models`, has a `Service` in each replica. Ray sends
a person's requests to the replica that says it has their adapter. Ray's own batching is not used: it takes batches apart by
adapter, and mixing them is what makes a replica fast.

What is sent stays in memory: what Ray's object store has no room for goes to another folder of shared memory, not to disk
(`cluster`; on Linux, elsewhere there is no such folder). Ray's processes run whatever they are sent: those that are started
here ask each other for a token that nobody else has, and listen on 127.0.0.1 alone. All but the copies and the front: for
them Ray has no setting, and it is the token alone.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import Any

from resonance.config_serve import ServeConfig
from resonance.errors import Interrupted, MissingExtraError, ResonanceError
from resonance.messages import _
from resonance.serve.auth import Auth
from resonance.serve.command import announce, bind
from resonance.serve.replica import Replica
from resonance.serve.tokens import TokenFile

APP = "resonance"
MODELS = "models"
FRONT_REQUESTS = 10_000  # under way at the same time; what may wait is limited by seconds of audio, in the replicas
BATCHES_UNDER_WAY = 4  # in one replica; then another takes a person's requests, too
BATCHES_WAITING = 16
MEBIBYTE = 1 << 20
SHARED_MEMORY = Path("/dev/shm")
OBJECT_STORE_UPLOADS = 8  # of the largest size, in the memory that Ray shares between processes
HEALTH_SECONDS = 5.0
# Before Ray is imported. The first: nothing is reported to its makers.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # copies without a share of a GPU are not told that there is none
    "GRPC_VERBOSITY": "ERROR",
}
# Where Ray is started here. It would listen on all addresses of the machine; this, which Ray has for other systems, is its
# only way to stay on 127.0.0.1.
ALONE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token"}
QUIET = {"enable_access_log": False, "log_level": "WARNING"}  # the audit log has who asked for what


def serve_with_ray(config: ServeConfig) -> int:
    """Answer until SIGTERM or Ctrl-C. Raises MissingExtraError without Ray, ResonanceError where it cannot begin."""
    ray, serve = import_ray()
    Auth.from_config(config)
    with bind(config) as listening:  # whether it can be, before Ray starts
        port = int(listening.getsockname()[1])
    config = settled(config)
    ray.init(logging_level="warning", **cluster(config))
    before = [(number, signal.signal(number, stop)) for number in (signal.SIGINT, signal.SIGTERM)]  # Ray sets its own
    try:
        # On the first machine, where the front is: elsewhere it would be one more open port, and a longer way.
        serve.start(http_options={"host": config.host, "port": port}, proxy_location="HeadOnly", logging_config=QUIET)
        print(
            _("Starting {count} copies of {model} with Ray …").format(count=config.min_replicas, model=config.model),
            flush=True,
        )
        try:
            serve.run(application(serve, config), name=APP, route_prefix="/")
        except RuntimeError as error:
            raise ResonanceError(
                _("Ray cannot start the copies of the model: {reason}").format(reason=why(serve) or error)
            ) from None
        announce(config, port)
        print(_("Ready."), flush=True)
        with contextlib.suppress(Interrupted):
            while True:
                time.sleep(3600)
        print(_("Stopping: what is under way is answered first."), file=sys.stderr, flush=True)
        return 0
    finally:
        for number, _handler in before:
            signal.signal(number, signal.SIG_IGN)  # once more is too late; it ends within `drain_seconds`
        serve.shutdown()
        ray.shutdown()
        for number, handler in before:
            signal.signal(number, handler)


def settled(config: ServeConfig) -> ServeConfig:
    """With whole paths: the processes of Ray are elsewhere."""
    places = {"tokens": TokenFile(config.tokens).path}
    places |= {name: getattr(config, name) for name in ("adapters", "keep_audio", "audit_log")}
    found: dict[str, Any] = {name: path.absolute() for name, path in places.items() if isinstance(path, Path)}
    if Path(config.model).exists():
        found["model"] = str(Path(config.model).absolute())
    return config.model_copy(update=found)


def cluster(config: ServeConfig) -> dict[str, Any]:
    """What `ray.init` is given: the cluster that RAY_ADDRESS names, or one on this machine alone."""
    if os.environ.get("RAY_ADDRESS"):
        ours = {name: value for name, value in os.environ.items() if name.startswith(("RESONANCE_", "HF_"))}
        return {"runtime_env": {"env_vars": ENVIRONMENT | ours}}
    shared = max(256, round(OBJECT_STORE_UPLOADS * config.max_upload_mb))
    alone = {"address": "local", "include_dashboard": False, "object_store_memory": shared * MEBIBYTE}
    if SHARED_MEMORY.is_dir():
        alone |= {"_plasma_directory": str(SHARED_MEMORY), "object_spilling_directory": str(own_folder(SHARED_MEMORY))}
        # Its logs have what the copies and the front print, patients' ids among it. Ray lets everybody into `_temp_dir`.
        alone["_temp_dir"] = str(own_folder(Path(tempfile.gettempdir())) / "ray")
    return alone


def own_folder(where: Path) -> Path:
    """A new folder that only this user can enter. It goes when the process ends."""
    folder = tempfile.mkdtemp(prefix="resonance-ray-", dir=where)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def stop(number: int, frame: FrameType | None) -> None:
    raise Interrupted(_("Stopped."), number)


def why(serve: Any) -> str:
    """What Ray knows of the failure: the last line of the error in a copy."""
    with contextlib.suppress(Exception):
        for deployment in serve.status().applications[APP].deployments.values():
            if lines := [line.strip() for line in str(deployment.message).splitlines() if line.strip()]:
                return lines[-1]
    return ""


def import_ray() -> tuple[Any, Any]:
    wanted = (
        ENVIRONMENT
        if os.environ.get("RAY_ADDRESS")
        else ENVIRONMENT | ALONE | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
    )
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        from ray import serve
    except ImportError as error:
        raise MissingExtraError(
            _('--engine ray needs the package ray ({reason}). Install it: pip install "resonance-asr[ray]"').format(
                reason=error
            )
        ) from None
    return ray, serve


def application(serve: Any, config: ServeConfig) -> Any:
    """Both deployments, bound."""
    drain = {"graceful_shutdown_timeout_s": config.drain_seconds, "graceful_shutdown_wait_loop_s": 0.5}
    models = serve.deployment(
        multiplexed(serve, config.adapters_per_replica),
        name=MODELS,
        max_ongoing_requests=BATCHES_UNDER_WAY * config.batch_size,
        max_queued_requests=BATCHES_WAITING * config.batch_size,
        ray_actor_options={"num_cpus": config.cpus_per_replica, "num_gpus": config.gpus_per_replica},
        health_check_period_s=HEALTH_SECONDS,
        logging_config=QUIET,
        **scaling(config),
        **drain,
    )

    key = secrets.token_bytes(32)

    def front() -> Any:
        from resonance.serve.ray_front import build

        return build(config, serve.get_deployment_handle(MODELS, app_name=APP), key)

    routes = serve.deployment(
        serve.ingress(front)(),
        name="front",
        num_replicas=1,  # one count of what a token has asked for
        max_ongoing_requests=FRONT_REQUESTS,
        # On the first machine, where the tokens and the audit log are.
        ray_actor_options={"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}},
        logging_config=QUIET,
        **drain,
    )
    return routes.bind(models.bind(config, key))


def multiplexed(serve: Any, adapters: int) -> type:
    """`Replica`, of which Ray knows whose adapters it has, by their `mark`."""

    @serve.multiplexed(max_num_models_per_replica=adapters)  # type: ignore[untyped-decorator]
    async def hold(self: Replica, mark: str) -> str:
        return mark

    return type("Model", (Replica,), {"hold": hold})


def scaling(config: ServeConfig) -> dict[str, Any]:
    least, most = config.min_replicas, max(config.min_replicas, config.max_replicas)
    if least == most:
        return {"num_replicas": least}
    wanted = {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": config.batch_size}
    return {"autoscaling_config": wanted}
