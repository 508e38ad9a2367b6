"""A model folder written anew: as it is, or made whole."""

from __future__ import annotations

from pathlib import Path

from risam_cli.errors import OutputError, setting
from risam_cli.weights import folder as model_folders

NEEDS_TITLE = "Needs beside it, or in a folder that `RISAM_WEIGHTS` names:"
"""Heads the list of frozen parts in a model folder's README, which ends with it."""


def export_model(source: str | Path | None, output: Path, *, merged: bool) -> None:
    """Loads a model folder, as predict does, and writes it to another place.

    Args:
        output: must not exist, or be an empty folder.
        merged: put in what lies in files elsewhere, and add LoRA into the text encoder's weights,
            so that the folder needs no other file. Adapters stay adapters.

    Raises:
        ModelError: a damaged folder, or one that lacks a file it needs; OutputError: a place that
            is taken or cannot be written.
    """
    import torch

    from risam_cli.weights.load import load_model

    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise OutputError(f"{output} already exists", f"give another folder by {setting('output')}")
    folder = model_folders.find_model(source)
    loaded = load_model(folder, device=torch.device("cpu"), keep_lora=not merged)
    model_folders.require_undamaged(folder)
    stored = model_folders.read_model_folder(folder)
    settings, card, readme = dict(stored.settings), model_folders.read_card(folder), _readme(folder)
    weights = loaded.model.state_dict()
    if merged:
        model = loaded.settings
        image = model.image_encoder.model_copy(update={"checkpoint": None})
        text = model.text_encoder.model_copy(update={"lora": None})
        model = model.model_copy(update={"image_encoder": image, "text_encoder": text})
        settings = model.model_dump(mode="json")
        card = {**card, "merged_from": {"hash": stored.hash, "needs": list(stored.needs)}}
        readme = readme.partition(f"\n{NEEDS_TITLE}")[0] + (
            f"\nMade whole by `risam models export` from the folder {stored.hash[:12]}.\n"
        )
    else:
        held = model_folders.read_tensors(folder / model_folders.WEIGHTS_FILE)
        weights = {name: weights[name] for name in held}
    if output.is_dir():
        output.rmdir()
    model_folders.write_model_folder(
        output,
        weights,
        settings,
        stored.text_config,
        stored.tokenizer,
        card,
        readme,
        () if merged else stored.needs,
    )


def _readme(folder: Path) -> str:
    path = folder / model_folders.README_FILE
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return f"# {folder.name}\n"
