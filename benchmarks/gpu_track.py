"""Run CIFAR-10 with the paper's full settings on one large GPU, in parts of under nine minutes.

    until python benchmarks/gpu_track.py --data pools/cifar10 --weights dino.safetensors; do [ $? = 3 ] || break; done
    python benchmarks/gpu_track.py --quick

--data has train/ and test/ as `elfs-ray prepare` writes them, or train.parquet and test.parquet (image, label). Without
--weights, the file of DINO ViT-B/16, its weights come from the Hugging Face hub. The settings are those of
the preset cifar10: ResNet-18, 200 epochs of the proxy, TEMI with 50 heads; then 40,000 steps of 256 images on every
selection, four trainings at once on the GPU. A part ends with exit code 3 after --minutes. Its results are kept, up to
the last epoch of the proxy or the last minute of a training, and the same command resumes. Exit code 0 means that the
table is complete. --quick runs every part on 1,000 digits with a small network, and also works on CPUs.
"""

import sys
import tempfile
from functools import partial
from pathlib import Path

from helpers.reporting import command_line
from helpers.tracks import Track, parts_of, run_for, run_track, write_digits

BUDGETS = (0.1, 0.2, 0.3, 0.5, 0.7)
METHODS = (
    *("random", "prototypicality", "d2", "zcore", "aum_hardest", "elfs", "elfs_auto", "dual"),
    *("badge", "aum_ccs", "el2n", "forgetting", "full"),
)
CIFAR10 = Track(
    "cifar10",
    BUDGETS,
    METHODS,
    ("train.num_workers=1", "select.hard_fraction=[0.4,auto,auto,auto,auto]"),  # the paper's value at 10% is 0.4
    ("published=cifar10", "gpus_per_training=0.25"),
    preset="cifar10",
)
QUICK = Track(
    "digits",
    (0.2,),
    METHODS,
    (
        *("embed.encoder=pixels", "embed.image_size=28", "embed.proxy_image_size=28", "cluster.temi.profile=cpu"),
        *("cluster.temi.num_epochs=2", "train.network=small_cnn", "train.epochs=2", "train.batch_size=128"),
        *("train.augmentation=crop", "select.zcore_draws=2000", "ray_address=local"),
    ),
    (
        *("published=cifar10", "network=small_cnn", "iterations=20", "batch_size=32", "lr=0.05", "badge.rounds=1"),
        "ray_address=local",
    ),
    preset="cifar10",
)


def main() -> int:
    parser = command_line(__doc__)
    parser.add_argument("--data", type=Path, help="folder with train.parquet and test.parquet")
    parser.add_argument("--weights", type=Path, help="file of DINO ViT-B/16's weights")
    parser.add_argument("--folder", type=Path, default=Path("runs/gpu_track"), help="folder of the run and its results")
    parser.add_argument("--minutes", type=float, default=8.5, help="length of a part")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="every part on 1,000 digits")
    arguments = parser.parse_args()
    if arguments.quick:
        with tempfile.TemporaryDirectory() as folder:
            pool, test = write_digits(Path(folder))
            return run_for(arguments.minutes, partial(run_track, QUICK, pool, test, Path(folder), seeds=1))
    if arguments.data is None:
        parser.error("give --data, a folder with train.parquet and test.parquet, or --quick")
    weights = (f"embed.weights={arguments.weights}",) if arguments.weights else ()
    track = Track(**{**vars(CIFAR10), "pipeline": (*CIFAR10.pipeline, *weights)})
    measure = partial(run_track, track, *parts_of(arguments.data), arguments.folder, arguments.seeds)
    return run_for(arguments.minutes, measure)


if __name__ == "__main__":
    sys.exit(main())
