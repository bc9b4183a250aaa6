"""Keys of section cluster.temi: deep clustering by TEMI."""

from dataclasses import dataclass

from elfs_ray.config.declaration import BATCH, POSITIVE, WIDTH, Bounds, max_failures_option, option, precision_option

PCA_SAMPLES = 20_000  # of the pool, on which the principal components are fitted
TEMI_NEIGHBORS = 50  # nearest neighbours of each sample that TEMI learns from, as in the paper


@dataclass
class TemiConfig:
    """Deep clustering by TEMI; null means the profile's value, shown in brackets."""

    profile: str = option(
        "paper",
        "paper: the published settings; cpu: minutes on 2 cores; auto: by whether there are GPUs",
        choices=("auto", "paper", "cpu"),
    )
    num_heads: int | None = option(
        None, "number of heads trained in parallel (paper 50, cpu 8)", unit="heads", bounds=WIDTH
    )
    num_epochs: int | None = option(
        None,
        "number of passes over the pool (paper 200, cpu 10; a larger pool than ImageNet fewer, to see as many images)",
        unit="epochs",
        bounds=POSITIVE,
    )
    num_warmup_epochs: int | None = option(
        None,
        "epochs of linear warm-up (paper 20, cpu 1; fewer where num_epochs is)",
        unit="epochs",
        bounds=Bounds(at_least=0),
    )
    batch_size: int | None = option(
        None,
        "global batch, a multiple of the number of workers (paper 1024, cpu 256; above twice ImageNet 2 to 8 times)",
        unit="images",
        bounds=BATCH,
    )
    learning_rate: float | None = option(
        None,
        "AdamW learning rate for a batch of 256, scaled with the batch size (paper 1e-4, cpu 1e-3)",
        bounds=Bounds(above=0),
    )
    weight_decay: float | None = option(None, "weight decay of AdamW (1e-4)", bounds=Bounds(at_least=0))
    temperature: float | None = option(None, "temperature of the softmax (0.1)", bounds=Bounds(above=0))
    beta: float | None = option(
        None, "exponent of the agreement between neighbours (0.6)", bounds=Bounds(above=0, at_most=1)
    )
    teacher_momentum: float | None = option(
        None, "momentum of the teacher's moving average (paper 0.996, cpu 0.9)", bounds=Bounds(at_least=0, below=1)
    )
    marginal_momentum: float | None = option(
        None, "momentum of the moving average of cluster frequencies (0.9)", bounds=Bounds(at_least=0, below=1)
    )
    hidden_dim: int | None = option(None, "width of the hidden layer (512)", bounds=WIDTH)
    bottleneck_dim: int | None = option(None, "width of the bottleneck (256)", bounds=WIDTH)
    pca_dim: int | None = option(
        None,
        "number of principal components that the heads see (paper none, cpu 128, fewer in a small pool); 0 means the "
        "embeddings themselves",
        bounds=Bounds(at_least=0),
    )
    precision: str = precision_option()
    num_workers: int | None = option(
        None,
        "number of data-parallel workers; null means one for each GPU, or one on CPUs",
        bounds=POSITIVE,
        decides=False,
    )
    max_failures: int = max_failures_option("training")
