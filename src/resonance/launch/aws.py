"""AWS: clients, folders in S3, and its errors in words that say what to do."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from resonance.errors import CloudError, MissingExtraError
from resonance.messages import _

if TYPE_CHECKING:
    import boto3

WRONG_KEYS = frozenset(
    {
        *("UnrecognizedClientException", "InvalidClientTokenId", "SignatureDoesNotMatch", "InvalidAccessKeyId"),
        *("ExpiredToken", "ExpiredTokenException", "InvalidToken", "AuthFailure", "IncompleteSignature"),
    }
)
DENIED = frozenset({"AccessDenied", "AccessDeniedException", "UnauthorizedOperation", "NotAuthorized", "403"})
NO_BUCKET = frozenset({"NoSuchBucket", "404", "NotFound"})


def session(region: str | None) -> boto3.Session:
    """An AWS session with a region. Raises CloudError, or MissingExtraError where the packages are not installed."""
    for package in ("boto3", "sagemaker.core"):
        if not _is_installed(package):
            raise MissingExtraError(
                _('SageMaker needs packages that are not installed: pip install "resonance-asr[sagemaker]"')
            )
    import boto3

    with explained(_("the AWS settings")):
        found = boto3.Session(region_name=region)
        if found.region_name is None:
            raise CloudError(
                _("No AWS region is set. Give --region, such as --region us-east-1, or run `aws configure`.")
            )
        if found.get_credentials() is None:
            raise CloudError(_no_keys())
    return found


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the package around it
        return False


def _no_keys() -> str:
    return _(
        "No AWS credentials were found. Run `aws configure` (or `aws sso login`), or set AWS_ACCESS_KEY_ID and "
        "AWS_SECRET_ACCESS_KEY; AWS_PROFILE chooses among several."
    )


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn AWS' errors in the block, which is about `what`, into CloudError."""
    import botocore.exceptions as aws
    from boto3.exceptions import Boto3Error

    try:
        yield
    except (aws.NoCredentialsError, aws.PartialCredentialsError, aws.CredentialRetrievalError) as error:
        raise CloudError(_no_keys() + f" ({error})") from error
    except (aws.TokenRetrievalError, aws.SSOError) as error:
        raise CloudError(_expired(str(error))) from error
    except aws.ProfileNotFound as error:
        raise CloudError(
            _("{what}: {reason}. Correct AWS_PROFILE; `aws configure list-profiles` lists the profiles.").format(
                what=what, reason=error
            )
        ) from error
    except aws.ClientError as error:
        raise CloudError(_refusal(what, error.response["Error"])) from error
    except (aws.HTTPClientError, aws.EndpointConnectionError) as error:
        raise CloudError(
            _(
                "{what}: AWS cannot be reached ({reason}). Check the network, the proxy (HTTPS_PROXY) and the region."
            ).format(what=what, reason=error)
        ) from error
    except (aws.BotoCoreError, Boto3Error) as error:
        raise CloudError(_("{what}: {reason}").format(what=what, reason=error)) from error


def _expired(reason: str) -> str:
    return _(
        "AWS does not accept the credentials: {reason} Run `aws configure` or `aws sso login` again, and check that "
        "AWS_PROFILE and AWS_SESSION_TOKEN belong together."
    ).format(reason=reason)


def _refusal(what: str, details: dict[str, Any]) -> str:
    code, reason = str(details.get("Code", "")), str(details.get("Message", ""))
    if code in WRONG_KEYS:
        return _expired(reason)
    if code in DENIED:
        return _(
            "{what}: no permission ({reason}). Ask whoever looks after the AWS account for the permissions that the guide to "
            "SageMaker lists, for you and for the role of the job."
        ).format(what=what, reason=reason)
    if code in NO_BUCKET:
        return _(
            "{what}: there is no such bucket, or nothing of that name in it. Check the name and the region."
        ).format(what=what)
    if code in ("PermanentRedirect", "301", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"):
        return _("{what}: the bucket is in another region. Give --region with the region of the bucket.").format(
            what=what
        )
    if code == "ResourceLimitExceeded":
        return _(
            "{what}: the account's quota is used up. {reason} Ask for more at Service Quotas (service SageMaker) in the AWS "
            "console, wait for other jobs to end, or give another instance_type or a smaller instance_count."
        ).format(what=what, reason=reason)
    if code == "ResourceInUse":
        return _("{what}: the name is taken. Give another --name. ({reason})").format(what=what, reason=reason)
    if "role" in reason.lower() and code == "ValidationException":
        return _(
            "{what}: the role cannot be used ({reason}). It must exist in this account and let sagemaker.amazonaws.com assume it."
        ).format(what=what, reason=reason)
    if code in (
        "ThrottlingException",
        "Throttling",
        "ServiceUnavailable",
        "InternalFailure",
        "InternalError",
        "SlowDown",
    ):
        return _("{what}: AWS is busy ({reason}). Try again in some minutes.").format(what=what, reason=reason)
    return _("{what}: AWS refused it. {code}: {reason}").format(what=what, code=code, reason=reason)


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder in S3."""

    bucket: str
    prefix: str  # with a slash at its end, or empty

    @classmethod
    def of(cls, uri: str) -> Folder:
        bucket, _slash, key = uri.removeprefix("s3://").partition("/")
        return cls(bucket, f"{key.rstrip('/')}/" if key.strip("/") else "")

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")


@dataclass(frozen=True, slots=True)
class Listing:
    """What a folder in S3 holds, as far as it was looked at."""

    count: int
    bytes: int
    has_dataset: bool  # of Hugging Face, which takes a package to read


def look(client: Any, folder: Folder, enough: int | None) -> Listing:
    """Count objects, all or until there are more than `enough` bytes. Raises CloudError where there are none."""
    count = size = 0
    has_dataset = False
    with explained(str(folder)):
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=folder.bucket, Prefix=folder.prefix):
            objects = [item for item in page.get("Contents", []) if not item["Key"].endswith("/")]
            count += len(objects)
            size += sum(item["Size"] for item in objects)
            has_dataset = has_dataset or any(item["Key"].endswith("/dataset_info.json") for item in objects)
            if enough is not None and size > enough:
                break
    if not count:
        raise CloudError(
            _("{folder} is empty. Copy the recordings there first: aws s3 sync my_recordings {folder}").format(
                folder=folder
            )
        )
    return Listing(count, size, has_dataset)


def check_file(client: Any, folder: Folder, name: str, setting: str) -> None:
    """Raise CloudError unless the folder holds `name`, which `setting` asks for."""
    prefix = f"{folder.prefix}{name}".rstrip("/")
    with explained(str(folder)):
        found = client.list_objects_v2(Bucket=folder.bucket, Prefix=prefix, MaxKeys=1000).get("Contents", [])
    if not any(item["Key"] == prefix or item["Key"].startswith(f"{prefix}/") for item in found):
        raise CloudError(
            _(
                "{setting} is {name}, but {folder} holds nothing of that name. On SageMaker, paths in the settings are taken "
                "from the folder in S3: leave {setting} out to take the whole folder, or copy the file there."
            ).format(setting=setting, name=name, folder=folder)
        )


def check_instance_type(client: Any, name: str) -> None:
    """Raise CloudError where the installed boto3 knows no machine of that name."""
    known = client.meta.service_model.shape_for("TrainingInstanceType").enum
    if name in known:
        return
    near = difflib.get_close_matches(name, known, 3)
    raise CloudError(
        _("instance_type {name} is not known. {near} A very new one: pip install --upgrade boto3").format(
            name=repr(name),
            near=_("Did you mean {near}?").format(near=" / ".join(near)) if near else _("An example is ml.g5.2xlarge."),
        )
    )
