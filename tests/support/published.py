"""Tiny folders of published models, as transformers itself would save them, at random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

_SENTENCE = "the a dog cat person man woman in on red left right of boat car tree two blue hat"
WORDS = _SENTENCE.split()
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def _seeded(build: Callable[[], Any], spread: float = 1.0, seed: int = 0) -> Any:
    """A network whose random weights are wide enough that its answers differ."""
    torch.manual_seed(seed)
    network = build().eval()
    if spread != 1.0:
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(spread)
    return network


# --- tokenizers -----------------------------------------------------------------------------------


def _bytes() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def clip_tokenizer(length: int) -> Any:
    """CLIP's kind: byte pairs in lower case, closed by <|endoftext|>."""
    letters = _bytes()
    vocabulary = [*letters, *(letter + "</w>" for letter in letters)]
    merges = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pair = (parts[0], parts[1])
            merged = "".join(pair)
            if pair not in merges:
                merges.append(pair)
                vocabulary.append(merged)
            parts = [merged, *parts[2:]]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    ids = {token: number for number, token in enumerate(dict.fromkeys(vocabulary))}
    return transformers.CLIPTokenizer(vocab=ids, merges=merges, model_max_length=length)


def bert_tokenizer() -> Any:
    """BERT's kind, with its special tokens at the numbers that Grounding DINO knows them by."""
    words = [f"[unused{number}]" for number in range(1100)]
    words[0], words[100], words[101], words[102] = "[PAD]", "[UNK]", "[CLS]", "[SEP]"
    words[103], words[1012], words[1029] = "[MASK]", ".", "?"
    for number, word in enumerate([*WORDS, *"abcdefghijklmnopqrstuvwxyz"]):
        words[200 + number] = word
    for number, letter in enumerate("abcdefghijklmnopqrstuvwxyz"):
        words[300 + number] = "##" + letter
    vocabulary = {word: number for number, word in enumerate(words)}
    return transformers.BertTokenizer(vocab=vocabulary, do_lower_case=True, model_max_length=512)


def florence_tokenizer() -> Any:
    """BART's kind, with Florence-2's thousand places and its image token."""
    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *_bytes()]
    tokenizer = Tokenizer(models.BPE({w: n for n, w in enumerate(words)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        extra_special_tokens={"image_token": "<image>"},
    )
    places = [f"<loc_{number}>" for number in range(1000)]
    fast.add_tokens([*places, "<poly>", "</poly>", "<sep>"], special_tokens=True)
    return fast


# --- models ---------------------------------------------------------------------------------------


def clipseg(folder: Path, seed: int = 0) -> Path:
    """CLIPSeg at 64 pixels."""
    tokenizer = clip_tokenizer(24)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 24,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 16,
    }
    config = transformers.CLIPSegConfig(
        text_config=text,
        vision_config=vision,
        projection_dim=24,
        extract_layers=[0, 1, 2],
        reduce_dim=16,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=24,
        conditional_layer=0,
        use_complex_transposed_convolution=True,
    )
    network = _seeded(lambda: transformers.CLIPSegForImageSegmentation(config), 2.0, seed)
    with torch.no_grad():  # so that answers depend on the words, and are no certainties
        network.clip.text_model.embeddings.token_embedding.weight.mul_(30)
        network.clip.text_projection.weight.mul_(10)
        network.decoder.film_mul.weight.mul_(4)
        network.decoder.reduces[1].weight.mul_(0.05)
        network.decoder.reduces[2].weight.mul_(0.05)
        network.decoder.transposed_convolution[-1].weight.mul_(0.003)
    network.save_pretrained(folder)
    images = transformers.ViTImageProcessorPil(
        size={"height": 64, "width": 64}, resample=2, do_resize=True, **IMAGENET
    )
    transformers.CLIPSegProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def florence2(folder: Path, seed: int = 0) -> Path:
    """Florence-2 at 64 pixels, made to answer with places alone, each of them once."""
    tokenizer = florence_tokenizer()
    vision = {
        "depths": [1, 1, 1, 1],
        "embed_dim": [16, 24, 32, 48],
        "num_heads": [2, 2, 4, 4],
        "num_groups": [2, 2, 4, 4],
        "window_size": 4,
        "projection_dim": 32,
        "drop_path_rate": 0.0,
    }
    text = {
        "vocab_size": len(tokenizer),
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": 96,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "decoder_start_token_id": 2,
        "dropout": 0.0,
    }
    config = transformers.Florence2Config(
        text_config={"model_type": "bart", **text},
        vision_config=vision,
        image_token_id=tokenizer.image_token_id,
        is_encoder_decoder=True,
    )
    network = _seeded(lambda: transformers.Florence2ForConditionalGeneration(config), 8.0, seed)
    places = set(tokenizer.convert_tokens_to_ids([f"<loc_{n}>" for n in range(0, 1000, 7)])) | {2}
    network.generation_config.update(
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
        decoder_start_token_id=2,
        num_beams=3,
        no_repeat_ngram_size=1,
        min_new_tokens=12,
        suppress_tokens=[n for n in range(len(tokenizer)) if n not in places],
    )
    network.save_pretrained(folder)
    images = transformers.CLIPImageProcessorPil(
        size={"height": 64, "width": 64}, resample=3, do_center_crop=False, **IMAGENET
    )
    images.image_seq_length = 5  # a grid of 2 by 2, and its mean
    processor = transformers.Florence2Processor(
        images, tokenizer, post_processor_config={"polygons": {}, "pure_text": {}}
    )
    processor.save_pretrained(folder)
    return folder


def sam3_config(tokenizer: Any) -> Any:
    """Of a SAM 3 at 56 pixels."""
    small = {"hidden_size": 32, "num_attention_heads": 4}
    return transformers.Sam3Config(
        vision_config={
            "backbone_config": {
                "model_type": "sam3_vit_model",
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": 56,
                "pretrain_image_size": 28,
                "patch_size": 14,
                "window_size": 2,
                "global_attn_indexes": [1],
            },
            "fpn_hidden_size": 32,
            "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        },
        text_config={
            "model_type": "clip_text_model",
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 48,
            "projection_dim": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "max_position_embeddings": 32,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        geometry_encoder_config={**small, "num_layers": 1, "intermediate_size": 48},
        detr_encoder_config={**small, "num_layers": 1, "intermediate_size": 48},
        detr_decoder_config={**small, "num_layers": 1, "intermediate_size": 48, "num_queries": 12},
        mask_decoder_config=dict(small),
    )


def sam3(folder: Path, seed: int = 0) -> Path:
    """SAM 3 at 56 pixels; its processor is saved as numbers, for it needs torchvision."""
    tokenizer = clip_tokenizer(32)
    config = sam3_config(tokenizer)
    network = _seeded(lambda: transformers.Sam3Model(config), 3.0, seed)
    with torch.no_grad():  # so that some of the instances count and others do not
        network.detr_decoder.presence_head.layer3.bias.fill_(3.0)
        network.dot_product_scoring.query_proj.weight.mul_(30)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    numbers = {
        "image_processor_type": "Sam3ImageProcessor",
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "size": {"height": 56, "width": 56},
        "resample": 2,
        "rescale_factor": 1 / 255,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(numbers))
    return folder


def _dino_config(kind: Any, words: int) -> Any:
    return kind(
        backbone_config=transformers.SwinConfig(
            image_size=32,
            patch_size=4,
            embed_dim=16,
            depths=[1, 1, 1, 1],
            num_heads=[2, 2, 2, 2],
            window_size=4,
            out_features=["stage2", "stage3", "stage4"],
        ),
        text_config={
            "model_type": "bert",
            "vocab_size": words,
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "max_position_embeddings": 64,
        },
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        num_queries=20,
        max_text_len=24,
    )


def grounding_dino(folder: Path, seed: int = 0, *, mm: bool = False) -> Path:
    """Grounding DINO, or MM-Grounding-DINO, with a shortest side of 96 pixels."""
    tokenizer = bert_tokenizer()
    prefix = "MMGroundingDino" if mm else "GroundingDino"
    config = _dino_config(getattr(transformers, f"{prefix}Config"), len(tokenizer))
    network = _seeded(
        lambda: getattr(transformers, f"{prefix}ForObjectDetection")(config), 4.0, seed
    )
    with torch.no_grad():  # so that some boxes count and others do not
        for name, parameter in network.named_parameters():
            if "class_embed" in name and name.endswith("bias"):
                parameter.zero_()
    network.save_pretrained(folder)
    images = transformers.GroundingDinoImageProcessorPil(
        size={"shortest_edge": 96, "longest_edge": 160}, **IMAGENET
    )
    transformers.GroundingDinoProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def sam(folder: Path, seed: int = 0, *, hq: bool = False) -> Path:
    """SAM, or SAM-HQ, at 128 pixels."""
    prefix = "SamHQ" if hq else "Sam"
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 128,
        "patch_size": 16,
        "window_size": 3,
        "global_attn_indexes": [1, 3],
        "output_channels": 32,
        "mlp_dim": 48,
        "num_pos_feats": 16,
        "initializer_range": 0.02,
    }
    prompt = {
        "hidden_size": 32,
        "image_size": 128,
        "patch_size": 16,
        "mask_input_channels": 4,
        "image_embedding_size": 8,
    }
    decoder = {
        "hidden_size": 32,
        "mlp_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "iou_head_hidden_dim": 32,
    }
    if hq:
        decoder["vit_dim"] = 32
    config = getattr(transformers, f"{prefix}Config")(
        vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder
    )
    network = _seeded(lambda: getattr(transformers, f"{prefix}Model")(config), 3.0, seed)
    with torch.no_grad():
        torch.manual_seed(seed + 1)
        for name, parameter in network.named_parameters():
            if "pos_embed" in name or "rel_pos" in name:
                parameter.normal_(0, 0.3)
    network.save_pretrained(folder)
    images = transformers.SamImageProcessorPil(
        size={"longest_edge": 128}, pad_size={"height": 128, "width": 128}, **IMAGENET
    )
    images.save_pretrained(folder)
    return folder


def sam2(folder: Path, seed: int = 0) -> Path:
    """SAM 2 at 128 pixels; its processor is saved as numbers, for it needs torchvision."""
    config = transformers.Sam2Config(
        vision_config={
            "backbone_config": {
                "model_type": "sam2_hiera_det_model",
                "hidden_size": 16,
                "image_size": [128, 128],
                "window_positional_embedding_background_size": [4, 4],
                "blocks_per_stage": [1, 1, 1, 1],
                "embed_dim_per_stage": [16, 32, 64, 128],
                "num_attention_heads_per_stage": [1, 2, 2, 2],
                "window_size_per_stage": [4, 4, 4, 4],
                "global_attention_blocks": [],
            },
            "backbone_channel_list": [128, 64, 32, 16],
            "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
            "fpn_hidden_size": 32,
        },
        prompt_encoder_config={"hidden_size": 32, "image_size": 128, "mask_input_channels": 4},
        mask_decoder_config={
            "hidden_size": 32,
            "mlp_dim": 48,
            "num_attention_heads": 4,
            "iou_head_hidden_dim": 32,
        },
    )
    network = _seeded(lambda: transformers.Sam2Model(config), 3.0, seed)
    network.save_pretrained(folder)
    numbers = {
        "image_processor_type": "Sam2ImageProcessorFast",
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "size": {"height": 128, "width": 128},
        "resample": 2,
        "rescale_factor": 1 / 255,
        **IMAGENET,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(numbers))
    return folder
