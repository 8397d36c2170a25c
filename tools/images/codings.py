"""Layers coded by the programs that people use: gzip, pigz, zstd, and containerd's stargz converter for eStargz and
zstd:chunked. The last needs a containerd, which runs here for as long as it takes, on a socket of its own."""

import itertools
import json
import subprocess
import tempfile
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


def skopeo(layers, coding, work):
    """Plain layers as skopeo codes them, which is how podman and buildah do it: `gzip` by several threads, `zstd`, or
    `zstd:chunked`; the last with containers/storage's table of contents, which is not quite containerd's. That of Debian 12
    leaves out what follows a tar's end, and keeps the diff_id of the tar that had it: here it is put right."""
    name = coding.replace(":", "")
    source, result = work / f"skopeo-{name}-source", work / f"skopeo-{name}"
    Layout(source).image("x", layers)
    run(["skopeo", "copy", "--quiet", "--dest-compress-format", coding, f"oci:{source}:x", f"oci:{result}:x"])
    return layers_of(result, f"skopeo's {coding}", recount=coding == "zstd:chunked")


def layers_of(top, who, recount=False):
    """The layers of the only image of a layout that somebody else wrote, all they say checked."""
    read = Layout.reader(top)
    described = json.loads((top / "index.json").read_text())["manifests"][0]
    while "manifests" in (manifest := json.loads(read(described["digest"]).read_text())):
        described = manifest["manifests"][0]
    config = json.loads(read(manifest["config"]["digest"]).read_text())
    found = []
    for descriptor, diff_id in zip(manifest["layers"], config["rootfs"]["diff_ids"], strict=True):
        made = layer(read(descriptor["digest"]), descriptor["mediaType"], descriptor.get("annotations"))
        said = (descriptor["digest"], descriptor["size"], made.diff_id if recount else diff_id)
        if (made.digest, made.size, made.diff_id) != said:
            raise SystemExit(f"test-images: {who} says {descriptor}, {diff_id}; found {made}")
        found.append(made)
    return found


class Containerd:
    """A containerd of our own, below `work`, ended by its process id."""

    CONFIG = """version = 2
root = "{work}/root"
state = "{work}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
address = "{run}/socket"
[ttrpc]
address = "{run}/ttrpc"
"""

    def __init__(self, work):
        self.work = Path(work)
        self.numbers = itertools.count()

    def __enter__(self):
        self.work.mkdir()
        # A socket's path has to be short, whatever the cache's is.
        self.run = tempfile.TemporaryDirectory(prefix="tarblk-")
        (self.work / "config.toml").write_text(self.CONFIG.format(work=self.work, run=self.run.name))
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
        self.run.cleanup()

    def ctr(self):
        return ["ctr-remote", "--address", f"{self.run.name}/socket"]

    def convert(self, layers, options):
        """The layers as containerd's converter recodes them, in the same order."""
        number = next(self.numbers)
        name = f"test.invalid/image:{number}"
        source = Layout(self.work / f"source{number}")
        source.image(name, layers)
        archive = self.work / f"archive{number}.tar"
        run(["tar", "-C", source.top, "-cf", archive, "."])
        run([*self.ctr(), "images", "import", "--no-unpack", archive])
        archive.unlink()
        run([*self.ctr(), "images", "convert", "--oci", *options, name, name + "-converted"])
        run([*self.ctr(), "images", "export", archive, name + "-converted"])
        result = self.work / f"result{number}"
        result.mkdir()
        run(["tar", "-C", result, "-xf", archive])
        archive.unlink()
        return layers_of(result, f"containerd's {options[0]}")

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
