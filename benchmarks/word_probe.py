"""How much of a word's text can still be read after each block of Mutual-Aware Attention.

    python benchmarks/word_probe.py refshapes-tiny runs/ablations/2000x16/*/best

Linear probes (multinomial logistic regression) guess from a word's vector which word of the
vocabulary it is, and whether it stands before the first noun, at it or behind it, which
is what tells the one spoken of from what it is related to: from the linguistic features F_l, and
from the stream of words after each block. They are fitted on one half of the scenes and scored on
the other. Beside them stands the share of the vectors' variance that lies between words, as against
within one word's vectors over images and contexts.
``--untrained`` also probes each network with its weights as they start, the text encoder and the
image encoder as trained.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from risam_cli.data.images.transforms import normalize
from risam_cli.data.refshapes.dataset import RefShapes
from risam_cli.data.refshapes.vocabulary import SHAPES, STAND_INS
from risam_cli.model.risam import Risam
from risam_cli.training.data.collate import ReferringCollate
from risam_cli.training.data.dataset import ReferringScenes
from risam_cli.weights.build import build_model
from risam_cli.weights.folder import find_model, read_model_folder
from risam_cli.weights.load import LoadedModel, load_model
from risam_cli.weights.text import text_from_folder

FIRST_WORD = 5
"""Token ids below are special: padding, unknown, and what opens and closes an expression."""


@dataclass(frozen=True)
class Probed:
    """What was read of one stream of words.

    Attributes:
        model: its folder; stream: "F_l" or "block K".
        accuracy: of the word's probe on held-out scenes, 0..1; majority: of always guessing the
            most frequent word.
        role: accuracy of the probe for the place by the first noun; most_frequent_role: of always
            guessing the most frequent one.
        between: share of the variance that lies between words, 0..1.
        words: how many vectors were scored.
    """

    model: str
    stream: str
    accuracy: float
    majority: float
    role: float
    most_frequent_role: float
    between: float
    words: int


def main() -> None:
    """Probes each model folder and prints a row for each stream of words."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", help="model folders, or bundled models by name")
    parser.add_argument("--family", default="refshapesg")
    parser.add_argument("--scenes", type=int, default=120, help="half to fit, half to score")
    parser.add_argument("--untrained", action="store_true", help="also the weights at the start")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    options = parser.parse_args()
    torch.manual_seed(0)
    rows: list[Probed] = []
    print("| model | stream | word | most frequent | role | most frequent | between words |")
    print("|---|---|---|---|---|---|---|")
    for source in options.models:
        loaded = load_model(source, device=torch.device("cpu"))
        name = Path(source).parent.name if Path(source).name == "best" else Path(source).name
        networks = {name: loaded.model}
        if options.untrained:
            networks[f"{name}, untrained"] = untrained(source, loaded)
        for label, network in networks.items():
            for row in probe(label, loaded, network, options.family, options.scenes):
                rows.append(row)
                print(
                    f"| {row.model} | {row.stream} | {row.accuracy:.3f} | {row.majority:.3f} "
                    f"| {row.role:.3f} | {row.most_frequent_role:.3f} | {row.between:.3f} |",
                    flush=True,
                )
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def untrained(source: str, loaded: LoadedModel) -> Risam:
    """The network with new weights between the encoders and the mask."""
    text = text_from_folder(read_model_folder(find_model(source)), 32)
    network = build_model(loaded.settings, text).eval()
    for part in ("image_encoder", "text_encoder"):
        getattr(network, part).load_state_dict(getattr(loaded.model, part).state_dict())
    return network


def probe(
    label: str, loaded: LoadedModel, network: Risam, family: str, scenes: int
) -> list[Probed]:
    """Fits and scores a probe for each stream of words of a network."""
    halves = [
        read(loaded, network, family, range(half * scenes // 2, (half + 1) * scenes // 2))
        for half in (0, 1)
    ]
    (fit_streams, fit_ids, fit_roles), (streams, ids, roles) = halves
    rows = []
    for number, (fitted, scored) in enumerate(zip(fit_streams, streams, strict=True)):
        found, placed = (classify(fitted, of, scored) for of in (fit_ids, fit_roles))
        majority, role = int(fit_ids.mode().values), int(fit_roles.mode().values)
        rows.append(
            Probed(
                label,
                "F_l" if number == 0 else f"block {number}",
                float((found == ids).float().mean()),
                float((ids == majority).float().mean()),
                float((placed == roles).float().mean()),
                float((roles == role).float().mean()),
                between_words(scored, ids),
                len(ids),
            )
        )
    return rows


@torch.no_grad()
def read(
    loaded: LoadedModel, network: Risam, family: str, scenes: Sequence[int]
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Word vectors (n, C) of F_l and of every block, the words' ids (n,) and roles (n,)."""
    size = loaded.image_size
    data = ReferringScenes(RefShapes(family, "val", scenes=max(scenes) + 1), size, 64, 0.0)
    collate = ReferringCollate(loaded.tokenizer, size)
    kept: list[list[Tensor]] = [[] for _ in range(len(network.attention) + 1)]
    nouns = [loaded.tokenizer.encode([noun]).input_ids[0, 1] for noun in (*SHAPES, *STAND_INS)]
    ids, roles = [], []
    seen: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _m, _i, output: seen.append(output[1].words))
        for block in network.attention
    ]
    for start in range(0, len(scenes), 8):
        batch = collate([data[scene] for scene in scenes[start : start + 8]])
        image = network.encode_image(normalize(batch.images, batch.fitted.tolist()))
        text = network.encode_text(batch.input_ids, batch.attention_mask)
        seen.clear()
        network.attention_maps(image, text, batch.image_index)
        words = text.valid & (batch.input_ids >= FIRST_WORD)
        ids.append(batch.input_ids[words])
        noun = torch.isin(batch.input_ids, torch.stack(nouns)).int()
        before = noun.cumsum(dim=1) - noun
        roles.append(torch.where(before > 0, 2, noun)[words])
        for stream, vectors in zip(kept, [text.words, *seen], strict=True):
            stream.append(vectors[words].float())
    for hook in hooks:
        hook.remove()
    return [torch.cat(stream) for stream in kept], torch.cat(ids), torch.cat(roles)


def classify(fitted: Tensor, ids: Tensor, scored: Tensor) -> Tensor:
    """Token ids (m,) that logistic regression, fitted on (n, C) and (n,), reads from (m, C)."""
    mean, deviation = fitted.mean(dim=0), fitted.std(dim=0).clamp(min=1e-6)
    known, classes = ids.unique(return_inverse=True)
    layer = nn.Linear(fitted.shape[1], len(known))
    nn.init.zeros_(layer.weight)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")
    x = (fitted - mean) / deviation

    def loss() -> Tensor:
        optimizer.zero_grad()
        decay = 1e-4 * layer.weight.square().sum()
        value = nn.functional.cross_entropy(layer(x), classes) + decay
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        return known[layer((scored - mean) / deviation).argmax(dim=1)]


def between_words(vectors: Tensor, ids: Tensor) -> float:
    """Share of the variance of (n, C) that lies between the means of each word's vectors."""
    mean = vectors.mean(dim=0)
    classes, counts = ids.unique(return_inverse=True)[1], ids.unique(return_counts=True)[1]
    sums = vectors.new_zeros(len(counts), vectors.shape[1]).index_add_(0, classes, vectors)
    means = sums / counts[:, None]
    between = (counts[:, None] * (means - mean).square()).sum()
    return float(between / (vectors - mean).square().sum())


if __name__ == "__main__":
    main()
