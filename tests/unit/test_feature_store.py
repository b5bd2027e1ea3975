"""The feature cache on disk: what is kept of an image, when it counts, and what is said where it is not."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as PILImage
from rich.console import Console

from partwise.config import load_config
from partwise.data.features import STALE_SECONDS, FeatureStore, StoredImage, known_image
from partwise.data.pixels import REAL_TILES
from partwise.errors import CheckpointError, ConfigError, DataError, TrainingError
from partwise.model.load import empty_model
from partwise.model.tower import Cut, find_cut, read_tower
from partwise.preflight import CHECKS, Context, collect_findings
from partwise.preflight.features import check_features
from partwise.records import Image
from partwise.training import fill
from partwise.training.fill import fill_cache
from partwise.training.job import Job

FAMILIES = ("gemma3", "llava", "llava-next")
QUIET = Console(quiet=True)
MakeJob = Callable[..., Job]


@pytest.fixture
def make_job(tmp_path: Path, tiny_folder: Callable[[str], Path], make_image: Callable) -> MakeJob:
    """A job over three rows with images and one without, and an evaluation row with an image of its own."""
    for name, size in {"a": (56, 56), "b": (56, 30), "c": (30, 56), "d": (40, 40)}.items():
        make_image(size, color={"a": "red", "b": "blue", "c": "green", "d": "black"}[name]).save(
            tmp_path / f"{name}.png"
        )

    def row(*names: str) -> str:
        text = {"prompt": "<image>" * len(names) + "what is it?", "completion": "a disc"}
        return json.dumps({**text, "images": [f"{name}.png" for name in names]}) + "\n"

    (tmp_path / "rows.jsonl").write_text(row("a") + row("b", "c") + row() + row("a"))
    (tmp_path / "eval.jsonl").write_text(row("d"))

    def make(family: str = "gemma3", only_looks: bool = False, **changes: Any) -> Job:
        config = {
            "model": {"path": str(changes.get("path", tiny_folder(family))), "dtype": "float32"},
            "parts": changes.get("parts", {"projector": "full"}),
            "data": {
                "train": str(tmp_path / "rows.jsonl"),
                "eval": str(tmp_path / "eval.jsonl"),
                "max_seq_len": 256,
                "num_workers": 0,
                "feature_cache": changes.get("feature_cache", str(tmp_path / "cache")),
            },
            "train": {"steps": 1, "global_batch_size": 2, "micro_batch_size": 2},
            "output": str(tmp_path / "run"),
        }
        (tmp_path / "config.yaml").write_text(json.dumps(config, indent=1))
        return Job(load_config(tmp_path / "config.yaml"), only_looks=only_looks)

    return make


def store_of(job: Job) -> FeatureStore:
    assert job.store is not None
    return job.store


def feature_files(job: Job) -> list[Path]:
    return sorted(path for path in store_of(job).folder.glob("??/*") if path.is_file())


def some_image(value: float = 1.0) -> StoredImage:
    return StoredImage(torch.full((1, 1, 4, 8), value), (1, 3, 56, 56), {"num_crops": torch.tensor([0])})


def same(one: StoredImage | None, other: StoredImage) -> bool:
    return (
        one is not None
        and one.shape == other.shape
        and torch.equal(one.features, other.features)
        and one.facts.keys() == other.facts.keys()
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_become_the_same_tokens_without_their_images_being_decoded(
    make_job: MakeJob, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(family)
    whole = [job.pixel_format.encode(row).example for row in fill.all_rows(job)]
    fill_cache(job, QUIET)
    monkeypatch.setattr("partwise.data.chat.decode_picture", None)
    monkeypatch.setattr("partwise.data.features.decode_picture", None)
    chat_format = pickle.loads(pickle.dumps(job.chat_format))
    for example, row in zip(whole, fill.all_rows(job), strict=True):
        kept = chat_format.encode(row).example
        assert torch.equal(kept.input_ids, example.input_ids)
        assert torch.equal(kept.labels, example.labels)
        assert kept.media.keys() == example.media.keys() - {REAL_TILES}
        assert kept.token_fields.keys() == example.token_fields.keys()
        for name, tensor in example.media.items():
            if name == REAL_TILES:
                continue
            if name == "pixel_values":
                assert kept.media[name].shape[:-3] == tensor.shape[:-3]
                assert kept.media[name].shape[-3] == 1
            else:
                assert torch.equal(kept.media[name], tensor)


def test_what_is_kept_comes_back(tmp_path: Path) -> None:
    store, image = FeatureStore(tmp_path, {"tower": "a"}), some_image()
    assert store.read("ab" * 20) is None
    assert store.write("ab" * 20, image) == store.path("ab" * 20).stat().st_size
    assert same(store.read("ab" * 20), image)


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "zeros", "foreign"])
def test_a_file_that_is_not_what_was_written_counts_as_missing(tmp_path: Path, damage: str) -> None:
    store, key = FeatureStore(tmp_path, {}), "ab" * 20
    store.write(key, some_image())
    path = store.path(key)
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[:-1])
    elif damage == "bit":
        content[-1] ^= 1
        path.write_bytes(content)
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "zeros":
        path.write_bytes(bytes(len(content)))
    else:
        store.write("cd" * 20, some_image(2.0))
        shutil.copy(store.path("cd" * 20), path)
    assert store.read(key) is None


def test_a_damaged_file_is_made_again_and_until_then_named(make_job: MakeJob) -> None:
    job = make_job()
    fill_cache(job, QUIET)
    damaged = feature_files(job)[0]
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[: len(whole) // 2])
    rows = list(fill.all_rows(job))
    with pytest.raises(
        DataError, match=r"the features of image .* are damaged. Make them with: partwise cac"
    ):
        for row in rows:
            job.chat_format(row)
    fill_cache(job, QUIET)  # looks at nothing: all images were there once
    assert damaged.read_bytes() != whole
    fill_cache(job, QUIET, again=True)
    assert damaged.read_bytes() == whole


def test_an_image_that_changed_under_its_path_is_not_taken_for_the_old_one(
    make_job: MakeJob, tmp_path: Path, make_image: Callable
) -> None:
    job = make_job()
    fill_cache(job, QUIET)
    make_image((56, 56), color="yellow").save(tmp_path / "a.png")
    with pytest.raises(
        DataError, match=r"rows.jsonl:1: the features of image .*a.png.* are missing: it is new"
    ):
        job.chat_format(job.rows[0])
    before = len(feature_files(job))
    fill_cache(job, QUIET, again=True)
    assert len(feature_files(job)) == before + 1
    job.chat_format(job.rows[0])


def test_the_key_is_of_the_bytes_or_the_pixels(tmp_path: Path) -> None:
    picture = PILImage.new("RGB", (4, 4), "red")
    for name in ("one.png", "two.png"):
        picture.save(tmp_path / name)
    (one, image), (two, _) = (known_image(Image(str(tmp_path / n), n), "row") for n in ("one.png", "two.png"))
    assert one == two
    assert image.source == (tmp_path / "one.png").read_bytes()
    assert known_image(Image(image.source, ""), "row")[0] == one
    pixels = [
        known_image(Image(PILImage.new("RGB", (4, 4), c), ""), "row")[0] for c in ("red", "red", "blue")
    ]
    assert pixels[0] == pixels[1] != pixels[2]
    with pytest.raises(DataError, match="does not exist"):
        known_image(Image(str(tmp_path / "none.png"), "none.png"), "row")


def test_another_tower_or_processor_has_a_folder_of_its_own(
    make_job: MakeJob, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    first = store_of(make_job()).folder
    copies = {name: tmp_path / name for name in ("same", "tower", "decoder", "processor")}
    for folder in copies.values():
        shutil.copytree(tiny_folder("gemma3"), folder)
    for name in ("tower", "decoder"):
        weights = load_file(copies[name] / "model.safetensors")
        key = next(k for k in weights if ("vision_tower" in k) == (name == "tower"))
        weights[key] = weights[key] + 1
        save_file(weights, copies[name] / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((copies["processor"] / "processor_config.json").read_text())
    settings["image_processor"]["image_mean"] = [0.1, 0.1, 0.1]
    (copies["processor"] / "processor_config.json").write_text(json.dumps(settings))
    folders = {name: store_of(make_job(path=folder)).folder for name, folder in copies.items()}
    assert folders["same"] == folders["decoder"] == first
    assert len({first, folders["tower"], folders["processor"]}) == 3


def test_a_fill_that_was_cut_off_goes_on_where_it_was(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job()
    monkeypatch.setattr(fill, "NUM_TILES", 1)
    write, written = FeatureStore.write, []

    def fails_late(store: FeatureStore, key: str, image: StoredImage) -> int:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(key)
        return write(store, key, image)

    monkeypatch.setattr(FeatureStore, "write", fails_late)
    with pytest.raises(KeyboardInterrupt):
        fill_cache(job, QUIET)
    assert not store_of(job).has_all(job.data_fingerprint)
    made: list[str] = []
    monkeypatch.setattr(FeatureStore, "write", lambda *a: (made.append(a[1]), write(*a))[1])
    fill_cache(job, QUIET)
    assert len(made) == 2
    assert not set(made) & set(written)
    assert len(feature_files(job)) == 4
    assert store_of(job).has_all(job.data_fingerprint)
    assert json.loads((store_of(job).folder / "manifest.json").read_text())["num_images"] == 4


def test_a_disk_that_refuses_is_said_and_leaves_nothing_torn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FeatureStore(tmp_path, {})
    store.write("ab" * 20, some_image())

    def full(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(TrainingError, match=r"data.feature_cache: cannot write .*No space left.*free space"):
        store.write("cd" * 20, some_image())
    monkeypatch.undo()
    assert store.read("cd" * 20) is None
    assert not list(tmp_path.glob("**/.*"))
    assert same(store.read("ab" * 20), some_image())


def _write_often(root: Path, value: float) -> None:
    store = FeatureStore(root, {})
    for _ in range(200):
        store.write("ab" * 20, some_image(value))


def test_two_processes_that_write_the_same_image_never_show_half_of_it(tmp_path: Path) -> None:
    processes = [
        multiprocessing.get_context("fork").Process(target=_write_often, args=(tmp_path, value))
        for value in (1.0, 2.0)
    ]
    store, key = FeatureStore(tmp_path, {}), "ab" * 20
    store.write(key, some_image())
    for process in processes:
        process.start()
    num_reads = 0
    while any(process.is_alive() for process in processes):
        found = store.read(key)
        assert same(found, some_image(1.0)) or same(found, some_image(2.0))
        num_reads += 1
    assert num_reads > 0
    assert [process.exitcode for process in processes] == [0, 0]


def test_only_old_leftovers_are_swept(tmp_path: Path) -> None:
    import os

    store = FeatureStore(tmp_path, {})
    store.write("ab" * 20, some_image())
    young, old = (store.folder / "ab" / f".{n}.1.partial" for n in ("young", "old"))
    for path in (young, old):
        path.write_bytes(b"")
    past = old.stat().st_mtime - STALE_SECONDS - 10
    os.utime(old, (past, past))
    store.sweep()
    assert young.exists() and not old.exists()
    assert store.read("ab" * 20) is not None


@pytest.mark.parametrize("kernel", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_averages_come_back_bit_for_bit(kernel: int, dtype: torch.dtype) -> None:
    """Equal numbers all over a block would not do: their sum rounds."""
    cut = Cut("tower", (), kernel)
    features = torch.randn(3, 1, 16, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    states = cut.states(features)
    assert states.shape == (3, 16 * kernel**2, 8)
    grid = states.transpose(1, 2).unflatten(2, (4 * kernel, 4 * kernel))
    pooled = torch.nn.AvgPool2d(kernel, kernel)(grid.contiguous()).flatten(2).transpose(1, 2)
    assert torch.equal(pooled, features[:, 0])
    assert torch.equal(cut.features(replace_output(states)), features)


def replace_output(states: torch.Tensor) -> Any:
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    return BaseModelOutputWithPooling(last_hidden_state=states)


def test_a_tower_that_is_not_whole_is_refused(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(tiny_folder("llava"), folder)
    weights = load_file(folder / "model.safetensors")
    del weights[next(name for name in weights if "vision_tower" in name)]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    empty = empty_model(folder)
    cut = find_cut(empty)
    assert cut is not None
    with pytest.raises(CheckpointError, match="the weights of the vision tower do not fit"):
        read_tower(folder, empty, cut, torch.float32, "sdpa")


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_tower_that_trains_cannot_be_kept(make_job: MakeJob, mode: str) -> None:
    with pytest.raises(ConfigError, match=rf"config.yaml:\d+: data.feature_cache.*vision_tower.mode: {mode}"):
        make_job(parts={"vision_tower": mode, "projector": "full"})
    with pytest.raises(ConfigError, match=r"parts.vision_tower.quantization: nf4 beside data.feature_cache"):
        make_job(parts={"vision_tower": {"mode": "frozen", "quantization": "nf4"}, "projector": "full"})


def test_a_type_whose_projector_is_in_the_tower_is_refused(make_job: MakeJob) -> None:
    job = make_job("qwen2-vl")
    with pytest.raises(
        ConfigError, match=r"config.yaml:\d+: data.feature_cache: features of qwen2_vl cannot"
    ):
        fill_cache(job, QUIET)


def test_a_tower_that_takes_all_images_as_one_has_no_cut() -> None:
    from transformers import LlavaConfig, LlavaForConditionalGeneration, PixtralVisionConfig

    vision = PixtralVisionConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    config = LlavaConfig(vision_config=vision, vision_feature_layer=-1)
    with torch.device("meta"):
        assert find_cut(LlavaForConditionalGeneration(config)) is None


def test_check_says_what_is_there_and_what_it_will_take(make_job: MakeJob) -> None:
    context = Context(make_job(only_looks=True))
    assert context.job.features is None  # the tower runs where nobody fills the cache
    (finding,) = check_features(context)
    assert "has 0 of 4 images" in finding.message
    job = make_job()
    fill_cache(job, QUIET)
    taken = sum(path.stat().st_size for path in feature_files(job))
    kept = sum(store_of(job).read(f"{p.parent.name}{p.name}").features.nbytes for p in feature_files(job))  # type: ignore[union-attr]
    assert finding.values["missing_bytes"] == kept < taken
    (finding,) = check_features(Context(make_job(only_looks=True)))
    assert "has 4 of 4 images" in finding.message
    assert finding.message.endswith("no step runs the vision tower")


def test_check_refuses_a_cache_that_does_not_fit(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    (finding,) = check_features(Context(make_job(only_looks=True)))
    assert finding.level == "error"


def test_check_without_a_cache_says_nothing_and_with_one_counts_no_tower(make_job: MakeJob) -> None:
    plain, kept = Context(make_job(feature_cache=None)), Context(make_job())
    assert check_features(plain) == []
    memory = [
        next(f for f in collect_findings(context, CHECKS) if f.check == "memory") for context in (plain, kept)
    ]
    assert memory[1].values["peak_bytes"] < memory[0].values["peak_bytes"]
    tower = plain.job.plan["vision_tower"].num_parameters
    assert memory[0].values["peak_bytes"] - memory[1].values["peak_bytes"] >= 4 * tower


def test_the_model_has_no_tower_and_the_plan_still_lists_it(make_job: MakeJob) -> None:
    job = make_job()
    fill_cache(job, QUIET)
    model = job.open_model().model
    assert not [name for name, _ in model.named_parameters() if "vision_tower" in name]
    assert job.plan["vision_tower"].num_parameters > 0
    skeleton = job.open_skeleton().model
    assert [n for n, _ in skeleton.named_parameters()] == [n for n, _ in model.named_parameters()]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_model_is_written_with_the_tower_of_its_folder(
    make_job: MakeJob, family: str, tmp_path: Path
) -> None:
    """Also where all that is left of the model trains, so that nothing of it seems to be missing."""
    from safetensors.torch import load_file

    from partwise.training.checkpoint import write_model

    job = make_job(family, parts={"projector": "full", "language_model": "full"})
    fill_cache(job, QUIET)
    loaded = job.open_model()
    with torch.no_grad():
        loaded.model.get_output_embeddings().weight.add_(1)
    (tmp_path / "final").mkdir()
    write_model(tmp_path / "final", loaded, job.plan)
    base, written = (load_file(Path(p) / "model.safetensors") for p in (loaded.path, tmp_path / "final"))
    assert written.keys() == base.keys()
    changed = {name for name in base if not torch.equal(base[name], written[name])}
    assert len(changed) == 1
    assert not any("vision_tower" in name for name in changed)


def test_probes_have_the_pixels_that_a_whole_model_takes(make_job: MakeJob) -> None:
    from partwise.training.probe import probe_examples

    job = make_job()
    fill_cache(job, QUIET)
    examples = probe_examples(job.loader)
    with_image = next(example for example in examples if example.media)
    assert with_image.image_inputs is not None
    assert with_image.image_inputs["pixel_values"].shape[-3:] == (3, 56, 56)
    assert with_image.media["pixel_values"].shape[-3] == 1
    assert all(not example.image_inputs for example in examples if not example.media)
