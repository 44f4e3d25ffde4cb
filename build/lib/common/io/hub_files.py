"""Requests to the Hugging Face hub: what a repository holds, its files in the cache, and a folder pushed to it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.core.errors import InputError


@dataclass(frozen=True)
class Place:
    """A file or folder in a repository of the hub; kind is its repo_type."""

    text: str
    kind: str
    repo: str
    revision: str
    path: str


def listing(place: Place) -> tuple[str, dict[str, int]]:
    """The commit of a place's revision, and the sizes of all files there; of what is in the cache if offline."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"{place.text}: the hub at {constants.ENDPOINT}"
    try:
        info = HfApi().repo_info(place.repo, repo_type=place.kind, revision=place.revision, files_metadata=True)
    except GatedRepoError as error:
        raise InputError(f"{where} gates {place.repo}; accept its terms there, then `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise InputError(f"{where} has no revision {place.revision!r} of {place.repo}") from error
    except RepositoryNotFoundError as error:
        other = "a data set is hf://datasets/org/name; " if place.kind == "model" else ""
        then = f"{other}`hf auth login` if it is private"
        raise InputError(f"{where} has no {place.kind} {place.repo}; {then}") from error
    except HFValidationError as error:
        raise InputError(f"{place.text} is no place on the hub: {' '.join(str(error).split())}") from error
    except Exception as error:  # offline mode, or whatever the transport raises where there is no network
        return cached(place, cause_of(error))
    files = getattr(info, "siblings", None) or []
    return str(info.sha), {file.rfilename: file.size or 0 for file in files}


def cached(place: Place, why: str) -> tuple[str, dict[str, int]]:
    """The same of what the hub's cache has of a place; InputError, saying why the hub was not asked, if it has none."""
    from huggingface_hub import constants, snapshot_download

    known: dict[str, Any] = {"repo_type": place.kind, "revision": place.revision}
    try:
        folder = Path(snapshot_download(place.repo, local_files_only=True, **known))
    except Exception as error:
        raise InputError(
            f"{place.text}: the hub at {constants.ENDPOINT} cannot be asked ({why}), and its cache in "
            f"{constants.HF_HUB_CACHE} has no {place.repo}@{place.revision}"
        ) from error
    files = (file for file in folder.rglob("*") if file.is_file())
    return folder.name, {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}


def fetched(place: Place, commit: str, wanted: Sequence[str]) -> Path:
    """The cache's folder of a commit, with the files that are wanted; InputError if one cannot be had."""
    from huggingface_hub import snapshot_download

    options: dict[str, Any] = {"repo_type": place.kind, "allow_patterns": list(wanted)}
    try:
        if all_cached(place, commit, wanted):
            return Path(snapshot_download(place.repo, revision=commit, local_files_only=True, **options))
        folder = Path(snapshot_download(place.repo, revision=place.revision, **options))  # by name: for later, offline
        if folder.name == commit:
            return folder
        return Path(snapshot_download(place.repo, revision=commit, **options))  # the branch has moved since
    except Exception as error:
        said = f"{place.text} could not be fetched ({cause_of(error)}); the same command goes on from there"
        raise InputError(said) from error


def cause_of(error: BaseException) -> str:
    """What an error began with, in one line."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    return " ".join(str(error).split())[:200] or repr(error)


def all_cached(place: Place, commit: str, wanted: Sequence[str]) -> bool:
    """Whether the cache has every file of a commit that is wanted."""
    from huggingface_hub import try_to_load_from_cache

    kept = (try_to_load_from_cache(place.repo, name, revision=commit, repo_type=place.kind) for name in wanted)
    return all(isinstance(file, str) for file in kept)


def pushed(folder: Path, repo: str, kind: str, private: bool, message: str) -> str:
    """Push a folder to a repository of the hub, which is made if it is not there; the address of the commit.

    Raises: InputError if the name is none, or the hub refuses.
    """
    from huggingface_hub import HfApi, constants

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise InputError(f"--to {repo} is no repository; write org/name")
    try:
        HfApi().create_repo(repo, repo_type=kind, private=private, exist_ok=True)
        return str(HfApi().upload_folder(folder_path=folder, repo_id=repo, repo_type=kind, commit_message=message))
    except Exception as error:
        where = f"the hub at {constants.ENDPOINT}"
        raise InputError(f"{folder} could not be pushed to {repo} on {where} ({cause_of(error)})") from error
