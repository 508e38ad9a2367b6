"""What published models of their real sizes cost on this machine: seconds and memory.

::

    python benchmarks/published_models.py                       # all kinds, one after another
    python benchmarks/published_models.py clipseg florence2     # some; sam3 needs minutes
    python benchmarks/published_models.py --threads 2 --json

No weights are needed: each model is built from its config at the sizes of the published one, with
random numbers, written to a temporary folder as its publisher would, and loaded and driven from
there as ``risam predict`` does it. Only the work is measured, never an answer: how many polygons
or boxes come out means nothing, so Florence-2 is made to write 60 tokens and Grounding DINO's boxes
are counted one by one. The picture has 480 x 640 pixels, the expression six words.

Each model is measured in a process of its own, so that peak memory is its own, files mapped into
memory included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import REPO, Row, machine, peak_bytes, table

sys.path.insert(0, str(REPO / "tests"))

TEXT = "the dog on the left"
SIZE = (480, 640)
TOKENS = 60  # of Florence-2's answer
BOXES = 8


def main() -> int:
    """Measures one kind after another."""
    options = _parse()
    if options.measure:
        print(json.dumps(measure(*options.measure, options.threads)))
        return 0
    found: list[Row] = []
    for kind in options.kinds or list(KINDS):
        with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
            for line in (["--build", kind, scratch], ["--measure", kind, scratch]):
                command = [sys.executable, __file__, *line, "--threads", str(options.threads)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
                if done.returncode:
                    print(f"{kind}: ended with exit code {done.returncode}; too little memory?")
                    break
            else:
                rows = [Row(**row) for row in json.loads(done.stdout.splitlines()[-1])]
                found += rows
                print(table(rows), flush=True)
    if options.json:
        facts = machine()
        print(json.dumps({"machine": facts, "rows": [[r.name, r.value, r.unit] for r in found]}))
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--threads", type=int, default=1, help="that torch uses")
    parser.add_argument("--scratch", type=Path, help="where weights are written meanwhile")
    parser.add_argument("--json", action="store_true", help="all figures on the last line")
    parser.add_argument("--build", nargs=2, metavar=("KIND", "DIR"), help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=2, metavar=("KIND", "DIR"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = sorted(set(options.kinds) - set(KINDS))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(KINDS)}")
    if options.build:
        kind, folder = options.build
        KINDS[kind](Path(folder))
        sys.exit(0)
    return options


# --- measuring ------------------------------------------------------------------------------------


def measure(kind: str, folder: str, threads: int) -> list[dict[str, Any]]:
    """Loads a kind from its folder and times its stages; rows as objects."""
    import numpy as np
    import torch

    from risam_cli.segmenters.resolve import load_segmenter

    torch.set_num_threads(threads)
    rows: list[dict[str, Any]] = []

    def timed(what: str, step: Callable[[], Any], times: int = 1) -> Any:
        """Runs a step; its seconds are told for each of the ``times`` things that it does."""
        wall, cpu = time.perf_counter(), time.process_time()
        result = step()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        note = f"{wall / times:.2f} s by the clock"
        rows.append({"name": f"{kind}: {what}", "value": cpu / times, "unit": "s", "note": note})
        return result

    parts = "+".join(str(path) for path in sorted(Path(folder).iterdir()))
    source = f"{kind.removesuffix('-large')}:{parts}"
    cpu = torch.device("cpu")
    segmenter: Any = timed(
        "load", lambda: load_segmenter(source, device=cpu, precision=torch.float32)
    )
    rows.append({"name": f"{kind}: parameters", "value": segmenter.parameters / 1e6, "unit": "M"})
    picture = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    inputs = [frame.batch([frame.resize(picture)]) for frame in segmenter.frames]
    if kind.startswith("florence2"):
        segmenter._generation.update(min_new_tokens=TOKENS, max_new_tokens=TOKENS)
    with torch.inference_mode():
        features = timed("an image", lambda: segmenter.encode_images(inputs))
        texts = timed("encode an expression", lambda: segmenter.encode_texts([TEXT]))
        # No box is above 1, so the detector's share stands alone.
        bar = 1.0 if segmenter.thresholds.instance is not None else None
        what = f"find an expression, {TOKENS} tokens" if bar is None else "find an expression"
        what = "find an expression" if kind == "clipseg" else what
        [found] = timed(what, lambda: segmenter.decode(features, texts, [0], [SIZE], bar))
        if kind == "grounded-sam":
            boxes = torch.tensor([[0.1, 0.1, 0.6, 0.8]]).repeat(BOXES, 1)
            from risam_cli.segmenters.segmenter import GridMaps

            grids = timed("a box", lambda: segmenter._masks(features[0], boxes, SIZE), BOXES)
            maps: Any = GridMaps(grids, segmenter.frames[1], SIZE)
        elif kind == "sam3":
            [found] = segmenter.decode(features, texts, [0], [SIZE], 0.0)
            maps = found.maps[:BOXES]
        else:
            maps = found.maps
        if len(maps):
            bar = segmenter.thresholds.mask
            timed("a mask at the image's size", lambda: maps.logits(SIZE) > bar, len(maps))
    rows.append({"name": f"{kind}: peak memory", "value": peak_bytes() / 1e9, "unit": "GB"})
    return rows


# --- models at their published sizes --------------------------------------------------------------


def _filled(tokenizer: Any, words: int) -> Any:
    """A tokenizer with as many tokens as the published one."""
    tokenizer.add_tokens([f"<filling-{number}>" for number in range(words - len(tokenizer))])
    return tokenizer


def _numbers(folder: Path, kind: str, side: int, half: bool = False) -> None:
    from support.published import IMAGENET

    mean = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3} if half else IMAGENET
    size = {"height": side, "width": side}
    numbers = {"image_processor_type": kind, "size": size, "resample": 2, **mean}
    (folder / "preprocessor_config.json").write_text(json.dumps(numbers))


def build_clipseg(root: Path) -> None:
    """``CIDAS/clipseg-rd64-refined``."""
    import transformers
    from support.published import clip_tokenizer

    config = transformers.CLIPSegConfig(
        text_config={"vocab_size": 49408, "max_position_embeddings": 77},
        vision_config={"patch_size": 16, "image_size": 224},
        reduce_dim=64,
        use_complex_transposed_convolution=True,
    )
    transformers.CLIPSegForImageSegmentation(config).save_pretrained(root / "model")
    _filled(clip_tokenizer(77), 49408).save_pretrained(root / "model")
    _numbers(root / "model", "ViTImageProcessor", 352)


def build_florence2(root: Path, *, large: bool = False) -> None:
    """``florence-community/Florence-2-base-ft`` or ``-large-ft``."""
    import transformers
    from support.published import florence_tokenizer

    width, layers = (1024, 12) if large else (768, 6)
    dims = [256, 512, 1024, 2048] if large else [128, 256, 512, 1024]
    heads = [8, 16, 32, 64] if large else [4, 8, 16, 32]
    tokenizer = _filled(florence_tokenizer(), 51289)
    config = transformers.Florence2Config(
        text_config={
            "model_type": "bart",
            "vocab_size": 51289,
            "d_model": width,
            "encoder_layers": layers,
            "decoder_layers": layers,
            "encoder_ffn_dim": 4 * width,
            "decoder_ffn_dim": 4 * width,
            "encoder_attention_heads": width // 64,
            "decoder_attention_heads": width // 64,
            "max_position_embeddings": 1024,
        },
        vision_config={
            "depths": [1, 1, 9, 1],
            "embed_dim": dims,
            "num_heads": heads,
            "num_groups": heads,
            "window_size": 12,
            "projection_dim": width,
        },
        image_token_id=tokenizer.image_token_id,
    )
    network = transformers.Florence2ForConditionalGeneration(config)
    network.generation_config.update(
        bos_token_id=0, eos_token_id=2, pad_token_id=1, decoder_start_token_id=2
    )
    network.save_pretrained(root / "model")
    from support.published import IMAGENET

    images = transformers.CLIPImageProcessorPil(
        size={"height": 768, "width": 768}, resample=3, do_center_crop=False, **IMAGENET
    )
    images.image_seq_length = 577
    transformers.Florence2Processor(
        images, tokenizer, post_processor_config={"polygons": {}, "pure_text": {}}
    ).save_pretrained(root / "model")


def build_florence2_large(root: Path) -> None:
    """``florence-community/Florence-2-large-ft``."""
    build_florence2(root, large=True)


def build_sam3(root: Path) -> None:
    """``facebook/sam3``."""
    import transformers
    from support.published import clip_tokenizer

    transformers.Sam3Model(transformers.Sam3Config()).save_pretrained(root / "model")
    _filled(clip_tokenizer(32), 49408).save_pretrained(root / "model")
    _numbers(root / "model", "Sam3ImageProcessor", 1008, half=True)


def build_grounded_sam(root: Path) -> None:
    """``IDEA-Research/grounding-dino-tiny`` with ``facebook/sam-vit-base``."""
    import transformers
    from support.published import IMAGENET, bert_tokenizer

    swin = transformers.SwinConfig(
        window_size=7, out_features=["stage2", "stage3", "stage4"], image_size=224
    )
    config = transformers.GroundingDinoConfig(
        backbone_config=swin, text_config={"model_type": "bert"}
    )
    first, second = root / "1-detector", root / "2-segmenter"
    transformers.GroundingDinoForObjectDetection(config).save_pretrained(first)
    images = transformers.GroundingDinoImageProcessorPil(
        size={"shortest_edge": 800, "longest_edge": 1333}, **IMAGENET
    )
    transformers.GroundingDinoProcessor(images, _filled(bert_tokenizer(), 30522)).save_pretrained(
        first
    )
    transformers.SamModel(transformers.SamConfig()).save_pretrained(second)
    transformers.SamImageProcessorPil(
        size={"longest_edge": 1024}, pad_size={"height": 1024, "width": 1024}, **IMAGENET
    ).save_pretrained(second)


KINDS: dict[str, Callable[[Path], None]] = {
    "clipseg": build_clipseg,
    "florence2": build_florence2,
    "florence2-large": build_florence2_large,
    "grounded-sam": build_grounded_sam,
    "sam3": build_sam3,
}

if __name__ == "__main__":
    sys.exit(main())
