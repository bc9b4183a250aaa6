"""Turn the paper's five benchmarks, as their owners publish them, into pools. No ray, no config.

`benchmarks` describes them, `source` finds what the user named, `unpack` downloads, checks and unpacks archives,
`readers` reads them by torchvision, `pool_writer` writes Parquet, and `prepare` puts these together.
"""
