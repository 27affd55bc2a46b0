"""Published files in a bucket of an object store that speaks S3, and copies of them on this host.

The server, region and keys are those of the AWS environment (AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, profiles, a machine's role): no setting of ours holds a secret. Weights and vectors are
memory-mapped, so each host keeps copies of what it reads.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from app.errors import ArtifactsAway, StoreError
from app.store.places import Published, altered, arriving, digest_of, write_copy

KEPT_SECONDS = 30 * 86_400.0
"""Copies that nobody read for so long are removed when another one comes."""
PASSING = frozenset({"InternalError", "RequestTimeout", "RequestTimeTooSkewed", "ServiceUnavailable", "SlowDown"})
"""Codes of trouble that passes, beside every answer of 500 and above."""
CHUNK_BYTES = 1 << 20


class ObjectPlace:
    """Files below a prefix of a bucket; `copies` is the folder of this host's copies."""

    def __init__(self, bucket: str, prefix: str, copies: Path) -> None:
        self.bucket, self.prefix, self.copies = bucket, prefix, copies

    def path(self, key: str) -> Path:
        return self.copies / key

    def put(self, file: Path, key: str, sha256: str) -> None:
        if self.size(key) != file.stat().st_size or self._digest(key) != sha256:
            with self._asked(), file.open("rb") as content:
                self._client().upload_fileobj(content, self.bucket, self._key(key))
            if self._digest(key) != sha256:
                raise ArtifactsAway(f"Expected {self.name(key)} to read back as written, it does not; write it again.")
        self._forget_copies()
        write_copy(file, self.copies / key, sha256)

    def get(self, key: str, sha256: str) -> Path:
        copy = self.copies / key
        with contextlib.suppress(FileNotFoundError):
            if digest_of(copy) == sha256:
                os.utime(copy)
                return copy
        self._forget_copies()
        with arriving(copy) as part:
            with part.open("wb") as file:
                found = self._download(key, file.write)
            if found != sha256:
                raise altered(key)
        return copy

    def size(self, key: str) -> int | None:
        try:
            with self._asked():
                return int(self._client().head_object(Bucket=self.bucket, Key=self._key(key))["ContentLength"])
        except FileNotFoundError:
            return None

    def remove(self, key: str) -> bool:
        was = self.size(key) is not None
        with self._asked():
            self._client().delete_object(Bucket=self.bucket, Key=self._key(key))
        (self.copies / key).unlink(missing_ok=True)
        return was

    def listing(self, kind: str = "") -> Iterator[Published]:
        with self._asked():
            pages = self._client().get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self.bucket, Prefix=self._key(f"{kind}/" if kind else "")):
                for one in page.get("Contents", ()):
                    key = one["Key"].removeprefix(self._key(""))
                    yield Published(key, int(one["Size"]), one["LastModified"].timestamp())

    def name(self, key: str) -> str:
        return f"s3://{self.bucket}/{self._key(key)}"

    def require(self) -> None:
        content, key = os.urandom(16).hex(), self._key(f".check/{os.urandom(8).hex()}")
        with self._asked():
            client = self._client()
            client.put_object(Bucket=self.bucket, Key=key, Body=content.encode())
            found = client.get_object(Bucket=self.bucket, Key=key)["Body"].read().decode()
            client.delete_object(Bucket=self.bucket, Key=key)
        if found != content:
            raise StoreError(f"Expected s3://{self.bucket} to give back what was written, it gave something else.")

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    def _digest(self, key: str) -> str:
        """sha256 of what the bucket holds."""
        return self._download(key, lambda chunk: None)

    def _download(self, key: str, write: Any) -> str:
        """Hand a file on in chunks; its sha256. Raises StoreError where there is none."""
        digest = hashlib.sha256()
        try:
            with self._asked():
                body = self._client().get_object(Bucket=self.bucket, Key=self._key(key))["Body"]
                for chunk in body.iter_chunks(CHUNK_BYTES):
                    digest.update(chunk)
                    write(chunk)
        except FileNotFoundError:
            raise StoreError(
                f"Expected the artifact {self.name(key)}, found none; set LACHESIS_ARTIFACTS to where it is."
            ) from None
        return digest.hexdigest()

    def _forget_copies(self) -> None:
        """Remove copies that nobody read for long, and what killed processes left half-written."""
        now = time.time()
        for path in self.copies.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                age = now - path.stat().st_mtime
                if path.is_file() and age > (86_400.0 if path.name.startswith(".") else KEPT_SECONDS):
                    path.unlink()

    def _client(self) -> Any:
        return _client(os.getpid())

    @contextmanager
    def _asked(self) -> Iterator[None]:
        """Turns what the client raises into our errors; FileNotFoundError for a key that is not there."""
        from boto3.exceptions import Boto3Error
        from botocore import exceptions

        try:
            yield
        except exceptions.ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
            if code in ("NoSuchKey", "404", "NotFound"):
                raise FileNotFoundError from None
            if code in PASSING or status >= 500:
                raise self._away(code) from None
            raise StoreError(
                f"Expected to use the bucket {self.bucket}, its server answered {code}; check LACHESIS_ARTIFACTS, "
                "AWS_ENDPOINT_URL, and what the keys in AWS_ACCESS_KEY_ID may do (get, put, delete, list)."
            ) from None
        except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError):
            raise StoreError(
                f"Expected keys for the bucket {self.bucket}, found none; set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, where the worker starts."
            ) from None
        except (exceptions.BotoCoreError, Boto3Error) as error:
            raise self._away(type(error).__name__) from None

    def _away(self, what: str) -> ArtifactsAway:
        return ArtifactsAway(
            f"Expected the server of the bucket {self.bucket} to answer, got {what}; check AWS_ENDPOINT_URL and "
            "whether the server is up."
        )


@functools.lru_cache(maxsize=1)
def _client(process: int) -> Any:
    """A client of this process: sockets and locks of another, inherited by a fork, would be shared with it.

    Raises:
        StoreError: boto3 is not installed.
    """
    try:
        import boto3
        from botocore.config import Config
    except ImportError:
        raise StoreError(
            "Expected boto3 for artifacts in a bucket, it is not installed; run `pip install 'lachesis[s3]'`."
        ) from None
    config = Config(retries={"mode": "standard", "max_attempts": 4}, connect_timeout=10, read_timeout=60)
    return boto3.session.Session().client("s3", config=config)
