"""Stage embed: images are embedded or rejected with a reason; any number of encoders gives the same bytes."""

import os
import shutil
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data
from PIL import Image

from elfs_ray.pool.images import decode_proxy_image
from elfs_ray.stages.embed import EmbedResult, ray_stream, worker
from elfs_ray.stages.embed import blocks as embed_blocks
from elfs_ray.stages.embed import run as embed
from elfs_ray.stages.index import IndexResult
from elfs_ray.stages.index import run as index
from elfs_ray.storage import schema
from elfs_ray.storage.run_dir import RunDir
from tests.embedding import embed_in_this_process
from tests.image_files import encode, grey_png
from tests.tables import contents, digits_config, mark

SIZE = 16
NUM_DIGITS = 40
TABLES = ("embeddings", "proxy_images", "rejected")
NETWORK = ("embed.encoder=torchvision/squeezenet1_1", "embed.weights=random:0", "embed.image_size=64")
OPENVINO = (*NETWORK, "embed.runtime=openvino", "embed.precision=fp32")
JOB = Path(__file__).parent.parent.parent / "jobs" / "cifar10.py"
REASONS = {
    "bomb.png": "200000x200000 pixels, more than embed.max_image_pixels=300000",
    "empty.png": "empty file (0 bytes)",
    "floats.tiff": "floating-point pixels have no defined white; convert the image to 8 or 16 bits",
    "huge.png": "700x700 pixels, more than embed.max_image_pixels=300000",
    "text.jpg": "not an image that Pillow can read (12 bytes)",
    "truncated.jpg": "OSError: image file is truncated",
    "truncated.png": "OSError: image file is truncated",
    "white.bmp": "one colour alone, in which pixels differ from nothing",  # with the encoder `pixels`
}


def good_files(photographs: list[Image.Image]) -> dict[str, tuple[bytes, Image.Image]]:
    """Yield the name, the bytes and the upright 8-bit RGB image of photographs in many formats."""
    wide, one_pixel = photographs[1].resize((3000, 10)), photographs[1].resize((1, 1))
    square, other = (photograph.crop((100, 0, 500, 400)) for photograph in photographs)
    grey = square.convert("L")
    palette = square.quantize(64)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    alpha = Image.linear_gradient("L").resize(square.size)
    transparent = square.copy()
    transparent.putalpha(alpha)
    on_white = Image.composite(square, Image.new("RGB", square.size, "white"), alpha)
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    animation = encode(palette, "GIF", save_all=True, append_images=[other.quantize(64)], duration=40)
    return {
        "alpha.png": (encode(transparent, "PNG"), on_white),
        "animated.gif": (animation, palette.convert("RGB")),
        "cmyk.jpg": (encode(square.convert("CMYK"), "JPEG"), square),
        "deep.png": (encode(deep, "PNG"), grey.convert("RGB")),
        "grey.jpg": (encode(grey, "JPEG"), grey.convert("RGB")),
        "one_pixel.png": (encode(one_pixel, "PNG"), one_pixel),
        "palette.png": (encode(palette, "PNG"), palette.convert("RGB")),
        "photograph.JPEG": (encode(photographs[0], "JPEG"), photographs[0]),
        "turned.jpg": (encode(square, "JPEG", exif=turned), square.transpose(Image.Transpose.ROTATE_270)),
        "wide.webp": (encode(wide, "WEBP", lossless=True), wide),
    }


def bad_files(photographs: list[Image.Image]) -> dict[str, bytes]:
    photograph = photographs[1]
    return {
        "bomb.png": grey_png(200_000, 200_000, zlib.compress(b"\0" * 100_000)),
        "empty.png": b"",
        "floats.tiff": encode(photograph.convert("F"), "TIFF"),
        "huge.png": encode(photograph.resize((700, 700)), "PNG"),
        "text.jpg": b"not an image",
        "truncated.jpg": encode(photograph, "JPEG")[:20_000],
        "truncated.png": encode(photograph, "PNG")[:50_000],
        "white.bmp": encode(Image.new("RGB", (50, 60), "white"), "BMP"),
    }


@pytest.fixture(scope="module")
def pool(digit_pools, photographs, tmp_path_factory) -> tuple[Path, dict[str, Image.Image]]:
    """Return a folder of digits, photographs in many formats and broken files, and the good images by name."""
    folder = tmp_path_factory.mktemp("pool")
    good = good_files(photographs)
    for i, pixels in enumerate(digit_pools.images[:: len(digit_pools.images) // NUM_DIGITS]):
        digit = Image.fromarray(pixels)
        good[f"z{i:02d}.png"] = (encode(digit, "PNG"), digit.convert("RGB"))
    for name, data in [(name, data) for name, (data, _) in good.items()] + list(bad_files(photographs).items()):
        (folder / name).write_bytes(data)
    return folder, {name: shown for name, (_, shown) in good.items()}


def settings(pool: Path, folder: Path, *overrides: str):
    return digits_config(
        folder,
        f"pool.uri={pool}",
        "embed.device=cpu",
        f"embed.image_size={SIZE}",
        f"embed.proxy_image_size={SIZE}",
        "embed.max_image_pixels=300_000",
        "embed.block_images=15",
        *overrides,
    )


def run(pool: Path, folder: Path, *overrides: str) -> dict:
    """Run stage embed, after stage index if that has not run."""
    config, run_dir = settings(pool, folder, *overrides), RunDir(folder)
    if not (folder / "index").exists():
        mark(run_dir, index.run_index(config, run_dir))
    return embed.run_embed(config, run_dir)


def rows(folder: Path, table: str) -> pa.Table:
    return pa.concat_tables(RunDir(folder).read_table(table))


def ids_by_name(folder: Path) -> dict[str, int]:
    return {uri.rpartition("/")[2]: i for i, uri in enumerate(rows(folder, "index")["uri"].to_pylist())}


def with_plain_pillow(shown: Image.Image, size: int) -> Image.Image:
    """Resize the short side to `size` and cut out the centre square."""
    scale = size / min(shown.size)
    resized = shown.resize((round(shown.width * scale), round(shown.height * scale)), Image.Resampling.BICUBIC)
    left, top = round((resized.width - size) / 2), round((resized.height - size) / 2)
    return resized.crop((left, top, left + size, top + size))


@pytest.fixture(scope="module")
def embedded(ray_cluster, pool, tmp_path_factory) -> tuple[Path, dict]:
    """Return a run with the encoder `pixels`, whose embeddings can be computed by hand."""
    folder = tmp_path_factory.mktemp("embedded")
    return folder, run(pool[0], folder)


@pytest.fixture(scope="module")
def undisturbed(ray_cluster, pool, tmp_path_factory) -> Path:
    """Return a run with a network on one worker."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run(pool[0], folder, *NETWORK, "embed.num_workers=1")
    return folder


def test_embedded_and_rejected_are_the_index_and_copies_are_complete(embedded):
    folder, result = embedded
    embedded_ids, rejected_ids = rows(folder, "embeddings")["sample_id"], rows(folder, "rejected")["sample_id"]
    every_id = rows(folder, "index")["sample_id"].to_pylist()
    assert sorted(embedded_ids.to_pylist() + rejected_ids.to_pylist()) == every_id
    assert len(rejected_ids) == len(REASONS)
    assert set(embedded_ids.to_pylist()) <= set(rows(folder, "proxy_images")["sample_id"].to_pylist())
    assert result == EmbedResult(rows=len(embedded_ids), rejected=len(REASONS), dim=3 * SIZE * SIZE)


def test_embeddings_are_float16_of_unit_length(embedded):
    table = rows(embedded[0], "embeddings")
    assert table.schema.equals(schema.embeddings_schema(3 * SIZE * SIZE))
    norms = np.linalg.norm(np.stack(table["embedding"].to_numpy()).astype(np.float64), axis=1)
    np.testing.assert_allclose(norms, 1, atol=1e-3)


def test_every_good_image_is_embedded_as_plain_pillow_shows_it(embedded, pool):
    folder, _ = embedded
    table, ids = rows(folder, "embeddings"), ids_by_name(folder)
    embeddings = dict(zip(table["sample_id"].to_pylist(), table["embedding"].to_pylist(), strict=True))
    for name, shown in pool[1].items():
        pixels = np.asarray(with_plain_pillow(shown, SIZE)).transpose(2, 0, 1).ravel().astype(float)
        expected = (pixels - pixels.mean()) / np.linalg.norm(pixels - pixels.mean())
        # Of other shapes, plain Pillow rounds the long side and the corner of the crop.
        assert expected @ embeddings[ids[name]] > (0.9995 if shown.width == shown.height else 0.998), name


def test_every_copy_for_the_proxy_network_is_the_image_resized(embedded, pool):
    folder, _ = embedded
    table, ids = rows(folder, "proxy_images"), ids_by_name(folder)
    copies = dict(zip(table["sample_id"].to_pylist(), table["image"].to_pylist(), strict=True))
    for name, shown in pool[1].items():
        copy = decode_proxy_image(copies[ids[name]], SIZE).astype(float)
        assert np.abs(copy - with_plain_pillow(shown, SIZE)).mean() < 5, name


def test_every_bad_image_is_rejected_with_its_reason(embedded, pool):
    rejected = rows(embedded[0], "rejected")
    assert rejected.schema.equals(schema.REJECTED_SCHEMA)
    ids = ids_by_name(embedded[0])
    rows_by_name = {row["uri"].removeprefix(f"{pool[0]}/"): row for row in rejected.to_pylist()}
    assert rows_by_name.keys() == REASONS.keys()
    for name, row in rows_by_name.items():
        assert row["reason"].startswith(REASONS[name]), row
        assert row["sample_id"] == ids[name] and row["stage"] == "embed"


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_more_encoders_give_the_same_bytes(undisturbed, pool, tmp_path, num_workers):
    run(pool[0], tmp_path, *NETWORK, f"embed.num_workers={num_workers}")
    assert contents(tmp_path, *TABLES) == contents(undisturbed, *TABLES)


def test_openvino_embeds_as_torch_up_to_rounding(undisturbed, pool, tmp_path):
    shutil.copytree(undisturbed / "index", tmp_path / "index")
    embed_in_this_process(settings(pool[0], tmp_path, *OPENVINO), RunDir(tmp_path))
    by_torch, by_openvino = (rows(folder, "embeddings") for folder in (undisturbed, tmp_path))
    assert by_openvino["sample_id"].equals(by_torch["sample_id"])
    one, other = (np.stack(table["embedding"].to_numpy()).astype(np.float64) for table in (by_torch, by_openvino))
    assert (one * other).sum(1).min() > 0.9999
    assert contents(tmp_path, *TABLES[1:]) == contents(undisturbed, *TABLES[1:])


@pytest.mark.slow
def test_more_encoders_by_openvino_give_the_same_bytes(ray_cluster, pool, tmp_path):
    for num_workers in (1, 2):
        run(pool[0], tmp_path / str(num_workers), *OPENVINO, f"embed.num_workers={num_workers}")
    assert contents(tmp_path / "1", *TABLES) == contents(tmp_path / "2", *TABLES)


@pytest.mark.slow
def test_a_network_embeds_one_colour_and_rejects_the_same_other_images(undisturbed):
    ids = ids_by_name(undisturbed)
    assert ids["white.bmp"] in rows(undisturbed, "embeddings")["sample_id"].to_pylist()
    others = sorted(ids[name] for name in REASONS if name != "white.bmp")
    assert rows(undisturbed, "rejected")["sample_id"].to_pylist() == others


@pytest.mark.slow
def test_a_killed_encoder_changes_no_byte(embedded, pool, tmp_path, monkeypatch):
    flag = tmp_path / "killed"

    class DyingOnce(worker.DecodeAndEncodeBlock):
        def __call__(self, batch):
            if not flag.exists() and int(batch["first"][0]) == 30:
                flag.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(batch)

    monkeypatch.setattr(ray_stream, "DecodeAndEncodeBlock", DyingOnce)
    run(pool[0], tmp_path / "run", "embed.num_workers=1")
    assert flag.exists()
    assert contents(tmp_path / "run", *TABLES) == contents(embedded[0], *TABLES)


def test_a_resumed_run_repairs_what_is_missing_and_leaves_the_rest_alone(undisturbed, pool, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    names = [path.name for path in sorted((folder / "embeddings").iterdir())]
    with_rejected = sorted(path.name for path in (folder / "rejected").iterdir())
    assert len(names) == 4 and with_rejected[0] == names[0]
    lost = [folder / "rejected" / names[0], folder / "embeddings" / names[1], folder / "proxy_images" / names[2]]
    for path in lost:
        path.unlink()
    kept = {table: (folder / table / names[3]).stat().st_mtime_ns for table in ("embeddings", "proxy_images")}
    run(pool[0], folder, *NETWORK, "embed.num_workers=1")
    assert contents(folder, *TABLES) == contents(undisturbed, *TABLES)
    assert all((folder / table / names[3]).stat().st_mtime_ns == time for table, time in kept.items())
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}
    run(pool[0], folder, *NETWORK)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")} == times


def index_and_embed_here(pool: Path, folder: Path) -> None:
    config, run_dir = settings(pool, folder), RunDir(folder)
    if not (folder / "index").exists():
        mark(run_dir, index.run_index(config, run_dir))
    embed_in_this_process(config, run_dir)


@pytest.mark.slow
def test_every_format_of_the_same_pool_gives_the_same_bytes(ray_cluster, digit_pools, tmp_path):
    tables = {}
    for kind, uri in digit_pools.uris.items():
        index_and_embed_here(uri, tmp_path / kind)
        tables[kind] = contents(tmp_path / kind, *TABLES)
    assert len(tables["folder"]) == 2 * 8
    assert all(table == tables["folder"] for table in tables.values())


def test_an_image_that_can_be_read_again_is_no_longer_rejected(ray_cluster, pool, digit_pools, tmp_path):
    whole = digit_pools.uris["folder"]
    shutil.copytree(whole, tmp_path / "pool")
    (tmp_path / "pool" / "0" / "000.png").write_bytes(b"")
    index_and_embed_here(tmp_path / "pool", tmp_path / "run")
    assert rows(tmp_path / "run", "rejected")["sample_id"].to_pylist() == [0]
    shutil.copy(whole / "0" / "000.png", tmp_path / "pool" / "0" / "000.png")
    (tmp_path / "run" / "embeddings" / schema.range_file(0, 14)).unlink()
    index_and_embed_here(tmp_path / "pool", tmp_path / "run")
    index_and_embed_here(whole, tmp_path / "whole")
    assert contents(tmp_path / "run", *TABLES) == contents(tmp_path / "whole", *TABLES)


@pytest.mark.slow
def test_decoding_tasks_apart_from_encoders_give_the_same_bytes(undisturbed, pool, tmp_path):
    """Run the plan for GPUs, with encoders on CPUs instead."""
    config, run_dir = settings(pool[0], tmp_path, *NETWORK), RunDir(tmp_path)
    shutil.copytree(undisturbed / "index", tmp_path / "index")
    job = worker.make_job(config, run_dir)
    blocks = job.blocks(IndexResult(len(rows(tmp_path, "index")), 1, "folder", []))
    todo = ray.data.from_items([{"first": first, "last": last} for first, last in blocks])
    decoded = todo.map_batches(worker.decode_block, batch_size=1, num_cpus=1, fn_kwargs={"job": job})
    encoded = decoded.map_batches(
        worker.EncodeBlock,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=1,
        fn_constructor_args=(job, "cpu"),
    )
    summaries = encoded.take_all()
    assert sum(summary["rows"] for summary in summaries) == len(rows(tmp_path, "index"))
    assert sum(summary["rejected"] for summary in summaries) == len(rows(tmp_path, "rejected"))
    assert contents(tmp_path, *TABLES) == contents(undisturbed, *TABLES)


def test_a_pool_without_one_good_image_is_an_error_that_says_why(ray_cluster, tmp_path):
    pq.write_table(pa.table({"image": [b"", b"text", None] * 7}), tmp_path / "pool.parquet")
    with pytest.raises(RuntimeError, match="none of the 21 images could be embedded: ") as caught:
        run(tmp_path / "pool.parquet", tmp_path / "run", "embed.num_workers=1")
    for reason in ("empty file (0 bytes)", "not an image that Pillow can read (4 bytes)", "null: the row"):
        assert reason in str(caught.value)
    assert len(rows(tmp_path / "run", "rejected")) == 21


@pytest.mark.parametrize("block_images", ["null", "1", "7", "1000"])
@pytest.mark.parametrize("num_samples", [1, 63, 64, 65, 2000, 1_281_167])
def test_blocks_hold_every_id_once_and_do_not_depend_on_the_workers(tmp_path, block_images, num_samples):
    plans = []
    for num_workers in (1, 7):
        overrides = (f"embed.block_images={block_images}", f"embed.num_workers={num_workers}")
        config = settings(tmp_path, tmp_path, *overrides)
        plans.append(worker.make_job(config, RunDir(tmp_path)).blocks(IndexResult(num_samples, 1, "folder", [])))
    assert plans[0] == plans[1]
    ends = np.array(plans[0])
    assert ends[0, 0] == 0 and ends[-1, 1] == num_samples - 1
    np.testing.assert_array_equal(ends[1:, 0], ends[:-1, 1] + 1)
    assert (ends[:, 0] <= ends[:, 1]).all()
    sizes = ends[:, 1] - ends[:, 0] + 1
    assert sizes.max() * 3 * SIZE * SIZE <= embed_blocks.BLOCK_PIXEL_BYTES


@pytest.mark.gpu
def test_an_encoder_on_a_gpu_agrees_with_one_on_a_cpu_up_to_rounding(pool, tmp_path):
    """The job runs as users run it, on a Ray of its own that has the GPU."""
    for device in ("cpu", "cuda"):
        overrides = [
            *(f"pool.uri={pool[0]}", f"run_dir={tmp_path / device}", "ray_address=local", "until=embed"),
            *(*NETWORK, "embed.max_image_pixels=300_000", "embed.block_images=15", f"embed.device={device}"),
        ]
        subprocess.run([sys.executable, str(JOB), *overrides], check=True, timeout=250)
    cpu, cuda = (rows(tmp_path / device, "embeddings") for device in ("cpu", "cuda"))
    assert cpu["sample_id"].equals(cuda["sample_id"])
    cosines = (np.stack(cpu["embedding"].to_numpy()) * np.stack(cuda["embedding"].to_numpy())).sum(1, dtype=np.float64)
    assert cosines.min() > 0.995
    assert contents(tmp_path / "cpu", *TABLES[1:]) == contents(tmp_path / "cuda", *TABLES[1:])


@pytest.mark.parametrize("broken", [b"", b"not an image", None])
def test_a_damaged_copy_is_an_error_that_names_it_and_says_what_to_do(pool, tmp_path, broken):
    """Of a run whose encoder was trained on its copies; None: a whole image of a format that no copy has."""
    config, run_dir = settings(pool[0], tmp_path), RunDir(tmp_path)
    gif = encode(Image.new("RGB", (SIZE, SIZE)), "GIF")
    copies = [encode(Image.new("RGB", (SIZE, SIZE), "red"), "PNG"), gif if broken is None else broken]
    embed_blocks.write_proxy_images(run_dir, schema.range_file(0, 1), [0, 1], copies)
    batch = {"first": np.array([0]), "last": np.array([1])}
    with pytest.raises(
        ValueError, match=r"proxy image of sample_id 1 in .*part-0.* cannot be decoded.*on_change=rerun"
    ):
        worker.read_copies(batch, worker.make_job(config, run_dir))
