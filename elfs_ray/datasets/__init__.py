"""Turn the paper's five benchmarks, as their owners publish them, into pools. No ray, no config.

benchmarks.py says what each is and how torchvision reads it, source.py finds, downloads, checks and unpacks what is
published, pool_writer.py writes Parquet, prepare.py puts them together.
"""

# Here, so that it runs before any module of this package imports torchvision.
from elfs_ray.methods.training import torchvision_compat  # noqa: F401
