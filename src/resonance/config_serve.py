"""Every setting of the service: names, types, bounds, defaults, help."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import BaseModel, Field

from resonance.config_types import SETTINGS, AnyPath, Count, DataPlace, Language, MemorySize, Model, Switch


class ServeConfig(BaseModel):
    """Answer other programs over HTTP: one model, one adapter for each person."""

    model_config = SETTINGS
    groups: ClassVar[dict[str, str]] = {
        "model": "Model",
        "host": "Address",
        "auth": "Who may",
        "batch_size": "Speed and load",
        "max_upload_mb": "Limits of a request",
        "keep_audio": "Records",
        "engine": "More than one machine",
    }
    aliases: ClassVar[dict[str, str | Switch]] = {
        "model_name_or_path": "model",
        "adapter_dir": "adapters",
        "max_batch_size": "batch_size",
        "no_auth": Switch("auth", "off", "token"),
    }

    model: Model
    """Base model of all adapters: a hub name or a folder."""
    adapters: DataPlace | None = None
    """Folder, or address such as s3://bucket/folder, with one adapter folder for each person, named by the person's id.
    Left out, only the base model answers."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Compute on the GPU (cuda) or the CPU. auto takes the GPU where one is."""
    adapter_memory: MemorySize = "1GB"
    """Memory for adapters. Those that were not used for longest make room."""
    refresh_seconds: float = Field(2.0, ge=0)
    """How old an answer to “has this adapter changed?” may be. A retrained adapter answers after so many seconds."""
    store_seconds: float = Field(20.0, gt=0)
    """Time in which an adapter must be read. Beyond, who needs it is refused with 503, and all others are answered."""
    language: Language | None = None
    """Language spoken, where neither the request nor the adapter says. Left out, it is found out for each recording."""
    model_names: list[str] = Field(["whisper-1"], min_length=1)
    """Further names by which programs made for OpenAI may ask for the base model."""

    host: str = "127.0.0.1"
    """Address to listen on. 127.0.0.1 is this machine alone, 0.0.0.0 every network."""
    port: int = Field(8000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one and says which."""
    cors_origins: list[str] = []
    """Web pages that may call the service from a browser, such as https://example.org. Left out, none."""
    trusted_proxies: list[str] = []
    """Addresses of proxies whose word on the client's address is taken. Left out, none."""

    auth: Literal["token", "off"] = "token"
    """Who may ask: holders of a token (see resonance token create), or everybody (off), which is for this machine alone."""
    tokens: AnyPath | None = None
    """File with the tokens, hashed. Left out, tokens.json in the folder of Resonance."""
    insecure: bool = False
    """Allow auth off on an address that others can reach."""
    requests_per_minute: Count = 120
    """Requests that one token may make in a minute, on average."""

    batch_size: Count = 16
    """Windows of speech, of whoever it is, that are decoded together."""
    gather_ms: float = Field(20.0, ge=0, le=1000)
    """How long a window waits for others to share its batch, in milliseconds."""
    max_queued_seconds: float = Field(3600.0, gt=0)
    """Seconds of audio that may be waiting. Beyond, requests are refused with 429."""
    max_queued_seconds_per_person: float = Field(1800.0, gt=0)
    """The same for the audio of one token and one patient."""
    deadline_seconds: float = Field(120.0, gt=0)
    """A request that is not answered by then is given up."""
    header_seconds: float = Field(10.0, gt=0)
    """Time for a client to say what it wants: the head of a request, or the first message of a WebSocket."""
    idle_seconds: float = Field(30.0, gt=0)
    """A client that sends nothing, or takes nothing of its answer, for so long is given up."""
    max_connections: Count = 1000
    """Requests and WebSockets that may be open at a time. Beyond, they are refused with 503."""
    drain_seconds: float = Field(30.0, ge=0)
    """Time for the requests under way when the service is told to stop."""
    ready_seconds: float = Field(10.0, gt=0)
    """Time in which the model must answer when asked whether it is ready."""
    decode_workers: Count = 2
    """Processes that decode uploaded audio."""
    decode_seconds: float = Field(20.0, gt=0)
    """Time for decoding one recording."""
    temperature_increment_on_fallback: float = Field(0.2, ge=0, le=1)
    """Temperature added each time a text is decoded again, up to 1. 0 decodes once."""
    max_beams: int = Field(5, ge=1, le=64)
    """Most beams that a request may ask for."""

    max_upload_mb: float = Field(100.0, gt=0)
    """Most megabytes of one recording."""
    max_audio_seconds: float = Field(1800.0, gt=0)
    """Longest recording."""
    max_adapter_mb: float = Field(500.0, gt=0)
    """Most megabytes of an adapter, unpacked."""

    keep_audio: AnyPath | None = None
    """Folder in which recordings are kept with what was understood. Left out, audio is never written to disk."""
    keep_audio_days: float | None = Field(None, gt=0)
    """Days after which kept recordings are deleted; needed with keep_audio."""
    audit_log: AnyPath | None = None
    """File that records who asked for what and when, without what was said. Left out, it is written to stderr."""

    engine: Literal["local", "ray"] = "local"
    """One process on this machine (local), or several on one or many machines with Ray Serve (ray)."""
    min_replicas: Count = 1
    """With engine ray: copies of the model that run always."""
    max_replicas: Count = 1
    """With engine ray: most copies under load."""
    adapters_per_replica: Count = 100
    """With engine ray: adapters that one copy keeps, and whose requests it is given."""
    cpus_per_replica: Count = 1
    """With engine ray: processor cores for each copy."""
    gpus_per_replica: float = Field(0.0, ge=0)
    """With engine ray: GPUs, or shares of one, for each copy."""
