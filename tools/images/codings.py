"""Layers coded by the programs that people use: gzip, pigz, zstd, and containerd's stargz converter for eStargz and
zstd:chunked. The last needs a containerd, which runs here for as long as it takes, on a socket of its own."""

import json
import subprocess
import time
from pathlib import Path

from .layout import LAYER, UNPACKERS, Layout, layer

GZIP = LAYER + "+gzip"
ZSTD = LAYER + "+zstd"


def run(command, **options):
    result = subprocess.run([str(word) for word in command], capture_output=True, check=False, **options)
    if result.returncode != 0:
        said = result.stderr.decode(errors="replace").strip()
        raise SystemExit(f"test-images: {command[0]} failed ({result.returncode}): {said}")
    return result.stdout


def filtered(command, tar, to):
    """What a filter makes of a tar, as a file."""
    with open(tar, "rb") as source, open(to, "wb") as target:
        subprocess.run(command, stdin=source, stdout=target, check=True)
    return to


def plain(tar, work):
    return layer(tar, LAYER)


def gzip(tar, work):
    return layer(filtered(["gzip", "-6", "-n"], tar, work / f"{tar.stem}.gz"), GZIP)


def pigz(tar, work):
    """By several threads, and with a sync marker about every 128 KiB."""
    return layer(filtered(["pigz", "-6", "-n", "-p", "4"], tar, work / f"{tar.stem}.pigz"), GZIP)


def zstd(tar, work):
    """One frame, from a pipe: its header does not say how long the content is."""
    return layer(filtered(["zstd", "-q", "-3", "--single-thread"], tar, work / f"{tar.stem}.zst"), ZSTD)


class Containerd:
    """A containerd of our own, below `work`, ended by its process id."""

    CONFIG = """version = 2
root = "{work}/root"
state = "{work}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
address = "{work}/socket"
[ttrpc]
address = "{work}/ttrpc"
"""

    def __init__(self, work):
        self.work = Path(work)
        self.runs = 0

    def __enter__(self):
        self.work.mkdir()
        (self.work / "config.toml").write_text(self.CONFIG.format(work=self.work))
        self.log = open(self.work / "log", "wb")
        command = ["containerd", "--config", str(self.work / "config.toml")]
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log)
        deadline = time.monotonic() + 60
        while subprocess.run([*self.ctr(), "version"], capture_output=True, check=False).returncode != 0:
            if time.monotonic() > deadline or self.process.poll() is not None:
                said = (self.work / "log").read_text()[-2000:]
                self.__exit__()
                raise SystemExit(f"test-images: containerd did not start: {said}")
            time.sleep(0.1)
        return self

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()

    def ctr(self):
        return ["ctr-remote", "--address", str(self.work / "socket")]

    def convert(self, layers, options):
        """The layers as containerd's converter recodes them, in the same order."""
        self.runs += 1
        name = f"test.invalid/image:{self.runs}"
        source = Layout(self.work / f"source{self.runs}")
        source.image(name, layers)
        archive = self.work / "archive.tar"
        run(["tar", "-C", source.top, "-cf", archive, "."])
        run([*self.ctr(), "images", "import", "--no-unpack", archive])
        archive.unlink()
        run([*self.ctr(), "images", "convert", "--oci", *options, name, name + "-converted"])
        run([*self.ctr(), "images", "export", archive, name + "-converted"])
        result = self.work / f"result{self.runs}"
        result.mkdir()
        run(["tar", "-C", result, "-xf", archive])
        archive.unlink()
        read = Layout.reader(result)
        described = json.loads((result / "index.json").read_text())["manifests"][0]
        while "manifests" in (manifest := json.loads(read(described["digest"]).read_text())):
            described = manifest["manifests"][0]
        config = json.loads(read(manifest["config"]["digest"]).read_text())
        found = []
        for descriptor, diff_id in zip(manifest["layers"], config["rootfs"]["diff_ids"], strict=True):
            made = layer(read(descriptor["digest"]), descriptor["mediaType"], descriptor.get("annotations"))
            if (made.digest, made.diff_id, made.size) != (descriptor["digest"], diff_id, descriptor["size"]):
                raise SystemExit(f"test-images: containerd's {options[0]} says {descriptor}, {diff_id}; found {made}")
            found.append(made)
        return found

    def estargz(self, layers):
        """eStargz: a gzip member for every file or chunk, and a table of contents as the last entry."""
        return self.convert(layers, ["--estargz", "--estargz-compression-level=6"])

    def zstdchunked(self, layers):
        """zstd:chunked: a frame for every file or chunk, and a table of contents in a skippable frame."""
        return self.convert(layers, ["--zstdchunked"])


def plain_of(part, work):
    """A layer without its compression, as gzip(1) or zstd(1) undo it."""
    tar = work / f"{part.digest.removeprefix('sha256:')}.tar"
    if part.media_type == LAYER:
        return part
    with open(tar, "wb") as target:
        subprocess.run([*UNPACKERS[part.media_type], str(part.blob)], stdout=target, check=True)
    return layer(tar, LAYER, diff_id=part.diff_id)
