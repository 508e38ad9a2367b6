"""The engine of predict: one encode an image, order kept, memory adapted to."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from support.carried import in_order, numbered
from support.predict_fakes import SIZE, FakeModel, FakeNetwork

from risam_cli.data.images.frames import sam_frame
from risam_cli.data.images.images import read_for_encoder
from risam_cli.errors import DataError, ModelError, OutputError
from risam_cli.inference import feeder, pipeline
from risam_cli.inference.compute import Compute, ComputeSettings, Job, NetworkAnswer
from risam_cli.inference.finish import ImageResult
from risam_cli.inference.pipeline import PredictSettings, predict_samples
from risam_cli.masks import rle as masks
from risam_cli.model.fast.crew import threads_of
from risam_cli.types import Expression, Prediction, Sample

CPU = torch.device("cpu")
SETTINGS = PredictSettings(CPU)


@pytest.fixture(autouse=True, params=[1, 3], ids=lambda lanes: f"{lanes} lanes")
def _lanes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Images one after another, and three side by side."""
    with threads_of(request.param):
        yield


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Seven images of different sizes, half dark and half bright."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = []
    for number in range(7):
        rgb = np.zeros((20 + 5 * number, 40, 3), np.uint8)
        rgb[:, 10 + number : 30] = 255
        paths.append(folder / f"{number}.png")
        Image.fromarray(rgb).save(paths[-1])
    return paths


def sample(path: Path, *texts: str, size: tuple[int, int] | None = None) -> Sample:
    asked = tuple(
        Expression(f"{path.name}/{text}", text, number=number) for number, text in enumerate(texts)
    )
    return Sample(path.name, path, asked, size)


def predict(
    samples: Sequence[Sample], model: FakeModel | None = None, **changes: object
) -> list[ImageResult]:
    settings = PredictSettings(CPU, **changes)  # type: ignore[arg-type]
    return in_order(predict_samples(numbered(samples), model or FakeModel(), settings))


def told(results: Sequence[ImageResult]) -> list[tuple[str, int, float]]:
    return [(p.id, p.area, p.score) for result in results for p in result.predictions]


# --- order, grouping, independence ----------------------------------------------------------------


def test_a_mask_is_what_the_network_marked_at_the_images_size(pictures: list[Path]) -> None:
    (result,) = predict([sample(pictures[0], "bright one")])
    (prediction,) = result.predictions
    mask = masks.decode(prediction.segmentation)
    assert mask.shape == (20, 40) == (prediction.height, prediction.width)
    bright = np.asarray(Image.open(pictures[0]))[..., 0] > 0
    assert (mask & bright).sum() / (mask | bright).sum() > 0.8
    assert prediction.area == mask.sum()
    assert prediction.bbox == masks.bbox(prediction.segmentation)
    assert prediction.score == round(9 / 40, 6)
    assert not prediction.no_target
    assert set(result.seconds) == {"load", "encode", "decode", "finish"}
    assert result.sha256 is not None


def test_results_come_in_order_and_each_image_is_encoded_once(pictures: list[Path]) -> None:
    a, b, c = pictures[:3]
    asked = [sample(a, "x"), sample(b, "yy", "z"), sample(a, "www"), sample(c, "x"), sample(a)]
    asked += [sample(b, "x")]
    model = FakeModel()
    results = predict(asked, model)
    assert [result.sample for result in results] == asked
    assert len(model.network.encoded) == 3
    assert [len(result.predictions) for result in results] == [1, 2, 1, 1, 0, 1]
    alone = [predict([one])[0] for one in asked]
    assert told(results) == told(alone)


@pytest.mark.parametrize(
    "changes", [{"batch_size": 1}, {"batch_size": 3}, {"workers": 2}, {"lookahead": 2}]
)
def test_results_depend_on_no_batch_and_no_worker(
    pictures: list[Path], changes: dict[str, int]
) -> None:
    asked = [sample(path, "bright", "the brightest of all") for path in pictures * 3]
    strip = [(r.predictions, r.failures, r.sha256) for r in predict(asked)]
    assert [(r.predictions, r.failures, r.sha256) for r in predict(asked, **changes)] == strip


def test_the_source_is_not_read_far_ahead(pictures: list[Path]) -> None:
    read = 0

    def source() -> Iterator[tuple[Sample, int]]:
        nonlocal read
        for number in range(200):
            read += 1
            yield sample(pictures[number % 7], "x"), number

    results = predict_samples(source(), FakeModel(), PredictSettings(CPU, lookahead=16))
    for out, _ in enumerate(results):
        assert read <= out + 16 + 3


@pytest.mark.parametrize("workers", [0, 2])
def test_a_source_that_waits_is_answered_meanwhile(pictures: list[Path], workers: int) -> None:
    answered = threading.Event()

    def source() -> Iterator[tuple[Sample, int]]:
        yield sample(pictures[0], "x"), 0
        assert answered.wait(600), "no answer came while the source was waiting"
        yield sample(pictures[1], "x"), 1

    results = predict_samples(source(), FakeModel(), PredictSettings(CPU, workers=workers))
    assert next(results)[0] == 0
    answered.set()
    assert [number for number, _ in results] == [1]


def test_a_source_that_breaks_gives_what_came_before_it(pictures: list[Path]) -> None:
    def source() -> Iterator[tuple[Sample, int]]:
        yield sample(pictures[0], "x"), 0
        yield sample(pictures[1], "x"), 1
        raise DataError("the manifest is gone")

    results = predict_samples(source(), FakeModel(), SETTINGS)
    assert [next(results)[0], next(results)[0]] == [0, 1]
    with pytest.raises(DataError, match="the manifest is gone"):
        next(results)


def test_stopping_ends_after_what_was_begun(pictures: list[Path]) -> None:
    stop = threading.Event()
    asked = [sample(path, "x") for path in pictures * 4]
    network = FakeNetwork()

    def hold(pixels: torch.Tensor) -> None:
        assert len(network.encoded) < 2 or stop.wait(600), "nobody stopped it"

    network.before_encode = hold
    settings = PredictSettings(CPU, batch_size=2)
    got = []
    for number, _ in predict_samples(numbered(asked), FakeModel(network), settings, stop=stop):
        got.append(number)
        stop.set()
    assert got == list(range(len(got)))
    assert 1 <= len(got) < len(asked)


def test_leaving_early_leaves_no_thread(pictures: list[Path]) -> None:
    before = set(threading.enumerate())
    asked = numbered(sample(p, "x") for p in pictures * 9)
    results = predict_samples(asked, FakeModel(), SETTINGS)
    next(results)
    results.close()
    deadline = time.monotonic() + 120
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not set(threading.enumerate()) - before


# --- side by side ---------------------------------------------------------------------------------


def test_a_cpu_takes_images_side_by_side_and_each_once(pictures: list[Path]) -> None:
    meeting = threading.Barrier(3)
    network = FakeNetwork(before_encode=lambda pixels: meeting.wait(600) and None)
    asked = [sample(path, "bright", "x") for path in pictures[:6]]
    results = predict(asked, FakeModel(network), cores=3)
    assert network.encoded == [1] * 6
    assert told(results) == told(predict(asked, cores=1))


def test_an_image_that_is_alone_has_all_cores_in_the_encoder(
    pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run's only image, the last of a run, and one that a person waits for before typing on."""
    threads: list[int] = []
    network = FakeNetwork(before_encode=lambda pixels: threads.append(torch.get_num_threads()))
    predict([sample(pictures[0], "bright")], FakeModel(network), cores=4)
    assert threads == [4]

    answers: list[int] = []
    running: list[pipeline._Network[int]] = []
    start = pipeline._Network.start
    monkeypatch.setattr(
        pipeline._Network, "start", lambda self: (running.append(self), start(self))
    )

    def typed() -> Iterator[tuple[Sample, int]]:
        for number, path in enumerate(pictures[:2]):
            yield sample(path, "bright"), number
            while len(answers) <= number or running[0]._busy:  # its work is not yet put away
                time.sleep(0.01)

    settings = PredictSettings(CPU, cores=4)
    answers.extend(number for number, _ in predict_samples(typed(), FakeModel(network), settings))
    assert answers == [0, 1]
    assert threads == [4, 4, 4]


def test_images_that_are_not_alone_keep_to_their_share(
    pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeder, "_IDLE", 60.0)  # nor is one alone because the next is slow to come
    meeting, threads = threading.Barrier(3), list[int]()

    def encode(pixels: object) -> None:
        threads.append(torch.get_num_threads())
        meeting.wait(600)

    asked = [sample(path, "bright") for path in pictures[:6]]
    predict(asked, FakeModel(FakeNetwork(before_encode=encode)), cores=3)
    assert threads == [1] * 6


def test_a_device_that_fails_in_one_lane_ends_the_run_after_what_came_before(
    pictures: list[Path],
) -> None:
    """The first image takes its time, the second breaks the device, the others would go on."""
    broken = threading.Event()

    def encode(pixels: torch.Tensor) -> None:
        wide = int((pixels[0, 0] > 0).sum(1).amax())  # of the bright part: less, image by image
        if wide == first:
            assert broken.wait(600)
        elif wide == second:
            broken.set()
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    frame = sam_frame(SIZE)
    inputs = [frame.batch([read_for_encoder(path, [frame]).rgb]).values for path in pictures[:2]]
    first, second = (int((one[0, 0] > 0).sum(1).amax()) for one in inputs)
    assert first != second
    results = predict_samples(
        numbered(sample(path, "x") for path in pictures),
        FakeModel(FakeNetwork(before_encode=encode)),
        PredictSettings(CPU, cores=3),
    )
    assert next(results)[0] == 0
    with pytest.raises(ModelError, match="illegal memory access"):
        next(results)


def test_out_of_memory_side_by_side_is_none_alone(
    pictures: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    lock, inside = threading.Lock(), []
    both = threading.Event()

    def check(batch: torch.Tensor) -> None:
        with lock:
            inside.append(batch)
            crowded = len(inside) > 1
        try:
            if crowded:
                both.set()
                raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
            assert both.wait(600), "no second image came"
        finally:
            with lock:
                inside.pop()

    asked = [sample(path, "bright", "x") for path in pictures]
    results = predict(asked, FakeModel(FakeNetwork(before_encode=check)), cores=2)
    assert not any(result.failures for result in results)
    assert told(results) == told(predict(asked, cores=1))
    assert "2 images side by side; continuing with 1" in capsys.readouterr().err


# --- failures -------------------------------------------------------------------------------------


def test_a_bad_image_fails_each_of_its_expressions_and_nothing_else(
    pictures: list[Path], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_text("no image at all")
    results = predict([sample(pictures[0], "x"), sample(bad, "a", "b"), sample(pictures[1], "x")])
    assert [len(result.predictions) for result in results] == [1, 0, 1]
    failures = results[1].failures
    assert [(f.id, f.expression, f.stage, f.error) for f in failures] == [
        ("bad.jpg/a", "a", "decode", "ImageError"),
        ("bad.jpg/b", "b", "decode", "ImageError"),
    ]
    assert "holds text" in failures[0].message
    assert results[1].sha256 is None
    assert results[1].stamp is not None


def test_an_image_of_another_size_than_its_data_set_says(pictures: list[Path]) -> None:
    good, bad = sample(pictures[0], "x", size=(20, 40)), sample(pictures[0], "y", size=(40, 20))
    results = predict([good, bad])
    assert [len(result.predictions) for result in results] == [1, 0]
    (failure,) = results[1].failures
    assert "40x20, its annotation says 20x40" in failure.message
    assert failure.stage == "decode"


def test_numbers_that_are_not_finite_fail_their_expression(pictures: list[Path]) -> None:
    (result,) = predict([sample(pictures[0], "x", "thirteen long", "x" * 13, "yy")])
    assert [p.expression for p in result.predictions] == ["x", "thirteen long", "yy"]
    (failure,) = result.failures
    assert (failure.stage, failure.expression) == ("predict", "x" * 13)
    assert "not finite" in failure.message


def test_long_expressions_are_cut_and_the_record_says_so(pictures: list[Path]) -> None:
    (result,) = predict([sample(pictures[0], "a b c d e f g h", "a b c d e f g h i")])
    assert [p.notes for p in result.predictions] == [(), ("expression cut to 8 tokens",)]
    assert result.predictions[0].segmentation == result.predictions[1].segmentation


# --- no target ------------------------------------------------------------------------------------

NOTHING = "nothing of that kind there"  # 22 letters: probability sigmoid(1.5)


def test_where_nothing_fits_the_mask_is_empty(pictures: list[Path]) -> None:
    probability = 1 / (1 + np.exp(-1.5))
    for bar, nothing in ((0.5, True), (0.9, False), (None, True), (0.0, True), (1.0, False)):
        (result,) = predict([sample(pictures[0], NOTHING)], no_target_threshold=bar, keep_raw=True)
        (prediction,), (raw,) = result.predictions, result.raw
        assert prediction.no_target is nothing
        assert (prediction.area == 0) is nothing
        assert raw.no_target == pytest.approx(probability)
        assert raw.iou == pytest.approx(22 / 40)
        assert masks.area(raw.mask) > 0
        assert prediction.score == pytest.approx(probability if nothing else 22 / 40, abs=1e-6)
        if nothing:
            assert prediction.bbox == (0, 0, 0, 0)
            assert prediction.segmentation == masks.empty((20, 40))


def test_the_threshold_decides_on_pixels(pictures: list[Path]) -> None:
    areas = [
        predict([sample(pictures[3], "bright")], threshold=threshold)[0].predictions[0].area
        for threshold in (0.0, 0.3, 0.5, 0.7, 1.0)
    ]
    assert areas[0] == 35 * 40
    assert areas[-1] == 0
    assert areas == sorted(areas, reverse=True)


# --- memory ---------------------------------------------------------------------------------------


def compute(network: FakeNetwork, images: int = 8, expressions: int = 8, **more: int) -> Compute:
    """As on a GPU: in batches."""
    settings = ComputeSettings(CPU, 0.5, images, expressions, **more)
    made = Compute(FakeModel(network), settings)
    made.images_at_once, made._by_sample = images, False
    return made


def jobs(pictures: list[Path], *texts: str) -> list[Job]:
    return [Job(read_for_encoder(path, [sam_frame(SIZE)]), texts) for path in pictures]


def outcome(answers: Sequence[NetworkAnswer]) -> list[tuple[int, int, int]]:
    areas = [int(answer.masks[0].sum()) if answer.masks else -1 for answer in answers]
    return [(a.job, a.text, area) for a, area in zip(answers, areas, strict=True)]


def limit(most: int) -> object:
    def check(batch: torch.Tensor) -> None:
        if len(batch) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    return check


def test_batches_and_chunks_give_the_same_as_one_by_one(pictures: list[Path]) -> None:
    work = jobs(pictures, "x", "bright thing", "yy")
    network = FakeNetwork()
    together = list(compute(network).run(work))
    assert network.encoded == [7]
    assert network.decoded == [8, 8, 5]
    alone = FakeNetwork()
    assert outcome(together) == outcome(list(compute(alone, 1, 1).run(work)))
    assert alone.encoded == [1] * 7
    assert alone.decoded == [1] * 21


def test_on_a_cpu_nothing_goes_together_but_the_texts_of_one_sample(pictures: list[Path]) -> None:
    network = FakeNetwork()
    image = read_for_encoder(pictures[0], [sam_frame(SIZE)])
    work = [Job(image, list("abcdef"), [1, 3, 0, 2]), Job(image, list("gh")), Job(image, ["i"])]
    answers = list(Compute(FakeModel(network), ComputeSettings(CPU, 0.5, 8)).run(work))
    assert network.encoded == [1, 1, 1]
    assert network.decoded == [1, 3, 2, 2, 1]
    assert [(a.job, a.text) for a in answers] == [
        *((0, text) for text in range(6)),
        (1, 0),
        (1, 1),
        (2, 0),
    ]


def test_out_of_memory_halves_the_batch_and_remembers(
    pictures: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    work = jobs(pictures, "x", "yy")
    wanted = outcome(list(compute(FakeNetwork()).run(work)))
    network = FakeNetwork(before_encode=limit(3), before_decode=limit(4))  # type: ignore[arg-type]
    running = compute(network)
    assert outcome(list(running.run(work))) == wanted
    assert max(network.encoded) <= 3
    assert max(network.decoded) <= 4
    encoded = len(network.encoded)
    assert outcome(list(running.run(work))) == wanted
    assert network.encoded[encoded:] == [3, 3, 1]  # at once with what had fitted
    assert "continuing with 3" in capsys.readouterr().err


def test_out_of_memory_alone_fails_alone(pictures: list[Path]) -> None:
    def no_bright_image(pixels: torch.Tensor) -> None:
        if (pixels.amax(dim=(1, 2, 3)) > 2.5).any():
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    dark = Job(read_for_encoder(pictures[0], [sam_frame(SIZE)]), ("x",))
    dark.image.rgb[:] //= 2
    network = FakeNetwork(before_encode=no_bright_image)
    answers = list(compute(network).run([*jobs(pictures[:2], "x"), dark]))
    assert [answer.error != "" for answer in answers] == [True, True, False]
    assert "out of memory even alone" in answers[0].error
    assert answers[0].error_kind == "OutOfMemory"
    network = FakeNetwork(before_decode=limit(0))  # type: ignore[arg-type]
    answers = list(compute(network).run(jobs(pictures[:1], "x", "yy")))
    assert [answer.error_kind for answer in answers] == ["OutOfMemory"] * 2


def test_chunks_keep_within_the_memory_for_masks(pictures: list[Path]) -> None:
    network = FakeNetwork()
    settings = ComputeSettings(CPU, 0.5, 8, 8, mask_bytes=3 * 4 * 20 * 40)
    running = Compute(FakeModel(network), settings)
    list(running.run(jobs(pictures[:1], *("x" * n for n in range(1, 8)))))
    assert network.decoded == [3, 3, 1]


def test_an_error_of_one_image_leaves_the_others(pictures: list[Path]) -> None:
    def one_is_bad(pixels: torch.Tensor) -> None:
        if (pixels[:, 0, 3] > 0).sum(1).eq(16).any():  # the first picture's width of bright
            raise ValueError("a shape\nthat does not fit")

    network = FakeNetwork(before_encode=one_is_bad)
    answers = list(compute(network).run(jobs(pictures[:4], "x")))
    failed = [answer.job for answer in answers if answer.error]
    assert failed
    assert len(failed) < 4
    assert answers[failed[0]].error == "a shape that does not fit"
    assert answers[failed[0]].error_kind == "ValueError"
    assert [answer.job for answer in answers] == [0, 1, 2, 3]


def test_an_error_of_one_expression_leaves_the_others(pictures: list[Path]) -> None:
    def one_is_bad(sums: torch.Tensor) -> None:
        if (sums == 3).any():
            raise IndexError("out of the vocabulary")

    network = FakeNetwork(before_decode=one_is_bad)
    answers = list(compute(network).run(jobs(pictures[:2], "x", "www", "yy")))
    assert [(a.job, a.text, a.error) for a in answers] == [
        (job, text, "out of the vocabulary" if text == 1 else "")
        for job in range(2)
        for text in range(3)
    ]


def test_a_lost_device_ends_the_run(pictures: list[Path]) -> None:
    def lost(pixels: torch.Tensor) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(ModelError, match="the device failed"):
        list(compute(FakeNetwork(before_encode=lost)).run(jobs(pictures, "x")))


def test_the_same_expressions_are_encoded_once(pictures: list[Path]) -> None:
    network = FakeNetwork()
    texts = 0
    encode_text = network.encode_text

    def counted(ids: torch.Tensor, mask: torch.Tensor) -> object:
        nonlocal texts
        texts += len(ids)
        return encode_text(ids, mask)

    network.encode_text = counted  # type: ignore[method-assign, assignment]
    list(compute(network, 1, 1).run(jobs(pictures, "x", "yy")))
    assert texts == 2


# --- the sink -------------------------------------------------------------------------------------


class Sink:
    """Keeps masks in memory; fails as told."""

    def __init__(self, error: Exception | None = None, at_finish: bool = False) -> None:
        self.kept: dict[str, NDArray[np.bool_]] = {}
        self.finished: list[tuple[str, int]] = []
        self.error, self.at_finish = error, at_finish

    def save(
        self,
        sample: Sample,
        expression: Expression,
        mask: NDArray[np.bool_],
        instance: int | None = None,
    ) -> str | None:
        if self.error is not None and not self.at_finish and expression.text == "bad":
            raise self.error
        self.kept[expression.id] = mask
        return f"masks/{expression.id}"

    def finish(self, sample: Sample, predictions: Sequence[Prediction]) -> None:
        if self.error is not None and self.at_finish:
            raise self.error
        self.finished.append((sample.image, len(predictions)))


def test_the_sink_gets_every_mask(pictures: list[Path]) -> None:
    sink = Sink()
    asked = [sample(path, "x", NOTHING) for path in pictures]
    results = in_order(predict_samples(numbered(asked), FakeModel(), SETTINGS, sink=sink))
    assert sorted(sink.finished) == [(path.name, 2) for path in pictures]
    for result in results:
        for prediction in result.predictions:
            assert prediction.mask == f"masks/{prediction.id}"
            kept = sink.kept[prediction.id]
            assert (kept == masks.decode(prediction.segmentation)).all()


@pytest.mark.parametrize("at_finish", [False, True])
def test_a_mask_that_cannot_be_written_fails_its_item(
    pictures: list[Path], at_finish: bool
) -> None:
    sink = Sink(OSError(errno.ENAMETOOLONG, "File name too long", "x.png"), at_finish)
    asked = [sample(pictures[0], "x", "bad")]
    (result,) = in_order(predict_samples(numbered(asked), FakeModel(), SETTINGS, sink=sink))
    assert len(result.failures) == (2 if at_finish else 1)
    assert len(result.predictions) == 2 - len(result.failures)
    assert result.failures[-1].stage == "write"
    assert "File name too long" in result.failures[-1].message


@pytest.mark.parametrize("at_finish", [False, True])
def test_a_full_disk_ends_the_run(pictures: list[Path], at_finish: bool) -> None:
    sink = Sink(OSError(errno.ENOSPC, "No space left on device", "x.png"), at_finish)
    asked = [sample(path, "bad") for path in pictures]
    with pytest.raises(OutputError, match=r"x\.png: No space left on device; check disk space"):
        list(predict_samples(numbered(asked), FakeModel(), SETTINGS, sink=sink))
