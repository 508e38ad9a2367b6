"""Model folders and training state: written whole, read without running anything in them.

A model folder holds::

    config.json         {"format": 1, "model": settings, "text": Hugging Face config}
    model.safetensors   every weight, float32 or bfloat16
    tokenizer.json      the text encoder's tokenizer
    card.json           how it was made, and its figures
    README.md           the same, to read

Frozen parts may be left out: then ``format`` is 2 and ``needs`` lists them, see
:mod:`risam_cli.weights.frozen`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from risam_cli.errors import ModelError, OutputError, reason_of
from risam_cli.files.hashing import sha256_of_file
from risam_cli.files.jsonlines import load_json, read_text
from risam_cli.files.write import CHECK, sync_folder, sync_tree, write_file

if TYPE_CHECKING:
    from torch import Tensor, nn

FORMAT, FORMAT_WITH_NEEDS = 1, 2
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"
CARD_FILE = "card.json"
README_FILE = "README.md"
NEEDED_FILES = (CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE)

_LONGEST_JSON = 1 << 20  # bytes of config.json and of card.json
_LONGEST_TOKENIZER = 1 << 27
_DEEPEST = 32  # levels of config.json and of card.json

BUNDLED = Path(__file__).resolve().parents[1] / "bundled"
DEFAULT_MODEL = "refshapes-tiny"


@dataclass(frozen=True)
class StoredModel:
    """What a model folder says, weights not yet read.

    Attributes:
        settings: raw model settings; text_config: raw Hugging Face configuration.
        tokenizer: the JSON text; hash: SHA-256 over the needed files, in order.
        needs: raw entries of the frozen parts that are not in the folder.
    """

    folder: Path
    settings: Mapping[str, Any]
    text_config: Mapping[str, Any]
    tokenizer: str
    hash: str
    needs: Sequence[Any] = ()


def find_model(source: str | Path | None) -> Path:
    """The folder of a model given by path, by a bundled name, or not at all (the default).

    Raises:
        ModelError: where there is neither such a folder nor such a bundled model.
    """
    if source is None:
        return BUNDLED / DEFAULT_MODEL
    name = str(source)  # "" would stand for the working folder
    if name and os.path.isdir(name):
        return Path(name)
    if name and os.sep not in name and (BUNDLED / name).is_dir():
        return BUNDLED / name
    names = ", ".join(bundled_models()) or "none"
    raise ModelError(
        f"no model folder {name!r}",
        f"give a folder written by risam train, or a bundled model ({names})",
    )


def bundled_models() -> list[str]:
    """Names of the models that come with the package."""
    if not BUNDLED.is_dir():
        return []
    return sorted(p.name for p in BUNDLED.iterdir() if (p / CONFIG_FILE).is_file())


def read_model_folder(folder: Path) -> StoredModel:
    """Reads configuration and tokenizer, and hashes the folder's files.

    Raises:
        ModelError: a missing file, or a configuration that is not one.
    """
    _refuse_published(folder)
    best = folder / "best"
    if not (folder / CONFIG_FILE).is_file() and (best / CONFIG_FILE).is_file():
        raise ModelError(
            f"{folder} is the folder of a training run, not a model", f"did you mean {best}?"
        )
    for name in NEEDED_FILES:
        if not (folder / name).is_file():
            raise ModelError(
                f"model folder {folder} lacks {name}", "copy or download the folder again"
            )
    try:
        config = _read_json(folder / CONFIG_FILE)
        tokenizer = read_text(folder / TOKENIZER_FILE, _LONGEST_TOKENIZER)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{folder / TOKENIZER_FILE} cannot be read: {error}", "download it again"
        ) from error
    formats = (FORMAT, FORMAT_WITH_NEEDS)
    if not isinstance(config, dict) or config.get("format") not in formats:
        found = config.get("format") if isinstance(config, dict) else type(config).__name__
        raise ModelError(
            f"{folder / CONFIG_FILE} has format {found!r}, this version reads 1 and 2",
            "use a matching version of risam",
        )
    for key in ("model", "text"):
        if not isinstance(config.get(key), dict):
            raise ModelError(f"{folder / CONFIG_FILE} has no section {key!r}", "download it again")
    needs = config.get("needs", [])
    if not isinstance(needs, list):
        raise ModelError(
            f"{folder / CONFIG_FILE}: its section 'needs' is damaged", "download it again"
        )
    return StoredModel(
        folder, config["model"], config["text"], tokenizer, hash_folder(folder), tuple(needs)
    )


def _refuse_published(folder: Path) -> None:
    """Raises ModelError where a folder is another kind of model's, by its ``config.json``."""
    try:
        config = load_json(read_text(folder / CONFIG_FILE, _LONGEST_JSON))
    except (OSError, ValueError):
        return  # told below
    if isinstance(config, dict) and "model_type" in config and "format" not in config:
        raise ModelError(
            f"{folder} is a published {config['model_type']!r} model, not a folder written by "
            "risam train",
            "published models predict and are evaluated; what trains, explains or exports takes "
            "a RISAM folder",
        )


def stored_settings(source: str | Path) -> Mapping[str, Any]:
    """The raw model settings of a folder or a bundled model; raises as reading it does."""
    return read_model_folder(find_model(source)).settings


def read_card(folder: Path) -> dict[str, Any]:
    """How a model was made, as its folder says; nothing where it does not.

    Raises:
        ModelError: the card cannot be read.
    """
    card = _read_json(folder / CARD_FILE) if (folder / CARD_FILE).is_file() else {}
    return card if isinstance(card, dict) else {}


def _read_json(path: Path) -> Any:
    """A value that is neither long nor deep: what shows it must not be brought down by it.

    Raises:
        ModelError: it cannot be read.
    """
    try:
        value = load_json(read_text(path, _LONGEST_JSON))
        level = [value]
        for _ in range(_DEEPEST):
            level = [
                inner
                for outer in level
                if isinstance(outer, (dict, list))
                for inner in (outer.values() if isinstance(outer, dict) else outer)
            ]
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}", "download it again") from error
    if level:
        raise ModelError(f"{path} is nested more than {_DEEPEST} deep", "download it again")
    return value


def hash_folder(folder: Path) -> str:
    """SHA-256 over the needed files of a model folder, in order."""
    digest = hashlib.sha256()
    for name in NEEDED_FILES:
        digest.update(bytes.fromhex(sha256_of_file(folder / name)))
    return digest.hexdigest()


def checksums(folder: Path) -> dict[str, Any] | None:
    """What ``card.json`` says of the files written: empty without a card, None if it is damaged."""
    card = _read_json(folder / CARD_FILE) if (folder / CARD_FILE).exists() else {}
    sums = card.get("sha256", {}) if isinstance(card, dict) else None
    return sums if isinstance(sums, dict) else None


def damaged_files(folder: Path) -> list[str]:
    """Which files are not those that ``card.json`` says were written, one line each."""
    sums = checksums(folder)
    if sums is None:
        return [f"{folder / CARD_FILE} is damaged: it holds no checksums by name"]
    problems = []
    for name, one in sums.items():
        wanted = one if isinstance(one, list) else [one]
        if name in NEEDED_FILES and (folder / name).is_file():
            found = sha256_of_file(folder / name)
            if found not in wanted:
                problems.append(
                    f"{folder / name} is damaged or was changed: its SHA-256 is {found[:12]}…, "
                    f"{CARD_FILE} has another"
                )
    return problems


def require_undamaged(folder: Path) -> None:
    """For what makes another model of a folder, under checksums of its own.

    Raises:
        ModelError: a file is not the one that ``card.json`` says was written.
    """
    if problems := damaged_files(folder):
        raise ModelError(
            problems[0], f"copy it again, or delete 'sha256' in {CARD_FILE} if the change is yours"
        )


def replace_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Writes another ``config.json``, which ``card.json`` knows of beforehand.

    Raises:
        OutputError: it cannot be written; the older one is kept.
    """
    text = _json_text(config)
    card = _read_json(folder / CARD_FILE) if (folder / CARD_FILE).is_file() else None
    if isinstance(card, dict) and isinstance(card.get("sha256"), dict):
        both = [sha256_of_file(folder / CONFIG_FILE), hashlib.sha256(text.encode()).hexdigest()]
        card["sha256"][CONFIG_FILE] = both
        write_file(folder / CARD_FILE, _json_text(card))
    write_file(folder / CONFIG_FILE, text)


def load_weights(
    model: nn.Module,
    stored: StoredModel,
    weights: Mapping[str, Tensor],
    elsewhere: Callable[[str], bool] = lambda name: False,
) -> None:
    """Loads a folder's weights strictly: every one is used and none is missing.

    Args:
        weights: what the folder holds, under the model's names.
        elsewhere: of a weight's name, whether it is in none of the folder's files by design.

    Raises:
        ModelError: names or shapes that do not fit.
    """
    own = {name: tensor for name, tensor in model.state_dict().items() if not elsewhere(name)}
    missing, surplus = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    for problem, names in (("lacks", missing), ("has unknown", surplus)):
        if names:
            raise ModelError(
                f"{stored.folder / WEIGHTS_FILE} {problem} {len(names)} tensors, "
                f"first {names[0]!r}",
                "its config.json belongs to other weights; copy or download the folder again",
            )
    for name, tensor in weights.items():
        if tensor.shape != own[name].shape:
            raise ModelError(
                f"{stored.folder / WEIGHTS_FILE}: {name} is {tuple(tensor.shape)}, its config.json "
                f"says {tuple(own[name].shape)}",
                "copy or download the folder again",
            )
    model.load_state_dict(weights, strict=False)  # The names were compared above.


def count_weights(path: Path) -> tuple[int, int]:
    """How many values and how many tensors a safetensors file holds, from its header.

    Raises:
        ModelError: a file that is cut, or whose header lies.
    """
    counts = _counts(path, "copy or download the folder again")
    return sum(counts.values()), len(counts)


def count_by_part(path: Path) -> dict[str, int]:
    """Values of a safetensors file by the first part of their tensors' names, from its header.

    Raises:
        ModelError: as :func:`count_weights`.
    """
    parts: dict[str, int] = {}
    for name, count in _counts(path, "download it again").items():
        part = name.split(".")[0]
        parts[part] = parts.get(part, 0) + count
    return parts


def _counts(path: Path, fix: str) -> dict[str, int]:
    """Values of each tensor; ``fix`` ends the message where the file is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            names = file.keys()
            return {name: math.prod(file.get_slice(name).get_shape()) for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path} is damaged: {error}", fix) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file.

    Raises:
        ModelError: a file that is cut, or whose header lies.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{path} is damaged: {error}", "copy or download the folder again"
        ) from error
    return tensors


def write_model_folder(
    folder: Path,
    weights: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    text_config: Mapping[str, Any],
    tokenizer: str,
    card: Mapping[str, Any],
    readme: str,
    needs: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Writes a model folder beside its place and moves it there, so that it is whole or not.

    Args:
        needs: the frozen parts that ``weights`` leaves out.

    Raises:
        OutputError: where it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    config = {
        "format": FORMAT_WITH_NEEDS if needs else FORMAT,
        "model": settings,
        "text": text_config,
        **({"needs": list(needs)} if needs else {}),
    }
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            save_file(
                {k: v.detach().cpu().contiguous() for k, v in weights.items()},
                temporary / WEIGHTS_FILE,
            )
            _write_json(temporary / CONFIG_FILE, config)
            (temporary / TOKENIZER_FILE).write_text(tokenizer, encoding="utf-8")
            sums = {name: sha256_of_file(temporary / name) for name in NEEDED_FILES}
            _write_json(temporary / CARD_FILE, {**card, "sha256": sums})
            (temporary / README_FILE).write_text(readme, encoding="utf-8")
            temporary.chmod(0o755)
            sync_tree(temporary)
            _replace_folder(temporary, folder)
            sync_folder(folder.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except (OSError, SafetensorError) as error:  # safetensors tells of a full disk by its own
        raise OutputError(f"cannot write {folder}: {reason_of(error)}", CHECK) from error


def inspect_model_folder(folder: Path) -> dict[str, Any]:
    """What a model folder holds, from its headers: settings, tensors, parameters by part, card.

    Raises:
        ModelError: as :func:`read_model_folder`.
    """
    stored = read_model_folder(folder)
    parts = count_by_part(folder / WEIGHTS_FILE)
    return {
        "path": str(folder),
        "hash": stored.hash,
        "bytes": sum(p.stat().st_size for p in folder.iterdir() if p.is_file()),
        "parameters": sum(parts.values()),
        "parameters_by_part": parts,
        "needs": list(stored.needs),
        "settings": stored.settings,
        "card": read_card(folder),
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(_json_text(value), encoding="utf-8")


def _json_text(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def _replace_folder(temporary: Path, folder: Path) -> None:
    """Puts ``temporary`` where ``folder`` is or will be; the old one goes last."""
    if not folder.exists():
        os.replace(temporary, folder)
        return
    old = folder.with_name(f".{folder.name}-old")
    shutil.rmtree(old, ignore_errors=True)
    os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)
