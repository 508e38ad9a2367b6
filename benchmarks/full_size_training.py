"""Two optimizer steps of a full-size settings file on real photos, and what they cost.

::

    python benchmarks/full_size_training.py                            # refcoco_vit_b on the CPU
    python benchmarks/full_size_training.py --images 4 --accumulate 4 --precision bf16
    python benchmarks/full_size_training.py --config refcoco_vit_h --device cuda --images 16
    python benchmarks/full_size_training.py --config refcoco_vit_h --build-only

The photos beside the checkout (``../shared/photos``) are written in REFER's form and trained on as
RefCOCO. The weights are random, since only their number and the work matter: a SAM file with the
keys and shapes of the published one, and a text folder of BERT-base's size. They, and the run,
go to a temporary folder of about 1 GB (ViT-B) that is removed afterwards. The hours are those of
RefCOCO's 40 epochs of 16,994 images at the rate of the last step, on this machine.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

from common import PHOTOS, REPO, peak_bytes
from refer_form import write_refer_form

REFCOCO_IMAGES, EPOCHS = 16_994, 40


def main() -> None:
    """Makes the files, then trains in a process of its own, so that its memory is its own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", default="refcoco_vit_b")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32")
    parser.add_argument("--images", type=int, default=2, help="of a step")
    parser.add_argument("--accumulate", type=int, default=2, help="parts that they go through in")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--build-only", action="store_true", help="count parameters, train nothing")
    options = parser.parse_args()
    count(options.config)
    if options.build_only:
        return
    if not PHOTOS.is_dir():
        raise SystemExit(f"no photos at {PHOTOS}")
    with tempfile.TemporaryDirectory(prefix="risam-full-size-") as folder:
        process = multiprocessing.get_context("spawn").Process(
            target=measure, args=(Path(folder), options)
        )
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"ended with exit code {process.exitcode}; too little memory?")


def count(config: str) -> None:
    """Prints what a settings file trains, without memory for any weight."""
    import torch
    from transformers import BertConfig, BertModel

    from risam_cli.settings.train import load_settings
    from risam_cli.weights.build import add_lora, build_model, new_text_parts
    from risam_cli.weights.folder import stored_settings
    from risam_cli.weights.start import train_text_encoder
    from risam_cli.weights.text import TextParts

    settings = load_settings(REPO / f"configs/{config}.yaml", stored=stored_settings).model
    words = settings.text_encoder.model_copy(update={"source": None, "vocabulary": "refshapes"})
    plain = words.model_copy(update={"lora": None})
    tokenizer = new_text_parts(plain).tokenizer
    with torch.device("meta"):
        text = BertConfig()
        backbone = BertModel(text, add_pooling_layer=False)
        add_lora(backbone, "bert", settings.text_encoder)
        model = build_model(settings, TextParts(backbone, text, tokenizer))
    train_text_encoder(model, settings.text_encoder)
    model.image_encoder.requires_grad_(False)
    blocks: Any = model.image_encoder.blocks
    for block in blocks:
        block.adapter.requires_grad_(True)
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    total = sum(p.numel() for p in model.parameters())
    adapters = sum(n for name, n in trained.items() if ".adapter." in name)
    side = sum(n for name, n in trained.items() if ".lora_" in name)
    tuned = sum(trained.values())
    print(
        f"{config}: {total:,} parameters, {tuned:,} trained "
        f"(adapters {adapters:,}, LoRA {side:,}, new parts {tuned - adapters - side:,})"
    )


def measure(folder: Path, options: argparse.Namespace) -> None:
    """Trains and prints what it took."""
    from risam_cli.settings.train import load_settings
    from risam_cli.training.loop import train
    from risam_cli.weights.folder import stored_settings

    counts = write_refer_form(PHOTOS.parent / "instances.json", PHOTOS, folder / "data")
    print(f"photos in REFER's form: {counts}")
    config = REPO / f"configs/{options.config}.yaml"
    encoder = load_settings(config, stored=stored_settings).model.image_encoder
    size = make_sam(folder / "sam.pth", encoder)
    make_bert(folder / "bert")
    print(f"made a SAM file of {size / 1e6:.0f} MB; peak {peak_bytes() / 1e9:.2f} GB so far")
    overrides = {
        "output": folder / "run",
        "model.image_encoder.checkpoint": folder / "sam.pth",
        "model.text_encoder.source": folder / "bert",
        "train.root": folder / "data",
        "val.val.root": folder / "data",
        "val.val.limit": 1,
        "device": options.device,
        "precision": options.precision,
        "workers": 1,
        "pictures": 0,
        "log_every": 1,
        "validate_every": 10**6,
        "checkpoint_every": 10**6,
        "stages.0.steps": options.steps,
        "stages.0.images_per_step": options.images,
        "stages.0.accumulate": options.accumulate,
    }
    if options.threads:
        overrides["threads"] = options.threads
    chosen = [f"{key}={value}" for key, value in overrides.items()]
    settings = load_settings(config, chosen, stored=stored_settings)
    clock = StepClock(settings.device)
    best = train(settings, resume=False)
    report(clock, options, best, folder / "run")


class StepClock:
    """Wall and processor seconds of every optimizer step, the batch's loading left out."""

    def __init__(self, device: str) -> None:
        from torch.nn.modules.module import register_module_forward_pre_hook
        from torch.optim.optimizer import register_optimizer_step_post_hook

        self.device = device
        self.begun: tuple[float, float] | None = None
        self.steps: list[tuple[float, float]] = []
        register_module_forward_pre_hook(self._forward)
        register_optimizer_step_post_hook(self._stepped)

    def _forward(self, module: Any, inputs: Any) -> None:
        from risam_cli.model.image_encoder import ImageEncoder

        if self.begun is None and isinstance(module, ImageEncoder):
            self.begun = self._now()

    def _stepped(self, *unused: Any) -> None:
        if self.begun is not None:
            wall, busy = self._now()
            self.steps.append((wall - self.begun[0], busy - self.begun[1]))
            self.begun = None

    def _now(self) -> tuple[float, float]:
        if self.device.startswith("cuda"):
            import torch

            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()


def report(clock: StepClock, options: argparse.Namespace, best: Path, run: Path) -> None:
    """Prints seconds, memory, hours and what was written."""
    import torch

    rows = [json.loads(line) for line in (run / "metrics.jsonl").open(encoding="utf-8")]
    losses = [f"{row['loss']:.3f}" for row in rows if row["kind"] == "train"]
    for number, (wall, busy) in enumerate(clock.steps, start=1):
        print(
            f"step {number}: {wall:.1f} s, {busy:.1f} s of processor time, {options.images} images "
            f"({options.precision}, {torch.get_num_threads()} threads), loss {losses[number - 1]}"
        )
    print(f"peak memory: {peak_bytes() / 1e9:.2f} GB resident")
    if options.device.startswith("cuda"):
        print(f"peak memory on the GPU: {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")
    wall, busy = (value / options.images for value in clock.steps[-1])
    images = REFCOCO_IMAGES * EPOCHS
    print(
        f"{wall:.2f} s an image; {EPOCHS} epochs of RefCOCO at this rate: "
        f"{wall * images / 3600:,.0f} hours ({busy * images / 3600:,.0f} of processor time)"
    )
    size = sum(path.stat().st_size for path in best.iterdir())
    last = (run / "checkpoints/last.pt").stat().st_size
    print(f"model folder {size / 1e6:.0f} MB, checkpoint {last / 1e6:.0f} MB")


def make_sam(path: Path, settings: Any) -> int:
    """A file with the keys and shapes of SAM's published one, weights random; gives its bytes."""
    import torch

    from risam_cli.model.rivals.sam import segment_anything_modeling
    from risam_cli.weights.build import build_image_encoder

    sam: Any = segment_anything_modeling()
    encoder = build_image_encoder(settings.model_copy(update={"adapter_dim": 0}))
    decoder = sam.MaskDecoder(
        transformer_dim=256,
        transformer=sam.TwoWayTransformer(depth=2, embedding_dim=256, num_heads=8, mlp_dim=2048),
    )
    prompt = sam.PromptEncoder(
        embed_dim=256,
        image_embedding_size=(64, 64),
        input_image_size=(1024, 1024),
        mask_in_chans=16,
    )
    parts = {"image_encoder": encoder, "mask_decoder": decoder, "prompt_encoder": prompt}
    torch.save(
        {
            f"{part}.{k}": v
            for part, module in parts.items()
            for k, v in module.state_dict().items()
        },
        path,
    )
    return path.stat().st_size


def make_bert(folder: Path) -> None:
    """A text folder of BERT-base's size with a vocabulary of made words."""
    from transformers import BertConfig, BertModel

    folder.mkdir()
    BertModel(BertConfig()).save_pretrained(folder)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = "abcdefghijklmnopqrstuvwxyz0123456789'-"
    # With letters, every word is spelled and none is unknown.
    special += [*letters, *(f"##{letter}" for letter in letters)]
    words = [*special, *(f"word{n}" for n in range(BertConfig().vocab_size - len(special)))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    about = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(about), encoding="utf-8")


if __name__ == "__main__":
    main()
