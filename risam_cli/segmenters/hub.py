"""Files of published models: in the Hugging Face cache, or downloaded there by name, once."""

from __future__ import annotations

import re
from pathlib import Path

from risam_cli.console.console import get_console
from risam_cli.errors import ModelError, reason_of
from risam_cli.files.jsonlines import load_json

_WANTED = ["*.json", "*.txt", "*.safetensors", "*.model"]
_BELOW = ["*/*"]  # other formats of the same weights lie in folders
_NAME = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
_FILES = "config.json, model.safetensors, preprocessor_config.json and the tokenizer's files"


def is_hub_name(text: str) -> bool:
    """Whether a text has the form of a name on the hub, such as ``facebook/sam3``."""
    return _NAME.fullmatch(text) is not None and not text.startswith((".", "-"))


def cached(name: str) -> Path | None:
    """The folder of a name in the cache, if all of its files are there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError, ValueError):
        return None
    return None if lacking(found) else found


def lacking(folder: Path) -> list[str]:
    """What a folder lacks of configuration and weights."""
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = set(load_json(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return [*missing, index.name]
        return missing + sorted(s for s in shards if not (folder / str(s)).is_file())
    if not (folder / "model.safetensors").is_file():
        missing.append("model.safetensors")
    return missing


def fetch(name: str, *, download: bool = True) -> Path:
    """The folder of a name on the hub, downloaded where the cache does not have it.

    Shows progress on stderr, unless the console is quiet.

    Args:
        download: without it only the cache is looked at.

    Raises:
        ModelError: no such model, no permission, no network, no space.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    found = cached(name)
    if found is not None:
        return found
    if not download:
        raise ModelError(
            f"{name} is not in the cache {constants.HF_HUB_CACHE}",
            f"download it first: risam models fetch {name}",
        )
    if constants.HF_HUB_OFFLINE:
        raise _absent(name, "HF_HUB_OFFLINE is set")
    if get_console().quiet:
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
    try:
        found = Path(snapshot_download(name, allow_patterns=_WANTED, ignore_patterns=_BELOW))
    except GatedRepoError:
        page = f"https://huggingface.co/{name}"
        raise ModelError(
            f"{name} is gated: its owner must grant you access",
            f"request access at {page}, then log in with 'hf auth login'",
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"there is no model {name!r} on the hub, or it is private",
            "check the name, or log in with 'hf auth login'",
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise _absent(name, "the hub cannot be reached") from None
    except OSError as error:  # the hub's answer; no space, no permission; a connection that broke
        raise _absent(name, reason_of(error)) from None
    except Exception as error:  # the HTTP library's own, of a connection that broke
        if not type(error).__module__.startswith("http"):
            raise
        raise _absent(name, "the hub cannot be reached") from None
    if missing := lacking(found):
        raise ModelError(f"{name} lacks {', '.join(missing[:3])} on the hub", "name another model")
    return found


def _absent(name: str, why: str) -> ModelError:
    from huggingface_hub import constants

    return ModelError(
        f"{name} is not in the cache {constants.HF_HUB_CACHE} and cannot be downloaded: {why}",
        f"where there is a network, 'hf download {name} --local-dir DIR' downloads its files "
        f"({_FILES}); copy DIR here and give it in place of the hub's name",
    )
