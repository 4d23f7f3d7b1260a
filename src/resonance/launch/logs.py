"""The log of a job in CloudWatch.

sagemaker-core has a reader too; it looks for the streams once, and so shows nothing of a job that went on on another machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

GROUP = "/aws/sagemaker/TrainingJobs"


class JobLog:
    """What the machines of a job have printed since it was last asked for."""

    def __init__(self, client: Any, name: str) -> None:
        self.client = client
        self.name = name
        self.tokens: dict[str, str] = {}  # where each stream was read to

    def new_lines(self) -> Iterator[tuple[str, str]]:
        """(machine, line), stream by stream. Nothing where the job has not printed yet. Raises botocore's ClientError."""
        for stream in self._streams():
            machine = stream.removeprefix(f"{self.name}/").rpartition("-")[0]  # algo-1-1700000000
            while True:
                token = {"nextToken": self.tokens[stream]} if stream in self.tokens else {}
                found = self.client.get_log_events(
                    logGroupName=GROUP, logStreamName=stream, startFromHead=True, **token
                )
                self.tokens[stream] = found["nextForwardToken"]
                yield from ((machine, event["message"]) for event in found["events"])
                if not found["events"]:
                    break

    def _streams(self) -> list[str]:
        pages = self.client.get_paginator("describe_log_streams").paginate(
            logGroupName=GROUP, logStreamNamePrefix=f"{self.name}/"
        )
        try:
            found = [stream for page in pages for stream in page["logStreams"]]
        except self.client.exceptions.ResourceNotFoundException:  # the first job of an account has not printed yet
            return []
        return [
            stream["logStreamName"] for stream in sorted(found, key=lambda s: (s["creationTime"], s["logStreamName"]))
        ]
