"""The paper's five benchmarks, from the form in which their owners publish them to pools. No ray, no config.

published.py holds what is known of each: archives, hashes, counts, addresses. source.py finds, checks and reads what a
person gives; cifar.py, stl10.py, cinic10.py and imagenet.py know the layouts; pool_writer.py writes Parquet; prepare.py
puts them together. Nothing is unpacked to disk, so no path in an archive leads anywhere, and no pickle is ever read.
"""
