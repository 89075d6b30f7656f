"""Where a model's name leads: shipped weights, a folder, or a repository of the hub, downloaded once."""

from __future__ import annotations

import os
from pathlib import Path

from rlfseg.config import ASSETS
from rlfseg.errors import ModelError

TINY_AUTOENCODER = ASSETS / "autoencoder_tiny"
NEEDED = ("unet/config.json", "vae/config.json", "text_encoder/config.json", "tokenizer")  # of a base


def resolve_base(reference: str) -> Path:
    """The folder of a base: `tiny`, `hf:owner/name@revision` (downloaded once), or a path.

    Args:
        reference: In any of these forms.

    Returns:
        A diffusers folder.

    Raises:
        ModelError: Nothing is there, or the hub can't be reached and has not been asked before.
    """
    if reference == "tiny":
        folder = ASSETS / "base"
    elif reference.startswith("hf:"):
        files = ["*.json", "*.txt", "*/*.json", "*/*.txt", "*/*model.safetensors"]
        folder = download("backbone.base", reference, files)
    else:
        folder = Path(reference)
    missing = [name for name in NEEDED if not (folder / name).exists()]
    if missing:
        raise ModelError(
            f"backbone.base: {reference} is no diffusers folder, {folder / missing[0]} is missing; "
            "give `tiny`, a folder with unet, vae, text_encoder and tokenizer, or hf:owner/name@revision"
        )
    return folder


def resolve_tiny(reference: str) -> Path:
    """The folder of an AutoencoderTiny; arguments, result and errors are those of `resolve_base`."""
    folder = TINY_AUTOENCODER if reference == "tiny" else Path(reference)
    if reference.startswith("hf:"):
        folder = download("fast.autoencoder", reference, ["config.json", "*model.safetensors"])
    if not (folder / "config.json").is_file():
        raise ModelError(f"fast.autoencoder: {reference} is no folder of an AutoencoderTiny; give `tiny` or hf:a/b")
    return folder


def download(field: str, reference: str, files: list[str]) -> Path:
    """Fetches files of a repository, unless the cache has them.

    Args:
        field: The setting, for messages.
        reference: `hf:owner/name` or `hf:owner/name@revision`.
        files: Patterns of their names.

    Returns:
        Folder in the hub's cache.

    Raises:
        ModelError: The hub can't be reached and has not been asked before, or there is no such repository.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, revision = reference.removeprefix("hf:").partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=files))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        cache = os.environ.get("HF_HOME", "~/.cache/huggingface")
        raise ModelError(
            f"{field}: {reference} can't be downloaded and isn't in the cache ({cache}); "
            f"check the name and the network, or give a local folder: {error}"
        ) from error
