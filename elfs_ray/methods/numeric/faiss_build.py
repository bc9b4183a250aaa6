"""Check for faiss, an optional dependency with one build for CPUs and one for GPUs.

k-means does not need it by default, so it is imported where it is used and never at the top of a module.
"""


def check_faiss(purpose: str, device: str) -> None:
    """Raise ValueError where the installed faiss cannot serve `purpose` on a device, "cpu" or "cuda".

    The check looks at the build alone: the machine that runs it may have no GPU although its workers have.
    """
    extra = "gpu" if device == "cuda" else "cpu"
    try:
        import faiss
    except ImportError as error:
        raise ValueError(
            f"{purpose} needs faiss, which is not installed: pip install 'elfs-ray[{extra}]' on every machine"
        ) from error
    if device == "cuda" and not hasattr(faiss, "StandardGpuResources"):
        raise ValueError(
            f"{purpose} runs on a GPU, but the installed faiss is built for CPUs: pip uninstall faiss-cpu, then "
            "pip install 'elfs-ray[gpu]' on every machine, or set cluster.device=cpu"
        )


def device_of_search(device: str) -> str:
    """Return where the installed faiss searches for a caller on a device: a CPU if it is built for those alone.

    Without faiss return the device: `check_faiss` then says what to install for it.
    """
    try:
        import faiss
    except ImportError:
        return device
    return device if hasattr(faiss, "StandardGpuResources") else "cpu"
