"""The science: arrays in, arrays out. Nothing here imports ray, reads a config or touches a run directory."""
