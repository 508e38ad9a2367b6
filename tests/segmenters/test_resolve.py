"""What a user may name as a model, what is found there, and what is said where nothing is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import published

from risam_cli.cli import main
from risam_cli.errors import ModelError, UsageError
from risam_cli.segmenters import hub
from risam_cli.segmenters.names import KNOWN
from risam_cli.segmenters.resolve import Named, kind_of_folder, load_segmenter, parse_model

CPU = {"device": torch.device("cpu"), "precision": torch.float32}


@pytest.fixture(scope="module")
def clipseg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published.clipseg(tmp_path_factory.mktemp("clipseg") / "folder")


@pytest.fixture
def copy(clipseg: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(clipseg, tmp_path / "copy"))


def one_line(error: ModelError | UsageError) -> str:
    text = str(error)
    assert "\n" not in text
    assert error.fix
    return text


# --- names ----------------------------------------------------------------------------------------


def test_short_names_kinds_and_hub_names_are_told_apart(tmp_path: Path) -> None:
    assert parse_model("florence2") == Named(
        "florence2", ("florence-community/Florence-2-base-ft",)
    )
    assert parse_model("sam3:me/mine") == Named("sam3", ("me/mine",))
    assert parse_model("grounded-sam:a/b+c/d") == Named("grounded-sam", ("a/b", "c/d"))
    assert parse_model("grounded-sam:a/b").parts == ("a/b", "facebook/sam-vit-base")
    assert parse_model("me/mine") == Named(None, ("me/mine",))
    assert parse_model(None).kind == "risam"
    assert parse_model("refshapes-tiny").kind == "risam"


def test_an_empty_name_is_not_the_working_folder(
    clipseg: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(clipseg)
    with pytest.raises(ModelError, match="no model folder ''"):
        parse_model("")


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("known", KNOWN.values(), ids=list(KNOWN))
def test_every_short_name_says_how_to_get_its_files(known: Any) -> None:
    with pytest.raises(ModelError) as caught:
        load_segmenter(known.short, **CPU)
    text = one_line(caught.value)
    assert known.parts[0] in text
    assert "HF_HUB_OFFLINE" in text
    assert "model.safetensors" in text
    assert f"hf download {known.parts[0]}" in text


def test_a_hub_that_cannot_be_reached_is_told_as_such(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub
    from huggingface_hub.utils import httpx

    def refuse(name: str, **options: Any) -> str:
        if options.get("local_files_only"):
            raise huggingface_hub.errors.LocalEntryNotFoundError("not cached")
        raise httpx.ConnectError("[Errno -2] Name or service not known")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ModelError, match=r"me/mine .* the hub cannot be reached"):
        hub.fetch("me/mine")


def test_a_gated_model_says_where_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.utils import httpx

    def refuse(name: str, **options: Any) -> str:
        if options.get("local_files_only"):
            raise huggingface_hub.errors.LocalEntryNotFoundError("not cached")
        request = httpx.Request("GET", "https://huggingface.co")
        response = httpx.Response(403, request=request)
        raise huggingface_hub.errors.GatedRepoError("gated", response=response)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ModelError) as caught:
        hub.fetch("facebook/sam3")
    assert "https://huggingface.co/facebook/sam3" in one_line(caught.value)


@pytest.mark.usefixtures("offline")
def test_a_name_in_the_cache_needs_no_network(clipseg: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "cache" / "models--me--mine" / "snapshots" / ("a" * 40)
    shutil.copytree(clipseg, snapshot)
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    by_name = load_segmenter("me/mine", **CPU)
    by_folder = load_segmenter(clipseg, **CPU)
    assert by_name.kind == by_folder.kind == "clipseg"
    assert by_name.hash == by_folder.hash
    assert by_name.name == "me/mine"
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="not in the cache"):
        load_segmenter("me/mine", **CPU)


@pytest.mark.parametrize("name", ["no such", "a/b/c", "./nothing", "sam3:nowhere"])
def test_what_is_no_model_is_told_with_what_could_be(name: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_segmenter(name, **CPU)
    one_line(caught.value)


# --- folders --------------------------------------------------------------------------------------


def test_a_hash_is_of_the_files_wherever_they_lie(clipseg: Path, copy: Path) -> None:
    assert load_segmenter(clipseg, **CPU).hash == load_segmenter(copy, **CPU).hash
    (copy / "README.md").write_text("beside the point")
    assert load_segmenter(clipseg, **CPU).hash == load_segmenter(copy, **CPU).hash
    numbers = json.loads((copy / "processor_config.json").read_text())
    numbers["image_processor"]["image_mean"][0] += 0.001
    (copy / "processor_config.json").write_text(json.dumps(numbers))
    assert load_segmenter(clipseg, **CPU).hash != load_segmenter(copy, **CPU).hash


def test_half_precision_files_are_computed_in_float32(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    save_file(
        {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()},
        copy / "model.safetensors",
        {"format": "pt"},
    )
    network = load_segmenter(copy, **CPU)._network  # type: ignore[attr-defined]
    assert {p.dtype for p in network.parameters()} == {torch.float32}


def test_missing_tensors_are_named(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["decoder.film_mul.weight"]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 tensors: decoder\.film_mul\.weight"):
        load_segmenter(copy, **CPU)


def test_unexpected_tensors_are_named(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    # What older files hold, and code computes, is none.
    tensors["clip.text_model.embeddings.position_ids"] = torch.arange(24)[None]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    load_segmenter(copy, **CPU)
    tensors["extra.weight"] = torch.zeros(2)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"unexpected 1 tensors: extra\.weight"):
        load_segmenter(copy, **CPU)


def test_tensors_of_another_shape_are_refused(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["decoder.film_mul.weight"] = torch.zeros(3, 3)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"film_mul"):
        load_segmenter(copy, **CPU)


@pytest.mark.parametrize("keep", [10, 2000, -1])
def test_a_truncated_file_is_told(copy: Path, keep: int) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match="damaged or truncated") as caught:
        load_segmenter(copy, **CPU)
    assert "model.safetensors" in one_line(caught.value)


def test_pickles_are_not_read(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    torch.save(tensors, copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no \.safetensors weights .*pytorch_model\.bin"):
        load_segmenter(copy, **CPU)


@pytest.mark.parametrize(
    ("gone", "told"),
    [
        (("processor_config.json",), "lacks preprocessor_config.json"),
        (("tokenizer.json", "tokenizer_config.json"), "tokenizer"),
    ],
)
def test_missing_processor_files_are_named(copy: Path, gone: tuple[str, ...], told: str) -> None:
    for name in gone:
        (copy / name).unlink()
    with pytest.raises(ModelError, match=told) as caught:
        load_segmenter(copy, **CPU)
    one_line(caught.value)


def test_another_architecture_is_refused(clipseg: Path, tmp_path: Path) -> None:
    import transformers

    transformers.BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelError, match="'bert'") as caught:
        load_segmenter(tmp_path / "bert", **CPU)
    assert "florence2" in one_line(caught.value)
    with pytest.raises(ModelError, match="is a clipseg, not a sam3"):
        load_segmenter(f"sam3:{clipseg}", **CPU)
    published.sam(tmp_path / "sam")
    with pytest.raises(ModelError, match="grounded-sam:"):
        load_segmenter(tmp_path / "sam", **CPU)
    with pytest.raises(ModelError, match="names 2 parts"):
        load_segmenter(f"clipseg:{clipseg}+{clipseg}", **CPU)


def test_folders_with_a_plus_in_their_names(clipseg: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "a+b", tmp_path / "c+d+e"
    shutil.copytree(clipseg, one)
    two.mkdir()
    assert parse_model(f"clipseg:{one}").parts == (str(one),)
    assert parse_model(f"grounded-sam:{one}+{two}").parts == (str(one), str(two))
    assert parse_model(f"grounded-sam:{two}+me/sam").parts == (str(two), "me/sam")
    assert load_segmenter(one, **CPU).kind == "clipseg"


def test_florence2_of_the_first_layout_is_told_from_the_present_one(tmp_path: Path) -> None:
    folder = published.florence2(tmp_path / "folder")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_florence2.Florence2Config"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="as it was first published") as caught:
        load_segmenter(folder, **CPU)
    assert "florence-community/" in one_line(caught.value)


def test_a_second_part_that_segments_no_boxes_is_refused(clipseg: Path, tmp_path: Path) -> None:
    detector = published.grounding_dino(tmp_path / "dino")
    with pytest.raises(ModelError, match="cannot make masks from boxes"):
        load_segmenter(f"grounded-sam:{detector}+{clipseg}", **CPU)


def test_a_video_model_s_detector_is_read(tmp_path: Path) -> None:
    import transformers

    folder = published.sam3(tmp_path / "image")
    image = load_segmenter(folder, **CPU)
    tensors = load_file(folder / "model.safetensors")
    video = Path(shutil.copytree(folder, tmp_path / "video"))
    named = {f"detector_model.{name}": tensor for name, tensor in tensors.items()}
    named["tracker_model.memory"] = torch.zeros(3)
    save_file(named, video / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    whole = transformers.Sam3VideoConfig().to_dict() | {"detector_config": config}
    (video / "config.json").write_text(json.dumps(whole | {"model_type": "sam3_video"}))
    assert kind_of_folder(video) == "sam3"
    found = load_segmenter(video, **CPU)
    for (name, one), (_, other) in zip(
        image._network.named_parameters(),  # type: ignore[attr-defined]
        found._network.named_parameters(),  # type: ignore[attr-defined]
        strict=True,
    ):
        assert torch.equal(one, other), name


def test_a_sam2_video_folder_is_read_as_sam2(tmp_path: Path) -> None:
    detector = published.grounding_dino(tmp_path / "dino")
    image = published.sam2(tmp_path / "image")
    video = Path(shutil.copytree(image, tmp_path / "video"))
    tensors = load_file(video / "model.safetensors")
    tensors["memory_attention.layers.0.linear1.weight"] = torch.zeros(3, 3)
    save_file(tensors, video / "model.safetensors", {"format": "pt"})
    config = json.loads((image / "config.json").read_text())
    (video / "config.json").write_text(json.dumps(config | {"model_type": "sam2_video"}))
    found = [load_segmenter(f"grounded-sam:{detector}+{one}", **CPU) for one in (image, video)]
    states = [one._boxes._network.state_dict() for one in found]  # type: ignore[attr-defined]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_words_over_the_length_are_cut_and_unknown_ones_named(
    clipseg: Path, tmp_path: Path
) -> None:
    segmenter = load_segmenter(clipseg, **CPU)
    texts = segmenter.encode_texts(["the dog", "the dog " * 40])
    assert list(texts.cut_to) == [0, segmenter.max_tokens]
    published.grounding_dino(tmp_path / "dino")
    published.sam(tmp_path / "sam")
    grounded = load_segmenter(f"grounded-sam:{tmp_path / 'dino'}+{tmp_path / 'sam'}", **CPU)
    texts = grounded.encode_texts(["the dog", "the 犬 dog", "a dog. " * 30])
    assert list(texts.unknown) == [(), ("犬",), ()]
    assert [bool(cut) for cut in texts.cut_to] == [False, False, True]


# --- risam models ---------------------------------------------------------------------------------


def test_models_commands_take_published_models(
    clipseg: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models", "list", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(KNOWN) < set(rows)
    assert rows["sam3"]["gated"]
    assert rows["florence2"]["licence"] == "MIT"
    assert main(["models", "list"]) == 0
    assert "florence2-large" in capsys.readouterr().out

    assert main(["models", "inspect", str(clipseg), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    loaded = load_segmenter(clipseg, **CPU)
    assert facts["kind"] == "clipseg"
    assert facts["hash"] == loaded.hash
    assert facts["parameters"] == loaded.parameters == sum(facts["parameters_by_part"].values())

    assert main(["models", "verify", str(clipseg)]) == 0
    assert loaded.hash in capsys.readouterr().out
    copy = Path(shutil.copytree(clipseg, tmp_path / "copy"))
    tensors = load_file(copy / "model.safetensors")
    tensors["decoder.film_mul.weight"][0, 0] = torch.nan
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    assert main(["models", "verify", str(copy)]) == 1
    assert "film_mul" in capsys.readouterr().err
    assert main(["models", "export", str(clipseg), "-o", str(tmp_path / "out")]) == 1
    assert "published 'clipseg'" in capsys.readouterr().err


@pytest.mark.usefixtures("offline")
def test_fetch_says_what_it_found(
    clipseg: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models", "fetch", str(clipseg)]) == 0
    assert capsys.readouterr().out == f"{clipseg}\n"
    assert main(["models", "fetch", "florence2"]) == 1
    assert "HF_HUB_OFFLINE" in capsys.readouterr().err
    assert main(["models", "verify", "florence2"]) == 1
    assert "risam models fetch" in capsys.readouterr().err
    assert main(["models", "fetch", "refshapes-tiny"]) == 2


def test_training_does_not_start_from_a_published_model(
    clipseg: Path, repo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(repo / "configs" / "finetune_own_data.yaml")
    start = ["--set", f"init_from={clipseg}", "--set", f"output={tmp_path / 'out'}"]
    data = ["--set", f"train.annotations={repo / 'sample_data' / 'coco.json'}"]
    assert main(["train", config, *start, *data]) == 1
    told = capsys.readouterr().err
    assert "published 'clipseg'" in told
    assert "Traceback" not in told
    assert not (tmp_path / "out").exists()
